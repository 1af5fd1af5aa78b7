"""How much AP a better linking of the same masks would give.

`link_video` links the predicted masks of every frame anew, knowing the ground truth, as an oracle:

1. Each ground truth track that counts (no crowd) gets at most one predicted mask per frame, from
   any track and class, so that its IoU is as high as possible: `best_links`, which is exact.
2. Two objects may want the same mask of a frame. Each mask then goes to at most one of them, by
   `linear_sum_assignment` of what each would gain: `exclusive_links`. This is a heuristic where
   objects compete, which is rare: two disjoint objects cannot both overlap a mask by more than 0.5.
3. A linked track has the classes of the tracks that its masks come from. The score of a class is
   the mean, over the frames with a mask, of the score that the mask's track has for it, or 0. A
   track that is linked as it was keeps its classes and scores.
4. The masks that no object gets stay together, with the classes of their track and its scores times
   the share of its masks that is left. A track without any mask is kept.

The AP of the result minus the AP of the tracker is what is lost by linking alone, with the same
masks, classes and scores. It is a heuristic, not a bound: masks are chosen for IoU, not for AP.

There is a bound as well: the AP if the tracks of step 1 had the classes of their objects and
nothing else was predicted. It is the recall of the best IoUs. No linking of these masks has a
higher AP, whatever its classes and scores, and even if a mask is in several tracks.

Letters: D predictions and G ground truth tracks of one video, P different predicted tracks, L
frames, K categories, T thresholds.
"""

from dataclasses import dataclass

import numpy as np

from evaluation.metric import (
    ALL,
    IOU_THRESHOLDS,
    MAX_PREDICTIONS,
    average_precision,
    match_video,
    rank_predictions,
)
from evaluation.overlaps import VideoOverlaps
from evaluation.tracking import assign

NONE = -1


@dataclass
class Linked:
    """The linking oracle of one video."""

    matched: dict  # the output of `metric.match_video` for the linked tracks
    categories: list  # of the ground truth tracks that count
    best_ious: np.ndarray  # the highest IoU of each, of any linking


def link_video(overlaps: VideoOverlaps) -> Linked:
    """Link the masks of a video anew, as described at the top."""
    track_of, tracks = different_tracks(overlaps)
    best_ious, gains = best_links(tracks)
    counts = ~overlaps.crowd
    linked = linked_overlaps(overlaps, track_of, tracks, exclusive_links(gains[..., counts]))
    categories = [entry["category_id"] for entry in overlaps.annotations]
    categories = [category for category, is_counted in zip(categories, counts) if is_counted]
    return Linked(match_video(linked), categories, best_ious[counts])


def different_tracks(overlaps: VideoOverlaps) -> tuple[np.ndarray, VideoOverlaps]:
    """Predictions with the same masks, such as one query with several labels, are one track.

    Returns the track of each prediction, (D,) int, and the overlaps of the P different tracks.
    """
    numbers, firsts = {}, []
    track_of = np.zeros(len(overlaps.predictions), dtype=int)
    visible = (overlaps.predicted_areas > 0).T.tolist()
    for d, entry in enumerate(overlaps.predictions):
        masks = zip(entry["segmentations"], visible[d])
        code = tuple(str(mask["counts"]) if is_visible else None for mask, is_visible in masks)
        if code not in numbers:
            numbers[code] = len(numbers)
            firsts.append(d)
        track_of[d] = numbers[code]
    everything = np.arange(len(overlaps.annotations))
    return track_of, overlaps.select(np.array(firsts, dtype=int), everything)


def best_links(tracks: VideoOverlaps) -> tuple[np.ndarray, np.ndarray]:
    """The highest IoU that predicted masks can give each ground truth track, one mask per frame.

    A track has the IoU I / U, both summed over frames. Dinkelbach's method ("On Nonlinear
    Fractional Programming", 1967) maximises I - r U for a ratio r, sets r to the resulting IoU, and
    repeats. The frames are independent: a mask that shares i pixels with the object and has o
    outside of it changes I - r U by i - r o, so the best one is taken, or none if no change is
    positive. r grows until the largest I - r U is 0, when no track has a higher IoU.

    tracks: the overlaps of P different tracks.

    Returns the IoUs (G,) float64, and (L, P, G) float64, what each mask adds to the IoU of a ground
    truth track to first order: positive for masks that are better than none.
    """
    shared = tracks.intersections  # (L, P, G)
    outside = tracks.predicted_areas[:, :, None] - shared
    actual = tracks.actual_areas.sum(axis=0)  # (G,)
    ious = np.zeros(len(actual))
    while True:
        gains = shared - ious * outside
        best = (gains == gains.max(axis=1, initial=0, keepdims=True)) & (gains > 0)
        best &= np.cumsum(best, axis=1) == 1  # the first of equal ones
        union = np.maximum(actual + (outside * best).sum(axis=(0, 1)), 1)
        improved = (shared * best).sum(axis=(0, 1)) / union
        if not (improved > ious).any():
            return ious, gains / union
        ious = np.maximum(ious, improved)


