"""Causes of lost AP: each is the entire loss once, and plain loops find the same."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from evaluation import causes
from evaluation.causes import BACKGROUND, CAUSES, NONE, explain_video, measure_causes
from evaluation.metric import (
    IOU_THRESHOLDS,
    average_precision,
    category_ids,
    check_results,
    evaluate_results,
    match_video,
)
from evaluation.overlaps import measure_overlaps
from hand_made import LEFT, RIGHT, annotation, prediction, random_set, seeds, square, truth

NOTHING = [None] * 2


def explain(results, ground_truth):
    """(overlaps, explanation) of every video."""
    results, ground_truth = check_results(results, ground_truth)
    categories = {category: k for k, category in enumerate(category_ids(ground_truth))}
    return [
        (overlaps, explain_video(overlaps, match_video(overlaps), categories))
        for overlaps in measure_overlaps(results, ground_truth)
    ]


def explanations(results, ground_truth):
    return [explanation for _, explanation in explain(results, ground_truth)]


def truth_of_two(**more):
    """The objects LEFT and RIGHT, of the same class."""
    return truth(annotation(LEFT), annotation(RIGHT, number=2), **more)


SMALL = [square(0, side=1)] * 4  # a quarter of LEFT
ENTIRE_LOSSES = {
    "wrong class": ([prediction(LEFT, category=2)], truth(annotation(LEFT), categories=(1, 2))),
    "loose mask": ([prediction(SMALL)], truth(annotation(LEFT))),
    # Two halves of one object.
    "broken track": (
        [prediction([LEFT[0], None, None, None]), prediction([None] + LEFT[1:2] + NOTHING, 0.8)],
        truth(annotation(LEFT)),
    ),
    # Halfway, two tracks exchange their objects.
    "identity switch": (
        [prediction(LEFT[:2] + RIGHT[2:]), prediction(RIGHT[:2] + LEFT[2:], 0.8)],
        truth_of_two(),
    ),
    "class and mask": ([prediction(SMALL, category=2)], truth(annotation(LEFT), categories=(1, 2))),
    "duplicate": (
        [prediction(LEFT, 0.9), prediction(LEFT, 0.8), prediction(RIGHT, 0.7)],
        truth_of_two(),
    ),
    "background": ([prediction(LEFT, 0.9), prediction(RIGHT, 0.8)], truth(annotation(RIGHT))),
    "missed": ([prediction(LEFT)], truth_of_two()),
    # The better of two tracks has the lower score.
    "score order": ([prediction(SMALL, 0.9), prediction(LEFT, 0.8)], truth(annotation(LEFT))),
}


@pytest.mark.parametrize("name", CAUSES)
def test_each_cause_is_the_entire_loss_once(name):
    results, ground_truth = ENTIRE_LOSSES[name]
    metrics = evaluate_results(results, ground_truth)
    gains = measure_causes(explanations(results, ground_truth))
    assert metrics["AP"] < 0.9 and metrics["AP50"] < 0.9
    for cause, gain in gains.items():
        expected = {key: 1 - metrics[key] if cause == name else 0 for key in ("AP", "AP50")}
        assert gain == pytest.approx(expected), cause


def test_a_perfect_result_has_no_cause():
    ground_truth = truth_of_two()
    gains = measure_causes(explanations([prediction(LEFT), prediction(RIGHT)], ground_truth))
    assert gains == {name: {"AP": 0, "AP50": 0} for name in CAUSES}


def test_without_ground_truth_no_gain_is_defined():
    gains = measure_causes(explanations([prediction(LEFT)], truth()))
    assert gains == {name: {"AP": -1, "AP50": -1} for name in CAUSES}


@pytest.mark.parametrize(
    "masks, cause",
    [
        (LEFT[:1] + [None] * 3, "broken track"),
        (LEFT[:2] + [square(1)] * 2, "loose mask"),  # beside the object
        (LEFT[:1] + [None] + RIGHT[2:], "identity switch"),  # 8 pixels of 12
        (LEFT[:1] + [None] * 2 + [square(6)], "broken track"),  # RIGHT's IoU in that frame is 1 / 3
        (SMALL[:2] + [None] * 2, "broken track"),  # 8 pixels of 14
        (SMALL[:3] + [None], "loose mask"),  # 9 pixels of 13
    ],
)
def test_what_spoils_most_pixels_is_the_cause(masks, cause):
    assert cause_of(masks, truth_of_two()) == cause


def test_a_mask_where_the_object_is_hidden_breaks_the_track():
    hidden = truth(annotation(LEFT[:2] + NOTHING))
    assert cause_of(LEFT, hidden) == "broken track"
    other = annotation(NOTHING + LEFT[2:], 2)
    assert cause_of(LEFT, truth(*hidden["annotations"], other)) == "identity switch"


def test_of_equal_kinds_a_switch_counts_first_and_a_mask_last():
    objects = annotation(LEFT), annotation(RIGHT, 2, category=2)
    ground_truth = truth(*objects, categories=(1, 2))
    broken_and_switched = LEFT[:1] + [None] * 2 + RIGHT[3:]  # 8 pixels each
    assert cause_of(broken_and_switched, ground_truth) == "identity switch"
    two_pixels = {"size": [8, 8], "counts": [1, 2, 61]}
    broken_and_loose = LEFT[:1] + [two_pixels] * 2 + [None]  # 4 pixels each
    assert cause_of(broken_and_loose, ground_truth) == "broken track"


def cause_of(masks, ground_truth):
    """The cause of one prediction at the highest threshold."""
    (explanation,) = explanations([prediction(masks)], ground_truth)
    return CAUSES[explanation.causes[-1, 0]]


def test_crowds_and_ignored_predictions_have_no_cause():
    """A prediction of a crowd is no error, and a crowd is no object that an error can be of."""
    crowd = annotation(RIGHT, 2, crowd=1)
    (explanation,) = explanations([prediction(RIGHT)], truth(annotation(LEFT), crowd))
    assert (explanation.causes == NONE).all() and not explanation.true.any()
    wrong = prediction(RIGHT, category=2)
    (explanation,) = explanations([wrong], truth(annotation(LEFT), crowd, categories=(1, 2)))
    assert (explanation.causes == BACKGROUND).all()
    assert explanation.missed.tolist() == [[True]] * len(IOU_THRESHOLDS)


def test_predictions_beyond_the_limit_are_left_out():
    results = [prediction(RIGHT, 0.9)] * 100 + [prediction(LEFT, 0.8)]
    (explanation,) = explanations(results, truth(annotation(LEFT)))
    assert explanation.predictions.tolist() == list(range(100))
    assert explanation.missed.all()


def test_a_found_object_is_not_given_to_a_second_prediction():
    """The better of two labels of one track is wrong: the object's loss has one cause only."""
    results = [prediction(SMALL, 0.9, category=2), prediction(SMALL, 0.8)]
    gains = measure_causes(explanations(results, truth(annotation(LEFT), categories=(1, 2))))
    assert gains["class and mask"]["AP"] == pytest.approx(1)
    assert gains["loose mask"]["AP"] == 0


