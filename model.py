"""GRAtt-VIS as one model: frames -> backbone -> pixel decoder -> frame decoder -> tracker -> masks of a video.

Paper: GRAtt-VIS (arXiv 2305.17096) on Mask2Former (2112.01527), VITA (2206.04403) and GenVIS (2211.08834). Upstream:
grattvis/grattvis_model.py.

    from model import build_model
    model = build_model("r50", num_classes=25).eval()
    video = model.segment_video(frames, output_size=(720, 1280), top_k=20)    # frames: uint8 (T, 3, H, W), RGB
    video = model.encode_video(batches, (720, 1280), top_k=20)                # the same as run-length codes: any length
    tracks, state = model.step(frame, state)                                  # the same live, frame by frame

Shape letters of the whole project:
    B videos, T frames, N = B * T frames of all videos, H height, W width (h, w at stride 4)
    Q queries of the tracker, F queries of a frame, C channels, K classes (index K means "no object")
    L detector layers handed to the tracker (3 in training, the last one otherwise), D decoder layers of the tracker,
    S = L * B streams of the tracker, layer-major
"""
import inspect
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from types import MethodType

import numpy as np
import torch
from torch import Tensor, nn

from backbone import ResNetBackbone, build_backbone
from batching import check_frame, in_batches, padded, regrouped
from detector import FrameDecoder, PixelDecoder
from evaluation.postprocess import (
    EncodedVideo,
    FrameTracks,
    RunningScores,
    StepState,
    Stretch,
    VideoResult,
    best_pairs,
    check_finite,
    class_probabilities,
    mask_confidence,
    resize_masks,
    with_mask_scores,
)
from evaluation.run_length import PackedCodes, encode_counts
from fast.cuda_graphs import Beside, Replay
from fast.folded_resnet import FusedResNet, fold_resnet
from fast.half_precision import cast_weights
from tracker import ClipPrediction, Tracker, TrackerState
from transformer import mask_logits

PIXEL_MEAN = (123.675, 116.28, 103.53)   # RGB, 0..255
PIXEL_STD = (58.395, 57.12, 57.375)
VITA_WINDOW = 6                          # frames an encoder window of VITA spans
FRAMES_TOGETHER = 12                     # that a GPU takes at once; another number is another rounding
FROZEN_TOGETHER = 20                     # frames that a frozen detector takes at once in training
MASKS_TOGETHER = 4                       # frames whose masks are made at once: they are large
MASK_PIXELS = 2 * 10 ** 8                # of the masks that encode_video has at once


@dataclass
class FrameOutput:
    """What the detector (backbone, pixel decoder, frame decoder) knows of N frames."""
    predictions: list[tuple[Tensor, Tensor]]  # of each decoder layer (not training: the last): logits (N, F, K + 1), kernels (N, F, C + 1)
    queries: Tensor                           # (L, N, F, C), decoder_norm'ed
    features: Tensor                          # (N, C, h, w), the pixel decoder's: all masks are kernels on them


@dataclass
class TrainingOutput:
    """One training step's predictions; losses.py turns them and the targets into losses."""
    frames: FrameOutput
    clips: list[ClipPrediction]
    padded_size: tuple[int, int]              # pixels, the size that masks are normalised by


