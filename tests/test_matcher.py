"""Matching: costs against a loop, the assignment, points, and identities that last over clips."""

import itertools
import math

import numpy
import pytest
import torch
import torch.nn.functional as F

import matcher
from clips import Clip
from losses import Criterion
from matcher import (
    CostsToCPU,
    Matches,
    assign,
    clip_predictions,
    frame_predictions,
    gather_at,
    match,
    match_clip,
    match_cost,
    matching_costs,
    pad_targets,
    sample_at,
    uncertain_points,
)
from predictions import (
    CLASSES,
    WEIGHTS,
    fixed_points,
    make_clip,
    make_targets,
    only_video,
    paint,
    painted_output,
    random_output,
    visible_in_frames,
)


@pytest.fixture
def no_chance(monkeypatch):
    monkeypatch.setattr(matcher, "random_points", fixed_points)


# Costs and assignment


def test_match_cost_is_a_loop():
    """Two clips, of two frames and of one: the frames of a clip are joined."""
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 2, 4, CLASSES + 1), torch.randn(3, 2, 4, 6)
    labels, truth = torch.tensor([0, 2, 2]), torch.rand(3, 3, 6)
    membership = torch.tensor([[1.0, 1, 0], [0, 0, 1]])
    weights = {"class": 2.0, "mask": 3.0, "dice": 7.0}
    cost = match_cost(logits, masks, labels, truth, torch.rand(3, 6, 2), membership, weights)
    assert cost.shape == (2, 2, 4, 3)
    for clip, layer, query, instance in itertools.product(range(2), range(2), range(4), range(3)):
        frames = ([0, 1], [2])[clip]
        mask, true = masks[frames, layer, query].flatten(), truth[frames, instance].flatten()
        probability = logits[clip, layer, query].softmax(0)[labels[instance]]
        bce = F.binary_cross_entropy_with_logits(mask, true)
        overlap, area = (mask.sigmoid() * true).sum(), mask.sigmoid().sum() + true.sum()
        dice = 1 - (2 * overlap + 1) / (area + 1)
        expected = -2 * probability + 3 * bce + 7 * dice
        torch.testing.assert_close(cost[clip, layer, query, instance], expected)


