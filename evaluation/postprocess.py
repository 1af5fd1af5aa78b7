"""From tracker outputs to the instances of a video: result types, scores and masks.

Paper: VITA (2206.04403) and GenVIS (2211.08834), inference; upstream grattvis/grattvis_model.py,
`inference`. The score of an instance is its class score (maximum over frames) times its mask score
(mean probability inside its masks of all frames), so it is known at the end of the video only.
Shape letters are declared in model.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.run_length import PackedCodes, encode_counts
from tracker import TrackerState
from transformer import full_precision, mask_logits

if TYPE_CHECKING:
    from evaluation.association import Links

MASK_STRIDE = 4  # pixels of a padded frame per mask logit, along each side
# Memory: how much is held at once.
LOGIT_CHUNK = 12  # frames whose mask logits are made at frame size
MASK_CHUNK = 4  # frames whose masks are made at output size
MASK_PIXELS = 2 * 10**8  # mask pixels in a MaskEncoder
RESIZED_MASKS = 10  # that a MaskEncoder resizes at once
KEPT_LOGITS = 2**29  # bytes of mask logits in a MaskEncoder: 175 frames of 360x640 in 16 bit
SumAndArea = Callable[[Tensor], tuple[Tensor, Tensor]]  # `mask_sum_and_area`, maybe compiled


@dataclass
class VideoResult:
    """Instances of a whole video, best first."""

    scores: Tensor  # (I,) float, 0..1: class score times mask score of the whole video
    labels: Tensor  # (I,) int64, 0-based
    masks: Tensor  # (I, T, H, W) bool
    track_ids: Tensor  # (I,) int64: the query; one query may appear under several labels
    logits: Tensor  # (G, Q, K + 1) class logits of every query, clip by clip
    gates: Tensor  # (I, T, D) bool, True = open in the frame's clip; D = 0 without a gate


@dataclass
class EncodedVideo:
    """Instances of a whole video, best first, with masks as run-length codes; all on the CPU."""

    scores: Tensor  # (I,) float, 0..1, as in VideoResult
    labels: Tensor  # (I,) int64, 0-based
    track_ids: Tensor  # (I,) int64
    segmentations: list[list[dict]]  # I times T run-length codes, see run_length.py
    gates: Tensor  # (I, T, D) bool, as in VideoResult


@dataclass
class FrameTracks:
    """Instances of one frame, sorted by score, best first."""

    scores: Tensor  # (I,) float, causal: of the frames up to this one
    labels: Tensor  # (I,) int64, 0-based
    masks: Tensor  # (I, H, W) bool, this frame's
    track_ids: Tensor  # (I,) int64: the query, stable over the video
    logits: Tensor  # (Q, K + 1) class logits of every query in this frame
    gates: Tensor  # (I, D) bool, True = open in this frame; D = 0 without a gate


@dataclass
class FrameChunk:
    """What the model computes for T consecutive frames, which are G clips, for all queries."""

    logits: Tensor  # (G, Q, K + 1)
    mask_kernel: Tensor  # (T, Q, C + 1)
    gates: Tensor  # (T, D, Q) bool, True = open; D = 0 without a gate
    frame_queries: Tensor  # (T, F, C)
    features: Tensor  # (T, C, h, w): mask logits are kernels applied to them
    frame_size: tuple[int, int]  # (height, width) before padding


@dataclass
class RunningScores:
    """The scores of all queries over the frames so far. B videos have a leading dimension B."""

    class_scores: Tensor  # (Q, K) maximum
    mask_sum: Tensor  # (Q,) sum of the probabilities inside the masks
    mask_area: Tensor  # (Q,) pixels inside the masks

    @staticmethod
    def zeros(queries: int, num_classes: int, device: torch.device) -> "RunningScores":
        """The scores before the first frame."""
        class_scores = torch.zeros(queries, num_classes, device=device)
        mask_sum = torch.zeros(queries, device=device)
        mask_area = torch.zeros(queries, dtype=torch.long, device=device)
        return RunningScores(class_scores, mask_sum, mask_area)

    @staticmethod
    def stack(scores: list["RunningScores"]) -> "RunningScores":
        """The scores of several videos as one."""
        fields = zip(*((s.class_scores, s.mask_sum, s.mask_area) for s in scores))
        return RunningScores(*map(torch.stack, fields))

    def unstack(self) -> list["RunningScores"]:
        """The scores of each video."""
        fields = zip(self.class_scores, self.mask_sum, self.mask_area)
        return [RunningScores(*of_video) for of_video in fields]

    def merge(self, other: "RunningScores") -> "RunningScores":
        """The scores over the frames of both."""
        return RunningScores(
            torch.maximum(self.class_scores, other.class_scores),
            self.mask_sum + other.mask_sum,
            self.mask_area + other.mask_area,
        )

    def best(self, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, labels and queries of the instances, best first."""
        scores, labels, queries = best_pairs(self.class_scores, top_k)
        mask_sum, mask_area = (x.gather(-1, queries) for x in (self.mask_sum, self.mask_area))
        scores, order = with_mask_scores(scores, mask_sum, mask_area)
        return scores, labels.gather(-1, order), queries.gather(-1, order)


