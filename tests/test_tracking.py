"""Identity metrics: official numbers, small examples, and each metric again in plain loops."""

from itertools import permutations

import numpy as np
import pytest

from evaluation import metric
from evaluation.overlaps import measure_overlaps
from evaluation.tracking import METRICS, evaluate_tracking, format_tracking
from golden_set import occlusion_set
from test_metric import LEFT, RIGHT, annotation, encode, prediction, square, truth


def tracking_of(results, ground_truth, min_score=0.3):
    results, ground_truth = metric.check_results(results, ground_truth)
    videos = measure_overlaps(results, ground_truth)
    return evaluate_tracking(videos, ground_truth["categories"], min_score)


def numbers_of(results, *annotations, **options):
    """The metrics over detections."""
    return tracking_of(results, truth(*annotations, **options))["over_detections"]


def assert_equal(found, expected):
    """Nested dicts with the same keys in the same order, numbers to 1e-6."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_equal(found[name], value)
        else:
            assert found[name] == pytest.approx(value, rel=0, abs=1e-6), name


def test_golden_tracking():
    """All numbers of TrackEval, over detections, as class mean and per class."""
    ground_truth, results, expected = occlusion_set()
    expected = expected["tracking"]
    assert_equal(tracking_of(results, ground_truth, expected["score_threshold"]), expected)


# Small examples: two objects that stand still for four frames


def test_perfect_tracks():
    numbers = numbers_of([prediction(LEFT), prediction(RIGHT)], annotation(LEFT), annotation(RIGHT))
    assert list(numbers) == list(METRICS)
    zero = {"IDSW", "Frag"}
    assert numbers == {name: 0 if name in zero else pytest.approx(1) for name in METRICS}


def test_identities_swapped_halfway():
    """All masks are perfect, but each object has two tracks and each track two objects.

    Every match c has |TPA| = 2, |FNA| = 2, |FPA| = 2.
    """
    swapped = [prediction(LEFT[:2] + RIGHT[2:]), prediction(RIGHT[:2] + LEFT[2:])]
    numbers = numbers_of(swapped, annotation(LEFT, 1), annotation(RIGHT, 2))
    assert numbers["DetA"] == numbers["LocA"] == pytest.approx(1)
    assert numbers["AssA"] == pytest.approx(2 / (2 + 2 + 2))
    assert numbers["AssRe"] == numbers["AssPr"] == pytest.approx(2 / (2 + 2))
    assert numbers["HOTA"] == pytest.approx((1 / 3) ** 0.5)
    assert (numbers["IDSW"], numbers["Frag"]) == (2, 0)
    assert numbers["MOTA"] == pytest.approx(1 - 2 / 8)
    assert numbers["IDF1"] == numbers["IDR"] == numbers["IDP"] == pytest.approx(4 / 8)


def test_a_track_broken_into_two():
    """Every match has |TPA| = 2, |FNA| = 2, |FPA| = 0; one half has the object's identity."""
    halves = [prediction(LEFT[:2] + [None] * 2), prediction([None] * 2 + LEFT[2:])]
    numbers = numbers_of(halves, annotation(LEFT))
    assert (numbers["AssA"], numbers["AssRe"], numbers["AssPr"]) == pytest.approx((0.5, 0.5, 1))
    assert (numbers["IDSW"], numbers["Frag"]) == (1, 0)
    assert (numbers["IDF1"], numbers["IDR"], numbers["IDP"]) == pytest.approx((0.5, 0.5, 0.5))


def test_a_track_that_pauses_is_fragmented_but_keeps_its_identity():
    """A second track keeps the frame from being empty: TrackEval skips empty ones."""
    results = [prediction([LEFT[0], None, LEFT[2], LEFT[3]]), prediction(RIGHT)]
    numbers = numbers_of(results, annotation(LEFT, 1), annotation(RIGHT, 2))
    assert (numbers["IDSW"], numbers["Frag"]) == (0, 1)
    assert numbers["DetRe"] == pytest.approx(7 / 8) and numbers["DetPr"] == pytest.approx(1)
    assert numbers["MOTA"] == pytest.approx(1 - 1 / 8)
    alone = numbers_of(results[:1], annotation(LEFT))
    assert alone["Frag"] == 0  # its frame does not count as a frame before


