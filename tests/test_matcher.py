"""Matching and losses: every formula against a loop or numbers written out, and identities that last over clips.

Most predictions are made by hand: a query "painted" to fit an instance has its mask and its class.
"""
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
    average_over_processes,
    quotients,
    similarity_index,
    similarity_losses,
)
from matcher import (
    Matching,
    Targets,
    assign,
    bring_costs,
    clip_predictions,
    frame_predictions,
    gather_at,
    match_clip,
    match_cost,
    matching_costs,
    pad_targets,
    sample_at,
    uncertain_points,
)
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


def make_targets(*clips: Clip) -> Targets:
    return pad_targets(list(clips), SIZE, torch.device("cpu"))


def random_output(batch: int, frames: int, clip_length: int, layers: int = 2, depth: int = 2, queries: int = 6,
                  channels: int = 8) -> TrainingOutput:
    """Random predictions of the shapes that the model makes in training, with gradients."""
    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def clip(length):
        streams = layers, batch
        logits = [random(*streams, queries, CLASSES + 1) for _ in range(depth)]
        embeds, kernels = ([random(*streams, queries, channels + extra) for _ in range(depth)] for extra in (0, 1))
        gates = [random(*streams, queries) for _ in range(depth)]
        return ClipPrediction(logits, embeds, kernels, random(*streams, queries, channels),
                              random(*streams, length, queries, channels), gates, [gate.sigmoid() for gate in gates])

    height, width = SIZE[0] // 4, SIZE[1] // 4
    predictions = [(random(batch * frames, queries, CLASSES + 1), random(batch * frames, queries, channels + 1))
                   for _ in range(layers + 1)]
    frame_output = FrameOutput(predictions, random(layers, batch * frames, queries, channels),
                               random(batch * frames, channels, height, width))
    lengths = [min(clip_length, frames - first) for first in range(0, frames, clip_length)]
    return TrainingOutput(frame_output, [clip(length) for length in lengths], SIZE)


def only_video(output: TrainingOutput, video: int, batch: int) -> TrainingOutput:
    """The predictions for one video of a batch."""
    own, one = slice(video, video + 1), slice(None)
    frames = len(output.frames.predictions[0][0]) // batch
    rows = slice(video * frames, (video + 1) * frames)
    frame_output = FrameOutput([(logits[rows], kernels[rows]) for logits, kernels in output.frames.predictions],
                               output.frames.queries[:, rows], output.frames.features[rows])
    clips = [ClipPrediction(*([x[one, own] for x in part] if isinstance(part, list) else part[one, own]
                              for part in vars(clip).values())) for clip in output.clips]
    return TrainingOutput(frame_output, clips, output.padded_size)


