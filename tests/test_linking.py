"""The linking oracle: small examples, and every possible linking of tiny videos."""

from itertools import permutations, product

import numpy as np
import pytest

from evaluation import linking
from evaluation.linking import (
    best_links,
    different_tracks,
    exclusive_links,
    link_video,
    measure_linking,
)
from evaluation.metric import category_ids, check_results, evaluate_results
from evaluation.overlaps import measure_overlaps
from hand_made import LEFT, RIGHT, annotation, prediction, random_set, seeds, square, truth

NAMES = ("AP", "AP50", "AP75")
NOTHING = [None] * 4
TWO = truth(annotation(LEFT), annotation(RIGHT, number=2), categories=(1, 2))


def overlaps_of(results, ground_truth):
    return measure_overlaps(*check_results(results, ground_truth))


def measure(results, ground_truth):
    links = [link_video(overlaps) for overlaps in overlaps_of(results, ground_truth)]
    return measure_linking(links, category_ids(ground_truth))


def linked_tracks(results, ground_truth):
    """[(category, score, areas)] of the only video after linking."""
    (overlaps,) = overlaps_of(results, ground_truth)
    track_of, tracks = different_tracks(overlaps)
    _, gains = best_links(tracks)
    linked = linking.linked_overlaps(overlaps, track_of, tracks, exclusive_links(gains))
    return [
        (entry["category_id"], entry["score"], areas)
        for entry, areas in zip(linked.predictions, linked.predicted_areas.T.tolist())
    ]


def test_exchanged_identities_are_all_that_is_lost():
    swapped = [prediction(LEFT[:2] + RIGHT[2:]), prediction(RIGHT[:2] + LEFT[2:], 0.8)]
    assert evaluate_results(swapped, TWO)["AP"] == 0
    assert measure(swapped, TWO) == {
        name: pytest.approx(dict.fromkeys(NAMES, 1)) for name in ("linking", "bound")
    }


def test_linking_mends_no_mask_and_no_class():
    loose = [prediction([square(0, side=1)] * 4)]
    wrong = [prediction(LEFT, category=2), prediction(RIGHT, category=2)]
    assert measure(loose, TWO)["linking"]["AP"] == measure(wrong, TWO)["linking"]["AP"] == 0
    assert measure(loose, TWO)["bound"]["AP"] == 0
    assert measure(wrong, TWO)["bound"]["AP"] == pytest.approx(1)


def test_tracks_that_are_linked_as_they_were_keep_classes_and_scores():
    results = [
        prediction(LEFT, 0.9),
        prediction(LEFT, 0.3, category=2),
        prediction(RIGHT, 0.8),
        prediction([square(3, 1)] * 4, 0.7),  # of no object
        prediction(NOTHING, 0.6),
    ]
    expected = [(1, 0.9, 4), (2, 0.3, 4), (1, 0.8, 4), (1, 0.7, 1), (1, 0.6, 0)]
    expected = [(category, score, [area] * 4) for category, score, area in expected]
    assert linked_tracks(results, TWO) == expected


def test_a_linked_track_has_the_mean_score_of_its_masks():
    """Three frames of one track with two labels, and one of another track with one label."""
    results = [
        prediction(LEFT[:3] + [None], 0.8),
        prediction([None] * 3 + LEFT[3:], 0.4),
        prediction(LEFT[:3] + [None], 0.6, category=2),
    ]
    (first, second) = linked_tracks(results, TWO)
    assert first == (1, pytest.approx(0.7), [4] * 4)
    assert second == (2, pytest.approx(0.45), [4] * 4)


def test_what_no_object_gets_keeps_its_share_of_the_score():
    """Here three of four masks; the object is visible in one frame only."""
    ground_truth = truth(annotation(LEFT[:1] + [None] * 3))
    linked, left = linked_tracks([prediction(LEFT, 0.8)], ground_truth)
    assert linked == (1, pytest.approx(0.8), [4, 0, 0, 0])
    assert left == (1, pytest.approx(0.6), [0, 4, 4, 4])


def test_a_mask_that_does_more_harm_than_good_is_not_linked():
    """One pixel of the object and many outside."""
    harmful = square(1, side=6)
    linked, left = linked_tracks([prediction(LEFT[:3] + [harmful])], truth(annotation(LEFT)))
    assert linked[2] == [4, 4, 4, 0]
    assert left[2] == [0, 0, 0, 36]


def test_crowds_get_no_masks():
    ground_truth = truth(annotation(LEFT), annotation(RIGHT, 2, crowd=1))
    swapped = [prediction(LEFT[:2] + RIGHT[2:]), prediction(RIGHT[:2] + LEFT[2:], 0.8)]
    found = measure(swapped, ground_truth)
    assert found["linking"]["AP"] == found["bound"]["AP"] == pytest.approx(1)
    (overlaps,) = overlaps_of(swapped, ground_truth)
    assert len(link_video(overlaps).categories) == 1