def test_a_switch_is_counted_after_any_pause():
    results = [
        prediction([LEFT[0], None, None, None]),
        prediction([None, None, None, LEFT[3]]),
        prediction(RIGHT),
    ]
    numbers = numbers_of(results, annotation(LEFT, 1), annotation(RIGHT, 2))
    assert (numbers["IDSW"], numbers["Frag"]) == (1, 1)


def test_clear_keeps_a_match_while_it_is_good_enough():
    """From the second frame on, another track fits better than the first, whose IoU is 2 / 3.

    CLEAR keeps the first track, and IDF1 prefers it, because it is longer. HOTA weighs both and
    here matches the other.
    """
    wide, narrow = [square(0, 3)] * 4, np.zeros((8, 8), bool)
    narrow[1:4, :2] = True  # 6 of 9 pixels
    results = [prediction([encode(narrow)] * 4), prediction([None] + wide[1:])]
    numbers = numbers_of(results, annotation(wide))
    assert numbers["IDSW"] == 0
    assert numbers["IDF1"] == pytest.approx(2 * 4 / (4 + 7))
    # The IoU of the first frame is enough for 13 thresholds, those of the others for all.
    assert numbers["DetRe"] == pytest.approx((13 / 19 + 3) / 4)


def test_loose_masks_match_up_to_their_iou():
    """IoU 2 / 3: a match at 13 of the 19 thresholds 0.05, 0.1, ..., 0.95."""
    narrow = np.zeros((8, 8), bool)
    narrow[1:4, :2] = True
    numbers = numbers_of([prediction([encode(narrow)] * 4)], annotation([square(0, 3)] * 4))
    assert numbers["HOTA"] == numbers["DetA"] == numbers["AssA"] == pytest.approx(13 / 19)
    assert numbers["LocA"] == pytest.approx((13 * 2 / 3 + 6 * 1) / 19)  # 1 without a match


def test_the_score_threshold_is_included():
    results = [prediction(LEFT, 0.5), prediction(RIGHT, 0.499)]
    ground_truth = truth(annotation(LEFT, 1), annotation(RIGHT, 2))
    tracking = tracking_of(results, ground_truth, 0.5)
    assert (tracking["score_threshold"], tracking["tracks"]) == (0.5, 1)
    numbers = tracking["over_detections"]
    assert (numbers["DetRe"], numbers["DetPr"]) == pytest.approx((0.5, 1))
    assert format_tracking(tracking) == (
        "1 tracks of score 0.5 or more: "
        "HOTA 70.7   DetA 50.0   AssA 100.0   MOTA 50.0   IDF1 66.7   IDSW 0   Frag 0"
    )


def test_crowds_and_empty_masks_are_absent():
    empty = encode(np.zeros((8, 8), bool))
    plain = numbers_of([prediction(LEFT[:3] + [None])], annotation(LEFT[:3] + [None]))
    ground_truth = [annotation(LEFT[:3] + [empty]), annotation(RIGHT, 2, crowd=1)]
    assert numbers_of([prediction(LEFT[:3] + [empty])], *ground_truth) == plain
    with_empty_tracks = [
        prediction(LEFT[:3] + [None]),
        prediction([empty] * 4),
        prediction([None] * 4),
    ]
    assert numbers_of(with_empty_tracks, *ground_truth, annotation([None] * 4, 3)) == plain
    # Unlike in AP, a prediction for a crowd is an error.
    assert numbers_of([prediction(LEFT[:3] + [None]), prediction(RIGHT)], *ground_truth)["MOTA"] < 0