def paint(kernel: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Mask logits (..., T, h, w) of kernels (..., C + 1) on features (T, C, h, w)."""
    return torch.einsum("...c,tchw->...thw", kernel[..., :-1], features) + kernel[..., -1, None, None, None]


# Costs and assignment

def test_match_cost_is_a_loop():
    """Two clips, of two frames and of one: the frames of a clip are joined."""
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 2, 4, CLASSES + 1), torch.randn(3, 2, 4, 6)
    labels, truth = torch.tensor([0, 2, 2]), torch.rand(3, 3, 6)
    cost = match_cost(logits, masks, labels, truth, torch.tensor([0, 0, 1]), {"class": 2.0, "mask": 3.0, "dice": 7.0})
    assert cost.shape == (2, 2, 4, 3)
    for clip, layer, query, instance in itertools.product(range(2), range(2), range(4), range(3)):
        frames = ([0, 1], [2])[clip]
        mask, true = masks[frames, layer, query].flatten(), truth[frames, instance].flatten()
        probability = logits[clip, layer, query].softmax(0)[labels[instance]]
        bce = F.binary_cross_entropy_with_logits(mask, true)
        dice = 1 - (2 * (mask.sigmoid() * true).sum() + 1) / (mask.sigmoid().sum() + true.sum() + 1)
        torch.testing.assert_close(cost[clip, layer, query, instance], -2 * probability + 3 * bce + 7 * dice)


@pytest.mark.parametrize("queries, instances", [(5, 3), (4, 4), (2, 4), (3, 0)])
def test_assign_is_the_best_of_all_ways(queries, instances):
    """With more instances than queries some stay without: -1."""
    cost = numpy.random.default_rng(0).normal(size=(queries, instances))
    query_of = assign(cost)
    matched = query_of >= 0
    assert len(query_of) == instances and int(matched.sum()) == min(queries, instances)
    assert len(set(query_of[matched])) == int(matched.sum())                            # no query twice
    if queries >= instances:
        ways = [list(zip(way, range(instances))) for way in itertools.permutations(range(queries), instances)]
    else:
        ways = [list(zip(range(queries), way)) for way in itertools.permutations(range(instances), queries)]
    best = min(ways, key=lambda way: sum(cost[pair] for pair in way))
    assert sorted(best) == sorted((int(query), i) for i, query in enumerate(query_of) if query >= 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_costs_that_are_not_finite_are_high(value):
    costs = [torch.rand(1, 2, 3, 4), torch.rand(2, 1, 3, 0), torch.rand(2, 1, 3, 2)]
    for cost, brought in zip(costs, bring_costs(costs), strict=True):
        assert numpy.array_equal(cost.numpy(), brought)
    costs[2][1, 0, 1, 1] = value
    assert bring_costs(costs)[2][1, 0, 1, 1] == matcher.EXCLUDED


# Points

def test_sample_at_by_hand():
    """Pixel centres of a 2 x 2 map lie at 1/4 and 3/4; beyond the border everything is 0."""
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    at = {(0.25, 0.25): 1, (0.75, 0.25): 2, (0.25, 0.75): 3, (0.5, 0.5): 2.5, (0.75, 0.5): 3,     # (x, y)
          (0.0, 0.0): 0.25, (0.5, 0.0): 0.75, (1.0, 0.5): 1.5, (1.5, 0.5): 0}
    values = sample_at(maps, torch.tensor([list(at)]))
    assert values.shape == (1, 1, 9) and values[0, 0].tolist() == list(at.values())


def test_gather_at_is_sample_at():
    """What --deterministic runs on a GPU: the same values and gradients, at points outside the map too."""
    maps = torch.randn(3, 5, 7, 9, dtype=torch.float64, requires_grad=True)
    points = torch.rand(3, 40, 2, dtype=torch.float64) * 1.4 - 0.2
    upstream = torch.randn(3, 5, 40, dtype=torch.float64)
    both = [(values, torch.autograd.grad(values, maps, upstream)[0]) for values in (sample_at(maps, points), gather_at(maps, points))]
    torch.testing.assert_close(*both, rtol=0, atol=1e-13)


def test_uncertain_points(monkeypatch):
    """24 candidates, the 6 of smallest absolute logit are kept, 2 more are drawn anywhere."""
    drawn = []

    def recorded(rows, count, like):
        drawn.append(torch.rand(rows, count, 2, dtype=like.dtype))
        return drawn[-1]

    monkeypatch.setattr(matcher, "random_points", recorded)
    torch.manual_seed(0)
    logits = torch.randn(2, 1, 5, 7)
    points = uncertain_points(logits, 8, candidates=24, uncertain=6)
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
    no, yes = False, True
    cost, held = numpy.array([[5.0, 9.0], [6.0, 1.0], [2.0, 9.0]]), numpy.array([-1, -1])
    first = match_clip(cost, numpy.array([yes, no]), numpy.array([yes, no]), held)
    assert first.tolist() == [2, -1]                                    # instance 1 was not seen yet
    later = numpy.array([[0.0, 4.0], [6.0, 3.0], [9.0, 0.0]])
    second = match_clip(later, numpy.array([no, yes]), numpy.array([yes, yes]), first)
    assert second.tolist() == [2, 1]                                    # query 2 is taken, 1 fits better than 0
    assert first.tolist() == [2, -1] and held.tolist() == [-1, -1]      # what was handed in stays as it was
    assert later.tolist() == [[0.0, 4.0], [6.0, 3.0], [9.0, 0.0]]
    third = match_clip(later, numpy.array([no, no]), numpy.array([no, yes]), second)
    assert third.tolist() == [2, 1]                                     # also while it is occluded


def test_a_new_instance_may_take_the_query_of_an_occluded_one():
    cost, new, held = numpy.array([[9.0, 0.0], [9.0, 5.0]]), numpy.array([False, True]), numpy.array([0, -1])
    assert match_clip(cost, new, numpy.array([True, True]), held).tolist() == [0, 1]
    assert match_clip(cost, new, numpy.array([False, True]), held).tolist() == [0, 0]


def painted_output(clip: Clip, plan: list[list[int]], queries: int = 4) -> TrainingOutput:
    """Clips of one frame; in clip t, query plan[t][i] is painted to fit instance i. One stream, one decoder layer."""
    instances, frames = clip.ids.shape
    signs = torch.where(clip.masks, 20.0, -20.0)
    signs[clip.ids == -1] = -20.0
    clips, predictions = [], (torch.zeros(frames, queries, CLASSES + 1), torch.zeros(frames, queries, instances + 1))
    for t, row in enumerate(plan):
        logits, kernel = torch.zeros(queries, CLASSES + 1), torch.zeros(queries, instances + 1)
        logits[:, -1] = 5
        for instance, query in enumerate(row):
            logits[query] = 10 * F.one_hot(clip.labels[instance], CLASSES + 1)
            kernel[query, instance] = 1
        predictions[0][t] = logits
        predictions[1][t] = kernel
        clips.append(ClipPrediction([logits[None, None]], [], [kernel[None, None]], torch.zeros(1, 1, queries, 2),
                                    torch.zeros(1, 1, 1, queries, 2), [], []))
    return TrainingOutput(FrameOutput([predictions], torch.zeros(1, frames, queries, 2), signs.transpose(0, 1)), clips, SIZE)


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
    logits, classes = painted_output(clip, plan).clips[2].logits[0][0, 0], torch.full((4,), CLASSES)
    classes[[2, 3]] = clip.labels
    assert F.cross_entropy(logits, classes) < 0.1 < losses["loss_genvis_ce_clip2"]


def test_matching_costs_are_a_loop(monkeypatch):
    """One set of points a clip of a video, used in all its frames; the sampled mask of a query is that of all frames, joined.
    Frames are clips of one frame."""
    torch.manual_seed(0)
    clips, output = [make_clip([[1, 1, 0]]), make_clip([[0, 1, 1], [1, 1, 1]])], random_output(2, 3, clip_length=2)
    drawn = []

    def recorded(rows, count, like):
        drawn.append(torch.rand(rows, count, 2, dtype=like.dtype))
        return drawn[-1]

    monkeypatch.setattr(matcher, "random_points", recorded)
    for whole, parts in ((clip_predictions(output, 2), [[0, 1], [2]]), (frame_predictions(output, 2, 3), [[0], [1], [2]])):
        drawn.clear()
        costs = matching_costs(whole, make_targets(*clips), 9, WEIGHTS)
        assert [cost.shape for cost in costs] == [(len(parts), whole.logits.shape[1], 6, instances) for instances in (1, 2)]
        for video, (part, frames) in itertools.product(range(2), enumerate(parts)):
            at, truth = drawn[video][part:part + 1], clips[video].masks.double()
            truth = torch.cat([sample_at(truth[None, :, t], at)[0] for t in frames], 1)
            for layer in range(whole.logits.shape[1]):
                masks = paint(whole.mask_kernel[part, layer, video], whole.features[video, frames])
                sampled = torch.cat([sample_at(mask[None], at)[0] for mask in masks.unbind(1)], 1)
                expected = match_cost(whole.logits[part, layer, video][None, None], sampled[None, None], clips[video].labels,
                                      truth[None], torch.tensor([0]), WEIGHTS)[0, 0]
                torch.testing.assert_close(costs[video][part, layer], expected)


def test_predictions_in_one_form():
    """Layers of frames and layers and levels of clips side by side, D-major; which clip a frame is in."""
    output = random_output(2, 5, clip_length=2, layers=3, depth=2)
    frames, clips = frame_predictions(output, 2, 3), clip_predictions(output, 2)
    assert frames.clip_of.tolist() == [0, 1, 2, 3, 4] and clips.clip_of.tolist() == [0, 0, 1, 1, 2]
    assert frames.logits.shape[:4] == (5, 3, 2, 6) and clips.logits.shape[:4] == (3, 6, 2, 6)
    for t, layer, video in itertools.product(range(5), range(3), range(2)):
        logits, kernel = output.frames.predictions[1 + layer]           # the last three of four
        assert torch.equal(frames.logits[t, layer, video], logits[5 * video + t])
        assert torch.equal(frames.mask_kernel[t, layer, video], kernel[5 * video + t])
    for clip, depth, level in itertools.product(range(3), range(2), range(3)):
        assert torch.equal(clips.logits[clip, 3 * depth + level], output.clips[clip].logits[depth][level])
        assert torch.equal(clips.mask_kernel[clip, 3 * depth + level], output.clips[clip].mask_kernel[depth][level])
    assert torch.equal(clips.features.flatten(0, 1), output.frames.features)


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
    frames = FrameOutput(one.frames.predictions, torch.cat((one.frames.queries, one.frames.queries)), one.frames.features)
    two = TrainingOutput(frames, doubled, SIZE)
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
    other = make_clip([[0, 0]])                                         # nothing to see
    targets = pad_targets([clip, Clip(other.frames, other.labels, other.ids, other.masks[..., :4, :5]), clip], (6, 8),
                          torch.device("cpu"))
    assert targets.labels.tolist() == [0, 2, 0, 2] and targets.ids.tolist() == 2 * [[7, 7], [-1, 9]]
    assert targets.first.tolist() == [0, 2, 2, 4] and targets.video_of.tolist() == [0, 0, 2, 2]
    assert [targets.labels[own].tolist() for own in targets.videos] == [[0, 2], [], [0, 2]]
    assert targets.masks.shape == (4, 2, 6, 8)
    assert targets.masks[:2].nonzero().tolist() == [[0, 0, 1, 2], [0, 1, 1, 2], [1, 1, 3, 4]]
    assert torch.equal(targets.masks[:2], targets.masks[2:])
    assert clip.ids[2].tolist() == [9, 9]                               # the clip itself stays as it was


def test_average_over_processes(monkeypatch):
    """Sums over all processes in one exchange; the count of instances (not the weight of queries) is at least 1."""
    counts, like = [numpy.array([[0.0, 1.0], [0, 1], [0, 7]]), numpy.array([5.0])], torch.zeros((), dtype=torch.float64)

    def divisors():
        weights, pairs = average_over_processes(counts, like)
        assert weights.dtype == torch.float64 and pairs.shape == (1,)
        quotient = quotients(torch.ones(3, 2, dtype=torch.float64), weights)
        return [(1 / quotient[name]).tolist() for name in ("ce", "mask", "dice")], pairs.item()

    assert divisors() == ([[0, 1], [1, 1], [1, 7]], 5)
    exchanges = []

    def all_reduce(total):
        exchanges.append(total.add_(3))                                 # the other process has 3 of each

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    divided, pairs = divisors()
    assert divided == [pytest.approx([1.5, 2]), pytest.approx([1.5, 2]), pytest.approx([1.5, 5])] and pairs == 4
    assert len(exchanges) == 1


# Single losses

def test_class_loss_weights_no_object():
    """Queries without an instance count a tenth, and so does their share of the mean."""
    torch.manual_seed(0)
    logits, classes = torch.randn(1, 1, 2, 3, CLASSES + 1), torch.tensor([[3, 3, 1], [0, 3, 3]])[None, None]
    criterion = Criterion(CLASSES)
    loss = criterion.class_loss(logits, classes) / criterion.counts(classes.numpy(), numpy.zeros((2, 1)))[0].item()
    total = weight = 0
    for row, query, target in [(0, 0, 3), (0, 1, 3), (0, 2, 1), (1, 0, 0), (1, 1, 3), (1, 2, 3)]:
        share = 0.1 if target == CLASSES else 1.0
        total = total - share * logits[0, 0, row, query].log_softmax(0)[target]
        weight += share
    torch.testing.assert_close(loss, (total / weight).view(1, 1))


@pytest.mark.parametrize("most", [2 ** 27, 1])
def test_mask_losses_are_a_loop(no_chance, monkeypatch, most):
    """The frames of a clip are joined before dice; both losses are sums over instances. However small the parts are."""
    monkeypatch.setattr(losses_module, "MOST_NUMBERS", most)
    torch.manual_seed(0)
    criterion = Criterion(CLASSES, points=8)
    clips, output = [make_clip([[1, 1, 0], [0, 0, 1]]), make_clip([[0, 1, 0]])], random_output(2, 3, clip_length=2)
    targets, predictions = make_targets(*clips), clip_predictions(output, len(clips))
    query_of = numpy.random.default_rng(0).integers(0, 6, (2, 4, 3))    # (G, R, A)
    query_of[0, 2, 1] = query_of[0, 1, 0] = -1
    matching = Matching(numpy.array([[10, -1], [-1, 11], [10, -1]]), query_of)
    index = losses_module.loss_index(predictions, targets, matching, CLASSES)
    losses = criterion.mask_losses(predictions, targets.masks, {name: torch.tensor(value) for name, value in index.items()})
    expected = torch.zeros(2, 2, 4, dtype=torch.float64)
    seen = [(0, 0, 0, [0, 1]), (0, 1, 0, [0, 1]), (1, 0, 1, [2])]       # clip, video, instance there, frames
    for (clip, video, instance, frames), layer in itertools.product(seen, range(4)):
        query = query_of[clip, layer, (0, 2)[video] + (1 if clip else 0)]
        if query >= 0:
            masks = paint(predictions.mask_kernel[clip, layer, video, query], predictions.features[video, frames])
            expected[:, clip, layer] += torch.stack(slow_mask_loss(masks, clips[video].masks[1 if clip else 0, frames], criterion))
    torch.testing.assert_close(losses, expected)


def slow_mask_loss(logits: torch.Tensor, truth: torch.Tensor, criterion: Criterion) -> tuple[torch.Tensor, torch.Tensor]:
    """Point BCE and dice of one instance: mask logits (T, h, w) against bool (T, H, W)."""
    sampled, true = [], []
    for mask, target in zip(logits, truth, strict=True):
        at = uncertain_points(mask[None, None], criterion.points, criterion.candidates, criterion.uncertain)
        sampled.append(sample_at(mask[None, None], at).flatten())
        true.append(sample_at(target[None, None].to(mask.dtype), at).flatten())
    sampled, true = torch.cat(sampled), torch.cat(true)
    dice = 1 - (2 * (sampled.sigmoid() * true).sum() + 1) / (sampled.sigmoid().sum() + true.sum() + 1)
    return F.binary_cross_entropy_with_logits(sampled, true), dice


@pytest.mark.parametrize("span", ["clip", "video"])
def test_similarity_loss_is_a_loop_over_pairs(span):
    """Two videos, two layers, clips of frame 0 and of frames 1 and 2: pairs of one stream in one clip, or in both, same id or not."""
    torch.manual_seed(0)
    targets = make_targets(make_clip([[1, 1, 0], [1, 0, 1]]), make_clip([[0, 1, 1]]))
    clips = random_output(batch=2, frames=3, clip_length=2).clips[::-1]  # of one frame and of two
    frames = Matching(targets.ids, numpy.array([[[0, 1, -1], [1, 0, -1]], [[2, -1, 4], [3, -1, 5]], [[-1, 3, 5], [-1, 2, -1]]]))
    clip_ids = numpy.array([[10, 10], [11, 11], [-1, 10]])              # (A, G)
    query_of = numpy.array([[[9, 9, 9], [9, 9, 9], [4, 1, -1], [5, 0, -1]], [[9, 9, 9], [9, 9, 9], [4, 1, 2], [5, 0, 3]]])
    index = similarity_index(clips, targets, numpy.array([0, 1, 1]), frames, Matching(clip_ids, query_of), span)  # 9: not the last layer
    spans = [[0], [1]] if span == "clip" else [[0, 1]]                  # the clips that are compared
    counts = losses_module.count_pairs(index["ids"], len(spans))
    losses = similarity_losses(clips, **{name: torch.from_numpy(value) for name, value in index.items()}).view(len(spans), -1).sum(1)

    for number, own in enumerate(spans):
        total = pairs = 0
        for layer, video in itertools.product(range(2), range(2)):
            members = []                                                # (id, embedding) of this stream
            for clip, instance in itertools.product(own, ([0, 1], [2])[video]):
                shown = ([0], [1, 2])[clip]
                for offset, t in enumerate(shown):
                    query = frames.query_of[t, layer, instance]
                    if query >= 0:
                        members.append((targets.ids[instance, t], clips[clip].frame_embed[layer, video, offset, query]))
                query = query_of[clip, 2 + layer, instance]
                if query >= 0:
                    members.append((clip_ids[instance, clip], clips[clip].clip_embed[layer, video, query]))
            for (one, first), (other, second) in itertools.product(members, members):
                target = torch.tensor(float(one == other), dtype=torch.float64)
                total = total + F.binary_cross_entropy_with_logits(first @ second, target)
                pairs += 1
        assert span == "video" or pairs == (4 * 4 + 4 * 4, 4 * 4 + 4 * 4 + 3 * 3 + 2 * 2)[number]
        assert counts[number] == pairs + 1e-6
        torch.testing.assert_close(losses[number], total)


def test_gate_losses():
    """One open gate of two, as it should be: "logits" reaches 0; "released" squashes the gate twice and cannot."""
    logits = torch.tensor([50.0, -50.0])[None, None]
    prediction = ClipPrediction([], [], [], torch.zeros(0), torch.zeros(0), [logits], [logits.sigmoid()])
    right, wrong = (torch.tensor(classes)[None, None, None] for classes in ([1, CLASSES], [CLASSES, 1]))
    loss, released = (Criterion(CLASSES, gate_loss=kind).gate_loss for kind in GATE_LOSSES)
    assert loss([prediction], right).item() == pytest.approx(0, abs=1e-6)
    assert loss([prediction], wrong).item() == pytest.approx(50)
    assert released([prediction], right).item() == pytest.approx((math.log1p(math.exp(-1)) + math.log(2)) / 2)
    assert released([prediction], wrong).item() == pytest.approx((math.log(2) + math.log1p(math.exp(1))) / 2)
    with pytest.raises(ValueError, match="logits, released"):
        Criterion(CLASSES, gate_loss="hinge")


# The whole criterion against plain loops

SLOW = {"class": 1.5, "mask": 3.0, "dice": 7.0, "similarity": 0.25, "gate": 0.75, "no object": 0.2}      # weights, all different


@torch.no_grad()
def slow_costs(logits: torch.Tensor, kernel: torch.Tensor, features: torch.Tensor, labels, truth, criterion: Criterion
               ) -> numpy.ndarray:
    """Costs (Q, I) of the queries of one clip, one by one. features (T, C, h, w), truth (I, T, H, W)."""
    cost = numpy.zeros((len(logits), len(labels)))
    at = fixed_points(1, criterion.points, features)
    for query, instance in itertools.product(range(len(logits)), range(len(labels))):
        masks = paint(kernel[query], features)
        sampled = torch.cat([sample_at(mask[None, None], at).flatten() for mask in masks])
        true = torch.cat([sample_at(mask[None, None].to(masks.dtype), at).flatten() for mask in truth[instance]])
        inside = sampled.sigmoid()
        dice = 1 - (2 * (inside * true).sum() + 1) / (inside.sum() + true.sum() + 1)
        cost[query, instance] = (SLOW["mask"] * F.binary_cross_entropy_with_logits(sampled, true) + SLOW["dice"] * dice
                                 - SLOW["class"] * logits[query].softmax(0)[labels[instance]])
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
    """streams: ids and embeddings."""
    total, pairs = torch.zeros((), dtype=torch.float64), 1e-6
    for members in streams:
        for (one, first), (other, second) in itertools.product(members, members):
            total = total + F.binary_cross_entropy_with_logits(first @ second, torch.tensor(float(one == other)).double())
            pairs += 1
    return total / pairs


def add_masks(losses: dict, name: str, suffix: str, pairs: list, count: int, criterion: Criterion) -> None:
    """Put mask and dice losses of mask logits and their truth, divided by `count`, into losses."""
    for kind in ("mask", "dice"):
        losses[f"{name}_{kind}{suffix}"] = torch.zeros((), dtype=torch.float64)
    for logits, truth in pairs:
        for kind, loss in zip(("mask", "dice"), slow_mask_loss(logits, truth, criterion)):
            losses[f"{name}_{kind}{suffix}"] = losses[f"{name}_{kind}{suffix}"] + SLOW[kind] * loss / max(1, count)


def slow_criterion(output: TrainingOutput, clips: list[Clip], criterion: Criterion) -> tuple[dict, list, list]:
    """Losses and matches of frames and clips, all by loops."""
    losses, layers, length, batch = {}, len(output.frames.queries), clips[0].ids.shape[1], len(clips)
    found = []                                                          # [layer][frame] {instance: query}
    for number, (logits, kernel) in enumerate(output.frames.predictions):
        found.append([])
        for n, (b, t) in enumerate(itertools.product(range(batch), range(length))):
            shown = [i for i in range(len(clips[b].labels)) if clips[b].ids[i, t] != -1]
            cost = slow_costs(logits[n], kernel[n], output.frames.features[n:n + 1], clips[b].labels[shown],
                              clips[b].masks[shown, t][:, None], criterion)
            found[-1].append({shown[i]: int(query) for query, i in zip(*linear_sum_assignment(cost))})
        rows, pairs, count = [], [], 0
        for n, match in enumerate(found[-1]):
            clip, t = clips[n // length], n % length
            rows.append((logits[n], {query: int(clip.labels[i]) for i, query in match.items()}))
            pairs += [(paint(kernel[n, query], output.frames.features[n][None]), clip.masks[i, t][None])
                      for i, query in match.items()]
            count += int((clip.ids[:, t] != -1).sum())
        suffix = f"_{number}" if number < len(output.frames.predictions) - 1 else ""
        losses[f"loss_ce{suffix}"] = SLOW["class"] * slow_class_loss(rows)
        add_masks(losses, "loss", suffix, pairs, count, criterion)
    found = found[-layers:]

    held, by_clip, of_clips, first = {}, [], [], 0                                    # held: {(depth, level, video): {instance: query}}
    lengths = [prediction.frame_embed.shape[2] for prediction in output.clips]
    all_features = output.frames.features.unflatten(0, (batch, length))
    for number, (prediction, features) in enumerate(zip(output.clips, all_features.split(lengths, 1), strict=True)):
        times, depth = list(range(first, first + features.shape[1])), len(prediction.logits)
        by_clip.append([])
        for d in range(depth):
            by_clip[-1].append([])
            rows, pairs, count, streams, gates = [], [], 0, [], []
            for level, b in itertools.product(range(layers), range(batch)):
                clip, logits, kernel = clips[b], prediction.logits[d][level, b], prediction.mask_kernel[d][level, b]
                own = held.setdefault((d, level, b), {})
                valid = [i for i in range(len(clip.labels)) if (clip.ids[i, times] != -1).any()]
                new = [i for i in valid if (clip.ids[i, :first] == -1).all()]
                cost = slow_costs(logits, kernel, features[b], clip.labels[new], clip.masks[new][:, times], criterion)
                for i in valid:
                    if i not in new and i in own:
                        cost[own[i]] = 1e6
                own |= {new[i]: int(query) for query, i in zip(*linear_sum_assignment(cost))}
                by_clip[-1][-1].append([own.get(i, -1) for i in range(len(clip.labels))])
                matched = {i: own[i] for i in valid if i in own}
                rows.append((logits, {query: int(clip.labels[i]) for i, query in matched.items()}))
                pairs += [(paint(kernel[query], features[b]), clip.masks[i, times])
                          for i, query in matched.items()]
                count += len(valid)
                gate, target = prediction.gate_logits[d][level, b], torch.zeros(len(logits), dtype=torch.float64)
                target[list(matched.values())] = 1
                gates.append(F.binary_cross_entropy_with_logits(gate, target))
                streams.append([(clip.ids[i, times].max().item(), prediction.clip_embed[level, b, query])
                                for i, query in matched.items()])
                for offset, t in enumerate(times):
                    streams[-1] += [(clip.ids[i, t].item(), prediction.frame_embed[level, b, offset, query])
                                    for i, query in found[level][b * length + t].items()]
            suffix = f"_clip{number}" if d == depth - 1 else f"_{d}_clip{number}"
            losses[f"loss_genvis_ce{suffix}"] = SLOW["class"] * slow_class_loss(rows)
            losses[f"loss_genvis_gate{suffix}"] = SLOW["gate"] * sum(gates) / len(gates)
            add_masks(losses, "loss_genvis", suffix, pairs, count, criterion)
        of_clips.append(streams)
        first = times[-1] + 1
    if criterion.similarity_span == "clip":
        for number, streams in enumerate(of_clips):
            losses[f"loss_genvis_sim_clip{number}"] = SLOW["similarity"] * slow_similarity(streams)
    else:                                                               # as much as of all clips together
        joined = [sum(members, []) for members in zip(*of_clips)]
        losses["loss_genvis_sim_clip0"] = SLOW["similarity"] * len(of_clips) * slow_similarity(joined)
    return losses, found, by_clip


@pytest.mark.parametrize("queries, span", [(6, "clip"), (2, "clip"), (6, "video")])
def test_all_losses_and_matches_are_loops(no_chance, queries, span):
    """Clips of 2, 2 and 1 frames, videos of 2, 0, 3 and 1 instances, that hide and come back; also more than there are queries.
    All losses, matches and gradients."""
    torch.manual_seed(queries)
    clips = [make_clip(visible) for visible in (
        [[1, 1, 0, 0, 1], [0, 0, 1, 1, 1]], [[0, 0, 0, 0, 0]], [[1, 1, 1, 0, 1], [1, 0, 0, 1, 0], [0, 0, 0, 0, 1]],
        [[0, 0, 1, 1, 0]])]
    clips[1] = Clip(clips[1].frames, clips[1].labels[:0], clips[1].ids[:0], clips[1].masks[:0])
    output = random_output(batch=4, frames=5, clip_length=2, layers=2, depth=2, queries=queries)
    criterion = Criterion(CLASSES, SLOW["class"], SLOW["mask"], SLOW["dice"], SLOW["similarity"], SLOW["no object"], points=8,
                          gate_weight=SLOW["gate"], similarity_span=span)
    losses, matches = criterion(output, clips)
    slow, frames, by_clip = slow_criterion(output, clips, criterion)
    assert losses.keys() == slow.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, slow[name], msg=lambda text: f"{name}: {text}")
    for layer, expected in zip(matches.frames, frames, strict=True):
        for n, (query_of, match) in enumerate(zip(layer, expected, strict=True)):
            clip, t = clips[n // 5], n % 5
            assert query_of.tolist() == [match.get(i, -1) for i in range(len(clip.labels)) if clip.ids[i, t] != -1]
    assert [[[query_of.tolist() for query_of in layer] for layer in clip] for clip in matches.clips] == by_clip

    inputs = [output.frames.features, *itertools.chain(*output.frames.predictions)]
    for clip in output.clips:
        inputs += [*clip.logits, *clip.mask_kernel, clip.clip_embed, clip.frame_embed, *clip.gate_logits]
    ours, expected = (torch.autograd.grad(sum(values.values()), inputs) for values in (losses, slow))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


# What it asks of a GPU

class Operations(TorchDispatchMode):
    """Counts operations; none may need to know a value on the CPU, as these wait for the GPU: see `waiting`."""

    def __init__(self):
        super().__init__()
        self.counts, self.waiting = collections.Counter(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.counts[name] += 1
        masked = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for part in args[1:] if isinstance(part, list | tuple)
            for index in part)
        if masked or name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "bincount", "unique_dim",
                              "_unique2", "repeat_interleave"):
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
    """As many for 1 instance as for 4, and no value is asked for: the costs are taken as a whole, with .cpu()."""
    one, four = (counted_step(instances, freeze_detector=frozen) for instances in (1, 4))
    assert one.counts == four.counts
    assert not one.waiting and not four.waiting


def test_waiting_operations_are_noticed():
    values = torch.rand(3)
    for wait in (lambda: values[values > 0.5], lambda: values.sum().item(), lambda: (values > 0.5).nonzero(),
                 lambda: values.index_put((values > 0.5,), torch.zeros(()))):
        with Operations() as operations:
            wait()
        assert operations.waiting


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch sees")
@pytest.mark.parametrize("frozen", [True, False])
def test_one_wait_for_the_gpu(monkeypatch, frozen):
    """Outside bring_costs PyTorch raises an error at anything that waits, in the criterion and in its gradients."""
    torch.manual_seed(0)
    clips = [make_clip([[1, 1, 0], [0, 1, 1]]), make_clip([])]
    output = build_model("toy", CLASSES).cuda()([clip.frames for clip in clips])
    inputs = [value for clip in output.clips for value in (*clip.logits, *clip.mask_kernel)]
    waits = []

    def bring(costs):
        torch.cuda.set_sync_debug_mode("default")
        waits.append(len(costs))
        brought = bring_costs(costs)
        torch.cuda.set_sync_debug_mode("error")
        return brought

    monkeypatch.setattr(losses_module, "bring_costs", bring)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses, _ = Criterion(CLASSES, points=32, gate_weight=1.0, freeze_detector=frozen)(output, clips)
        gradients = torch.autograd.grad(sum(losses.values()), inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits == [4] and all(value.isfinite().all() for value in (*losses.values(), *gradients))


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


def test_losses_do_not_depend_on_the_precision_of_the_model(no_chance):
    """The step under bfloat16: the same losses as of what it predicted, turned into float32."""
    def in_full(values):
        if torch.is_tensor(values):
            return values.float()
        if isinstance(values, (list, tuple)):
            return type(values)(map(in_full, values))
        return values if isinstance(values, int) else type(values)(**{name: in_full(value) for name, value in vars(values).items()})

    torch.manual_seed(0)
    clips = [make_clip([[1, 1, 1], [0, 1, 1]]), make_clip([[1, 0, 1]])]
    with torch.autocast("cpu", torch.bfloat16):
        output = build_model("toy", CLASSES)([clip.frames for clip in clips])
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


def test_a_mask_has_the_official_numbers_of_points():
    """3 candidates a point; three quarters of the points are the most uncertain of them."""
    criterion = Criterion(3, points=12544)
    assert (criterion.points, criterion.candidates, criterion.uncertain) == (12544, 37632, 9408)
