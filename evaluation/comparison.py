"""Whether one set of results is better than another: differences, and how sure they are.

    comparison = compare([(ground_truth, matched, other_matched)])
    comparison["metrics"]["AP"]["difference"], comparison["videos"][0]["video_id"]

The intervals are paired bootstrap intervals over videos: each of 1000 resamples draws as many
videos as there are, with replacement, and both results are scored on the videos drawn. The interval
of a difference is that of the middle 95 % of its resamples. The seed is fixed.

AP of a resample follows from the matchings of its videos, so no mask is looked at again. A video
that is drawn twice counts as two videos. Equal scores are ranked as in the metric, in the order of
the videos and then of the file, and the copies of a prediction directly after it.

Classes and sizes without ground truth in a resample are left out of the means of that resample, in
both results alike. Resamples in which a number is not defined at all are left out of its interval.

If the ground truth has several parts, each part is resampled, and the numbers are means over parts.

The numbers of a video are those of a ground truth with this video alone: means over the classes
that it has. Predictions of other classes do not count there.

Letters: R resamples, V videos, N ranked predictions, T thresholds, K categories, A area ranges.
"""

import numpy as np

from evaluation.metric import (
    ALL,
    LARGE,
    MAX_PREDICTIONS,
    MEDIUM,
    SMALL,
    average_precision,
    rank_predictions,
)
from reading.ids import id_order

RESAMPLES = 1000
INTERVAL = 0.95  # share of the resamples
LISTED = 5  # classes and videos that gained most, and as many that lost most
ROUNDING = 1e-9  # smaller differences are none
MAX_NUMBERS = 2**22  # in one array
# Name: thresholds, area range.
PRECISIONS = {
    "AP": (slice(None), ALL),
    "AP50": (slice(0, 1), ALL),
    "AP75": (slice(5, 6), ALL),
    "APs": (slice(None), SMALL),
    "APm": (slice(None), MEDIUM),
    "APl": (slice(None), LARGE),
}
# Name: area range, limit on the number of predictions.
RECALLS = {
    "AR1": (ALL, MAX_PREDICTIONS[0]),
    "AR10": (ALL, MAX_PREDICTIONS[1]),
    "AR100": (ALL, MAX_PREDICTIONS[2]),
    "ARs": (SMALL, MAX_PREDICTIONS[2]),
    "ARm": (MEDIUM, MAX_PREDICTIONS[2]),
    "ARl": (LARGE, MAX_PREDICTIONS[2]),
}


