"""The worst and the median videos of a report: an animation and a table of tracks each.

sections = video_sections(parts, scored, sources, room)    # {title: html}
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np

from evaluation.comparison import resampled_metrics, video_ids
from evaluation.metric import IOU_THRESHOLDS
from reading.annotations import AnnotationFile
from reading.ids import Id
from viewing.animations import (
    FRAMES,
    PICTURE_THRESHOLD,
    SHOWN_SCORE,
    ShownTrack,
    ShownVideo,
    animate,
    gate_picture,
    label_colour,
    object_name,
    track_colour,
)
from viewing.charts import UNDEFINED, percent, table, text

LISTED = 10  # worst videos, and median ones


@dataclass
class Sources:
    """What pictures are drawn from, by video id; both may lack videos."""

    files: Mapping[Id, list[Path]] = field(default_factory=dict)  # frames
    gates: Mapping[Id, np.ndarray] = field(default_factory=dict)  # (D, L, layers) bool


@dataclass
class RatedVideo:
    """A video with objects, and its AP."""

    part: str  # its part of the ground truth
    video: dict  # its entry in the annotation file
    ap: float


def rate_videos(parts: dict[str, AnnotationFile], scored: dict) -> list[RatedVideo]:
    """The videos with objects, worst first. The AP is that of a ground truth of one video."""
    rated = []
    for name, part in parts.items():
        ids = video_ids(part.content)
        alone = resampled_metrics(scored[name].matched, part.content, np.eye(len(ids), dtype=int))
        videos = {video["id"]: video for video in part.content["videos"]}
        rated += [RatedVideo(name, videos[id_], ap) for id_, ap in zip(ids, alone["AP"].tolist())]
    return sorted((video for video in rated if not np.isnan(video.ap)), key=lambda video: video.ap)


def choose_videos(rated: list[RatedVideo]) -> tuple[list[RatedVideo], list[RatedVideo]]:
    """The LISTED worst videos, and those around the median of all that are not among them."""
    begin = max(LISTED, (len(rated) - LISTED) // 2)
    return rated[:LISTED], rated[begin : begin + LISTED]


def video_sections(
    parts: dict[str, AnnotationFile], scored: dict, sources: Sources, room: int
) -> dict[str, str]:
    """{title: html} of the worst and the median videos. room: bytes for all of them."""
    chosen = choose_videos(rate_videos(parts, scored))
    share = room // (2 * LISTED)
    introduction = (
        f"<p>Left: ground truth, A, B, ... Right: the predictions that score at least "
        f"{SHOWN_SCORE:g} (at least one), 1, 2, ..., in the colour of the object that they overlap "
        f"most, or grey. Labels name errors at IoU {IOU_THRESHOLDS[PICTURE_THRESHOLD]:.2f}. "
        f"At most {FRAMES} frames of a video are shown. {describe_sources(sources)}</p>\n"
    )
    sections = {}
    for title, videos in zip(("Worst videos", "Median videos"), chosen):
        cards = [
            video_card(video, scored[video.part], class_names(parts[video.part]), sources, share)
            for video in videos
        ]
        if cards:
            sections[title] = f'{introduction}<div class="videos">\n{"".join(cards)}</div>\n'
        else:
            sections[title] = "<p>All videos with objects are shown above.</p>\n"
        introduction = "<p>Around the median AP of all videos; drawn as above.</p>\n"
    return sections


def describe_sources(sources: Sources) -> str:
    """What is missing in the pictures, and what the strips of gates show."""
    frames = "" if sources.files else "Frames are not available, so the background is plain. "
    if sources.gates:
        return frames + (
            "Strips show time from left to right: where the track is visible, and below it a line "
            "per decoder layer, dark where its gate is open and pale where it is closed."
        )
    return (
        frames + "Gates are known after running a model with gates only, not from a results file."
    )


def class_names(part: AnnotationFile) -> dict[Id, str]:
    """{category id: name}."""
    return {category["id"]: category["name"] for category in part.content["categories"]}


def video_card(
    rated: RatedVideo, part, names: dict[Id, str], sources: Sources, max_bytes: int
) -> str:
    """A video as html. part: scoring.ScoredPart. max_bytes: of all of it."""
    video = rated.video
    shown = ShownVideo.choose(part.overlaps[video["id"]], part.explained[video["id"]])
    gates = sources.gates.get(video["id"])
    rows = [track_row(track, shown.overlaps, names, gates) for track in shown.tracks]
    titles = ["", "class", "score", "object", "IoU", "at 0.5", "at 0.75"]
    tables = table(titles + (["gates"] if gates is not None else []), rows) if rows else ""
    if not rows:
        tables = "<p>There are no predictions.</p>\n"
    objects = ", ".join(object_label(shown, index, names) for index in shown.objects)
    name = f"{text(describe_video(video))}: AP {percent(rated.ap)}"
    top = f"<figure>\n<figcaption><strong>{name}</strong><br>{objects}</figcaption>\n"
    bottom = f"{tables}</figure>\n"
    used = len((top + bottom).encode()) + 300
    uri = animate(shown, video, sources.files.get(video["id"], []), max_bytes - used)
    if uri is None:
        return f"{top}<p>The animation is too large for this file.</p>\n{bottom}"
    alt = "animation of ground truth and predictions"
    return f'{top}<img src="{uri}" alt="{alt}">\n{bottom}'


def describe_video(video: dict) -> str:
    """The id of a video, and the folder of its frames if that has another name."""
    files = video.get("file_names") or [""]
    folder = Path(str(files[0])).parent.name
    return f"{video['id']}" if folder in ("", str(video["id"])) else f"{video['id']} ({folder})"


def key(name: str, colour: tuple[int, int, int]) -> str:
    """The name of a track on its colour."""
    return f'<span class="key" style="background:rgb{colour}">{name}</span>'


def object_label(shown: ShownVideo, index: int, names: dict[Id, str]) -> str:
    """A ground truth track: its letter and class, and whether it is missed or a crowd."""
    entry = shown.overlaps.annotations[index]
    note = " (crowd)" if entry.get("iscrowd") else " (missed)" if index in shown.missed else ""
    label = key(object_name(index), label_colour(index))
    return f"{label} {text(names[entry['category_id']])}{note}"


def track_row(track: ShownTrack, overlaps, names: dict[Id, str], gates) -> list[str]:
    """The table row of a prediction."""
    entry = overlaps.predictions[track.index]
    row = [
        key(track.name, track_colour(track)),
        text(names[entry["category_id"]]),
        f"{entry['score']:.2f}",
        UNDEFINED if track.object is None else object_name(track.object),
        percent(track.iou),
        escape(track.outcomes[0]),
        escape(track.outcomes[PICTURE_THRESHOLD]),
    ]
    if gates is not None:
        visible = overlaps.predicted_areas[:, track.index] > 0
        layers = gates.shape[2]
        uri = gate_picture(track, visible, gates[track.index])
        height = 3 * (3 + 3 * layers)
        row.append(f'<img class="gates" style="height:{height}px" src="{uri}" alt="gates">')
    return row
