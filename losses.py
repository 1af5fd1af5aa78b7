"""The losses of a training step: what the matched queries have to learn, in all frames and clips.

A matched query learns the class and the mask of its instance. Every other query, and that of an
instance while it is invisible, learns "no object".

To add a loss, write a function (predictions, targets, matches) -> (total, count), both of shape
(G, R), and give it a name and a weight in the table of `Criterion.__init__`. What is minimised is
total / count, where counts are averaged over processes first, so that a loss is the mean over the
instances of all processes.

Paper: Mask2Former (2112.01527) section 3.3, GenVIS (2211.08834) section 3.3, VITA (2206.04403)
section 3.3 for the similarity loss. Upstream: mask2former/modeling/criterion.py,
grattvis/modeling/grattvis_criterion.py, vita/modeling/vita_criterion.py. Shape letters are declared
in model.py and matcher.py.
"""
from collections.abc import Callable

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clips import Clip
from matcher import (
    Matches,
    Predictions,
    Targets,
    clip_predictions,
    costs_to_cpu,
    frame_predictions,
    full_precision,
    match,
    matching_costs,
    pad_targets,
    sample_at,
    uncertain_points,
)
from model import TrainingOutput
from transformer import mask_logits

LossFunction = Callable[[Predictions, Targets, Matches], tuple[Tensor, Tensor]]

GATE_LOSSES = ("logits", "released")
SIMILARITY_SPANS = ("clip", "video")
MAX_ELEMENTS = 2 ** 26  # of one tensor; more points or masks are processed in chunks


