"""Matching: which query answers for which instance.

Frames are matched one by one (Mask2Former). Clips are matched with identities kept (GenVIS): an instance is matched in the
clip in which it first appears and keeps that query to the end of the video. A video read as one clip (VITA) is the same with
one clip in which every instance is new. A frame is treated as a clip of one frame, so one code serves both.

A step of training waits for the GPU once, for the costs of all frames and clips. Numpy arrays are what the CPU decides by;
tensors are on the GPU, where afterwards only the sizes depend on how many instances there are, not the number of operations.

Paper: Mask2Former (2112.01527) section 3.3 for point sampling, GenVIS (2211.08834) for identities over clips. Upstream:
mask2former/modeling/matcher.py, grattvis/modeling/grattvis_matcher.py and vita/modeling/vita_matcher.py. Shape letters are
declared in model.py; here also
    A instances of all B videos, video by video; I those of one video; P points
    G clips of a video, R predictions for each: the D * L of the tracker, D-major, or the layers of the frame decoder
A match is written as `query_of` (I,): the query of each instance, -1 for none.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from clips import Clip
from model import TrainingOutput

EXCLUDED = 1e6  # cost of giving a new instance a query that a visible instance holds


@dataclass
class Targets:
    """Ground truth of all videos of a step, padded as the images are."""
    labels: np.ndarray  # (A,) int64
    ids: np.ndarray     # (A, T) int64, -1 where the instance is not visible
    first: np.ndarray   # (B + 1,): the instances of video b are first[b] to first[b + 1] - 1
    masks: Tensor       # (A, T, H, W) bool, on the model's device

    @property
    def videos(self) -> list[slice]:
        """The instances of each video."""
        return [slice(*bounds) for bounds in zip(self.first, self.first[1:])]

    @property
    def video_of(self) -> np.ndarray:
        """(A,): the video of each instance."""
        return np.repeat(np.arange(len(self.first) - 1), np.diff(self.first))


@dataclass
class Predictions:
    """What is matched with the instances: all clips of a step, or all frames as clips of one frame."""
    logits: Tensor       # (G, R, B, Q, K + 1)
    mask_kernel: Tensor  # (G, R, B, Q, C + 1)
    features: Tensor     # (B, T, C, h, w)
    clip_of: np.ndarray  # (T,): the clip of each frame


@dataclass
class Matching:
    """The matches of Predictions."""
    ids: np.ndarray       # (A, G), -1 where the instance is not visible in the clip
    query_of: np.ndarray  # (G, R, A), -1: not seen so far, or more instances than queries

    @property
    def matched(self) -> np.ndarray:
        """(G, R, A) bool: visible in the clip and with a query."""
        return (self.query_of >= 0) & (self.ids.T != -1)[:, None]


@dataclass
class Matches:
    """Every match of a step, for tests and for the curious."""
    frames: list[list[np.ndarray]]       # [frame decoder layer handed on][frame] -> (visible instances of the frame,)
    clips: list[list[list[np.ndarray]]]  # [clip][tracker layer][stream l * B + b] -> (I,), -1 = not seen so far


def pad_targets(clips: list[Clip], size: tuple[int, int], device: torch.device) -> Targets:
    """Pad masks right and bottom to `size`; a frame with an empty mask does not show the instance; drop the never seen."""
    ids = [np.where(clip.masks.numpy().any((2, 3)), clip.ids.numpy(), -1) for clip in clips]
    seen = [(own != -1).any(1) for own in ids]
    first = np.cumsum([0, *(own.sum() for own in seen)])
    masks = torch.zeros(first[-1], ids[0].shape[1], *size, dtype=torch.bool, device=device)
    for start, stop, clip, own in zip(first, first[1:], clips, seen):
        height, width = clip.masks.shape[2:]
        masks[start:stop, :, :height, :width] = upload(clip.masks if own.all() else clip.masks[torch.from_numpy(own)], device)
    labels = np.concatenate([clip.labels.numpy()[own] for clip, own in zip(clips, seen)])
    ids = np.concatenate([own_ids[own] for own_ids, own in zip(ids, seen)])
    return Targets(labels, ids, first, masks)


def frame_predictions(output: TrainingOutput, batch: int, layers: int) -> Predictions:
    """The last `layers` predictions of the frame decoder."""
    def stacked(values) -> Tensor:  # (N, F, ...) of each layer -> (T, layers, B, F, ...)
        return torch.stack(values).unflatten(1, (batch, -1)).permute(2, 0, 1, 3, 4)

    logits, kernel = map(stacked, zip(*output.frames.predictions[-layers:]))
    return Predictions(logits, kernel, output.frames.features.unflatten(0, (batch, -1)), np.arange(len(logits)))


def clip_predictions(output: TrainingOutput, batch: int) -> Predictions:
    """All predictions of the tracker."""
    def stacked(name: str) -> Tensor:  # D tensors (L, B, Q, ...) of each clip -> (G, D L, B, Q, ...)
        values = torch.stack([value for clip in output.clips for value in getattr(clip, name)])
        return values.unflatten(0, (len(output.clips), -1)).flatten(1, 2)

    clip_of = np.repeat(np.arange(len(output.clips)), [clip.frame_embed.shape[2] for clip in output.clips])
    return Predictions(stacked("logits"), stacked("mask_kernel"), output.frames.features.unflatten(0, (batch, -1)), clip_of)


# Points

def random_points(rows: int, count: int, like: Tensor) -> Tensor:
    """Uniform points (rows, count, 2) in 0..1; the one source of randomness in matching and losses."""
    return torch.rand(rows, count, 2, device=like.device, dtype=like.dtype)


def sample_at(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps (N, C, H, W) at points (N, P, 2), (x, y) in 0..1 over the whole map: (N, C, P)."""
    if maps.is_cuda and torch.are_deterministic_algorithms_enabled():
        return gather_at(maps, points)
    return F.grid_sample(maps, points.mul(2).sub_(1)[:, :, None], align_corners=False).squeeze(3)


