"""The metric: official numbers, small examples, and an independent implementation."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest

from data import InputError
from evaluation import metric
from hand_made import LEFT, RIGHT, annotation, encode, prediction, seeds, square, truth

METRICS = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()


def ap_numbers(metrics):
    """What evaluate_results returns, of the contents of a metrics.json."""
    return {name: metrics[name] for name in (*METRICS, "per_class")}


def test_golden_metric(golden_dir):
    """The twelve numbers, AP per class and the full curves of the official evaluator."""
    names = json.loads((golden_dir / "meta.json").read_text())["eval"]
    ground_truth, results, expected = (
        json.loads((golden_dir / names[key]).read_text()) for key in ("gt", "results", "stats")
    )
    arrays = np.load(golden_dir / names["arrays"])

    metrics = metric.evaluate_results(results, ground_truth)

    order = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    assert [metrics[name] for name in order] == pytest.approx(expected["stats"], rel=0, abs=1e-9)
    per_class = {
        category["name"]: expected["per_category"][str(category["id"])]["AP_all"]
        for category in ground_truth["categories"]
    }
    assert metrics["per_class"] == pytest.approx(per_class, rel=0, abs=1e-9)
    for name, values in zip(
        ("precision", "recall", "scores"), metric.accumulate(results, ground_truth)
    ):
        np.testing.assert_allclose(values, arrays[name], rtol=0, atol=1e-12, err_msg=name)


def test_perfect_prediction():
    ground_truth = truth(annotation(LEFT), annotation(RIGHT))
    metrics = metric.evaluate_results([prediction(LEFT), prediction(RIGHT)], ground_truth)
    assert list(metrics) == [*METRICS, "per_class"]
    for name in ("AP", "AP50", "AP75", "APs", "AR10", "AR100", "ARs"):
        assert metrics[name] == pytest.approx(1)
    assert metrics["AR1"] == 0.5  # one prediction cannot find two objects
    assert metrics["APm"] == metrics["APl"] == metrics["ARm"] == metrics["ARl"] == -1
    assert metrics["per_class"] == {"class1": pytest.approx(1)}
    assert all(type(value) is float for name, value in metrics.items() if name != "per_class")


def test_identity_switch_halfway():
    """Each frame's masks are perfect, but two objects swap identities: tracks of IoU 1 / 3, none
    found.
    """
    ground_truth = truth(annotation(LEFT), annotation(RIGHT))
    swapped = [prediction(LEFT[:2] + RIGHT[2:]), prediction(RIGHT[:2] + LEFT[2:])]
    assert metric.evaluate_results(swapped, ground_truth)["AP"] == 0


def test_broken_track():
    """A track broken into halves of IoU 0.5: the first is found, at the lowest threshold."""
    halves = [
        prediction(LEFT[:2] + [None] * 2, score=0.9),
        prediction([None] * 2 + LEFT[2:], score=0.8),
    ]
    metrics = metric.evaluate_results(halves, truth(annotation(LEFT)))
    assert metrics["AP50"] == pytest.approx(1)
    assert metrics["AP"] == pytest.approx(0.1)


def test_equal_scores_keep_file_order():
    right, wrong = prediction(LEFT), prediction(RIGHT)
    ground_truth = truth(annotation(LEFT))
    assert metric.evaluate_results([right, wrong], ground_truth)["AP50"] == pytest.approx(1)
    assert metric.evaluate_results([wrong, right], ground_truth)["AP50"] == pytest.approx(0.5)


def test_equal_scores_of_videos_follow_video_id():
    """Between videos it is the id that counts, wherever videos and predictions stand in their
    files.
    """
    ground_truth = truth(annotation(LEFT, video=2), videos=(2, 1))
    # The second is wrong, but comes first.
    results = [prediction(LEFT, video=2), prediction(LEFT, video=1)]
    assert metric.evaluate_results(results, ground_truth)["AP50"] == pytest.approx(0.5)
    assert metric.evaluate_results(results[::-1], ground_truth)["AP50"] == pytest.approx(0.5)


def test_missing_frame_equals_empty_mask():
    empty = encode(np.zeros((8, 8), dtype=bool))
    ground_truth = truth(annotation(LEFT[:3] + [None]), annotation(RIGHT))
    variants = [
        [prediction(LEFT[:2] + [nothing] * 2), prediction([nothing] * 4, score=0.95)]
        for nothing in (None, empty)
    ]
    first, second = (metric.evaluate_results(results, ground_truth) for results in variants)
    assert first == second
    assert first["AP50"] > 0


def test_annotation_id_zero_counts():
    """The official evaluator uses ids as flags and so never finds the annotation with id 0."""
    metrics = metric.evaluate_results([prediction(LEFT)], truth(annotation(LEFT, number=0)))
    assert metrics["AP"] == pytest.approx(1)


def test_crowd_is_neither_found_nor_missed():
    ground_truth = truth(annotation(LEFT, crowd=1), annotation(RIGHT))
    results = [prediction(LEFT), prediction(LEFT), prediction(RIGHT, score=0.1)]
    assert metric.evaluate_results(results, ground_truth)["AP"] == pytest.approx(1)


def test_real_object_goes_before_ignored_one():
    """A prediction that overlaps a crowd and, less well, a free ordinary object takes the ordinary
    one.
    """
    ground_truth = truth(annotation(LEFT, crowd=1), annotation(LEFT[:3] + [None]))
    # The second prediction finds the object taken and goes to the crowd: neither right nor wrong.
    metrics = metric.evaluate_results([prediction(LEFT), prediction(LEFT)], ground_truth)
    assert metrics["AP75"] == pytest.approx(1)
    # IoU 0.75: six of ten thresholds.
    assert (metrics["AP"], metrics["AR100"]) == pytest.approx((0.6, 0.6))


def test_later_ground_truth_wins_equal_overlap():
    """The first prediction overlaps both objects by 0.5 and takes the later, leaving the other its
    own.
    """
    objects = [LEFT[:2] + [None] * 2, [None] * 2 + LEFT[2:]]
    for first, second in (objects, objects[::-1]):
        ground_truth = truth(annotation(first), annotation(second))
        results = [prediction(LEFT, score=0.9), prediction(first, score=0.8)]
        assert metric.evaluate_results(results, ground_truth)["AP50"] == pytest.approx(1)
        results = [prediction(LEFT, score=0.9), prediction(second, score=0.8)]
        assert metric.evaluate_results(results, ground_truth)["AR100"] == pytest.approx(0.5)


def test_groups_by_any_value_are_like_area_ranges():
    """Annotations of another group are neither found nor missed, and those of no group (NaN) too.

    A second prediction for one is an error, and so is one that finds nothing, unless predictions
    have the value as well.
    """
    values = {1: 7, 2: 3, 3: float("nan")}
    grouping = metric.Grouping(
        {"low": (0, 5), "both": (3, 7), "high": (5, 9)},
        actual=lambda tracks: [values[entry["id"]] for entry in tracks.annotations],
    )
    large, middle = [square(0, 3)] * 4, [square(3)] * 4
    ground_truth = truth(annotation(large, 1), annotation(RIGHT, 2), annotation(middle, 3))
    results = [prediction(large, 0.9), prediction(RIGHT, 0.8)]

    def numbers(results, grouping=grouping):
        precision, recall, _ = metric.accumulate(results, ground_truth, [metric.AREA, grouping])
        assert precision.shape[3] == recall.shape[2] == 4 + 3
        return [metric.mean_defined(precision[..., a, -1]) for a in (4, 5, 6)], recall[0, 0, 4:, 2]

    ap, recall = numbers(results)
    assert ap == pytest.approx([1, 1, 1]) and recall.tolist() == [1, 1, 1]
    # The second prediction for the large square is wrong in every group.
    ap, recall = numbers([*results, prediction(large, 0.85)])
    assert ap == pytest.approx([0.5, (51 + 50 * 2 / 3) / 101, 1])
    # So is one for nothing. One for the object that is in no group is ignored.
    nothing = prediction([square(6, 1)] * 4, 0.95)
    ap, recall = numbers([*results, nothing, prediction(middle, 0.96)])
    assert ap == pytest.approx([0.5, 2 / 3, 0.5])
    # With a value, it is wrong in its own group.
    of_predictions = replace(grouping, predicted=lambda tracks: [8] * len(tracks.predictions))
    ap, recall = numbers([*results, nothing], of_predictions)
    assert ap == pytest.approx([1, 1, 0.5])


def test_no_results():
    metrics = metric.evaluate_results([], truth(annotation(LEFT), categories=(1, 2)))
    assert metrics["AP"] == metrics["AR100"] == 0
    assert metrics["per_class"] == {"class1": 0, "class2": -1}


def test_ground_truth_formats_agree_and_inputs_stay():
    """Polygons, uncompressed and compressed RLE of one square."""
    polygons = [[[0, 1, 2, 1, 2, 3, 0, 3]]] * 4
    uncompressed = [{"size": [8, 8], "counts": [1, 2, 6, 2, 53]}] * 4
    results = [prediction(LEFT)]
    for segmentations in (polygons, uncompressed, LEFT):
        ground_truth = truth({**annotation(LEFT), "segmentations": segmentations})
        before = copy.deepcopy((results, ground_truth))
        assert metric.evaluate_results(results, ground_truth)["AP"] == pytest.approx(1)
        assert (results, ground_truth) == before


@pytest.mark.parametrize("areas", [None, [], [4, 4], ["large"] * 4, [float("nan")] * 4, [None] * 4])
def test_areas_that_are_not_stated_are_those_of_the_masks(areas):
    stated = metric.evaluate_results([prediction(LEFT)], truth(annotation(LEFT)))
    assert (
        metric.evaluate_results([prediction(LEFT)], truth(annotation(LEFT) | {"areas": areas}))
        == stated
    )
    assert stated["APs"] == pytest.approx(1) and stated["APl"] == -1


def test_stated_areas_choose_the_range_whatever_the_masks_are():
    metrics = metric.evaluate_results(
        [prediction(LEFT)], truth(annotation(LEFT) | {"areas": [256**2] * 4})
    )
    assert metrics["APl"] == pytest.approx(1) and metrics["APs"] == -1


@pytest.mark.parametrize(
    "declared, used", [(7, 7.0), (7, "7"), ("7", 7), ("video_07", "video_07"), (7.0, "7.0")]
)
def test_ids_are_matched_in_any_notation(declared, used):
    ground_truth = truth(
        annotation(LEFT, video=used, category=used), videos=(declared,), categories=(declared,)
    )
    results = [prediction(LEFT, video=used, category=used)]
    assert metric.evaluate_results(results, ground_truth)["AP"] == pytest.approx(1)


def test_cocos_results_and_annotations_are_scored():
    """Of images, which are videos of one frame."""
    coco = {
        "images": [{"id": "a.jpg", "height": 8, "width": 8}],
        "categories": [{"id": 1, "name": "class1"}],
        "annotations": [
            {"id": 1, "image_id": "a.jpg", "category_id": 1, "segmentation": LEFT[0], "area": 4}
        ],
    }
    results = [{"image_id": "a.jpg", "category_id": 1, "score": 0.9, "segmentation": LEFT[0]}]
    assert metric.evaluate_results(results, coco)["AP"] == pytest.approx(1)


def test_classes_of_one_name_are_both_in_the_table():
    ground_truth = truth(annotation(LEFT), annotation(RIGHT, category=3), categories=(1, 3, 2))
    for category in ground_truth["categories"][:2]:
        category["name"] = "cat"
    metrics = metric.evaluate_results([prediction(LEFT)], ground_truth)
    assert metrics["per_class"] == {"cat (id 1)": pytest.approx(1), "cat (id 3)": 0, "class2": -1}


def test_table():
    metrics = metric.evaluate_results(
        [prediction(LEFT)], truth(annotation(LEFT), categories=(2, 1))
    )
    assert metric.format_table(metrics).splitlines() == [
        "AP 100.0   AP50 100.0   AP75 100.0   AR1 100.0   AR10 100.0",
        "APs 100.0   APm     -   APl     -",
        "AP per class",
        "  class2     -",
        "  class1 100.0",
    ]


def with_entry(**changes):
    """A good result list whose second entry has the given changes."""
    return [prediction(LEFT), {**prediction(RIGHT), **changes}]


def without_score():
    return [{key: value for key, value in prediction(LEFT).items() if key != "score"}]


@pytest.mark.parametrize(
    "results, message",
    [
        ({"results": []}, "results is a dict, not a list"),
        ([prediction(LEFT), None], r"results\[1\] lacks video_id"),
        (without_score(), r"results\[0\] lacks score"),
        (with_entry(video_id=7), r"results\[1\] has video_id 7"),
        (with_entry(video_id=[1]), r"results\[1\] has video_id \[1\]"),
        (with_entry(category_id=0), r"results\[1\] has category_id 0"),
        (
            with_entry(segmentations=RIGHT[:3]),
            r"results\[1\] has 3 masks for the 4 frames of video 1",
        ),
        (
            with_entry(segmentations=RIGHT + [None]),
            r"results\[1\] has 5 masks for the 4 frames of video 1",
        ),
        (with_entry(segmentations=None), r"results\[1\] has no list of masks"),
        (
            with_entry(segmentations=[None, "1", None, None]),
            r"results\[1\], frame 1, has a segmentation that cannot be read",
        ),
        (
            with_entry(segmentations=[[[0, 0, 2, 0, 2, 2]]] * 4),
            r"results\[1\] has polygons in frame 0",
        ),
        (
            with_entry(segmentations=[encode(np.ones((4, 16), dtype=bool))] * 4),
            r"results\[1\], frame 0, .* its size is \[4, 16\], its video's \[height, width\] \[8, "
            r"8\]",
        ),
        (
            with_entry(segmentations=[{"size": [8, 8], "counts": [1, 62]}] * 4),
            "its runs do not fill the frame",
        ),
        (with_entry(score=float("nan")), r"results\[1\] has the score nan"),
        (with_entry(score=float("inf")), r"results\[1\] has the score inf"),
        (with_entry(score="0.5"), r"results\[1\] has the score '0.5'"),
        (with_entry(score=None), r"results\[1\] has the score None"),
        (with_entry(score=10**400), r"results\[1\] has the score 10000"),
        (with_entry(video_id="two\nlines"), r"results\[1\] has video_id 'two\\nlines'"),
    ],
)
def test_bad_results_are_refused(results, message):
    with pytest.raises(InputError, match=message):
        metric.check_results(results, truth(annotation(LEFT)))


@pytest.mark.parametrize(
    "ground_truth, message",
    [
        ({"videos": [], "categories": []}, "an empty list of videos"),
        ({"videos": {}, "categories": [], "annotations": []}, "no list of videos"),
        (truth(annotation(LEFT)) | {"annotations": {"id": 1}}, "annotations that are no list"),
        (truth({"id": 1, "video_id": 1}), "annotations that refer to no video or category: 1"),
        (
            truth(annotation(LEFT[:3])),
            "annotation 1 of the ground truth has 3 segmentations, its video has 4 frames",
        ),
        (
            truth(annotation(LEFT) | {"video_id": [1]}),
            r"annotation 1 .* has video_id \[1\], which is no id",
        ),
        (
            truth(annotation(LEFT) | {"iscrowd": 2}),
            "annotation 1 .* has iscrowd 2, which is neither 0 nor 1",
        ),
        (
            truth(annotation(LEFT), categories=([1],)),
            r"category at index 0 .* has id \[1\], which is no id",
        ),
        (
            truth(annotation(LEFT), size=(10**6, 10**6)),
            "video 1 of the ground truth is said to be 1000000x1000000",
        ),
        (
            truth(annotation(LEFT), size=("eight", 8)),
            "video 1 .* has height 'eight', which is no whole number",
        ),
        (truth(annotation(LEFT), frames=0), "video 1 of the ground truth has no frames"),
        (
            truth(annotation(LEFT), size=(8, 9)),
            r"annotation 1 .*, frame 0, .* its size is \[8, 8\]",
        ),
    ],
)
def test_bad_ground_truth_is_refused(ground_truth, message):
    with pytest.raises(InputError, match=message):
        metric.check_results([], ground_truth)


# A second implementation, straight from the definition: bool arrays, one setting at a time, plain
# loops.


def naive_iou(first, second):
    """Overlap of two (L, H, W) bool arrays."""
    union = (first | second).sum()
    return (first & second).sum() / union if union else 0.0


def naive_size(masks):
    areas = [frame.sum() for frame in masks if frame.any()]
    return sum(areas) / len(areas) if areas else 0.0


def naive_precision_recall(predictions, truths, threshold, smallest, largest, limit):
    """(mean precision over recall points, recall) of one category, or None without ground truth.

    predictions: (video, score, masks) in file order; truths: (video, crowd, masks) in file order.
    """

    def counts(masks):
        return smallest <= naive_size(masks) <= largest

    ranked = []
    for video in sorted({entry[0] for entry in predictions}):
        ranked += sorted((p for p in predictions if p[0] == video), key=lambda p: -p[1])[:limit]
    ranked.sort(key=lambda p: -p[1])
    free = list(range(len(truths)))
    total = sum(not crowd and counts(masks) for _, crowd, masks in truths)
    if not total:
        return None
    outcomes = []  # True: found something; False: error
    for video, _, masks in ranked:
        options = []
        for index, (truth_video, crowd, truth_masks) in enumerate(truths):
            overlap = naive_iou(masks, truth_masks)
            if truth_video == video and (crowd or index in free) and overlap >= threshold:
                options.append((not crowd and counts(truth_masks), overlap, index))
        if options:
            regular, _, index = max(options)
            if index in free:
                free.remove(index)
            if regular:
                outcomes.append(True)
        elif counts(masks):
            outcomes.append(False)
    points = [
        (sum(outcomes[:n]) / total, sum(outcomes[:n]) / n) for n in range(1, len(outcomes) + 1)
    ]
    precisions = [
        max((precision for recall, precision in points if recall >= wanted), default=0.0)
        for wanted in np.linspace(0, 1, 101)
    ]
    return np.mean(precisions), sum(outcomes) / total


@pytest.mark.parametrize("seed", seeds(20))
def test_against_naive_implementation(seed, monkeypatch):
    """Tiny random videos: ties, empty and missing masks, crowds.

    Areas and limits that matter here.
    """
    random = np.random.default_rng(seed)
    ranges, limits = [(0, 1e10), (0, 9), (9, 12), (12, 1e10)], (1, 3, 6)
    area = replace(metric.AREA, ranges=dict(zip(metric.AREA_RANGES, ranges)))
    monkeypatch.setattr(metric, "AREA", area)
    monkeypatch.setattr(metric, "MAX_PREDICTIONS", limits)
    size, frames, videos, categories = (5, 6), 3, (3, 1, 2), (4, 2, 9)

    truths, predictions = {c: [] for c in categories}, {c: [] for c in categories}
    annotations, results = [], []
    for number in range(16):
        video, category = int(random.choice(videos)), int(random.choice(categories[:2]))
        crowd = number % 5 == 4
        masks = random.random((frames, *size)) < random.uniform(0.2, 0.6)
        masks[random.random(frames) < 0.2] = False
        rles = [encode(mask) if mask.any() else None for mask in masks]
        annotations.append(annotation(rles, number, video, category, int(crowd)))
        truths[category].append((video, crowd, masks))
        for noise in random.choice([0.0, 0.02, 0.1, 0.3], size=random.integers(0, 5)):
            noisy = masks ^ (random.random(masks.shape) < noise)
            noisy[random.random(frames) < 0.1] = False
            score = int(random.integers(0, 5)) / 4
            other = category if random.random() < 0.8 else int(random.choice(categories))
            rles = [encode(mask) if mask.any() or random.random() < 0.5 else None for mask in noisy]
            results.append(prediction(rles, score, video, other))
            predictions[other].append((video, score, noisy))

    def naive(thresholds, area, limit):
        """Mean (AP, AR) over thresholds and the categories that have ground truth."""
        found = [
            naive_precision_recall(
                predictions[category], truths[category], threshold, *ranges[area], limit
            )
            for category in categories
            for threshold in thresholds
        ]
        defined = [pair for pair in found if pair is not None]
        return np.mean(defined, axis=0) if defined else (-1, -1)

    thresholds = np.linspace(0.5, 0.95, 10)
    expected = {
        "AP50": naive(thresholds[:1], 0, limits[2])[0],
        "AP75": naive(thresholds[5:6], 0, limits[2])[0],
        "AR1": naive(thresholds, 0, limits[0])[1],
        "AR10": naive(thresholds, 0, limits[1])[1],
    }
    for area, names in enumerate((("AP", "AR100"), ("APs", "ARs"), ("APm", "ARm"), ("APl", "ARl"))):
        expected.update(zip(names, naive(thresholds, area, limits[2])))
    ground_truth = truth(
        *annotations, videos=videos, frames=frames, size=size, categories=categories
    )
    metrics = metric.evaluate_results(results, ground_truth)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-9)


def test_the_mean_of_parts_is_that_of_what_is_defined():
    """A class or a size that a part does not have counts in the others alone."""
    parts = [
        {"AP": 0.5, "APl": -1.0, "per_class": {"ant": 0.2, "bee": -1.0}},
        {"AP": 0.1, "APl": 0.4, "per_class": {"bee": 0.6}},
        {"AP": 0.0, "APl": -1.0, "per_class": {"cat": -1.0, "ant": 0.4}},
    ]
    mean = metric.mean_metrics(parts)
    assert (mean["AP"], mean["APl"]) == pytest.approx((0.2, 0.4))
    assert mean["per_class"] == {"ant": pytest.approx(0.3), "bee": pytest.approx(0.6), "cat": -1}


def test_curves_are_in_the_order_of_category_ids():
    """Wherever the categories stand in the file: the K axis is that of 3, 7, 90, 1000."""
    ground_truth = truth(
        annotation(LEFT, category=90), annotation(RIGHT, category=3), categories=(90, 1000, 7, 3)
    )
    results = [prediction(LEFT, category=90), prediction(LEFT, category=3, score=0.4)]
    precision, recall, scores = metric.accumulate(results, ground_truth)
    assert recall[0, :, 0, 2].tolist() == [0, -1, 1, -1]
    assert precision[0, 0, :, 0, 2].tolist() == pytest.approx([0, -1, 1, -1])
    assert scores[0, 0, :, 0, 2].tolist() == [0.4, -1, 0.9, -1]


def test_annotations_of_videos_that_are_not_listed_do_not_count():
    """A part of a set may have the annotations of the whole."""
    other = annotation(RIGHT, number=2, video=8) | {"areas": None, "segmentations": "unread"}
    metrics = metric.evaluate_results([prediction(LEFT)], truth(annotation(LEFT), other))
    assert metrics["AP"] == pytest.approx(1)


def test_no_polygon_is_an_empty_mask():
    half = annotation(LEFT[:2] + [None] * 2)
    results = [prediction(LEFT[:2] + [[], None])]
    for nothing in ([], None):
        ground_truth = truth(half | {"segmentations": LEFT[:2] + [None, nothing]})
        assert metric.evaluate_results(results, ground_truth)["AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    "change",
    [{"score": float("nan")}, {"video_id": 2}, {"segmentations": LEFT[:3]}],
    ids=["score", "video", "masks"],
)
def test_results_are_checked_before_they_are_scored(change):
    with pytest.raises(InputError, match=r"results\[0\] has"):
        metric.evaluate_results([prediction(LEFT) | change], truth(annotation(LEFT)))


def test_a_table_tells_zero_from_undefined():
    ground_truth = truth(annotation(LEFT), categories=(1, 2))
    table = metric.format_table(metric.evaluate_results([], ground_truth))
    assert "AP   0.0" in table and "APl     -" in table
    assert table.splitlines()[-2:] == ["  class1   0.0", "  class2     -"]
