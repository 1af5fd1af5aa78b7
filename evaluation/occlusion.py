"""AP and AR of objects by how much they are occluded.

OVIS annotates an occlusion level in every frame. Its evaluator reports AP and AR of the objects
with light, medium and heavy occlusion besides the twelve numbers of YouTube-VIS: the 18 numbers of
`ovis_metrics`. Source: oviseval.py of qjy981010/cocoapi@886baff; a golden test compares them.

Objects without levels are grouped by their longest gap, and by their length in frames.

    groupings = choose_groupings(ground_truth["annotations"])
    precision, recall, _ = accumulate_videos(videos, categories, [AREA, *groupings.values()])
    groups = group_scores(precision, recall, groupings, videos)
    groups["gap"]["1-3"]                                 # {"AP": 0.4, "AR": 0.5, "tracks": 12}

Predictions have neither levels nor gaps, so an unmatched one is an error in every group. Groups
with few objects therefore have a lower AP: compare models, not groups. AR ignores false positives
and is comparable across groups.

Letters: L frames, N tracks; those of `accumulate_videos` are declared in metric.py.
"""

import math

import numpy as np

from evaluation.metric import AREA_RANGES, Grouping, mean_defined, percent
from evaluation.overlaps import VideoOverlaps

LEVELS = {"no_occlusion": 0.0, "slight_occlusion": 0.25, "severe_occlusion": 0.75}


def occlusion_score(levels: list[str | None]) -> float:
    """The mean of the higher half (rounded up) of an object's levels; None is an absent object.

    NaN, which is in no group, without levels.
    """
    scores = sorted(LEVELS[level] for level in levels if level is not None)
    higher_half = scores[-math.ceil(len(scores) / 2) :]
    return sum(higher_half) / len(higher_half) if scores else math.nan


def longest_gap(areas: np.ndarray) -> int:
    """The most frames in a row without a mask between two frames with one. areas: (L,) pixels."""
    return int((np.diff(np.flatnonzero(areas)) - 1).max(initial=0))


def track_lengths(areas: np.ndarray) -> np.ndarray:
    """The number of frames with a mask of each track, (N,). areas: (L, N) pixels."""
    return np.count_nonzero(areas, axis=0)


OCCLUSION = Grouping(
    {"light": (0, 0.25), "medium": (0.25, 0.5), "heavy": (0.5, 1)},
    actual=lambda tracks: [occlusion_score(entry["occlusion"]) for entry in tracks.annotations],
)
GAP = Grouping(  # frames
    {"0": (0, 0), "1-3": (1, 3), "4-6": (4, 6), "7-10": (7, 10), "11+": (11, math.inf)},
    actual=lambda tracks: [longest_gap(areas) for areas in tracks.actual_areas.T],
)
# Frames. Predictions have lengths, so an unmatched one is an error in its own group, as with areas.
LENGTH = Grouping(
    {"1-10": (1, 10), "11-20": (11, 20), "21-40": (21, 40), "41+": (41, math.inf)},
    actual=lambda tracks: track_lengths(tracks.actual_areas),
    predicted=lambda tracks: track_lengths(tracks.predicted_areas),
)


def choose_groupings(annotations: list[dict]) -> dict[str, Grouping]:
    """By "occlusion" if every annotation has levels as in OVIS, otherwise by "gap" and "length"."""
    if annotations and all(map(has_levels, annotations)):
        return {"occlusion": OCCLUSION}
    return {"gap": GAP, "length": LENGTH}


def has_levels(annotation: dict) -> bool:
    """Whether an annotation has a list of LEVELS and None."""
    levels = annotation.get("occlusion")
    return isinstance(levels, list) and all(
        level is None or isinstance(level, str) and level in LEVELS for level in levels
    )


def group_scores(
    precision: np.ndarray,
    recall: np.ndarray,
    groupings: dict[str, Grouping],
    videos: list[VideoOverlaps],
) -> dict[str, dict[str, dict[str, float]]]:
    """AP and AR (of 100 predictions) of every group, and its number of ground truth tracks.

    precision, recall: the output of `accumulate_videos` for AREA, followed by the groupings.
    """
    scores = {}
    a = len(AREA_RANGES)
    for grouping_name, grouping in groupings.items():
        scores[grouping_name] = {}
        for name, tracks in group_sizes(videos, grouping).items():
            ap, ar = mean_defined(precision[:, :, :, a, -1]), mean_defined(recall[:, :, a, -1])
            scores[grouping_name][name] = {"AP": ap, "AR": ar, "tracks": tracks}
            a += 1
    return scores


def group_sizes(videos: list[VideoOverlaps], grouping: Grouping) -> dict[str, int]:
    """The number of ground truth tracks in every group, without crowds."""
    sizes = np.zeros(len(grouping.ranges), dtype=int)
    for video in videos:
        _, outside = grouping.outside(video)
        sizes += np.count_nonzero(~outside & ~video.crowd, axis=1)
    return dict(zip(grouping.ranges, sizes.tolist()))


def ovis_metrics(metrics: dict, occlusion: dict[str, dict[str, float]]) -> dict[str, float]:
    """The 18 numbers of OVIS's evaluator, in its order.

    metrics: the twelve of `metric.summarize`. occlusion: that item of `group_scores`.
    """
    ap_names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    ar_names = ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    return (
        {name: metrics[name] for name in ap_names}
        | {f"AP_{name}": scores["AP"] for name, scores in occlusion.items()}
        | {name: metrics[name] for name in ar_names}
        | {f"AR_{name}": scores["AR"] for name, scores in occlusion.items()}
    )


def format_groups(groups: dict[str, dict[str, dict[str, float]]]) -> str:
    """The output of `group_scores` for printing: a line per grouping, in percent."""
    titles = {"occlusion": "occlusion", "gap": "longest gap", "length": "length in frames"}
    lines = []
    for grouping, scores in groups.items():
        cells = [f"{name} {percent(group['AP'])}" for name, group in scores.items()]
        lines.append(f"AP by {titles[grouping]}: {'   '.join(cells)}")
    return "\n".join(lines)
