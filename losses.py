"""The losses of a training step: what the matched queries have to learn, of all frames and clips together.

A matched query learns the class and the mask of its instance; every other one, and that of an instance while it is
invisible, learns "no object". All indices are made on the CPU and sent to the GPU at once (numpy arrays are on the CPU,
tensors on the GPU), and each loss is a few operations over all videos, layers and clips: none waits for the GPU.

Paper: Mask2Former (2112.01527) section 3.3, GenVIS (2211.08834), VITA (2206.04403) for the similarity loss. Upstream:
mask2former/modeling/criterion.py, grattvis/modeling/grattvis_criterion.py and vita/modeling/vita_criterion.py. Shape letters
are declared in model.py and matcher.py; here also
    U frames in which an instance can be seen: the frames of all clips in which it is visible
    I most instances of a video
"""
import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clips import Clip
from matcher import (
    Matches,
    Matching,
    Predictions,
    Targets,
    all_matches,
    bring_costs,
    clip_predictions,
    frame_predictions,
    full_precision,
    match,
    matching_costs,
    pad_targets,
    sample_at,
    to_device,
    uncertain_points,
)
from model import TrainingOutput
from tracker import ClipPrediction
from transformer import mask_logits

GATE_LOSSES = ("logits", "released")
SIMILARITY_SPANS = ("clip", "video")
MOST_NUMBERS = 2 ** 26  # in one tensor (a quarter of a GB): more points or masks are worked off in parts


