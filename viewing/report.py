"""One HTML file that explains a result: `python evaluate.py --report` writes report.html.

    write_report(path, parts, scored, metrics, Sources(files, gates))

The file needs no network and no JavaScript: the style (report.css), charts (charts.py) and pictures
(cards.py, animations.py) are inside, and a content security policy forbids everything else. It has
at most MAX_BYTES: animations share what the text leaves, lose quality or are left out, and long
lists are cut.

The numbers are those of metrics.json, with intervals, and with the AP of every video.
"""

from pathlib import Path, PurePath

import numpy as np

from evaluation.comparison import (
    RESAMPLES,
    interval,
    mean_of_parts,
    resample,
    resampled_metrics,
    video_ids,
)
from evaluation.metric import ALL, IOU_THRESHOLDS, RECALL_POINTS
from reading.annotations import AnnotationFile
from runtime.files import atomic_write
from viewing.cards import Sources, video_sections
from viewing.charts import bar, curves, gain, number, percent, span, swatch, table, text
from viewing.explanations import CAUSE_TEXTS, GROUP_TEXTS, IDENTITY_TEXTS, NUMBER_TEXTS, ORACLES

STYLE = Path(__file__).with_name("report.css")
MAX_BYTES = 5 * 10**6
MARGIN = 20_000  # headings and introductions of the videos
LISTED_CLASSES = 100
LISTED_CHANGES = 5  # videos and classes that gained or lost most
CURVES = (0, 2, 4, 6, 8)  # indices into IOU_THRESHOLDS
BOUNDARY_COLUMNS = ("AP", "AP50", "AP75")
NOTHING = "<p>There are no objects that count.</p>\n"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(
    path: Path,
    parts: dict[str, AnnotationFile],
    scored: dict,
    metrics: dict,
    sources: Sources,
) -> None:
    """Write the report atomically.

    Args:
        parts: the ground truth by name.
        scored: scoring.ScoredPart by the same names.
        metrics: the content of metrics.json.
    """
    sections = {
        "Numbers": numbers_section(parts, scored, metrics),
        "Precision and recall": curve_section(scored),
        "Boundaries": boundary_section(metrics),
        "Classes": class_section(metrics["per_class"]),
        "Occluded objects": group_section(scored),
        "Identities": identity_section(metrics),
        "Causes of lost AP": cause_section(metrics),
        "Linking": oracle_section(metrics),
    }
    sections = {title: html for title, html in sections.items() if html}
    comparison = {}
    if "comparison" in metrics:
        comparison = {"Comparison": comparison_section(metrics["comparison"])}
    written = page(parts, scored, sections | comparison)
    room = MAX_BYTES - len(written.encode()) - MARGIN
    videos = video_sections(parts, scored, sources, room)
    written = page(parts, scored, sections | videos | comparison)
    with atomic_write(path) as temporary:
        temporary.write_text(written, encoding="utf-8")


def page(parts: dict[str, AnnotationFile], scored: dict, sections: dict[str, str]) -> str:
    """The whole file. sections: {title: html}."""
    names = " and ".join(text("/".join(PurePath(part.name).parts[-2:])) for part in parts.values())
    overlaps = [video for part in scored.values() for video in part.overlaps.values()]
    counts = {
        "videos": sum(len(part.content["videos"]) for part in parts.values()),
        "objects": sum(np.count_nonzero(~video.crowd) for video in overlaps),
        "predictions": sum(len(video.predictions) for video in overlaps),
    }
    anchors = {title: title.lower().replace(" ", "-") for title in sections}
    links = " ".join(f'<a href="#{anchor}">{title}</a>' for title, anchor in anchors.items())
    body = "".join(
        f'<section id="{anchors[title]}">\n<h2>{title}</h2>\n{html}</section>\n'
        for title, html in sections.items()
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{names}: evaluation</title>\n"
        f"<style>\n{STYLE.read_text('utf-8')}</style>\n</head>\n"
        f"<body>\n<header>\n<h1>Evaluation on {names}</h1>\n"
        f"<p>{', '.join(f'{count} {name}' for name, count in counts.items())}. All numbers are in "
        f"percent, except counts.</p>\n<nav>{links}</nav>\n</header>\n<main>\n{body}</main>\n"
        "</body>\n</html>\n"
    )


