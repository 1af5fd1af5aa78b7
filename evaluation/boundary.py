"""AP by the boundaries of masks: loose outlines of large objects hardly lower the IoU of masks.

The boundary of a mask is the set of its pixels within d pixels of its outline, where d is 2 % of
the diagonal of the frame. Boundary IoU (Cheng et al., Boundary IoU: Improving Object-Centric Image
Segmentation Evaluation, 2021) is the IoU of two boundaries. For tracks, intersections and unions
are summed over the frames before they are divided, as YouTube-VIS does with masks. Two numbers
result:

    "boundary_iou"    AP with boundary IoU in place of mask IoU
    "min_iou"         AP with min(mask IoU, boundary IoU), the Boundary AP of the paper: boundary
                      IoU alone ignores what is inside of two equal outlines

All else, sizes included, is the protocol of metric.py. As in the published code
(bowenc0221/boundary-iou-api), crowds are matched by masks. For images (videos of one frame) without
crowds, "min_iou" is the Boundary AP of that code.

    boundary = evaluate_boundary(results, ground_truth, videos)
    boundary["min_iou"]["AP"]

Letters: H, W of a frame, D predictions and G ground truth tracks of a video.
"""

from dataclasses import replace

import numpy as np
from pycocotools import mask as coco_mask

from evaluation.metric import AREA, accumulate_videos, category_ids, percent, summarize
from evaluation.overlaps import VideoOverlaps, measure_overlaps, track_rles

DILATION_RATIO = 0.02  # of the diagonal


def evaluate_boundary(
    results: list[dict], ground_truth: dict, videos: list[VideoOverlaps]
) -> dict[str, dict]:
    """The metrics of `metric.summarize` for both kinds of IoU.

    results, ground_truth: as returned by metric.check_results; videos: their overlaps.
    """
    boundaries = measure_overlaps(results, ground_truth, boundary_rles)
    metrics = {}
    for name, combine in (("boundary_iou", use_boundary), ("min_iou", np.minimum)):
        combined = [
            with_boundary(video, boundary, combine) for video, boundary in zip(videos, boundaries)
        ]
        precision, recall, _ = accumulate_videos(combined, category_ids(ground_truth), [AREA])
        metrics[name] = summarize(precision, recall, ground_truth)
    return metrics


def use_boundary(mask_ious: np.ndarray, boundary_ious: np.ndarray) -> np.ndarray:
    """Boundary IoU alone."""
    return boundary_ious


def with_boundary(video: VideoOverlaps, boundary: VideoOverlaps, combine) -> VideoOverlaps:
    """The overlaps of masks with the IoUs of tracks replaced, except those with crowds.

    combine: (mask IoUs, boundary IoUs) -> IoUs, (D, G) each.
    """
    combined = combine(video.track_ious, boundary.track_ious)
    return replace(video, track_ious=np.where(video.crowd, video.track_ious, combined))


def boundary_rles(entry: dict, video: dict) -> list[dict]:
    """The boundaries of a prediction or annotation in all frames, as compressed RLE dicts."""
    thickness = boundary_thickness(video["height"], video["width"])
    return [boundary_rle(rle, thickness) for rle in track_rles(entry, video)]


def boundary_thickness(height: int, width: int) -> int:
    """The thickness d of boundaries in frames of this size: pixels, at least 1."""
    return max(1, round(DILATION_RATIO * float(np.sqrt(height**2 + width**2))))


def boundary_rle(rle: dict, thickness: int) -> dict:
    """The boundary of a compressed RLE, as compressed RLE."""
    left, top, width, height = coco_mask.toBbox(rle).astype(int)
    if not width:
        return rle
    mask = coco_mask.decode(rle)  # (H, W) uint8, column-major
    box = mask[top : top + height, left : left + width]
    box -= erode(box, thickness)  # nothing outside of the box is foreground
    return coco_mask.encode(mask)


def erode(mask: np.ndarray, times: int) -> np.ndarray:
    """Erode a uint8 mask (H, W) of 0 and 1 that often with a square of 3 x 3 pixels.

    Pixels outside count as 0. A pixel remains if the square of (2 * times + 1) ** 2 pixels around
    it is all 1. Rows and columns are taken in turn; the minimum over a window of n pixels and the
    same moved by up to n pixels give that over a window of up to 2 n.
    """
    mask = np.pad(mask, times)
    for _ in range(2):
        window = 1
        while window < 2 * times + 1:
            step = min(window, 2 * times + 1 - window)
            mask = mask[:-step] & mask[step:]
            window += step
        mask = mask.T
    return mask


def format_boundary(boundary: dict[str, dict]) -> str:
    """The output of `evaluate_boundary` for printing: a line, in percent."""
    numbers = {name: boundary["min_iou"][name] for name in ("AP", "AP50", "AP75")}
    numbers["AP by boundary IoU alone"] = boundary["boundary_iou"]["AP"]
    cells = [f"{name} {percent(value)}" for name, value in numbers.items()]
    return f"boundaries: {'   '.join(cells)}"
