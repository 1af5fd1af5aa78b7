"""Matching and losses: which query answers for which instance, and what it then has to learn.

Frames are matched one by one (Mask2Former). Clips are matched with identities kept (GenVIS): an instance is matched in the
clip in which it first appears and keeps that query to the end of the video; while it is invisible, its query learns
"no object". A video read as one clip (VITA) is the same with one clip in which every instance is new.

Paper: Mask2Former (2112.01527) section 3.3 for point sampling, GenVIS (2211.08834) for identities over clips. Upstream:
mask2former/modeling/{matcher,criterion}.py, grattvis/modeling/grattvis_{matcher,criterion}.py and
vita/modeling/vita_{matcher,criterion}.py. Shape letters are declared in model.py; here also I instances of a video,
P points. A match is written as `query_of` (I,): the query of each instance, -1 for none.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from clips import Clip
from model import TrainingOutput
from tracker import ClipPrediction

EXCLUDED = 1e6  # cost of giving a new instance a query that a visible instance holds
GATE_LOSSES = ("logits", "released")


@dataclass
class Targets:
    """Ground truth of one video, padded as the images are. The small tensors stay on the CPU, where matches are kept too."""
    labels: Tensor  # (I,) int64
    ids: Tensor     # (I, T) int64, -1 where the instance is not visible
    masks: Tensor   # (I, T, H, W) bool, on the model's device

    @property
    def visible(self) -> Tensor:
        """(I, T) bool."""
        return self.ids != -1


@dataclass
class Matches:
    """Every match of a step, for tests and for the curious."""
    frames: list[list[Tensor]]        # [supervised frame decoder layer][frame] -> (visible instances of the frame,)
    clips: list[list[list[Tensor]]]   # [clip][tracker layer][stream l * B + b] -> (I,), -1 = not seen so far


def pad_targets(clip: Clip, size: tuple[int, int], device: torch.device) -> Targets:
    """Pad masks right and bottom to `size`; a frame with an empty mask does not show the instance; drop the never seen."""
    ids = torch.where(clip.masks.flatten(2).any(-1), clip.ids, -1)
    seen = (ids != -1).any(1)
    masks = clip.masks[seen].to(device)
    masks = F.pad(masks, (0, size[1] - masks.shape[-1], 0, size[0] - masks.shape[-2]))
    return Targets(clip.labels[seen], ids[seen], masks)


def random_points(rows: int, count: int, like: Tensor) -> Tensor:
    """Uniform points (rows, count, 2) in 0..1; the one source of randomness in matching and losses."""
    return torch.rand(rows, count, 2, device=like.device, dtype=like.dtype)


def sample_at(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps (N, C, H, W) at points (N, P, 2), (x, y) in 0..1 over the whole map: (N, C, P)."""
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False).squeeze(3)


def match_cost(logits: Tensor, masks: Tensor, labels: Tensor, target_masks: Tensor, weights: dict) -> Tensor:
    """Cost (..., Q, I) of every query for every instance: class probability, point BCE and dice.

    logits (..., Q, K + 1); masks (..., Q, P) logits and target_masks (..., I, P) 0..1 at the same points; labels (..., I).
    """
    probability = logits.softmax(-1)
    cost_class = -probability.gather(-1, labels[..., None, :].expand(*probability.shape[:-1], -1))
    truth, inside = target_masks.transpose(-1, -2), masks.sigmoid()
    cost_mask = (F.softplus(masks).sum(-1, keepdim=True) - masks @ truth) / masks.shape[-1]   # BCE = softplus(x) - x t
    cost_dice = 1 - (2 * inside @ truth + 1) / (inside.sum(-1, keepdim=True) + truth.sum(-2, keepdim=True) + 1)
    return weights["class"] * cost_class + weights["mask"] * cost_mask + weights["dice"] * cost_dice


def assign(cost: np.ndarray) -> Tensor:
    """Hungarian assignment of (Q, I) costs -> query_of (I,); FloatingPointError if a cost is not finite."""
    if not np.isfinite(cost).all():
        raise FloatingPointError("a matching cost is not finite: the logits have overflowed; lower the learning rate, "
                                 "or train in bf16 or fp32 instead of fp16")
    query_of = torch.full((cost.shape[1],), -1)
    queries, instances = linear_sum_assignment(cost)
    query_of[torch.from_numpy(instances)] = torch.from_numpy(queries)
    return query_of