# Sections


def numbers_section(parts: dict, scored: dict, metrics: dict) -> str:
    """The twelve numbers with bootstrap intervals, the means over parts."""
    random = np.random.default_rng(0)
    samples = []
    for name, part in parts.items():
        counts = resample(len(video_ids(part.content)), random)
        samples.append(resampled_metrics(scored[name].matched, part.content, counts))
    samples = mean_of_parts(samples)
    rows = []
    for name, meaning in NUMBER_TEXTS.items():
        low, high = np.nan, np.nan
        if metrics[name] >= 0:
            low, high = interval(samples[name])
        ends = span(low, high)
        rows.append([name, percent(metrics[name]), ends, bar(metrics[name], low, high), meaning])
    return (
        f"<p>The interval contains 95 % of {RESAMPLES} bootstrap resamples of the videos: it says "
        "what other videos might change, not another training run.</p>\n"
    ) + table(["", "value", "interval", "", ""], rows, "explained")


def curve_section(scored: dict) -> str:
    """Precision over recall at several thresholds, for each part."""
    html = "<p>Means over the classes that have objects, at several IoU thresholds.</p>\n"
    for name, part in scored.items():
        precision = part.precision[:, :, :, ALL, -1]  # (T, R, K)
        defined = (precision > -1).all((0, 1))
        if not defined.any():
            continue
        means = precision[:, :, defined].mean(2)
        rows = [
            [f"{swatch(k)} {IOU_THRESHOLDS[t]:.2f}", percent(means[t].mean())]
            for k, t in enumerate(CURVES)
        ]
        chart = curves([(RECALL_POINTS, means[t]) for t in CURVES], "precision over recall")
        chart += table(["IoU", "AP"], rows)
        html += part_title(name, scored) + f'<div class="plot">{chart}</div>\n'
    return html


def part_title(name: str, parts: dict) -> str:
    return f"<h3>{text(name)}</h3>\n" if len(parts) > 1 else ""


def boundary_section(metrics: dict) -> str:
    """AP by masks, by boundaries, and by both; empty without --boundary."""
    if "boundary" not in metrics:
        return ""
    boundary = metrics["boundary"]
    kinds = (
        ("masks", "mask IoU", metrics),
        ("boundaries", "IoU of the pixels near the outlines", boundary["boundary_iou"]),
        ("Boundary AP", "the lower of both IoUs", boundary["min_iou"]),
    )
    rows = [
        [name, *(percent(values[key]) for key in BOUNDARY_COLUMNS), bar(values["AP"]), meaning]
        for name, meaning, values in kinds
    ]
    return (
        "<p>AP with other IoUs of tracks. Loose outlines of large objects hardly lower the IoU of "
        "masks. Near means 2 % of the diagonal of the frame.</p>\n"
    ) + table(["", *BOUNDARY_COLUMNS, "", "compared by"], rows, "explained")


