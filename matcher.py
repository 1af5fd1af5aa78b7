"""Hungarian matching: assigns a query to each instance.

Frame queries are matched in every frame independently (Mask2Former). Tracker queries keep
identities (GenVIS): an instance is matched in the clip in which it first appears, and keeps that
query to the end of the video. VITA is the special case of a single clip, the whole video.

Here a frame is a clip of length 1, so one function serves both. Shape letters of model.py, and

                                            detector        tracker
    G  clips of a video                     T, its frames   G
    R  predictions of a clip, see below     1 + layers      D * L, decoder layer first
    Q  queries of a prediction              F               Q
    I  instances, padded to the most of any video of the batch
    P  points at which masks are compared

The predictions of a frame are that of the learned queries and one after each decoder layer; with a
frozen detector only the last L. The R predictions are matched independently: an instance may have
another query in each. The variable `layer` counts them.

    targets = pad_targets(videos, size, device)
    costs = CostsToCPU(matching_costs(predictions, targets, points, weights))
    matches = match(costs.wait(), predictions, targets, keep_identities=True)

Paper: Mask2Former (2112.01527) section 3.3 for point sampling, GenVIS (2211.08834) section 3.2 for
identities over clips. Upstream: mask2former/modeling/matcher.py, grattvis/modeling/
grattvis_matcher.py, vita/modeling/vita_matcher.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from clips import Clip
from model import TrainingOutput
from runtime.device import CopyToCPU, upload
from tracker import ClipPrediction
from transformer import full_precision

FORBIDDEN_COST = 1e6  # of the query of another visible instance; replaces NaN and infinite costs


@dataclass
class Targets:
    """Ground truth of a batch, padded to I instances (never visible) and to one mask size."""

    labels: Tensor  # (B, I) int64, 0..K - 1
    visible: Tensor  # (B, T, I) bool, True = the instance has pixels in the frame
    masks: Tensor  # (B, T, I, H, W) bool, True = instance
    labels_cpu: np.ndarray  # copies for the assignment, which runs on the CPU
    visible_cpu: np.ndarray


@dataclass
class Predictions:
    """What is matched with the instances: the clips of a batch, or its frames (clip_length 1).

    The mask of a query in a frame is the product of its kernel and the features.
    """

    logits: Tensor  # (G, R, B, Q, K + 1)
    mask_kernel: Tensor  # (G, R, B, Q, C + 1), see transformer.mask_kernel
    features: Tensor  # (B, T, C, h, w)
    clip_length: int  # frames of a clip; the last clip may be shorter
    clip_embed: Tensor | None = None  # (G, L, B, Q, C), similarity embeddings; tracker only
    frame_embed: Tensor | None = None  # (T, L, B, F, C)
    # (G, D * L, B, Q), gate logits or soft gates; more where a decoder layer has several gates
    gate_values: Tensor | None = None

    @cached_property
    def clip_of(self) -> Tensor:
        """(T,) int64, the clip of each frame."""
        length, device = self.features.shape[1], self.features.device
        return torch.arange(length, device=device) // self.clip_length

    @cached_property
    def membership(self) -> Tensor:
        """(G, T), 1.0 where a frame belongs to a clip, else 0.0."""
        clips = torch.arange(len(self.logits), device=self.features.device)
        return (clips[:, None] == self.clip_of).to(self.logits.dtype)


@dataclass(frozen=True)
class Matches:
    """The query of every instance in every prediction, and what follows from it."""

    # (G, R, B, I) int64, -1 = none: the instance was not visible so far, or there are more
    # instances than queries. Clips keep a query while the instance is invisible, frames do not.
    query_of: Tensor
    visible: Tensor  # (G, B, I) bool, True = visible in some frame of the clip
    classes: Tensor  # (G, R, B, Q) int64, what each query has to predict; K = no object

    @property
    def matched(self) -> Tensor:
        """(G, R, B, I) bool: visible in the clip and with a query."""
        return (self.query_of >= 0) & self.visible[:, None]


# Targets and predictions in one form


def pad_targets(videos: list[Clip], size: tuple[int, int], device: torch.device) -> Targets:
    """Pad the ground truth of B videos to the most instances, and masks right and bottom to `size`.

    An instance whose mask is empty in a frame is not visible there.
    """
    batch = len(videos)
    length = videos[0].masks.shape[1]
    instances = max(1, *(len(video.labels) for video in videos))  # at least 1, so nothing is empty
    labels = np.zeros((batch, instances), dtype=np.int64)
    visible = np.zeros((batch, length, instances), dtype=bool)
    masks = torch.zeros(batch, length, instances, *size, dtype=torch.bool, device=device)
    for b, video in enumerate(videos):
        count, _, height, width = video.masks.shape  # (I of this video, T, height, width)
        labels[b, :count] = video.labels.numpy()
        visible[b, :, :count] = video.masks.numpy().any((2, 3)).T
        masks[b, :, :count, :height, :width] = upload(video.masks, device).transpose(0, 1)
    return Targets(*to_device([labels, visible], device), masks, labels, visible)


def frame_predictions(output: TrainingOutput, batch: int, count: int) -> Predictions:
    """The last `count` predictions of the frame decoder, G = T."""
    logits, kernels = zip(*output.frames.predictions[-count:])
    return Predictions(
        logits=stack_frame_layers(logits, batch),
        mask_kernel=stack_frame_layers(kernels, batch),
        features=output.frames.features.unflatten(0, (batch, -1)),
        clip_length=1,
    )


def stack_frame_layers(layers: tuple[Tensor, ...], batch: int) -> Tensor:
    """(B * T, F, ...) of each prediction -> (T, R, B, F, ...)."""
    stacked = torch.stack(layers).unflatten(1, (batch, -1))
    return full_precision(stacked.permute(2, 0, 1, 3, 4))


def clip_predictions(
    output: TrainingOutput, batch: int, gate_field: str = "gate_logits"
) -> Predictions:
    """All predictions of the tracker. gate_field: of ClipPrediction, what the gate loss reads."""
    clips = output.clips
    frame_embed = torch.cat([clip.frame_embed for clip in clips], 2)  # (L, B, T, F, C)
    clip_embed = torch.stack([clip.clip_embed for clip in clips])
    has_gates = bool(getattr(clips[0], gate_field))
    return Predictions(
        logits=stack_clip_layers(clips, "logits"),
        mask_kernel=stack_clip_layers(clips, "mask_kernel"),
        features=output.frames.features.unflatten(0, (batch, -1)),
        clip_length=clips[0].frame_embed.shape[2],
        clip_embed=full_precision(clip_embed),
        frame_embed=full_precision(frame_embed.permute(2, 0, 1, 3, 4)),
        gate_values=stack_clip_layers(clips, gate_field) if has_gates else None,
    )


def stack_clip_layers(clips: list[ClipPrediction], name: str) -> Tensor:
    """A field of each clip, a list of D tensors (L, B, Q, ...) -> (G, D * L, B, Q, ...)."""
    values = torch.stack([torch.stack(getattr(clip, name)) for clip in clips])
    return full_precision(values.flatten(1, 2))


# Points


def random_points(rows: int, count: int, like: Tensor) -> Tensor:
    """Uniform points (rows, count, 2) in 0..1; the one source of randomness in this file."""
    return torch.rand(rows, count, 2, device=like.device, dtype=like.dtype)


def sample_at(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps (N, C, H, W) at points (N, P, 2), (x, y) in 0..1: (N, C, P)."""
    if maps.is_cuda and torch.are_deterministic_algorithms_enabled():
        return gather_at(maps, points)
    grid = points.mul(2).sub_(1)[:, :, None]
    return F.grid_sample(maps, grid, align_corners=False).squeeze(3)


