"""Why AP is below 100: the AP that would be gained if one cause of errors were fixed.

The method is TIDE (Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors",
ECCV 2020), for mask tracks and at each of the ten IoU thresholds.

At a threshold t, the metric matches some predictions with ground truth tracks. Every other
prediction that counts is false, and has exactly one cause. It depends on the prediction's object:
the ground truth track of any class, no crowd, with the highest IoU.

    duplicate        IoU at least t, right class: a prediction with a better score has the object
    wrong class      IoU at least t, wrong class
    class and mask   IoU from 0.1 to t, wrong class
    score order      IoU from 0.1 to t, right class, but the object is matched by a prediction with
                     a lower score: a better track exists and is ranked lower
    identity switch, broken track, loose mask
                     other predictions with IoU from 0.1 to t and the right class, by what spoils
                     most pixels, see `find_spoiling`
    background       IoU below 0.1

    missed           a ground truth track that no prediction is matched with, not even below

The ground truth tracks that the metric has not matched are matched once more: in the order of
scores, each false prediction with a wrong class, mask or track gets the free one with the highest
IoU, if IoU and class relation are those of its cause. Every ground truth track that is not found
therefore has exactly one cause, too: that of the prediction it gets here, or "missed".

A fix replaces all false predictions of one cause. Those with a match of the second round become
true, with their own score and the class of the match; the others are removed, since another
prediction has their object. Missed objects are removed from the ground truth.

Fixes never lower AP. All together give AP 100, but their gains do not add up to the gap: AP is not
linear in its errors.

Differences from TIDE: ten thresholds instead of one; its localisation errors are divided into four
causes; its "both" errors can be fixed; and an object can get a prediction whose nearest object is
another one, as after an exchange of two identities.

Letters: D predictions and G ground truth tracks of one video, L frames, T thresholds, K categories,
N and M predictions and ground truth tracks of all videos.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from evaluation.metric import ALL, IOU_THRESHOLDS, average_precision
from evaluation.overlaps import VideoOverlaps

CAUSES = (
    "wrong class",
    "loose mask",
    "broken track",
    "identity switch",
    "class and mask",
    "duplicate",
    "background",
    "missed",
    "score order",
)
CLASS, MASK, TIME, SWITCH, BOTH, DUPLICATE, BACKGROUND, MISSED, ORDER = range(len(CAUSES))
CORRECTED = (CLASS, MASK, TIME, SWITCH, BOTH)  # their fix can match an object
NONE = -1
BACKGROUND_IOU = 0.1  # of tracks, as in TIDE
SWITCH_IOU = 0.5  # of the masks of one frame


@dataclass
class Explanation:
    """The outcome of every prediction of one video, or of several that are concatenated.

    Predictions are in descending order of score within a video. Those beyond the metric's limit
    are left out.
    """

    predictions: np.ndarray  # (D,) int, indices into VideoOverlaps.predictions
    scores: np.ndarray  # (D,)
    categories: np.ndarray  # (D,) int, 0 to K - 1
    true: np.ndarray  # (T, D) bool
    causes: np.ndarray  # (T, D) int, index into CAUSES; NONE if true, or ignored by the metric
    fixed_categories: np.ndarray  # (T, D) int, of the object matched after the fix, or NONE
    actual: np.ndarray  # (G,) int, category of each ground truth track that counts
    missed: np.ndarray  # (T, G) bool


def explain_video(overlaps: VideoOverlaps, matched: dict, categories: dict) -> Explanation:
    """Find the cause of every false prediction of a video.

    Args:
        matched: the output of `metric.match_video`.
        categories: {category id: index from 0 to K - 1}.
    """
    kept = [index for matching in matched.values() for index in matching["predictions"]]
    kept = np.array(kept, dtype=int)
    scores = overlaps.scores
    kept = kept[np.lexsort((kept, -scores[kept]))]
    counts = ~overlaps.crowd
    matches, true, false = (
        merge_categories(matched, key, kept, len(scores)) for key in ("matches", "true", "false")
    )
    labels = category_indices(overlaps.predictions, categories)[kept]
    actual = category_indices(overlaps.annotations, categories)
    same = labels[:, None] == actual
    ious = np.where(counts, overlaps.track_ious[kept], -1.0)  # (D, G)
    taker = find_takers(np.where(true, matches, NONE), len(actual))
    causes = find_causes(overlaps, kept, ious, same, taker, false)
    fixed, missed = match_again(causes, ious, same, free=counts & (taker == NONE))
    return Explanation(
        kept,
        scores[kept],
        labels,
        true,
        causes,
        np.append(actual, NONE)[fixed],
        actual[counts],
        missed[:, counts],
    )


def category_indices(entries: list[dict], categories: dict) -> np.ndarray:
    """The index of the category of every entry, int."""
    return np.array([categories[entry["category_id"]] for entry in entries], dtype=int)


def merge_categories(matched: dict, key: str, kept: np.ndarray, total: int) -> np.ndarray:
    """An array (A, T, D) of each category's matching as one (T, D), for the predictions `kept`."""
    merged = None
    for matching in matched.values():
        values = matching[key][ALL]
        if merged is None:
            merged = np.zeros((len(values), total), dtype=values.dtype)
        merged[:, matching["predictions"]] = values
    if merged is None:
        return np.zeros((len(IOU_THRESHOLDS), 0), dtype=int if key == "matches" else bool)
    return merged[:, kept]