def class_section(per_class: dict[str, float]) -> str:
    """AP of each class with objects, best first."""
    defined = {name: value for name, value in per_class.items() if value >= 0}
    names = sorted(defined, key=lambda name: -defined[name])
    notes = []
    if len(names) > LISTED_CLASSES:
        notes.append(f"{LISTED_CLASSES} of {len(names)} classes: the best and the worst half.")
        names = names[: LISTED_CLASSES // 2] + names[-LISTED_CLASSES // 2 :]
    absent = len(per_class) - len(defined)
    if absent:
        notes.append(f"{absent} of {len(per_class)} classes have no objects, and so no AP.")
    note = f'<p class="soft">{" ".join(notes)}</p>\n' if notes else ""
    rows = [[text(name), percent(defined[name]), bar(defined[name])] for name in names]
    return table(["class", "AP", ""], rows) + note


def group_section(scored: dict) -> str:
    """AP and AR by occlusion level, or by longest gap and track length."""
    html = (
        "<p>An unmatched prediction may be an error in several groups, so AP is lower where "
        "objects are few: compare models, not groups. AR ignores false predictions.</p>\n"
    )
    for name, part in scored.items():
        html += part_title(name, scored)
        for grouping, scores in part.metrics["groups"].items():
            rows = [
                [
                    group,
                    value["tracks"],
                    percent(value["AP"]),
                    bar(value["AP"]),
                    percent(value["AR"]),
                ]
                for group, value in scores.items()
            ]
            html += f"<h3>{GROUP_TEXTS[grouping]}</h3>\n"
            html += table(["group", "objects", "AP", "", "AR"], rows)
    return html


def identity_section(metrics: dict) -> str:
    """HOTA, MOTA, IDF1 and their parts over all detections."""
    tracking = metrics["tracking"]
    values = tracking["over_detections"]
    rows = [
        [key, values[key] if isinstance(values[key], int) else number(values[key]), meaning]
        for key, meaning in IDENTITY_TEXTS.items()
    ]
    return (
        f"<p>Predictions that score at least {tracking['score_threshold']:g} are compared frame by "
        "frame as the output of a tracker, the counts of all classes together.</p>\n"
    ) + table(["", "value", ""], rows, "explained")


def cause_section(metrics: dict) -> str:
    """Gains by cause as bars, the largest first, with definitions."""
    if metrics["AP"] < 0:
        return NOTHING
    gains = metrics["causes"]
    largest = max(entry["AP"] for entry in gains.values()) or 1.0
    rows = [
        [name, gain(gains[name]["AP"]), bar(gains[name]["AP"] / largest)]
        + [gain(gains[name]["AP50"]), CAUSE_TEXTS[name]]
        for name in sorted(gains, key=lambda name: -gains[name]["AP"])
    ]
    return (
        "<p>AP that would be gained if this cause alone were fixed. Each false prediction has one "
        "cause at each IoU threshold t. Its object is the ground truth track with the highest IoU. "
        "The gains do not add up to what is missing. The longest bar is the largest gain.</p>\n"
    ) + table(["cause", "AP", "", "AP50", "a false prediction"], rows, "explained")


def oracle_section(metrics: dict) -> str:
    """AP with the same masks, linked or ordered better."""
    if metrics["AP"] < 0:
        return NOTHING
    rows = [["as predicted", percent(metrics["AP"]), "", bar(metrics["AP"]), "these results"]]
    for key, (name, meaning) in ORACLES.items():
        ap = metrics["oracle"][key]["AP"]
        rows.append([name, percent(ap), gain(ap - metrics["AP"]), bar(ap), meaning])
    return (
        "<p>AP that the same masks of frames could have, knowing the ground truth. What the best "
        "linking gains is what the tracker loses.</p>\n"
    ) + table(["", "AP", "gain", "", ""], rows, "explained")


def comparison_section(comparison: dict) -> str:
    """Differences to other results with intervals, and what gained or lost most."""
    titles = ["", "this", "other", "difference", "interval"]
    html = (
        f"<p>These results and the other ones, "
        f"{text(PurePath(comparison['other']).name)} of "
        f"{text(PurePath(comparison['other']).parent.name)}: differences with 95 % intervals over "
        f"{comparison['resamples']} paired resamples of the videos.</p>\n"
    )
    html += table(titles, difference_rows(comparison["metrics"].items()))
    html += "<h3>Gained if fixed</h3>\n"
    html += table(titles[:4], difference_rows(comparison["causes"].items()))
    videos = [(entry["video_id"], entry) for entry in comparison["videos"]]
    classes = sorted(comparison["per_class"].items(), key=lambda item: -item[1]["difference"])
    for what, entries in (("Classes", classes), ("Videos", videos)):
        gained = [item for item in entries if item[1]["difference"] > 0][:LISTED_CHANGES]
        lost = [item for item in entries if item[1]["difference"] < 0][-LISTED_CHANGES:]
        if gained or lost:
            html += f"<h3>{what} that gained or lost most</h3>\n"
            html += table(
                titles if what == "Classes" else titles[:4], difference_rows(gained + lost)
            )
    return html


def difference_rows(entries) -> list[list[str]]:
    rows = []
    for name, entry in entries:
        row = [text(name), percent(entry["this"]), percent(entry["other"])]
        row.append(gain(entry["difference"]))
        if "low" in entry:
            row.append(span(entry["low"], entry["high"], gain))
        rows.append(row)
    return rows