@pytest.mark.parametrize("queries, instances", [(5, 3), (4, 4), (2, 4), (3, 0)])
def test_assign_is_the_best_of_all_ways(queries, instances):
    """With more instances than queries some stay without: -1."""
    cost = numpy.random.default_rng(0).normal(size=(queries, instances))
    query_of = assign(cost)
    matched = query_of >= 0
    assert len(query_of) == instances and int(matched.sum()) == min(queries, instances)
    assert len(set(query_of[matched])) == int(matched.sum())  # no query twice
    if queries >= instances:
        ways = [
            list(zip(way, range(instances)))
            for way in itertools.permutations(range(queries), instances)
        ]
    else:
        ways = [
            list(zip(range(queries), way))
            for way in itertools.permutations(range(instances), queries)
        ]
    best = min(ways, key=lambda way: sum(cost[pair] for pair in way))
    assert sorted(best) == sorted((int(query), i) for i, query in enumerate(query_of) if query >= 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_costs_that_are_not_finite_are_high(value):
    costs = [torch.rand(1, 2, 3, 4), torch.rand(2, 1, 3, 0), torch.rand(2, 1, 3, 2)]
    for cost in costs:
        assert numpy.array_equal(CostsToCPU(cost).wait(), cost.numpy())
    costs[2][1, 0, 1, 1] = value
    assert CostsToCPU(costs[2]).wait()[1, 0, 1, 1] == matcher.FORBIDDEN_COST


# Points


def test_sample_at_by_hand():
    """Pixel centres of a 2 x 2 map lie at 1/4 and 3/4; beyond the border everything is 0."""
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    at = {
        (0.25, 0.25): 1,
        (0.75, 0.25): 2,
        (0.25, 0.75): 3,
        (0.5, 0.5): 2.5,
        (0.75, 0.5): 3,  # (x, y)
        (0.0, 0.0): 0.25,
        (0.5, 0.0): 0.75,
        (1.0, 0.5): 1.5,
        (1.5, 0.5): 0,
    }
    values = sample_at(maps, torch.tensor([list(at)]))
    assert values.shape == (1, 1, 9) and values[0, 0].tolist() == list(at.values())


def test_gather_at_is_sample_at():
    """What --deterministic runs on a GPU.

    The same values and gradients, at points outside the map too.
    """
    maps = torch.randn(3, 5, 7, 9, dtype=torch.float64, requires_grad=True)
    points = torch.rand(3, 40, 2, dtype=torch.float64) * 1.4 - 0.2
    upstream = torch.randn(3, 5, 40, dtype=torch.float64)
    both = [
        (values, torch.autograd.grad(values, maps, upstream)[0])
        for values in (sample_at(maps, points), gather_at(maps, points))
    ]
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
        own = logits[row : row + 1]
        ranked = sorted(
            candidates[row], key=lambda point: sample_at(own, point[None, None]).abs().item()
        )
        assert sorted(points[row, :6].tolist()) == sorted(point.tolist() for point in ranked[:6])
    assert torch.equal(points[:, 6:], rest)


# Identities


def test_an_instance_keeps_its_query():
    """Query 2 fits instance 0 best when it appears.

    That query 0 fits better later changes nothing.
    """
    no, yes = False, True
    cost, held = numpy.array([[5.0, 9.0], [6.0, 1.0], [2.0, 9.0]]), numpy.array([-1, -1])
    first = match_clip(cost, numpy.array([yes, no]), numpy.array([yes, no]), held)
    assert first.tolist() == [2, -1]  # instance 1 was not seen yet
    later = numpy.array([[0.0, 4.0], [6.0, 3.0], [9.0, 0.0]])
    second = match_clip(later, numpy.array([no, yes]), numpy.array([yes, yes]), first)
    assert second.tolist() == [2, 1]  # query 2 is taken, 1 fits better than 0
    assert first.tolist() == [2, -1] and held.tolist() == [
        -1,
        -1,
    ]  # what was handed in stays as it was
    assert later.tolist() == [[0.0, 4.0], [6.0, 3.0], [9.0, 0.0]]
    third = match_clip(later, numpy.array([no, no]), numpy.array([no, yes]), second)
    assert third.tolist() == [2, 1]  # also while it is occluded


def test_a_new_instance_may_take_the_query_of_an_occluded_one():
    cost, new, held = (
        numpy.array([[9.0, 0.0], [9.0, 5.0]]),
        numpy.array([False, True]),
        numpy.array([0, -1]),
    )
    assert match_clip(cost, new, numpy.array([True, True]), held).tolist() == [0, 1]
    assert match_clip(cost, new, numpy.array([False, True]), held).tolist() == [0, 0]


def test_matches_of_painted_queries():
    """Instance 1 appears in frame 1, instance 0 is occluded in frame 2.

    Frames are matched one by one, clips keep the identity.
    """
    clip = make_clip([[1, 1, 0, 1], [0, 1, 1, 1]])
    plan = [[2, 0], [2, 3], [2, 3], [3, 2]]  # in the last clip the fits are swapped
    torch.manual_seed(0)
    output = painted_output(clip, plan)
    losses, (frames, clips) = Criterion(CLASSES, points=200)(output, [clip])
    assert frames.query_of[:, 0, 0].tolist() == [[2, -1], [2, 3], [-1, 3], [3, 2]]
    assert clips.query_of[:, 0, 0].tolist() == [[2, -1], [2, 3], [2, 3], [2, 3]]
    assert clips.visible[:, 0].tolist() == [
        [True, False],
        [True, True],
        [False, True],
        [True, True],
    ]
    fits, swapped = losses["loss_genvis_ce_clip1"], losses["loss_genvis_ce_clip3"]
    assert fits < 0.1 < swapped
    assert losses["loss_genvis_mask_clip1"] < losses["loss_genvis_mask_clip3"]
    # while it is occluded, the query of instance 0 has to predict "no object", and predicts class 0
    logits, classes = output.clips[2].logits[0][0, 0], torch.full((4,), CLASSES)
    classes[[2, 3]] = clip.labels
    assert F.cross_entropy(logits, classes) < 0.1 < losses["loss_genvis_ce_clip2"]
    assert clips.classes[2, 0, 0].tolist() == [CLASSES, CLASSES, CLASSES, 1]


def test_the_last_clip_may_be_shorter():
    """Nine frames in clips of four: 4, 4 and 1."""
    clip = make_clip([[0, 0, 0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 1]])
    output, targets = random_output(1, 9, clip_length=4), make_targets(clip)
    predictions = clip_predictions(output, 1)
    costs = CostsToCPU(matching_costs(predictions, targets, 9, WEIGHTS)).wait()
    matches = match(costs, predictions, targets, keep_identities=True)
    assert matches.visible[:, 0].tolist() == [[True, False], [True, False], [False, True]]
    assert ((matches.query_of >= 0).all((1, 2))).tolist() == [
        [True, False],
        [True, False],
        [True, True],
    ]
    assert predictions.membership.tolist() == [
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 1],
    ]


