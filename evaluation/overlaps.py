"""Areas and intersections of the masks of a video, which all metrics are computed from.

    videos = measure_overlaps(results, ground_truth)   # both checked, see metric.check_results
    videos[0].track_ious                               # (D, G), of whole tracks: AP
    videos[0].frame_ious()                             # (L, D, G), of single masks: HOTA, IDF1

Masks stay run-length encoded. All pairs of a video are measured at once, of different classes too:
that takes no longer than class by class, because pycocotools decodes each code once per call.
Memory: 4 bytes per frame and pair of tracks.

Letters: L frames, D predictions and G ground truth tracks of one video.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from pycocotools import mask as coco_mask

from reading.ids import Id, id_order
from reading.masks import to_rle


@dataclass(frozen=True)
class VideoOverlaps:
    """The predictions and annotations of one video, in the order of their files."""

    video_id: Id
    predictions: list[dict]  # D entries of results.json
    annotations: list[dict]  # G entries of the annotation file
    predicted_areas: np.ndarray  # (L, D) pixels, int64
    actual_areas: np.ndarray  # (L, G) pixels, int64
    intersections: np.ndarray  # (L, D, G) pixels, int32
    track_ious: np.ndarray  # (D, G) float64: intersection over union, each summed over frames

    @property
    def scores(self) -> np.ndarray:
        """The scores of the predictions, (D,) float64."""
        return np.array([prediction["score"] for prediction in self.predictions], np.float64)

    @property
    def crowd(self) -> np.ndarray:
        """Whether annotations are crowds, (G,) bool."""
        return np.array([bool(entry.get("iscrowd")) for entry in self.annotations], bool)

    def frame_ious(self) -> np.ndarray:
        """IoU of the masks of every frame, (L, D, G) float64; 0 for two empty masks."""
        return divide(self.intersections, self.predicted_areas, self.actual_areas)

    def select(self, predicted: np.ndarray, actual: np.ndarray) -> "VideoOverlaps":
        """The tracks with these indices, in this order."""
        return replace(
            self,
            predictions=[self.predictions[d] for d in predicted],
            annotations=[self.annotations[g] for g in actual],
            predicted_areas=self.predicted_areas[:, predicted],
            actual_areas=self.actual_areas[:, actual],
            intersections=self.intersections[:, predicted[:, None], actual],
            track_ious=self.track_ious[predicted[:, None], actual],
        )

    def with_tracks(
        self, predictions: list[dict], areas: np.ndarray, intersections: np.ndarray
    ) -> "VideoOverlaps":
        """Other predictions of the same video: their entries, areas (L, D), and (L, D, G)."""
        sums = (pixels.sum(axis=0) for pixels in (intersections, areas, self.actual_areas))
        return replace(
            self,
            predictions=predictions,
            predicted_areas=areas,
            intersections=intersections,
            track_ious=divide(*sums),
        )

    def by_category(self) -> dict[Id, "VideoOverlaps"]:
        """The tracks of each category that has any."""
        predicted = indices_by_category(self.predictions)
        actual = indices_by_category(self.annotations)
        categories = dict.fromkeys([*predicted, *actual])
        return {
            category: self.select(predicted[category], actual[category]) for category in categories
        }


def indices_by_category(entries: list[dict]) -> dict[Id, np.ndarray]:
    """{category id: indices of its entries}, empty for all other ids."""
    indices = defaultdict(list)
    for index, entry in enumerate(entries):
        indices[entry["category_id"]].append(index)
    arrays = {category: np.array(chosen) for category, chosen in indices.items()}
    return defaultdict(lambda: np.empty(0, dtype=np.int64), arrays)


def track_rles(entry: dict, video: dict) -> list[dict]:
    """Masks of a prediction or annotation as L compressed RLE dicts; None becomes an empty mask."""
    height, width = video["height"], video["width"]
    background = {"size": [height, width], "counts": [height * width]}
    empty = coco_mask.frPyObjects(background, height, width)
    return [
        to_rle(segmentation, height, width, "a mask", checked=True) or empty
        for segmentation in entry["segmentations"]
    ]


def measure_overlaps(
    results: list[dict],
    ground_truth: dict,
    rles_of: Callable[[dict, dict], list[dict]] = track_rles,
) -> list[VideoOverlaps]:
    """The overlaps in every video that has predictions or annotations, in ascending order of id.

    Args:
        results, ground_truth: as returned by metric.check_results.
        rles_of: (entry, video) -> L RLE dicts; boundary.py passes the boundaries of the masks.
    """
    predictions, annotations = group_by_video(results), group_by_video(ground_truth["annotations"])
    return [
        measure_video(predictions[video["id"]], annotations[video["id"]], video, rles_of)
        for video in sorted(ground_truth["videos"], key=lambda video: id_order(video["id"]))
        if video["id"] in predictions or video["id"] in annotations
    ]


def group_by_video(entries: list[dict]) -> dict[Id, list[dict]]:
    """{video id: entries}, a defaultdict."""
    groups = defaultdict(list)
    for entry in entries:
        groups[entry["video_id"]].append(entry)
    return groups


def measure_video(
    predictions: list[dict], annotations: list[dict], video: dict, rles_of=track_rles
) -> VideoOverlaps:
    """The overlaps of all predictions with all annotations of a video."""
    length = video["length"]
    predicted = [rles_of(prediction, video) for prediction in predictions]
    actual = [rles_of(annotation, video) for annotation in annotations]
    predicted_areas = track_areas(predicted, length)
    actual_areas = track_areas(actual, length)
    intersections = np.zeros((length, len(predicted), len(actual)), dtype=np.int32)
    both_visible = predicted_areas.any(axis=1) & actual_areas.any(axis=1)
    for frame in np.flatnonzero(both_visible):
        predicted_masks = [track[frame] for track in predicted]
        actual_masks = [track[frame] for track in actual]
        # With iscrowd set, pycocotools returns intersection / area of the predicted mask.
        # Multiplied by that area and rounded, it is the exact intersection in pixels.
        covered = coco_mask.iou(predicted_masks, actual_masks, [True] * len(actual_masks))
        intersections[frame] = np.rint(covered * predicted_areas[frame, :, None])
    track_ious = divide(
        intersections.sum(axis=0), predicted_areas.sum(axis=0), actual_areas.sum(axis=0)
    )
    return VideoOverlaps(
        video["id"],
        predictions,
        annotations,
        predicted_areas,
        actual_areas,
        intersections,
        track_ious,
    )


def track_areas(tracks: list[list[dict]], length: int) -> np.ndarray:
    """Exact areas in pixels of N tracks of `length` RLEs: (L, N) int64."""
    areas = [coco_mask.area(rles) for rles in tracks]
    return np.array(areas, dtype=np.int64).reshape(-1, length).T


def divide(
    intersections: np.ndarray, predicted_areas: np.ndarray, actual_areas: np.ndarray
) -> np.ndarray:
    """Intersection over union, 0 where both are empty: (..., D, G), (..., D), (..., G) pixels."""
    union = predicted_areas[..., :, None] + actual_areas[..., None, :] - intersections
    return np.divide(intersections, union, out=np.zeros(union.shape), where=union > 0)
