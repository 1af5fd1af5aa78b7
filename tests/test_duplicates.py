"""Duplicates among hand-made tracks: which are left out, of a video and of a live frame."""

import numpy as np
import pytest
import torch
from pycocotools import mask as rle

from evaluation.duplicates import (
    SAME_IOU,
    SCORE_RATIO,
    SIMILAR_IOU,
    distinct,
    distinct_in_frame,
    drop_duplicates,
)
from evaluation.postprocess import EncodedVideo, FrameTracks
from hand_made import LEFT, RIGHT, encode

FRAMES, WIDTH = 4, 40


def bars(*widths):
    """A track of one frame for each width: a bar of so many columns, from the left."""
    columns = np.arange(WIDTH)[None].repeat(8, 0)
    return [encode(columns < width) for width in widths]


def kept(*tracks, scores=None, labels=None):
    """Indices of the tracks that are kept of a video; all scores are 1 by default."""
    video = make_video(tracks, scores or [1] * len(tracks), labels or [0] * len(tracks))
    return drop_duplicates(video).track_ids.tolist()


def make_video(tracks, scores, labels):
    count = len(tracks)
    return EncodedVideo(
        scores=torch.tensor(scores, dtype=torch.float64),
        labels=torch.tensor(labels),
        track_ids=torch.arange(count),
        segmentations=list(tracks),
        gates=torch.arange(count * FRAMES).view(count, FRAMES, 1) % 3 == 0,
    )


def test_the_better_of_two_equal_tracks_is_kept():
    assert kept(LEFT, LEFT) == kept(LEFT, LEFT, labels=[1, 0]) == [0]
    assert kept(LEFT, RIGHT, LEFT, RIGHT) == [0, 1]


def test_everything_of_a_kept_track_stays():
    before = make_video([LEFT, LEFT, RIGHT], [0.9, 0.8, 0.7], [2, 1, 0])
    after = drop_duplicates(before)
    for name in ("scores", "labels", "track_ids", "gates"):
        assert torch.equal(getattr(after, name), getattr(before, name)[[0, 2]])
    assert after.segmentations == [LEFT, RIGHT]


@pytest.mark.parametrize(
    "width, score, expected",
    [
        (37, 1, [0]),
        (36, 1, [0, 1]),  # IoU 36/40, not above SAME_IOU
        (36, 0.75, [0, 1]),  # not below SCORE_RATIO
        (36, 0.74, [0]),
        (31, 0.74, [0]),
        (30, 0.1, [0, 1]),  # IoU 30/40, not above SIMILAR_IOU
    ],
)
def test_a_track_at_a_threshold_is_kept(width, score, expected):
    assert kept(bars(*[40] * 4), bars(*[width] * 4), scores=[1, score]) == expected
    assert (SAME_IOU, SIMILAR_IOU, SCORE_RATIO) == (0.9, 0.75, 0.75)


def test_the_iou_is_that_of_the_whole_track():
    """IoU 60/63, then 60/80, where two of four frames are equal."""
    first = bars(30, 30, 0, 0)
    assert kept(first, bars(30, 30, 2, 1)) == [0]
    assert kept(first, bars(30, 30, 10, 10)) == [0, 1]


def test_only_kept_tracks_count():
    """The second is a duplicate of the first; the third is one of the second alone."""
    tracks = [bars(*[width] * 4) for width in (40, 37, 34)]
    assert kept(*tracks) == [0, 2] and kept(*tracks[1:]) == [0]


def test_tracks_without_masks_are_no_duplicates():
    nothing = bars(0, 0, 0, 0)
    assert kept(nothing, nothing) == [0, 1] and kept() == []


def make_frame(masks, scores):
    """A live frame; what the rule does not read is None."""
    return FrameTracks(torch.tensor(scores), None, masks, None, None, None)


def test_a_live_frame_is_a_video_of_one_frame():
    """For the given instances only."""
    codes = LEFT[0], LEFT[0], RIGHT[0], LEFT[0], RIGHT[0]
    masks = torch.stack([torch.from_numpy(rle.decode(code)).bool() for code in codes])
    frame = make_frame(masks, [0.9, 0.8, 0.7, 0.6, 0.5])
    assert distinct_in_frame(frame, [0, 1, 2, 3, 4]) == [0, 2] == kept(*([code] for code in codes))
    assert distinct_in_frame(frame, [1, 3, 4]) == [1, 4]
    assert distinct_in_frame(frame, [2]) == [2] and distinct_in_frame(frame, []) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pixels_are_counted_in_32_bits_under_autocast(dtype):
    """There are more of them than the largest float16; bfloat16 would round both IoUs to 0.9."""
    masks = torch.zeros(3, 1, 100000, dtype=torch.bool)
    for mask, width in zip(masks, (100000, 90020, 89980)):
        mask[:, :width] = True
    frame = make_frame(masks, [1.0, 1.0, 1.0])
    with torch.autocast("cpu", dtype):
        assert distinct_in_frame(frame, [0, 1]) == [0]
        assert distinct_in_frame(frame, [0, 2]) == [0, 2]


@pytest.mark.parametrize("seed", range(3))
def test_every_dropped_track_and_no_kept_one_has_a_better_kept_one(seed):
    random = np.random.default_rng(seed)
    ious = random.random((9, 9)) ** 0.3
    scores = sorted(random.random(9).tolist(), reverse=True)
    chosen = distinct(scores, ious)

    def replaces(better, track):
        iou = ious[track, better]
        return iou > 0.9 or (iou > 0.75 and scores[track] < 0.75 * scores[better])

    assert 1 < len(chosen) < 9
    for track in range(9):
        better = [other for other in chosen if other < track and replaces(other, track)]
        assert bool(better) == (track not in chosen)
