"""The YouTube-VIS metric: average precision and recall of whole mask tracks.

A track is one mask per frame (or None, where the object is not visible) with one category. A
prediction is a track with a score. The overlap of two tracks is a single IoU: the intersection
summed over all frames divided by the union summed over all frames. An identity lost halfway
therefore costs half the overlap, even if the masks of every frame are perfect.

The rest is COCO's protocol. In each video and category, predictions are matched in order of
descending score, each to the ground truth track with the highest IoU. Precision and recall are
computed at ten IoU thresholds.

From the command line, for a submission file and YouTube-VIS annotations (also of OVIS):

    python evaluate.py --results results.json --annotations gt.json --output DIR

From Python, `evaluate_results` returns the numbers, `accumulate` the curves behind them, and
`format_table` a table to print. Source: ytvoseval.py of the YouTube-VIS fork of cocoapi (published
with MaskTrackRCNN, shipped with VITA, GenVIS and GRAtt-VIS). A golden test compares the numbers.

Letters: D predictions and G ground truth tracks of one video and category, T overlap thresholds,
R recall points, K categories, A groups of tracks (by default those of AREA), M limits on the number
of predictions.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from evaluation.overlaps import VideoOverlaps, indices_by_category, measure_overlaps
from reading.annotations import complete
from reading.ids import id_key, id_order
from reading.masks import find_bad_tracks
from runtime.errors import InputError, shown

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # index 0 is AP50, index 5 is AP75
RECALL_POINTS = np.linspace(0.0, 1.0, 101)
MAX_PREDICTIONS = (1, 10, 100)  # per video and category, best scores first
AREA_RANGES = {
    "all": (0, 1e10),
    "small": (0, 128**2),
    "medium": (128**2, 256**2),
    "large": (256**2, 1e10),
}
ALL, SMALL, MEDIUM, LARGE = range(4)  # of the A axis


@dataclass(frozen=True)
class Grouping:
    """Groups of tracks by the range of a value, such as their size.

    In the AP of a group, ground truth tracks outside of the range count neither as found nor as
    missed, and unmatched predictions outside of it are no errors.
    """

    ranges: dict[str, tuple[float, float]]  # both ends belong to a range
    actual: Callable[[VideoOverlaps], list[float]]  # the value of each annotation; NaN is outside
    # The value of each prediction. Without it, an unmatched prediction is an error in all groups.
    predicted: Callable[[VideoOverlaps], list[float]] | None = None

    def outside(self, tracks):
        """Whether predictions (A, D) and annotations (A, G) lie outside of each range."""
        if self.predicted:
            predicted = self.outside_ranges(self.predicted(tracks))
        else:
            predicted = np.zeros((len(self.ranges), len(tracks.predictions)), dtype=bool)
        return predicted, self.outside_ranges(self.actual(tracks))

    def outside_ranges(self, values):
        """N values -> (A, N) bool."""
        low, high = np.array(list(self.ranges.values())).T[:, :, None]
        values = np.array(values, dtype=np.float64)
        return ~((low <= values) & (values <= high))


def mean_area(areas):
    """The size of a track: its mean area where the area is positive; None counts as 0."""
    visible = [area for area in areas if area]
    return np.mean(visible) if visible else 0.0


def stated_sizes(tracks):
    """The sizes of annotations by their recorded areas, which may differ from their masks'."""
    return [mean_area(annotation["areas"]) for annotation in tracks.annotations]


def predicted_sizes(tracks):
    """The sizes of predictions by the areas of their masks."""
    return [mean_area(areas) for areas in tracks.predicted_areas.T]


AREA = Grouping(AREA_RANGES, stated_sizes, predicted_sizes)