def test_classes_are_matched_apart_and_absent_ones_count_in_their_mean():
    ground_truth = truth(
        annotation(LEFT, 1), annotation(RIGHT, 2, category=2), categories=(7, 2, 1)
    )
    tracking = tracking_of([prediction(LEFT), prediction(RIGHT)], ground_truth)
    per_class = tracking["per_class"]
    assert list(per_class) == ["class7", "class2", "class1"]
    assert [numbers["DetA"] for numbers in per_class.values()] == pytest.approx([0, 0, 0.5])
    # Nothing matches in the first two, so their masks are not loose: LocA is 1.
    assert [numbers["LocA"] for numbers in per_class.values()] == pytest.approx([1, 1, 1])
    assert tracking["over_detections"]["DetA"] == pytest.approx(4 / (4 + 4 + 4))
    assert tracking["class_mean"]["DetA"] == pytest.approx(0.5 / 3)
    assert tracking["class_mean"]["MOTA"] == 0


def test_no_predictions_and_no_objects():
    numbers = numbers_of([], annotation(LEFT))
    assert numbers == {name: 1 if name == "LocA" else 0 for name in METRICS}
    only_crowd = numbers_of([prediction(LEFT)], annotation(RIGHT, crowd=1))
    assert only_crowd["MOTA"] == -4 and only_crowd["LocA"] == 1


# Second implementations, straight from the definitions. An object or track is a list with one
# array of pixels or None per frame. At most three of each, so that all assignments can be tried.


def iou(first, second):
    return (first & second).sum() / (first | second).sum()


def best_pairs(worth):
    """The pairs of the assignment with the largest sum, by trying all. worth: {(g, d): number}."""
    rows, columns = sorted({g for g, _ in worth}), sorted({d for _, d in worth})
    short, long = sorted((rows, columns), key=len)
    options = [list(zip(short, chosen)) for chosen in permutations(long, len(short))]
    if short is columns and short is not rows:
        options = [[(g, d) for d, g in option] for option in options]
    return max(options, key=lambda option: sum(worth[pair] for pair in option))


def visible(tracks, t):
    return [index for index, track in enumerate(tracks) if track[t] is not None]


def pairs_in(objects, tracks, t):
    """{(g, d): IoU} of all masks of a frame."""
    return {
        (g, d): iou(objects[g][t], tracks[d][t])
        for g in visible(objects, t)
        for d in visible(tracks, t)
    }


def count(tracks):
    return sum(mask is not None for track in tracks for mask in track)


def plain_hota(objects, tracks, frames):
    """{name: mean over 19 thresholds} of HOTA and its parts."""
    # How much g and d belong together: the frames in which they overlap, by their share of the IoU
    # of all pairs they compete with.
    together = {(g, d): 0.0 for g in range(len(objects)) for d in range(len(tracks))}
    for t in range(frames):
        ious = pairs_in(objects, tracks, t)
        for (g, d), value in ious.items():
            rivals = sum(other for pair, other in ious.items() if pair[0] == g or pair[1] == d)
            if rivals:
                together[g, d] += value / rivals
    alignment = {
        (g, d): value / (count([objects[g]]) + count([tracks[d]]) - value)
        for (g, d), value in together.items()
    }
    matches = []  # (g, d, IoU)
    for t in range(frames):
        ious = pairs_in(objects, tracks, t)
        if ious:
            worth = {pair: alignment[pair] * value for pair, value in ious.items()}
            matches += [(*pair, ious[pair]) for pair in best_pairs(worth)]

    parts = []
    for alpha in range(5, 100, 5):
        found = [match for match in matches if match[2] >= alpha / 100 - 1e-12]
        tp = len(found)
        fn, fp = count(objects) - tp, count(tracks) - tp
        accuracy, recall, precision = [], [], []
        for g, d, _ in found:
            tpa = sum((g, d) == match[:2] for match in found)
            fna, fpa = count([objects[g]]) - tpa, count([tracks[d]]) - tpa
            accuracy.append(tpa / (tpa + fna + fpa))
            recall.append(tpa / (tpa + fna))
            precision.append(tpa / (tpa + fpa))
        part = {
            "DetA": tp / (tp + fn + fp),
            "DetRe": tp / (tp + fn),
            "DetPr": tp / (tp + fp),
            "AssA": np.mean(accuracy) if found else 0,
            "AssRe": np.mean(recall) if found else 0,
            "AssPr": np.mean(precision) if found else 0,
            "LocA": np.mean([match[2] for match in found]) if found else 1,
        }
        parts.append(part | {"HOTA": (part["DetA"] * part["AssA"]) ** 0.5})
    return {name: np.mean([part[name] for part in parts]) for name in parts[0]}