def gather_at(maps: Tensor, points: Tensor) -> Tensor:
    """sample_at, slower, whose gradient is summed in the same order every time (on a GPU, grid_sample's is not)."""
    height, width = maps.shape[-2:]
    place = points * points.new_tensor((width, height)) - 0.5
    low, values = place.detach().floor(), 0
    for corner in ((0, 0), (1, 0), (0, 1), (1, 1)):
        pixel = low + points.new_tensor(corner)
        x, y = pixel.unbind(-1)
        share = (1 - (place - pixel).abs()).prod(-1) * ((x >= 0) & (x < width) & (y >= 0) & (y < height))
        index = (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).long()
        values = values + maps.flatten(2).gather(2, index[:, None].expand(-1, maps.shape[1], -1)) * share[:, None]
    return values


def with_ones(features: Tensor) -> Tensor:
    """(T, C, h, w) -> (T, C + 1, h, w): a kernel's constant, too, is less where a point lies in part outside the map."""
    return F.pad(features, (0, 0, 0, 0, 0, 1), value=1)


def uncertain_points(logits: Tensor, count: int, candidates: int, uncertain: int) -> Tensor:
    """Points (N, count, 2) for mask logits (N, 1, h, w): `uncertain` are where the mask is the least decided among the
    candidates, the rest anywhere (PointRend)."""
    points = random_points(len(logits), candidates, logits)
    certainty = sample_at(logits, points)[:, 0].abs()                                         # (N, candidates)
    index = certainty.topk(uncertain, 1, largest=False).indices
    chosen = points.gather(1, index[..., None].expand(-1, -1, 2))
    return torch.cat((chosen, random_points(len(logits), count - uncertain, logits)), 1)


# Matching

def match_cost(logits: Tensor, masks: Tensor, labels: Tensor, target_masks: Tensor, clip_of: Tensor, weights: dict) -> Tensor:
    """Cost (G, R, Q, I) of every query of a video for every instance: class probability, point BCE and dice over the clip.

    logits (G, R, Q, K + 1), labels (I,); masks (T, R, Q, P) logits and target_masks (T, I, P) 0..1, at the same points of
    each frame, whose clip is clip_of (T,).
    """
    cost_class = -logits.softmax(-1).index_select(-1, labels)
    masks, truth = masks.flatten(1, 2), target_masks.transpose(1, 2)                          # (T, R Q, P), (T, P, I)
    length = (clip_of[:, None] == clip_of).sum(0)[:, None, None]                              # frames of the frame's clip
    bce = (F.softplus(masks).sum(-1, keepdim=True) - masks @ truth) / (masks.shape[-1] * length)  # BCE = softplus(x) - x t
    inside = masks.sigmoid()
    area = inside.sum(-1, keepdim=True) + truth.sum(1, keepdim=True)
    sums = torch.stack((bce, inside @ truth, area))                                           # (3, T, R Q, I)
    sums = sums.new_zeros(3, len(logits), *sums.shape[2:]).index_add(1, clip_of, sums)        # frames of a clip are joined
    cost_mask, overlap, area = sums.view(3, *cost_class.shape)
    cost_dice = 1 - (2 * overlap + 1) / (area + 1)
    return weights["class"] * cost_class + weights["mask"] * cost_mask + weights["dice"] * cost_dice


