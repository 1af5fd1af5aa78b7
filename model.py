"""GRAtt-VIS, the full model: backbone, pixel decoder, frame decoder, tracker, masks of a video.

Paper: GRAtt-VIS (arXiv 2305.17096) on Mask2Former (2112.01527), VITA (2206.04403) and GenVIS
(2211.08834). "Upstream", the official or released code, is Tanveer81/GRAttVIS at 4a634e7; for this
file grattvis/grattvis_model.py.

    from model import build_model
    model = build_model("r50", num_classes=25).eval()
    result = model.segment_video(video, output_size=(720, 1280), top_k=20)  # uint8 (T, 3, H, W)
    result = model.encode_video(video, (720, 1280), top_k=20)  # run-length codes: any length
    tracks, state = model.step(frame, state)                   # live, frame by frame

fast/ holds CUDA graphs and streams, casts and fused layers; it calls the methods that are defined
here. "Speed:" and "Memory:" mark lines that the method itself does not need, in all files.

To add a preset, add it to PRESETS and its test size to TEST_SIDES: the values are arguments of
GRAttVIS. A new hyperparameter of the tracker is an argument of `Tracker` and nothing else; one of
another component is also passed on in GRAttVIS.__init__. `build_model` and presets take both.

Shape letters, in lower case in an einsum (evaluation/metric.py and evaluation/run_length.py have
their own):
    data       B videos of T frames; in training, each is a Clip of clips.py
               N = B * T frames of all videos; where a function sees only a batch, its size
               H height and W width of frames (h, w at stride 4), C channels
               G clips of a video: U consecutive frames each, which the tracker reads at once
               (--clip-length; with "clip" propagation the whole video)
    objects    F queries of a frame, Q queries of the tracker
               I instances, K classes (class index K = "no object")
    layers     L detector layers whose queries the tracker receives (3 in training, else the last)
               D decoder layers of the tracker
               S = L * B streams: the batch entries of the tracker (detector layer, video),
               layer-major.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import get_type_hints

import torch
from torch import Tensor, nn

from backbone import build_backbone
from batching import check_frame, padded_size
from detector import FrameDecoder, FrameOutput, PixelDecoder
from evaluation.association import Comparison, link_chunks
from evaluation.postprocess import (
    EncodedVideo,
    FrameChunk,
    FrameTracks,
    MaskEncoder,
    RunningScores,
    StepState,
    VideoResult,
    best_pairs,
    binary_masks,
    check_finite,
    class_probabilities,
    instance_mask_logits,
    mask_sum_and_area,
    resize_masks,
    with_mask_scores,
)
from fast import acceleration, video_pipeline
from fast.cuda_graphs import CUDAGraphCache
from runtime.requests import check_request
from tracker import ClipPrediction, Tracker, TrackerState
from transformer import mask_logits

PIXEL_MEAN = (123.675, 116.28, 103.53)  # RGB, 0..255
PIXEL_STD = (58.395, 57.12, 57.375)
VITA_WINDOW = 6  # frames in an attention window of VITA's encoder
WHOLE_VIDEO = sys.maxsize  # as a clip length: longer than any video


@dataclass
class TrainingOutput:
    """The predictions of a training step; losses.py compares them with the targets."""

    frames: FrameOutput
    clips: list[ClipPrediction]  # G
    padded_size: tuple[int, int]  # (height, width) of the padded frames, which masks refer to


class GRAttVIS(nn.Module):
    """The full model. `forward` is for training, `segment_video` and `step` are for inference."""

    def __init__(
        self,
        num_classes: int,
        backbone: str,
        norm: str = "frozen",
        swin_window: int | None = None,
        channels: int = 256,
        heads: int = 8,
        queries: int = 100,
        frame_queries: int = 100,
        pixel_layers: int = 6,
        pixel_feed_forward: int = 1024,
        frame_layers: int = 9,
        tracker_encoder_layers: int = 6,
        tracker_decoder_layers: int = 3,
        feed_forward: int = 2048,
        propagation: str = "gated",
        window: int | None = None,
        clip_length: int = 1,
        **tracker_options,
    ):
        """The arguments not listed here are sizes, or explained in the component they belong to.

        window: see Tracker; None means 6 frames with "clip" propagation (VITA), otherwise 0.
        clip_length: frames the tracker reads at once (GenVIS semi-online: 3). With "clip"
            propagation it reads the whole video.
        tracker_options: other arguments of Tracker.
        """
        super().__init__()
        if clip_length < 1 or num_classes < 1:
            raise ValueError(
                "clip_length and num_classes must be at least 1, not "
                f"{clip_length} and {num_classes}"
            )
        if window is None:
            window = VITA_WINDOW if propagation == "clip" else 0
        self.num_classes = num_classes
        self.propagation = propagation
        self.clip_length = clip_length
        self.backbone = build_backbone(backbone, norm, swin_window)
        self.pixel_decoder = PixelDecoder(
            self.backbone.channels, channels, heads, pixel_layers, pixel_feed_forward
        )
        self.frame_decoder = FrameDecoder(
            num_classes, channels, frame_queries, heads, frame_layers, feed_forward
        )
        self.tracker = Tracker(
            num_classes,
            channels,
            queries=queries,
            frame_queries=frame_queries,
            encoder_layers=tracker_encoder_layers,
            decoder_layers=tracker_decoder_layers,
            heads=heads,
            feed_forward=feed_forward,
            propagation=propagation,
            window=window,
            **tracker_options,
        )
        mean, std = torch.tensor(PIXEL_MEAN), torch.tensor(PIXEL_STD)
        self.register_buffer("pixel_mean", mean[:, None, None], persistent=False)
        self.register_buffer("pixel_std", std[:, None, None], persistent=False)
        self.mask_sum_and_area = mask_sum_and_area  # Speed: an attribute, to be compiled
        self.exclusive = False  # inference option, not in the paper: see evaluation/association.py
        self.cuda_graphs = CUDAGraphCache()  # Speed: of inference, see fast/

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def frames_per_clip(self) -> int:
        """Frames that the tracker reads at once: clip_length, or the whole video (VITA)."""
        return WHOLE_VIDEO if self.propagation == "clip" else self.clip_length

    def train(self, mode: bool = True) -> "GRAttVIS":
        """Set training or evaluation mode; CUDA graphs of inference are released for training."""
        if mode:
            self.cuda_graphs.clear()
        return super().train(mode)

    def accelerate(self, dtype: torch.dtype = torch.float32, compiled: bool = False) -> "GRAttVIS":
        """Prepare for inference only, in place; see fast/acceleration.py."""
        return acceleration.accelerate(self, dtype, compiled)

    # The detector

    def prepare(self, videos: list[Tensor]) -> Tensor:
        """Videos, uint8 RGB (T, 3, H, W) each -> detector input (N, 3, H', W').

        T, H and W may differ. Frames are normalised, then padded with zeros on the right and at the
        bottom to one multiple of 32. There is no padding mask.

        Raises ValueError without frames, or if a video's first frame has another dtype or shape.
        """
        lengths = [len(video) for video in videos]
        if not min(lengths, default=0):
            raise ValueError("a video has no frames")
        for video in videos:
            check_frame(video[0])
        height = max(video.shape[2] for video in videos)
        width = max(video.shape[3] for video in videos)
        shape = sum(lengths), 3, *padded_size(height, width)
        images = acceleration.zero_images(shape, self.pixel_mean)  # Speed: its memory format
        for video, image in zip(videos, images.split(lengths)):
            height, width = video.shape[2:]
            video = video.to(self.device, non_blocking=True)
            image[:, :, :height, :width] = self.normalise(video)
        return images

    def normalise(self, video: Tensor) -> Tensor:
        """RGB in 0..255 -> mean 0 and standard deviation 1 over ImageNet."""
        return (video - self.pixel_mean) / self.pixel_std

    def detect(self, images: Tensor) -> FrameOutput:
        """Detect instances in images (N, 3, H, W) from `prepare`, in each frame by itself."""
        maps = self.backbone(images)
        return FrameOutput(*self.decode(maps))

    def decode(self, maps: list[Tensor]) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
        """The backbone's feature maps -> the fields of FrameOutput.

        Speed: a method of its own, because torch.compile takes both decoders as one unit.
        """
        levels, features = self.pixel_decoder(maps)
        features = acceleration.cast_for_autocast(features)  # Speed: once, as many layers read it
        predictions, queries = self.frame_decoder(
            levels, features, self.pixel_decoder.mask_features
        )
        return predictions, queries, features

    # Training

    def forward(self, videos: list[Tensor]) -> TrainingOutput:
        """Predictions for B videos, uint8 (T, 3, H, W) each; T is the same, H and W may differ."""
        batch = len(videos)
        length = len(videos[0]) if videos else 0
        if any(len(video) != length for video in videos):
            raise ValueError(
                "all videos of a batch need the same number of frames, not "
                f"{[len(video) for video in videos]}"
            )
        images = self.prepare(videos)
        size = tuple(images.shape[-2:])
        frames = acceleration.detect_in_chunks(self, images)  # Memory: in chunks, if frozen
        del images  # Memory: before the tracker runs
        queries = frames.queries.unflatten(1, (batch, length))  # (L, B, T, F, C)
        predictions, state = [], None
        for clips in self.split_clips(queries):
            clip_predictions, state = self.tracker(clips, state)
            predictions += clip_predictions
        return TrainingOutput(frames, predictions, size)

    def split_clips(self, frame_queries: Tensor) -> list[Tensor]:
        """Frame queries (L, B, T, F, C) -> whole clips (L, B, G, U, F, C) and a shorter rest.

        train.py has no rest, because it requires whole clips.
        """
        length = frame_queries.shape[2]
        clip_length = min(self.frames_per_clip, length)
        rest = length % clip_length
        whole_clips, last_clip = frame_queries.split([length - rest, rest], 2)
        parts = [whole_clips.unflatten(2, (-1, clip_length))]
        if rest:
            parts.append(last_clip[:, :, None])
        return parts

    # Inference

    def track_video(
        self, video: Tensor | Iterable[Tensor], top_k: int = 10
    ) -> Iterator[FrameChunk]:
        """Detect and track a video, chunk by chunk (upstream grattvis_model.py, `inference`).

        A chunk is a whole number of clips; the last clip may be shorter. For each chunk, this is:

            frame_queries, features = self.detect_queries(frames)
            outputs, state = self.track(frame_queries[None], clip_length, state)

        video: as for `segment_video`; results do not depend on how frames are batched. Only the
        tracker's state is kept of earlier frames. "clip" propagation has one chunk, the video.
        top_k: with `exclusive`, see evaluation/association.py.
        """
        chunks = self.track_chunks(video)
        return link_chunks(self, chunks, top_k) if self.exclusive else chunks

    @torch.no_grad()
    def track_chunks(self, video: Tensor | Iterable[Tensor]) -> Iterator[FrameChunk]:
        """`track_video` without `exclusive`."""
        clip_length = self.frames_per_clip
        pipeline = video_pipeline.VideoPipeline(self)  # Speed: CUDA graphs and streams
        state = self.tracker.initial_state(streams=1)
        for frame_queries, features in pipeline.detect(video, clip_length):
            outputs, state = pipeline.track(frame_queries, clip_length, state)
            yield FrameChunk(*outputs, frame_queries, features, pipeline.frame_size)

    def detect_queries(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames, uint8 (N, 3, H, W) -> frame queries (N, F, C) and features (N, C, h, w)."""
        output = self.detect(self.prepare([frames]))
        return output.queries[-1], output.features

    def track(
        self, frame_queries: Tensor, clip_length: int, state: TrackerState
    ) -> tuple[tuple[Tensor, Tensor, Tensor], TrackerState]:
        """Track B videos through T more frames: G whole clips, or a shorter one.

        frame_queries (B, T, F, C). Returns class logits (B, G, Q, K + 1), mask kernels
        (B, T, Q, C + 1), and gates (B, T, D, Q) bool, True = open; and the state after the last
        clip.
        """
        clip_length = min(clip_length, frame_queries.shape[1])
        clips = frame_queries.unflatten(1, (-1, clip_length))  # (B, G, U, F, C)
        predictions, state = self.tracker(clips[None], state)
        # [-1][-1]: the last decoder layer and the last detector layer.
        logits = torch.stack([clip.logits[-1][-1] for clip in predictions], 1)
        kernels = torch.stack([clip.mask_kernel[-1][-1] for clip in predictions], 1)
        gate_logits = [layer[-1] for clip in predictions for layer in clip.gate_logits]
        if gate_logits:
            gate_logits = torch.stack(gate_logits, 1).unflatten(1, (len(predictions), -1))
        else:
            gate_logits = logits[..., :0].mT  # D = 0
        # From clips to their frames: (B, G, ...) -> (B, T, ...).
        kernels = kernels.repeat_interleave(clip_length, 1)
        gates = (gate_logits >= 0).repeat_interleave(clip_length, 1)
        return (logits, kernels, gates), state

    @torch.no_grad()
    def segment_video(
        self,
        video: Tensor | Iterable[Tensor],
        output_size: tuple[int, int] | None = None,
        top_k: int = 10,
    ) -> VideoResult:
        """Segment and track a video whose masks fit into memory; for others see `encode_video`.

        video: uint8 RGB, one tensor (T, 3, H, W), an iterable of frames (3, H, W), or an iterable
            of batches (N, 3, H, W) of any lengths. All frames have one size, resized by the caller.
        output_size: (height, width) of the masks; None means that of the frames.
        top_k: number of (query, class) pairs to return.

        Raises ValueError if the video is empty or not as described, RuntimeError in training mode.
        """
        check_request(self, output_size, top_k)
        chunks = list(self.track_video(video, top_k))
        frame_size = chunks[0].frame_size
        logits = torch.cat([chunk.logits for chunk in chunks])  # (G, Q, K + 1)
        gates = torch.cat([chunk.gates for chunk in chunks])  # (T, D, Q)
        class_scores = class_probabilities(logits).amax(0)  # (Q, K)
        class_scores, labels, track_ids = best_pairs(class_scores, top_k)
        instance_logits, mask_sum, mask_area = instance_mask_logits(
            chunks, track_ids, self.mask_sum_and_area
        )  # Memory: empties the list
        scores, order = with_mask_scores(class_scores, mask_sum, mask_area)
        track_ids = track_ids[order]
        masks = binary_masks(instance_logits[order], frame_size, output_size or frame_size)
        gates = gates.permute(2, 0, 1)[track_ids]  # (I, T, D)
        return VideoResult(scores, labels[order], masks, track_ids, logits, gates)

    @torch.no_grad()
    def encode_video(
        self,
        video: Tensor | Iterable[Tensor],
        output_size: tuple[int, int] | None = None,
        top_k: int = 10,
    ) -> EncodedVideo:
        """`segment_video` for videos of any length, with run-length codes instead of masks.

        Takes the same arguments and raises the same errors, and FloatingPointError if scores are
        not finite. (`segment_video` and `step` check this only with `exclusive`, because the check
        waits for the GPU.)
        """
        check_request(self, output_size, top_k)
        running = encoder = None
        gates = []
        for chunk in self.track_video(video, top_k):
            if encoder is None:
                queries = chunk.mask_kernel.shape[1]
                running = RunningScores.zeros(queries, self.num_classes, self.device)
                encoder = MaskEncoder(
                    queries,
                    chunk.frame_size,
                    output_size or chunk.frame_size,
                    self.mask_sum_and_area,
                )
            # The maximum over the chunk is merged once per frame, which does not change it.
            class_scores = class_probabilities(chunk.logits).amax(0)
            for kernel, features in zip(chunk.mask_kernel, chunk.features):
                mask_sum, mask_area = encoder.add(kernel, features)
                running = RunningScores(class_scores, mask_sum, mask_area).merge(running)
            gates.append(chunk.gates.cpu())
        scores, labels, track_ids = (values.cpu() for values in running.best(top_k))
        check_finite(scores)
        gates = torch.cat(gates).permute(2, 0, 1)[track_ids]  # (I, T, D)
        segmentations = encoder.finish(track_ids.tolist())
        return EncodedVideo(scores, labels, track_ids, segmentations, gates)

    @torch.no_grad()
    def step(
        self,
        frame: Tensor,
        state: StepState | None = None,
        output_size: tuple[int, int] | None = None,
        top_k: int = 10,
    ) -> tuple[FrameTracks, StepState]:
        """Segment and track the next frame, uint8 (3, H, W), of a live video.

        state: what the previous step returned, None at the start of a video. Scores are causal:
        those of `segment_video` for the frames so far, so at the last frame the two agree.
        """
        check_frame(frame)
        (tracks,), (state,) = self.step_streams(frame[None], [state], output_size, top_k)
        return tracks, state

    @torch.no_grad()
    def step_streams(
        self,
        frames: Tensor,
        states: list[StepState | None],
        output_size: tuple[int, int] | None = None,
        top_k: int = 10,
    ) -> tuple[list[FrameTracks], list[StepState]]:
        """`step` for B live videos at once, which is faster on a GPU than one after another.

        frames: the next frame of each video, uint8 (B, 3, H, W). states: the state of each video,
        None for one that starts. CUDA graphs are captured for each B, so B should rarely change.
        """
        check_request(self, output_size, top_k, is_first=None in states)
        if self.frames_per_clip != 1:
            raise ValueError(
                "step needs a model that goes frame by frame, not one that reads "
                "clips of several frames"
            )
        states = self.states_before(frames, states)
        size = states[0].frame_size
        frames = frames.to(self.device, non_blocking=True)
        # Speed: detect_queries and track as CUDA graphs.
        frame_queries, features = video_pipeline.detect_queries(self, frames)
        trackers = [state.tracker for state in states]
        outputs, trackers = video_pipeline.track_streams(self, frame_queries, trackers)
        logits, kernels, gates = outputs
        all_links = [None] * len(states)
        if self.exclusive:
            inputs = [x.split(1) for x in (frame_queries, logits, kernels, features)]
            comparisons = [
                Comparison(self, *of_video, state.links, top_k)
                for *of_video, state in zip(*inputs, states)
            ]
            kernels, all_links = zip(*(comparison.assign() for comparison in comparisons))
            kernels = torch.cat(kernels)
        masks = mask_logits(kernels, features)  # (B, Q, h, w)
        mask_sum, mask_area = self.mask_sum_and_area(resize_masks(masks, size))
        scores = RunningScores(class_probabilities(logits), mask_sum, mask_area)
        scores = scores.merge(RunningScores.stack([state.scores for state in states]))
        best = zip(*scores.best(top_k))  # of each video: scores, labels and queries
        all_tracks = [
            FrameTracks(
                best_scores,
                labels,
                resize_masks(masks[video, ids], size, output_size) > 0,
                ids,
                logits[video],
                gates[video].T[ids],
            )
            for video, (best_scores, labels, ids) in enumerate(best)
        ]
        of_videos = zip(trackers, scores.unstack(), all_links)
        return all_tracks, [StepState(size, *of_video) for of_video in of_videos]

    def states_before(self, frames: Tensor, states: list[StepState | None]) -> list[StepState]:
        """The states before the next frames (B, 3, H, W) of live videos; None becomes a new state.

        Raises ValueError if frames and states do not fit.
        """
        if not len(frames) or len(frames) != len(states):
            raise ValueError(
                f"step_streams needs a frame and a state of each video, not {len(frames)} and "
                f"{len(states)}"
            )
        check_frame(frames[0])
        size = tuple(frames.shape[-2:])
        if None in states:
            self.cuda_graphs.check_module(self)  # Speed: drops graphs of a changed model
            tracker = self.tracker.initial_state(streams=1)
            queries = tracker.query.shape[1]
            scores = RunningScores.zeros(queries, self.num_classes, self.device)
            states = [state or StepState(size, tracker, scores) for state in states]
        for state in states:
            if state.frame_size != size:
                raise ValueError(
                    f"all frames of a video must have one size, not {state.frame_size} and {size}"
                )
        return states