def gather_at(maps: Tensor, points: Tensor) -> Tensor:
    """sample_at with a deterministic gradient, which grid_sample lacks on a GPU; slower."""
    height, width = maps.shape[-2:]
    position = points * points.new_tensor((width, height)) - 0.5
    corner = position.detach().floor()
    values = 0
    for offset in ((0, 0), (1, 0), (0, 1), (1, 1)):
        pixel = corner + points.new_tensor(offset)
        x, y = pixel.unbind(-1)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        weight = (1 - (position - pixel).abs()).prod(-1) * inside
        row = y.clamp(0, height - 1)
        column = x.clamp(0, width - 1)
        index = (row * width + column).long()
        index = index[:, None].expand(-1, maps.shape[1], -1)
        values = values + maps.flatten(2).gather(2, index) * weight[:, None]
    return values


def uncertain_points(logits: Tensor, count: int, candidates: int, uncertain: int) -> Tensor:
    """Points (N, count, 2) for mask logits (N, 1, h, w) (PointRend, arXiv 1912.08193).

    `uncertain` of them are the candidates at which the mask is the least decided; the others are
    uniform.
    """
    points = random_points(len(logits), candidates, logits)
    certainty = sample_at(logits, points)[:, 0].abs()  # (N, candidates)
    index = certainty.topk(uncertain, 1, largest=False).indices
    chosen = points.gather(1, index[..., None].expand(-1, -1, 2))
    others = random_points(len(logits), count - uncertain, logits)
    return torch.cat((chosen, others), 1)