def test_nothing_is_defined_without_ground_truth_and_found_without_predictions():
    undefined = {name: dict.fromkeys(NAMES, -1) for name in ("linking", "bound")}
    assert measure([prediction(LEFT)], truth()) == undefined
    assert measure([], TWO) == {name: dict.fromkeys(NAMES, 0) for name in ("linking", "bound")}
    hidden = truth(annotation(NOTHING))  # an object that is never visible
    assert measure([prediction(LEFT)], hidden)["bound"]["AP"] == 0


# Every linking of tiny videos


def tiny_videos(seed):
    """The different tracks of a few masks in three frames, and three ground truth tracks."""
    results, ground_truth = random_set(seed, videos=(1,))
    for overlaps in overlaps_of(results[:6], ground_truth):
        yield different_tracks(overlaps)[1]


def iou_of(overlaps, choice, g):
    """IoU of the track with mask choice[frame] (None for no mask) and a ground truth track."""
    chosen = [(track, frame) for frame, track in enumerate(choice) if track is not None]
    shared = sum(overlaps.intersections[frame, track, g] for track, frame in chosen)
    area = sum(overlaps.predicted_areas[frame, track] for track, frame in chosen)
    union = area + overlaps.actual_areas[:, g].sum() - shared
    return shared / union if union else 0.0


@pytest.mark.parametrize("seed", seeds(20))
def test_no_choice_of_masks_has_a_higher_iou(seed):
    for overlaps in tiny_videos(seed):
        ious, _ = best_links(overlaps)
        options = [None, *range(len(overlaps.predictions))]
        for g, iou in enumerate(ious):
            assert iou == max(iou_of(overlaps, choice, g) for choice in product(options, repeat=3))


@pytest.mark.parametrize("seed", seeds(20))
def test_no_exclusive_assignment_gains_more(seed):
    random = np.random.default_rng(seed)
    gains = np.round(random.uniform(-1, 1, (2, 4, 3)), 1)
    links = exclusive_links(gains)
    for frame in range(2):
        of_frame = gains[frame]
        chosen = [p for p in links[frame] if p >= 0]
        assert len(set(chosen)) == len(chosen)
        total = sum(of_frame[p, g] for g, p in enumerate(links[frame]) if p >= 0)
        best = max(
            sum(max(0, of_frame[p, g]) for g, p in enumerate(some))
            for some in permutations(range(4), 3)
        )
        assert total == pytest.approx(best)


def test_links_are_exclusive_where_two_objects_want_a_mask():
    """The object that gains more gets it."""
    ground_truth = truth(annotation([square(0, 3)] * 4), annotation([square(2, 1)] * 4, 2))
    (overlaps,) = overlaps_of([prediction([square(0, 3)] * 4)], ground_truth)
    _, gains = best_links(overlaps)
    assert (gains > 0).all()
    assert exclusive_links(gains).tolist() == [[0, -1]] * 4


@pytest.mark.parametrize("seed", seeds(8))
def test_the_bound_is_reached_and_never_exceeded(seed):
    """By linked tracks of the same masks, with any classes and scores."""
    results, ground_truth = random_set(seed, videos=(1,))
    results = results[:6]
    bound = measure(results, ground_truth)["bound"]
    (overlaps,) = overlaps_of(results, ground_truth)
    masks = {d: entry["segmentations"] for d, entry in enumerate(results)}
    choices = list(product([None, *masks], repeat=3))

    def linked(choice, score, category):
        track = [masks[t][frame] if t is not None else None for frame, t in enumerate(choice)]
        return prediction(track, score, 1, category)

    best = []  # the best track of every object, in the order of IoU
    for g, entry in enumerate(overlaps.annotations):
        choice = max(choices, key=lambda choice: iou_of(overlaps, choice, g))
        best.append(linked(choice, iou_of(overlaps, choice, g), entry["category_id"]))
    best = [entry for entry, counts in zip(best, ~overlaps.crowd) if counts]
    reached = evaluate_results(best, ground_truth)
    assert {name: reached[name] for name in NAMES} == pytest.approx(bound)

    random = np.random.default_rng(seed)
    for _ in range(50):
        tracks = [choices[number] for number in random.integers(len(choices), size=8)]
        some = [linked(choice, random.random(), int(random.choice((4, 2)))) for choice in tracks]
        metrics = evaluate_results(some + best * random.integers(2), ground_truth)
        assert all(metrics[name] <= bound[name] + 1e-12 for name in NAMES)


@pytest.mark.parametrize("seed", seeds(8))
def test_the_tracker_itself_does_not_exceed_the_bound(seed):
    results, ground_truth = random_set(seed)
    metrics = evaluate_results(results, ground_truth)
    found = measure(results, ground_truth)
    for name in NAMES:
        assert max(metrics[name], found["linking"][name]) <= found["bound"][name] + 1e-12
