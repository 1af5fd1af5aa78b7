"""The YouTube-VIS metric: average precision and recall of whole mask tracks.

A track is one mask per frame (or none, where the object is not seen) with one category; a prediction is a
track with a score. The overlap of two tracks is one number, the pixels they share summed over all frames
divided by the pixels either covers summed over all frames, so that an identity lost halfway costs half the
overlap even if every frame's masks are perfect. The rest is COCO's protocol: in each video and category the
predictions, best score first, each take the ground truth they overlap most; precision and recall follow, at
ten overlap thresholds.

From the command line, for a submission file and YouTube-VIS annotations (OVIS has the same format):

    python evaluate.py --results results.json --annotations gt.json --output DIR

From Python: `evaluate_results` gives the numbers, `accumulate` the curves behind them, `format_table` a text
for people. Source of the protocol: ytvoseval.py of the YouTube-VIS fork of cocoapi (published with
MaskTrackRCNN, shipped with VITA, GenVIS and GRAtt-VIS); the golden test compares us with its numbers.

Letters: D predictions and G ground truth tracks of one video and category, L frames, T overlap thresholds,
R recall points, K categories, A area ranges, M limits on the number of predictions.
"""

import sys
from collections import defaultdict

import numpy as np
from pycocotools import mask as coco_mask

from reading.annotations import complete
from reading.ids import id_key, id_order
from reading.masks import find_bad_tracks, to_rle
from runtime.errors import InputError, shown

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # index 0 is AP50, index 5 is AP75
RECALL_POINTS = np.linspace(0.0, 1.0, 101)
MAX_PREDICTIONS = (1, 10, 100)  # per video and category, best scores first
# all, small, medium, large; both ends belong to the range, so 128 * 128 pixels are small and medium at once
AREA_RANGES = np.array([(0, 1e10), (0, 128**2), (128**2, 256**2), (256**2, 1e10)])


def evaluate_results(results, ground_truth):
    """Score predictions against ground truth; neither argument is changed.

    results: list of {"video_id", "category_id", "score", "segmentations"}, the last one a list with an RLE
        dict {"size": [height, width], "counts"} or None for every frame of the video. COCO's
        results, with "image_id" and "segmentation", are read too.
    ground_truth: a parsed annotation file of any form that reading/annotations.py reads.
    Returns floats in [0, 1], or -1.0 where no ground truth defines the number: AP, AP50, AP75, APs, APm, APl
    (small, medium, large objects), AR1, AR10, AR100, ARs, ARm, ARl, and "per_class": {category name: AP} in
    the order of the file. Raises InputError (see `check_results`).
    """
    results, ground_truth = check_results(results, ground_truth)
    precision, recall, _ = accumulate(results, ground_truth)
    return summarize(precision, recall, ground_truth)


def summarize(precision, recall, ground_truth):
    """The numbers of `evaluate_results` from the arrays of `accumulate`."""
    selections = {
        "AP": precision[..., 0, 2], "AP50": precision[0, ..., 0, 2], "AP75": precision[5, ..., 0, 2],
        "APs": precision[..., 1, 2], "APm": precision[..., 2, 2], "APl": precision[..., 3, 2],
        "AR1": recall[..., 0, 0], "AR10": recall[..., 0, 1], "AR100": recall[..., 0, 2],
        "ARs": recall[..., 1, 2], "ARm": recall[..., 2, 2], "ARl": recall[..., 3, 2],
    }
    metrics = {name: mean_defined(values) for name, values in selections.items()}
    column = {category: k for k, category in enumerate(category_ids(ground_truth))}
    metrics["per_class"] = {
        category["name"]: mean_defined(precision[:, :, column[category["id"]], 0, 2])
        for category in ground_truth["categories"]
    }
    return metrics


def check_results(results, ground_truth):
    """Both arguments of `evaluate_results` as `accumulate` wants them.

    Raises InputError naming the offending entry.
    """
    ground_truth = complete(ground_truth, "the ground truth").content
    return check_predictions(results, ground_truth), ground_truth


