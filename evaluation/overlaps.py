"""The pixels that predictions and ground truth share in every frame, computed once per video.

    for overlaps in video_overlaps(results, ground_truth):   # the output of check_results
        overlaps.ious()                                      # of whole tracks

The metric (metric.py), the causes of lost AP (causes.py) and the best linking (linking.py) all
follow from these numbers, without looking at masks again.

Letters: D predictions and G ground truth tracks of one video, P different predicted tracks, L
frames.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco_mask

from reading.ids import id_order
from reading.masks import to_rle


@dataclass
class VideoOverlaps:
    """Predictions and ground truth of one video, and the pixels they share in every frame.

    Predictions with the same masks, such as one query with several labels, have one track.
    """

    video: dict
    predictions: list[dict]  # D
    annotations: list[dict]  # G, each with the key "ignored", see `metric.accumulate`
    track_of: np.ndarray  # (D,) int: the track of each prediction
    predicted_areas: np.ndarray  # (P, L) float64, pixels
    actual_areas: np.ndarray  # (G, L) float64
    intersections: np.ndarray  # (P, L, G) float64

    @property
    def counts(self) -> np.ndarray:
        """The ground truth tracks that count, which are no crowds and not ignored: (G,) bool."""
        entries = self.annotations
        return np.array([not (entry.get("iscrowd") or entry["ignored"]) for entry in entries], bool)

    def track_ious(self) -> np.ndarray:
        """IoU of every predicted with every actual track: (P, G) float64, 0 for two empty tracks.

        Intersection and union are summed over frames.
        """
        intersection = self.intersections.sum(axis=1)
        areas = self.predicted_areas.sum(axis=1)[:, None] + self.actual_areas.sum(axis=1)
        return divide(intersection, areas - intersection)

    def ious(self) -> np.ndarray:
        """IoU of every prediction with every actual track: (D, G) float64."""
        return self.track_ious()[self.track_of]


def divide(intersection: np.ndarray, union: np.ndarray) -> np.ndarray:
    """intersection / union, 0 where the union is empty."""
    return np.divide(intersection, union, out=np.zeros(np.shape(union)), where=union > 0)


def video_overlaps(results, ground_truth, ignored=None) -> Iterator[VideoOverlaps]:
    """The overlaps of every video of the ground truth, in ascending order of video id.

    Equal scores keep this order when they are ranked. Arguments as for `metric.accumulate`.
    """
    annotations = ground_truth["annotations"]
    if ignored is None:
        ignored = [False] * len(annotations)
    annotations = [
        annotation | {"ignored": bool(flag)}
        for annotation, flag in zip(annotations, ignored, strict=True)
    ]
    predicted, actual = group_by(results, "video_id"), group_by(annotations, "video_id")
    videos = {video["id"]: video for video in ground_truth["videos"]}
    for video_id in sorted(videos, key=id_order):
        yield frame_overlaps(predicted[video_id], actual[video_id], videos[video_id])


def group_by(entries: list[dict], key: str) -> dict:
    """{value of the key: entries}, a defaultdict."""
    groups = defaultdict(list)
    for entry in entries:
        groups[entry[key]].append(entry)
    return groups


def frame_overlaps(predictions: list[dict], annotations: list[dict], video: dict) -> VideoOverlaps:
    """The overlaps of one video; its entries have one RLE or None per frame."""
    predicted, track_of = different_tracks([track_rles(entry, video) for entry in predictions])
    actual = [track_rles(entry, video) for entry in annotations]
    predicted_areas = track_areas(predicted, video["length"])
    actual_areas = track_areas(actual, video["length"])
    intersections = np.zeros((len(predicted), video["length"], len(actual)))
    both_visible = predicted_areas.any(axis=0) & actual_areas.any(axis=0)
    for frame in np.flatnonzero(both_visible):
        predicted_masks = [track[frame] for track in predicted]
        actual_masks = [track[frame] for track in actual]
        # With iscrowd set, pycocotools returns intersection / area of the predicted mask.
        # Multiplied by that area and rounded, it is the exact intersection in pixels.
        covered = coco_mask.iou(predicted_masks, actual_masks, [True] * len(actual_masks))
        intersections[:, frame] = np.rint(covered * predicted_areas[:, frame, None])
    return VideoOverlaps(
        video, predictions, annotations, track_of, predicted_areas, actual_areas, intersections
    )


def different_tracks(tracks: list[list[dict]]) -> tuple[list[list[dict]], np.ndarray]:
    """The P different ones of D tracks of RLEs, and the number of each of the D among them."""
    numbers = {}
    codes = [tuple(rle["counts"] for rle in track) for track in tracks]
    track_of = [numbers.setdefault(code, len(numbers)) for code in codes]
    firsts = [track_of.index(number) for number in range(len(numbers))]
    return [tracks[first] for first in firsts], np.array(track_of, dtype=int)


def track_rles(entry: dict, video: dict) -> list[dict]:
    """Masks of a prediction or annotation as L compressed RLE dicts; None becomes an empty mask."""
    height, width = video["height"], video["width"]
    background = {"size": [height, width], "counts": [height * width]}
    empty = coco_mask.frPyObjects(background, height, width)
    return [
        to_rle(segmentation, height, width, "a mask", checked=True) or empty
        for segmentation in entry["segmentations"]
    ]


def track_areas(tracks: list[list[dict]], length: int) -> np.ndarray:
    """Exact areas in pixels of N tracks of `length` RLEs: (N, L) float64."""
    areas = [coco_mask.area(rles) for rles in tracks]
    return np.array(areas, dtype=np.float64).reshape(-1, length)
