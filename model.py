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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backbone import build_backbone
from detector import FrameDecoder, PixelDecoder
from graph import Replay
from results import (EncodedVideo, FrameTracks, RunningScores, VideoResult, best_pairs, class_probabilities, mask_confidence,
                     resize_masks, upsample_masks, with_mask_scores)
from run_length import encode_counts
from tracker import ClipPrediction, Tracker, TrackerState

PIXEL_MEAN = (123.675, 116.28, 103.53)   # RGB, 0..255
PIXEL_STD = (58.395, 57.12, 57.375)
SIZE_DIVISOR = 32
VITA_WINDOW = 6                          # frames an encoder window of VITA spans
MASK_PIXELS = 2 * 10 ** 8                # of the masks that encode_video has at once


@dataclass
class FrameOutput:
    """What the detector (backbone, pixel decoder, frame decoder) knows of N frames."""
    predictions: list[tuple[Tensor, Tensor]]  # of each decoder layer (not training: the last): logits (N, F, K + 1), embeddings (N, F, C)
    features: Tensor                          # (N, C, h, w): times an embedding, a frame's mask
    queries: Tensor                           # (L, N, F, C), decoder_norm'ed
    mask_features: Tensor                     # (N, C, h, w), the tracker's


@dataclass
class TrainingOutput:
    """One training step's predictions; matcher.py turns them and the targets into losses."""
    frames: FrameOutput
    clips: list[ClipPrediction]
    mask_features: list[Tensor]               # of each clip: (B, T of the clip, C, h, w)
    padded_size: tuple[int, int]              # pixels, the size that masks are normalised by


@dataclass
class ClipOutput:
    """What inference knows of one clip of a video, of all queries."""
    logits: Tensor               # (Q, K + 1)
    mask_embed: Tensor           # (Q, C)
    mask_features: Tensor        # (T, C, h, w)
    gates: Tensor                # (D, Q) bool, True = open; D = 0 without a gate
    size: tuple[int, int]        # of the frames, pixels
    padded_size: tuple[int, int]


@dataclass
class StepState:
    """What `step` carries from frame to frame. Its size is constant unless the mode has a memory."""
    size: tuple[int, int]   # of the frames, pixels
    tracker: TrackerState
    scores: RunningScores