def check_predictions(results, ground_truth, left_out=()):
    """The predictions with the ids of the ground truth.

    ground_truth: complete, as reading/annotations.py makes it.
    left_out: ids of videos that are left out of the ground truth, as are predictions for them.
    Raises InputError naming the offending entry. The official evaluator silently cuts a track that
    is longer or shorter than its video; that is nearly always a mistake, so we refuse it.
    """
    if not isinstance(results, list):
        raise InputError(f"results is a {type(results).__name__}, not a list of predictions")
    videos = {id_key(video["id"]): video for video in ground_truth["videos"]}
    categories = {id_key(category["id"]): category for category in ground_truth["categories"]}
    left_out = set(map(id_key, left_out))
    predictions, names, tracks = [], [], []
    for index, prediction in enumerate(results):
        name = f"results[{index}]"
        if isinstance(prediction, dict) and {"image_id", "segmentation"} <= prediction.keys():
            prediction = prediction | {"video_id": prediction["image_id"],
                                       "segmentations": [prediction["segmentation"]]}  # COCO
        check_keys(name, prediction, ("video_id", "category_id", "score", "segmentations"))
        if id_key(prediction["video_id"]) in left_out:
            continue
        for key, known in (("video_id", videos), ("category_id", categories)):
            if id_key(prediction[key]) not in known:
                raise InputError(f"{name} has {key} {shown(prediction[key])}, "
                                 "which the annotations do not define")
        score = prediction["score"]
        if not isinstance(score, (int, float, np.number)) or not abs(score) <= sys.float_info.max:
            raise InputError(f"{name} has the score {shown(score)}, which is not a finite number")
        video = videos[id_key(prediction["video_id"])]
        check_length(name, prediction["segmentations"], video)
        category = categories[id_key(prediction["category_id"])]
        predictions.append(prediction | {"video_id": video["id"], "category_id": category["id"]})
        tracks.append((prediction["segmentations"], video["height"], video["width"]))
        names.append(name)
    for number, frame, reason in find_bad_tracks(tracks):
        raise InputError(f"{names[number]}, frame {frame}, "
                         f"has a segmentation that cannot be read: {reason}")
    return predictions


def check_keys(name, entry, keys):
    """Raise InputError unless the entry called `name` is a dict with all the keys."""
    missing = [key for key in keys if key not in entry] if isinstance(entry, dict) else keys
    if missing:
        raise InputError(f"{name} lacks {', '.join(missing)}")


def check_length(name, segmentations, video):
    """Raise InputError unless there is one RLE or None for every frame of the video."""
    if not isinstance(segmentations, list) or len(segmentations) != video["length"]:
        count = len(segmentations) if isinstance(segmentations, list) else "no list of"
        raise InputError(f"{name} has {count} masks for the {video['length']} frames "
                         f"of video {shown(video['id'])}")
    for frame, segmentation in enumerate(segmentations):
        if isinstance(segmentation, list) and segmentation:
            raise InputError(f"{name} has polygons in frame {frame}; results hold RLEs")


def accumulate(results, ground_truth, ignored=None):
    """Precision, recall and score arrays over all settings, of what `check_results` returns.

    ignored: a bool for each annotation, True for those that count neither as found nor as missed, as those of another area range
        do: the prediction that takes one is no error, a second one and one that finds nothing are. None = none.
    Returns precision (T, R, K, A, M), the best precision at each recall point or beyond; recall (T, K, A, M),
    the largest one reached; scores (T, R, K, A, M), the score at which each recall point is reached. All are
    float64, K in ascending order of category id. Settings without ground truth hold -1; precision and scores
    are 0 at recalls never reached.
    """
    categories = category_ids(ground_truth)
    videos = {video["id"]: video for video in ground_truth["videos"]}
    predictions, annotations = defaultdict(list), defaultdict(list)
    flags = [False] * len(ground_truth["annotations"]) if ignored is None else ignored
    flagged = [entry | {"ignored": bool(flag)} for entry, flag in zip(ground_truth["annotations"], flags, strict=True)]
    for grouped, entries in ((predictions, results), (annotations, flagged)):
        for entry in entries:
            grouped[entry["video_id"], entry["category_id"]].append(entry)

    settings = len(categories), len(AREA_RANGES), len(MAX_PREDICTIONS)
    precision = np.full((len(IOU_THRESHOLDS), len(RECALL_POINTS), *settings), -1.0)
    recall = np.full((len(IOU_THRESHOLDS), *settings), -1.0)
    scores = np.full_like(precision, -1.0)
    for k, category in enumerate(categories):
        # In ascending order of video id: the stable sort below keeps equal scores in it, which changes AP.
        matchings = [
            match_video(predictions[video, category], annotations[video, category], videos[video])
            for video in sorted(videos, key=id_order)
            if (video, category) in predictions or (video, category) in annotations
        ]
        positives = sum(matching["positives"] for matching in matchings)  # (A,)
        for a, m in np.ndindex(len(AREA_RANGES), len(MAX_PREDICTIONS)):
            if not matchings or not positives[a]:
                continue
            limit = MAX_PREDICTIONS[m]
            ranked = np.concatenate([matching["scores"][:limit] for matching in matchings])
            true = np.concatenate([matching["true"][a, :, :limit] for matching in matchings], axis=1)
            false = np.concatenate([matching["false"][a, :, :limit] for matching in matchings], axis=1)
            order = np.argsort(-ranked, kind="stable")
            curves = precision_recall(ranked[order], true[:, order], false[:, order], positives[a])
            precision[:, :, k, a, m], recall[:, k, a, m], scores[:, :, k, a, m] = curves
    return precision, recall, scores