class Criterion:
    """All losses of a training step, weighted, under the official names.

    Frame losses: loss_{ce,mask,dice} for the last decoder layer, ..._{0..8} for the others. Clip
    losses: loss_genvis_{ce,mask,dice,sim}_clip{c} and ..._{ce,mask,dice}_{d}_clip{c}, or
    loss_vita_... without a clip number where one clip is the whole video.
    """

    def __init__(self, num_classes: int, class_weight: float = 2.0, mask_weight: float = 5.0,
                 dice_weight: float = 5.0, similarity_weight: float = 0.5,
                 no_object_weight: float = 0.1, points: int = 12544, oversample: float = 3.0,
                 importance: float = 0.75, gate_weight: float = 0.0, gate_loss: str = "logits",
                 freeze_detector: bool = False, similarity_span: str = "clip"):
        """points: P, at which masks are compared in matching and losses. The losses draw
            oversample * P candidates and keep the importance * P most uncertain of them.
        gate_weight: 0 leaves the gate loss out, as all official recipes do.
        gate_loss: "logits" or "released", see `gate_bce`.
        freeze_detector: match frames, which the similarity loss needs, without frame losses.
        similarity_span: the similarity loss compares the queries of each "clip", as upstream, or
            those of all clips of a "video".
        """
        if similarity_span not in SIMILARITY_SPANS:
            raise ValueError(f"unknown span {similarity_span!r}: choose one of "
                             f"{', '.join(SIMILARITY_SPANS)}")
        if gate_loss not in GATE_LOSSES:
            raise ValueError(f"unknown gate loss {gate_loss!r}: choose one of "
                             f"{', '.join(GATE_LOSSES)}")
        self.num_classes, self.no_object_weight = num_classes, no_object_weight
        self.freeze_detector, self.similarity_span = freeze_detector, similarity_span
        self.gates = "gate_soft" if gate_loss == "released" else "gate_logits"
        self.points, self.candidates = points, int(points * oversample)
        self.uncertain = int(importance * points)
        self.matching_weights = {"class": class_weight, "mask": mask_weight, "dice": dice_weight}

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
    def __call__(self, output: TrainingOutput, clips: list[Clip], whole_video: bool = False
                 ) -> tuple[dict[str, Tensor], tuple[Matches, Matches]]:
        """Losses {name: scalar}, and the matches of frames and clips behind them.

        clips: the ground truth of the B videos. whole_video: the output is one clip, as with "clip"
        propagation. Costs and losses are computed in float32 or better.
        """
        batch, levels = len(clips), len(output.frames.queries)
        layers = levels if self.freeze_detector else len(output.frames.predictions)
        targets = pad_targets(clips, output.padded_size, output.frames.features.device)
        frames = frame_predictions(output, batch, layers)
        tracks = clip_predictions(output, batch, self.gates)

        costs = [matching_costs(predictions, targets, self.points, self.matching_weights)
                 for predictions in (frames, tracks)]
        frame_costs, track_costs = costs_to_cpu(costs)
        frame_matches = match(frame_costs, frames, targets, keep_identities=False)
        track_matches = match(track_costs, tracks, targets, keep_identities=True)
        track_matches.frame_query_of = frame_matches.query_of[:, -levels:]

        prefix, suffix = ("loss_vita", "") if whole_video else ("loss_genvis", "_clip{}")
        computed = []                                        # (name, suffix, weight, total, count)
        if not self.freeze_detector:                         # all frames of a batch share one mean
            for name, weight, *sums in self.sums(self.frame_losses, frames, targets,
                                                 frame_matches):
                sums = [value.sum(0, keepdim=True) for value in sums]          # (1, R)
                computed.append((f"loss_{name}", "", weight, *sums))
        clip_losses = dict(self.clip_losses)
        if tracks.gates is None:                             # a mode without gates
            clip_losses.pop("gate", None)
        for name, weight, *sums in self.sums(clip_losses, tracks, targets, track_matches):
            # the D * L predictions are D-major; the levels of the detector share one mean
            sums = [value.unflatten(1, (-1, levels)).sum(2) for value in sums]  # (G, D)
            computed.append((f"{prefix}_{name}", suffix, weight, *sums))

        counts = average_over_processes([count for *_, count in computed])
        losses = {}
        for (name, suffix, weight, total, _), count in zip(computed, counts):
            # without any instance a loss is 0, not 0 / 0
            losses |= named(weight * total / count.clamp(min=1), name, suffix)
        return losses, (frame_matches, track_matches)

    def sums(self, table: dict, predictions: Predictions, targets: Targets, matches: Matches
             ) -> list[tuple[str, float, Tensor, Tensor]]:
        """(name, weight, total, count) of all losses of a table, with total and count (G, R).

        Mask and dice loss share their points.
        """
        matches.point_logits, matches.point_targets = sample_matched_masks(
            predictions, targets, matches, self.points, self.candidates, self.uncertain)
        return [(name, weight, *function(predictions, targets, matches))
                for name, (function, weight) in table.items()]

    def class_loss(self, predictions: Predictions, targets: Targets, matches: Matches
                   ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of all queries; "no object" counts less, in the total and in the count.

        Upstream's mean is over the queries of a process, this one over those of all processes.
        """
        weight = predictions.logits.new_ones(self.num_classes + 1)
        weight[-1:].fill_(self.no_object_weight)             # assigning an item would synchronize
        loss = F.cross_entropy(predictions.logits.flatten(0, 3), matches.classes.flatten(),
                               weight, reduction="none")
        loss = loss.view(matches.classes.shape)              # (G, R, B, Q)
        return loss.sum((2, 3)), weight[matches.classes].sum((2, 3))

    def similarity_loss(self, predictions: Predictions, targets: Targets, matches: Matches
                        ) -> tuple[Tensor, Tensor]:
        """Do two embeddings belong to one instance? BCE over all pairs of matched queries.

        The embeddings are those of the matched frame queries of a clip and of its matched clip
        queries (last layer). Pairs are within a stream (one level of the detector, one video).
        """
        levels = predictions.clip_embed.shape[1]
        query_of = matches.query_of[:, -levels:]
        embed = torch.cat((gather_queries(predictions.frame_embed, matches.frame_query_of),
                           gather_queries(predictions.clip_embed, query_of)))
        valid = torch.cat((matches.frame_query_of >= 0, matches.matched[:, -levels:]))
        # members of a stream: the I queries of each of T frames and G clips
        times, instances = len(embed), embed.shape[3]
        embed = embed.permute(1, 2, 0, 3, 4).flatten(2, 3)   # (L, B, (T + G) * I, C)
        valid = valid.permute(1, 2, 0, 3).flatten(2)         # (L, B, (T + G) * I)

        device = embed.device
        instance = torch.arange(instances, device=device).repeat(times)        # of each member
        clips = torch.arange(len(predictions.logits), device=device)
        clip = torch.cat((predictions.clip_of, clips))[:, None].expand(-1, instances).flatten()
        same_instance = instance[:, None] == instance
        compared = valid[..., None] & valid[:, :, None]
        if self.similarity_span == "clip":
            compared = compared & (clip[:, None] == clip)

        logits = embed @ embed.transpose(2, 3)
        target = same_instance.to(logits.dtype).expand_as(logits)
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * compared
        in_clip = (clips[:, None] == clip).to(logits.dtype)  # (G, members)
        total = torch.einsum("gm,lbm->gl", in_clip, loss.sum(-1))
        count = torch.einsum("gm,lbm->gl", in_clip, compared.sum(-1).to(logits.dtype))
        if self.similarity_span == "video":                  # as large as that of all clips
            return len(clips) * total.sum(0, keepdim=True), count.sum(0, keepdim=True)
        return total, count


# Losses of masks and gates

def mask_loss(predictions: Predictions, targets: Targets, matches: Matches
              ) -> tuple[Tensor, Tensor]:
    """BCE at points, the mean over the frames of a clip, summed over matched instances."""
    bce = F.binary_cross_entropy_with_logits(matches.point_logits, matches.point_targets,
                                             reduction="none").mean(-1)        # (B, T, R, I)
    frame_in_clip = predictions.frame_in_clip
    mean_over_frames = frame_in_clip / frame_in_clip.sum(1, keepdim=True)
    bce = torch.einsum("gt,btri->grbi", mean_over_frames, bce)
    return (bce * matches.matched).sum((2, 3)), count_visible(predictions, matches)


def dice_loss(predictions: Predictions, targets: Targets, matches: Matches
              ) -> tuple[Tensor, Tensor]:
    """1 - (2 overlap + 1) / (area + 1) at the points of all frames of a clip together."""
    probability, truth = matches.point_logits.sigmoid(), matches.point_targets
    overlap = torch.einsum("btrip,btrip->btri", probability, truth)
    area = probability.sum(-1) + truth.sum(-1)
    overlap = torch.einsum("gt,btri->grbi", predictions.frame_in_clip, overlap)
    area = torch.einsum("gt,btri->grbi", predictions.frame_in_clip, area)
    dice = 1 - (2 * overlap + 1) / (area + 1)
    return (dice * matches.matched).sum((2, 3)), count_visible(predictions, matches)


def count_visible(predictions: Predictions, matches: Matches) -> Tensor:
    """(G, R): the instances that are visible in each clip, as upstream with or without a query."""
    clips, layers = predictions.logits.shape[:2]
    count = matches.visible.sum((1, 2)).to(predictions.logits.dtype)
    return count[:, None].expand(clips, layers)


def gate_bce(predictions: Predictions, targets: Targets, matches: Matches
             ) -> tuple[Tensor, Tensor]:
    """BCE of the gates: open (1) for queries that show an instance in the clip, else closed (0).

    Not in the paper. The released code has it with weight 0 and applies a second sigmoid to the
    already sigmoided soft gate (grattvis_criterion.py:301), so that it cannot reach 0: "released"
    (predictions.gates are soft gates). "logits" is the same loss on the gate's logits.
    """
    no_object = predictions.logits.shape[-1] - 1
    target = (matches.classes != no_object).to(predictions.gates.dtype)
    loss = F.binary_cross_entropy_with_logits(predictions.gates, target, reduction="none")
    total = loss.sum((2, 3))
    return total, torch.full_like(total, loss[0, 0].numel())


# Masks at points

def sample_matched_masks(predictions: Predictions, targets: Targets, matches: Matches, points: int,
                         candidates: int, uncertain: int) -> tuple[Tensor, Tensor]:
    """Logits of the masks of matched queries and their instances' masks at points, in every frame.

    Both are (B, T, R, I, P): point_logits and point_targets of Matches. Every mask has points of
    its own, see `uncertain_points`. Only the logits have a gradient.
    """
    kernel = gather_queries(predictions.mask_kernel, matches.query_of)[predictions.clip_of]
    batch, length, instances, *_ = targets.masks.shape
    height, width = predictions.features.shape[-2:]
    truth = targets.masks.flatten(0, 2)[:, None]             # (B * T * I, 1, H, W)
    point_logits, point_targets = [], []
    # some of the R predictions at once: masks are large, candidates are larger
    for kernel in kernel.split(chunk_size(len(truth) * height * width), 1):
        masks = torch.stack([
            checkpoint(masks_of_video, kernel[:, :, video], predictions.features[video],
                       use_reentrant=False, preserve_rng_state=False)
            for video in range(batch)])                      # (B, T, R, I, h, w)
        for masks in masks.split(chunk_size(len(truth) * 6 * candidates), 2):
            rows = masks.shape[:4]
            masks = masks.flatten(0, 3)[:, None]             # (B * T * R * I, 1, h, w)
            with torch.no_grad():
                at = uncertain_points(masks, points, candidates, uncertain)
                shared = at.view(*rows, points, 2).transpose(2, 3)
                shared = shared.reshape(len(truth), rows[2] * points, 2)
                sampled = sample_masks(truth, shared, masks.dtype)
                sampled = sampled.view(batch, length, instances, rows[2], points).transpose(2, 3)
            point_targets.append(sampled)
            point_logits.append(sample_at(masks, at).view(*rows, points))
    return torch.cat(point_logits, 2), torch.cat(point_targets, 2)


def masks_of_video(kernel: Tensor, features: Tensor) -> Tensor:
    """Mask logits (T, R, I, h, w) of kernels (T, R, I, C + 1) on features (T, C, h, w).

    Called under activation checkpointing: features in float32 are large, so they are computed
    again in backward instead of being kept.
    """
    masks = mask_logits(kernel.flatten(1, 2), full_precision(features))
    return masks.unflatten(1, kernel.shape[1:3])


def sample_masks(masks: Tensor, points: Tensor, dtype: torch.dtype) -> Tensor:
    """Values (N, P) in 0..1 of bool masks (N, 1, H, W) at points (N, P, 2)."""
    size = chunk_size(masks[:1].numel())                     # as numbers, masks are large
    chunks = zip(masks.split(size), points.split(size))
    return torch.cat([sample_at(mask.to(dtype), at)[:, 0] for mask, at in chunks])


def gather_queries(values: Tensor, query_of: Tensor) -> Tensor:
    """(G, R, B, Q, C), (G, R, B, I) -> (G, R, B, I, C): of each instance's query.

    Where an instance has none (-1) it is some query, to be masked by `Matches.matched`.
    """
    index = query_of.clamp(min=0)[..., None].expand(*query_of.shape, values.shape[-1])
    return values.gather(3, index)


def chunk_size(elements: int) -> int:
    """How many items of so many elements are processed at once."""
    return max(1, MAX_ELEMENTS // max(1, elements))


# Means and names

def average_over_processes(counts: list[Tensor]) -> list[Tensor]:
    """Means of counts over all processes, in one exchange, which all of them take part in.

    Gradients are averaged over processes too, so total / mean count is the quotient of the sums.
    """
    mean = torch.cat([count.flatten() for count in counts])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(mean)
        mean = mean / torch.distributed.get_world_size()
    sizes = [count.numel() for count in counts]
    return [values.view(count.shape) for values, count in zip(mean.split(sizes), counts)]


def named(values: Tensor, name: str, suffix: str) -> dict[str, Tensor]:
    """Scalars {name} of losses (clips, layers).

    Layers are numbered, except the last; {} in the suffix takes the number of the clip.
    """
    clips, layers = values.shape
    numbers = [*(f"_{layer}" for layer in range(layers - 1)), ""]
    names = [f"{name}{number}{suffix.format(clip)}" for clip in range(clips) for number in numbers]
    return dict(zip(names, values.flatten().unbind()))