@pytest.mark.parametrize("seed", seeds(12))
def test_fixes_never_cost_ap_and_all_together_leave_no_loss(seed):
    results, ground_truth = random_set(seed)
    metrics = evaluate_results(results, ground_truth)
    found = explanations(results, ground_truth)
    explained = causes.concatenate(found)
    now = causes.mean_fixed_precision(explained, ())
    assert now == pytest.approx({key: metrics[key] for key in ("AP", "AP50")}, abs=1e-12)
    assert all(gain["AP"] >= 0 for gain in measure_causes(found).values())
    everything = causes.mean_fixed_precision(explained, range(len(CAUSES)))
    assert everything == pytest.approx({"AP": 1, "AP50": 1})
    order = causes.measure_order(found)
    assert now["AP"] <= order["AP"] <= 1


def test_perfect_order_puts_all_true_predictions_first():
    results = [prediction(SMALL, 0.9), prediction(LEFT, 0.8), prediction(SMALL, 0.7)]
    found = explanations(results, truth_of_two())
    assert causes.measure_order(found) == pytest.approx({"AP": 51 / 101, "AP50": 51 / 101})


# A second implementation, from the definitions


def decode(entry, size):
    """(L, H, W) bool."""
    empty = np.zeros(size, dtype=bool)
    masks = entry["segmentations"]
    return [empty if rle is None else coco_mask.decode(rle).astype(bool) for rle in masks]


def naive_iou(first, second):
    union = np.sum(np.logical_or(first, second))
    return np.sum(np.logical_and(first, second)) / union if union else 0.0


def naive_spoiling(masks, own, others):
    pixels = {"identity switch": 0, "broken track": 0, "loose mask": 0}
    for frame, (mask, actual) in enumerate(zip(masks, own)):
        iou_of_other = max((naive_iou(mask, other[frame]) for other in others), default=0)
        if iou_of_other >= 0.5 and iou_of_other > naive_iou(mask, actual):
            kind = "identity switch"
        elif not mask.any() or not actual.any():
            kind = "broken track"
        else:
            kind = "loose mask"
        pixels[kind] += np.sum(mask ^ actual)
    return max(pixels, key=pixels.get)


