"""The losses of a training step, over all frames and clips.

A matched query learns the class and the mask of its instance. Unmatched queries, and those of
instances that are invisible in the clip, learn "no object".

To add a loss, write a function (predictions, targets, matches) -> (total, count), both of shape
(G, R), or (G, L) for a clip loss of the last decoder layer alone. Give it a name and a weight in
the table of `Criterion.__init__`. The loss is weight * total / count, and what is minimised is the
plain sum over clips, layers and losses.

Counts are averaged over processes, and DDP averages the gradients, so the loss is the mean over the
instances of all processes. As upstream, this average count is clamped to at least 1. (In clips, an
instance counts once for each of the L detector layers.)

Paper: Mask2Former (2112.01527) section 3.3, GenVIS (2211.08834) section 3.3, VITA (2206.04403)
section 3.3 for the similarity loss. Upstream: mask2former/modeling/criterion.py,
grattvis/modeling/grattvis_criterion.py, vita/modeling/vita_criterion.py. Shape letters are declared
in model.py and matcher.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clips import Clip
from matcher import (
    CostsToCPU,
    Matches,
    Predictions,
    Targets,
    clip_predictions,
    dice,
    frame_predictions,
    match,
    matching_costs,
    mean_per_clip,
    pad_targets,
    sample_at,
    sample_features,
    sum_per_clip,
    uncertain_points,
)
from model import TrainingOutput
from transformer import full_precision, mask_logits

GATE_LOSSES = ("logits", "released")
SIMILARITY_SPANS = ("clip", "video")
MAX_ELEMENTS = 2**26  # of one tensor; more points or masks are processed in chunks


@dataclass(frozen=True)
class SampledMatches(Matches):
    """Matches, and what only the losses need of them."""

    point_logits: Tensor  # (T, R, B, I, P), masks of the matched queries at points
    point_targets: Tensor  # (T, R, B, I, P) in 0..1, their instances' masks there
    frames: Matches | None  # for clips: the matches of their frames


LossFunction = Callable[[Predictions, Targets, SampledMatches], tuple[Tensor, Tensor]]


@dataclass
class LossSum:
    """One loss, before it is divided by its count."""

    name: str  # with {layer}, which is _0, _1, ..., empty for the last; and {clip}, a number
    weight: float
    total: Tensor  # (clips, layers)
    count: Tensor  # (clips, layers)


class Criterion:
    """All losses of a training step, weighted, under the official names.

    Frame losses: loss_{ce,mask,dice} after the last decoder layer, ..._0 before the first (learned
    queries), ..._{i} after the i-th. Clip losses: loss_genvis_{ce,mask,dice,sim}_clip{c} after the
    last decoder layer, ..._{ce,mask,dice}_{d}_clip{c} after layer d, counted from 0; or
    loss_vita_... without a clip number where one clip is the whole video.
    """

    def __init__(
        self,
        num_classes: int,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        similarity_weight: float = 0.5,
        no_object_weight: float = 0.1,
        points: int = 12544,
        oversample: float = 3.0,
        importance: float = 0.75,
        gate_weight: float = 0.0,
        gate_loss: str = "logits",
        freeze_detector: bool = False,
        similarity_span: str = "clip",
    ):
        """points: P, at which masks are compared in matching and losses. The losses draw
            oversample * P candidates and keep the importance * P most uncertain of them.
        gate_weight: 0 leaves the gate loss out, as all official recipes do.
        gate_loss: "logits" or "released", see `gate_bce`.
        freeze_detector: match frames, which the similarity loss needs, without frame losses.
        similarity_span: the similarity loss compares the queries of each "clip", as upstream, or
            those of all clips of a "video".
        """
        if similarity_span not in SIMILARITY_SPANS:
            raise ValueError(
                f"unknown span {similarity_span!r}: choose one of {', '.join(SIMILARITY_SPANS)}"
            )
        if gate_loss not in GATE_LOSSES:
            raise ValueError(
                f"unknown gate loss {gate_loss!r}: choose one of {', '.join(GATE_LOSSES)}"
            )
        self.num_classes = num_classes
        self.no_object_weight = no_object_weight
        self.freeze_detector = freeze_detector
        self.similarity_span = similarity_span
        self.gate_field = "gate_soft" if gate_loss == "released" else "gate_logits"
        self.points = points
        self.candidates = int(points * oversample)
        self.uncertain = int(importance * points)
        self.matching_weights = {"class": class_weight, "mask": mask_weight, "dice": dice_weight}
        self.sample_features = sample_features  # Speed: an attribute, which fast/ replaces

        # name -> (function, weight)
        self.frame_losses: dict[str, tuple[LossFunction, float]] = {
            "ce": (self.class_loss, class_weight),
            "mask": (mask_loss, mask_weight),
            "dice": (dice_loss, dice_weight),
        }
        self.clip_losses = self.frame_losses | {
            "sim": (self.similarity_loss, similarity_weight),
        }
        if gate_weight:
            self.clip_losses["gate"] = (gate_bce, gate_weight)

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def __call__(
        self, output: TrainingOutput, videos: list[Clip], whole_video: bool = False
    ) -> tuple[dict[str, Tensor], tuple[Matches, Matches]]:
        """Losses {name: scalar}, and the matches of frames and clips behind them.

        videos: the ground truth. whole_video: only chooses the names of VITA, whose one clip is the
        whole video. Costs and losses are computed in float32 or better.
        """
        batch = len(videos)
        per_frame = len(output.frames.predictions)
        if self.freeze_detector:  # only those that the similarity loss needs are matched
            per_frame = len(output.frames.queries)
        targets = pad_targets(videos, output.padded_size, output.frames.features.device)
        frames = frame_predictions(output, batch, per_frame)
        clips = clip_predictions(output, batch, self.gate_field)

        # Speed: a GPU computes the costs of clips while frames are matched.
        frame_costs = CostsToCPU(self.matching_costs(frames, targets))
        clip_costs = CostsToCPU(self.matching_costs(clips, targets))
        frame_matches = match(frame_costs.wait(), frames, targets, keep_identities=False)
        clip_matches = match(clip_costs.wait(), clips, targets, keep_identities=True)

        sums = []
        if not self.freeze_detector:
            sampled = self.sample(frames, targets, frame_matches)
            sums += self.frame_sums(frames, targets, sampled)
        sampled = self.sample(clips, targets, clip_matches, frame_matches)
        sums += self.clip_sums(clips, targets, sampled, whole_video)

        counts = average_over_processes([loss.count for loss in sums])
        losses = {}
        for loss, count in zip(sums, counts):
            mean = loss.weight * loss.total / count.clamp(min=1)
            losses |= named(mean, loss.name)
        return losses, (frame_matches, clip_matches)

    def matching_costs(self, predictions: Predictions, targets: Targets) -> Tensor:
        """Costs (G, R, B, Q, I) with the weights of the losses."""
        return matching_costs(
            predictions, targets, self.points, self.matching_weights, self.sample_features
        )

    def sample(
        self,
        predictions: Predictions,
        targets: Targets,
        matches: Matches,
        frame_matches: Matches | None = None,
    ) -> SampledMatches:
        """Sample the masks at points, which mask and dice loss share."""
        point_logits, point_targets = sample_matched_masks(
            predictions, targets, matches, self.points, self.candidates, self.uncertain
        )
        return SampledMatches(
            **vars(matches),
            point_logits=point_logits,
            point_targets=point_targets,
            frames=frame_matches,
        )

    def frame_sums(
        self, predictions: Predictions, targets: Targets, matches: SampledMatches
    ) -> list[LossSum]:
        """The losses of all decoder layers; all frames of a batch share one mean."""
        sums = []
        for name, (function, weight) in self.frame_losses.items():
            total, count = function(predictions, targets, matches)  # (T, R)
            total, count = total.sum(0, keepdim=True), count.sum(0, keepdim=True)  # (1, R)
            sums.append(LossSum("loss_" + name + "{layer}", weight, total, count))
        return sums

    def clip_sums(
        self,
        predictions: Predictions,
        targets: Targets,
        matches: SampledMatches,
        whole_video: bool,
    ) -> list[LossSum]:
        """The losses of all clips and decoder layers; the L detector layers share one mean."""
        prefix, suffix = ("loss_vita_", "") if whole_video else ("loss_genvis_", "_clip{clip}")
        detector_layers = predictions.clip_embed.shape[1]
        sums = []
        for name, (function, weight) in self.clip_losses.items():
            if name == "gate" and predictions.gate_values is None:  # a mode without gates
                continue
            # (G, D * L), or (G, L) of the last decoder layer; similarity over a video: (1, L)
            total, count = function(predictions, targets, matches)
            total = total.unflatten(1, (-1, detector_layers)).sum(2)  # (G, D), (G, 1) or (1, 1)
            count = count.unflatten(1, (-1, detector_layers)).sum(2)
            sums.append(LossSum(prefix + name + "{layer}" + suffix, weight, total, count))
        return sums

    def class_loss(
        self, predictions: Predictions, targets: Targets, matches: SampledMatches
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of all queries; "no object" counts less, in the total and in the count.

        Upstream's mean is over the queries of a process, this one over those of all processes.
        """
        logits, target = predictions.logits, matches.classes  # (G, R, B, Q, K + 1), (G, R, B, Q)
        weight = logits.new_ones(self.num_classes + 1)
        weight[-1] = self.no_object_weight
        loss = F.cross_entropy(logits.flatten(0, 3), target.flatten(), weight, reduction="none")
        return loss.view(target.shape).sum((2, 3)), weight[target].sum((2, 3))

    def similarity_loss(
        self, predictions: Predictions, targets: Targets, matches: SampledMatches
    ) -> tuple[Tensor, Tensor]:
        """Do two embeddings belong to one instance? BCE over all pairs of matched queries.

        The queries are those of the frames of a clip and of the clip itself (last layer). Pairs are
        within a stream (one detector layer, one video). They are ordered, and each query is also
        paired with itself. Returns (G, L), or (1, L) with span "video".
        """
        embed, matched, clip, instance = stream_embeddings(predictions, matches)
        logits = embed @ embed.transpose(2, 3)  # (L, B, M, M)
        target = (instance[:, None] == instance).to(logits.dtype).expand_as(logits)
        compared = matched[..., None] & matched[:, :, None]  # (L, B, M, M)
        if self.similarity_span == "clip":
            compared = compared & (clip[:, None] == clip)
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * compared

        clips = torch.arange(len(predictions.logits), device=clip.device)
        in_clip = (clips[:, None] == clip).to(logits.dtype)  # (G, M)
        total = torch.einsum("gm,lbm->gl", in_clip, loss.sum(-1))
        count = torch.einsum("gm,lbm->gl", in_clip, compared.sum(-1).to(logits.dtype))
        if self.similarity_span == "video":  # one loss instead of G: weighted G times
            return len(clips) * total.sum(0, keepdim=True), count.sum(0, keepdim=True)
        return total, count


