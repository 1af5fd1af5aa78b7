"""Matching and losses: every formula against a loop or numbers written out, and identities that last over clips.

Most predictions are made by hand: a query "painted" to fit an instance has its mask and its class.
"""
import itertools
import math

import numpy
import pytest
import torch
import torch.nn.functional as F

import matcher
from clips import Clip
from matcher import Criterion, Targets, assign, average_over_processes, match_cost, pad_targets, sample_at
from model import FrameOutput, TrainingOutput, build_model
from tracker import ClipPrediction

CLASSES = 3
WEIGHTS = {"class": 2.0, "mask": 5.0, "dice": 5.0}
SIZE = (16, 24)


def fixed_points(rows: int, count: int, like: torch.Tensor) -> torch.Tensor:
    """Points without chance: the same for every row."""
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, 2, generator=generator, dtype=torch.float64).to(like).expand(rows, -1, -1)


@pytest.fixture
def no_chance(monkeypatch):
    monkeypatch.setattr(matcher, "random_points", fixed_points)


def make_clip(visible: list[list[int]]) -> Clip:
    """Instance i: class i, id 10 + i, a column of the frame where visible[i][t]. Black frames, 3 if there is none."""
    instances, frames = len(visible), len(visible[0]) if visible else 3
    shown, number = torch.tensor(visible, dtype=torch.bool).view(instances, frames), torch.arange(instances)
    masks = torch.zeros(instances, frames, *SIZE, dtype=torch.bool)
    for index in range(instances):
        masks[index, shown[index], 2:14, 6 * index:6 * index + 5] = True
    ids = torch.where(shown, 10 + number[:, None], -1)
    return Clip(torch.zeros(frames, 3, *SIZE, dtype=torch.uint8), number, ids, masks)


def make_targets(clip: Clip) -> Targets:
    return pad_targets(clip, SIZE, torch.device("cpu"))


def random_output(batch: int, frames: int, clip_length: int, layers: int = 2, depth: int = 2, queries: int = 6,
                  channels: int = 8) -> TrainingOutput:
    """Random predictions of the shapes that the model makes in training, with gradients."""
    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def clip(length):
        streams = layers, batch
        logits = [random(*streams, queries, CLASSES + 1) for _ in range(depth)]
        embeds = [random(*streams, queries, channels) for _ in range(depth)]
        gates = [random(*streams, queries) for _ in range(depth)]
        return ClipPrediction(logits, embeds, random(*streams, queries, channels),
                              random(*streams, length, queries, channels), gates, [gate.sigmoid() for gate in gates])

    height, width = SIZE[0] // 4, SIZE[1] // 4
    predictions = [(random(batch * frames, queries, CLASSES + 1), random(batch * frames, queries, channels))
                   for _ in range(layers + 1)]
    frame_output = FrameOutput(predictions, random(batch * frames, channels, height, width),
                               random(layers, batch * frames, queries, channels), random(1))
    lengths = [min(clip_length, frames - first) for first in range(0, frames, clip_length)]
    return TrainingOutput(frame_output, [clip(length) for length in lengths],
                          [random(batch, length, channels, height, width) for length in lengths], SIZE)


def only_video(output: TrainingOutput, video: int, batch: int) -> TrainingOutput:
    """The predictions for one video of a batch."""
    own, one = slice(video, video + 1), slice(None)
    frames = len(output.frames.predictions[0][0]) // batch
    rows = slice(video * frames, (video + 1) * frames)
    frame_output = FrameOutput([(logits[rows], embeds[rows]) for logits, embeds in output.frames.predictions],
                               output.frames.features[rows], output.frames.queries[:, rows], output.frames.mask_features)
    clips = [ClipPrediction(*([x[one, own] for x in part] if isinstance(part, list) else part[one, own]
                              for part in vars(clip).values())) for clip in output.clips]
    return TrainingOutput(frame_output, clips, [features[own] for features in output.mask_features], output.padded_size)


# Costs and assignment