def evaluate_results(results, ground_truth):
    """Score predictions against ground truth. Neither argument is modified.

    Args:
        results: list of {"video_id", "category_id", "score", "segmentations"}. "segmentations" is
            a list with an RLE dict {"size": [height, width], "counts"} or None for every frame of
            the video. COCO results, with "image_id" and "segmentation", are accepted as well.
        ground_truth: a parsed annotation file, in any form that reading/annotations.py supports.

    Returns:
        A dict of floats in [0, 1], or -1.0 where no ground truth defines the number: AP, AP50,
        AP75, APs, APm, APl (small, medium, large objects), AR1, AR10, AR100, ARs, ARm, ARl, and
        "per_class": {category name: AP} in the order of the file.

    Raises InputError (see `check_results`).
    """
    results, ground_truth = check_results(results, ground_truth)
    precision, recall, _ = accumulate(results, ground_truth)
    return summarize(precision, recall, ground_truth)


def summarize(precision, recall, ground_truth):
    """The metrics of `evaluate_results`, from the arrays of `accumulate`."""
    precision = precision[..., -1]  # (T, R, K, A), with 100 predictions
    selections = {
        "AP": precision[..., ALL],
        "AP50": precision[0, ..., ALL],
        "AP75": precision[5, ..., ALL],
        "APs": precision[..., SMALL],
        "APm": precision[..., MEDIUM],
        "APl": precision[..., LARGE],
        "AR1": recall[..., ALL, 0],
        "AR10": recall[..., ALL, 1],
        "AR100": recall[..., ALL, 2],
        "ARs": recall[..., SMALL, 2],
        "ARm": recall[..., MEDIUM, 2],
        "ARl": recall[..., LARGE, 2],
    }
    metrics = {name: mean_defined(values) for name, values in selections.items()}
    k = {category_id: index for index, category_id in enumerate(category_ids(ground_truth))}
    metrics["per_class"] = {
        category["name"]: mean_defined(precision[:, :, k[category["id"]], ALL])
        for category in ground_truth["categories"]
    }
    return metrics


def check_results(results, ground_truth):
    """Validate the arguments of `evaluate_results` and convert them for `accumulate`.

    Raises InputError naming the offending entry.
    """
    ground_truth = complete(ground_truth, "the ground truth").content
    return check_predictions(results, ground_truth), ground_truth


def check_predictions(results, ground_truth, left_out=()):
    """Validate predictions and return them with the ids of the ground truth.

    The official evaluator silently truncates a track that is longer or shorter than its video.
    That is nearly always a mistake, so such a track is an error here.

    Args:
        results: predictions, see `evaluate_results`.
        ground_truth: complete, as returned by reading/annotations.py.
        left_out: ids of videos excluded from the ground truth; their predictions are dropped.

    Raises InputError naming the offending entry.
    """
    if not isinstance(results, list):
        raise InputError(f"results is a {type(results).__name__}, not a list of predictions")
    videos = {id_key(video["id"]): video for video in ground_truth["videos"]}
    categories = {id_key(category["id"]): category for category in ground_truth["categories"]}
    left_out = set(map(id_key, left_out))
    predictions, names, tracks = [], [], []
    for index, prediction in enumerate(results):
        name = f"results[{index}]"
        prediction = from_coco(prediction)
        check_keys(name, prediction, ("video_id", "category_id", "score", "segmentations"))
        if id_key(prediction["video_id"]) in left_out:
            continue
        video = find_entry(name, prediction, "video_id", videos)
        category = find_entry(name, prediction, "category_id", categories)
        check_score(name, prediction["score"])
        check_length(name, prediction["segmentations"], video)
        ids = {"video_id": video["id"], "category_id": category["id"]}
        predictions.append(prediction | ids)
        names.append(name)
        tracks.append((prediction["segmentations"], video["height"], video["width"]))
    for number, frame, reason in find_bad_tracks(tracks):
        raise InputError(
            f"{names[number]}, frame {frame}, has a segmentation that cannot be read: {reason}"
        )
    return predictions


def from_coco(prediction):
    """A COCO result as the result of a video of one frame; anything else is returned unchanged."""
    if not isinstance(prediction, dict):
        return prediction
    if not {"image_id", "segmentation"} <= prediction.keys():
        return prediction
    segmentations = [prediction["segmentation"]]
    return prediction | {"video_id": prediction["image_id"], "segmentations": segmentations}