def stream_embeddings(predictions: Predictions, matches: SampledMatches) -> tuple[Tensor, ...]:
    """What the similarity loss compares: M = (T + G) * I embeddings in each stream.

    They are those of every instance in every frame and every clip: embed (L, B, M, C); matched
    (L, B, M) bool, False = no such query; and the clip (M,) and the instance (M,) of each.
    """
    frames = matches.frames
    last = slice(-predictions.clip_embed.shape[1], None)  # the L predictions of the last layer
    frame_embed = gather_queries(predictions.frame_embed, frames.query_of[:, last])
    clip_embed = gather_queries(predictions.clip_embed, matches.query_of[:, last])
    embed = torch.cat((frame_embed, clip_embed))  # (T + G, L, B, I, C)
    matched = torch.cat((frames.matched[:, last], matches.matched[:, last]))  # (T + G, L, B, I)
    clips = torch.arange(len(clip_embed), device=embed.device)
    instances = torch.arange(embed.shape[3], device=embed.device)
    clip, instance = torch.cartesian_prod(torch.cat((predictions.clip_of, clips)), instances).T
    embed = embed.permute(1, 2, 0, 3, 4).flatten(2, 3)
    return embed, matched.permute(1, 2, 0, 3).flatten(2), clip, instance


# Losses of masks and gates


