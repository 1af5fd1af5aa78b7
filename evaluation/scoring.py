"""Scores a results file against annotations, and packs it for a benchmark's server.

    parts = read_parts(["gt_short.json", "gt_long.json"], skip_bad=False)
    metrics = score_results(Path("results.json"), parts, output=Path("scores"), plot=False)

The ground truth may have several parts (YouTube-VIS 2022), which are scored one by one and then
averaged. The metrics are in metric.py (AP), occlusion.py, tracking.py and boundary.py; causes.py,
linking.py and comparison.py explain them. All use the same overlaps (overlaps.py).
"""

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.boundary import evaluate_boundary, format_boundary
from evaluation.causes import (
    Explanation,
    explain_video,
    format_causes,
    measure_causes,
    measure_order,
)
from evaluation.comparison import compare, compare_gains, format_comparison
from evaluation.linking import link_video, measure_linking
from evaluation.metric import (
    AREA,
    AREA_RANGES,
    accumulate_matched,
    category_ids,
    check_predictions,
    format_table,
    match_video,
    mean_metrics,
    summarize,
)
from evaluation.occlusion import choose_groupings, format_groups, group_scores, ovis_metrics
from evaluation.overlaps import VideoOverlaps, measure_overlaps
from evaluation.tracking import evaluate_tracking, format_tracking
from reading.annotations import AnnotationFile, Skipped, read_annotations
from reading.ids import Id
from reading.layouts import GROUND_TRUTH_HELP
from runtime.errors import InputError, shown
from runtime.files import atomic_write, read_json, save_json
from viewing.cards import Sources
from viewing.plots import plot_classes, plot_precision
from viewing.report import write_report


@dataclass
class ScoredPart:
    """A results file scored on one part of the ground truth."""

    metrics: dict  # as in metrics.json
    precision: np.ndarray  # of `metric.accumulate`
    matched: dict[Id, dict]  # of `metric.match_video`, by video
    explained: dict[Id, Explanation]  # of `causes.explain_video`
    overlaps: dict[Id, VideoOverlaps]