def check_keys(name, entry, keys):
    """Raise InputError unless the entry called `name` is a dict with all the keys."""
    missing = [key for key in keys if key not in entry] if isinstance(entry, dict) else keys
    if missing:
        raise InputError(f"{name} lacks {', '.join(missing)}")


def find_entry(name, prediction, key, entries):
    """The video or category that a prediction refers to; InputError if there is none."""
    entry = entries.get(id_key(prediction[key]))
    if entry is None:
        value = shown(prediction[key])
        raise InputError(f"{name} has {key} {value}, which the annotations do not define")
    return entry


def check_score(name, score):
    """Raise InputError unless the score is a finite number."""
    is_number = isinstance(score, (int, float, np.number))
    if not is_number or not abs(score) <= sys.float_info.max:
        raise InputError(f"{name} has the score {shown(score)}, which is not a finite number")


def check_length(name, segmentations, video):
    """Raise InputError unless there is one RLE or None for every frame of the video."""
    if not isinstance(segmentations, list) or len(segmentations) != video["length"]:
        count = len(segmentations) if isinstance(segmentations, list) else "no list of"
        raise InputError(
            f"{name} has {count} masks for the {video['length']} frames "
            f"of video {shown(video['id'])}"
        )
    for frame, segmentation in enumerate(segmentations):
        if isinstance(segmentation, list) and segmentation:
            raise InputError(f"{name} has polygons in frame {frame}; results hold RLEs")


def accumulate(results, ground_truth, groupings=None):
    """Precision, recall and scores for all settings, from the output of `check_results`.

    groupings: the groups of tracks that form the A axis, by default those of AREA.
    """
    videos = measure_overlaps(results, ground_truth)
    return accumulate_videos(videos, category_ids(ground_truth), groupings or [AREA])


def accumulate_videos(videos, categories, groupings):
    """Precision, recall and scores for all settings.

    Args:
        videos: VideoOverlaps, in ascending order of id, because equal scores keep this order.
        categories: ids, the K axis.
        groupings: the A axis consists of the groups of all of them.

    Returns:
        precision: (T, R, K, A, M), the best precision at each recall point or beyond.
        recall: (T, K, A, M), the largest recall reached.
        scores: (T, R, K, A, M), the score at which each recall point is reached.

    All are float64. Settings without ground truth are -1. Precision and scores are 0 at recalls
    that are never reached.
    """
    matched = [match_video(video, groupings) for video in videos]
    groups = sum(len(grouping.ranges) for grouping in groupings)
    return accumulate_matched(matched, categories, groups)


def accumulate_matched(matched, categories, groups=len(AREA_RANGES)):
    """The output of `accumulate_videos`, from the output of `match_video` for every video.

    groups: length of the A axis.
    """
    settings = len(categories), groups, len(MAX_PREDICTIONS)
    precision = np.full((len(IOU_THRESHOLDS), len(RECALL_POINTS), *settings), -1.0)
    recall = np.full((len(IOU_THRESHOLDS), *settings), -1.0)
    scores = np.full_like(precision, -1.0)
    for k, category in enumerate(categories):
        matchings = [video[category] for video in matched if category in video]
        positives = sum(matching["positives"] for matching in matchings)  # (A,)
        for a, m in np.ndindex(groups, len(MAX_PREDICTIONS)):
            if not matchings or not positives[a]:
                continue
            ranked, true, false, _ = rank_predictions(matchings, a, MAX_PREDICTIONS[m])
            curves = precision_recall(ranked, true, false, positives[a])
            precision[:, :, k, a, m], recall[:, k, a, m], scores[:, :, k, a, m] = curves
    return precision, recall, scores