def plain_clear(objects, tracks, frames):
    """MOTA, switches and fragmentations."""
    history = [[] for _ in objects]  # the track in each frame with objects and tracks, None = none
    tp = switches = fragmentations = 0
    for t in range(frames):
        ious = pairs_in(objects, tracks, t)
        if not ious:
            continue
        worth = {}
        for (g, d), value in ious.items():
            continues = bool(history[g]) and history[g][-1] == d
            worth[g, d] = 0 if value < 0.5 else value + 100 * continues
        chosen = dict(pair for pair in best_pairs(worth) if worth[pair])
        tp += len(chosen)
        for g in range(len(objects)):
            track = chosen.get(g)
            earlier = [d for d in history[g] if d is not None]
            if track is not None and earlier:
                switches += earlier[-1] != track
                fragmentations += history[g][-1] is None
            history[g].append(track)
    fn, fp = count(objects) - tp, count(tracks) - tp
    mota = 1 - (fn + fp + switches) / count(objects)
    return {"MOTA": mota, "IDSW": switches, "Frag": fragmentations}


def plain_identity(objects, tracks, frames):
    """IDF1, IDR and IDP."""
    common = {(g, d): 0 for g in range(len(objects)) for d in range(len(tracks))}
    for t in range(frames):
        for pair, value in pairs_in(objects, tracks, t).items():
            common[pair] += value >= 0.5
    idtp = sum(common[pair] for pair in best_pairs(common))
    recall, precision = idtp / count(objects), idtp / count(tracks)
    return {"IDF1": 2 * idtp / (count(objects) + count(tracks)), "IDR": recall, "IDP": precision}


def random_masks(random, frames):
    """Two objects that drift, with pauses; tracks are loose copies that swap objects."""
    objects = []
    for row in (0, 6):
        masks = []
        for t in range(frames):
            mask = np.zeros((16, 24), bool)
            mask[row : row + random.integers(6, 9), t : t + random.integers(7, 11)] = True
            masks.append(mask)
        objects.append(masks)
    tracks = []
    for _ in range(3):
        begin, sources = random.integers(0, frames), random.permutation(2)
        track = [objects[sources[int(t >= begin)]][t].copy() for t in range(frames)]
        for mask in track:
            mask ^= random.random(mask.shape) < random.choice([0.0, 0.02, 0.2])
        tracks.append(track)
    for masks in objects + tracks:
        for t in np.flatnonzero(random.random(frames) < 0.3)[: frames - 1]:
            masks[t] = None
    return objects, tracks


@pytest.mark.parametrize("seed", range(12))
def test_against_plain_loops(seed):
    random, frames = np.random.default_rng(seed), 7
    objects, tracks = random_masks(random, frames)

    def codes(masks):
        return [None if mask is None else encode(mask) for mask in masks]

    annotations = [annotation(codes(masks), number) for number, masks in enumerate(objects)]
    found = numbers_of(
        [prediction(codes(masks)) for masks in tracks], *annotations, frames=frames, size=(16, 24)
    )
    expected = plain_hota(objects, tracks, frames)
    expected |= plain_clear(objects, tracks, frames) | plain_identity(objects, tracks, frames)
    assert found == pytest.approx(expected, abs=1e-9)
