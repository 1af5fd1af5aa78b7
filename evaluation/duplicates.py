"""Leaves out tracks of an object that a better track follows already.

    result = drop_duplicates(result)               # of a whole video
    indices = distinct_in_frame(tracks, indices)   # of a live frame

Several queries may track the same object. The official evaluation keeps them all, and so does
evaluate.py, but an overlay would show the object several times. From the best score to the lowest,
a track is dropped if, for any kept track, regardless of class,

    the IoU is above SAME_IOU, or
    the IoU is above SIMILAR_IOU, and the score is less than SCORE_RATIO times that of the kept one.

Two similar tracks with similar scores are both kept, since the worse may have the better mask.
docs/evaluation.md states how many duplicates remain, and what the rule does to AP.

Letters: I instances, H, W.
"""

from dataclasses import replace

import numpy as np

from evaluation.overlaps import divide, measure_video
from evaluation.postprocess import EncodedVideo, FrameTracks

SAME_IOU = 0.9
SIMILAR_IOU = 0.75
SCORE_RATIO = 0.75


def drop_duplicates(result: EncodedVideo) -> EncodedVideo:
    """The instances of a video without duplicates, by the IoUs of whole tracks."""
    codes = result.segmentations
    if not codes:
        return result
    video = {"id": None, "length": len(codes[0])}
    overlaps = measure_video(codes, codes, video, rles_of=lambda codes, video: codes)
    kept = distinct(result.scores.tolist(), overlaps.track_ious)
    return replace(
        result,
        scores=result.scores[kept],
        labels=result.labels[kept],
        track_ids=result.track_ids[kept],
        segmentations=[codes[index] for index in kept],
        gates=result.gates[kept],
    )


def distinct_in_frame(tracks: FrameTracks, indices: list[int]) -> list[int]:
    """The indices, best first, without those of duplicates, by the IoUs of this frame's masks."""
    # In NumPy, since autocast would cast the product of two tensors to 16 bits.
    masks = tracks.masks[indices].flatten(1).cpu().numpy().astype(np.float32)  # (I, H * W)
    intersections = masks @ masks.T
    areas = intersections.diagonal()
    ious = divide(intersections, areas, areas)
    return [indices[kept] for kept in distinct(tracks.scores[indices].tolist(), ious)]


def distinct(scores: list[float], ious: np.ndarray) -> list[int]:
    """Indices of the tracks that are no duplicates.

    scores: I, in descending order. ious: (I, I).
    """
    kept = []
    for track, score in enumerate(scores):
        max_iou = [
            SIMILAR_IOU if score < SCORE_RATIO * scores[better] else SAME_IOU for better in kept
        ]
        if (ious[track, kept] <= max_iou).all():
            kept.append(track)
    return kept