def test_matching_costs_are_a_loop(monkeypatch):
    """One set of points a clip of a video, used in all its frames.

    Frames are clips of one frame.
    """
    torch.manual_seed(0)
    clips = [make_clip([[1, 1, 0]]), make_clip([[0, 1, 1], [1, 1, 1]])]
    output, drawn = random_output(2, 3, clip_length=2), []

    def recorded(rows, count, like):
        drawn.append(torch.rand(rows, count, 2, dtype=like.dtype))
        return drawn[-1]

    monkeypatch.setattr(matcher, "random_points", recorded)
    for whole, parts in (
        (clip_predictions(output, 2), [[0, 1], [2]]),
        (frame_predictions(output, 2, 3), [[0], [1], [2]]),
    ):
        drawn.clear()
        costs = matching_costs(whole, make_targets(*clips), 9, WEIGHTS)
        layers = whole.logits.shape[1]
        assert costs.shape == (len(parts), layers, 2, 6, 2)
        for video, (part, frames) in itertools.product(range(2), enumerate(parts)):
            at, truth = drawn[video][part : part + 1], clips[video].masks.double()
            truth = torch.cat([sample_at(truth[None, :, t], at)[0] for t in frames], 1)
            for layer in range(layers):
                kernel = whole.mask_kernel[part, layer, video]
                masks = paint(kernel, whole.features[video, frames])
                sampled = [sample_at(mask[None], at)[0] for mask in masks.unbind(1)]
                expected = match_cost(
                    whole.logits[part, layer, video][None, None],
                    torch.cat(sampled, 1)[None, None],
                    clips[video].labels,
                    truth[None],
                    at,
                    torch.ones(1, 1).double(),
                    WEIGHTS,
                )[0, 0]
                cost = costs[part, layer, video, :, : len(clips[video].labels)]
                torch.testing.assert_close(cost, expected)


