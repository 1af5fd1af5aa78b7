"""AP by occlusion, gap and length: official numbers, and small examples."""

import math
from dataclasses import replace

import numpy as np
import pytest

from evaluation import metric, occlusion
from evaluation.occlusion import GAP, LENGTH, OCCLUSION, longest_gap, occlusion_score
from evaluation.overlaps import measure_overlaps
from golden_set import occlusion_set
from test_metric import LEFT, RIGHT, annotation, prediction, truth

NO, SLIGHT, SEVERE = "no_occlusion", "slight_occlusion", "severe_occlusion"


def scores_of(results, ground_truth):
    """The twelve numbers, and AP and AR of the groups."""
    results, ground_truth = metric.check_results(results, ground_truth)
    videos = measure_overlaps(results, ground_truth)
    groupings = occlusion.choose_groupings(ground_truth["annotations"])
    precision, recall, _ = metric.accumulate_videos(
        videos, metric.category_ids(ground_truth), [metric.AREA, *groupings.values()]
    )
    groups = occlusion.group_scores(precision, recall, groupings, videos)
    return metric.summarize(precision, recall, ground_truth), groups


def test_golden_numbers_by_occlusion():
    """The 18 numbers of OVIS's evaluator."""
    ground_truth, results, expected = occlusion_set()
    metrics, groups = scores_of(results, ground_truth)
    found = occlusion.ovis_metrics(metrics, groups["occlusion"])
    assert list(found) == list(expected["ovis"])
    assert found == pytest.approx(expected["ovis"], rel=0, abs=1e-9)


@pytest.mark.parametrize(
    "levels, score",
    [
        ([NO], 0.0),
        ([SEVERE, NO, None], 0.75),  # one of two
        ([SEVERE, NO, NO], 0.375),  # two of three
        ([NO, SLIGHT, None, SEVERE, NO], 0.5),  # two of four: 0.75 and 0.25
    ],
)
def test_an_occlusion_score_is_the_mean_of_the_higher_half(levels, score):
    assert occlusion_score(levels) == score


def test_an_occlusion_score_in_plain_loops():
    random = np.random.default_rng(0)
    for _ in range(50):
        levels = random.choice([NO, SLIGHT, SEVERE, None], size=random.integers(1, 9)).tolist()
        left = [occlusion.LEVELS[level] for level in levels if level is not None]
        if not left:
            assert math.isnan(occlusion_score(levels))
            continue
        taken = []
        while len(taken) < len(left):  # until half of them, or one more, are taken
            highest = max(left)
            left.remove(highest)
            taken.append(highest)
        assert occlusion_score(levels) == pytest.approx(sum(taken) / len(taken))


def with_levels(segmentations, level, number):
    return annotation(segmentations, number) | {"occlusion": [level] * 4}


def test_groups_by_occlusion():
    """Objects on the border of two ranges belong to both. An error counts in every group."""
    ground_truth = truth(
        with_levels(LEFT, NO, 1),
        with_levels(RIGHT, SLIGHT, 2) | {"category_id": 2},
        categories=(1, 2),
    )
    results = [prediction(LEFT), prediction(RIGHT, 0.95)]  # the second has the wrong class
    metrics, groups = scores_of(results, ground_truth)
    assert list(groups) == ["occlusion"]
    assert groups["occlusion"] == {
        "light": {"AP": pytest.approx(0.25), "AR": pytest.approx(0.5), "tracks": 2},
        "medium": {"AP": 0, "AR": 0, "tracks": 1},
        "heavy": {"AP": -1, "AR": -1, "tracks": 0},
    }
    assert metrics["AP"] == pytest.approx(0.25)


def test_objects_without_levels_and_crowds_are_in_no_group():
    ground_truth = truth(with_levels(LEFT, None, 1), with_levels(RIGHT, SEVERE, 2) | {"iscrowd": 1})
    metrics, groups = scores_of([prediction(LEFT)], ground_truth)
    assert metrics["AP"] == pytest.approx(1)
    assert groups["occlusion"]["heavy"] == {"AP": -1, "AR": -1, "tracks": 0}