def mask_loss(
    predictions: Predictions, targets: Targets, matches: SampledMatches
) -> tuple[Tensor, Tensor]:
    """BCE at points, the mean over the frames of a clip, summed over matched instances."""
    bce = F.binary_cross_entropy_with_logits(
        matches.point_logits, matches.point_targets, reduction="none"
    )
    bce = mean_per_clip(predictions.membership, bce.mean(-1))  # (G, R, B, I)
    return (bce * matches.matched).sum((2, 3)), count_visible(predictions, matches)


def dice_loss(
    predictions: Predictions, targets: Targets, matches: SampledMatches
) -> tuple[Tensor, Tensor]:
    """Dice loss at the points of all frames of a clip together, summed over matched instances."""
    probability = matches.point_logits.sigmoid()
    truth = matches.point_targets
    overlap = torch.einsum("trbip,trbip->trbi", probability, truth)
    area = probability.sum(-1) + truth.sum(-1)
    overlap = sum_per_clip(predictions.membership, overlap)
    area = sum_per_clip(predictions.membership, area)
    loss = dice(overlap, area)  # (G, R, B, I)
    return (loss * matches.matched).sum((2, 3)), count_visible(predictions, matches)


def count_visible(predictions: Predictions, matches: Matches) -> Tensor:
    """(G, R): the instances that are visible in each clip, as upstream with or without a query."""
    clips, layers = predictions.logits.shape[:2]
    count = matches.visible.sum((1, 2)).to(predictions.logits.dtype)
    return count[:, None].expand(clips, layers)