def test_match_cost_is_a_loop():
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 4, CLASSES + 1), torch.randn(2, 4, 6)
    labels, truth = torch.tensor([[0, 2, 2], [1, 0, 2]]), torch.rand(2, 3, 6)
    cost = match_cost(logits, masks, labels, truth, {"class": 2.0, "mask": 3.0, "dice": 7.0})
    assert cost.shape == (2, 4, 3)
    for row, query, instance in itertools.product(range(2), range(4), range(3)):
        mask, true = masks[row, query], truth[row, instance]
        probability = logits[row, query].softmax(0)[labels[row, instance]]
        bce = F.binary_cross_entropy_with_logits(mask, true)
        dice = 1 - (2 * (mask.sigmoid() * true).sum() + 1) / (mask.sigmoid().sum() + true.sum() + 1)
        torch.testing.assert_close(cost[row, query, instance], -2 * probability + 3 * bce + 7 * dice)


@pytest.mark.parametrize("queries, instances", [(5, 3), (4, 4), (2, 4), (3, 0)])
def test_assign_is_the_best_of_all_ways(queries, instances):
    """With more instances than queries some stay without: -1."""
    cost = numpy.random.default_rng(0).normal(size=(queries, instances))
    query_of = assign(cost)
    matched = query_of >= 0
    assert len(query_of) == instances and int(matched.sum()) == min(queries, instances)
    assert len(query_of[matched].unique()) == int(matched.sum())                        # no query twice
    if queries >= instances:
        ways = [list(zip(way, range(instances))) for way in itertools.permutations(range(queries), instances)]
    else:
        ways = [list(zip(range(queries), way)) for way in itertools.permutations(range(instances), queries)]
    best = min(ways, key=lambda way: sum(cost[pair] for pair in way))
    assert sorted(best) == sorted((int(query), i) for i, query in enumerate(query_of) if query >= 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_assign_refuses_what_is_not_finite(value):
    cost = numpy.zeros((3, 2))
    cost[1, 1] = value
    with pytest.raises(FloatingPointError, match="learning rate"):
        assign(cost)


# Points

def test_sample_at_by_hand():
    """Pixel centres of a 2 x 2 map lie at 1/4 and 3/4; beyond the border everything is 0."""
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    at = {(0.25, 0.25): 1, (0.75, 0.25): 2, (0.25, 0.75): 3, (0.5, 0.5): 2.5, (0.75, 0.5): 3,     # (x, y)
          (0.0, 0.0): 0.25, (0.5, 0.0): 0.75, (1.0, 0.5): 1.5, (1.5, 0.5): 0}
    values = sample_at(maps, torch.tensor([list(at)]))
    assert values.shape == (1, 1, 9) and values[0, 0].tolist() == list(at.values())


def test_uncertain_points(monkeypatch):
    """24 candidates, the 6 of smallest absolute logit are kept, 2 more are drawn anywhere."""
    drawn = []

    def recorded(rows, count, like):
        drawn.append(torch.rand(rows, count, 2, dtype=like.dtype))
        return drawn[-1]

    monkeypatch.setattr(matcher, "random_points", recorded)
    torch.manual_seed(0)
    logits = torch.randn(2, 1, 5, 7)
    points = Criterion(CLASSES, points=8, oversample=3, importance=0.75).uncertain_points(logits)
    candidates, rest = drawn
    assert points.shape == (2, 8, 2) and candidates.shape == (2, 24, 2) and rest.shape == (2, 2, 2)
    for row in range(2):
        own = logits[row:row + 1]
        ranked = sorted(candidates[row], key=lambda point: sample_at(own, point[None, None]).abs().item())
        assert sorted(points[row, :6].tolist()) == sorted(point.tolist() for point in ranked[:6])
    assert torch.equal(points[:, 6:], rest)


# Identities

def test_an_instance_keeps_its_query():
    """Query 2 fits instance 0 best when it appears; that query 0 fits better later changes nothing."""
    cost = numpy.array([[5.0, 9.0], [6.0, 1.0], [2.0, 9.0]])
    first = Criterion.match_clip(cost, torch.tensor([True, False]), torch.tensor([True, False]), None)
    assert first.tolist() == [2, -1]                                    # instance 1 was not seen yet
    later = numpy.array([[0.0, 4.0], [6.0, 3.0], [9.0, 0.0]])
    second = Criterion.match_clip(later, torch.tensor([False, True]), torch.tensor([True, True]), first)
    assert second.tolist() == [2, 1]                                    # query 2 is taken, 1 fits better than 0
    assert first.tolist() == [2, -1]                                    # what was handed in stays as it was
    third = Criterion.match_clip(later, torch.tensor([False, False]), torch.tensor([False, True]), second)
    assert third.tolist() == [2, 1]                                     # also while it is occluded


def test_a_new_instance_may_take_the_query_of_an_occluded_one():
    cost, new, held = numpy.array([[9.0, 0.0], [9.0, 5.0]]), torch.tensor([False, True]), torch.tensor([0, -1])
    assert Criterion.match_clip(cost, new, torch.tensor([True, True]), held).tolist() == [0, 1]
    assert Criterion.match_clip(cost, new, torch.tensor([False, True]), held).tolist() == [0, 0]


def painted_output(clip: Clip, plan: list[list[int]], queries: int = 4) -> TrainingOutput:
    """Clips of one frame; in clip t, query plan[t][i] is painted to fit instance i. One stream, one decoder layer."""
    instances, frames = clip.ids.shape
    signs = torch.where(clip.masks, 20.0, -20.0)
    signs[clip.ids == -1] = -20.0
    clips, predictions = [], (torch.zeros(frames, queries, CLASSES + 1), torch.zeros(frames, queries, instances))
    for t, row in enumerate(plan):
        logits, embed = torch.zeros(queries, CLASSES + 1), torch.zeros(queries, instances)
        logits[:, -1] = 5
        for instance, query in enumerate(row):
            logits[query] = 10 * F.one_hot(clip.labels[instance], CLASSES + 1)
            embed[query, instance] = 1
        predictions[0][t] = logits
        predictions[1][t] = embed
        clips.append(ClipPrediction([logits[None, None]], [embed[None, None]], torch.zeros(1, 1, queries, 2),
                                    torch.zeros(1, 1, 1, queries, 2), [], []))
    features = [signs[None, :, t][:, None] for t in range(frames)]      # (B, T, C, h, w) of each clip
    return TrainingOutput(FrameOutput([predictions], signs.transpose(0, 1), torch.zeros(1, frames, queries, 2), torch.zeros(0)),
                          clips, features, SIZE)


def test_matches_of_painted_queries():
    """Instance 1 appears in frame 1, instance 0 hides in frame 2. Frames are matched anew, clips keep the identity."""
    clip = make_clip([[1, 1, 0, 1], [0, 1, 1, 1]])
    plan = [[2, 0], [2, 3], [2, 3], [3, 2]]                             # in the last clip the fits are swapped
    torch.manual_seed(0)
    losses, matches = Criterion(CLASSES, points=200)(painted_output(clip, plan), [clip])
    assert [[query.tolist() for query in layer] for layer in matches.frames] == [[[2], [2, 3], [3], [3, 2]]]
    assert [query_of[0][0].tolist() for query_of in matches.clips] == [[2, -1], [2, 3], [2, 3], [2, 3]]
    fits, swapped = losses["loss_genvis_ce_clip1"], losses["loss_genvis_ce_clip3"]
    assert fits < 0.1 < swapped                                         # the queries of the last clip are to blame
    assert losses["loss_genvis_mask_clip1"] < losses["loss_genvis_mask_clip3"]
    # while hidden, the query of instance 0 has to say "no object", and it says class 0
    unhidden = Criterion(CLASSES).class_loss(painted_output(clip, plan).clips[2].logits[0][0],
                                             (torch.tensor([0, 0]), torch.tensor([2, 3])), clip.labels)
    assert unhidden < 0.1 < losses["loss_genvis_ce_clip2"]


def test_clip_costs_are_a_loop(monkeypatch):
    """One set of points a video, used in all its frames; the sampled mask of a query is that of all frames, joined."""
    torch.manual_seed(0)
    points = torch.rand(2, 9, 2, dtype=torch.float64)
    monkeypatch.setattr(matcher, "random_points", lambda rows, count, like: points)
    clips, output = [make_clip([[1, 1, 0]]), make_clip([[0, 1, 1], [1, 1, 1]])], random_output(2, 3, clip_length=2)
    targets, criterion = [make_targets(clip) for clip in clips], Criterion(CLASSES, points=9)
    prediction, features, frames = output.clips[0], output.mask_features[0], slice(0, 2)
    costs = criterion.clip_costs(prediction, features, targets, frames)
    assert costs.shape == (2, 4, 6, 2)                                  # (D, S, Q, I)
    for depth, layer, video in itertools.product(range(2), range(2), range(2)):
        at = points[video:video + 1]
        masks = torch.einsum("qc,tchw->tqhw", prediction.mask_embed[depth][layer, video], features[video])
        sampled = torch.cat([sample_at(mask[None], at)[0] for mask in masks], 1)
        truth = torch.cat([sample_at(targets[video].masks[None, :, t].double(), at)[0] for t in (0, 1)], 1)
        expected = match_cost(prediction.logits[depth][layer, video], sampled, targets[video].labels, truth, WEIGHTS)
        instances = len(targets[video].labels)
        torch.testing.assert_close(torch.from_numpy(costs[depth, 2 * layer + video])[:, :instances], expected)


def test_a_batch_is_matched_as_its_videos_alone(no_chance):
    """Three videos, one without instances: matches are those of each video; mask losses add up."""
    torch.manual_seed(0)
    clips = [make_clip(visible) for visible in (
        [[1, 0, 1, 1], [0, 0, 1, 0]], [[0, 0, 0, 0]], [[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]])]
    clips[2].labels = torch.tensor([2, 0, 0])
    output, criterion = random_output(batch=3, frames=4, clip_length=2), Criterion(CLASSES, points=40)
    losses, matches = criterion(output, clips)
    sums = dict.fromkeys(losses, 0.0)
    for video, clip in enumerate(clips):
        own_losses, own = criterion(only_video(output, video, 3), [clip])
        for together, alone in zip(matches.frames, own.frames, strict=True):
            assert [m.tolist() for m in together[4 * video:4 * video + 4]] == [m.tolist() for m in alone]
        for together, alone in zip(matches.clips, own.clips, strict=True):
            for one, other in zip(together, alone, strict=True):        # streams are layer-major: every third is its
                assert [m.tolist() for m in one[video::3]] == [m.tolist() for m in other]
        for name, loss in own_losses.items():
            sums[name] += loss * instances_of([clip], name)
    for name, loss in losses.items():
        if "mask" in name or "dice" in name:
            torch.testing.assert_close(loss * instances_of(clips, name), sums[name])


def instances_of(clips: list[Clip], name: str) -> int:
    """What a mask loss is divided by: visible instances of the frames, or of the clip of 2 frames in both layers."""
    if "clip" not in name:
        return max(1, sum(int((clip.ids != -1).sum()) for clip in clips))
    frames = slice(2 * int(name[-1]), 2 * int(name[-1]) + 2)
    return max(1, 2 * sum(int((clip.ids[:, frames] != -1).any(1).sum()) for clip in clips))


def test_two_equal_streams_cost_as_one(no_chance):
    """Mask losses are averaged over the instances of all L streams."""
    torch.manual_seed(0)
    one, clip = random_output(batch=1, frames=2, clip_length=1, layers=1), make_clip([[1, 1], [0, 1]])
    doubled = [ClipPrediction(*([torch.cat((x, x)) for x in part] if isinstance(part, list) else torch.cat((part, part))
                                for part in vars(clip).values())) for clip in one.clips]
    frames = FrameOutput(one.frames.predictions, one.frames.features, torch.cat((one.frames.queries, one.frames.queries)), torch.zeros(0))
    two = TrainingOutput(frames, doubled, one.mask_features, SIZE)
    (single, _), (double, matches) = (Criterion(CLASSES, points=40)(output, [clip]) for output in (one, two))
    assert len(matches.clips[0][0]) == 2
    for name, loss in double.items():
        if "sim" not in name:                                           # which sees other frame predictions
            torch.testing.assert_close(loss, single[name])


# Targets

def test_pad_targets():
    """Zeros right and bottom; an empty mask does not show its instance; who is never seen is dropped."""
    masks = torch.zeros(3, 2, 4, 5, dtype=torch.bool)
    masks[0, :, 1, 2] = masks[2, 1, 3, 4] = True
    clip = Clip(torch.zeros(2, 3, 4, 5, dtype=torch.uint8), torch.tensor([0, 1, 2]),
                torch.tensor([[7, 7], [8, 8], [9, 9]]), masks)
    targets = pad_targets(clip, (6, 8), torch.device("cpu"))
    assert targets.labels.tolist() == [0, 2] and targets.ids.tolist() == [[7, 7], [-1, 9]]
    assert targets.visible.tolist() == [[True, True], [False, True]]
    assert targets.masks.shape == (2, 2, 6, 8)
    assert targets.masks.nonzero().tolist() == [[0, 0, 1, 2], [0, 1, 1, 2], [1, 1, 3, 4]]
    assert clip.ids[2].tolist() == [9, 9]                               # the clip itself stays as it was


def test_average_over_processes(monkeypatch):
    like = torch.zeros(())
    assert [average_over_processes(count, like).item() for count in (0, 1, 7)] == [1, 1, 7]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda count: count.add_(3))   # the other process has 3
    assert [average_over_processes(count, like).item() for count in (0, 7)] == [1.5, 5]


