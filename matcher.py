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

import torch
import torch.distributed
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from data import Clip
from model import TrainingOutput
from tracker import ClipPrediction

EXCLUDED = 1e6  # cost of giving a new instance a query that a visible instance holds
GATE_LOSSES = ("logits", "released")


@dataclass
class Targets:
    """Ground truth of one video, padded as the images are."""
    labels: Tensor  # (I,) int64
    ids: Tensor     # (I, T) int64, -1 where the instance is not visible
    masks: Tensor   # (I, T, H, W) bool

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
    masks = clip.masks.to(device)
    masks = F.pad(masks, (0, size[1] - masks.shape[-1], 0, size[0] - masks.shape[-2]))
    ids = torch.where(masks.flatten(2).any(-1), clip.ids.to(device), -1)
    seen = (ids != -1).any(1)
    return Targets(clip.labels.to(device)[seen], ids[seen], masks[seen])


def random_points(rows: int, count: int, like: Tensor) -> Tensor:
    """Uniform points (rows, count, 2) in 0..1; the one source of randomness in matching and losses."""
    return torch.rand(rows, count, 2, device=like.device, dtype=like.dtype)


def sample_at(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps (N, C, H, W) at points (N, P, 2), (x, y) in 0..1 over the whole map: (N, C, P)."""
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False).squeeze(3)


def match_cost(logits: Tensor, masks: Tensor, labels: Tensor, target_masks: Tensor, weights: dict) -> Tensor:
    """Cost (Q, I) of every query for every instance: class probability, point BCE and dice.

    logits (Q, K + 1); masks (Q, P) logits and target_masks (I, P) 0..1 at the same points; labels (I,).
    """
    cost_class = -logits.softmax(-1)[:, labels]
    positive, negative = F.softplus(-masks), F.softplus(masks)                  # BCE against 1 and against 0
    cost_mask = (positive @ target_masks.T + negative @ (1 - target_masks).T) / masks.shape[1]
    inside = masks.sigmoid()
    cost_dice = 1 - (2 * inside @ target_masks.T + 1) / (inside.sum(1)[:, None] + target_masks.sum(1) + 1)
    return weights["class"] * cost_class + weights["mask"] * cost_mask + weights["dice"] * cost_dice


def assign(cost: Tensor) -> Tensor:
    """Hungarian assignment of (Q, I) costs -> query_of (I,); FloatingPointError if a cost is not finite."""
    if not cost.isfinite().all():
        raise FloatingPointError("a matching cost is not finite: the logits have overflowed; lower the learning rate, "
                                 "or train in bf16 or fp32 instead of fp16")
    query_of = torch.full((cost.shape[1],), -1, dtype=torch.long)
    queries, instances = linear_sum_assignment(cost.cpu().numpy())
    query_of[torch.from_numpy(instances)] = torch.from_numpy(queries)
    return query_of.to(cost.device)


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
        shown = [(video.labels[visible], video.masks[visible, frame])
                 for video in targets for frame, visible in enumerate(video.visible.T)]
        predictions = output.frames.predictions
        first = len(predictions) - len(output.frames.queries) if self.freeze_detector else 0
        count = average_over_processes(sum(len(labels) for labels, _ in shown), predictions[0][0])
        losses, matches = {}, []
        for layer, (logits, masks) in list(enumerate(predictions))[first:]:
            logits, masks = full_precision(logits), full_precision(masks)
            matches.append([self.match_frame(*frame) for frame in zip(logits, masks, *zip(*shown))])
            if self.freeze_detector:
                continue
            queries = [query_of.clamp(min=0) for query_of in matches[-1]]
            matched = [query_of >= 0 for query_of in matches[-1]]
            classes = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
            for row, query, keep, (labels, _) in zip(classes, queries, matched, shown):
                row[query[keep]] = labels[keep]
            own = torch.cat([mask[query[keep]] for mask, query, keep in zip(masks, queries, matched)])
            true = torch.cat([mask[keep] for keep, (_, mask) in zip(matched, shown)])
            parts = {"ce": self.class_loss(logits, classes)} | self.mask_losses(own[:, None], true[:, None], count)
            suffix = "" if layer == len(predictions) - 1 else f"_{layer}"
            losses |= {f"loss_{name}{suffix}": self.loss_weights[name] * part for name, part in parts.items()}
        return losses, matches[-len(output.frames.queries):]

    @torch.no_grad()
    def match_frame(self, logits: Tensor, masks: Tensor, labels: Tensor, target_masks: Tensor) -> Tensor:
        """logits (F, K + 1) and masks (F, h, w) of a frame, its labels (I,) and masks (I, H, W) -> query_of (I,)."""
        points = random_points(1, self.points, masks)
        target_points = sample_at(target_masks[None].to(masks.dtype), points)[0]
        return assign(match_cost(logits, sample_at(masks[None], points)[0], labels, target_points, self.weights))

    # Clips: identities kept

    def clip_losses(self, prediction: ClipPrediction, features: Tensor, targets: list[Targets], frames: slice,
                    previous: list[list[Tensor]] | None, frame_matches: list[list[Tensor]]
                    ) -> tuple[dict[str, Tensor], list[list[Tensor]]]:
        """Losses of one clip, `frames` of every video; previous and returned: [layer][stream] -> query_of (I,)."""
        streams = len(prediction.logits[0])                                              # L
        videos = targets * streams                                                       # layer-major, as the streams
        valid = [video.visible[:, frames].any(1) for video in videos]                    # visible in this clip
        before = [video.visible[:, :frames.start].any(1) for video in videos]            # seen in an earlier clip
        count = average_over_processes(sum(v.sum() for v in valid), features)
        points = [random_points(1, self.points, features) for _ in targets]
        point_features, point_targets = self.sample_clip(features, targets, frames, points)
        last, losses, matches = len(prediction.logits) - 1, {}, []
        for layer, (logits, embed) in enumerate(zip(prediction.logits, prediction.mask_embed)):
            logits, embed = full_precision(logits.flatten(0, 1)), full_precision(embed.flatten(0, 1))   # (S, Q, ...)
            held = previous[layer] if previous else [torch.full_like(video.labels, -1) for video in videos]
            query_of = [self.match_clip(*stream) for stream in zip(
                logits, embed, point_features * streams, point_targets * streams, videos, valid, before, held)]
            matches.append(query_of)
            visible = [v & (q >= 0) for v, q in zip(valid, query_of)]
            chosen = [q[v] for q, v in zip(query_of, visible)]                           # queries of visible instances
            classes = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
            for row, query, v, video in zip(classes, chosen, visible, videos):
                row[query] = video.labels[v]
            own = torch.cat([torch.einsum("ic,tchw->ithw", e[query], f)
                             for e, query, f in zip(embed, chosen, features.repeat(streams, 1, 1, 1, 1))])
            true = torch.cat([video.masks[v, frames] for video, v in zip(videos, visible)])
            parts = {"ce": self.class_loss(logits, classes)} | self.mask_losses(own, true, count)
            if layer == last and self.loss_weights["sim"]:
                parts["sim"] = self.similarity_loss(prediction, targets, frames, frame_matches, visible, query_of)
            if prediction.gate_soft and self.loss_weights["gate"]:
                parts["gate"] = self.gate_loss(prediction, layer, chosen)
            suffix = "" if layer == last else f"_{layer}"
            losses |= {f"{name}{suffix}": self.loss_weights[name] * part for name, part in parts.items()}
        return losses, matches

    @torch.no_grad()
    def sample_clip(self, features: Tensor, targets: list[Targets], frames: slice, points: list[Tensor]
                    ) -> tuple[list[Tensor], list[Tensor]]:
        """Features (C, T P) and target masks (I, T P) of every video at its points, the same points in every frame.

        Sampling is linear, so the sampled mask of a query is its embedding times the sampled features: one sampling serves
        all layers, streams and queries.
        """
        point_features, point_targets = [], []
        for feature, video, point in zip(features, targets, points):                     # feature (T, C, h, w)
            sampled = sample_at(feature, point.expand(len(feature), -1, -1))             # (T, C, P)
            point_features.append(sampled.transpose(0, 1).flatten(1))
            masks = video.masks[:, frames].flatten(0, 1)[None].to(feature.dtype)         # (1, I T, H, W)
            point_targets.append(sample_at(masks, point)[0].view(len(video.labels), -1))
        return point_features, point_targets

    @torch.no_grad()
    def match_clip(self, logits: Tensor, embed: Tensor, point_features: Tensor, point_targets: Tensor, video: Targets,
                   valid: Tensor, before: Tensor, held: Tensor) -> Tensor:
        """One stream: instances that appear now get a query, the others keep the one they hold; returns query_of (I,).

        A visible instance's query is not given away. That of an occluded one is, as upstream (grattvis_matcher.py:159).
        """
        new = valid & ~before
        cost = match_cost(logits, embed @ point_features, video.labels[new], point_targets[new], self.weights)
        cost[held[valid & before & (held >= 0)]] = EXCLUDED
        query_of = held.clone()
        query_of[new] = assign(cost)
        return query_of

    # Single losses

    def class_loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Cross-entropy of logits (N, Q, K + 1) against classes (N, Q), a mean weighted by class ("no object" less)."""
        weight = logits.new_ones(self.num_classes + 1)
        weight[-1] = self.no_object_weight
        return F.cross_entropy(logits.transpose(1, 2), classes, weight)

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
                        frame_matches: list[list[Tensor]], visible: list[Tensor], query_of: list[Tensor]) -> Tensor:
        """In each stream, do two embeddings (of matched frame and clip queries) belong to one instance? BCE over all pairs."""
        frame_embed, clip_embed = full_precision(prediction.frame_embed), full_precision(prediction.clip_embed)
        layers, batch, length = frame_embed.shape[:3]
        total_frames = len(frame_matches[0]) // batch
        loss, pairs = 0.0, 0
        for layer in range(layers):
            for index, video in enumerate(targets):
                stream = layer * batch + index
                embeds, ids = [], []
                for offset in range(length):
                    frame = frames.start + offset
                    match = frame_matches[layer][index * total_frames + frame]
                    shown = video.ids[:, frame]
                    embeds.append(frame_embed[layer, index, offset, match[match >= 0]])
                    ids.append(shown[shown != -1][match >= 0])
                keep = visible[stream]
                embeds.append(clip_embed[layer, index, query_of[stream][keep]])
                ids.append(video.ids[keep, frames].amax(1))
                embeds, ids = torch.cat(embeds), torch.cat(ids)
                same = (ids[:, None] == ids).to(embeds.dtype)
                loss = loss + F.binary_cross_entropy_with_logits(embeds @ embeds.T, same, reduction="sum")
                pairs += same.numel()
        return loss / (pairs + 1e-6)

    def gate_loss(self, prediction: ClipPrediction, layer: int, chosen: list[Tensor]) -> Tensor:
        """BCE of the gates (S, Q): open (1) for queries of visible instances, closed (0) for all others.

        "released" puts the already sigmoided soft gate through another sigmoid (grattvis_criterion.py:301), so that it
        cannot reach 0; "logits" is the same loss on the gate's logits.
        """
        gates = prediction.gate_soft if self.gate_kind == "released" else prediction.gate_logits
        gates = full_precision(gates[layer].flatten(0, 1))
        target = torch.zeros_like(gates)
        for row, queries in zip(target, chosen):
            row[queries] = 1
        return F.binary_cross_entropy_with_logits(gates, target)


def full_precision(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def average_over_processes(count: Tensor | int, like: Tensor) -> Tensor:
    """The mean of a count over all processes, at least 1, as a float tensor beside `like`."""
    count = torch.as_tensor(count, dtype=torch.float32, device=like.device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return count.clamp(min=1)
