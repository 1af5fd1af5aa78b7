"""Comparisons: resamples equal data sets with copied videos, and a known difference."""

from collections import Counter

import numpy as np
import pytest

from evaluation.comparison import (
    RESAMPLES,
    compare,
    compare_gains,
    format_comparison,
    interval,
    resample,
    resampled_metrics,
)
from evaluation.metric import check_results, evaluate_results, match_video
from evaluation.overlaps import measure_overlaps
from hand_made import LEFT, RIGHT, annotation, prediction, random_set, seeds, truth


def match(results, ground_truth):
    videos = measure_overlaps(*check_results(results, ground_truth))
    return {video.video_id: match_video(video) for video in videos}


def copies_of(results, ground_truth, counts):
    """The data set in which every video is there as often as counts says: {video id: times}."""
    number_of = {  # copies follow their video in the order of ids
        (video, copy): 100 * rank + copy
        for rank, video in enumerate(sorted(counts))
        for copy in range(counts[video])
    }

    def copy(entries, key):
        return [
            entry | {key: number}
            for (video, _), number in number_of.items()
            for entry in entries
            if entry[key] == video
        ]

    return copy(results, "video_id"), ground_truth | {
        "videos": copy(ground_truth["videos"], "id"),
        "annotations": copy(ground_truth["annotations"], "video_id"),
    }


@pytest.mark.parametrize("seed", seeds(10))
def test_resamples_are_data_sets_with_copied_videos(seed, monkeypatch):
    """With crowds, classes that are absent, and scores that are equal in different videos."""
    monkeypatch.setattr("evaluation.metric.MAX_PREDICTIONS", (1, 3, 100))
    monkeypatch.setattr("evaluation.comparison.RECALLS", {"AR1": (0, 1), "AR10": (0, 3)})
    monkeypatch.setattr("evaluation.comparison.MAX_NUMBERS", 1000)  # several chunks
    videos = (3, 1, 2, 9)
    results, ground_truth = random_set(seed, videos)
    number = Counter()
    for entry in results:
        group = entry["video_id"], entry["category_id"]
        entry["score"] = 1 - number[group] / 20
        number[group] += 1
    counts = np.concatenate((np.eye(4, dtype=int), resample(4, np.random.default_rng(seed), 12)))
    metrics = resampled_metrics(match(results, ground_truth), ground_truth, counts)
    for row, times in enumerate(counts):
        copied = copies_of(results, ground_truth, dict(zip(sorted(videos), times.tolist())))
        expected = evaluate_results(*copied)
        for name in ("AP", "AP50", "AP75", "APs", "APm", "AR1", "AR10"):
            assert defined(metrics[name][row]) == pytest.approx(expected[name], abs=1e-12)
        for name, value in expected["per_class"].items():
            assert defined(metrics["per_class"][name][row]) == pytest.approx(value, abs=1e-12)


def defined(value):
    return -1 if np.isnan(value) else value


def test_metrics_of_all_videos_are_those_of_the_metric():
    results, ground_truth = random_set(1)
    whole = resampled_metrics(match(results, ground_truth), ground_truth, np.ones((1, 3), int))
    expected = evaluate_results(results, ground_truth)
    assert list(whole)[:6] == list(expected)[:6] and set(whole) == set(expected)
    for name, value in expected.items():
        if name != "per_class":
            assert defined(whole[name][0]) == pytest.approx(value, abs=1e-12)


def test_copies_of_a_prediction_are_ranked_together():
    """Of equal scores in one video, the first stays before the second, however often it counts."""
    ground_truth = truth(annotation(LEFT))
    results = [prediction(LEFT), prediction(RIGHT)]  # a true and a false one
    metrics = resampled_metrics(match(results, ground_truth), ground_truth, np.array([[1], [5]]))
    assert metrics["AP"] == pytest.approx([1, 1])


def test_resamples_draw_as_many_videos_as_there_are():
    counts = resample(7, np.random.default_rng(0))
    assert counts.shape == (RESAMPLES, 7)
    assert (counts.sum(axis=1) == 7).all()
    assert counts.mean(axis=0) == pytest.approx(np.ones(7), abs=0.15)
    assert (counts == resample(7, np.random.default_rng(0))).all()


VIDEOS = tuple(range(1, 9))


def objects(videos):
    return [annotation(LEFT, number, number) for number in videos]


def found(videos):
    return [prediction(LEFT, 0.9, number) for number in videos]


def compare_results(ground_truth, *pair):
    return compare([(ground_truth, *(match(results, ground_truth) for results in pair))])


def test_a_known_difference():
    """One object in each of eight videos: all found, and half of them.

    The AP of a resample is the share of objects found, in steps of the recall points.
    """
    ground_truth = truth(*objects(VIDEOS), videos=VIDEOS, categories=(1, 2))
    comparison = compare_results(ground_truth, found(VIDEOS), found(VIDEOS[:4]))
    assert list(comparison["metrics"]) == "AP AP50 AP75 APs AR1 AR10 AR100 ARs".split()
    assert list(comparison["per_class"]) == ["class1"]
    entry = comparison["metrics"]["AP"]
    assert (entry["this"], entry["other"]) == pytest.approx((1, 51 / 101))
    assert entry["difference"] == pytest.approx(50 / 101)
    assert comparison["per_class"]["class1"] == pytest.approx(entry)
    # 2.5 % of the binomial distribution of 8 draws with probability 1/2: 1 and 7 of 8.
    recall = comparison["metrics"]["AR1"]
    assert (recall["low"], recall["high"]) == pytest.approx((1 / 8, 7 / 8))
    order = [entry["video_id"] for entry in comparison["videos"]]
    assert order == [5, 6, 7, 8, 1, 2, 3, 4]
    assert [entry["difference"] for entry in comparison["videos"]] == pytest.approx(
        [1] * 4 + [0] * 4
    )