@pytest.mark.parametrize("levels", [None, [0.5] * 4, ["half"] * 4, [[NO]] * 4, NO])
def test_without_levels_objects_are_grouped_by_gap_and_length(levels):
    """Levels in another notation are none, and one annotation without is enough."""
    hidden = [RIGHT[0], None, None, RIGHT[3]]
    ground_truth = truth(
        with_levels(LEFT, NO, 1), annotation(hidden, 2) | ({"occlusion": levels} if levels else {})
    )
    _, groups = scores_of([prediction(hidden)], ground_truth)
    assert list(groups) == ["gap", "length"]
    assert {name: group for name, group in groups["gap"].items() if group["tracks"]} == {
        "0": {"AP": 0, "AR": 0, "tracks": 1},
        "1-3": {"AP": pytest.approx(1), "AR": pytest.approx(1), "tracks": 1},
    }
    assert groups["length"]["1-10"]["AR"] == 0.5


@pytest.mark.parametrize(
    "seen, gap", [("1", 0), ("0110", 0), ("101", 1), ("1001011", 2), ("0100001", 4), ("000", 0)]
)
def test_the_longest_gap_is_between_frames_with_a_mask(seen, gap):
    assert longest_gap(np.array([20 * int(letter) for letter in seen])) == gap
    longest = 0
    for begin in range(len(seen)):
        for end in range(begin + 1, len(seen)):
            if seen[begin] == seen[end] == "1" and "1" not in seen[begin + 1 : end]:
                longest = max(longest, end - begin - 1)
    assert longest == gap


def test_an_empty_mask_is_a_gap_too():
    empty = {"size": [8, 8], "counts": [64]}
    stated = annotation(LEFT) | {"segmentations": [LEFT[0], empty, None, LEFT[3]], "areas": [4] * 4}
    _, groups = scores_of([], truth(stated))
    assert groups["gap"]["1-3"]["tracks"] == 1


def test_ranges_hold_every_gap_and_length_once():
    for grouping, first in ((GAP, 0), (LENGTH, 1)):
        for value in range(first, 100):
            assert sum(low <= value <= high for low, high in grouping.ranges.values()) == 1
    assert all(high < 1 for low, high in OCCLUSION.ranges.values() if low < 0.5)


def test_an_unmatched_prediction_has_no_gap_but_a_length(monkeypatch):
    """It is an error in all groups of gaps, and in the group of its length alone."""
    ranges = {"short": (1, 2), "long": (3, 4)}
    monkeypatch.setattr(occlusion, "LENGTH", replace(LENGTH, ranges=ranges))
    ground_truth = truth(
        annotation(LEFT, 1), annotation(RIGHT[:1] + [None] + RIGHT[2:3] + [None], 2)
    )
    wrong = prediction([None, RIGHT[1], None, None], 0.99)
    found = [prediction(LEFT), prediction(RIGHT[:1] + [None] + RIGHT[2:3] + [None])]
    _, groups = scores_of([*found, wrong], ground_truth)
    assert [groups["gap"][name]["AP"] for name in ("0", "1-3")] == pytest.approx([0.5, 0.5])
    assert groups["length"]["short"]["AP"] == pytest.approx(0.5)
    assert groups["length"]["long"]["AP"] == pytest.approx(1)


def test_a_line_for_each_grouping():
    ground_truth = truth(annotation(LEFT, 1), annotation([RIGHT[0], None, None, RIGHT[3]], 2))
    _, groups = scores_of([prediction(LEFT)], ground_truth)
    assert occlusion.format_groups(groups).splitlines() == [
        "AP by longest gap: 0 100.0   1-3 0.0   4-6 -   7-10 -   11+ -",
        "AP by length in frames: 1-10 50.5   11-20 -   21-40 -   41+ -",
    ]