def exclusive_links(gains: np.ndarray) -> np.ndarray:
    """Assign masks to ground truth tracks: (L, G) int, a predicted track or NONE in each frame.

    In each frame, a mask goes to at most one ground truth track, and the total gain is as high as
    possible. gains: (L, P, G), see `best_links`; masks without a positive gain are not assigned.
    """
    gains = np.maximum(gains, 0.0)
    links = np.full((gains.shape[0], gains.shape[2]), NONE)
    for frame in np.flatnonzero(gains.any(axis=(1, 2))):
        p, g = assign(gains[frame])
        useful = gains[frame, p, g] > 0
        links[frame, g[useful]] = p[useful]
    return links


def linked_overlaps(
    overlaps: VideoOverlaps, track_of: np.ndarray, tracks: VideoOverlaps, links: np.ndarray
) -> VideoOverlaps:
    """The overlaps of the linked tracks, and of the tracks of masks that are left.

    track_of, tracks: see `different_tracks`. links: (L, G) int, a track or NONE.
    """
    links = links[:, (links != NONE).any(axis=0)]
    is_linked = links != NONE
    frames = np.arange(len(links))[:, None]
    is_left = tracks.predicted_areas > 0  # (L, P)
    visible = is_left.sum(axis=0)
    is_left[np.nonzero(is_linked)[0], links[is_linked]] = False
    left = is_left.sum(axis=0)

    predictions = []  # (position in the file, entry, column of the arrays below)
    for number, linked in enumerate(links.T):
        for position, entry in mean_labels(overlaps, track_of, linked[linked != NONE]):
            predictions.append((position, entry, number))
    for position, (entry, track) in enumerate(zip(overlaps.predictions, track_of)):
        if left[track] or not visible[track]:
            share = left[track] / visible[track] if visible[track] else 1.0
            entry = entry | {"score": entry["score"] * share}
            predictions.append((position, entry, links.shape[1] + track))
    predictions.sort(key=lambda prediction: prediction[0])  # equal scores keep their order

    columns = np.array([column for *_, column in predictions], dtype=int)
    areas = (tracks.predicted_areas[frames, links] * is_linked, tracks.predicted_areas * is_left)
    intersections = (
        tracks.intersections[frames, links] * is_linked[:, :, None],
        tracks.intersections * is_left[:, :, None],
    )
    return overlaps.with_tracks(
        [entry for _, entry, _ in predictions],
        np.concatenate(areas, axis=1)[:, columns],
        np.concatenate(intersections, axis=1)[:, columns],
    )


def mean_labels(
    overlaps: VideoOverlaps, track_of: np.ndarray, tracks: np.ndarray
) -> list[tuple[int, dict]]:
    """The predictions of a track that is linked from masks of other tracks.

    track_of: (D,) the track of each prediction. tracks: for each mask, the track it comes from.

    Returns (position, entry) for each class. The position is that of the first prediction of the
    class among those tracks, the score their mean.
    """
    numbers, counts = np.unique(tracks, return_counts=True)
    share = dict(zip(numbers.tolist(), (counts / len(tracks)).tolist()))
    labels = {}
    seen = set()
    for position, (entry, track) in enumerate(zip(overlaps.predictions, track_of.tolist())):
        category = entry["category_id"]
        if track not in share or (track, category) in seen:
            continue
        seen.add((track, category))
        first, score = labels.get(category, (position, 0.0))
        labels[category] = first, score + share[track] * entry["score"]
    return [
        (position, {"category_id": category, "score": score})
        for category, (position, score) in labels.items()
    ]


# AP


def measure_linking(videos: list[Linked], categories: list) -> dict[str, dict[str, float]]:
    """{"linking", "bound"}: AP, AP50 and AP75 of the oracle, and what no linking exceeds."""
    linking, bound = [], []
    for category in categories:
        ious = [
            iou
            for video in videos
            for iou, of in zip(video.best_ious, video.categories)
            if of == category
        ]
        if not ious:
            continue
        found = np.sort(np.array(ious))[::-1] >= IOU_THRESHOLDS[:, None]  # (T, objects)
        bound.append(average_precision(found, np.zeros_like(found), len(ious)))
        matchings = [video.matched[category] for video in videos if category in video.matched]
        _, true, false, _ = rank_predictions(matchings, ALL, MAX_PREDICTIONS[-1])
        linking.append(average_precision(true, false, len(ious)))
    return {"linking": mean_precision(linking), "bound": mean_precision(bound)}


def mean_precision(of_categories: list[np.ndarray]) -> dict[str, float]:
    """AP, AP50 and AP75 from those of each category (T,); -1.0 if there are none."""
    if not of_categories:
        return {"AP": -1.0, "AP50": -1.0, "AP75": -1.0}
    precision = np.mean(of_categories, axis=0)
    return {
        "AP": float(precision.mean()),
        "AP50": float(precision[0]),
        "AP75": float(precision[5]),
    }
