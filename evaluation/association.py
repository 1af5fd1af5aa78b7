"""Exclusive masks: each detection goes to at most one track. Not in the paper.

    model.exclusive = True    # or evaluate.py --exclusive, demo.py --exclusive

A query reads all frame queries of a frame, so it may come to show two objects that look alike, and
two queries may come to show the same object (docs/gate_study.md). The detector separates them: each
frame query predicts a mask of its own. Here tracks take over these masks. In every frame:

1. Detections are the 50 frame queries with the highest class probability, if it is 0.3 or more and
   the mask is not empty. Mask NMS, by class probability times mask score, drops detections with an
   IoU above 0.5 with a better one: a second track would follow a part of an object, and might take
   over the object later.
2. Tracks are the queries of the top_k (query, class) pairs of the frames so far. So another top_k
   may give other masks, and a query that is among them only later has no masks before.
3. The affinity of a track and a detection is

       p / 2 * IoU(mask of the track, detection)
       + 2 * IoU(last mask, detection)
       + cosine(last frame query, frame query of the detection)^2

   p is the largest class probability of the track in this frame, and a negative cosine counts as 0.
   The last mask and frame query are those of the detection that was last assigned to the track.
4. Detections are assigned to tracks one to one, with the largest sum of affinities. Pairs with an
   affinity of 0.1 or less are not assigned.
5. A track has the mask of its detection. Without a detection it has no mask in the frame.

The last mask and frame query remember an object while it is occluded. They weigh more than the
track's own mask, so an object that returns is rarely assigned to a query without a detection so
far. Squaring makes weak similarities negligible, so that a track whose object is occluded does not
move to another object. Classes and gates are the tracker's. All of it is causal: `step` does the
same.

`compare` makes masks and IoUs on the GPU, `link_frames` assigns on the CPU, `Comparison` does both
for some frames, and `link_chunks` for a video.

Letters: I tracks and N detections of a frame, otherwise those of model.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.postprocess import (
    FrameChunk,
    best_pairs,
    check_finite,
    class_probabilities,
    mask_sum_and_area,
)
from fast.video_pipeline import INFERENCE_CHUNK, repeat_last
from runtime.device import CopyToCPU, upload
from transformer import mask_kernel, mask_logits

if TYPE_CHECKING:
    from model import GRAttVIS

MIN_PROBABILITY = 0.3  # of a detection's class
MAX_DETECTIONS = 50  # of a frame, duplicates included
DUPLICATE_IOU = 0.5  # of a detection with a better one
MASK_WEIGHT, LAST_MASK_WEIGHT, LAST_QUERY_WEIGHT = 0.5, 2.0, 1.0
MIN_AFFINITY = 0.1
NO_MASK = -100.0  # logit of every pixel


@dataclass
class Links:
    """What is remembered of the frames so far, and of the detections of each track."""

    class_scores: Tensor  # (Q, K), maximum over the frames so far
    masks: Tensor  # (Q, h, w) bool, of the last detection; empty before the first one
    queries: np.ndarray  # (Q, C), its frame query, of length 1; 0 before the first one


@torch.no_grad()
def link_chunks(model: GRAttVIS, chunks: Iterable[FrameChunk], top_k: int) -> Iterator[FrameChunk]:
    """The chunks of a video with the masks of detections, see `Comparison`.

    Speed: a chunk is assigned when the next one has been launched, so a GPU has work meanwhile.
    Memory: INFERENCE_CHUNK frames are compared at once, since a chunk may be a whole video.
    """
    links = before = None
    for chunk in chunks:
        linked = None
        if before is not None:
            linked, links = before.assign()
        before = ComparedChunk(model, chunk, links, top_k)
        if linked is not None:
            yield linked
    yield before.assign()[0]


class ComparedChunk:
    """A chunk whose last frames have been compared, and all frames before them also linked."""

    def __init__(self, model: GRAttVIS, chunk: FrameChunk, links: Links | None, top_k: int):
        self.chunk = chunk
        self.kernels = []
        clip_length = len(chunk.mask_kernel) // len(chunk.logits)
        logits = chunk.logits.repeat_interleave(clip_length, 0)
        inputs = chunk.frame_queries, logits, chunk.mask_kernel, chunk.features
        *earlier, last = zip(*(x.split(INFERENCE_CHUNK) for x in inputs))
        graph_size = INFERENCE_CHUNK if chunk.features.is_cuda else 1  # one graph for all chunks
        for frames in earlier:
            kernels, links = Comparison(model, *frames, links, top_k, graph_size).assign()
            self.kernels.append(kernels)
        self.comparison = Comparison(model, *last, links, top_k, graph_size)

    def assign(self) -> tuple[FrameChunk, Links]:
        """The chunk with linked mask kernels, and the links after it."""
        kernels, links = self.comparison.assign()
        return replace(self.chunk, mask_kernel=torch.cat((*self.kernels, kernels))), links


class Comparison:
    """The tracks and the detections of T consecutive frames, compared with each other.

    frame_queries (T, F, C), class logits (T, Q, K + 1), mask kernels (T, Q, C + 1) and features
    (T, C, h, w) are those of the frames. links: what `assign` returned for the frames before, or
    None. top_k: the number of (query, class) pairs whose queries are tracks; others have no masks.
    graph_size: frames of the CUDA graph that compares.

    Speed: a GPU compares the masks of all frames at once; only `assign` waits for it.
    Memory: 0.6 GB with 12 frames of 200x350 at stride 4 and 200 queries, 0.1 GB of 90x160 and 100.
    """

    def __init__(
        self,
        model: GRAttVIS,
        frame_queries: Tensor,
        logits: Tensor,
        kernels: Tensor,
        features: Tensor,
        links: Links | None,
        top_k: int,
        graph_size: int = 1,
    ):
        if links is None:
            links = no_links(logits, frame_queries, features)
        probability = class_probabilities(logits)  # (T, Q, K)
        class_scores = torch.cat((links.class_scores[None], probability)).cummax(0).values[1:]
        tracks = best_pairs(class_scores, top_k)[2]  # (T, I)
        track_probability = probability.amax(-1).take_along_dim(tracks, 1)
        track_kernels = kernels.take_along_dim(tracks[..., None], 1)

        def compare_tensors(*inputs: Tensor) -> tuple[Tensor, ...]:
            return compare(model, *inputs)

        inputs = frame_queries, features, track_kernels, track_probability
        inputs = [repeat_last(x, graph_size) for x in inputs]
        *tables, masks, detected_kernels = model.cuda_graphs(compare_tensors, *inputs, links.masks)
        self.tables = CopyToCPU(tracks, *tables)
        self.masks = masks
        self.detected_kernels = detected_kernels
        self.class_scores = class_scores[-1]
        self.kernels = kernels
        self.last_queries = links.queries

    def assign(self) -> tuple[Tensor, Links]:
        """Replace the masks of the tracks by those of the detections that are assigned to them.

        Returns mask kernels (T, Q, C + 1), and the links after the last frame. Raises
        FloatingPointError if a class probability or a mask of a detection is not finite.
        """
        last_rows, last_queries, assigned = link_frames(*self.tables.wait(), self.last_queries)
        device = self.kernels.device
        last_rows, assigned = (upload(torch.from_numpy(x), device) for x in (last_rows, assigned))
        frame, track, detection = assigned.T
        kernels = torch.zeros_like(self.kernels)
        kernels[..., -1] = NO_MASK
        kernels[frame, track] = self.detected_kernels[frame, detection].to(kernels.dtype)
        return kernels, Links(self.class_scores, self.masks[last_rows], last_queries)


def no_links(logits: Tensor, frame_queries: Tensor, features: Tensor) -> Links:
    """The links before the first frame; arguments as for Comparison."""
    count, classes = logits.shape[1], logits.shape[2] - 1
    scores = torch.zeros(count, classes, device=logits.device)
    masks = features.new_zeros((count, *features.shape[-2:]), dtype=torch.bool)
    return Links(scores, masks, np.zeros((count, frame_queries.shape[-1]), np.float32))


def compare(
    model: GRAttVIS,
    frame_queries: Tensor,
    features: Tensor,
    track_kernels: Tensor,
    track_probability: Tensor,
    last_masks: Tensor,
) -> tuple[Tensor, ...]:
    """What a Comparison computes on the GPU.

    frame_queries (T, F, C), features (T, C, h, w); track_kernels (T, I, C + 1) and
    track_probability (T, I), the largest class probability; last_masks (Q, h, w) as in Links.

    Returns weighted_ious, quality, queries and ious as for `link_frames`; the masks that are the
    rows of ious; and the mask kernels of the detections (T, N, C + 1).
    """
    decoder, projection = model.frame_decoder, model.pixel_decoder.mask_features
    probability = class_probabilities(decoder.class_embed(frame_queries)).amax(-1)
    probability, indices = probability.topk(min(MAX_DETECTIONS, frame_queries.shape[1]))  # (T, N)
    queries = frame_queries.take_along_dim(indices[..., None], 1)
    kernels = mask_kernel(decoder.mask_embed(queries), projection)
    logits = mask_logits(kernels, features)  # (T, N, h, w)
    detected_masks = logits > 0
    track_masks = mask_logits(track_kernels, features) > 0

    weighted_ious = track_probability[..., None] * mask_ious(track_masks, detected_masks)
    quality = detection_quality(probability, logits)
    queries = F.normalize(queries.float(), dim=-1)
    masks = torch.cat((last_masks, detected_masks.flatten(0, 1)))  # (Q + T * N, h, w)
    ious = mask_ious(masks, detected_masks.flatten(0, 1)).unflatten(1, indices.shape)
    return weighted_ious, quality, queries, ious, masks, kernels


def detection_quality(probability: Tensor, logits: Tensor) -> Tensor:
    """Class probabilities (T, N) times mask scores of mask logits (T, N, h, w): (T, N).

    It is 0 if the probability is too low or the mask is empty, and NaN if either is NaN.
    """
    mask_sum, mask_area = mask_sum_and_area(logits)
    is_no_detection = (probability < MIN_PROBABILITY) | (mask_sum == 0)
    return (probability * mask_sum / mask_area.clamp(min=1)).masked_fill(is_no_detection, 0)


def mask_ious(masks: Tensor, others: Tensor) -> Tensor:
    """IoUs of bool masks (..., I, h, w) with others (..., N, h, w): (..., I, N); 0 if empty.

    Counts are exact in float32, but not in 16 bit, to which autocast would cast them.
    """
    masks, others = masks.flatten(-2).float(), others.flatten(-2).float()
    with torch.autocast(masks.device.type, enabled=False):
        intersections = masks @ others.mT
    unions = masks.sum(-1)[..., None] + others.sum(-1)[..., None, :] - intersections
    return intersections / unions.clamp(min=1)


def link_frames(
    tracks: np.ndarray,
    weighted_ious: np.ndarray,
    quality: np.ndarray,
    queries: np.ndarray,
    ious: np.ndarray,
    last_queries: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Assign the detections of T frames to tracks, frame by frame.

    tracks (T, I): queries; one may appear twice. weighted_ious (T, I, N): p * IoU, see above.
    quality (T, N) and queries (T, N, C) of the detections; a quality of 0 is no detection.
    ious (Q + T * N, T, N): of the last masks before these frames and all detections, with the
    detections. last_queries (Q, C): the last frame queries before these frames. All but tracks may
    have more frames, which are not read.

    Returns the last masks (Q,), as rows of ious; the last frame queries (Q, C); and frame, track
    and detection of each assignment (number, 3). FloatingPointError if a quality is not finite.
    """
    from scipy.optimize import linear_sum_assignment  # Speed: importing it takes half a second

    frames, detections = len(tracks), quality.shape[1]
    check_finite(torch.from_numpy(quality))  # otherwise NaN would be no detection
    weighted_ious = np.nan_to_num(weighted_ious)  # the scores of such tracks are checked later
    last_rows, last_queries, assigned = np.arange(len(last_queries)), last_queries.copy(), []
    for t in range(frames):
        ids, rows = np.unique(tracks[t], return_index=True)
        first = len(last_rows) + t * detections  # row of the frame's first detection
        kept = distinct_detections(quality[t], ious[first : first + detections, t])
        affinity = (
            MASK_WEIGHT * weighted_ious[t, rows][:, kept]
            + LAST_MASK_WEIGHT * ious[last_rows[ids], t][:, kept]
            + LAST_QUERY_WEIGHT * (last_queries[ids] @ queries[t, kept].T).clip(0) ** 2
        )  # (tracks, kept detections)
        for i, n in zip(*linear_sum_assignment(affinity, maximize=True)):
            if affinity[i, n] > MIN_AFFINITY:
                last_rows[ids[i]] = first + kept[n]
                last_queries[ids[i]] = queries[t, kept[n]]
                assigned.append((t, ids[i], kept[n]))
    return last_rows, last_queries, np.array(assigned, dtype=int).reshape(-1, 3)


def distinct_detections(quality: np.ndarray, ious: np.ndarray) -> list[int]:
    """The detections of a frame without duplicates, best first; of quality (N,) and IoUs (N, N)."""
    kept = []
    is_duplicate = (ious > DUPLICATE_IOU).tolist()  # Speed: lists are read faster than arrays
    best_first = np.argsort(-quality, kind="stable")[: np.count_nonzero(quality > 0)].tolist()
    for n in best_first:
        if not any(is_duplicate[n][other] for other in kept):
            kept.append(n)
    return kept
