"""Scores a results file against annotations, and packs it for a benchmark's server.

    parts = read_parts(["gt_short.json", "gt_long.json"], skip_bad=False)
    metrics = score_results(Path("results.json"), parts, output=Path("scores"), plot=False)

The ground truth may have several parts (YouTube-VIS 2022), which are scored one by one and then
averaged. The metric itself is in metric.py, what explains it in causes.py, linking.py and
comparison.py.
"""

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
    accumulate_matched,
    category_ids,
    check_predictions,
    format_table,
    match_video,
    mean_metrics,
    summarize,
)
from evaluation.overlaps import VideoOverlaps, measure_overlaps
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
    sources: Sources | None = None,
) -> dict | None:
    """Validate a results file, zip it for a server, and score it if there are annotations.

    Args:
        parts: the ground truth by name. Each part is scored; metrics.json starts with the mean.
        other_path: a results file to compare with.
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

    scored = {name: score_part(results, part) for name, part in parts.items()}
    metrics = {name: part.metrics for name, part in scored.items()}
    for name, part in parts.items():
        if len(parts) > 1:
            lines.append(f"{name}, {len(part.content['videos'])} videos")
        lines += [format_table(metrics[name]), format_causes(metrics[name])]
    total = metrics[name]
    if len(parts) > 1:
        total = mean_metrics(list(metrics.values())) | {"parts": metrics}
        lines += ["mean", format_table(total), format_causes(total)]
    if other is not None:
        others = {name: score_part(other, part) for name, part in parts.items()}
        total = total | {"comparison": compare_parts(parts, scored, others, other_path)}
        lines.append(format_comparison(total["comparison"]))
    save_json(output / "metrics.json", total)
    if sources is not None:
        write_report(output / "report.html", parts, scored, total, sources)
    if plot:
        precision = {name: part.precision for name, part in scored.items()}
        plot_metrics(output / "plots", metrics, precision)
    print(*filter(None, lines), sep="\n")
    return total


def score_part(results: list[dict], part: AnnotationFile) -> ScoredPart:
    """Score the predictions of the videos of one part of the ground truth."""
    videos = {video["id"] for video in part.content["videos"]}
    results = [entry for entry in results if entry["video_id"] in videos]
    categories = category_ids(part.content)
    numbers = {category: number for number, category in enumerate(categories)}
    overlaps = {video.video_id: video for video in measure_overlaps(results, part.content)}
    matched = {name: match_video(video) for name, video in overlaps.items()}
    explained = {
        name: explain_video(video, matched[name], numbers) for name, video in overlaps.items()
    }
    linked = [link_video(video) for video in overlaps.values()]
    precision, recall, _ = accumulate_matched(matched.values(), categories)
    metrics = summarize(precision, recall, part.content)
    metrics["causes"] = measure_causes(explained.values())
    metrics["oracle"] = measure_linking(linked, categories) | {
        "order": measure_order(explained.values())
    }
    return ScoredPart(metrics, precision, matched, explained, overlaps)


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


def plot_metrics(folder: Path, metrics: dict[str, dict], precision: dict[str, np.ndarray]) -> None:
    """Plot the precision and the classes of each part."""
    folder.mkdir(exist_ok=True)
    for name in metrics:
        file_name = name.replace(os.sep, "-") + ".png"
        plot_precision(folder / f"precision_{file_name}", precision[name])
        plot_classes(folder / f"classes_{file_name}", metrics[name]["per_class"])


def zip_results(path: Path, target: Path) -> None:
    """Write an archive that contains the file as results.json, atomically."""
    with (
        atomic_write(target) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        archive.write(path, "results.json")
