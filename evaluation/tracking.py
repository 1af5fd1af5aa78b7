"""Identity metrics of tracks: HOTA, CLEAR (MOTA, switches, fragmentations) and IDF1.

AP compares whole tracks and ranks them by score. These metrics instead take the predictions that
score at least a threshold as the output of a tracker, and compare the masks of every frame.

    tracking = evaluate_tracking(videos, ground_truth["categories"], min_score=0.3)
    tracking["over_detections"]["HOTA"]    # of the counts of all classes together
    tracking["class_mean"]["HOTA"]         # the mean over all classes, absent ones included
    tracking["per_class"]["cat"]["HOTA"]

Each class of each video is matched on its own (`hota_counts`, `clear_counts`, `identity_counts`).
The counts are added, and the metrics are quotients of the sums, one function each below.

The numbers equal those of TrackEval with its YouTube-VIS set (JonathonLuiten/TrackEval@12c8791,
cls_comb_det_av and cls_comb_cls_av), crowds removed and empty masks absent; a golden test compares
them. Papers, in the docstrings:

    HOTA   Luiten et al., HOTA: A Higher Order Metric for Evaluating Multi-Object Tracking, 2021
    CLEAR  Bernardin and Stiefelhagen, Evaluating Multiple Object Tracking Performance, 2008
    ID     Ristani et al., Performance Measures and a Data Set for Multi-Target, Multi-Camera
           Tracking, 2016

Letters: L frames, G ground truth tracks ("objects") and D predicted tracks of one class and video,
A thresholds alpha of the IoU.
"""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from evaluation.overlaps import VideoOverlaps

ALPHAS = np.arange(0.05, 0.99, 0.05)  # 19 thresholds of HOTA
MIN_IOU = 0.5  # of CLEAR and IDF1
CONTINUED = 1000.0  # more than any sum of IoUs: CLEAR keeps a track where it can
EPSILON = np.finfo(np.float64).eps
Counts = dict[str, np.ndarray | int]  # every value can be added over videos and classes


# Counts of one class in one video


def hota_counts(ious: np.ndarray, actual: np.ndarray, predicted: np.ndarray) -> Counts:
    """The sums over matches that HOTA consists of, (A,) each.

    Args:
        ious: (L, G, D) float64.
        actual, predicted: (L, G) and (L, D) bool, whether there is a mask.

    TP, FN, FP: masks that are matched with an IoU of at least alpha, missed, and wrong.
    For a match c of object g and track d: TPA(c), the matches of g and d; FNA(c), other masks of
    g; FPA(c), other masks of d. "A", "A_re", "A_pr": sums over all matches c of

        A(c) = |TPA| / (|TPA| + |FNA| + |FPA|),   |TPA| / (|TPA| + |FNA|),   |TPA| / (|TPA| + |FPA|)

    "IoU": the sum of the IoUs of all matches (HOTA).
    """
    g, d, iou = match_for_hota(ious, actual, predicted)  # (N,) each
    matched = iou >= ALPHAS[:, None] - EPSILON  # (A, N)
    tp = matched.sum(axis=1)
    tpa = np.zeros((len(ALPHAS), *ious.shape[1:]))  # (A, G, D)
    np.add.at(tpa, (slice(None), g, d), matched)
    masks_of_object = actual.sum(axis=0)[:, None]  # (G, 1), |TPA| + |FNA|
    masks_of_track = predicted.sum(axis=0)  # (D,), |TPA| + |FPA|

    def sum_over_matches(quotient):
        return (tpa * quotient).sum(axis=(1, 2))  # TPA of the matches have the same g and d

    return {
        "TP": tp,
        "FN": actual.sum() - tp,
        "FP": predicted.sum() - tp,
        "IoU": matched @ iou,
        "A": sum_over_matches(tpa / (masks_of_object + masks_of_track - tpa)),
        "A_re": sum_over_matches(tpa / masks_of_object),
        "A_pr": sum_over_matches(tpa / masks_of_track),
    }