def naive_cause(masks, label, objects, threshold, rank, rank_of_match):
    """The cause of a false prediction of one video.

    objects: (category, masks) of what counts. rank_of_match: {object: rank of its prediction}.
    """
    options = [
        (naive_iou(masks, actual), category == label, -number)
        for number, (category, actual) in enumerate(objects)
    ]
    iou, right, number = max(options, default=(0, False, 0))
    if iou < 0.1:
        return "background"
    if iou >= threshold:
        return "duplicate" if right else "wrong class"
    if not right:
        return "class and mask"
    if rank_of_match.get(-number, -1) > rank:
        return "score order"
    others = [actual for other, (_, actual) in enumerate(objects) if other != -number]
    return naive_spoiling(masks, objects[-number][1], others)


def naive_second_round(entries, objects, threshold, free):
    """{rank: object} of (rank, masks, label, cause), in the order of ranks."""
    matches = {}
    for rank, masks, label, cause in entries:
        if cause in ("duplicate", "background", "score order"):
            continue
        least = threshold if cause == "wrong class" else 0.1
        options = []
        for number in free:
            category, actual = objects[number]
            iou = naive_iou(masks, actual)
            if iou >= least and (category == label) != (cause in ("wrong class", "class and mask")):
                options.append((iou, -number))
        if options:
            matches[rank] = -max(options)[1]
            free.remove(matches[rank])
    return matches


@pytest.mark.parametrize("seed", seeds(12))
def test_against_naive_implementation(seed):
    results, ground_truth = random_set(seed)
    size = 5, 6
    seen = set()
    for overlaps, explanation in explain(results, ground_truth):
        objects = [
            (entry["category_id"], decode(entry, size))
            for entry in overlaps.annotations
            if not entry["iscrowd"]
        ]
        counted = [g for g, entry in enumerate(overlaps.annotations) if not entry["iscrowd"]]
        matched = match_video(overlaps)
        entries = [overlaps.predictions[index] for index in explanation.predictions]
        assert [entry["score"] for entry in entries] == sorted(
            (entry["score"] for entry in entries), reverse=True
        )
        rank_of = {index: rank for rank, index in enumerate(explanation.predictions.tolist())}
        for t, threshold in enumerate(IOU_THRESHOLDS):
            rank_of_match, false = {}, []
            for matching in matched.values():
                for d, index in enumerate(matching["predictions"]):
                    if matching["true"][0, t, d]:
                        match = counted.index(matching["matches"][0, t, d])
                        rank_of_match[match] = rank_of[index]
                    if matching["false"][0, t, d]:
                        false.append(rank_of[index])
            errors = []
            for rank in sorted(false):
                masks, label = decode(entries[rank], size), entries[rank]["category_id"]
                cause = naive_cause(masks, label, objects, threshold, rank, rank_of_match)
                errors.append((rank, masks, label, cause))
            expected = {rank: cause for rank, _, _, cause in errors}
            found = {
                rank: CAUSES[cause]
                for rank, cause in enumerate(explanation.causes[t])
                if cause != NONE
            }
            assert found == expected
            seen |= set(found.values())
            free = [number for number in range(len(objects)) if number not in rank_of_match]
            second = naive_second_round(errors, objects, threshold, free)
            categories = category_ids(ground_truth)
            fixed = {
                rank: categories[k]
                for rank, k in enumerate(explanation.fixed_categories[t])
                if k != NONE
            }
            assert fixed == {rank: objects[number][0] for rank, number in second.items()}
            missed = [number in free for number in range(len(objects))]
            assert explanation.missed[t].tolist() == missed
    assert len(seen) >= 4


def test_average_precision_with_counts_is_that_of_copies():
    """A prediction that counts twice is two predictions of equal outcome."""
    random = np.random.default_rng(0)
    true = random.random((5, 30)) < 0.4
    counts = random.integers(0, 3, 30)
    copies = np.repeat(true, counts, axis=1)
    expected = average_precision(copies, ~copies, np.full(5, 40))
    np.testing.assert_allclose(
        average_precision(true * counts, ~true * counts, np.full(5, 40)), expected, atol=1e-12
    )
    assert average_precision(true[:, :0], true[:, :0], np.ones(5)).tolist() == [0] * 5