def precision_recall(scores, true, false, positives):
    """Precision and score at every recall point, and the final recall, for ranked predictions of one setting.

    scores: (N,) float64, descending; true, false: (T, N) bool, at most one of them set (neither: the
    prediction does not count); positives: number of ground truth tracks to find, at least 1.
    Returns precision (T, R), recall (T,), scores (T, R).
    """
    true_count, false_count = np.cumsum(true, axis=1), np.cumsum(false, axis=1)  # (T, N)
    recall = true_count / positives
    precision = true_count / (true_count + false_count + np.spacing(1))  # spacing: 0 / 0 becomes 0
    # Best precision at this recall or a higher one: a maximum running from the end removes the saw teeth.
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    precision_at = np.zeros((len(true), len(RECALL_POINTS)))
    score_at = np.zeros_like(precision_at)
    for t in range(len(true)):
        rank = np.searchsorted(recall[t], RECALL_POINTS, side="left")  # first rank with at least that recall
        reached = rank < len(scores)
        precision_at[t, reached] = precision[t, rank[reached]]
        score_at[t, reached] = scores[rank[reached]]
    return precision_at, recall.max(axis=1, initial=0.0), score_at


def match_video(predictions, annotations, video):
    """Match the predictions and the ground truth of one video and category; annotations say whether they are "ignored".

    Returns a dict: "scores" (D,) float64, descending, equal scores in the order given, D at most
    MAX_PREDICTIONS[-1]; "true" and "false" (A, T, D) bool, neither where a prediction does not count;
    "positives" (A,) int, ground truth tracks to find.
    """
    scores = np.array([prediction["score"] for prediction in predictions], dtype=np.float64)
    order = np.argsort(-scores, kind="stable")[: MAX_PREDICTIONS[-1]]
    predicted = [track_rles(predictions[index], video) for index in order]
    actual = [track_rles(annotation, video) for annotation in annotations]
    predicted_areas, actual_areas = (
        np.array([coco_mask.area(rles) for rles in tracks], dtype=np.float64).reshape(-1, video["length"])
        for tracks in (predicted, actual)
    )  # (D, L) and (G, L), exact
    ious = track_ious(predicted, actual, predicted_areas, actual_areas)

    crowd = np.array([bool(annotation.get("iscrowd")) for annotation in annotations], dtype=bool)
    # The range of an annotation follows its recorded areas, which need not be those of its (resized) masks.
    ignored = crowd | outside_ranges([annotation["areas"] for annotation in annotations])  # (A, G)
    ignored |= np.array([annotation["ignored"] for annotation in annotations], dtype=bool)
    matched, matched_ignored = match_tracks(ious, crowd, ignored)
    # A prediction that found nothing is an error only in the area range of its own size.
    outside = outside_ranges(predicted_areas)[:, None, :]  # (A, 1, D)
    return {
        "scores": scores[order],
        "true": matched & ~matched_ignored,
        "false": ~matched & ~outside,
        "positives": np.count_nonzero(~ignored, axis=1),
    }


