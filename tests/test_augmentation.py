"""Rotation and large-scale jitter: masks stay aligned, and frames share what they should share.

Flips, resizing and crops are tested in test_data.py on the same clip: a red and a green rectangle
on black.
"""

import dataclasses
import math

import numpy
import pytest
import torch
from scipy.ndimage import binary_dilation, binary_erosion, center_of_mass
from torchvision import tv_tensors

from augmentation import Augmentation, short_side_size
from test_data import GREEN, HEIGHT, RED, is_colour, painted_clip

TURNED = Augmentation(short_sides=(2 * HEIGHT,), flip=False, rotation=15)
JITTERED = Augmentation(short_sides=(), lsj_size=64, rotation=15)


def generators(count):
    return [numpy.random.default_rng(seed) for seed in range(count)]


@pytest.mark.parametrize("augmentation, outline", [(TURNED, 2), (JITTERED, 4)])
def test_masks_stay_on_their_pixels(augmentation, outline):
    """But for `outline` pixels, over which an enlarged picture's colours run into each other."""
    checked = 0
    for generator in generators(40):
        frames, masks = augmentation(*painted_clip(), generator)
        assert frames.dtype == torch.uint8
        assert masks.dtype == torch.bool
        assert masks.shape[2:] == frames.shape[2:]
        for category, instance in zip((RED, GREEN), masks):
            for frame, mask in zip(frames, instance.numpy(), strict=True):
                coloured = is_colour(frame, category)
                inner = binary_erosion(mask, iterations=outline)
                assert coloured[inner].all()
                assert binary_dilation(mask, iterations=outline)[coloured].all()
                checked += inner.sum()
    assert checked > 5_000


def angle_of(mask, upright):
    """Degrees, counter-clockwise, of a turned elongated shape against the upright one, by its
    principal axis.
    """

    def axis(shape):
        rows, columns = numpy.nonzero(shape)
        spread = numpy.cov(columns, -rows)
        return 0.5 * math.atan2(2 * spread[0, 1], spread[0, 0] - spread[1, 1])

    return math.degrees(axis(mask) - axis(upright))


def test_the_angle_drifts_one_way_about_one_centre():
    bar = torch.zeros(1, 6, 200, 200, dtype=torch.bool)
    bar[:, :, 90:110, 30:170] = True
    frames = bar[0, :, None].expand(6, 3, 200, 200) * torch.tensor(200, dtype=torch.uint8)
    trends, largest = [], 0
    for generator in generators(20):
        turned, masks = TURNED.rotate(tv_tensors.Video(frames), tv_tensors.Mask(bar), generator)
        angles = [angle_of(mask.numpy(), bar[0, 0].numpy()) for mask in masks[0]]
        steps = numpy.diff(angles)
        assert (steps >= -0.3).all() or (steps <= 0.3).all()  # but for the pixels of the outline
        largest = max(largest, numpy.abs(angles).max())
        trends.append(numpy.sign(steps.sum()))
        # the bar's middle moves on a circle about a centre within a tenth of the side: at most 15
        # degrees' worth
        middles = numpy.array([center_of_mass(mask.numpy()) for mask in masks[0]])
        assert numpy.abs(middles - 99.5).max() <= 20 * math.sqrt(2) * math.radians(15) + 1
        assert (turned[:, 0] > 100)[masks[0]].float().mean() > 0.97
    assert 10 < largest <= 15.5 and {-1, 1} == set(trends)


def test_jitter_fills_a_square():
    """Small pictures lie at the top left of a grey square, large ones are cut.

    All frames of a clip share the window.
    """
    scales = []
    for generator in generators(60):
        white = torch.full((2, 3, 40, 80), 255, dtype=torch.uint8)
        frames, masks = Augmentation(short_sides=(), lsj_size=64)(
            tv_tensors.Video(white),
            tv_tensors.Mask(torch.ones(1, 2, 40, 80, dtype=torch.bool)),
            generator,
        )
        assert frames.shape == (2, 3, 64, 64)
        assert torch.equal(frames[0], frames[1])
        assert torch.equal(masks[:, 0], masks[:, 1])
        inside = frames[0, 0] == 255
        assert torch.equal(inside, masks[0, 0]) and (frames[0][:, ~inside] == 128).all()
        height, width = int(inside[:, 0].sum()), int(inside[0].sum())
        assert inside[:height, :width].all() and inside.sum() == height * width
        scales.append(width / 64)
        assert height == pytest.approx(min(width / 2, 64), abs=1) or width == 64
    # Scale above 1: half of 0.1 .. 2.
    assert min(scales) < 0.3 and 0.3 < numpy.mean(numpy.array(scales) == 1) < 0.75