@torch.no_grad()
def matching_costs(predictions: Predictions, targets: Targets, count: int, weights: dict) -> list[Tensor]:
    """Costs (G, R, Q, I) of each video by masks at `count` points, the same ones in every frame of a clip.

    Sampling is linear, so the sampled mask of a query is its kernel on the sampled features: one sampling serves all queries of all
    predictions. It goes video by video to save memory.
    """
    labels, clip_of = to_device([targets.labels, predictions.clip_of], predictions.features.device)
    costs = []
    for video, own in enumerate(targets.videos):
        features = with_ones(full_precision(predictions.features[video]))                     # (T, C + 1, h, w)
        points = random_points(len(predictions.logits), count, features).index_select(0, clip_of)  # (T, P, 2)
        truth = sample_at(targets.masks[own].transpose(0, 1).to(features.dtype), points)      # (T, I, P)
        kernel = full_precision(predictions.mask_kernel[:, :, video]).index_select(0, clip_of)  # (T, R, Q, C + 1)
        masks = (kernel.flatten(1, 2) @ sample_at(features, points)).unflatten(1, kernel.shape[1:3])
        logits = full_precision(predictions.logits[:, :, video])
        costs.append(match_cost(logits, masks, labels[own], truth, clip_of, weights))
    return costs


def bring_costs(costs: list[Tensor]) -> list[np.ndarray]:
    """All costs on the CPU: the one wait for the GPU. One that is not finite is a high one: a loss will not be finite either, which
    is where training stops and says why."""
    flat = np.nan_to_num(torch.cat([cost.flatten() for cost in costs]).cpu().numpy(), nan=EXCLUDED, posinf=EXCLUDED, neginf=EXCLUDED)
    ends = np.cumsum([cost.numel() for cost in costs])
    return [part.reshape(cost.shape) for part, cost in zip(np.split(flat, ends[:-1]), costs)]


def assign(cost: np.ndarray) -> np.ndarray:
    """Hungarian assignment of (Q, I) costs -> query_of (I,)."""
    query_of = np.full(cost.shape[1], -1)
    queries, instances = linear_sum_assignment(cost)
    query_of[instances] = queries
    return query_of


def match_clip(cost: np.ndarray, new: np.ndarray, valid: np.ndarray, held: np.ndarray) -> np.ndarray:
    """One stream: instances that appear now get a query, the others keep the one they hold (-1: none); query_of (I,).

    A visible instance's query is not given away (unless there are more instances than queries). That of an occluded one
    is, as upstream (grattvis_matcher.py:159).
    """
    query_of = held.copy()
    if new.any():
        taken = held[valid & ~new]
        cost = cost[:, new]
        cost[taken[taken >= 0]] = EXCLUDED
        query_of[new] = assign(cost)
    return query_of


def match(costs: list[np.ndarray], targets: Targets, clip_of: np.ndarray, identities: bool) -> Matching:
    """Match all videos by their costs (G, R, Q, I): with identities kept over clips, or every clip (frame) anew."""
    ids = np.stack([targets.ids[:, clip_of == clip].max(1) for clip in range(clip_of[-1] + 1)], 1)
    query_of = np.full((*costs[0].shape[:2], len(ids)), -1)
    for own, cost in zip(targets.videos, costs):
        valid = ids[own].T != -1                                                              # (G, I): visible in the clip
        new, held = valid, np.full((cost.shape[1], cost.shape[3]), -1)                        # held (R, I)
        if identities:
            new = valid & (np.cumsum(valid, 0) == 1)
        for clip in range(len(cost)):
            found = np.stack([match_clip(own_cost, new[clip], valid[clip], kept) for own_cost, kept in zip(cost[clip], held)])
            query_of[clip, :, own] = found
            held = found if identities else held
    return Matching(ids, query_of)


def all_matches(frames: Matching, clips: Matching, targets: Targets, layers: int) -> Matches:
    """The matches by layer and frame, by clip, layer and stream; layers: L."""
    visible = targets.ids != -1
    length, videos = visible.shape[1], targets.videos
    by_frame = [[frames.query_of[t, layer, own][visible[own, t]] for own in videos for t in range(length)]
                for layer in range(-layers, 0)]
    by_clip = [[[query_of[first + level, own] for level in range(layers) for own in videos]
                for first in range(0, len(query_of), layers)] for query_of in clips.query_of]
    return Matches(by_frame, by_clip)


# Between CPU and GPU

def upload(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU, moved without a wait, as it is from pinned memory."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def to_device(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays of one type, moved in one transfer that nobody waits for."""
    flat = upload(torch.from_numpy(np.concatenate([array.ravel() for array in arrays])), device)
    return [part.view(array.shape) for part, array in zip(flat.split([array.size for array in arrays]), arrays)]


def full_precision(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
