"""Losses: every formula against a plain loop, and what they ask of a GPU and of other processes."""

import collections
import itertools
import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch.utils._python_dispatch import TorchDispatchMode

import losses as losses_module
import matcher
from clips import Clip
from losses import (
    GATE_LOSSES,
    Criterion,
    SampledMatches,
    average_over_processes,
    count_visible,
    dice_loss,
    gate_bce,
    mask_loss,
)
from matcher import (
    CostsToCPU,
    Matches,
    Predictions,
    clip_predictions,
    sample_at,
    uncertain_points,
)
from model import FrameOutput, TrainingOutput, build_model
from predictions import (
    CLASSES,
    SIZE,
    fixed_points,
    make_clip,
    make_matches,
    make_targets,
    paint,
    random_output,
    visible_in_frames,
)
from tracker import ClipPrediction


@pytest.fixture
def no_chance(monkeypatch):
    monkeypatch.setattr(matcher, "random_points", fixed_points)


# Means over processes


def other_process(monkeypatch, added: float) -> list:
    """A second process whose counts are larger by `added`; returns the exchanges, as they come."""
    exchanges = []

    def all_reduce(total):
        exchanges.append(total.add_(total + added))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    return exchanges


def test_average_over_processes(monkeypatch):
    """One exchange for counts of any shapes."""
    counts = [torch.tensor([[0.0, 1.0], [0, 7]]), torch.tensor([5.0])]
    alone = average_over_processes(counts)
    assert all(map(torch.equal, alone, counts))
    exchanges = other_process(monkeypatch, added=3)
    first, second = average_over_processes(counts)
    assert first.tolist() == [[1.5, 2.5], [1.5, 8.5]] and second.tolist() == [6.5]
    assert len(exchanges) == 1


def test_a_custom_loss(no_chance, monkeypatch):
    """A function and an entry in the table.

    Named per clip and layer, weighted, averaged over processes.
    """

    def confidence_loss(predictions, targets, matches):
        """The mean score of unmatched queries."""
        background = matches.classes == CLASSES
        score = predictions.logits.softmax(-1)[..., :-1].amax(-1)
        return (score * background).sum((2, 3)), background.sum((2, 3))

    torch.manual_seed(0)
    clip, output = make_clip([[1, 1, 1], [0, 1, 1]]), random_output(1, 3, clip_length=2)
    criterion = Criterion(CLASSES, points=8)
    criterion.clip_losses["confidence"] = confidence_loss, 3.0
    losses, (_, matches) = criterion(output, [clip])
    names = {name for name in losses if "confidence" in name}
    assert names == {
        f"loss_genvis_confidence{layer}_clip{clip}" for layer in ("_0", "") for clip in (0, 1)
    }
    score = torch.stack(output.clips[1].logits)[1, :, 0].softmax(-1)[..., :-1].amax(-1)  # (L, Q)
    unmatched = matches.classes[1, 2:, 0] == CLASSES
    expected = 3.0 * score[unmatched].mean()
    torch.testing.assert_close(losses["loss_genvis_confidence_clip1"], expected)

    other_process(monkeypatch, added=4)
    shared, _ = criterion(output, [clip])
    count = unmatched.sum()
    torch.testing.assert_close(
        shared["loss_genvis_confidence_clip1"], expected * count / (count + 2)
    )
    for name, loss in losses.items():
        assert shared[name] < loss or loss == 0, name


# Single losses


def test_class_loss_weights_no_object():
    """Queries without an instance count a tenth, and so does their share of the mean."""
    torch.manual_seed(0)
    logits, classes = torch.randn(1, 1, 2, 3, CLASSES + 1), torch.tensor([[3, 3, 1], [0, 3, 3]])
    predictions = Predictions(logits, None, None, 1)
    matches = Matches(None, None, classes[None, None])
    loss, count = Criterion(CLASSES).class_loss(predictions, None, matches)
    total = weight = 0
    for row, query in itertools.product(range(2), range(3)):
        target = classes[row, query]
        share = 0.1 if target == CLASSES else 1.0
        total = total - share * logits[0, 0, row, query].log_softmax(0)[target]
        weight += share
    torch.testing.assert_close(loss, total.view(1, 1))
    assert count.item() == pytest.approx(weight)