def match_for_hota(
    ious: np.ndarray, actual: np.ndarray, predicted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Match objects and tracks in every frame so that HOTA is highest: objects, tracks, IoUs (N,).

    Each frame maximises the sum of A_max(g, d) * IoU(g, d). A_max is the association that g and d
    would have if they were matched in all frames; a frame in which they compete with others counts
    by their share of the IoU (HOTA); the published code shares out the IoU.
    """
    competing = ious.sum(axis=1, keepdims=True) + ious.sum(axis=2, keepdims=True) - ious
    share = np.divide(ious, competing, out=np.zeros_like(ious), where=competing > EPSILON)
    together = share.sum(axis=0)  # (G, D)
    masks = actual.sum(axis=0)[:, None] + predicted.sum(axis=0)
    association = together / (masks - together)

    matches = [(np.empty(0, int), np.empty(0, int), np.empty(0))]
    for t, g, d in frames_with_both(actual, predicted):
        pairs = g[:, None], d
        rows, columns = assign(association[pairs] * ious[t][pairs])
        g, d = g[rows], d[columns]
        matches.append((g, d, ious[t, g, d]))
    return tuple(map(np.concatenate, zip(*matches)))


def clear_counts(ious: np.ndarray, actual: np.ndarray, predicted: np.ndarray) -> Counts:
    """Masks matched, missed and wrong, identity switches and fragmentations; arguments as above.

    Each frame is matched on its own: first, objects keep their track of the frame before, if the
    IoU is still at least MIN_IOU; then the sum of the IoUs is highest (CLEAR, mapping
    procedure). A switch is an object whose track differs from the last one it had, however long
    ago. A fragmentation is an object that is tracked again after a frame in which it was not.

    As in TrackEval, frames without any object or without any track do not count as a frame before.
    """
    objects = ious.shape[1]
    last = np.full(objects, -1)  # the track that an object had last
    before = np.full(objects, -1)  # the track that it had in the frame before, -1 = none
    begun = np.zeros(objects, int)  # how often it was tracked after a frame in which it was not
    tp = switches = 0
    for t, g, d in frames_with_both(actual, predicted):
        iou = ious[t][g[:, None], d]
        worth = CONTINUED * (before[g][:, None] == d) + iou
        worth[iou < MIN_IOU - EPSILON] = 0
        rows, columns = assign(worth)
        matched = worth[rows, columns] > EPSILON
        g, d = g[rows[matched]], d[columns[matched]]
        tp += len(g)
        switches += np.count_nonzero((last[g] >= 0) & (last[g] != d))
        begun[g] += before[g] < 0
        last[g] = d
        before[:] = -1
        before[g] = d
    return {
        "CLEAR_TP": tp,
        "CLEAR_FN": actual.sum() - tp,
        "CLEAR_FP": predicted.sum() - tp,
        "IDSW": switches,
        "Frag": np.maximum(begun - 1, 0).sum(),
    }


def identity_counts(ious: np.ndarray, actual: np.ndarray, predicted: np.ndarray) -> Counts:
    """Masks with the right identity (IDTP), missed and wrong; arguments as above.

    Every object gets one track for the whole video, so that as many masks as possible have an IoU
    of at least MIN_IOU (ID, truth-to-result match).
    """
    common = (ious >= MIN_IOU).sum(axis=0)  # (G, D) masks
    pairs = assign(common)
    idtp = common[pairs].sum()
    return {"IDTP": idtp, "IDFN": actual.sum() - idtp, "IDFP": predicted.sum() - idtp}


def assign(worth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the one-to-one pairs whose total worth is highest."""
    from scipy.optimize import linear_sum_assignment  # Speed: importing it takes 0.4 s

    return linear_sum_assignment(worth, maximize=True)


def frames_with_both(
    actual: np.ndarray, predicted: np.ndarray
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield each frame with masks of both kinds: t, and the indices of its objects and tracks."""
    for t in np.flatnonzero(actual.any(axis=1) & predicted.any(axis=1)):
        yield t, np.flatnonzero(actual[t]), np.flatnonzero(predicted[t])


# Metrics of counts


def divide(numerator, denominator):
    """The quotient; nothing is divided by less than 1, so 0 / 0 = 0."""
    return numerator / np.maximum(1, denominator)


def hota(c: Counts):
    """HOTA = sqrt(DetA * AssA) = sqrt(sum over c of A(c) / (|TP| + |FN| + |FP|)) (HOTA)."""
    return np.sqrt(det_a(c) * ass_a(c))


def det_a(c: Counts):
    """DetA = |TP| / (|TP| + |FN| + |FP|) (HOTA)."""
    return divide(c["TP"], c["TP"] + c["FN"] + c["FP"])


def det_re(c: Counts):
    """DetRe = |TP| / (|TP| + |FN|) (HOTA)."""
    return divide(c["TP"], c["TP"] + c["FN"])


def det_pr(c: Counts):
    """DetPr = |TP| / (|TP| + |FP|) (HOTA)."""
    return divide(c["TP"], c["TP"] + c["FP"])


def ass_a(c: Counts):
    """AssA = 1 / |TP| * sum over c of |TPA| / (|TPA| + |FNA| + |FPA|) (HOTA)."""
    return divide(c["A"], c["TP"])


def ass_re(c: Counts):
    """AssRe = 1 / |TP| * sum over c of |TPA| / (|TPA| + |FNA|) (HOTA)."""
    return divide(c["A_re"], c["TP"])


def ass_pr(c: Counts):
    """AssPr = 1 / |TP| * sum over c of |TPA| / (|TPA| + |FPA|) (HOTA)."""
    return divide(c["A_pr"], c["TP"])


def loc_a(c: Counts):
    """LocA = 1 / |TP| * sum over c of IoU(c); 1 without a match (HOTA)."""
    return np.where(c["TP"] == 0, 1.0, divide(c["IoU"], c["TP"]))


def mota(c: Counts):
    """MOTA = 1 - (|FN| + |FP| + |IDSW|) / (|TP| + |FN|) (CLEAR)."""
    return divide(c["CLEAR_TP"] - c["CLEAR_FP"] - c["IDSW"], c["CLEAR_TP"] + c["CLEAR_FN"])


def id_f1(c: Counts):
    """IDF1 = 2 IDTP / (2 IDTP + IDFP + IDFN) (ID)."""
    return divide(c["IDTP"], c["IDTP"] + (c["IDFP"] + c["IDFN"]) / 2)


def id_recall(c: Counts):
    """IDR = IDTP / (IDTP + IDFN) (ID)."""
    return divide(c["IDTP"], c["IDTP"] + c["IDFN"])


def id_precision(c: Counts):
    """IDP = IDTP / (IDTP + IDFP) (ID)."""
    return divide(c["IDTP"], c["IDTP"] + c["IDFP"])


METRICS = {
    "HOTA": hota,
    "DetA": det_a,
    "AssA": ass_a,
    "DetRe": det_re,
    "DetPr": det_pr,
    "AssRe": ass_re,
    "AssPr": ass_pr,
    "LocA": loc_a,
    "MOTA": mota,
    "IDSW": lambda c: c["IDSW"],
    "Frag": lambda c: c["Frag"],
    "IDF1": id_f1,
    "IDR": id_recall,
    "IDP": id_precision,
}
SUMMED = ("IDSW", "Frag")  # over classes


# Of a data set


def evaluate_tracking(
    videos: list[VideoOverlaps], categories: list[dict], min_score: float
) -> dict:
    """All METRICS of the predictions that score at least min_score: floats, IDSW and Frag ints.

    Args:
        videos: as returned by `measure_overlaps`.
        categories: of the annotation file.

    Returns "score_threshold", "tracks" (the number of predictions), "over_detections",
    "class_mean", and "per_class" by category name in the order of the file.
    """
    counts_of = defaultdict(list)
    for video in videos:
        for category, tracks in video.by_category().items():
            counts_of[category].append(count_tracks(visible_tracks(tracks, min_score)))
    counts = {category["name"]: add_counts(counts_of[category["id"]]) for category in categories}
    per_class = {name: metrics_of(count) for name, count in counts.items()}
    chosen = [p for video in videos for p in video.predictions if p["score"] >= min_score]
    return {
        "score_threshold": min_score,
        "tracks": len(chosen),
        "over_detections": metrics_of(add_counts(list(counts.values()))),
        "class_mean": class_mean(list(per_class.values())),
        "per_class": per_class,
    }


def visible_tracks(tracks: VideoOverlaps, min_score: float) -> VideoOverlaps:
    """The predictions that score at least min_score, and the objects that are no crowd.

    Tracks without any mask are left out.
    """
    predicted = (tracks.scores >= min_score) & tracks.predicted_areas.any(axis=0)
    actual = ~tracks.crowd & tracks.actual_areas.any(axis=0)
    return tracks.select(np.flatnonzero(predicted), np.flatnonzero(actual))


def count_tracks(tracks: VideoOverlaps) -> Counts:
    """All counts of one class in one video."""
    ious = tracks.frame_ious().transpose(0, 2, 1)
    actual, predicted = tracks.actual_areas > 0, tracks.predicted_areas > 0
    return (
        hota_counts(ious, actual, predicted)
        | clear_counts(ious, actual, predicted)
        | identity_counts(ious, actual, predicted)
    )


def add_counts(counts: list[Counts]) -> Counts:
    """The sum over videos or classes; 0 for all names if there are none."""
    total = defaultdict(int)
    for count in counts:
        for name, value in count.items():
            total[name] = total[name] + value
    return total


def metrics_of(counts: Counts) -> dict[str, float]:
    """All METRICS; those of HOTA are means over ALPHAS."""
    metrics = {name: float(np.mean(metric(counts))) for name, metric in METRICS.items()}
    return metrics | {name: int(counts[name]) for name in SUMMED}


def class_mean(per_class: list[dict[str, float]]) -> dict[str, float]:
    """The mean over classes, and the sum of switches and fragmentations."""
    columns = {name: [metrics[name] for metrics in per_class] for name in METRICS}
    means = {name: float(np.mean(values)) for name, values in columns.items()}
    return means | {name: sum(columns[name]) for name in SUMMED}


def format_tracking(tracking: dict) -> str:
    """The most important numbers over detections for printing: a line, shares in percent."""
    numbers = tracking["over_detections"]
    shares = ("HOTA", "DetA", "AssA", "MOTA", "IDF1")
    cells = [f"{name} {100 * numbers[name]:.1f}" for name in shares]
    cells += [f"{name} {numbers[name]}" for name in SUMMED]
    return (
        f"{tracking['tracks']} tracks of score {tracking['score_threshold']:g} or more: "
        f"{'   '.join(cells)}"
    )