def test_equal_results_do_not_differ_in_any_resample():
    results, ground_truth = random_set(3)
    comparison = compare_results(ground_truth, results, results)
    for entry in [*comparison["metrics"].values(), *comparison["per_class"].values()]:
        assert entry["difference"] == entry["low"] == entry["high"] == 0


def test_a_comparison_is_repeatable_and_antisymmetric():
    ground_truth = truth(*objects(VIDEOS), videos=VIDEOS)
    pair = found(VIDEOS[:6]), found(VIDEOS[3:])
    comparison = compare_results(ground_truth, *pair)
    assert comparison == compare_results(ground_truth, *pair)
    entry = comparison["metrics"]["AR1"]
    reversed_entry = compare_results(ground_truth, *pair[::-1])["metrics"]["AR1"]
    assert (reversed_entry["low"], reversed_entry["high"]) == pytest.approx(
        (-entry["high"], -entry["low"])
    )


def test_a_class_that_a_resample_lacks_is_left_out_of_its_mean():
    """Class 2 is in one video only, and found by these results alone.

    Without that video, both results are perfect. With it, they differ by half.
    """
    rare = annotation(RIGHT, 20, 1, category=2)
    ground_truth = truth(*objects(VIDEOS), rare, videos=VIDEOS, categories=(1, 2))
    these = found(VIDEOS) + [prediction(RIGHT, 0.9, 1, category=2)]
    counts = np.zeros((2, 8), dtype=int)
    counts[0, 0] = counts[1, 1] = 8
    for results, expected in ((these, [1, 1]), (found(VIDEOS), [0.5, 1])):
        metrics = resampled_metrics(match(results, ground_truth), ground_truth, counts)
        assert metrics["AP"] == pytest.approx(expected)
        assert np.isnan(metrics["per_class"]["class2"]).tolist() == [False, True]
    comparison = compare_results(ground_truth, these, found(VIDEOS))
    entry = comparison["per_class"]["class2"]
    assert (entry["low"], entry["high"]) == pytest.approx((1, 1))


def test_parts_are_resampled_each_and_averaged():
    first = truth(*objects(VIDEOS[:2]), videos=VIDEOS[:2], categories=(1, 2))
    second = truth(*objects(VIDEOS[2:]), videos=VIDEOS[2:], categories=(1, 2))
    comparison = compare(
        [
            (first, match(found(VIDEOS[:2]), first), match([], first)),
            (second, match(found(VIDEOS[2:]), second), match(found(VIDEOS[2:]), second)),
        ]
    )
    entry = comparison["metrics"]["AP"]
    assert [entry[key] for key in ("this", "other", "low", "high")] == pytest.approx(
        [1, 0.5, 0.5, 0.5]
    )
    assert [entry["video_id"] for entry in comparison["videos"]] == list(VIDEOS)


def test_an_interval_leaves_out_what_is_not_defined():
    values = np.append(np.arange(1001.0), [np.nan] * 5)
    assert interval(values) == pytest.approx((25, 975))


def test_nothing_to_compare_without_ground_truth():
    comparison = compare_results(truth(), [prediction(LEFT)], [])
    assert comparison == {"resamples": RESAMPLES, "metrics": {}, "per_class": {}, "videos": []}


def test_table():
    ground_truth = truth(
        *objects(VIDEOS), annotation(RIGHT, 20, 1, category=2), videos=VIDEOS, categories=(1, 2)
    )
    lost = [prediction(RIGHT, 0.9, 1, category=2)]
    comparison = compare_results(ground_truth, found(VIDEOS), found(VIDEOS[:7]) + lost)
    causes = [{"missed": {"AP": 0.5}}, {"missed": {"AP": 0.62}}]
    comparison |= {"other": "before.json", "causes": compare_gains(*causes)}
    lines = format_comparison(comparison).splitlines()
    assert lines[0] == (
        "compared with before.json: this, other, and the difference with its 95% interval over "
        "1000 resamples of the videos"
    )
    at = {line: number for number, line in enumerate(lines)}
    assert lines[at["gained if fixed"] + 1] == "  missed           50.0  62.0  -12.0"
    assert lines[at["classes that gained most"] + 1].startswith("  class1 100.0  87.1  +12.9  [")
    assert lines[at["classes that lost most"] + 1].startswith("  class2   0.0 100.0 -100.0  [")
    assert lines[at["videos that gained most"] + 1] == "  8 100.0   0.0 +100.0"
    assert lines[at["videos that lost most"] + 1] == "  1  50.0 100.0  -50.0"
    assert len(lines) == at["videos that lost most"] + 2