@pytest.mark.parametrize("max_elements", [2**27, 1])
def test_mask_losses_are_a_loop(no_chance, monkeypatch, max_elements):
    """The frames of a clip are joined before dice.

    Both are sums over instances; chunks of any size.
    """
    monkeypatch.setattr(losses_module, "MAX_ELEMENTS", max_elements)
    torch.manual_seed(0)
    criterion = Criterion(CLASSES, points=8)
    clips = [make_clip([[1, 1, 0], [0, 0, 1]]), make_clip([[0, 1, 0]])]
    predictions = clip_predictions(random_output(2, 3, clip_length=2), batch=2)
    targets = make_targets(*clips)
    query_of = numpy.random.default_rng(0).integers(0, 6, (2, 4, 2, 2))  # (G, R, B, I)
    query_of[0, 2, 0, 0] = query_of[0, 1, 1, 0] = -1
    matches = make_matches(query_of, targets, predictions)
    matches = criterion.sample(predictions, targets, matches)
    (bce, count), (dice, _) = (
        loss(predictions, targets, matches) for loss in (mask_loss, dice_loss)
    )
    assert count.tolist() == [[2.0] * 4, [1.0] * 4]

    expected = torch.zeros(2, 2, 4, dtype=torch.float64)
    seen = [(0, 0, 0, [0, 1]), (0, 1, 0, [0, 1]), (1, 0, 1, [2])]  # clip, video, instance, frames
    for (clip, video, instance, frames), layer in itertools.product(seen, range(4)):
        query = query_of[clip, layer, video, instance]
        if query >= 0:
            masks = paint(
                predictions.mask_kernel[clip, layer, video, query],
                predictions.features[video, frames],
            )
            truth = clips[video].masks[instance, frames]
            expected[:, clip, layer] += torch.stack(slow_mask_loss(masks, truth, criterion))
    torch.testing.assert_close(torch.stack((bce, dice)), expected)


def slow_mask_loss(
    logits: torch.Tensor, truth: torch.Tensor, criterion: Criterion
) -> tuple[torch.Tensor, torch.Tensor]:
    """Point BCE and dice of one instance: mask logits (T, h, w) against bool (T, H, W)."""
    sampled, true = [], []
    for mask, target in zip(logits, truth, strict=True):
        at = uncertain_points(
            mask[None, None], criterion.points, criterion.candidates, criterion.uncertain
        )
        sampled.append(sample_at(mask[None, None], at).flatten())
        true.append(sample_at(target[None, None].to(mask.dtype), at).flatten())
    sampled, true = torch.cat(sampled), torch.cat(true)
    dice = 1 - (2 * (sampled.sigmoid() * true).sum() + 1) / (
        sampled.sigmoid().sum() + true.sum() + 1
    )
    return F.binary_cross_entropy_with_logits(sampled, true), dice


@pytest.mark.parametrize("span", ["clip", "video"])
def test_similarity_loss_is_a_loop_over_pairs(span):
    """Two videos, two levels, clips of frames 0 and 1 and of frame 2: pairs of one stream in one
    clip,
    or in both, of the same instance or not."""
    torch.manual_seed(0)
    clips = [make_clip([[1, 1, 0], [1, 0, 1]]), make_clip([[0, 1, 1]])]
    output, targets = random_output(batch=2, frames=3, clip_length=2), make_targets(*clips)
    predictions = clip_predictions(output, batch=2)
    query_of = numpy.full((2, 4, 2, 2), 5)  # only the last layer counts
    query_of[:, 2:] = [
        [[[4, 1], [-1, -1]], [[5, 0], [2, -1]]],
        [[[4, 1], [2, -1]], [[5, -1], [3, -1]]],
    ]
    matches = make_matches(query_of, targets, predictions)
    frame_query_of = torch.tensor(
        [
            [[[0, 1], [-1, -1]], [[1, 0], [-1, -1]]],
            [[[2, -1], [4, -1]], [[3, -1], [5, -1]]],
            [[[-1, 3], [5, -1]], [[-1, 2], [-1, -1]]],
        ]
    )  # (T, L, B, I)
    frame_matches = Matches(frame_query_of, targets.visible.transpose(0, 1), None)
    matches = SampledMatches(
        **vars(matches), point_logits=None, point_targets=None, frames=frame_matches
    )
    criterion = Criterion(CLASSES, similarity_span=span)
    total, count = criterion.similarity_loss(predictions, targets, matches)

    spans = [[0], [1]] if span == "clip" else [[0, 1]]  # the clips that are compared
    for number, compared in enumerate(spans):
        for level in range(2):
            expected = pairs = 0
            for video in range(2):
                members = []  # (instance, embedding)
                for clip, instance in itertools.product(compared, range(len(clips[video].labels))):
                    for offset, t in enumerate(([0, 1], [2])[clip]):
                        query = frame_query_of[t, level, video, instance]
                        if query >= 0:
                            embed = output.clips[clip].frame_embed[level, video, offset, query]
                            members.append((instance, embed))
                    query = query_of[clip, 2 + level, video, instance]
                    if query >= 0 and matches.visible[clip, video, instance]:
                        members.append(
                            (instance, output.clips[clip].clip_embed[level, video, query])
                        )
                for (one, first), (other, second) in itertools.product(members, members):
                    target = torch.tensor(float(one == other), dtype=torch.float64)
                    expected = expected + F.binary_cross_entropy_with_logits(first @ second, target)
                    pairs += 1
            assert count[number, level] == pairs > 1
            factor = 2 if span == "video" else 1  # as large as of both clips
            torch.testing.assert_close(total[number, level], factor * expected)


