"""The instances of a video: what inference returns, and how scores and masks come about.

Paper: VITA (2206.04403) and GenVIS (2211.08834), inference; upstream grattvis/grattvis_model.py, `inference`.
A score is a class score, the maximum over all frames, times a mask score, the mean probability inside the masks of all frames: it
is known at the end of the video. Shape letters are declared in model.py.
"""
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tracker import TrackerState

MASK_STRIDE = 4  # pixels of a padded frame that a pixel of mask logits stands for, along each side


@dataclass
class VideoResult:
    """Instances of a whole video, best first."""
    scores: Tensor      # (K,) float, 0..1: class score (maximum over frames) times mask score of the whole video
    labels: Tensor      # (K,) int64, 0-based
    masks: Tensor       # (K, T, H, W) bool
    track_ids: Tensor   # (K,) int64: the query; one query may appear under several labels
    logits: Tensor      # (clips, Q, K + 1) class logits of every query, clip by clip


@dataclass
class EncodedVideo:
    """Instances of a whole video, best first, with masks as run-length codes; all on the CPU."""
    scores: Tensor                   # (K,) float, 0..1, as in VideoResult
    labels: Tensor                   # (K,) int64, 0-based
    track_ids: Tensor                # (K,) int64
    segmentations: list[list[dict]]  # K times T run-length codes, see run_length.py
    gates: Tensor                    # (K, T, D) bool, True = open: the frame's clip could change the query; D = 0 without a gate


@dataclass
class RunningScores:
    """What decides a video's instances, of the frames so far; all queries."""
    class_scores: Tensor  # (Q, K) maximum
    mask_sum: Tensor      # (Q,) sum of the probabilities inside the masks
    mask_area: Tensor     # (Q,) pixels inside the masks

    def joined(self, other: "RunningScores | None") -> "RunningScores":
        """Those of two stretches of a video; None = nothing before."""
        if other is None:
            return self
        return RunningScores(torch.maximum(self.class_scores, other.class_scores), self.mask_sum + other.mask_sum,
                             self.mask_area + other.mask_area)

    def best(self, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, labels and queries of the instances, best first."""
        scores, labels, chosen = best_pairs(self.class_scores, top_k)
        scores, order = with_mask_scores(scores, self.mask_sum[chosen], self.mask_area[chosen])
        return scores, labels[order], chosen[order]


@dataclass
class FrameTracks:
    """Instances of one frame, best first by what is known so far."""
    scores: Tensor      # (K,) float, causal: of the frames up to this one
    labels: Tensor      # (K,) int64, 0-based
    masks: Tensor       # (K, H, W) bool, this frame's
    track_ids: Tensor   # (K,) int64: the query, stable over the video
    logits: Tensor      # (Q, K + 1) class logits of every query in this frame
    gates: Tensor       # (K, D) bool, True = open: this frame could change the query; D = 0 without a gate


@dataclass
class Stretch:
    """What inference knows of T frames of a video in a row, whole clips, of all queries."""
    logits: Tensor         # (clips, Q, K + 1)
    mask_kernel: Tensor    # (T, Q, C + 1)
    gates: Tensor          # (T, D, Q) bool, True = open; D = 0 without a gate
    features: Tensor       # (T, C, h, w): the kernels' inputs
    size: tuple[int, int]  # of the frames, pixels


@dataclass
class StepState:
    """What `step` carries from frame to frame. Its size is constant unless the mode has a memory."""
    size: tuple[int, int]   # of the frames, pixels
    tracker: TrackerState
    scores: RunningScores


def best_pairs(class_scores: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The top_k (query, class) pairs of (Q, K) scores: scores, labels, queries; equal scores keep their order."""
    scores, index = class_scores.flatten().sort(descending=True, stable=True)
    scores, index = scores[:top_k], index[:top_k]
    return scores, index % class_scores.shape[1], index // class_scores.shape[1]


def with_mask_scores(scores: Tensor, mask_sum: Tensor, mask_area: Tensor) -> tuple[Tensor, Tensor]:
    """Class scores (K,) times the mean probabilities inside the masks, best first, and their order; equal ones keep theirs."""
    scores = scores * mask_sum / (mask_area + 1e-6)
    order = scores.argsort(descending=True, stable=True)
    return scores[order], order


def check_finite(scores: Tensor) -> None:
    """FloatingPointError where scores are NaN or infinite, as they are once anything before them is."""
    if not scores.isfinite().all():
        raise FloatingPointError("the scores are not finite: the weights are damaged, or an activation exceeds what the dtype holds "
                                 "(float16: 65504), then --amp bf16 or off helps")


def class_probabilities(logits: Tensor) -> Tensor:
    """(..., K + 1) logits -> (..., K) probabilities, "no object" left out."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)[..., :-1]


@lru_cache(maxsize=16)
def resizing(source: int, size: int, output: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Along one side, what turns `source` pixels of stride 4 into `output` ones, a matrix (output, source): bilinear to the padded
    frame's pixels, the first `size` of which are the frame's, and those bilinear to the output's."""
    unit = torch.eye(source, dtype=torch.float64, device=device)[None]
    frame = F.interpolate(unit, size=MASK_STRIDE * source, mode="linear", align_corners=False)[..., :size]
    return (frame if output == size else F.interpolate(frame, size=output, mode="linear", align_corners=False))[0].T.to(dtype)


def resize_masks(logits: Tensor, size: tuple[int, int], output_size: tuple[int, int] | None = None) -> Tensor:
    """Mask logits (..., h, w) of padded frames at stride 4 -> (..., *output_size) of the frames, which are `size` (None = as large).

    Resizing goes side by side and is linear, so it is two products with matrices, and two resizings in a row are still two:
    nothing between is made, and a GPU multiplies faster than it interpolates."""
    rows, columns = (resizing(source, own, output, logits.dtype, logits.device)
                     for source, own, output in zip(logits.shape[-2:], size, output_size or size))
    return rows @ (logits @ columns.T)


def mask_confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of mask logits (..., H, W), the sum of the probabilities above one half and their number, each (...): their ratio over a video
    is the mask score."""
    soft = F.threshold(logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid(), 0.5, 0)
    mask_sum = soft.sum((-2, -1))
    return mask_sum, soft.ceil_().sum((-2, -1)).long()      # a sum of bools would make integers of them all first
