"""One track for each detection: a variant of inference that is not in the paper.

    model.exclusive = True    # or evaluate.py --exclusive, demo.py --exclusive

A query reads all frame queries of a frame, so it may come to show two objects that look alike, and
two queries may come to show the same object (docs/gate_study.md). The detector separates them: each
frame query predicts a mask of its own. Here tracks take over these masks, one to one. In every
frame the detections are assigned to the tracks with the largest sum of

    p * IoU(mask of the track, detection)
    + 2 * IoU(last mask, detection)
    + cosine(last frame query, frame query of the detection)

p is the largest class probability of the track in this frame, and a negative cosine counts as 0.
Sums up to 0.1 are not assigned. The last mask and frame query are those of the detection that was
last assigned to the track: they remember an object while it is occluded. A track without a
detection has no mask in the frame.

Detections are the frame queries with a class probability of 0.3 or more and a mask, unless a better
one has an IoU above 0.7 with it. Tracks are the queries of the top_k (query, class) pairs so far:
another top_k may give other masks, and a query that is among them only later has no masks before.
Classes and gates are the tracker's. All of it is causal: `step` does the same.

Letters: I tracks and N detections of a frame, otherwise those of model.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from evaluation.postprocess import best_pairs, class_probabilities, mask_sum_and_area
from transformer import mask_kernel, mask_logits

if TYPE_CHECKING:
    from model import GRAttVIS

MIN_PROBABILITY = 0.3  # of a detection's class
DUPLICATE_IOU = 0.7  # of a detection with a better one
LAST_MASK, LAST_QUERY = 2.0, 1.0  # weights
MIN_AFFINITY = 0.1
NO_MASK = -100.0  # logit of every pixel


@dataclass
class Links:
    """What the tracks remember of the detections that were assigned to them."""

    class_scores: Tensor  # (Q, K), maximum over the frames so far
    masks: np.ndarray  # (Q, h, w) bool, True = object; empty before the first detection
    queries: np.ndarray  # (Q, C) of length 1, or 0 before the first detection


@dataclass
class Detections:
    """The detections of a frame, duplicates left out."""

    indices: np.ndarray  # (N,) int, which frame queries they are
    masks: np.ndarray  # (N, h, w) bool, True = object
    queries: np.ndarray  # (N, C) frame queries, of length 1


@torch.no_grad()
def link_detections(
    model: GRAttVIS,
    frame_queries: Tensor,
    logits: Tensor,
    kernels: Tensor,
    features: Tensor,
    links: Links | None,
    top_k: int,
) -> tuple[Tensor, Links]:
    """Replace the masks of the tracks by those of detections, in T consecutive frames.

    frame_queries (T, F, C), class logits (T, Q, K + 1), mask kernels (T, Q, C + 1) and features
    (T, C, h, w) are those of the frames. links: what was returned for the frames before, or None.
    top_k: the number of (query, class) pairs whose queries are tracks; others have no masks.

    Returns mask kernels (T, Q, C + 1), and the links after the last frame.
    """
    decoder, projection = model.frame_decoder, model.pixel_decoder.mask_features
    detected_kernels = mask_kernel(decoder.mask_embed(frame_queries), projection)  # (T, F, C + 1)
    detected_probability = class_probabilities(decoder.class_embed(frame_queries)).amax(-1)
    probability = class_probabilities(logits).cpu()  # (T, Q, K)
    links = links or no_links(probability[0], frame_queries, features)
    linked_kernels = torch.zeros_like(kernels)
    linked_kernels[..., -1] = NO_MASK
    for t in range(len(kernels)):  # Memory: the masks of one frame at a time
        masks = mask_logits(kernels[t : t + 1], features[t : t + 1])[0] > 0  # (Q, h, w)
        detected_logits = mask_logits(detected_kernels[t : t + 1], features[t : t + 1])[0]
        detections = find_detections(detected_probability[t], detected_logits, frame_queries[t])
        links, pairs = link_frame(probability[t], masks.cpu().numpy(), detections, links, top_k)
        tracks, indices = np.array(pairs, dtype=int).reshape(-1, 2).T
        linked_kernels[t, tracks] = detected_kernels[t, indices].to(kernels.dtype)
    return linked_kernels, links


def no_links(class_scores: Tensor, frame_queries: Tensor, features: Tensor) -> Links:
    """The links before the first frame; the arguments give the shapes."""
    queries = len(class_scores)
    return Links(
        torch.zeros_like(class_scores),
        np.zeros((queries, *features.shape[-2:]), bool),
        np.zeros((queries, frame_queries.shape[-1]), np.float32),
    )


def link_frame(
    probability: Tensor, masks: np.ndarray, detections: Detections, links: Links, top_k: int
) -> tuple[Links, list[tuple[int, int]]]:
    """Assign the detections of a frame: the new links, and pairs (track, frame query).

    probability (Q, K) and masks (Q, h, w) of all queries in this frame.
    """
    class_scores = torch.maximum(links.class_scores, probability)
    links = Links(class_scores, links.masks.copy(), links.queries.copy())
    _, _, best = best_pairs(class_scores, top_k)
    tracks = np.unique(best.numpy())
    weight = probability[tracks].amax(-1, keepdim=True).numpy()  # (I, 1)
    affinity = (
        weight * mask_ious(masks[tracks], detections.masks)
        + LAST_MASK * mask_ious(links.masks[tracks], detections.masks)
        + LAST_QUERY * (links.queries[tracks] @ detections.queries.T).clip(0)
    )  # (I, N)
    affinity = np.nan_to_num(affinity)  # `check_finite` reports scores that are not finite
    pairs = []
    for i, n in zip(*linear_sum_assignment(affinity, maximize=True)):
        if affinity[i, n] > MIN_AFFINITY:
            links.masks[tracks[i]] = detections.masks[n]
            links.queries[tracks[i]] = detections.queries[n]
            pairs.append((tracks[i], detections.indices[n]))
    return links, pairs


def find_detections(probability: Tensor, logits: Tensor, queries: Tensor) -> Detections:
    """The detections of a frame: class probability (F,), mask logits (F, h, w), queries (F, C)."""
    mask_sum, mask_area = mask_sum_and_area(logits)
    quality = (probability * mask_sum / mask_area.clamp(min=1)).cpu().numpy()
    is_detection = ((probability >= MIN_PROBABILITY) & (mask_area > 0)).cpu().numpy()
    candidates = np.array([i for i in np.argsort(-quality) if is_detection[i]], dtype=int)
    masks = (logits[candidates] > 0).cpu().numpy()
    ious = mask_ious(masks, masks)
    kept = []  # places among the candidates
    for place in range(len(candidates)):
        if (ious[place, kept] <= DUPLICATE_IOU).all():
            kept.append(place)
    indices = candidates[kept]
    queries = F.normalize(queries[indices].float(), dim=-1).cpu().numpy()
    return Detections(indices, masks[kept], queries)


def mask_ious(masks: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoUs of bool masks (I, h, w) with others (N, h, w): (I, N); 0 for two empty masks."""
    pixels = masks.shape[1] * masks.shape[2]
    masks = masks.reshape(len(masks), pixels).astype(np.float32)
    others = others.reshape(len(others), pixels).astype(np.float32)
    intersections = masks @ others.T
    unions = masks.sum(1)[:, None] + others.sum(1) - intersections
    return intersections / np.maximum(unions, 1)