def test_gate_losses():
    """One open gate of two, as it should be: "logits" reaches 0; "released" squashes the gate twice
    and cannot."""
    logits = torch.tensor([50.0, -50.0])[None, None, None]
    right, wrong = (
        torch.tensor(classes)[None, None, None] for classes in ([1, CLASSES], [CLASSES, 1])
    )

    def loss(gates, classes):
        predictions = Predictions(
            torch.zeros(1, 1, 1, 2, CLASSES + 1),
            None,
            None,
            1,
            clip_embed=torch.zeros(1, 1, 1, 2, 4),
            gate_values=gates,
        )
        total, count = gate_bce(predictions, None, Matches(None, None, classes))
        return (total / count).item()

    assert loss(logits, right) == pytest.approx(0, abs=1e-6)
    assert loss(logits, wrong) == pytest.approx(50)
    soft = logits.sigmoid()
    assert loss(soft, right) == pytest.approx((math.log1p(math.exp(-1)) + math.log(2)) / 2)
    assert loss(soft, wrong) == pytest.approx((math.log(2) + math.log1p(math.exp(1))) / 2)
    output = random_output(1, 2, clip_length=1)
    for kind, name in zip(GATE_LOSSES, ("gate_logits", "gate_soft"), strict=True):
        predictions = clip_predictions(output, 1, Criterion(CLASSES, gate_loss=kind).gate_field)
        assert torch.equal(predictions.gate_values[1, 2], getattr(output.clips[1], name)[1][0])
    with pytest.raises(ValueError, match="logits, released"):
        Criterion(CLASSES, gate_loss="hinge")


def test_a_decoder_layer_may_have_several_gates():
    """Three gates in each of D = 2 decoder layers: the loss of a layer is their mean."""
    clips, depth, detector_layers, batch, queries = 2, 2, 3, 2, 5
    gates = torch.randn(clips, depth, 3, detector_layers, batch, queries)
    classes = torch.randint(CLASSES + 1, (clips, depth * detector_layers, batch, queries))
    predictions = Predictions(
        torch.zeros(*classes.shape, CLASSES + 1),
        None,
        None,
        1,
        clip_embed=torch.zeros(clips, detector_layers, batch, queries, 4),
        gate_values=gates.flatten(1, 3),
    )
    total, count = gate_bce(predictions, None, Matches(None, None, classes))
    assert total.shape == count.shape == (clips, depth * detector_layers)
    for clip, layer, level in itertools.product(range(clips), range(depth), range(detector_layers)):
        row = layer * detector_layers + level
        is_open = (classes[clip, row] != CLASSES).float()
        losses = [
            F.binary_cross_entropy_with_logits(gates[clip, layer, gate, level], is_open)
            for gate in range(3)
        ]
        torch.testing.assert_close(total[clip, row] / count[clip, row], sum(losses) / 3)