def test_predictions_in_one_form():
    """Layers of frames, and layers and levels of clips, D-major; the clip of each frame."""
    output = random_output(2, 5, clip_length=2, layers=3, depth=2)
    frames, clips = frame_predictions(output, 2, 3), clip_predictions(output, 2)
    assert frames.clip_of.tolist() == [0, 1, 2, 3, 4] and clips.clip_of.tolist() == [0, 0, 1, 1, 2]
    assert frames.logits.shape[:4] == (5, 3, 2, 6) and clips.logits.shape[:4] == (3, 6, 2, 6)
    for t, layer, video in itertools.product(range(5), range(3), range(2)):
        logits, kernel = output.frames.predictions[1 + layer]  # the last three of four
        assert torch.equal(frames.logits[t, layer, video], logits[5 * video + t])
        assert torch.equal(frames.mask_kernel[t, layer, video], kernel[5 * video + t])
    for clip, depth, level in itertools.product(range(3), range(2), range(3)):
        prediction, layer = output.clips[clip], 3 * depth + level
        assert torch.equal(clips.logits[clip, layer], prediction.logits[depth][level])
        assert torch.equal(clips.mask_kernel[clip, layer], prediction.mask_kernel[depth][level])
        assert torch.equal(clips.gate_values[clip, layer], prediction.gate_logits[depth][level])
        assert torch.equal(clips.clip_embed[clip, level], prediction.clip_embed[level])
    for t, level in itertools.product(range(5), range(3)):
        expected = output.clips[t // 2].frame_embed[level, :, t % 2]
        assert torch.equal(clips.frame_embed[t, level], expected)
    assert torch.equal(clips.features.flatten(0, 1), output.frames.features)


def test_a_batch_is_matched_as_its_videos_alone(no_chance):
    """Three videos, one without instances: matches are those of each video; mask losses add up."""
    torch.manual_seed(0)
    clips = [
        make_clip(visible)
        for visible in (
            [[1, 0, 1, 1], [0, 0, 1, 0]],
            [[0, 0, 0, 0]],
            [[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]],
        )
    ]
    clips[2].labels = torch.tensor([2, 0, 0])
    output, criterion = random_output(3, 4, clip_length=2), Criterion(CLASSES, points=40)
    losses, matches = criterion(output, clips)
    sums = dict.fromkeys(losses, 0.0)
    for video, clip in enumerate(clips):
        losses_alone, matches_alone = criterion(only_video(output, video, 3), [clip])
        count = len(clip.labels)
        for together, alone in zip(matches, matches_alone, strict=True):
            assert torch.equal(together.query_of[:, :, [video], :count], alone.query_of)
            assert (together.query_of[:, :, video, count:] == -1).all()
        for name, loss in losses_alone.items():
            sums[name] += loss * instances_of([clip], name)
    for name, loss in losses.items():
        if "mask" in name or "dice" in name:
            torch.testing.assert_close(loss * instances_of(clips, name), sums[name])


def instances_of(clips: list[Clip], name: str) -> int:
    """What a mask loss is divided by: visible instances of the frames, or of the clip of 2 frames
    on both levels."""
    if "clip" not in name:
        return max(1, sum(int(visible_in_frames(clip).sum()) for clip in clips))
    frames = slice(2 * int(name[-1]), 2 * int(name[-1]) + 2)
    return max(1, 2 * sum(int(visible_in_frames(clip)[:, frames].any(1).sum()) for clip in clips))


# Targets


def test_pad_targets():
    """Zeros right and bottom, and for instances that other videos have more of.

    An instance with an empty mask is not visible.
    """
    masks = torch.zeros(3, 2, 4, 5, dtype=torch.bool)
    masks[0, :, 1, 2] = masks[2, 1, 3, 4] = True
    clip = Clip(
        torch.zeros(2, 3, 4, 5, dtype=torch.uint8),
        torch.tensor([0, 1, 2]),
        masks,
    )
    other = make_clip([[0, 0]])  # nothing to see
    other = Clip(other.frames, other.labels, other.masks[..., :4, :5])
    targets = pad_targets([clip, other, clip], (6, 8), torch.device("cpu"))
    assert targets.labels.tolist() == [[0, 1, 2], [0, 0, 0], [0, 1, 2]]
    assert targets.visible[0].tolist() == [[True, False, False], [True, False, True]]
    assert not targets.visible[1].any() and torch.equal(targets.visible[0], targets.visible[2])
    assert targets.masks.shape == (3, 2, 3, 6, 8)
    assert targets.masks[0].nonzero().tolist() == [[0, 0, 1, 2], [1, 0, 1, 2], [1, 2, 3, 4]]
    assert torch.equal(targets.masks[0], targets.masks[2]) and not targets.masks[1].any()
    assert clip.masks.shape == (3, 2, 4, 5)  # the clip is unchanged


def test_visible_instances_without_a_query_forbid_none():
    """Three visible instances share two queries: the second has none, the third appears."""
    cost = numpy.array([[1.0, 1.0, 0.5], [1.0, 1.0, 0.6]])
    new, visible = numpy.array([False, False, True]), numpy.array([True, True, True])
    queries = match_clip(cost, new, visible, numpy.array([0, -1, -1]))
    assert queries.tolist() == [0, -1, 1]


def test_matched_instances_are_visible_and_have_a_query():
    query_of = torch.tensor([[[[0, 1, -1, -1]]]])
    visible = torch.tensor([[[True, False, True, False]]])
    assert Matches(query_of, visible, None).matched.tolist() == [[[[True, False, False, False]]]]
