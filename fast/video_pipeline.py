"""The loop over a video on a CUDA device: copies, detection and tracking at the same time.

model.py says what is computed: for each chunk of frames, `detect_queries`, then `track`.
`VideoPipeline` calls exactly these two functions. What it adds on a CUDA device:

    upload      frames are copied on a stream of their own while earlier ones are processed
    chunks      INFERENCE_CHUNK frames are detected at once; the last chunk is filled up with copies
                of its last frame, so one CUDA graph serves all, and no result depends on batching
    graphs      both functions are replayed as CUDA graphs where their tensors keep their sizes
    overlap     a chunk is tracked, in small kernels, beside the detection of the next chunk

On a CPU the same code detects one frame at a time, and nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from batching import merge_to_multiples, split_video
from fast.streams import SideStream
from tracker import TrackerState

if TYPE_CHECKING:
    from model import GRAttVIS

INFERENCE_CHUNK = 12  # frames a GPU takes at once; the number affects rounding
# Class logits, mask kernels and gates, as from GRAttVIS.track, but of one video or one frame.
TrackOutput = tuple[Tensor, Tensor, Tensor]


class VideoPipeline:
    """Detection and tracking of one video, see above."""

    def __init__(self, model: GRAttVIS):
        self.model = model
        self.device = model.device
        self.chunk_size = INFERENCE_CHUNK if self.device.type == "cuda" else 1
        self.upload_stream = SideStream(self.device, priority=-2)
        self.track_stream = SideStream(self.device, priority=-1)
        self.frame_size = None  # (height, width) before padding, known after the first detection
        model.cuda_graphs.check_module(model)

    def detect(
        self, video: Tensor | Iterable[Tensor], clip_length: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `detect_queries` of all frames, in chunks of whole clips (the last may be shorter).

        Equal to `merge_to_multiples(map(detect_queries, chunks), clip_length)`. The next chunk is
        launched before a chunk is handed over, so that `track` runs beside it.
        """
        previous = None
        for detection in merge_to_multiples(self.detect_chunks(video), clip_length):
            if previous is not None:
                yield previous
            previous = detection
            # This marks the end of this detection. `track` is called after the next detection has
            # been launched, but its work waits up to this mark only.
            self.track_stream.wait()
        yield previous

    def detect_chunks(self, video: Tensor | Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield frame queries (N, F, C) and features (N, C, h, w) of the chunks of a video."""
        for frames in split_video(video, self.chunk_size):
            self.frame_size = tuple(frames.shape[-2:])
            count = len(frames)
            with self.upload_stream:
                frames = frames.to(self.device, non_blocking=True)
            self.upload_stream.join(frames)
            padded = repeat_last(frames, self.chunk_size)
            frame_queries, features = detect_queries(self.model, padded)
            yield frame_queries[:count], features[:count]

    def track(
        self, frame_queries: Tensor, clip_length: int, state: TrackerState
    ) -> tuple[TrackOutput, TrackerState]:
        """`model.track` on a side stream; the results can be used like any others."""
        with self.track_stream:
            result = track(self.model, frame_queries, clip_length, state, self.chunk_size)
        self.track_stream.join()
        return result


def detect_queries(model: GRAttVIS, frames: Tensor) -> tuple[Tensor, Tensor]:
    """`model.detect_queries(frames)` as a CUDA graph."""
    return model.cuda_graphs(model.detect_queries, frames)


def track(
    model: GRAttVIS,
    frame_queries: Tensor,
    clip_length: int,
    state: TrackerState,
    graph_size: int = 1,
) -> tuple[TrackOutput, TrackerState]:
    """`model.track` for T frames of a video, as a CUDA graph of graph_size frames if possible.

    frame_queries (T, F, C); the results have no axis B.

    A graph's tensors keep their sizes, so clips of several frames and a growing memory have none.
    Most official recipes of GRAtt-VIS have a memory: their tracking runs without a graph.

    The state that follows a chunk shorter than graph_size must not be used: it has seen copies of
    the last frame.
    """
    if clip_length > 1 or "memory" in model.propagation:
        outputs, state = model.track(frame_queries[None], clip_length, state)
        return tuple(output[0] for output in outputs), state

    def track_tensors(frame_queries: Tensor, query: Tensor) -> tuple[Tensor, ...]:
        outputs, state = model.track(frame_queries[None], 1, TrackerState(query))
        return *(output[0] for output in outputs), state.query

    padded = repeat_last(frame_queries, graph_size)
    *outputs, query = model.cuda_graphs(track_tensors, padded, state.query)
    outputs = tuple(output[: len(frame_queries)] for output in outputs)  # without the copies
    return outputs, TrackerState(query)


def track_streams(
    model: GRAttVIS, frame_queries: Tensor, states: list[TrackerState]
) -> tuple[TrackOutput, list[TrackerState]]:
    """`model.track` for a frame of each of B videos, as a CUDA graph if possible.

    frame_queries (B, F, C); the results have no axis T.

    Memories of videos differ in length, so with a memory one video is tracked after another.
    """

    def track_frame(frame_queries: Tensor, state: TrackerState) -> tuple[TrackOutput, TrackerState]:
        outputs, state = model.track(frame_queries[:, None], 1, state)
        return tuple(output[:, 0] for output in outputs), state

    if "memory" in model.propagation:
        outputs, states = zip(*map(track_frame, frame_queries.split(1), states))
        return tuple(map(torch.cat, zip(*outputs))), list(states)

    def track_frame_tensors(frame_queries: Tensor, query: Tensor) -> tuple[Tensor, ...]:
        outputs, state = track_frame(frame_queries, TrackerState(query))
        return *outputs, state.query

    query = torch.cat([state.query for state in states])
    *outputs, query = model.cuda_graphs(track_frame_tensors, frame_queries, query)
    # Copies, since a view would keep the states of all videos in memory.
    return tuple(outputs), [TrackerState(part.clone()) for part in query.split(1)]


def repeat_last(x: Tensor, length: int) -> Tensor:
    """Fill (N, ...) up to a length with copies of the last entry."""
    missing = length - len(x)
    return x if missing <= 0 else torch.cat((x, x[-1:].expand(missing, *x.shape[1:])))