@dataclass
class StepState:
    """What `step` carries from frame to frame; its size is constant without a memory."""

    frame_size: tuple[int, int]  # (height, width)
    tracker: TrackerState
    scores: RunningScores
    links: Links | None = None  # with `exclusive`


# Scores


def best_pairs(class_scores: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The top_k (query, class) pairs of scores (..., Q, K): scores, labels, queries (..., top_k).

    The sort is stable.
    """
    scores, index = class_scores.flatten(-2).sort(descending=True, stable=True)
    scores, index = scores[..., :top_k], index[..., :top_k]
    num_classes = class_scores.shape[-1]
    return scores, index % num_classes, index // num_classes


def with_mask_scores(scores: Tensor, mask_sum: Tensor, mask_area: Tensor) -> tuple[Tensor, Tensor]:
    """Class scores (..., I) times mask scores, best first, and their order; a stable sort."""
    scores = scores * mask_sum / (mask_area + 1e-6)
    return scores.sort(descending=True, stable=True)


def check_finite(scores: Tensor) -> None:
    """Raise FloatingPointError if a score is NaN or infinite, as after an overflow in any layer."""
    if not scores.isfinite().all():
        raise FloatingPointError(
            "the scores are not finite: the weights are damaged, or an activation exceeds what "
            "the dtype holds (float16: 65504), then --amp bf16 or off helps"
        )


def class_probabilities(logits: Tensor) -> Tensor:
    """Class logits (..., K + 1) -> probabilities (..., K) without "no object"."""
    return full_precision(logits).softmax(-1)[..., :-1]


def mask_sum_and_area(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mask logits (..., H, W) -> sum of the probabilities above 0.5 and their number, each (...).

    The mask score is the ratio of both, each summed over all frames of a video.
    """
    probabilities = full_precision(logits).sigmoid()
    probabilities = F.threshold(probabilities, 0.5, 0, inplace=True)
    mask_sum = probabilities.sum((-2, -1))
    # Speed: a sum of bools would convert them all to integers first.
    mask_area = probabilities.ceil_().sum((-2, -1)).long()
    return mask_sum, mask_area


# Masks


@lru_cache(maxsize=16)
def resize_matrix(
    source: int, side: int, output: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The matrix (output, source) that resizes mask logits along one side, see `resize_masks`.

    source: logits along the padded side. side: pixels of the frame. output: pixels of the mask.
    """
    unit = torch.eye(source, dtype=torch.float64, device=device)[None]
    padded = F.interpolate(unit, size=MASK_STRIDE * source, mode="linear", align_corners=False)
    resized = padded[..., :side]
    if output != side:
        resized = F.interpolate(resized, size=output, mode="linear", align_corners=False)
    return resized[0].T.to(dtype)


def resize_masks(
    logits: Tensor, frame_size: tuple[int, int], output_size: tuple[int, int] | None = None
) -> Tensor:
    """Mask logits (..., h, w) of padded frames at stride 4 -> (..., *output_size) of the frames.

    Equal to two bilinear resizes, upstream's:

        padded = F.interpolate(logits, scale_factor=4, mode="bilinear")
        masks = F.interpolate(padded[..., :H, :W], size=output_size, mode="bilinear")

    where (H, W) is frame_size, and output_size None means frame_size. Bilinear resizing is linear
    and acts on rows and columns separately, so both together are one matrix product per side:
    masks = R logits C^T. The large intermediate is never made, and a GPU multiplies matrices faster
    than it interpolates.
    """
    rows, columns = (
        resize_matrix(source, side, output, logits.dtype, logits.device)
        for source, side, output in zip(logits.shape[-2:], frame_size, output_size or frame_size)
    )
    return rows @ (logits @ columns.T)


def instance_mask_logits(
    chunks: list[FrameChunk], queries: Tensor, sum_and_area: SumAndArea
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask logits (I, T, h, w) of I queries in all frames, and mask sum and area over the video.

    Memory: the list is emptied on the way, so that the features of each chunk are freed.
    """
    logits, sums, areas = [], [], []
    while chunks:
        chunk = chunks.pop(0)
        kernels = chunk.mask_kernel[:, queries].split(LOGIT_CHUNK)
        for kernel, features in zip(kernels, chunk.features.split(LOGIT_CHUNK)):
            some_logits = mask_logits(kernel, features).transpose(0, 1)  # (I, frames, h, w)
            mask_sum, mask_area = sum_and_area(resize_masks(some_logits, chunk.frame_size))
            logits.append(some_logits)
            sums.append(mask_sum)
            areas.append(mask_area)
    return torch.cat(logits, 1), torch.cat(sums, 1).sum(1), torch.cat(areas, 1).sum(1)


def binary_masks(
    logits: Tensor, frame_size: tuple[int, int], output_size: tuple[int, int]
) -> Tensor:
    """Mask logits (I, T, h, w) -> bool (I, T, *output_size), a few frames at a time."""
    shape = *logits.shape[:2], *output_size
    masks = torch.empty(shape, dtype=torch.bool, device=logits.device)
    for some_logits, some_masks in zip(logits.split(MASK_CHUNK, 1), masks.split(MASK_CHUNK, 1)):
        torch.gt(resize_masks(some_logits, frame_size, output_size), 0, out=some_masks)
    return masks


class MaskEncoder:
    """Turns the mask logits of a video into the run-length codes of its best queries.

    The best queries are known only at the end of a video, since a class score is a maximum over all
    frames. So the logits of all queries are kept at stride 4, and only the best queries are resized
    and encoded. Memory: whenever KEPT_LOGITS bytes are reached, all queries of the kept frames are
    encoded, and their codes are kept on the CPU instead.
    """

    def __init__(
        self,
        queries: int,
        frame_size: tuple[int, int],
        output_size: tuple[int, int],
        sum_and_area: SumAndArea,
    ):
        self.queries = queries
        self.frame_size = frame_size
        self.output_size = tuple(output_size)
        self.sum_and_area = sum_and_area
        largest = max(math.prod(output_size), math.prod(frame_size))
        # Half the pixels, since `mask_sum_and_area` holds as many probabilities as logits.
        self.query_chunk = max(1, MASK_PIXELS // 2 // largest)
        self.logits: list[Tensor] = []  # of the kept frames, (Q, h, w) each
        self.codes = PackedCodes(queries)  # of the frames before

    def add(self, mask_kernel: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Take the kernels (Q, C + 1) and features (C, h, w) of the next frame.

        Returns `mask_sum_and_area` of its masks, (Q,) each.
        """
        logits = mask_logits(mask_kernel[None], features[None])[0]  # (Q, h, w)
        self.logits.append(logits)
        if len(self.logits) * logits.nbytes >= KEPT_LOGITS:
            for codes in self.encode(list(range(self.queries))):
                self.codes.add(codes)
        sums, areas = [], []
        for some_logits in logits.split(self.query_chunk):
            mask_sum, mask_area = self.sum_and_area(resize_masks(some_logits, self.frame_size))
            sums.append(mask_sum)
            areas.append(mask_area)
        return torch.cat(sums), torch.cat(areas)

    def encode(self, queries: list[int]) -> Iterator[list[bytes]]:
        """The codes of these queries, for some of the kept frames at a time, which are dropped."""
        # A constant number of masks is resized at once, because rounding can depend on the number.
        count = min(RESIZED_MASKS, self.query_chunk)
        frames = max(1, MASK_PIXELS // (len(queries) * math.prod(self.output_size)))
        if self.logits:  # one copy to the GPU, which waits for it, instead of one per frame
            chosen = torch.tensor(queries, device=self.logits[0].device)
        while self.logits:
            logits = torch.cat([logits[chosen] for logits in self.logits[:frames]])
            del self.logits[:frames]
            shape = len(logits), *self.output_size
            masks = torch.empty(shape, dtype=torch.bool, device=logits.device)
            for some_logits, some_masks in zip(logits.split(count), masks.split(count)):
                padded = F.pad(some_logits, (0, 0, 0, 0, 0, count - len(some_logits)))
                resized = resize_masks(padded, self.frame_size, self.output_size)
                torch.gt(resized[: len(some_masks)], 0, out=some_masks)
            yield encode_counts(masks)

    def finish(self, queries: list[int]) -> list[list[dict]]:
        """The codes of these queries in all frames; the encoder is empty afterwards."""
        different = sorted(set(queries))  # a query may have several labels
        earlier = self.codes.take(different)
        later = [code.decode() for codes in self.encode(different) for code in codes]
        tracks = {}
        for number, query in enumerate(different):
            tracks[query] = earlier[number] + later[number :: len(different)]
        return [
            [{"size": list(self.output_size), "counts": code} for code in tracks[query]]
            for query in queries
        ]