# Arguments of GRAttVIS by preset; build_model can override each of them.
PRESETS = {
    "r50": dict(backbone="resnet50"),
    "r101": dict(backbone="resnet101"),
    "swin_t": dict(backbone="swin_t"),
    "swin_s": dict(backbone="swin_s"),
    "swin_b": dict(backbone="swin_b"),
    "swin_l": dict(backbone="swin_l", frame_queries=200),
    "toy": dict(
        backbone="resnet10",
        norm="batch",
        channels=64,
        heads=4,
        queries=20,
        frame_queries=20,
        pixel_layers=1,
        pixel_feed_forward=256,
        frame_layers=3,
        tracker_encoder_layers=1,
        feed_forward=256,
    ),
    "small": dict(
        backbone="resnet10_thin",
        norm="batch",
        channels=96,
        heads=6,
        queries=20,
        frame_queries=20,
        pixel_layers=3,
        pixel_feed_forward=384,
        frame_layers=6,
        tracker_encoder_layers=2,
        feed_forward=384,
    ),
}
# Short side of test frames in pixels: the official ones, and that of the synthetic videos.
TEST_SIDES = {
    "r50": 360,
    "r101": 360,
    "swin_t": 448,
    "swin_s": 448,
    "swin_b": 448,
    "swin_l": 448,
    "toy": 96,
    "small": 96,
}


def option_types() -> dict[str, type]:
    """The arguments of GRAttVIS, including those that it passes on to Tracker, and their types."""
    types = get_type_hints(Tracker.__init__) | get_type_hints(GRAttVIS.__init__)
    not_passed_on = ("encoder_layers", "decoder_layers")
    return {name: kind for name, kind in types.items() if name not in not_passed_on}


def build_model(
    preset: str,
    num_classes: int,
    propagation: str = "gated",
    gate_mask: str = "additive",
    **overrides,
) -> GRAttVIS:
    """A model by preset (the keys of PRESETS), randomly initialised, in training mode.

    propagation: one of PROPAGATIONS, see tracker.py.
    gate_mask: "additive" (as released) or "blocked" (as in the paper), see Tracker.attention_mask.
    overrides: other arguments of GRAttVIS or Tracker; training from scratch needs norm="group".

    Raises ValueError for unknown presets, arguments or values.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    unknown = overrides.keys() - option_types().keys()
    if unknown:
        raise ValueError(f"GRAttVIS has no argument {', '.join(sorted(unknown))}")
    arguments = PRESETS[preset] | overrides
    return GRAttVIS(num_classes, propagation=propagation, gate_mask=gate_mask, **arguments)