def match_tracks(ious, crowd, ignored):
    """Give each prediction, best first, the ground truth it overlaps most, for all A and T at once.

    ious: (D, G) float64; crowd: (G,) bool, tracks that any number of predictions may match; ignored: (A, G)
    bool, tracks that count neither as found nor as missed. An ignored track is taken only if no other reaches
    the threshold; of equal overlaps the later ground truth wins.
    Returns matched (A, T, D) bool and matched_ignored (A, T, D) bool, its part that fell on ignored tracks.
    """
    taken = np.zeros((len(AREA_RANGES), len(IOU_THRESHOLDS), len(crowd)), dtype=bool)
    matched = np.zeros((len(AREA_RANGES), len(IOU_THRESHOLDS), len(ious)), dtype=bool)
    matched_ignored = np.zeros_like(matched)
    overlapping = ious.max(axis=1, initial=0.0) >= IOU_THRESHOLDS[0]  # most predictions need no closer look
    for d in np.flatnonzero(overlapping):
        candidates = (ious[d] >= IOU_THRESHOLDS[:, None]) & (crowd | ~taken)  # (A, T, G)
        regular = candidates & ~ignored[:, None, :]
        has_regular = regular.any(axis=-1)
        candidates = np.where(has_regular[..., None], regular, candidates)
        matched[..., d] = candidates.any(axis=-1)
        matched_ignored[..., d] = matched[..., d] & ~has_regular
        # argmax finds the first maximum; looking from the end makes it the last.
        best = len(crowd) - 1 - np.where(candidates, ious[d], -1.0)[..., ::-1].argmax(axis=-1)  # (A, T)
        a, t = np.nonzero(matched[..., d])
        taken[a, t, best[a, t]] = True
    return matched, matched_ignored


def track_ious(predicted, actual, predicted_areas, actual_areas):
    """Overlap of every predicted with every actual track: intersection over union, each summed over frames.

    predicted, actual: D and G lists of one RLE per frame; their areas: (D, L) and (G, L) float64.
    Returns (D, G) float64 in [0, 1], 0 for two empty tracks.
    """
    intersection = np.zeros((len(predicted), len(actual)))
    for frame in np.flatnonzero(predicted_areas.any(axis=0) & actual_areas.any(axis=0)):
        # With the crowd flag set, pycocotools divides the intersection by the area of the first mask, not by
        # the union; times that area, rounded, it is the exact number of pixels, for all pairs at once.
        first, second = [track[frame] for track in predicted], [track[frame] for track in actual]
        covered = coco_mask.iou(first, second, [True] * len(second))
        intersection += np.rint(covered * predicted_areas[:, frame, None])
    union = predicted_areas.sum(axis=1)[:, None] + actual_areas.sum(axis=1) - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def track_rles(entry, video):
    """Masks of a prediction or annotation as L compressed RLE dicts; None becomes an empty mask."""
    height, width = video["height"], video["width"]
    empty = coco_mask.frPyObjects({"size": [height, width], "counts": [height * width]}, height, width)
    return [
        to_rle(segmentation, height, width, "a mask", checked=True) or empty
        for segmentation in entry["segmentations"]
    ]


def outside_ranges(areas):
    """Which tracks lie outside which AREA_RANGES, from N sequences of areas per frame (None counts as 0).

    The size of a track is its mean area over the frames in which it has one, 0 if there are none.
    Returns (A, N) bool.
    """
    visible = [[area for area in track if area] for track in areas]
    sizes = np.array([np.mean(track) if track else 0.0 for track in visible])
    return (sizes < AREA_RANGES[:, :1]) | (sizes > AREA_RANGES[:, 1:])


def category_ids(ground_truth):
    """Category ids in ascending order: the K axis of `accumulate`."""
    return sorted({category["id"] for category in ground_truth["categories"]}, key=id_order)


def mean_defined(values):
    """Mean of the defined entries of an array as a Python float; -1.0 if all are -1."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0


def mean_metrics(parts):
    """The mean of what `evaluate_results` returned for parts of a set, number by number, of those that are defined."""
    def mean(values):
        return mean_defined(np.array(values))

    names = [name for name in parts[0] if name != "per_class"]
    classes = dict.fromkeys(name for part in parts for name in part["per_class"])
    return {name: mean([part[name] for part in parts]) for name in names} | {
        "per_class": {name: mean([part["per_class"].get(name, -1.0) for part in parts]) for name in classes}}


def format_table(metrics):
    """Text for people from what `evaluate_results` returns: percent with one decimal, '-' where undefined."""

    def percent(value):
        return f"{100 * value:5.1f}" if value >= 0 else "    -"

    def line(*names):
        return "   ".join(f"{name} {percent(metrics[name])}" for name in names)

    width = max(map(len, metrics["per_class"]), default=0)
    classes = [f"  {name:<{width}} {percent(value)}" for name, value in metrics["per_class"].items()]
    header = [line("AP", "AP50", "AP75", "AR1", "AR10"), line("APs", "APm", "APl"), "AP per class"]
    return "\n".join(header + classes)