class Criterion:
    """All losses of a training step, by the official names, weighted.

    Frame losses loss_{ce,mask,dice} (last layer) and ..._{0..8}; clip losses loss_genvis_{ce,mask,dice,sim}_clip{c} and
    ..._{ce,mask,dice}_{d}_clip{c}, or loss_vita_... without a clip number where one clip is the whole video.
    """

    def __init__(self, num_classes: int, class_weight: float = 2.0, mask_weight: float = 5.0, dice_weight: float = 5.0,
                 similarity_weight: float = 0.5, no_object_weight: float = 0.1, points: int = 12544,
                 oversample: float = 3.0, importance: float = 0.75, gate_weight: float = 0.0, gate_loss: str = "logits",
                 freeze_detector: bool = False):
        """points: P of every mask in matching and loss; oversample * P candidates, of which `importance` * P are kept as the
        most uncertain. gate_weight 0 leaves the gate loss out, as all official recipes do; "logits" trains the gate to open
        where its query is matched and visible, "released" is the official one, which squashes twice (see gate_loss).
        freeze_detector: frame matches without frame losses; the similarity loss needs the matches."""
        if gate_loss not in GATE_LOSSES:
            raise ValueError(f"unknown gate loss {gate_loss!r}: choose one of {', '.join(GATE_LOSSES)}")
        self.num_classes, self.no_object_weight, self.freeze_detector = num_classes, no_object_weight, freeze_detector
        self.weights = {"class": class_weight, "mask": mask_weight, "dice": dice_weight}
        self.loss_weights = {"ce": class_weight, "mask": mask_weight, "dice": dice_weight, "sim": similarity_weight,
                             "gate": gate_weight}
        self.points, self.candidates = points, int(points * oversample)
        self.uncertain, self.gate_kind = int(importance * points), gate_loss

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def __call__(self, output: TrainingOutput, clips: list[Clip], whole_video: bool = False
                 ) -> tuple[dict[str, Tensor], Matches]:
        """Losses {name: scalar} and the matches behind them. clips: the B ground truths; whole_video: the output is one clip
        of "clip" propagation. Costs and losses are computed in at least float32."""
        device = output.mask_features[0].device
        targets = [pad_targets(clip, output.padded_size, device) for clip in clips]
        losses, frame_matches = self.frame_losses(output, targets)
        matches, first, query_of = Matches(frame_matches, []), 0, None
        for index, (prediction, features) in enumerate(zip(output.clips, output.mask_features)):
            frames = slice(first, first + features.shape[1])
            clip_losses, query_of = self.clip_losses(prediction, full_precision(features), targets, frames, query_of,
                                                     frame_matches)
            prefix, suffix = ("loss_vita", "") if whole_video else ("loss_genvis", f"_clip{index}")
            losses |= {f"{prefix}_{name}{suffix}": loss for name, loss in clip_losses.items()}
            matches.clips.append(query_of)
            first = frames.stop
        return losses, matches

    # Frames: one matching a frame and layer

    def frame_losses(self, output: TrainingOutput, targets: list[Targets]) -> tuple[dict[str, Tensor], list[list[Tensor]]]:
        """Losses of all frame decoder predictions, and the matches of the last L of them: [layer][frame] -> query_of."""
        predictions, layers = output.frames.predictions, len(output.frames.queries)
        first = len(predictions) - layers if self.freeze_detector else 0
        visible = [shown for video in targets for shown in video.visible.T]                      # [frame] -> (I,)
        labels = torch.cat([video.labels[shown] for video in targets for shown in video.visible.T])
        frames = torch.cat([torch.full((int(shown.sum()),), n) for n, shown in enumerate(visible)])
        true = torch.cat([video.masks[shown, t] for video in targets for t, shown in enumerate(video.visible.T)])
        count = average_over_processes(len(labels), true)
        with torch.no_grad():
            like = full_precision(predictions[0][1][:1, :1])
            points = random_points(len(visible), self.points, like)
            point_targets = [sample_at(video.masks.transpose(0, 1).to(like.dtype), own)          # (T, I, P)
                             for video, own in zip(targets, points.chunk(len(targets)))]
            point_targets = nn.utils.rnn.pad_sequence([t.transpose(0, 1) for t in point_targets], True)  # (B, I, T, P)
            point_targets = point_targets.transpose(1, 2).flatten(0, 1)                          # (N, I, P)
        losses, matches = {}, []
        for layer, (logits, embed) in list(enumerate(predictions))[first:]:
            logits = full_precision(logits)
            masks = torch.einsum("nfc,nchw->nfhw", full_precision(embed), full_precision(output.frames.features))
            with torch.no_grad():
                cost = match_cost(logits, sample_at(masks, points), pad_labels(targets, len(visible), logits),
                                  point_targets, self.weights).cpu().numpy()
            matches.append([assign(c[:, :len(shown)][:, shown.numpy()]) for c, shown in zip(cost, visible)])
            if self.freeze_detector:
                continue
            queries = torch.cat(matches[-1])
            kept = queries >= 0
            index = frames[kept], queries[kept]
            suffix = "" if layer == len(predictions) - 1 else f"_{layer}"
            parts = {"ce": self.class_loss(logits, index, labels[kept])} | self.mask_losses(
                masks[index][:, None], true[kept.to(true.device)][:, None], count)
            losses |= {f"loss_{name}{suffix}": self.loss_weights[name] * part for name, part in parts.items()}
        return losses, matches[-layers:]

    # Clips: identities kept

    def clip_losses(self, prediction: ClipPrediction, features: Tensor, targets: list[Targets], frames: slice,
                    previous: list[list[Tensor]] | None, frame_matches: list[list[Tensor]]
                    ) -> tuple[dict[str, Tensor], list[list[Tensor]]]:
        """Losses of one clip, `frames` of every video; previous and returned: [layer][stream] -> query_of (I,).

        Matched instances are listed video by video, within a video stream by stream.
        """
        depth, (streams, batch) = len(prediction.logits), prediction.logits[0].shape[:2]         # D, L, B
        valid = [video.visible[:, frames].any(1) for video in targets]                           # visible in this clip
        new = [now & ~video.visible[:, :frames.start].any(1) for now, video in zip(valid, targets)]
        count = average_over_processes(streams * sum(int(now.sum()) for now in valid), features)
        labels = torch.cat([video.labels[now].repeat(streams) for video, now in zip(targets, valid)])
        true = torch.cat([video.masks[now, frames].repeat(streams, 1, 1, 1) for video, now in zip(targets, valid)])
        costs = self.clip_costs(prediction, features, targets, frames)
        last, losses, matches = depth - 1, {}, []
        for layer in range(depth):
            logits = full_precision(prediction.logits[layer].flatten(0, 1))                      # (S, Q, K + 1)
            embed = full_precision(prediction.mask_embed[layer].flatten(0, 1))                   # (S, Q, C)
            query_of = [self.match_clip(costs[layer, stream], new[stream % batch], valid[stream % batch],
                                        previous[layer][stream] if previous else None) for stream in range(len(logits))]
            matches.append(query_of)
            chosen = [[query_of[level * batch + b][valid[b]] for level in range(streams)] for b in range(batch)]
            queries = torch.cat([q for video in chosen for q in video])
            stream = torch.cat([torch.full_like(q, level * batch + b)
                                for b, video in enumerate(chosen) for level, q in enumerate(video)])
            kept = queries >= 0
            index = stream[kept], queries[kept]
            own = torch.cat([torch.einsum("ic,tchw->ithw", e, f) for e, f in zip(
                embed[index].split([int((stream[kept] % batch == b).sum()) for b in range(batch)]), features)])
            parts = {"ce": self.class_loss(logits, index, labels[kept])}
            parts |= self.mask_losses(own, true[kept.to(true.device)], count)
            if layer == last:  # at weight 0 too: a parameter without a gradient would stall the other processes
                parts["sim"] = self.similarity_loss(prediction, targets, frames, frame_matches, index, query_of)
            if prediction.gate_soft and self.loss_weights["gate"]:
                parts["gate"] = self.gate_loss(prediction, layer, index)
            suffix = "" if layer == last else f"_{layer}"
            losses |= {f"{name}{suffix}": self.loss_weights[name] * part for name, part in parts.items()}
        return losses, matches

    @torch.no_grad()
    def clip_costs(self, prediction: ClipPrediction, features: Tensor, targets: list[Targets], frames: slice) -> np.ndarray:
        """Costs (D, S, Q, most instances of a video) at the same points of every frame of a video's clip.

        Sampling is linear, so the sampled mask of a query is its embedding times the sampled features: one sampling serves
        all layers, streams and queries.
        """
        points = random_points(len(targets), self.points, features)
        length = features.shape[1]
        at = points.repeat_interleave(length, 0)                                                 # (B T, P, 2)
        sampled = sample_at(features.flatten(0, 1), at).unflatten(0, (-1, length))               # (B, T, C, P)
        sampled = sampled.transpose(1, 2).flatten(2)                                             # (B, C, T P)
        point_targets = nn.utils.rnn.pad_sequence([
            sample_at(video.masks[:, frames].flatten(0, 1)[None].to(features.dtype), own[None])[0]
            .view(len(video.labels), length * self.points) for video, own in zip(targets, points)], True)  # (B, I, T P)
        costs = []
        for logits, embed in zip(prediction.logits, prediction.mask_embed):                      # (L, B, Q, ...)
            masks = full_precision(embed) @ sampled
            costs.append(match_cost(full_precision(logits), masks, pad_labels(targets, len(targets), masks).expand(
                len(logits), -1, -1), point_targets.expand(len(logits), -1, -1, -1), self.weights).flatten(0, 1))
        return torch.stack(costs).cpu().numpy()

    @staticmethod
    def match_clip(cost: np.ndarray, new: Tensor, valid: Tensor, held: Tensor | None) -> Tensor:
        """One stream: instances that appear now get a query, the others keep the one they hold; returns query_of (I,).

        A visible instance's query is not given away (unless there are more instances than queries). That of an occluded one
        is, as upstream (grattvis_matcher.py:159).
        """
        query_of = torch.full((len(new),), -1) if held is None else held.clone()
        taken = query_of[valid & ~new]
        cost = cost[:, :len(new)][:, new.numpy()].copy()
        cost[taken[taken >= 0].numpy()] = EXCLUDED
        query_of[new] = assign(cost)
        return query_of

    # Single losses

    def class_loss(self, logits: Tensor, index: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        """Cross-entropy of logits (N, Q, K + 1): `labels` at index (row, query), "no object" (which counts less) elsewhere.

        A weighted mean over the queries of all processes: upstream's is over each process's own.
        """
        classes = torch.full(logits.shape[:2], self.num_classes)
        classes[index] = labels
        weight = logits.new_ones(self.num_classes + 1)
        weight[-1] = self.no_object_weight
        classes = classes.to(logits.device)
        total = F.cross_entropy(logits.transpose(1, 2), classes, weight, reduction="sum")
        return total / mean_over_processes(weight[classes].sum())

    def mask_losses(self, logits: Tensor, targets: Tensor, count: Tensor) -> dict[str, Tensor]:
        """Point BCE and dice of mask logits (I, T, h, w) against bool (I, T, H, W), each summed and divided by count.

        Points are drawn for each frame of each instance, then the frames are joined.
        """
        instances, frames = logits.shape[:2]
        logits, targets = logits.flatten(0, 1)[:, None], targets.flatten(0, 1)[:, None].to(logits.dtype)
        with torch.no_grad():
            points = self.uncertain_points(logits)
            truth = sample_at(targets, points).view(instances, frames * self.points)
        sampled = sample_at(logits, points).view(instances, frames * self.points)
        bce = F.binary_cross_entropy_with_logits(sampled, truth, reduction="none").mean(1).sum()
        inside = sampled.sigmoid()
        dice = (1 - (2 * (inside * truth).sum(1) + 1) / (inside.sum(1) + truth.sum(1) + 1)).sum()
        return {"mask": bce / count, "dice": dice / count}

    def uncertain_points(self, logits: Tensor) -> Tensor:
        """Points (N, P, 2) for mask logits (N, 1, h, w): most where the mask is undecided, the rest anywhere (PointRend)."""
        candidates = random_points(len(logits), self.candidates, logits)
        certainty = sample_at(logits, candidates)[:, 0].abs()                            # (N, candidates)
        index = certainty.topk(self.uncertain, 1, largest=False).indices
        chosen = candidates.gather(1, index[..., None].expand(-1, -1, 2))
        return torch.cat((chosen, random_points(len(logits), self.points - self.uncertain, logits)), 1)

    def similarity_loss(self, prediction: ClipPrediction, targets: list[Targets], frames: slice,
                        frame_matches: list[list[Tensor]], index: tuple[Tensor, Tensor], query_of: list[Tensor]) -> Tensor:
        """Do two embeddings of one stream belong to one instance? BCE over all pairs of its matched frame and clip queries."""
        frame_embed = full_precision(prediction.frame_embed)                                     # (L, B, T, F, C)
        clip_embed = full_precision(prediction.clip_embed)                                       # (L, B, Q, C)
        layers, batch, length = frame_embed.shape[:3]
        total_frames = len(frame_matches[0]) // batch
        rows, queries, streams, ids = [], [], [], []                                             # of matched frame queries
        clip_ids = []
        for b, video in enumerate(targets):
            for layer in range(layers):
                stream = layer * batch + b
                for offset, t in enumerate(range(frames.start, frames.stop)):
                    match, shown = frame_matches[layer][b * total_frames + t], video.ids[:, t]
                    rows.append(torch.full_like(match, stream * length + offset)[match >= 0])
                    queries.append(match[match >= 0])
                    streams.append(torch.full_like(match, stream)[match >= 0])
                    ids.append(shown[shown != -1][match >= 0])
                now = video.visible[:, frames].any(1) & (query_of[stream] >= 0)
                clip_ids.append(video.ids[now, frames].amax(1))
        embeds = torch.cat((frame_embed.flatten(0, 2)[torch.cat(rows), torch.cat(queries)], clip_embed.flatten(0, 1)[index]))
        streams = torch.cat((*streams, index[0])).to(embeds.device)
        ids = torch.cat((*ids, *clip_ids)).to(embeds.device)
        pairs = (streams[:, None] == streams).to(embeds.dtype)
        same = (ids[:, None] == ids).to(embeds.dtype)
        loss = F.binary_cross_entropy_with_logits(embeds @ embeds.T, same, reduction="none")
        return (loss * pairs).sum() / mean_over_processes(pairs.sum() + 1e-6)

    def gate_loss(self, prediction: ClipPrediction, layer: int, index: tuple[Tensor, Tensor]) -> Tensor:
        """BCE of the gates (S, Q): open (1) for queries of visible instances, at index (stream, query), closed (0) elsewhere.

        "released" puts the already sigmoided soft gate through another sigmoid (grattvis_criterion.py:301), so that it
        cannot reach 0; "logits" is the same loss on the gate's logits.
        """
        gates = prediction.gate_soft if self.gate_kind == "released" else prediction.gate_logits
        gates = full_precision(gates[layer].flatten(0, 1))
        target = torch.zeros(gates.shape, dtype=gates.dtype)
        target[index] = 1
        return F.binary_cross_entropy_with_logits(gates, target.to(gates.device))


def pad_labels(targets: list[Targets], rows: int, like: Tensor) -> Tensor:
    """Labels of the B videos, padded to the longest list, each repeated for its share of `rows`: (rows, I) beside `like`."""
    labels = nn.utils.rnn.pad_sequence([video.labels for video in targets], True)
    return labels.repeat_interleave(rows // len(targets), 0).to(like.device)


def full_precision(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_over_processes(total: Tensor) -> Tensor:
    """The mean of a sum over all processes, without gradient: what is divided by it and averaged is one quotient of all sums."""
    total = total.detach()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
        total = total / torch.distributed.get_world_size()
    return total


def average_over_processes(count: Tensor | int, like: Tensor) -> Tensor:
    """The mean of a count over all processes, at least 1, as a float tensor beside `like`."""
    return mean_over_processes(torch.as_tensor(count, dtype=torch.float32, device=like.device)).clamp(min=1)