# Single losses

def test_class_loss_weights_no_object():
    """Queries without an instance count a tenth, and so does their share of the mean."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, CLASSES + 1)
    loss = Criterion(CLASSES).class_loss(logits, (torch.tensor([0, 1]), torch.tensor([2, 0])), torch.tensor([1, 0]))
    total = weight = 0
    for row, query, target in [(0, 0, 3), (0, 1, 3), (0, 2, 1), (1, 0, 0), (1, 1, 3), (1, 2, 3)]:
        share = 0.1 if target == CLASSES else 1.0
        total = total - share * logits[row, query].log_softmax(0)[target]
        weight += share
    torch.testing.assert_close(loss, total / weight)


def test_mask_losses_are_a_loop(no_chance):
    """The frames of an instance are joined before dice; both losses are sums over instances, divided by count."""
    torch.manual_seed(0)
    criterion = Criterion(CLASSES, points=8)
    logits, truth = torch.randn(2, 3, 4, 6), torch.rand(2, 3, 8, 12) < 0.5
    losses = criterion.mask_losses(logits, truth, torch.tensor(5.0))
    bce = dice = 0
    for instance in range(2):
        sampled, true = [], []
        for t in range(3):
            at = criterion.uncertain_points(logits[instance, t][None, None])
            sampled.append(sample_at(logits[instance, t][None, None], at).flatten())
            true.append(sample_at(truth[instance, t][None, None].float(), at).flatten())
        sampled, true = torch.cat(sampled), torch.cat(true)
        bce = bce + F.binary_cross_entropy_with_logits(sampled, true)
        inside = sampled.sigmoid()
        dice = dice + 1 - (2 * (inside * true).sum() + 1) / (inside.sum() + true.sum() + 1)
    torch.testing.assert_close(losses["mask"], bce / 5)
    torch.testing.assert_close(losses["dice"], dice / 5)


def test_similarity_loss_is_a_loop_over_pairs():
    """Two videos, two layers, a clip of frames 1 and 2 of three: pairs of one stream, same id or not."""
    torch.manual_seed(0)
    targets = [make_targets(make_clip([[1, 1, 0], [1, 0, 1]])), make_targets(make_clip([[0, 1, 1]]))]
    prediction = random_output(batch=2, frames=2, clip_length=2).clips[0]
    frame_matches = [[torch.tensor(queries) for queries in layer] for layer in (        # [layer][video, frame]; -1: no
        [[0, 1], [2], [3], [], [4], [5]], [[1, 0], [3], [2], [], [5], [-1]])]
    query_of = [torch.tensor(queries) for queries in ([4, 1], [2], [0, 5], [3])]        # [stream l * B + b]
    index = torch.tensor([0, 0, 2, 2, 1, 3]), torch.tensor([4, 1, 0, 5, 2, 3])          # video by video, then streams
    loss = Criterion(CLASSES).similarity_loss(prediction, targets, slice(1, 3), frame_matches, index, query_of)

    total = pairs = 0
    for layer, video in itertools.product(range(2), range(2)):
        members = []                                                                    # (id, embedding) of this stream
        for t in (1, 2):
            shown = targets[video].ids[:, t][targets[video].visible[:, t]]
            for identity, query in zip(shown, frame_matches[layer][3 * video + t], strict=True):
                if query >= 0:
                    members.append((int(identity), prediction.frame_embed[layer, video, t - 1, query]))
        for identity, query in zip((10, 11), query_of[2 * layer + video]):
            members.append((identity, prediction.clip_embed[layer, video, query]))
        for (one, first), (other, second) in itertools.product(members, members):
            target = torch.tensor(float(one == other), dtype=torch.float64)
            total = total + F.binary_cross_entropy_with_logits(first @ second, target)
            pairs += 1
    assert pairs == 4 * 4 + 4 * 4 + 3 * 3 + 2 * 2
    torch.testing.assert_close(loss, total / (pairs + 1e-6))


def test_gate_losses():
    """One open gate of two, as it should be: "logits" reaches 0; "released" squashes the gate twice and cannot."""
    logits = torch.tensor([50.0, -50.0])[None, None]
    prediction = ClipPrediction([], [], torch.zeros(0), torch.zeros(0), [logits], [logits.sigmoid()])
    right, wrong = ((torch.tensor([0]), torch.tensor([query])) for query in (0, 1))     # the matched query
    loss, released = (Criterion(CLASSES, gate_loss=kind).gate_loss for kind in matcher.GATE_LOSSES)
    assert loss(prediction, 0, right).item() == pytest.approx(0, abs=1e-6)
    assert loss(prediction, 0, wrong).item() == pytest.approx(50)
    assert released(prediction, 0, right).item() == pytest.approx((math.log1p(math.exp(-1)) + math.log(2)) / 2)
    assert released(prediction, 0, wrong).item() == pytest.approx((math.log(2) + math.log1p(math.exp(1))) / 2)
    with pytest.raises(ValueError, match="logits, released"):
        Criterion(CLASSES, gate_loss="hinge")


# The whole criterion on the toy model

@pytest.fixture(scope="module")
def toy_output() -> tuple[TrainingOutput, list[Clip]]:
    """Two videos of three frames."""
    torch.manual_seed(0)
    clips = [make_clip([[1, 1, 1], [0, 1, 1]]), make_clip([[1, 0, 1]])]
    return build_model("toy", CLASSES)([clip.frames for clip in clips]), clips


def clip_names(prefix: str, suffix: str) -> set[str]:
    """Three decoder layers, the last one without a number and with the similarity loss."""
    return {f"{prefix}_sim{suffix}"} | {
        f"{prefix}_{name}{layer}{suffix}" for name in ("ce", "mask", "dice") for layer in ("", "_0", "_1")}


FRAME_NAMES = {f"loss_{name}{layer}" for name in ("ce", "mask", "dice") for layer in ("", "_0", "_1", "_2")}


def test_loss_names(toy_output):
    """Four frame predictions (before the decoder's three layers and after each), three clips of one frame."""
    losses, matches = Criterion(CLASSES, points=32)(*toy_output)
    assert set(losses) == FRAME_NAMES.union(*(clip_names("loss_genvis", f"_clip{index}") for index in range(3)))
    assert all(loss.ndim == 0 and loss.isfinite() and loss > 0 for loss in losses.values())
    assert len(matches.frames) == 3 and len(matches.frames[0]) == 6     # layers handed on, frames of both videos
    assert len(matches.clips) == 3 and len(matches.clips[0]) == 3 and len(matches.clips[0][0]) == 6

    output, clips = toy_output
    losses, _ = Criterion(CLASSES, points=32, gate_weight=1.0)(output, clips)
    assert {name for name in losses if "gate" in name} == {
        f"loss_genvis_gate{layer}_clip{index}" for layer in ("", "_0", "_1") for index in range(3)}


def test_loss_names_of_a_whole_video():
    torch.manual_seed(0)
    clip = make_clip([[1, 1, 1]])
    output = build_model("toy", CLASSES, "clip")([clip.frames])
    losses, _ = Criterion(CLASSES, points=32)(output, [clip], whole_video=True)
    assert set(losses) == FRAME_NAMES | clip_names("loss_vita", "")


def test_a_frozen_detector_has_no_frame_losses(toy_output, no_chance):
    """The frames are still matched, as the similarity loss needs it: all clip losses are the same."""
    losses, matches = Criterion(CLASSES, points=32)(*toy_output)
    frozen, frozen_matches = Criterion(CLASSES, points=32, freeze_detector=True)(*toy_output)
    assert set(frozen) == set(losses) - FRAME_NAMES
    for name, loss in frozen.items():
        assert torch.equal(loss, losses[name]), name
    assert [[query.tolist() for query in layer] for layer in frozen_matches.frames] == [
        [query.tolist() for query in layer] for layer in matches.frames]


def gates(losses):
    """How many gate losses there are."""
    return sum("gate" in name for name in losses)


def test_weights_scale_the_losses(toy_output, no_chance):
    """Those of matching and losses are the same; all three times as large, they match as before."""
    weights = dict(class_weight=6.0, mask_weight=15.0, dice_weight=15.0, similarity_weight=1.0, gate_weight=0.25)
    one = Criterion(CLASSES, points=32, gate_weight=1.0)(*toy_output)[0]
    other = Criterion(CLASSES, points=32, **weights)(*toy_output)[0]
    for name in one:
        factor = 2 if "sim" in name else 0.25 if "gate" in name else 3
        torch.testing.assert_close(other[name], factor * one[name])
    unweighted = Criterion(CLASSES, points=32, similarity_weight=0)(*toy_output)[0]
    assert all(loss == 0 for name, loss in unweighted.items() if "sim" in name) and len(unweighted) == len(one) - gates(one)


@pytest.mark.parametrize("propagation", ["gated", "memory", "clip"])
def test_videos_without_instances(propagation):
    """Nothing to find: masks cost nothing, classes learn "no object", and every parameter still gets a finite gradient,
    which training on several GPUs counts on."""
    torch.manual_seed(0)
    model, clips = build_model("toy", CLASSES, propagation), [make_clip([]), make_clip([])]
    output = model([clip.frames for clip in clips])
    losses, matches = Criterion(CLASSES, points=32)(output, clips, propagation == "clip")
    for name, loss in losses.items():
        assert loss.isfinite() and (loss > 0 if "_ce" in name else loss == 0), name
    assert all(len(query_of) == 0 for clip in matches.clips for layer in clip for query_of in layer)
    sum(losses.values()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values()), [
        name for name, gradient in gradients.items() if gradient is None]
    assert gradients["tracker.class_embed.weight"].abs().sum() > 0