class GRAttVIS(nn.Module):
    """The whole model. `forward` serves training, `segment_video` and `step` inference."""

    def __init__(self, num_classes: int, backbone: str, norm: str = "frozen", swin_window: int | None = None,
                 channels: int = 256, heads: int = 8, queries: int = 100, frame_queries: int = 100,
                 pixel_layers: int = 6, pixel_feed_forward: int = 1024, frame_layers: int = 9,
                 tracker_encoder_layers: int = 6, tracker_decoder_layers: int = 3, feed_forward: int = 2048,
                 propagation: str = "gated", gate_mask: str = "additive", window: int | None = None, clip_length: int = 1,
                 query_noise: float = 0.0):
        """clip_length: frames the tracker reads at once (GenVIS semi-online: 3); "clip" propagation reads all.
        window: see Tracker; None = 6 frames for "clip" (VITA), 0 otherwise. query_noise: see Tracker. Other arguments are sizes."""
        super().__init__()
        if clip_length < 1 or num_classes < 1:
            raise ValueError(f"clip_length and num_classes must be at least 1, not {clip_length} and {num_classes}")
        self.num_classes, self.propagation, self.clip_length = num_classes, propagation, clip_length
        self.backbone = build_backbone(backbone, norm, swin_window)
        self.pixel_decoder = PixelDecoder(self.backbone.channels, channels, heads, pixel_layers, pixel_feed_forward)
        self.frame_decoder = FrameDecoder(num_classes, channels, frame_queries, heads, frame_layers, feed_forward)
        if window is None:
            window = VITA_WINDOW if propagation == "clip" else 0
        self.tracker = Tracker(num_classes, channels, channels, queries, frame_queries, tracker_encoder_layers,
                               tracker_decoder_layers, heads, feed_forward, propagation, gate_mask, window,
                               query_noise)
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD)[:, None, None], persistent=False)
        self.replay, self.mask_confidence = Replay(), mask_confidence

    def train(self, mode: bool = True) -> "GRAttVIS":
        """Training mode, or not; what is kept to infer faster is given back before training."""
        if mode:
            self.replay.forget()
        return super().train(mode)

    def accelerate(self, dtype: torch.dtype = torch.float32, compiled: bool = False) -> "GRAttVIS":
        """Make ready for inference alone, in place; returns the model.

        dtype: that of the autocast it will run under: the weights of all products are cast once, as autocast would at every call,
        so results are the same. compiled: by torch.compile, which takes half a minute for every size of frames, then about half the
        time a frame, and rounds otherwise; a ResNet's batch norms become part of its convolutions, and in 16 bit on a GPU each of
        these is one kernel with all that follows it.
        """
        if compiled and isinstance(self.backbone, ResNetBackbone):
            fold_resnet(self.backbone, dtype)
        if dtype != torch.float32:
            cast_weights(self.modules(), dtype)
        if self.pixel_mean.is_cuda:
            self.to(memory_format=torch.channels_last)
        if compiled:
            self.compile_parts()
        return self.eval()

    def compile_parts(self, detector: bool = True) -> None:
        """torch.compile what takes the time, for training or inference: the detector, anew for every size of frames, and the tracker,
        which sees none of the size. What is made again in backward is compiled apart: inside of something larger it would be kept."""
        parts = [(self.tracker, "encode"), (self.tracker, "decode_clip")]
        if detector:
            fused = isinstance(self.backbone, FusedResNet)    # its blocks are cuDNN's kernels, nothing else
            parts.append((self.backbone, "stem" if fused else "forward"))
        if detector and self.pixel_decoder.recompute:
            parts += [*((layer, "forward") for layer in self.pixel_decoder.layers), (self.pixel_decoder, "fpn_step"),
                      (self.frame_decoder, "forward")]
        elif detector:
            parts.append((self, "decode"))
        for owner, name in parts:
            compiled = torch.compile(getattr(type(owner), name), dynamic=False)
            setattr(owner, name, MethodType(compiled, owner))                            # a copy of the model has its own
        self.mask_confidence = torch.compile(mask_confidence)

    def hold_frozen(self, dtype: torch.dtype) -> None:
        """Keep the weights of products that are not trained in `dtype`, as autocast would cast them at every use. `state_dict` has
        what they were."""
        frozen = [module for module in self.modules() if not any(parameter.requires_grad for parameter in module.parameters())]
        before = {name: parameter.detach().cpu().clone() for name, parameter in self.named_parameters() if not parameter.requires_grad}
        cast_weights(frozen, dtype)

        def give_back(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict) -> None:
            state.update((prefix + name, value) for name, value in before.items() if prefix + name in state)

        self.register_state_dict_post_hook(give_back)

    def prepare(self, frames: Tensor | list[Tensor]) -> Tensor:
        """uint8 frames (3, H, W), RGB, sizes may differ -> (N, 3, H', W'): normalised, then zero-padded to multiples of 32."""
        if not len(frames):
            raise ValueError("the video has no frames")
        for frame in frames:
            check_frame(frame)
        sizes = [tuple(frame.shape[1:]) for frame in frames]
        height, width = padded(*map(max, zip(*sizes)))
        if self.pixel_mean.is_cuda:                                                      # channels last: convolutions are faster there
            images = self.pixel_mean.new_zeros(len(frames), height, width, 3).permute(0, 3, 1, 2)
        else:
            images = self.pixel_mean.new_zeros(len(frames), 3, height, width)
        first = 0
        for (height, width), own in groupby(sizes):                                      # neighbours of one size together
            part = slice(first, first + len(list(own)))
            group = frames[part] if isinstance(frames, Tensor) else torch.stack(frames[part])
            group = group.to(images.device, non_blocking=True)
            images[part, :, :height, :width] = (group - self.pixel_mean) / self.pixel_std
            first = part.stop
        return images

    def detect(self, images: Tensor) -> FrameOutput:
        """images (N, 3, H, W) from `prepare`."""
        return FrameOutput(*self.look(images))

    def look(self, images: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
        """What FrameOutput holds, as plain tensors, which can be compiled and captured."""
        return self.decode(self.backbone(images))                                        # apart: not both are always compiled

    def decode(self, maps: list[Tensor]) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
        """What `look` returns, of the backbone's maps."""
        levels, features = self.pixel_decoder(maps)
        device = features.device.type
        if torch.is_autocast_enabled(device):
            features = features.to(torch.get_autocast_dtype(device))                     # what all that read them would cast them to
        predictions, queries = self.frame_decoder(levels, features, self.pixel_decoder.mask_features)
        return predictions, queries, features

    def detect_in_parts(self, images: Tensor) -> FrameOutput:
        """`detect`; a detector that is not trained looks at some images at a time, which takes less memory, unless its norms look at
        all images of a batch."""
        trained = any(parameter.requires_grad for name, parameter in self.named_parameters() if not name.startswith("tracker."))
        if trained or any(isinstance(module, nn.BatchNorm2d) for module in self.backbone.modules()):
            return self.detect(images)
        with torch.no_grad():
            predictions, queries, features = zip(*map(self.look, images.split(FROZEN_TOGETHER)))
        predictions = [tuple(map(torch.cat, zip(*layer))) for layer in zip(*predictions)]
        return FrameOutput(predictions, torch.cat(queries, 1), torch.cat(features))

    def forward(self, videos: list[Tensor]) -> TrainingOutput:
        """B videos of T frames each, uint8 (T, 3, H, W); T the same for all, H and W may differ."""
        batch, length = len(videos), len(videos[0]) if videos else 0
        if any(len(video) != length for video in videos):
            raise ValueError(f"all videos of a batch need the same number of frames, not {[len(v) for v in videos]}")
        images = self.prepare([frame for video in videos for frame in video])
        padded_size, frames = tuple(images.shape[-2:]), self.detect_in_parts(images)
        del images                                                                       # they are large
        queries = frames.queries.unflatten(1, (batch, length))                           # (L, B, T, F, C)
        clip_length = length if self.propagation == "clip" else self.clip_length
        clips, state = [], None
        for part in queries.split([length - length % clip_length, length % clip_length], 2):  # whole clips, then a shorter one
            if part.shape[2]:
                found, state = self.tracker(part.unflatten(2, (-1, min(clip_length, part.shape[2]))), state)
                clips += found
        return TrainingOutput(frames, clips, padded_size)

    @torch.no_grad()
    def follow(self, batches: Iterable[Tensor]) -> Iterator[Stretch]:
        """The clips of a video, as soon as their frames are there; upstream grattvis_model.py, `inference`.

        batches: uint8 (N, 3, H, W), RGB, all frames of one size. On a GPU, frames are taken FRAMES_TOGETHER at once, the last ones
        filled up with copies, on a CPU, where more are no faster, one by one: so nothing depends on how they come, not even by
        rounding. Nothing is kept of a clip but the tracker's state ("clip" propagation has one clip, the whole video).
        """
        queries, features, state, size, stretch = [], [], None, None, None
        together = FRAMES_TOGETHER if self.pixel_mean.is_cuda else 1
        clip_length = sys.maxsize if self.propagation == "clip" else self.clip_length
        beside, ahead = Beside(self.pixel_mean.device), Beside(self.pixel_mean.device, waits=False)
        self.replay.check_weights(self)
        for frames in regrouped(batches, together):
            size, count = tuple(frames.shape[-2:]), len(frames)
            with ahead:                                                                  # while the frames before are looked at
                frames = frames.to(self.pixel_mean.device, non_blocking=True)
            ahead.join(frames)
            if count < together:
                frames = torch.cat((frames, frames[-1:].expand(together - count, -1, -1, -1)))
            found = self.replay(self.detect_queries, frames)
            if clip_length == 1:
                if stretch:
                    beside.join()
                    yield stretch
                with beside:                                                             # the detection of the next frames
                    outputs, state = self.track_frames(found[0], count, state)
                stretch = Stretch(*outputs, found[1][:count], size)
                continue
            queries, features = [*queries, *found[0][:count]], [*features, *found[1][:count]]
            if whole := len(queries) // clip_length * clip_length:
                outputs, state = self.track(torch.stack(queries[:whole]), clip_length, state)
                yield Stretch(*outputs, torch.stack(features[:whole]), size)
                queries, features = queries[whole:], features[whole:]
        if size is None:
            raise ValueError("the video has no frames")
        if stretch:
            beside.join()
            yield stretch
        if queries:
            yield Stretch(*self.track(torch.stack(queries), len(queries), state)[0], torch.stack(features), size)

    def detect_queries(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (N, 3, H, W) -> frame queries (N, F, C) and the pixel decoder's features (N, C, h, w)."""
        output = self.detect(self.prepare(frames))
        return output.queries[-1], output.features

    def track_frames(self, queries: Tensor, count: int, state: TrackerState | None) -> tuple[tuple[Tensor, ...], TrackerState]:
        """Clips of one frame, by their queries (N, F, C), the first `count` of which count. Returns what `track` does."""
        if self.tracker.use_memory:
            return self.track(queries[:count], 1, state)
        # without a memory, all there is to know is a function of these queries and the carried ones
        query = (state or self.tracker.initial_state(1)).query
        *outputs, query = self.replay(self.track_flat, queries, query)
        return tuple(part[:count] for part in outputs), TrackerState(query)

    def track_flat(self, queries: Tensor, query: Tensor) -> tuple[Tensor, ...]:
        """`track`, of clips of one frame, as a function of tensors: frame queries (N, F, C) and carried queries (1, Q, C)."""
        outputs, state = self.track(queries, 1, TrackerState(query))
        return *outputs, state.query

    def track(self, queries: Tensor, length: int, state: TrackerState | None) -> tuple[tuple[Tensor, Tensor, Tensor], TrackerState]:
        """Frame queries (T, F, C) of whole clips of `length` frames -> logits (clips, Q, K + 1), mask kernels (T, Q, C + 1) and gates
        (T, D, Q) bool, True = open."""
        predictions, state = self.tracker(queries.unflatten(0, (-1, length))[None, None], state)
        logits = torch.stack([prediction.logits[-1][-1, 0] for prediction in predictions])
        kernel = torch.stack([prediction.mask_kernel[-1][-1, 0] for prediction in predictions])
        gates = [gate[-1, 0] for prediction in predictions for gate in prediction.gate_logits]
        gates = torch.stack(gates).unflatten(0, (len(logits), -1)) if gates else logits.new_empty(len(logits), 0, logits.shape[1])
        kernel, gates = (part[:, None].expand(-1, length, -1, -1).flatten(0, 1) for part in (kernel, gates))
        return (logits, kernel, gates >= 0), state

    @torch.no_grad()
    def segment_video(self, frames: Tensor | Iterable[Tensor], output_size: tuple[int, int] | None = None,
                      top_k: int = 10) -> VideoResult:
        """Segment and track a whole video, all masks of which fit into memory; `encode_video` is for any other.

        frames: uint8 (T, 3, H, W) RGB, or an iterable of (3, H, W), all of one size; resized by the caller (data.py).
        output_size: (height, width) of the masks; None = that of the frames. Raises ValueError on an empty video.
        """
        self.check_request(output_size, top_k)
        stretches = list(self.follow(frames.split(FRAMES_TOGETHER) if isinstance(frames, Tensor) else in_batches(frames, FRAMES_TOGETHER)))
        logits = torch.cat([stretch.logits for stretch in stretches])                    # (clips, Q, K + 1)
        scores, labels, chosen = best_pairs(class_probabilities(logits).amax(0), top_k)
        size, found, confidence = stretches[0].size, [], []
        while stretches:
            stretch = stretches.pop(0)                                                   # let go of its features one by one
            for kernel, features in zip(*(part.split(FRAMES_TOGETHER) for part in (stretch.mask_kernel[:, chosen], stretch.features))):
                found.append(mask_logits(kernel, features).transpose(0, 1))
                confidence.append(self.mask_confidence(resize_masks(found[-1], size)))
        scores, order = with_mask_scores(scores, *(torch.cat(part, 1).sum(1) for part in zip(*confidence)))
        found = torch.cat(found, 1)[order]                                               # (K, T, h, w), small
        masks = torch.empty(*found.shape[:2], *(output_size or size), dtype=torch.bool, device=logits.device)
        for part, own in zip(found.split(MASKS_TOGETHER, 1), masks.split(MASKS_TOGETHER, 1)):
            torch.gt(resize_masks(part, size, output_size), 0, out=own)
        return VideoResult(scores, labels[order], masks, chosen[order], logits)

    @torch.no_grad()
    def encode_video(self, batches: Iterable[Tensor], output_size: tuple[int, int] | None = None,
                     top_k: int = 10) -> EncodedVideo:
        """What `segment_video` does, of a video of any length: nothing is kept of a frame but codes and scores.

        batches: as for `follow`. Which queries are among the best is known at the end alone, since a class score is a
        maximum over all frames: until then every query's masks are kept, as codes on the CPU. FloatingPointError where scores are
        not finite (the other two leave that to their caller, since looking means waiting for the GPU).
        """
        self.check_request(output_size, top_k)
        scores, codes, gates, recent, buffer = None, None, [], 0, None
        for stretch in self.follow(batches):
            size, count = output_size or stretch.size, stretch.mask_kernel.shape[1]
            part = max(1, MASK_PIXELS // 2 // max(math.prod(size), math.prod(stretch.size)))
            if buffer is None:
                frames = min(8, max(1, MASK_PIXELS // (count * math.prod(size))))        # encoded together: fewer waits for the GPU
                buffer = torch.empty(frames, count, *size, dtype=torch.bool, device=stretch.logits.device)
                codes = PackedCodes(count)
            class_scores = class_probabilities(stretch.logits).amax(0)
            for kernels, feature in zip(stretch.mask_kernel, stretch.features):
                confidence = []
                for kernel, masks in zip(kernels.split(part), buffer[recent].split(part)):
                    found = mask_logits(kernel[None], feature[None])[0]                  # (part of Q, h, w)
                    at_frame = resize_masks(found, stretch.size)
                    confidence.append(self.mask_confidence(at_frame))
                    torch.gt(at_frame if size == stretch.size else resize_masks(found, stretch.size, size), 0, out=masks)
                scores = RunningScores(class_scores, *map(torch.cat, zip(*confidence))).joined(scores)
                recent += 1
                if recent == len(buffer):
                    codes.add(encode_counts(buffer.flatten(0, 1)))
                    recent = 0
            gates.append(stretch.gates.cpu())
        if recent:
            codes.add(encode_counts(buffer[:recent].flatten(0, 1)))
        scores, labels, chosen = (values.cpu() for values in scores.best(top_k))
        check_finite(scores)
        segmentations = [[{"size": list(size), "counts": code} for code in own] for own in codes.take(chosen.tolist())]
        return EncodedVideo(scores, labels, chosen, segmentations, torch.cat(gates).permute(2, 0, 1)[chosen])

    @torch.no_grad()
    def step(self, frame: Tensor, state: StepState | None = None, output_size: tuple[int, int] | None = None,
             top_k: int = 10) -> tuple[FrameTracks, StepState]:
        """One frame (3, H, W) uint8 of a live video, causally; state is None at its start, see `reset`.

        Scores are those of segment_video for the frames so far; at the last frame the two agree.
        """
        self.check_request(output_size, top_k, first=state is None)
        if self.propagation == "clip" or self.clip_length != 1:
            raise ValueError("step needs a model that goes frame by frame, not one that reads clips of several frames")
        check_frame(frame)
        size = tuple(frame.shape[-2:])
        if state is None:
            self.replay.check_weights(self)
        elif state.size != size:
            raise ValueError(f"all frames of a video must have one size, not {state.size} and {size}")
        frames = frame[None].to(self.pixel_mean.device, non_blocking=True)
        queries, features = self.replay(self.detect_queries, frames)
        (logits, kernel, gates), tracker_state = self.track_frames(queries, 1, state.tracker if state else None)
        found = mask_logits(kernel, features)[0]                                         # (Q, h, w)
        confidence = self.mask_confidence(resize_masks(found, size))
        running = RunningScores(class_probabilities(logits[0]), *confidence).joined(state.scores if state else None)
        scores, labels, chosen = running.best(top_k)
        masks = resize_masks(found[chosen], size, output_size) > 0
        return FrameTracks(scores, labels, masks, chosen, logits[0], gates[0].T[chosen]), StepState(size, tracker_state, running)

    @staticmethod
    def reset() -> None:
        """The state before a video's first frame, to start `step` on another one: tracks, scores and memory are forgotten."""
        return None

    def check_request(self, output_size: tuple[int, int] | None, top_k: int,
                      first: bool = True) -> None:
        """Refuse what would return noise or nothing.

        RuntimeError if any module is in training mode (gates would be sampled, paths dropped), of
        which only the first frame of a video is asked; ValueError unless top_k is a positive int
        and output_size two of them, or None.
        """
        for name, module in self.named_modules() if first else [("", self)]:
            if module.training:
                raise RuntimeError(f"{name or 'the model'} is in training mode: call model.eval() "
                                   "first")
        if not is_positive(top_k):
            raise ValueError(f"top_k must be an int of at least 1, not {top_k!r}")
        if output_size is not None and not is_size(output_size):
            raise ValueError("output_size must be (height, width), two ints of at least 1, not "
                             f"{output_size!r}")


def is_positive(number) -> bool:
    """Whether it is an int of at least 1."""
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool) and number >= 1


def is_size(pair) -> bool:
    """Whether it is a tuple or list of two ints of at least 1."""
    return isinstance(pair, (tuple, list)) and len(pair) == 2 and all(map(is_positive, pair))


PRESETS = {  # a model of the paper a line; every value is an argument of GRAttVIS and can be overridden in build_model
    "r50": dict(backbone="resnet50"),
    "r101": dict(backbone="resnet101"),
    "swin_t": dict(backbone="swin_t"),
    "swin_s": dict(backbone="swin_s"),
    "swin_b": dict(backbone="swin_b"),
    "swin_l": dict(backbone="swin_l", frame_queries=200),
    "toy": dict(backbone="resnet10", norm="batch", channels=64, heads=4, queries=20, frame_queries=20, pixel_layers=1,
                pixel_feed_forward=256, frame_layers=3, tracker_encoder_layers=1, feed_forward=256),
    "small": dict(backbone="resnet10_thin", norm="batch", channels=96, heads=6, queries=20, frame_queries=20, pixel_layers=3,
                  pixel_feed_forward=384, frame_layers=6, tracker_encoder_layers=2, feed_forward=384),
}
# Short side of the frames that they are tested on, pixels: the official one, and that of the synthetic videos
TEST_SIDES = {"r50": 360, "r101": 360, "swin_t": 448, "swin_s": 448, "swin_b": 448, "swin_l": 448, "toy": 96, "small": 96}


def build_model(preset: str, num_classes: int, propagation: str = "gated", gate_mask: str = "additive",
                **overrides) -> GRAttVIS:
    """A model by preset (the keys of PRESETS), randomly initialised, in training mode.

    propagation: "gated" (GRAtt-VIS), "plain", "memory" (GenVIS), "gated+memory", "clip" (VITA).
    gate_mask: "additive" (as released) or "blocked" (as in the paper), see Tracker.attention_mask.
    overrides: other arguments of GRAttVIS, such as norm="group" to train from scratch. ValueError for unknown names.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    unknown = overrides.keys() - inspect.signature(GRAttVIS).parameters.keys()
    if unknown:
        raise ValueError(f"GRAttVIS has no argument {', '.join(sorted(unknown))}")
    return GRAttVIS(num_classes, propagation=propagation, gate_mask=gate_mask, **(PRESETS[preset] | overrides))