def gate_bce(
    predictions: Predictions, targets: Targets, matches: SampledMatches
) -> tuple[Tensor, Tensor]:
    """BCE of the gates: open (1) for queries that show an instance in the clip, else closed (0).

    Not in the paper; the released code has it with weight 0 (grattvis_criterion.py:301).
    "logits": BCE of sigmoid(gate logit). "released": as there, BCE of sigmoid(soft gate), a second
    sigmoid; that lies in 0.5..0.73, so the loss has a floor above 0.
    """
    no_object = predictions.logits.shape[-1] - 1
    detector_layers = predictions.clip_embed.shape[1]
    target = (matches.classes != no_object).to(predictions.gate_values.dtype)
    target = target.unflatten(1, (-1, 1, detector_layers))  # (G, D, 1, L, B, Q)
    # (G, D, gates of a decoder layer, L, B, Q): one gate, unless changed as in docs/extending.md.
    values = predictions.gate_values.unflatten(1, (target.shape[1], -1, detector_layers))
    loss = F.binary_cross_entropy_with_logits(values, target.expand_as(values), reduction="none")
    total = loss.sum((2, 4, 5)).flatten(1)  # (G, D * L)
    return total, torch.full_like(total, loss.numel() // total.numel())


# Masks at points


def sample_matched_masks(
    predictions: Predictions,
    targets: Targets,
    matches: Matches,
    count: int,
    candidates: int,
    uncertain: int,
) -> tuple[Tensor, Tensor]:
    """Logits of the masks of matched queries and their instances' masks at points, in every frame.

    Both are (T, R, B, I, P). Every mask has its own points, see `uncertain_points`. Only the logits
    have a gradient.
    """
    batch, length, instances, *_ = targets.masks.shape
    # About 6 numbers per candidate.
    layers_at_once = items_at_once(6 * candidates * batch * length * instances)
    point_logits, point_targets = [], []
    for some_layers in matched_masks(predictions, matches):
        for masks in some_layers.split(layers_at_once, 2):
            shape = masks.shape[:4]  # (B, T, some of R, I)
            masks = masks.flatten(0, 3)[:, None]  # (B * T * R * I, 1, h, w)
            with torch.no_grad():
                points = uncertain_points(masks, count, candidates, uncertain)
                points_of_masks = points.view(*shape, count, 2)
                point_targets.append(sample_targets(targets, points_of_masks, masks.dtype))
            point_logits.append(sample_at(masks, points).view(*shape, count))
    return (
        torch.cat(point_logits, 2).permute(1, 2, 0, 3, 4),
        torch.cat(point_targets, 2).permute(1, 2, 0, 3, 4),
    )


def matched_masks(predictions: Predictions, matches: Matches) -> Iterator[Tensor]:
    """Mask logits (B, T, some of R, I, h, w) of the matched queries; all at once are too large."""
    features = predictions.features
    kernels = gather_queries(predictions.mask_kernel, matches.query_of)
    kernels = kernels[predictions.clip_of].permute(2, 0, 1, 3, 4)  # (B, T, R, I, C + 1)
    batch, length, _, height, width = features.shape
    layers_at_once = items_at_once(batch * length * kernels.shape[3] * height * width)
    videos_at_once = items_at_once(features[0].numel())
    for some_kernels in kernels.split(layers_at_once, 2):
        # Speed: several videos at once. Memory: features in float32 are large, so they are
        # computed again in backward instead of being kept.
        masks = [
            checkpoint(masks_of_videos, *pair, use_reentrant=False, preserve_rng_state=False)
            for pair in zip(some_kernels.split(videos_at_once), features.split(videos_at_once))
        ]
        yield torch.cat(masks)


def masks_of_videos(kernel: Tensor, features: Tensor) -> Tensor:
    """Mask logits (B, T, R, I, h, w) of kernels (B, T, R, I, C + 1), features (B, T, C, h, w)."""
    batch, length, layers, instances, _ = kernel.shape
    features = full_precision(features).flatten(0, 1)
    masks = mask_logits(kernel.flatten(2, 3).flatten(0, 1), features)
    return masks.view(batch, length, layers, instances, *masks.shape[-2:])


def sample_targets(targets: Targets, points: Tensor, dtype: torch.dtype) -> Tensor:
    """Values (B, T, R, I, P) in 0..1 of the instances' masks at points (B, T, R, I, P, 2)."""
    batch, length, layers, instances, count, _ = points.shape
    masks = targets.masks.flatten(0, 2)[:, None]  # (B * T * I, 1, H, W)
    # Targets do not depend on R: all R sets of points are sampled from one mask.
    points = points.transpose(2, 3).reshape(len(masks), layers * count, 2)
    masks_at_once = items_at_once(masks[0].numel())  # as floats, all are too large
    chunks = zip(masks.split(masks_at_once), points.split(masks_at_once))
    sampled = torch.cat([sample_at(some.to(dtype), at)[:, 0] for some, at in chunks])
    return sampled.view(batch, length, instances, layers, count).transpose(2, 3)


def gather_queries(values: Tensor, query_of: Tensor) -> Tensor:
    """(G, R, B, Q, C), (G, R, B, I) -> (G, R, B, I, C): of each instance's query.

    Where an instance has none (-1) it is some query, to be masked by `Matches.matched`.
    """
    index = query_of.clamp(min=0)[..., None].expand(*query_of.shape, values.shape[-1])
    return values.gather(3, index)


def items_at_once(elements: int) -> int:
    """The size of a chunk of items with this many elements each: at most MAX_ELEMENTS in all."""
    return max(1, MAX_ELEMENTS // max(1, elements))


# Means and names


def average_over_processes(counts: list[Tensor]) -> list[Tensor]:
    """Means of counts over all processes, in one exchange, which all of them take part in."""
    mean = torch.cat([count.flatten() for count in counts])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(mean)
        mean = mean / torch.distributed.get_world_size()
    sizes = [count.numel() for count in counts]
    return [values.view(count.shape) for values, count in zip(mean.split(sizes), counts)]


def named(values: Tensor, name: str) -> dict[str, Tensor]:
    """Split losses (clips, layers) into {name: scalar}; see `LossSum.name`."""
    clips, layers = values.shape
    numbers = [*(f"_{layer}" for layer in range(layers - 1)), ""]
    names = [name.format(layer=layer, clip=clip) for clip in range(clips) for layer in numbers]
    return dict(zip(names, values.flatten().unbind()))