def test_two_equal_levels_cost_as_one(no_chance):
    """Losses are averaged over the L levels of the detector."""
    torch.manual_seed(0)
    clip, one = make_clip([[1, 1], [0, 1]]), random_output(1, 2, clip_length=1, layers=1)

    def twice(value):
        return [twice(x) for x in value] if isinstance(value, list) else torch.cat((value, value))

    doubled = [ClipPrediction(*map(twice, vars(clip).values())) for clip in one.clips]
    frames = FrameOutput(one.frames.predictions, twice(one.frames.queries), one.frames.features)
    two = TrainingOutput(frames, doubled, SIZE)
    single, double = (Criterion(CLASSES, points=40)(output, [clip])[0] for output in (one, two))
    for name, loss in double.items():
        if "sim" not in name:  # which sees other frame predictions
            torch.testing.assert_close(loss, single[name])


# The whole criterion against plain loops

pytestmark = pytest.mark.usefixtures("four_convolutions")
SLOW = {
    "class": 1.5,
    "mask": 3.0,
    "dice": 7.0,
    "similarity": 0.25,
    "gate": 0.75,
    "no object": 0.2,
}  # weights, all different


@torch.no_grad()
def slow_costs(
    logits: torch.Tensor,
    kernel: torch.Tensor,
    features: torch.Tensor,
    labels,
    truth,
    criterion: Criterion,
) -> numpy.ndarray:
    """Costs (Q, I) of the queries of one clip, one by one.

    features (T, C, h, w), truth (I, T, H, W).
    """
    cost = numpy.zeros((len(logits), len(labels)))
    at = fixed_points(1, criterion.points, features)
    for query, instance in itertools.product(range(len(logits)), range(len(labels))):
        masks = paint(kernel[query], features)
        sampled = torch.cat([sample_at(mask[None, None], at).flatten() for mask in masks])
        true = torch.cat(
            [sample_at(mask[None, None].to(masks.dtype), at).flatten() for mask in truth[instance]]
        )
        inside = sampled.sigmoid()
        dice = 1 - (2 * (inside * true).sum() + 1) / (inside.sum() + true.sum() + 1)
        cost[query, instance] = (
            SLOW["mask"] * F.binary_cross_entropy_with_logits(sampled, true)
            + SLOW["dice"] * dice
            - SLOW["class"] * logits[query].softmax(0)[labels[instance]]
        )
    return cost


def slow_class_loss(rows: list[tuple[torch.Tensor, dict[int, int]]]) -> torch.Tensor:
    """rows: logits (Q, K + 1) and the classes of the queries that have one."""
    total = weight = 0
    for logits, classes in rows:
        for query, scores in enumerate(logits):
            share = 1.0 if query in classes else SLOW["no object"]
            total = total - share * scores.log_softmax(0)[classes.get(query, CLASSES)]
            weight += share
    return total / weight


def slow_similarity(streams: list[list[tuple[int, torch.Tensor]]]) -> torch.Tensor:
    """streams: instances and embeddings."""
    total, pairs = torch.zeros((), dtype=torch.float64), 1e-6
    for members in streams:
        for (one, first), (other, second) in itertools.product(members, members):
            total = total + F.binary_cross_entropy_with_logits(
                first @ second, torch.tensor(float(one == other)).double()
            )
            pairs += 1
    return total / pairs


def add_masks(
    losses: dict, name: str, suffix: str, pairs: list, count: int, criterion: Criterion
) -> None:
    """Put mask and dice losses of mask logits and their truth, divided by `count`, into losses."""
    for kind in ("mask", "dice"):
        losses[f"{name}_{kind}{suffix}"] = torch.zeros((), dtype=torch.float64)
    for logits, truth in pairs:
        for kind, loss in zip(("mask", "dice"), slow_mask_loss(logits, truth, criterion)):
            losses[f"{name}_{kind}{suffix}"] = losses[f"{name}_{kind}{suffix}"] + SLOW[
                kind
            ] * loss / max(1, count)