class GRAttVIS(nn.Module):
    """The whole model. `forward` serves training, `segment_video` and `step` inference."""

    def __init__(self, num_classes: int, backbone: str, norm: str = "frozen", swin_window: int | None = None,
                 channels: int = 256, heads: int = 8, queries: int = 100, frame_queries: int = 100,
                 pixel_layers: int = 6, pixel_feed_forward: int = 1024, frame_layers: int = 9,
                 tracker_encoder_layers: int = 6, tracker_decoder_layers: int = 3, feed_forward: int = 2048,
                 propagation: str = "gated", gate_mask: str = "additive", window: int | None = None, clip_length: int = 1):
        """clip_length: frames the tracker reads at once (GenVIS semi-online: 3); "clip" propagation reads all.
        window: see Tracker; None = 6 frames for "clip" (VITA), 0 otherwise. Other arguments are sizes."""
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
                               tracker_decoder_layers, heads, feed_forward, propagation, gate_mask, window)
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD)[:, None, None], persistent=False)

    def prepare(self, frames: Tensor | list[Tensor]) -> Tensor:
        """uint8 frames (3, H, W), RGB, sizes may differ -> (N, 3, H', W'): normalised, then zero-padded to multiples of 32."""
        if not len(frames):
            raise ValueError("the video has no frames")
        for frame in frames:
            check_frame(frame)
        sizes = [tuple(frame.shape[1:]) for frame in frames]
        images = self.pixel_mean.new_zeros(len(frames), 3, *padded(*map(max, zip(*sizes))))
        # frames of one size go to the device together
        groups = [(images, frames if isinstance(frames, Tensor) else torch.stack(frames))] if len(set(sizes)) == 1 else [
            (image, frame) for image, frame in zip(images, frames)]
        for image, frame in groups:
            frame = frame.to(image.device, non_blocking=True)
            image[..., :frame.shape[-2], :frame.shape[-1]] = (frame - self.pixel_mean) / self.pixel_std
        return images

    def detect(self, images: Tensor) -> FrameOutput:
        """images (N, 3, H, W) from `prepare`."""
        levels, features = self.pixel_decoder(self.backbone(images))
        frame_features = self.pixel_decoder.mask_features(features)
        predictions, queries = self.frame_decoder(levels, frame_features)
        return FrameOutput(predictions, frame_features, queries, self.tracker.mask_features(features))

    def forward(self, videos: list[Tensor]) -> TrainingOutput:
        """B videos of T frames each, uint8 (T, 3, H, W); T the same for all, H and W may differ."""
        batch, length = len(videos), len(videos[0]) if videos else 0
        if any(len(video) != length for video in videos):
            raise ValueError(f"all videos of a batch need the same number of frames, not {[len(v) for v in videos]}")
        images = self.prepare([frame for video in videos for frame in video])
        frames = self.detect(images)
        queries = frames.queries.unflatten(1, (batch, length))                           # (L, B, T, F, C)
        mask_features = frames.mask_features.unflatten(0, (batch, length))               # (B, T, C, h, w)
        clip_length = length if self.propagation == "clip" else self.clip_length
        clips, state = [], None
        for clip_queries in queries.split(clip_length, 2):
            prediction, state = self.tracker(clip_queries, state)
            clips.append(prediction)
        return TrainingOutput(frames, clips, list(mask_features.split(clip_length, 1)), tuple(images.shape[-2:]))

    @torch.no_grad()
    def follow(self, batches: Iterable[Tensor]) -> Iterator[ClipOutput]:
        """The clips of a video, as soon as their frames are there; upstream grattvis_model.py, `inference`.

        batches: uint8 (N, 3, H, W), RGB, all frames of one size; the detector takes each at once, on a CPU frame by frame:
        there, more at once are no faster and round otherwise. Nothing is kept of a clip but the tracker's state ("clip"
        propagation has one clip, the whole video).
        """
        queries, features, state, sizes = [], [], None, set()
        clip_length = math.inf if self.propagation == "clip" else self.clip_length
        device = self.pixel_mean.device.type
        replay = Replay(self.track_queries) if device == "cuda" and clip_length == 1 and not self.tracker.remembers else None
        for batch in batches:
            for part in batch.split(1) if device == "cpu" else [batch]:
                images = self.prepare(part)
                sizes.add(tuple(part.shape[-2:]))
                if len(sizes) > 1:
                    raise ValueError(f"all frames of a video must have one size, not {sorted(sizes)}")
                output = self.detect(images)
                queries += output.queries.unbind(1)                                      # each (L, F, C)
                features += output.mask_features
                del images, output                                                       # the masks of all layers are large
            while len(queries) >= clip_length:
                clip, state = self.track(queries[:clip_length], features[:clip_length], state, *sizes, replay)
                queries, features = queries[clip_length:], features[clip_length:]
                yield clip
        if queries:
            yield self.track(queries, features, state, *sizes)[0]
        if not sizes:
            raise ValueError("the video has no frames")

    def track(self, queries: list[Tensor], features: list[Tensor], state: TrackerState | None, size: tuple[int, int],
              replay: Replay | None = None) -> tuple[ClipOutput, TrackerState]:
        """Hand one clip's frame queries, each (1, F, C), to the tracker; by a CUDA graph of `track_queries` if there is one."""
        frame_queries = torch.stack(queries, 1)[:, None]                                 # (1, 1, T, F, C)
        if replay is None:
            prediction, state = self.tracker(frame_queries, state)
            outputs = self.last_of(prediction)
        else:
            state = state or self.tracker.initial_state(1)
            *outputs, query = replay(frame_queries, state.query)
            state = TrackerState(query)
        return ClipOutput(*outputs[:2], torch.stack(features), outputs[2], size, padded(*size)), state

    def track_queries(self, frame_queries: Tensor, query: Tensor) -> tuple[Tensor, ...]:
        """Without a memory, all that a clip gives is a function of its frame queries (1, 1, T, F, C) and the carried ones (1, Q, C)."""
        prediction, state = self.tracker(frame_queries, TrackerState(query))
        return *self.last_of(prediction), state.query

    @staticmethod
    def last_of(prediction: ClipPrediction) -> tuple[Tensor, Tensor, Tensor]:
        """What counts of one video's prediction: logits (Q, K + 1), mask embeddings (Q, C), gates (D, Q) bool, True = open."""
        logits = prediction.logits[-1][-1, 0]
        gates = [gate[-1, 0] >= 0 for gate in prediction.gate_logits]
        return logits, prediction.mask_embed[-1][-1, 0], torch.stack(gates) if gates else logits.new_empty(0, len(logits)).bool()

    @torch.no_grad()
    def segment_video(self, frames: Tensor | Iterable[Tensor], output_size: tuple[int, int] | None = None,
                      top_k: int = 10, chunk: int = 1) -> VideoResult:
        """Segment and track a whole video, all masks of which fit into memory; `encode_video` is for any other.

        frames: uint8 (T, 3, H, W) RGB, or an iterable of (3, H, W), all of one size; resized by the caller (data.py).
        output_size: (height, width) of the masks; None = that of the frames. chunk: frames the detector takes at once.
        Raises ValueError on an empty video.
        """
        self.check_request(output_size, top_k)
        clips = list(self.follow(in_batches(frames, chunk)))
        logits = torch.stack([clip.logits for clip in clips])                            # (clips, Q, K + 1)
        scores, labels, chosen = best_pairs(class_probabilities(logits).amax(0), top_k)
        mask_sum, mask_area, masks = 0, 0, []
        for clip in clips:
            for feature in clip.mask_features:
                mask_logits = upsample_masks(clip.mask_embed[chosen], feature, clip.size, clip.padded_size)
                frame_sum, frame_area = mask_confidence(mask_logits)
                mask_sum, mask_area = mask_sum + frame_sum, mask_area + frame_area
                masks.append(resize_masks(mask_logits, output_size) > 0)
        scores, order = with_mask_scores(scores, mask_sum, mask_area)
        return VideoResult(scores, labels[order], torch.stack(masks, 1)[order], chosen[order], logits)

    @torch.no_grad()
    def encode_video(self, batches: Iterable[Tensor], output_size: tuple[int, int] | None = None,
                     top_k: int = 10) -> EncodedVideo:
        """What `segment_video` does, of a video of any length: nothing is kept of a frame but codes and scores.

        batches: as for `follow`. Which queries are among the best is known at the end alone, since a class score is a
        maximum over all frames: until then every query's masks are kept, as codes on the CPU.
        """
        self.check_request(output_size, top_k)
        scores, codes, gates, recent, buffer = None, [], [], [], None

        def keep() -> None:
            """Bring what the last frames gave to the CPU."""
            codes.extend(encode_counts(buffer[:len(recent)].flatten(0, 1)))
            gates.extend(torch.stack(recent).cpu())
            recent.clear()

        for clip in self.follow(batches):
            size, count = output_size or clip.size, len(clip.logits)
            part = max(1, MASK_PIXELS // 2 // max(math.prod(size), math.prod(clip.padded_size)))
            if buffer is None:
                frames = min(8, max(1, MASK_PIXELS // (count * math.prod(size))))        # encoded together: fewer waits for the GPU
                buffer = torch.empty(frames, count, *size, dtype=torch.bool, device=clip.logits.device)
            for feature in clip.mask_features:
                confidence = []
                for embed, masks in zip(clip.mask_embed.split(part), buffer[len(recent)].split(part)):
                    mask_logits = upsample_masks(embed, feature, clip.size, clip.padded_size)
                    confidence.append(mask_confidence(mask_logits))
                    torch.gt(resize_masks(mask_logits, size), 0, out=masks)
                found = RunningScores(class_probabilities(clip.logits), *map(torch.cat, zip(*confidence)))
                scores = found.joined(scores)
                recent.append(clip.gates)
                if len(recent) == len(buffer):
                    keep()
        if recent:
            keep()
        scores, labels, chosen = (values.cpu() for values in scores.best(top_k))
        segmentations = [[{"size": list(size), "counts": code.decode()} for code in codes[query::count]] for query in chosen.tolist()]
        return EncodedVideo(scores, labels, chosen, segmentations, torch.stack(gates).permute(2, 0, 1)[chosen])

    @torch.no_grad()
    def step(self, frame: Tensor, state: StepState | None = None, output_size: tuple[int, int] | None = None,
             top_k: int = 10) -> tuple[FrameTracks, StepState]:
        """One frame (3, H, W) uint8 of a live video, causally; state is None at its start, see `reset`.

        Scores are those of segment_video for the frames so far; at the last frame the two agree.
        """
        self.check_request(output_size, top_k)
        if self.propagation == "clip" or self.clip_length != 1:
            raise ValueError("step needs a model that goes frame by frame, not one that reads clips of several frames")
        images = self.prepare([frame])
        size = tuple(frame.shape[-2:])
        if state and state.size != size:
            raise ValueError(f"all frames of a video must have one size, not {state.size} and {size}")
        output = self.detect(images)
        clip, tracker_state = self.track([output.queries[:, 0]], [output.mask_features[0]], state.tracker if state else None, size)
        mask_logits = upsample_masks(clip.mask_embed, clip.mask_features[0], size, clip.padded_size)
        found = RunningScores(class_probabilities(clip.logits), *mask_confidence(mask_logits))
        running = found.joined(state.scores if state else None)
        scores, labels, chosen = running.best(top_k)
        masks = resize_masks(mask_logits[chosen], output_size) > 0
        tracks = FrameTracks(scores, labels, masks, chosen, clip.logits, clip.gates.T[chosen])
        return tracks, StepState(size, tracker_state, running)

    @staticmethod
    def reset() -> None:
        """The state before a video's first frame, to start `step` on another one: tracks, scores and memory are forgotten."""
        return None

    def check_request(self, output_size: tuple[int, int] | None, top_k: int) -> None:
        """Refuse what would return noise (sampled gates, dropped paths) or nothing."""
        if self.training:
            raise RuntimeError("the model is in training mode: call model.eval() first")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}")
        if output_size is not None and min(output_size) < 1:
            raise ValueError(f"output_size must be (height, width) of at least 1 pixel, not {output_size}")


def padded(height: int, width: int) -> tuple[int, int]:
    """A size rounded up to multiples of 32."""
    return math.ceil(height / SIZE_DIVISOR) * SIZE_DIVISOR, math.ceil(width / SIZE_DIVISOR) * SIZE_DIVISOR


def check_frame(frame: Tensor) -> None:
    """ValueError unless it is uint8 (3, H, W)."""
    if not isinstance(frame, Tensor):
        raise ValueError(f"a frame must be a torch tensor, not {type(frame).__module__}.{type(frame).__name__}")
    if frame.dtype != torch.uint8 or frame.ndim != 3 or len(frame) != 3:
        raise ValueError(f"a frame must be uint8 of shape (3, H, W), not {frame.dtype} {tuple(frame.shape)}")


def in_batches(frames: Tensor | Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """Frames (3, H, W) -> batches of up to `count` of one size."""
    if count < 1:
        raise ValueError(f"a batch needs at least one frame, not {count}")
    batch = []
    for frame in frames:
        check_frame(frame)
        if batch and (len(batch) == count or frame.shape != batch[0].shape):
            yield torch.stack(batch)
            batch = []
        batch.append(frame)
    if batch:
        yield torch.stack(batch)


PRESETS = {  # a model of the paper a line; every value is an argument of GRAttVIS and can be overridden in build_model
    "r50": dict(backbone="resnet50"),
    "r101": dict(backbone="resnet101"),
    "swin_t": dict(backbone="swin_t"),
    "swin_s": dict(backbone="swin_s"),
    "swin_b": dict(backbone="swin_b"),
    "swin_l": dict(backbone="swin_l", frame_queries=200),
    "toy": dict(backbone="resnet10", norm="batch", channels=64, heads=4, queries=20, frame_queries=20, pixel_layers=1,
                pixel_feed_forward=256, frame_layers=3, tracker_encoder_layers=1, feed_forward=256),
}


def build_model(preset: str, num_classes: int, propagation: str = "gated", gate_mask: str = "additive",
                **overrides) -> GRAttVIS:
    """A model by preset (the keys of PRESETS), randomly initialised, in training mode.

    propagation: "gated" (GRAtt-VIS), "plain", "memory" (GenVIS), "gated+memory", "clip" (VITA).
    gate_mask: "additive" (as released) or "blocked" (as in the paper), see Tracker.gate_bias.
    overrides: other arguments of GRAttVIS, such as norm="group" to train from scratch. ValueError for unknown names.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    unknown = overrides.keys() - inspect.signature(GRAttVIS).parameters.keys()
    if unknown:
        raise ValueError(f"GRAttVIS has no argument {', '.join(sorted(unknown))}")
    return GRAttVIS(num_classes, propagation=propagation, gate_mask=gate_mask, **(PRESETS[preset] | overrides))