def find_takers(matches: np.ndarray, count: int) -> np.ndarray:
    """(T, D) indices of ground truth tracks -> (T, G) predictions that are matched with them."""
    taker = np.full((len(matches), count), NONE)
    t, d = np.nonzero(matches != NONE)
    taker[t, matches[t, d]] = d
    return taker


def find_causes(overlaps, kept, ious, same, taker, false) -> np.ndarray:
    """The cause of every prediction that is false, (T, D) int, as defined at the top.

    Args:
        kept: (D,) indices of the predictions.
        ious: (D, G), -1 for ground truth tracks that do not count.
        same: (D, G) bool, whether the classes are the same.
        taker: (T, G) int, the prediction that is matched with a ground truth track, or NONE.
        false: (T, D) bool.
    """
    if not ious.size:
        return np.where(false, BACKGROUND, NONE)
    # Of equal IoUs, a track of the same class is the object.
    objects = np.where(ious == ious.max(axis=1, keepdims=True), 1 + same, 0).argmax(axis=1)
    prediction = np.arange(len(kept))
    iou, right_class = ious[prediction, objects], same[prediction, objects]
    near = iou >= BACKGROUND_IOU
    found = iou >= IOU_THRESHOLDS[:, None]  # (T, D)
    spoiling = np.full(len(kept), BACKGROUND)
    spoiling[near] = find_spoiling(overlaps, kept[near], objects[near], counts=ious[0] >= 0)
    outranks = taker[:, objects] > prediction
    conditions = {
        DUPLICATE: found & right_class,
        CLASS: found & ~right_class,
        BOTH: near & ~right_class,
        ORDER: near & outranks,
    }
    conditions = {cause: np.broadcast_to(where, false.shape) for cause, where in conditions.items()}
    causes = np.select(list(conditions.values()), list(conditions), spoiling)
    return np.where(false, causes, NONE)


def find_spoiling(overlaps, predictions, objects, counts) -> np.ndarray:
    """What spoils most pixels of predictions: SWITCH, TIME or MASK, (D,) int.

    Each frame is of one kind. Its spoilt pixels are those in one mask and not in the other.

        SWITCH   the predicted mask has an IoU of at least 0.5 with another ground truth mask, and
                 more than with that of its object
        TIME     otherwise, if either of predicted and actual mask is empty
        MASK     otherwise

    Args:
        predictions: (D,) their indices.
        objects: (D,) indices of the ground truth tracks that they are compared with.
        counts: (G,) bool, the ground truth tracks to which an identity can switch.
    """
    tracks = overlaps.select(predictions, np.arange(len(counts)))
    prediction = np.arange(len(predictions))
    ious = tracks.frame_ious()  # (L, D, G)
    own = ious[:, prediction, objects]  # (L, D)
    ious[:, prediction, objects] = 0
    other = ious[:, :, counts].max(axis=2, initial=0)
    predicted, actual = tracks.predicted_areas, tracks.actual_areas[:, objects]
    spoilt = predicted + actual - 2 * tracks.intersections[:, prediction, objects]
    switched = (other >= SWITCH_IOU) & (other > own)
    absent = ~switched & ((predicted == 0) | (actual == 0))
    kinds = {SWITCH: switched, TIME: absent, MASK: ~switched & ~absent}
    pixels = [(spoilt * frames).sum(axis=0) for frames in kinds.values()]
    return np.array(list(kinds))[np.argmax(pixels, axis=0)]


def match_again(causes, ious, same, free) -> tuple[np.ndarray, np.ndarray]:
    """The second round: match predictions of the causes CORRECTED with free ground truth tracks.

    free: (T, G) bool, ground truth tracks that count and are not matched.

    Returns (T, D) int, the ground truth track of each prediction or NONE, and (T, G) bool, the
    ground truth tracks that are still free.
    """
    matches = np.full(causes.shape, NONE)
    correctable = np.isin(causes, CORRECTED)
    for d in np.flatnonzero(correctable.any(axis=0)):
        cause = causes[:, d]
        right_class = ~np.isin(cause, (CLASS, BOTH))
        least = np.where(cause == CLASS, IOU_THRESHOLDS, BACKGROUND_IOU)
        options = free & correctable[:, d, None] & (ious[d] >= least[:, None])  # (T, G)
        options &= same[d] == right_class[:, None]
        best = np.where(options, ious[d], -1.0).argmax(axis=1)
        (t,) = np.nonzero(options.any(axis=1))
        matches[t, d] = best[t]
        free[t, best[t]] = False
    return matches, free