def rank_predictions(matchings, a, limit):
    """All videos' predictions of one category and group, in order of descending score.

    The first `limit` predictions of each video count. Equal scores keep the order of the videos.
    Returns scores (N,), true (T, N) and false (T, N), the arguments of `precision_recall`, and the
    index of the matching that each prediction is from, (N,) int.
    """
    limited = [matching["scores"][:limit] for matching in matchings]
    scores = np.concatenate([np.zeros(0), *limited])
    owner = np.repeat(np.arange(len(limited)), [len(part) for part in limited])
    true, false = (
        np.concatenate(
            [np.zeros((len(IOU_THRESHOLDS), 0), dtype=bool)]
            + [matching[key][a, :, :limit] for matching in matchings],
            axis=1,
        )
        for key in ("true", "false")
    )
    order = np.argsort(-scores, kind="stable")
    return scores[order], true[:, order], false[:, order], owner[order]


def precision_recall(scores, true, false, positives):
    """Precision and score at every recall point, and the final recall, for one setting.

    Args:
        scores: (N,) float64, descending.
        true, false: (T, N) bool, at most one of the two is set. A prediction with neither is
            ignored.
        positives: number of ground truth tracks, at least 1.

    Returns precision (T, R), recall (T,), scores (T, R).
    """
    true_count = np.cumsum(true, axis=1)  # (T, N)
    false_count = np.cumsum(false, axis=1)
    recall = true_count / positives
    # np.spacing(1) turns 0 / 0 into 0.
    precision = true_count / (true_count + false_count + np.spacing(1))
    # The best precision at this recall or a higher one: a running maximum from the end.
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    precision_at = np.zeros((len(true), len(RECALL_POINTS)))
    score_at = np.zeros_like(precision_at)
    for t in range(len(true)):
        # The first rank that reaches each recall point; len(scores) if none does.
        rank = np.searchsorted(recall[t], RECALL_POINTS, side="left")
        reached = rank < len(scores)
        precision_at[t, reached] = precision[t, rank[reached]]
        score_at[t, reached] = scores[rank[reached]]
    return precision_at, recall.max(axis=1, initial=0.0), score_at


def average_precision(true, false, positives):
    """The mean over RECALL_POINTS of the precision of `precision_recall`, for many settings.

    Args:
        true, false: (..., N), how often each ranked prediction counts as true and as false.
        positives: number of ground truth tracks, at least 1, an int or (...,).

    Returns (...,) float64.
    """
    # Recall grows at true predictions alone, and precision is highest there.
    ranks = np.flatnonzero(true.any(axis=tuple(range(true.ndim - 1))))
    true_count = np.cumsum(true, axis=-1, dtype=np.float64)[..., ranks]
    false_count = np.cumsum(false, axis=-1, dtype=np.float64)[..., ranks]
    precision = true_count / (true_count + false_count + np.spacing(1))
    precision = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
    # The number of recall points that each rank is the first to reach.
    recall = true_count / np.expand_dims(positives, -1)
    reached = np.searchsorted(RECALL_POINTS, recall, side="right")
    reached = np.diff(reached, prepend=0)
    return (precision * reached).sum(axis=-1) / len(RECALL_POINTS)


def match_video(overlaps, groupings=(AREA,)):
    """Match the predictions and the ground truth of one video (VideoOverlaps).

    Returns {category id: output of `match_category`}, for the categories that have entries. Indices
    are those of the lists of `overlaps`.
    """
    predicted = indices_by_category(overlaps.predictions)
    actual = indices_by_category(overlaps.annotations)
    return {
        category: match_category(overlaps, predicted[category], actual[category], groupings)
        for category in dict.fromkeys([*predicted, *actual])
    }


def match_category(overlaps, predicted, actual, groupings):
    """Match the predictions and the ground truth of one video and category.

    predicted, actual: their indices in the lists of `overlaps`. Returns a dict:
        "predictions": (D,) int, indices by descending score, equal scores in the order given. D is
            at most MAX_PREDICTIONS[-1].
        "scores": (D,) float64.
        "matches": (A, T, D) int, the index of the annotation that is matched, -1 for none.
        "true", "false": (A, T, D) bool, both False where a prediction is ignored.
        "positives": (A,) int, number of ground truth tracks that are not ignored.
    """
    order = np.argsort(-overlaps.scores[predicted], kind="stable")[: MAX_PREDICTIONS[-1]]
    tracks = overlaps.select(predicted[order], actual)
    outside = [grouping.outside(tracks) for grouping in groupings]
    outside_predicted, outside_actual = map(np.concatenate, zip(*outside))  # (A, D), (A, G)
    ignored = outside_actual | tracks.crowd
    matches, matched_ignored = match_tracks(tracks.track_ious, tracks.crowd, ignored)
    # An unmatched prediction is a false positive only in the groups that it belongs to.
    return {
        "predictions": predicted[order],
        "scores": tracks.scores,
        "matches": np.where(matches >= 0, np.append(actual, -1)[matches], -1),
        "true": (matches >= 0) & ~matched_ignored,
        "false": (matches < 0) & ~outside_predicted[:, None],
        "positives": np.count_nonzero(~ignored, axis=1),
    }