def resample(videos: int, random: np.random.Generator, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each resample contains each video: (R, V) int."""
    return random.multinomial(videos, np.full(videos, 1 / videos), size=resamples)


def video_ids(ground_truth: dict) -> list:
    """The V videos of the content of an annotation file, in ascending order of id."""
    return sorted((video["id"] for video in ground_truth["videos"]), key=id_order)


def resampled_metrics(matched: dict, ground_truth: dict, counts: np.ndarray) -> dict:
    """The metrics of many selections of videos.

    Args:
        matched: {video id: output of `metric.match_video`} of the videos that have entries.
        ground_truth: the content of the annotation file.
        counts: (R, V) int, how often each selection contains each video of `video_ids`.

    Returns {name: (R,) float64} for the twelve names of `metric.evaluate_results`, and "per_class":
    {class name: (R,)}. They are NaN where not defined.
    """
    categories = ground_truth["categories"]
    matched = [matched.get(video_id, {}) for video_id in video_ids(ground_truth)]
    precision = {
        a: np.stack([category_precision(matched, k["id"], a, counts) for k in categories])
        for a in (ALL, SMALL, MEDIUM, LARGE)
    }  # (K, R, T)
    metrics = {name: mean_of_rows(precision[a][..., t]) for name, (t, a) in PRECISIONS.items()}
    for name, (a, limit) in RECALLS.items():
        recall = [category_recall(matched, k["id"], a, limit, counts) for k in categories]
        metrics[name] = mean_of_rows(np.stack(recall))
    of_classes = precision[ALL].mean(axis=2)
    metrics["per_class"] = {k["name"]: values for k, values in zip(categories, of_classes)}
    return metrics


def mean_of_rows(values: np.ndarray) -> np.ndarray:
    """(K, R, T) -> (R,), the mean of the defined values; NaN where there are none."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=(0, 2))
    total = np.where(defined, values, 0).sum(axis=(0, 2))
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def category_precision(matched: list[dict], category, a: int, counts: np.ndarray) -> np.ndarray:
    """AP of a category at each threshold in every selection, (R, T); NaN without ground truth."""
    times, positives, true, false = weigh(matched, category, a, MAX_PREDICTIONS[-1], counts)
    precision = np.full((len(counts), len(true)), np.nan)
    defined = np.flatnonzero(positives)
    size = max(1, MAX_NUMBERS // max(1, true.size))
    for begin in range(0, len(defined), size):
        rows = defined[begin : begin + size]
        weights = times[rows, None]  # (rows, 1, N)
        precision[rows] = average_precision(weights * true, weights * false, positives[rows, None])
    return precision


def category_recall(
    matched: list[dict], category, a: int, limit: int, counts: np.ndarray
) -> np.ndarray:
    """Recall of a category at each threshold in every selection, (R, T); NaN if not defined."""
    times, positives, true, _ = weigh(matched, category, a, limit, counts)
    found = (times @ true.T).astype(np.float64)
    positives = np.broadcast_to(positives[:, None], found.shape)
    return np.divide(found, positives, out=np.full(found.shape, np.nan), where=positives > 0)


def weigh(matched: list[dict], category, a: int, limit: int, counts: np.ndarray) -> tuple:
    """What the predictions and the ground truth of a category count for in every selection.

    Returns times (R, N), positives (R,), and the true and false (T, N) of `rank_predictions`.
    """
    videos = [number for number, video in enumerate(matched) if category in video]
    matchings = [matched[number][category] for number in videos]
    positives = np.array([matching["positives"][a] for matching in matchings], dtype=int)
    _, true, false, owner = rank_predictions(matchings, a, limit)
    return counts[:, videos][:, owner], counts[:, videos] @ positives, true, false


# Two results


def compare(parts: list[tuple[dict, dict, dict]]) -> dict:
    """Compare two results on the parts of a ground truth.

    parts: for each, the content of the annotation file, and {video id: output of
        `metric.match_video`} of these and of the other results.

    Returns a dict for metrics.json. Numbers that are not defined are left out.
        "metrics", "per_class": {name: {"this", "other", "difference", "low", "high"}}
        "videos": [{"video_id", "this", "other", "difference"}], their AP, best difference first
        "resamples": their number
    """
    random = np.random.default_rng(0)
    points, samples, videos = [], [], []
    for ground_truth, *pair in parts:
        ids = video_ids(ground_truth)
        counts = resample(len(ids), random)
        everything, alone = np.ones((1, len(ids)), dtype=int), np.eye(len(ids), dtype=int)
        points.append([resampled_metrics(matched, ground_truth, everything) for matched in pair])
        samples.append([resampled_metrics(matched, ground_truth, counts) for matched in pair])
        videos += zip(
            ids, *(resampled_metrics(matched, ground_truth, alone)["AP"] for matched in pair)
        )
    points, samples = ([mean_of_parts(of) for of in zip(*values)] for values in (points, samples))
    classes = [[metrics.pop("per_class") for metrics in values] for values in (points, samples)]
    differences = [
        {"video_id": video, "this": this, "other": other, "difference": this - other}
        for video, this, other in videos
        if not np.isnan(this)
    ]
    return {
        "resamples": RESAMPLES,
        "metrics": paired_intervals(points, samples),
        "per_class": paired_intervals(*classes),
        "videos": sorted(differences, key=lambda entry: -entry["difference"]),
    }


def mean_of_parts(parts: list[dict]) -> dict:
    """Average {name: (R,)} over parts, element by element, over the defined values."""
    names = dict.fromkeys(name for part in parts for name in part)
    averaged = {}
    for name in names:
        values = [part[name] for part in parts if name in part]
        if isinstance(values[0], dict):
            averaged[name] = mean_of_parts(values)
        else:
            averaged[name] = mean_of_rows(np.stack(values)[..., None])
    return averaged


def paired_intervals(points: list[dict], samples: list[dict]) -> dict[str, dict[str, float]]:
    """The differences of two results, with intervals: see `compare`.

    points, samples: for both results {name: (1,)}, and {name: (R,)}.
    """
    differences = {}
    for name in points[0]:
        this, other = (float(values[name][0]) for values in points)
        if np.isnan(this):
            continue
        low, high = interval(samples[0][name] - samples[1][name])
        differences[name] = {
            "this": this,
            "other": other,
            "difference": this - other,
            "low": low,
            "high": high,
        }
    return differences


def interval(values: np.ndarray) -> tuple[float, float]:
    """The ends of the middle INTERVAL of the defined values of resamples (R,)."""
    tail = (1 - INTERVAL) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return float(low), float(high)


def compare_gains(these: dict, others: dict) -> dict[str, dict[str, float]]:
    """{cause: {"this", "other", "difference"}}, the AP lost to each cause of `measure_causes`."""
    return {
        name: {
            "this": gain["AP"],
            "other": others[name]["AP"],
            "difference": gain["AP"] - others[name]["AP"],
        }
        for name, gain in these.items()
    }


def format_comparison(comparison: dict) -> str:
    """Format "comparison" of metrics.json for printing, in percent."""
    lines = [
        f"compared with {comparison['other']}: this, other, and the difference with its "
        f"{INTERVAL:.0%} interval over {comparison['resamples']} resamples of the videos"
    ]
    for title, key in ((None, "metrics"), ("gained if fixed", "causes")):
        lines += [title] if title else []
        for name, entry in comparison[key].items():
            lines.append(f"  {name:<15} {format_difference(entry)}")
    classes = sorted(comparison["per_class"].items(), key=lambda item: -item[1]["difference"])
    videos = [(f"{entry['video_id']}", entry) for entry in comparison["videos"]]
    for what, entries in (("classes", classes), ("videos", videos)):
        gained = [entry for entry in entries if entry[1]["difference"] > ROUNDING][:LISTED]
        lost = [entry for entry in entries[::-1] if entry[1]["difference"] < -ROUNDING][:LISTED]
        for title, some in (("gained", gained), ("lost", lost)):
            if some:
                lines.append(f"{what} that {title} most")
            width = max((len(name) for name, _ in some), default=0)
            lines += [f"  {name:<{width}} {format_difference(entry)}" for name, entry in some]
    return "\n".join(lines)


def format_difference(entry: dict) -> str:
    percent = {key: round(100 * entry[key], 1) + 0.0 for key in entry if key != "video_id"}
    line = "{this:5.1f} {other:5.1f} {difference:+6.1f}".format(**percent)
    return line + "  [{low:+.1f}, {high:+.1f}]".format(**percent) if "low" in entry else line