# AP after fixes


def concatenate(explanations: Iterable[Explanation]) -> Explanation:
    """Several videos as one, with predictions in descending order of score."""
    labels, outcomes = np.zeros(0, dtype=int), np.zeros((len(IOU_THRESHOLDS), 0), dtype=int)
    found = outcomes.astype(bool)
    nothing = Explanation(labels, np.zeros(0), labels, found, outcomes, outcomes, labels, found)
    fields = zip(*(vars(explanation).values() for explanation in (nothing, *explanations)))
    joined = Explanation(*(np.concatenate(values, axis=-1) for values in fields))
    order = np.argsort(-joined.scores, kind="stable")
    for name in ("predictions", "scores", "categories", "true", "causes", "fixed_categories"):
        setattr(joined, name, getattr(joined, name)[..., order])
    return joined


def fixed_precision(explained: Explanation, k: int, fixes: Collection[int]) -> np.ndarray:
    """AP of category k at each threshold after some fixes, (T,) float64.

    A category whose ground truth tracks are all missed and removed has AP 1 without false
    predictions, and 0 with them.
    """
    columns = (explained.categories == k) | (explained.fixed_categories == k).any(axis=0)
    of_category = explained.categories[columns] == k
    causes = explained.causes[:, columns]
    is_fixed = np.isin(causes, list(fixes))
    matched = is_fixed & (explained.fixed_categories[:, columns] == k)
    true = explained.true[:, columns] & of_category | matched
    false = (causes != NONE) & of_category & ~is_fixed
    actual = explained.actual == k
    removed = (explained.missed & actual).sum(axis=1) if MISSED in fixes else 0
    positives = actual.sum() - removed + np.zeros(len(true))
    precision = average_precision(true, false, np.maximum(positives, 1))
    return np.where(positives > 0, precision, ~false.any(axis=1))


def mean_fixed_precision(explained: Explanation, fixes: Collection[int]) -> dict[str, float]:
    """{"AP", "AP50"} after some fixes; -1.0 without ground truth."""
    categories = np.unique(explained.actual)
    if not len(categories):
        return {"AP": -1.0, "AP50": -1.0}
    precision = np.array([fixed_precision(explained, k, fixes) for k in categories])
    return {"AP": float(precision.mean()), "AP50": float(precision[:, 0].mean())}


def measure_causes(explanations: Iterable[Explanation]) -> dict[str, dict[str, float]]:
    """The AP and AP50 gained by fixing each cause: {name of CAUSES: {"AP", "AP50"}}.

    Without ground truth they are -1.0.
    """
    explained = concatenate(explanations)
    now = mean_fixed_precision(explained, ())
    gains = {}
    for cause, name in enumerate(CAUSES):
        after = mean_fixed_precision(explained, (cause,))
        gains[name] = {key: after[key] - now[key] if now[key] >= 0 else -1.0 for key in now}
    return gains


def measure_order(explanations: Iterable[Explanation]) -> dict[str, float]:
    """{"AP", "AP50"} if every true prediction outranked every false one.

    What is missing to 1 is lost by objects that no prediction is matched with.
    """
    explained = concatenate(explanations)
    explained.fixed_categories[:] = NONE
    return mean_fixed_precision(explained, set(range(len(CAUSES))) - {MISSED})


def format_causes(metrics: dict) -> str:
    """Format "causes" and "oracle" of metrics.json for printing; empty without ground truth.

    In percent, with the largest gains first.
    """
    if metrics["AP"] < 0:
        return ""
    gains, oracle = metrics["causes"], metrics["oracle"]
    lines = [f"{'gained if fixed':<24} AP   AP50"]
    for name in sorted(gains, key=lambda name: -gains[name]["AP"]):
        lines.append(f"  {name:<20} {format_gain(gains[name])}")
    lines.append("gained with the same masks")
    oracles = {"best linking": "linking", "any linking, at most": "bound", "perfect order": "order"}
    for name, key in oracles.items():
        gain = {metric: value - metrics[metric] for metric, value in oracle[key].items()}
        lines.append(f"  {name:<20} {format_gain(gain)}")
    return "\n".join(lines)


def format_gain(gain: dict[str, float]) -> str:
    ap, ap50 = (round(100 * gain[key], 1) + 0.0 for key in ("AP", "AP50"))  # no -0.0
    return f"{ap:+6.1f} {ap50:+6.1f}"