# Costs


def sample_features(features: Tensor, points: Tensor) -> Tensor:
    """Features (T, C, h, w) at points (T, P, 2): (T, C + 1, P), at least float32.

    The last channel is 1, for the constant of a mask kernel; as 0 is sampled around a map, it is
    less at points that lie partly outside.
    """
    features = full_precision(features)
    features = F.pad(features, (0, 0, 0, 0, 0, 1), value=1)
    return sample_at(features, points)


@torch.no_grad()
def matching_costs(
    predictions: Predictions,
    targets: Targets,
    num_points: int,
    weights: dict[str, float],
    sample: Callable[[Tensor, Tensor], Tensor] = sample_features,
) -> Tensor:
    """Costs (G, R, B, Q, I) of giving a query to an instance, from masks at random points.

    Equal to sampling the mask logits e . f of every query. Sampling is linear, so the features f
    are sampled instead, once for all R predictions. Memory: one video at a time. Upstream draws
    points for each prediction; docs/parity.md says what sharing them changes.

    sample: `sample_features`, or the same in one kernel (fast/fused_sampling.py).
    """
    clip_of = predictions.clip_of
    costs = []
    for video in range(len(targets.labels)):
        kernel = predictions.mask_kernel[:, :, video]
        kernel = kernel[clip_of]  # (T, R, Q, C + 1)
        # All frames of a clip have the same points.
        points = random_points(len(predictions.logits), num_points, kernel)
        points = points[clip_of]  # (T, P, 2)
        truth = targets.masks[video].to(points.dtype)
        truth = sample_at(truth, points)  # (T, I, P)
        sampled = sample(predictions.features[video], points)
        masks = torch.einsum("trqc,tcp->trqp", kernel, sampled)
        logits = predictions.logits[:, :, video]
        labels = targets.labels[video]
        cost = match_cost(logits, masks, labels, truth, points, predictions.membership, weights)
        costs.append(cost)
    return torch.stack(costs, 2)


def match_cost(
    logits: Tensor,
    masks: Tensor,
    labels: Tensor,
    target_masks: Tensor,
    points: Tensor,
    membership: Tensor,
    weights: dict[str, float],
) -> Tensor:
    """Cost (G, R, Q, I) for one video: class probability, point BCE and dice over each clip.

    logits (G, R, Q, K + 1), labels (I,); mask logits (T, R, Q, P) and target_masks (T, I, P) in
    0..1 at points (T, P, 2), (x, y) in 0..1; membership (G, T). weights: of the costs by name, 1 if
    not given.
    """
    cost_class = -logits.softmax(-1)[..., labels]  # (G, R, Q, I)

    # BCE(x, t) = softplus(x) - x t, the mean over points and the frames of the clip. All sums over
    # points are (T, R, Q, I), where those of predictions (I = 1) and targets (R = Q = 1) broadcast.
    bce = F.softplus(masks).sum(-1, keepdim=True)
    bce = bce - torch.einsum("trqp,tip->trqi", masks, target_masks)
    cost_mask = mean_per_clip(membership, bce) / masks.shape[-1]

    probability = masks.sigmoid()
    overlap = torch.einsum("trqp,tip->trqi", probability, target_masks)
    overlap = sum_per_clip(membership, overlap)
    area = probability.sum(-1, keepdim=True) + target_masks.sum(-1)[:, None, None]
    area = sum_per_clip(membership, area)
    cost_dice = dice(overlap, area)

    costs = {"class": cost_class, "mask": cost_mask, "dice": cost_dice}
    return sum(weights.get(name, 1.0) * cost for name, cost in costs.items())


def sum_per_clip(membership: Tensor, values: Tensor) -> Tensor:
    """Sum values (T, ...) over the frames of each clip: (G, ...)."""
    return torch.einsum("gt,t...->g...", membership, values)