def slow_criterion(
    output: TrainingOutput, clips: list[Clip], criterion: Criterion
) -> tuple[dict, list, list]:
    """Losses and matches of frames and clips, all by loops."""
    losses, layers = {}, len(output.frames.queries)
    length, batch = clips[0].masks.shape[1], len(clips)
    visible = [visible_in_frames(clip) for clip in clips]
    found = []  # [layer][frame] {instance: query}
    for number, (logits, kernel) in enumerate(output.frames.predictions):
        found.append([])
        for n, (b, t) in enumerate(itertools.product(range(batch), range(length))):
            shown = [i for i in range(len(clips[b].labels)) if visible[b][i, t]]
            cost = slow_costs(
                logits[n],
                kernel[n],
                output.frames.features[n : n + 1],
                clips[b].labels[shown],
                clips[b].masks[shown, t][:, None],
                criterion,
            )
            found[-1].append(
                {shown[i]: int(query) for query, i in zip(*linear_sum_assignment(cost))}
            )
        rows, pairs, count = [], [], 0
        for n, match in enumerate(found[-1]):
            clip, t = clips[n // length], n % length
            rows.append((logits[n], {query: int(clip.labels[i]) for i, query in match.items()}))
            pairs += [
                (paint(kernel[n, query], output.frames.features[n][None]), clip.masks[i, t][None])
                for i, query in match.items()
            ]
            count += int(visible[n // length][:, t].sum())
        suffix = f"_{number}" if number < len(output.frames.predictions) - 1 else ""
        losses[f"loss_ce{suffix}"] = SLOW["class"] * slow_class_loss(rows)
        add_masks(losses, "loss", suffix, pairs, count, criterion)
    found = found[-layers:]

    held, by_clip, of_clips, first = (
        {},
        [],
        [],
        0,
    )  # held: {(depth, level, video): {instance: query}}
    lengths = [prediction.frame_embed.shape[2] for prediction in output.clips]
    all_features = output.frames.features.unflatten(0, (batch, length))
    for number, (prediction, features) in enumerate(
        zip(output.clips, all_features.split(lengths, 1), strict=True)
    ):
        times, depth = list(range(first, first + features.shape[1])), len(prediction.logits)
        by_clip.append([])
        for d in range(depth):
            by_clip[-1].append([])
            rows, pairs, count, streams, gates = [], [], 0, [], []
            for level, b in itertools.product(range(layers), range(batch)):
                clip, logits, kernel = (
                    clips[b],
                    prediction.logits[d][level, b],
                    prediction.mask_kernel[d][level, b],
                )
                own = held.setdefault((d, level, b), {})
                valid = [i for i in range(len(clip.labels)) if visible[b][i, times].any()]
                new = [i for i in valid if not visible[b][i, :first].any()]
                cost = slow_costs(
                    logits,
                    kernel,
                    features[b],
                    clip.labels[new],
                    clip.masks[new][:, times],
                    criterion,
                )
                for i in valid:
                    if i not in new and i in own:
                        cost[own[i]] = 1e6
                own |= {new[i]: int(query) for query, i in zip(*linear_sum_assignment(cost))}
                by_clip[-1][-1].append([own.get(i, -1) for i in range(len(clip.labels))])
                matched = {i: own[i] for i in valid if i in own}
                rows.append((logits, {query: int(clip.labels[i]) for i, query in matched.items()}))
                pairs += [
                    (paint(kernel[query], features[b]), clip.masks[i, times])
                    for i, query in matched.items()
                ]
                count += len(valid)
                gate, target = (
                    prediction.gate_logits[d][level, b],
                    torch.zeros(len(logits), dtype=torch.float64),
                )
                target[list(matched.values())] = 1
                gates.append(F.binary_cross_entropy_with_logits(gate, target))
                streams.append(
                    [(i, prediction.clip_embed[level, b, query]) for i, query in matched.items()]
                )
                for offset, t in enumerate(times):
                    streams[-1] += [
                        (i, prediction.frame_embed[level, b, offset, query])
                        for i, query in found[level][b * length + t].items()
                    ]
            suffix = f"_clip{number}" if d == depth - 1 else f"_{d}_clip{number}"
            losses[f"loss_genvis_ce{suffix}"] = SLOW["class"] * slow_class_loss(rows)
            losses[f"loss_genvis_gate{suffix}"] = SLOW["gate"] * sum(gates) / len(gates)
            add_masks(losses, "loss_genvis", suffix, pairs, count, criterion)
        of_clips.append(streams)
        first = times[-1] + 1
    if criterion.similarity_span == "clip":
        for number, streams in enumerate(of_clips):
            losses[f"loss_genvis_sim_clip{number}"] = SLOW["similarity"] * slow_similarity(streams)
    else:  # as much as of all clips together
        joined = [sum(members, []) for members in zip(*of_clips)]
        losses["loss_genvis_sim_clip0"] = (
            SLOW["similarity"] * len(of_clips) * slow_similarity(joined)
        )
    return losses, found, by_clip


@pytest.mark.parametrize("queries, span", [(6, "clip"), (2, "clip"), (6, "video")])
def test_all_losses_and_matches_are_loops(no_chance, queries, span):
    """Clips of 2, 2 and 1 frames, videos of 2, 0, 3 and 1 instances, that hide and come back; also
    more than there are queries.
    All losses, matches and gradients."""
    torch.manual_seed(queries)
    clips = [
        make_clip(visible)
        for visible in (
            [[1, 1, 0, 0, 1], [0, 0, 1, 1, 1]],
            [[0, 0, 0, 0, 0]],
            [[1, 1, 1, 0, 1], [1, 0, 0, 1, 0], [0, 0, 0, 0, 1]],
            [[0, 0, 1, 1, 0]],
        )
    ]
    clips[1] = Clip(clips[1].frames, clips[1].labels[:0], clips[1].masks[:0])
    output = random_output(batch=4, frames=5, clip_length=2, layers=2, depth=2, queries=queries)
    criterion = Criterion(
        CLASSES,
        SLOW["class"],
        SLOW["mask"],
        SLOW["dice"],
        SLOW["similarity"],
        SLOW["no object"],
        points=8,
        gate_weight=SLOW["gate"],
        similarity_span=span,
    )
    losses, (frame_matches, clip_matches) = criterion(output, clips)
    slow, frames, by_clip = slow_criterion(output, clips, criterion)
    assert losses.keys() == slow.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, slow[name], msg=lambda text: f"{name}: {text}")
    for (layer, matched), (n, _) in itertools.product(enumerate(frames), enumerate(frames[0])):
        video, t = divmod(n, 5)
        query_of = frame_matches.query_of[t, layer - len(frames), video].tolist()
        assert query_of == [matched[n].get(i, -1) for i in range(len(query_of))]
    for matched, expected in zip(clip_matches.query_of, by_clip, strict=True):
        for depth, streams in enumerate(expected):
            for stream, queries_of in enumerate(streams):  # l * B + b
                level, video = divmod(stream, 4)
                query_of = matched[2 * depth + level, video].tolist()
                assert query_of == queries_of + [-1] * (len(query_of) - len(queries_of))

    inputs = [output.frames.features, *itertools.chain(*output.frames.predictions)]
    for clip in output.clips:
        inputs += [
            *clip.logits,
            *clip.mask_kernel,
            clip.clip_embed,
            clip.frame_embed,
            *clip.gate_logits,
        ]
    ours, expected = (
        torch.autograd.grad(sum(values.values()), inputs) for values in (losses, slow)
    )
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


# What it asks of a GPU


class Operations(TorchDispatchMode):
    """Counts operations.

    None may need to know a value on the CPU, as these wait for the GPU: see `waiting`.
    """

    def __init__(self):
        super().__init__()
        self.counts, self.waiting = collections.Counter(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.counts[name] += 1
        masked = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for part in args[1:]
            if isinstance(part, list | tuple)
            for index in part
        )
        if masked or name in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "is_nonzero",
            "equal",
            "bincount",
            "unique_dim",
            "_unique2",
            "repeat_interleave",
        ):
            self.waiting.append(name)
        return function(*args, **(kwargs or {}))


def counted_step(instances: int, **options) -> Operations:
    """The operations of the criterion and its gradients for 2 videos of 3 frames."""
    torch.manual_seed(0)
    clips = [make_clip([[1, 1, 1]] * instances) for _ in range(2)]
    for clip in clips:
        clip.labels %= CLASSES
    output = random_output(batch=2, frames=3, clip_length=1)
    with Operations() as operations:
        losses, _ = Criterion(CLASSES, points=8, gate_weight=1.0, **options)(output, clips)
        sum(losses.values()).backward()
    return operations


@pytest.mark.parametrize("frozen", [True, False])
def test_operations_do_not_grow_with_instances(frozen):
    """As many for 2 instances as for 4, and none that synchronizes.

    Costs are copied as a whole, with .cpu().
    """
    two, four = (counted_step(instances, freeze_detector=frozen) for instances in (2, 4))
    assert two.counts == four.counts
    assert not two.waiting and not four.waiting


def test_waiting_operations_are_noticed():
    values = torch.rand(3)
    for wait in (
        lambda: values[values > 0.5],
        lambda: values.sum().item(),
        lambda: (values > 0.5).nonzero(),
        lambda: values.index_put((values > 0.5,), torch.zeros(())),
    ):
        with Operations() as operations:
            wait()
        assert operations.waiting


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch sees")
@pytest.mark.parametrize("frozen", [True, False])
def test_only_costs_wait_for_the_gpu(monkeypatch, frozen):
    """Outside CostsToCPU PyTorch raises an error at anything that waits, in the criterion and in
    its gradients."""
    torch.manual_seed(0)
    clips = [make_clip([[1, 1, 0], [0, 1, 1]]), make_clip([])]
    output = make_model().cuda()([clip.frames for clip in clips])
    inputs = [value for clip in output.clips for value in (*clip.logits, *clip.mask_kernel)]
    waits = []

    class Watched(CostsToCPU):
        def wait(self):
            torch.cuda.set_sync_debug_mode("default")
            waits.append(self)
            costs = super().wait()
            torch.cuda.set_sync_debug_mode("error")
            return costs

    monkeypatch.setattr(losses_module, "CostsToCPU", Watched)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses, _ = Criterion(CLASSES, points=32, gate_weight=1.0, freeze_detector=frozen)(
            output, clips
        )
        gradients = torch.autograd.grad(sum(losses.values()), inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 2 and all(
        value.isfinite().all() for value in (*losses.values(), *gradients)
    )


# The whole criterion on the toy model


def make_model(propagation: str = "gated"):
    return build_model("toy", CLASSES, propagation, backbone="four_convolutions")


@pytest.fixture(scope="module")
def toy_output() -> tuple[TrainingOutput, list[Clip]]:
    """Two videos of three frames."""
    torch.manual_seed(0)
    clips = [make_clip([[1, 1, 1], [0, 1, 1]]), make_clip([[1, 0, 1]])]
    return make_model()([clip.frames for clip in clips]), clips


def clip_names(prefix: str, suffix: str) -> set[str]:
    """Three decoder layers, the last one without a number and with the similarity loss."""
    return {f"{prefix}_sim{suffix}"} | {
        f"{prefix}_{name}{layer}{suffix}"
        for name in ("ce", "mask", "dice")
        for layer in ("", "_0", "_1")
    }


FRAME_NAMES = {
    f"loss_{name}{layer}" for name in ("ce", "mask", "dice") for layer in ("", "_0", "_1", "_2")
}


def test_loss_names(toy_output):
    """Four frame predictions (before the decoder's three layers and after each), three clips of one
    frame."""
    losses, matches = Criterion(CLASSES, points=32)(*toy_output)
    assert set(losses) == FRAME_NAMES.union(
        *(clip_names("loss_genvis", f"_clip{index}") for index in range(3))
    )
    assert all(loss.ndim == 0 and loss.isfinite() and loss > 0 for loss in losses.values())
    frames, clips = matches
    assert frames.query_of.shape == (3, 4, 2, 2)  # frames, layers, videos, instances
    assert clips.query_of.shape == (3, 3 * 3, 2, 2)  # clips, layers and levels

    output, clips = toy_output
    losses, _ = Criterion(CLASSES, points=32, gate_weight=1.0)(output, clips)
    assert {name for name in losses if "gate" in name} == {
        f"loss_genvis_gate{layer}_clip{index}" for layer in ("", "_0", "_1") for index in range(3)
    }


def test_loss_names_of_a_whole_video():
    torch.manual_seed(0)
    clip = make_clip([[1, 1, 1]])
    output = make_model("clip")([clip.frames])
    losses, _ = Criterion(CLASSES, points=32)(output, [clip], whole_video=True)
    assert set(losses) == FRAME_NAMES | clip_names("loss_vita", "")


def test_a_frozen_detector_has_no_frame_losses(toy_output, no_chance):
    """The frames are still matched, as the similarity loss needs it.

    All clip losses are the same.
    """
    losses, (matches, _) = Criterion(CLASSES, points=32)(*toy_output)
    frozen, (frozen_matches, _) = Criterion(CLASSES, points=32, freeze_detector=True)(*toy_output)
    assert set(frozen) == set(losses) - FRAME_NAMES
    for name, loss in frozen.items():
        assert torch.equal(loss, losses[name]), name
    assert torch.equal(frozen_matches.query_of, matches.query_of[:, -3:])


def test_losses_do_not_depend_on_the_precision_of_the_model(no_chance):
    """The step under bfloat16: the same losses as of what it predicted, turned into float32."""

    def in_full(values):
        if torch.is_tensor(values):
            return values.float()
        if isinstance(values, (list, tuple)):
            return type(values)(map(in_full, values))
        return (
            values
            if isinstance(values, int)
            else type(values)(**{name: in_full(value) for name, value in vars(values).items()})
        )

    torch.manual_seed(0)
    clips = [make_clip([[1, 1, 1], [0, 1, 1]]), make_clip([[1, 0, 1]])]
    with torch.autocast("cpu", torch.bfloat16):
        output = make_model()([clip.frames for clip in clips])
        losses, _ = Criterion(CLASSES, points=32, gate_weight=1.0)(output, clips)
    assert output.frames.features.dtype == torch.bfloat16
    exact, _ = Criterion(CLASSES, points=32, gate_weight=1.0)(in_full(output), clips)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[name], msg=lambda text, name=name: f"{name}: {text}")


def gates(losses):
    """How many gate losses there are."""
    return sum("gate" in name for name in losses)


def test_weights_scale_the_losses(toy_output, no_chance):
    """Those of matching and losses are the same; all three times as large, they match as before."""
    weights = dict(
        class_weight=6.0,
        mask_weight=15.0,
        dice_weight=15.0,
        similarity_weight=1.0,
        gate_weight=0.25,
    )
    one = Criterion(CLASSES, points=32, gate_weight=1.0)(*toy_output)[0]
    other = Criterion(CLASSES, points=32, **weights)(*toy_output)[0]
    for name in one:
        factor = 2 if "sim" in name else 0.25 if "gate" in name else 3
        torch.testing.assert_close(other[name], factor * one[name])
    unweighted = Criterion(CLASSES, points=32, similarity_weight=0)(*toy_output)[0]
    assert all(loss == 0 for name, loss in unweighted.items() if "sim" in name) and len(
        unweighted
    ) == len(one) - gates(one)


@pytest.mark.parametrize("propagation", ["gated", "memory", "clip"])
def test_videos_without_instances(propagation):
    """Nothing to find: masks cost nothing, classes learn "no object", and every parameter still
    gets a finite gradient,
    which training on several GPUs counts on."""
    torch.manual_seed(0)
    model = make_model(propagation)
    clips = [make_clip([]), make_clip([])]
    output = model([clip.frames for clip in clips])
    losses, matches = Criterion(CLASSES, points=32)(output, clips, propagation == "clip")
    for name, loss in losses.items():
        assert loss.isfinite() and (loss > 0 if "_ce" in name else loss == 0), name
    assert all((part.query_of == -1).all() for part in matches)
    sum(losses.values()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(
        gradient is not None and gradient.isfinite().all() for gradient in gradients.values()
    ), [name for name, gradient in gradients.items() if gradient is None]
    assert gradients["tracker.class_embed.weight"].abs().sum() > 0


def test_a_mask_has_the_official_numbers_of_points():
    """3 candidates a point; three quarters of the points are the most uncertain of them."""
    criterion = Criterion(3, points=12544)
    assert (criterion.points, criterion.candidates, criterion.uncertain) == (12544, 37632, 9408)


def test_instances_without_a_query_count():
    """As upstream, a mean is over all visible instances, also if there are more than queries."""
    visible = torch.tensor([[[True, True, False]]])
    matches = Matches(torch.tensor([[[[0, -1, -1]]]] * 2).transpose(0, 1), visible, None)
    predictions = Predictions(torch.zeros(1, 2, 1, 1, CLASSES + 1), None, None, 1)
    assert count_visible(predictions, matches).tolist() == [[2.0, 2.0]]