def test_where_a_large_picture_is_cut():
    """Anywhere from its one corner to the other; the mask is cut with it."""
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).expand(1, 3, 64, 64)
    first_columns = set()
    for generator in generators(60):
        frames, masks = Augmentation(short_sides=(), flip=False, lsj_size=64)(
            tv_tensors.Video(ramp), tv_tensors.Mask((ramp[None, :, 0] >= 128)), generator
        )
        if masks.shape[-1] == 64 and (frames != 128).all(1).all():
            first_columns.add(int(frames[0, 0, 0, 0]) // 16)
            assert ((frames[0, 0] >= 128) == masks[0, 0]).float().mean() > 0.95
    assert {0, 1, 2} <= first_columns


@pytest.mark.parametrize("augmentation", [TURNED, JITTERED])
def test_a_clip_without_instances(augmentation):
    frames, masks = painted_clip()
    frames, masks = augmentation(frames, tv_tensors.Mask(masks[:0]), numpy.random.default_rng(0))
    assert len(masks) == 0 and masks.shape[1:] == (3, *frames.shape[2:])


SHAPES = [(1, 4000), (4000, 1), (1, 1), (2, 3), (3, 500)]
SETTINGS = {
    "resized": Augmentation((48,), rotation=15),
    "cut": Augmentation((48,), crop_short_sides=(40,), crop_size=(10, 600)),
    "cut to a share": Augmentation(
        (48,), crop_short_sides=(1,), crop_size=(0.01, 0.1), crop_relative=True
    ),
    "jittered": Augmentation((), lsj_size=64, rotation=15),
    "occluded": Augmentation((48,), occlude=1),
}


@pytest.mark.parametrize("height, width", SHAPES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_frames_of_any_shape_keep_a_pixel_each_way(setting, height, width):
    frames = tv_tensors.Video(torch.full((2, 3, height, width), 200, dtype=torch.uint8))
    masks = tv_tensors.Mask(torch.ones(1, 2, height, width, dtype=torch.bool))
    for generator in generators(8):
        pictures, outlines = SETTINGS[setting](frames, masks, generator)
        assert pictures.shape[2:] == outlines.shape[2:]
        assert min(pictures.shape[2:]) >= 1 and max(pictures.shape[2:]) <= 1333


@pytest.mark.parametrize(
    "height, width, expected",
    [
        (1, 4000, (1, 1333)),
        (4000, 1, (1333, 1)),
        (1, 1, (360, 360)),
        (2, 3, (360, 540)),
        (7, 90_000, (1, 1333)),
    ],
)
def test_no_side_is_resized_to_nothing(height, width, expected):
    assert short_side_size(height, width, 360, 1333) == expected


# Sizes


def ramps(height, width, frames=1):
    """Red is the column and green the row, in shares of 255 that may lie between two pixels."""
    columns, rows = torch.meshgrid(
        torch.linspace(0, 255, width), torch.linspace(0, 255, height), indexing="xy"
    )
    picture = torch.stack((columns, rows, 0 * rows)).round().to(torch.uint8)
    return tv_tensors.Video(picture.expand(frames, -1, -1, -1)), tv_tensors.Mask(
        torch.ones(1, frames, height, width, dtype=torch.bool)
    )


@pytest.mark.parametrize(
    "size, short, longest, expected",
    [
        ((48, 192), 40, 80, (20, 80)),
        ((192, 48), 40, 80, (80, 20)),
        ((48, 64), 24, 80, (24, 32)),
        ((50, 50), 90, 60, (60, 60)),
    ],
)
def test_the_long_side_has_a_limit(size, short, longest, expected):
    resizing = Augmentation(short_sides=(short,), max_long_side=longest, flip=False)
    frames, masks = resizing(*ramps(*size), numpy.random.default_rng(0))
    assert frames.shape[-2:] == masks.shape[-2:] == expected


def test_the_long_side_before_a_crop_has_a_limit_of_its_own():
    """Three times as wide as high: 1333 pixels instead of 1500 wide before the crop, whatever
    max_long_side is.
    """
    cropping = Augmentation(
        short_sides=(300,),
        max_long_side=9999,
        crop_short_sides=(500,),
        crop_size=(300, 300),
        flip=False,
    )
    seen = []
    for generator in generators(12):
        frames, _ = cropping(*ramps(40, 120), generator)
        if frames.shape[-2:] == (300, 300):  # cut out as it is
            seen.append(frames[0, 0, 0].float().diff().mean().item())
    assert len(seen) > 2 and numpy.mean(seen) == pytest.approx(255 / 1333, rel=0.02)


def test_a_relative_crop_has_a_smallest_share_of_each_side():
    """At least half of the height and nine tenths of the width here; all of both at most."""
    cropping = Augmentation(short_sides=(), crop_size=(0.5, 0.9), crop_relative=True)
    shares = []
    for generator in generators(60):
        frames, masks = cropping.crop(*ramps(100, 200, frames=2), generator)
        assert frames.shape[-2:] == masks.shape[-2:]
        shares.append((frames.shape[-2] / 100, frames.shape[-1] / 200))
    heights, widths = zip(*shares)
    assert 0.5 <= min(heights) < 0.55 and 0.95 < max(heights) <= 1
    assert 0.9 <= min(widths) < 0.91 and 0.99 < max(widths) <= 1


def test_pictures_are_smoothed_before_they_shrink():
    """A fine pattern becomes grey; without that, some of its black and white would stay."""
    pattern = (
        ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255)
        .to(torch.uint8)
        .expand(1, 3, 64, 64)
    )
    shrinking = Augmentation(short_sides=(13,), flip=False)
    frames, _ = shrinking(
        tv_tensors.Video(pattern),
        tv_tensors.Mask(torch.ones(1, 1, 64, 64, dtype=torch.bool)),
        numpy.random.default_rng(0),
    )
    assert (frames.float() - 127.5).abs().max() < 20


def test_an_occluded_instance():
    """In consecutive frames after the first it is covered, and what lies under the cover is in no
    mask; the rest of the clip does not change.
    """
    frames, masks = painted_clip()
    frames, masks = frames.repeat(2, 1, 1, 1), masks.repeat(1, 2, 1, 1)  # 6 frames
    resize = Augmentation(short_sides=(HEIGHT,), flip=False)
    expected, outlines = resize(frames, masks, numpy.random.default_rng(0))
    lengths = set()
    for generator in generators(40):
        pictures, visible = dataclasses.replace(resize, occlude=1)(frames, masks, generator)
        changed = (pictures != expected).any(1)  # (T, H, W)
        gone = outlines & ~visible  # (I, T, H, W)
        times = gone.any((0, 2, 3)).nonzero()[:, 0].tolist()
        assert times == list(range(times[0], times[-1] + 1)) and times[0] > 0
        lengths.add(len(times))
        covered = [not visible[i, times].any() for i in range(len(masks))]
        assert sum(covered) >= 1
        assert not (visible & ~outlines).any()
        for t in range(len(frames)):
            assert changed[t].any() == (t in times)
            assert not visible[:, t, changed[t]].any()
    assert lengths == {1, 2, 3, 4, 5}


def test_a_share_of_clips_is_occluded():
    frames, masks = painted_clip()
    augmentation = Augmentation(short_sides=(HEIGHT,), flip=False, occlude=0.25)
    results = [augmentation(frames, masks, generator)[1] for generator in generators(400)]
    share = numpy.mean([not torch.equal(result, masks) for result in results])
    assert 0.18 < share < 0.32