def mean_per_clip(membership: Tensor, values: Tensor) -> Tensor:
    """Average values (T, ...) over the frames of each clip: (G, ...)."""
    lengths = membership.sum(1, keepdim=True)
    return sum_per_clip(membership / lengths, values)


def dice(overlap: Tensor, area: Tensor) -> Tensor:
    """Dice loss from the overlap of two masks and the sum of their areas."""
    return 1 - (2 * overlap + 1) / (area + 1)


class CostsToCPU:
    """Costs that are copied to the CPU while the GPU continues."""

    def __init__(self, costs: Tensor):
        self.copy = CopyToCPU(costs)

    def wait(self) -> np.ndarray:
        """The costs as an array.

        The criterion waits for the GPU only here, once for frames and once for clips. `train_step`
        waits once more, at its end; with fp16, the gradient scaler adds another wait.

        Costs that are not finite become high ones. If predictions are the reason, the losses will
        not be finite either, and training then stops with a message.
        """
        (costs,) = self.copy.wait()
        return np.where(np.isfinite(costs), costs, costs.dtype.type(FORBIDDEN_COST))


# Assignment


def assign(cost: np.ndarray) -> np.ndarray:
    """Hungarian assignment of costs (Q, I): the query of each instance (I,), -1 for none."""
    query_of = np.full(cost.shape[1], -1)
    queries, instances = linear_sum_assignment(cost)
    query_of[instances] = queries
    return query_of


def match_clip(
    cost: np.ndarray, new: np.ndarray, visible: np.ndarray, previous: np.ndarray
) -> np.ndarray:
    """The queries (I,) of one clip: new instances are assigned one, the others keep theirs.

    cost (Q, I); new, visible (I,) bool; previous (I,), the queries after the clip before. The query
    of a visible instance is not given away (unless there are more instances than queries). That of
    an occluded instance may be given to a new one, as upstream (grattvis_matcher.py:159); both then
    share it.
    """
    query_of = previous.copy()
    if not new.any():
        return query_of
    taken = previous[visible & ~new]
    cost = cost[:, new]
    cost[taken[taken >= 0]] = FORBIDDEN_COST
    query_of[new] = assign(cost)
    return query_of


def match(
    costs: np.ndarray, predictions: Predictions, targets: Targets, keep_identities: bool
) -> Matches:
    """Match by costs (G, R, B, Q, I), keeping identities over clips or each clip independently."""
    clips, layers, batch, _, instances = costs.shape
    visible = visible_in_clips(targets.visible_cpu, predictions.clip_length)  # (G, B, I)
    first_seen = visible & (visible.cumsum(0) == 1)
    new = first_seen if keep_identities else visible  # instances to assign a query to
    query_of = np.full((clips, layers, batch, instances), -1)
    none = np.full(instances, -1)
    for clip, layer, video in np.ndindex(clips, layers, batch):
        previous = query_of[clip - 1, layer, video] if keep_identities and clip else none
        query_of[clip, layer, video] = match_clip(
            costs[clip, layer, video], new[clip, video], visible[clip, video], previous
        )
    classes = target_classes(query_of, visible, targets.labels_cpu, predictions.logits.shape)
    return Matches(*to_device([query_of, visible, classes], targets.masks.device))


def target_classes(
    query_of: np.ndarray, visible: np.ndarray, labels: np.ndarray, logits_shape: torch.Size
) -> np.ndarray:
    """The class (G, R, B, Q) that each query has to predict: that of its visible instance, else K.

    If two instances share a query after an occlusion, the one with the higher index counts.
    """
    *shape, num_outputs = logits_shape  # (G, R, B, Q), K + 1
    classes = np.full(shape, num_outputs - 1)
    matched = (query_of >= 0) & visible[:, None]  # (G, R, B, I)
    for instance in range(labels.shape[1]):
        clip, layer, video = np.nonzero(matched[..., instance])
        query = query_of[clip, layer, video, instance]
        classes[clip, layer, video, query] = labels[video, instance]
    return classes


def visible_in_clips(visible: np.ndarray, clip_length: int) -> np.ndarray:
    """Visible in frames (B, T, I) -> visible in some frame of each clip (G, B, I)."""
    first_frames = range(0, visible.shape[1], clip_length)
    return np.stack([visible[:, first : first + clip_length].any(1) for first in first_frames])


# Between CPU and GPU


def to_device(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays as tensors on the device."""
    return [upload(torch.from_numpy(array), device) for array in arrays]