def read_parts(paths: list[str | Path], skip_bad: bool) -> dict[str, AnnotationFile]:
    """The annotation files of the parts of a data set, by name; all have the same categories."""
    parts = [read_annotations(path, skip_bad) for path in paths]
    for part in parts:
        if part.categories != parts[0].categories:
            raise InputError(
                f"{part.name} has other categories than {parts[0].name}: "
                "they are not parts of one set"
            )
    names = [Path(path).stem for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return dict(zip(names, parts))


def read_results(path: Path, parts: dict[str, AnnotationFile]) -> list[dict]:
    """The predictions of a results file, checked against the ground truth."""
    left_out = [video for part in parts.values() for video in part.left_out]
    return check_predictions(read_json(path), join_parts(parts), left_out)


def score_results(
    results_path: Path,
    parts: dict[str, AnnotationFile],
    output: Path,
    plot: bool,
    other_path: Path | None = None,
    track_score: float = 0.3,
    boundary: bool = False,
    sources: Sources | None = None,
) -> dict | None:
    """Validate a results file, zip it for a server, and score it if there are annotations.

    Args:
        parts: the ground truth by name. Each part is scored; metrics.json starts with the mean.
            "tracking" is of all videos together instead.
        other_path: a results file to compare with.
        track_score, boundary: see `score_part`.
        sources: of the pictures of a report; without them, no report is written.

    All files are written before anything is printed, so that no error of the terminal loses them.
    Returns the contents of metrics.json, None without annotations.
    """
    results = read_results(results_path, parts)
    other = read_results(other_path, parts) if other_path else None
    output.mkdir(parents=True, exist_ok=True)
    archive = output / "results.json.zip"
    zip_results(results_path, archive)
    lines = describe_skipped(parts)
    if not any(part.content["annotations"] for part in parts.values()):
        first, *_ = parts.values()
        print(*lines, f"{first.name} has no annotations: nothing is scored", sep="\n")
        print(f"{archive} is what the server of a benchmark takes; {GROUND_TRUTH_HELP}")
        return None

    scored = {
        name: score_part(results, part, track_score, boundary) for name, part in parts.items()
    }
    metrics = join_metrics(scored, parts, track_score)
    lines += format_parts(metrics, parts)
    if other is not None:
        others = {name: score_part(other, part) for name, part in parts.items()}
        metrics["comparison"] = compare_parts(parts, scored, others, other_path)
        lines.append(format_comparison(metrics["comparison"]))
    save_json(output / "metrics.json", metrics)
    if sources is not None:
        write_report(output / "report.html", parts, scored, metrics, sources)
    if plot:
        plot_metrics(output / "plots", scored)
    print(*filter(None, lines), sep="\n")
    return metrics


def score_part(
    results: list[dict], part: AnnotationFile, track_score: float = 0.3, boundary: bool = False
) -> ScoredPart:
    """Score the predictions of the videos of one part of the ground truth.

    Args:
        track_score: minimum score of the predictions that count as tracks in "tracking".
        boundary: also compute "boundary".

    The metrics are those of `metric.evaluate_results`, and
        "causes", "oracle": what AP is lost to (causes.py), and what better links would give
            (linking.py).
        "groups": AP and AR by occlusion, or by gap and length (occlusion.py).
        "ovis": the 18 numbers of OVIS, if there are occlusion levels.
        "tracking": HOTA, MOTA, IDF1 and their parts (tracking.py).
        "boundary": AP by boundaries (boundary.py).
    """
    ids = {video["id"] for video in part.content["videos"]}
    results = [entry for entry in results if entry["video_id"] in ids]
    categories = category_ids(part.content)
    numbers = {category: number for number, category in enumerate(categories)}
    groupings = choose_groupings(part.content["annotations"])
    groups = len(AREA_RANGES) + sum(len(grouping.ranges) for grouping in groupings.values())

    overlaps = {video.video_id: video for video in measure_overlaps(results, part.content)}
    videos = list(overlaps.values())
    matched = {v.video_id: match_video(v, [AREA, *groupings.values()]) for v in videos}
    explained = {v.video_id: explain_video(v, matched[v.video_id], numbers) for v in videos}
    linked = [link_video(video) for video in videos]
    precision, recall, _ = accumulate_matched(matched.values(), categories, groups)

    metrics = summarize(precision, recall, part.content)
    metrics["causes"] = measure_causes(explained.values())
    metrics["oracle"] = measure_linking(linked, categories) | {
        "order": measure_order(explained.values())
    }
    metrics["groups"] = group_scores(precision, recall, groupings, videos)
    if "occlusion" in groupings:
        metrics["ovis"] = ovis_metrics(metrics, metrics["groups"]["occlusion"])
    metrics["tracking"] = evaluate_tracking(videos, part.content["categories"], track_score)
    if boundary:
        metrics["boundary"] = evaluate_boundary(results, part.content, videos)
    return ScoredPart(metrics, precision, matched, explained, overlaps)


def join_metrics(
    scored: dict[str, ScoredPart], parts: dict[str, AnnotationFile], track_score: float
) -> dict:
    """The contents of metrics.json, from those of the parts."""
    metrics = {name: part.metrics for name, part in scored.items()}
    first, *others = metrics.values()
    if not others:
        return dict(first)
    mean = mean_metrics(list(metrics.values()))
    # Of all videos together: counts can be added.
    videos = [video for part in scored.values() for video in part.overlaps.values()]
    any_part, *_ = parts.values()  # all have the same categories
    mean["tracking"] = evaluate_tracking(videos, any_part.content["categories"], track_score)
    return mean | {"parts": metrics}


def format_parts(metrics: dict, parts: dict[str, AnnotationFile]) -> list[str]:
    """The output of `join_metrics` for printing."""
    lines = []
    for name, of_part in metrics.get("parts", {}).items():
        lines += [f"{name}, {len(parts[name].content['videos'])} videos", *format_metrics(of_part)]
    return [*lines, "mean", *format_metrics(metrics)] if lines else format_metrics(metrics)


def format_metrics(metrics: dict) -> list[str]:
    """The metrics of `score_part` for printing."""
    lines = [
        format_table(metrics),
        format_groups(metrics["groups"]),
        format_tracking(metrics["tracking"]),
    ]
    if "boundary" in metrics:
        lines.append(format_boundary(metrics["boundary"]))
    return [*lines, format_causes(metrics)]


def compare_parts(
    parts: dict[str, AnnotationFile],
    these: dict[str, ScoredPart],
    others: dict[str, ScoredPart],
    other_path: Path,
) -> dict:
    """The comparison of two results for metrics.json, by part of the ground truth."""
    comparison = compare(
        [(part.content, these[name].matched, others[name].matched) for name, part in parts.items()]
    )
    causes = [
        mean_metrics([part.metrics["causes"] for part in scored.values()])
        for scored in (these, others)
    ]
    return {"other": str(other_path)} | comparison | {"causes": compare_gains(*causes)}


def join_parts(parts: dict[str, AnnotationFile]) -> dict:
    """The content of one annotation file with the videos of all parts."""
    contents = [part.content for part in parts.values()]
    whole = {"categories": contents[0]["categories"]}
    for key in ("videos", "annotations"):
        whole[key] = [entry for content in contents for entry in content[key]]
    return whole


def describe_skipped(parts: dict[str, AnnotationFile]) -> list[str]:
    """What was skipped in the annotations, and how many videos are left out."""
    skipped = Skipped(part.skipped for part in parts.values())
    lines = [f"skipped: {sentence}" for sentence in skipped.sentences()]
    left_out = [video for part in parts.values() for video in part.left_out]
    if left_out:
        total = len(left_out) + sum(len(part.content["videos"]) for part in parts.values())
        lines.append(
            f"{len(left_out)} of {total} videos are left out of the metric, the first: "
            f"{shown(left_out[0])}"
        )
    return lines


def plot_metrics(folder: Path, scored: dict[str, ScoredPart]) -> None:
    """Plot the precision and the classes of each part."""
    folder.mkdir(exist_ok=True)
    for name, part in scored.items():
        file_name = name.replace(os.sep, "-") + ".png"
        plot_precision(folder / f"precision_{file_name}", part.precision)
        plot_classes(folder / f"classes_{file_name}", part.metrics["per_class"])


def zip_results(path: Path, target: Path) -> None:
    """Write an archive that contains the file as results.json, atomically."""
    with (
        atomic_write(target) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        archive.write(path, "results.json")