def match_tracks(ious, crowd, ignored):
    """Match each prediction, best first, to the ground truth with the highest IoU.

    An ignored track is matched only if no other track reaches the threshold. Of equal IoUs, the
    later ground truth wins.

    Args:
        ious: (D, G) float64.
        crowd: (G,) bool, tracks that any number of predictions may match.
        ignored: (A, G) bool, tracks that count neither as true positive nor as missed.

    Returns matches (A, T, D) int, the track of each prediction or -1, and matched_ignored
    (A, T, D) bool, the matches with ignored tracks.
    """
    groups = len(ignored)
    taken = np.zeros((groups, len(IOU_THRESHOLDS), len(crowd)), dtype=bool)
    matches = np.full((groups, len(IOU_THRESHOLDS), len(ious)), -1)
    matched_ignored = np.zeros(matches.shape, dtype=bool)
    # Most predictions overlap no track enough.
    overlapping = ious.max(axis=1, initial=0.0) >= IOU_THRESHOLDS[0]
    for d in np.flatnonzero(overlapping):
        candidates = (ious[d] >= IOU_THRESHOLDS[:, None]) & (crowd | ~taken)  # (A, T, G)
        regular = candidates & ~ignored[:, None, :]
        has_regular = regular.any(axis=-1)
        candidates = np.where(has_regular[..., None], regular, candidates)
        matched = candidates.any(axis=-1)  # (A, T)
        matched_ignored[..., d] = matched & ~has_regular
        # argmax returns the first maximum; on the reversed axis, the last one.
        candidate_ious = np.where(candidates, ious[d], -1.0)
        best = len(crowd) - 1 - candidate_ious[..., ::-1].argmax(axis=-1)  # (A, T)
        matches[..., d] = np.where(matched, best, -1)
        a, t = np.nonzero(matched)
        taken[a, t, best[a, t]] = True
    return matches, matched_ignored


def category_ids(ground_truth):
    """Category ids in ascending order: the K axis of `accumulate`."""
    return sorted({category["id"] for category in ground_truth["categories"]}, key=id_order)


def mean_defined(values):
    """Mean of the defined entries of an array as a Python float; -1.0 if all are -1."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0


def mean_metrics(runs):
    """Average several outputs of `evaluate_results`, number by number, over the defined values.

    Numbers may be in dicts, at any depth, such as "per_class".
    """
    averaged = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        values = [run[name] for run in runs if name in run]
        is_number = not isinstance(values[0], dict)
        averaged[name] = mean_defined(np.array(values)) if is_number else mean_metrics(values)
    return averaged


def format_table(metrics):
    """Format the output of `evaluate_results` for printing: in percent, '-' where undefined."""

    def line(*names):
        return "   ".join(f"{name} {percent(metrics[name]):>5}" for name in names)

    width = max(map(len, metrics["per_class"]), default=0)
    lines = [
        line("AP", "AP50", "AP75", "AR1", "AR10"),
        line("APs", "APm", "APl"),
        "AP per class",
    ]
    for name, value in metrics["per_class"].items():
        lines.append(f"  {name:<{width}} {percent(value):>5}")
    return "\n".join(lines)


def percent(value):
    """A metric for printing: in percent, '-' if it is undefined."""
    return f"{100 * value:.1f}" if value >= 0 else "-"