class Criterion:
    """All losses of a training step, by the official names, weighted.

    Frame losses loss_{ce,mask,dice} (last layer) and ..._{0..8}; clip losses loss_genvis_{ce,mask,dice,sim}_clip{c} and
    ..._{ce,mask,dice}_{d}_clip{c}, or loss_vita_... without a clip number where one clip is the whole video.
    """

    def __init__(self, num_classes: int, class_weight: float = 2.0, mask_weight: float = 5.0, dice_weight: float = 5.0,
                 similarity_weight: float = 0.5, no_object_weight: float = 0.1, points: int = 12544,
                 oversample: float = 3.0, importance: float = 0.75, gate_weight: float = 0.0, gate_loss: str = "logits",
                 freeze_detector: bool = False, similarity_span: str = "clip"):
        """points: P of every mask in matching and loss; oversample * P candidates, of which `importance` * P are kept as the
        most uncertain. gate_weight 0 leaves the gate loss out, as all official recipes do; "logits" trains the gate to open
        where its query is matched and visible, "released" is the official one, which squashes twice (see gate_loss).
        freeze_detector: frame matches without frame losses; the similarity loss needs the matches. similarity_span: whether it
        compares the queries of each clip (as upstream), or of all clips of a video."""
        if similarity_span not in SIMILARITY_SPANS:
            raise ValueError(f"unknown span {similarity_span!r}: choose one of {', '.join(SIMILARITY_SPANS)}")
        if gate_loss not in GATE_LOSSES:
            raise ValueError(f"unknown gate loss {gate_loss!r}: choose one of {', '.join(GATE_LOSSES)}")
        self.num_classes, self.no_object_weight, self.freeze_detector = num_classes, no_object_weight, freeze_detector
        self.weights = {"class": class_weight, "mask": mask_weight, "dice": dice_weight}
        self.loss_weights = {"ce": class_weight, "mask": mask_weight, "dice": dice_weight, "sim": similarity_weight,
                             "gate": gate_weight}
        self.points, self.candidates = points, int(points * oversample)
        self.uncertain, self.gate_kind, self.similarity_span = int(importance * points), gate_loss, similarity_span

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def __call__(self, output: TrainingOutput, clips: list[Clip], whole_video: bool = False
                 ) -> tuple[dict[str, Tensor], Matches]:
        """Losses {name: scalar} and the matches behind them. clips: the B ground truths; whole_video: the output is one clip
        of "clip" propagation. Costs and losses are computed in at least float32."""
        batch, layers, device = len(clips), len(output.frames.queries), output.frames.features.device
        targets = pad_targets(clips, output.padded_size, device)
        frames = frame_predictions(output, batch, layers if self.freeze_detector else len(output.frames.predictions))
        tracks = clip_predictions(output, batch)
        costs = bring_costs([cost for predictions in (frames, tracks)                         # here the CPU waits, once
                             for cost in matching_costs(predictions, targets, self.points, self.weights)])
        frame_matching = match(costs[:batch], targets, frames.clip_of, identities=False)
        matching = match(costs[batch:], targets, tracks.clip_of, identities=True)

        groups = [loss_index(frames, targets, frame_matching, self.num_classes),
                  loss_index(tracks, targets, matching, self.num_classes),
                  similarity_index(output.clips, targets, tracks.clip_of, frame_matching, matching, self.similarity_span)]
        moved = iter(to_device([array for group in groups for array in group.values()], device))
        frame_index, clip_index, members = ({name: next(moved) for name in group} for group in groups)
        spans = len(output.clips) if self.similarity_span == "clip" else 1
        frame_counts, clip_counts, pairs = average_over_processes([
            self.counts(groups[0]["classes"], frame_matching.ids).sum(1),
            by_layer(self.counts(groups[1]["classes"], matching.ids), layers).sum(3),
            count_pairs(groups[2]["ids"], spans)], full_precision(tracks.features[:0]))

        sums = by_layer(self.summed_losses(tracks, targets.masks, clip_index), layers).sum(3)
        values = quotients(sums, clip_counts)                                                 # (G, D) each
        # at weight 0 too: a parameter without a gradient would stall the other processes
        similarity = similarity_losses(output.clips, **members).view(spans, -1).sum(1) / pairs
        values["sim"] = (similarity * (len(output.clips) / spans))[:, None]                   # (G or 1, 1): the last layer's
        if output.clips[0].gate_soft and self.loss_weights["gate"]:
            values["gate"] = self.gate_loss(output.clips, clip_index["classes"])
        losses = self.named(values, *(("loss_vita", "") if whole_video else ("loss_genvis", "_clip{}")))
        if not self.freeze_detector:
            sums = self.summed_losses(frames, targets.masks, frame_index).sum(1)
            values = quotients(sums, frame_counts)                                            # (layers,) each
            losses |= self.named({name: value[None] for name, value in values.items()}, "loss", "")
        return losses, all_matches(frame_matching, matching, targets, layers)

    def named(self, values: dict[str, Tensor], prefix: str, suffix: str) -> dict[str, Tensor]:
        """Weighted scalars from losses (clips, layers); the last layer has no number, `suffix` takes that of the clip."""
        losses = {}
        for name, value in values.items():
            clips, layers = value.shape
            names = [f"{prefix}_{name}{layer}{suffix.format(clip)}" for clip in range(clips)
                     for layer in (*(f"_{number}" for number in range(layers - 1)), "")]
            losses |= zip(names, (self.loss_weights[name] * value).flatten().unbind())
        return losses

    def counts(self, classes: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """What class, mask and dice losses are divided by: (3, G, R), the weights of all queries and twice the instances.

        classes (G, R, B, Q) of all queries: after an occlusion two instances may hold the same one. ids (A, G), see Matching.
        """
        positive = (classes != self.num_classes).sum((2, 3))
        weights = positive + self.no_object_weight * (classes[0, 0].size - positive)
        instances = np.broadcast_to((ids != -1).sum(0)[:, None], weights.shape)
        return np.stack((weights, instances, instances))

    def summed_losses(self, predictions: Predictions, masks: Tensor, index: dict[str, Tensor]) -> Tensor:
        """Class, mask and dice losses of all videos together, not yet divided: (3, G, R). masks: of the targets."""
        return torch.stack((self.class_loss(predictions.logits, index["classes"]), *self.mask_losses(predictions, masks, index)))

    def class_loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Cross-entropy (G, R) of logits (G, R, B, Q, K + 1) against classes (G, R, B, Q); "no object" counts less.

        Its mean is over the queries of all processes: upstream's is over each process's own.
        """
        logits = full_precision(logits)
        weight = logits.new_ones(self.num_classes + 1)
        weight[-1:].fill_(self.no_object_weight)                                              # an assignment would wait
        losses = F.cross_entropy(logits.flatten(0, 3), classes.flatten(), weight, reduction="none")
        return losses.view(*classes.shape[:2], -1).sum(2)

    def mask_losses(self, predictions: Predictions, masks: Tensor, index: dict[str, Tensor]) -> Tensor:
        """Point BCE and dice (2, G, R), summed over instances. masks (A, T, H, W) bool; index: see loss_index.

        Points are drawn for each frame of each instance, then the frames of a clip are joined. The masks of a frame are one
        matrix product, for which frames with fewer instances than others are padded.
        """
        batch, length, channels, *size = predictions.features.shape
        features, frames = predictions.features.unbind(), batch * length
        kernels, table, matched = full_precision(predictions.mask_kernel).flatten(0, 3), index["table"], index["matched"]
        truth = masks.flatten(0, 1).index_select(0, index["target"])                          # (U, H, W)
        sums = []
        for part in table.split(most_of(len(table) * size[0] * size[1]), 1):                  # (B T I, some of the R)
            own = kernels.index_select(0, part.flatten()).view(frames, part.numel() // frames, channels + 1)
            # in full precision, which the features have one video at a time, in backward again: all of them are large
            logits = torch.cat([checkpoint(full_masks, *pair, use_reentrant=False, preserve_rng_state=False)
                                for pair in zip(own.unflatten(0, (batch, length)).unbind(), features)]).view(*part.shape, *size)
            some = logits.index_select(0, index["row"]).split(most_of(6 * self.candidates * len(truth)), 1)  # 3 values, 2 copies
            sums += [self.point_losses(own, truth, index["length"]) for own in some]
        sums = torch.cat(sums, 2)                                                             # (3, U, R)
        clips, layers, instances = len(predictions.logits), table.shape[1], len(masks)
        joined = sums.new_zeros(3, instances * clips, layers).index_add(1, index["pair"], sums)
        bce, overlap, area = joined.view(3, *matched.shape)                                   # (A, G, R) each
        dice = 1 - (2 * overlap + 1) / (area + 1)
        return (torch.stack((bce, dice)) * matched).sum(1)

    def point_losses(self, logits: Tensor, truth: Tensor, length: Tensor) -> Tensor:
        """What a frame adds to a clip: its share of the point BCE, overlap and area of prediction and truth; (3, U, R).

        logits (U, R, h, w), truth (U, H, W) bool, length (U,) of the clips.
        """
        rows, dtype = logits.shape[:2], logits.dtype
        logits = logits.flatten(0, 1)[:, None]                                                # (U R, 1, h, w)
        with torch.no_grad():
            points = uncertain_points(logits, self.points, self.candidates, self.uncertain)   # (U R, P, 2)
            at = points.view(rows[0], rows[1] * self.points, 2)
            some = most_of(truth.shape[1:].numel())                                           # bool masks grow to full numbers
            true = torch.cat([sample_at(mask[:, None].to(dtype), own) for mask, own in zip(truth.split(some), at.split(some))])
            true = true.view(len(logits), self.points)
        sampled = sample_at(logits, points)[:, 0]
        bce = F.binary_cross_entropy_with_logits(sampled, true, reduction="none").mean(1).view(rows) / length[:, None]
        inside = sampled.sigmoid()
        return torch.stack((bce, (inside * true).sum(1).view(rows), (inside.sum(1) + true.sum(1)).view(rows)))

    def gate_loss(self, clips: list[ClipPrediction], classes: Tensor) -> Tensor:
        """BCE (G, D) of the gates: open (1) for queries that have to show an instance by `classes` (G, R, B, Q), else closed.

        "released" puts the already sigmoided soft gate through another sigmoid (grattvis_criterion.py:301), so that it
        cannot reach 0; "logits" is the same loss on the gate's logits.
        """
        name = "gate_soft" if self.gate_kind == "released" else "gate_logits"
        gates = full_precision(torch.stack([gate for clip in clips for gate in getattr(clip, name)]))  # (G D, L, B, Q)
        gates = gates.view(len(clips), -1, gates[0].numel())
        target = (classes != self.num_classes).view(gates.shape).to(gates.dtype)
        return F.binary_cross_entropy_with_logits(gates, target, reduction="none").mean(2)


def most_of(numbers: int) -> int:
    """How many things of so many numbers are worked on at once."""
    return max(1, MOST_NUMBERS // max(1, numbers))


def full_masks(kernel: Tensor, features: Tensor) -> Tensor:
    """Mask logits (T, n, h, w) of kernels (T, n, C + 1) on features (T, C, h, w), in full precision."""
    return mask_logits(kernel, full_precision(features))


def similarity_losses(clips: list[ClipPrediction], members: Tensor, ids: Tensor) -> Tensor:
    """Do two embeddings of one stream belong to one instance? BCE over all pairs of its matched frame and clip queries.

    members, ids: see similarity_index. Sums of each stream of a span.
    """
    frame_embed = torch.cat([clip.frame_embed for clip in clips], 2).flatten(0, 3)            # (L B T F, C)
    clip_embed = torch.stack([clip.clip_embed for clip in clips]).flatten(0, 3)               # (G L B Q, C)
    embeds = full_precision(torch.cat((frame_embed, clip_embed)))
    embeds = embeds.index_select(0, members.flatten()).view(*members.shape, embeds.shape[1])  # (G S, members, C)
    same = (ids[:, :, None] == ids[:, None]).to(embeds.dtype)
    pairs = (ids >= 0)[:, :, None] & (ids >= 0)[:, None]
    loss = F.binary_cross_entropy_with_logits(embeds @ embeds.transpose(1, 2), same, reduction="none") * pairs
    return loss.sum((1, 2))


def count_pairs(ids: np.ndarray, spans: int) -> np.ndarray:
    """Pairs that the similarity loss of each span is the mean of, never quite 0: (spans,). ids: see similarity_index."""
    return ((ids != -1).sum(1) ** 2).reshape(spans, -1).sum(1) + 1e-6


def by_layer(values, layers: int):
    """(3, G, R) -> (3, G, D, L)."""
    return values.reshape(*values.shape[:2], -1, layers)


def quotients(sums: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Class, mask and dice losses of all processes from sums and counts (3, ...): fewer than one instance count as one."""
    counts = torch.cat((counts[:1], counts[1:].clamp(min=1)))
    return dict(zip(("ce", "mask", "dice"), sums / counts))


def average_over_processes(counts: list[np.ndarray], like: Tensor) -> list[Tensor]:
    """Means of counts over all processes, beside `like` and in its dtype: what is divided by them and averaged over the
    processes is one quotient of all sums. One exchange, which all processes have to take part in."""
    mean, = to_device([np.concatenate([count.ravel() for count in counts])], like.device)
    mean = mean.to(like.dtype)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(mean)
        mean = mean / torch.distributed.get_world_size()
    return [part.view(count.shape) for part, count in zip(mean.split([count.size for count in counts]), counts)]


# What the losses read where

def loss_index(predictions: Predictions, targets: Targets, matching: Matching, no_object: int) -> dict[str, np.ndarray]:
    """Where the class and mask losses of `predictions` find what they read.

    classes (G, R, B, Q): what each query has to learn. table (B T I, R): which of all mask embeddings belongs to an instance
    in a frame. Of each of the U: row of the table, target among the (A T) masks, pair = instance * G + clip, length of that
    clip, all (U,). matched (A, G, R): 1 where an instance has a query.
    """
    clips, layers, batch, queries = predictions.logits.shape[:4]
    clip_of, video_of, frames = predictions.clip_of, targets.video_of, len(predictions.clip_of)
    clip, layer, instance = matching.matched.nonzero()
    at = clip, layer, video_of[instance], matching.query_of[clip, layer, instance]
    classes = np.full((clips, layers, batch, queries), no_object)
    classes[at] = targets.labels[instance]
    embed_of = np.zeros_like(matching.query_of)
    embed_of[clip, layer, instance] = np.ravel_multi_index(at, classes.shape)

    instance, frame = (matching.ids != -1)[:, clip_of].nonzero()                              # (U,) each
    clip, video, most = clip_of[frame], video_of[instance], np.diff(targets.first).max()
    row = (video * frames + frame) * most + instance - targets.first[video]
    table = np.zeros((batch * frames * most, layers), dtype=np.int64)
    table[row] = embed_of[clip, :, instance]
    return {"classes": classes, "table": table, "row": row, "target": instance * frames + frame,
            "pair": instance * clips + clip, "length": np.bincount(clip_of)[clip], "matched": matching.matched.transpose(2, 0, 1)}


def similarity_index(clips: list[ClipPrediction], targets: Targets, clip_of: np.ndarray, frame_matching: Matching,
                     matching: Matching, span: str) -> dict[str, np.ndarray]:
    """The matched frame and clip queries of every stream in every clip, or in the video: members of the similarity loss, and their ids.

    members (G S or S, most of a stream): where they are among the frame embeddings (L, B, T, F), flattened, followed by the clip
    embeddings (G, L, B, Q); ids likewise, -1 where a stream has fewer.
    """
    video_of, (layers, batch, queries) = targets.video_of, clips[0].clip_embed.shape[:3]
    frame_shape = layers, batch, len(clip_of), clips[0].frame_embed.shape[3]
    clip_shape = len(clips), layers, batch, queries

    query_of = frame_matching.query_of[:, -layers:]                                           # (T, L, A)
    frame, layer, instance = (query_of >= 0).nonzero()
    at = np.ravel_multi_index((layer, video_of[instance], frame, query_of[frame, layer, instance]), frame_shape)
    stream = np.ravel_multi_index((clip_of[frame], layer, video_of[instance]), clip_shape[:3])
    of_frames = stream, at, targets.ids[instance, frame]

    query_of = matching.query_of[:, -layers:]                                                 # (G, L, A)
    clip, layer, instance = matching.matched[:, -layers:].nonzero()
    at = np.ravel_multi_index((clip, layer, video_of[instance], query_of[clip, layer, instance]), clip_shape)
    of_clips = at // queries, at + np.prod(frame_shape), matching.ids[instance, clip]

    stream, at, identity = np.concatenate((of_frames, of_clips), 1)
    streams = np.prod(clip_shape[:3])
    if span == "video":
        streams //= len(clips)
        stream %= streams
    order, count = np.argsort(stream), np.bincount(stream, minlength=streams)
    place = np.arange(len(stream)) - np.repeat(np.cumsum(count) - count, count)               # among its stream's, in order
    members = np.zeros((len(count), count.max()), dtype=np.int64)
    ids = np.full_like(members, -1)
    members[stream[order], place], ids[stream[order], place] = at[order], identity[order]
    return {"members": members, "ids": ids}
