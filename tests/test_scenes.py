"""The synthetic scenes do not change, because results on the suites are compared over time.

The table contains statistics of the first held-out scenes of every suite, rendered at a small size.
They are compared with a tolerance, because the last digits of a sine depend on the processor.
"""

import math

import numpy
import pytest

from synthetic import rendering, scenes
from synthetic import suites as synthetic

HEIGHT, WIDTH, VIDEOS = 48, 80, 8
# suite: mean and deviation of all grey levels; category ids of the instances, one after the other;
# their visible pixels; the frames that show them; the sum of their first frames
SCENES = {
    "easy": (121.27, 51.70, "1255246123624232", 41157, 251, 0),
    "occlusion": (121.12, 49.59, "1255246123624232", 35987, 229, 1),
    "look-alike": (121.14, 52.16, "1122552446663335442322", 52564, 339, 0),
    "degraded": (119.83, 71.81, "1255246123624232", 41157, 251, 0),
    "long": (121.96, 50.58, "1255246123454432", 185705, 1207, 112),
    "fast": (121.17, 51.68, "1424552466123454432", 42762, 288, 2),
}


FAST = ("occlusion", "degraded")  # the other suites are slow tests


def describe(suite):
    """The numbers of SCENES for the first videos of a suite."""
    levels, categories, pixels, shown, first = [], [], 0, 0, 0
    for number in range(VIDEOS):
        frames, instances = rendering.make_video(
            numpy.random.default_rng((0, 1, number)),
            suite.frames,
            HEIGHT,
            WIDTH,
            suite.objects,
            suite.difficulty,
        )
        levels.append(frames.astype(float))
        for category, masks in instances:
            visible = masks.any((1, 2))
            categories.append(category)
            pixels, shown, first = (
                pixels + int(masks.sum()),
                shown + int(visible.sum()),
                first + int(visible.argmax()),
            )
    levels = numpy.stack(levels)
    return levels.mean(), levels.std(), categories, pixels, shown, first


# What no suite asks for.
MORE = {"fast": synthetic.Suite(scenes.Difficulty(speed=1.7, returning=0.6), objects=(2, 3))}


def test_every_suite_is_in_the_table():
    assert SCENES.keys() == synthetic.SUITES.keys() | MORE.keys()


@pytest.mark.parametrize(
    "name",
    [
        *FAST,
        *(pytest.param(name, marks=pytest.mark.slow) for name in SCENES if name not in FAST),
    ],
)
def test_the_scenes_of_a_suite_stay_what_they_are(name):
    mean, deviation, categories, pixels, shown, first = describe((synthetic.SUITES | MORE)[name])
    expected = SCENES[name]
    assert "".join(map(str, categories)) == expected[2]
    assert (mean, deviation) == pytest.approx(expected[:2], abs=0.02)
    assert pixels == pytest.approx(expected[3], rel=1e-3)
    assert (shown, first) == pytest.approx(expected[4:], abs=1)


@pytest.mark.parametrize(
    "name, area",
    [
        ("disc", math.pi),
        ("square", 2),
        ("triangle", 3 * math.sqrt(3) / 4),
        ("star", 5 * 0.48 * math.sin(math.pi / 5)),
        ("cross", 2 * 1.9 * 0.62 - 0.62**2),
        ("ring", math.pi * (1 - 0.48**2)),
    ],
)
def test_shapes_have_their_area_and_reach_one(name, area):
    """Negative inside; the farthest tip at radius one, where nothing lies beyond."""
    steps = (numpy.arange(1200) + 0.5) / 500 - 1.2
    x, y = steps[None], steps[:, None]
    inside = scenes.SHAPES[name](x, y) < 0
    assert inside.sum() / 500**2 == pytest.approx(area, rel=0.01)
    assert numpy.hypot(x, y)[inside].max() == pytest.approx(1, abs=0.01)


def test_every_shape_is_a_category_and_every_texture_is_used():
    rng = numpy.random.default_rng(0)
    things = [scenes.make_object(rng, 5, HEIGHT, WIDTH, numpy.zeros(3)) for _ in range(200)]
    assert {thing.category_id for thing in things} == set(range(1, 7)) and len(scenes.SHAPES) == 6
    assert {thing.texture for thing in things} == set(scenes.TEXTURES)
    for thing in things:
        assert thing.centres.shape == (5, 2) and thing.radii.shape == thing.angles.shape == (5,)
        assert (0.14 * HEIGHT * 0.85 <= thing.radii).all()
        assert (thing.radii <= 0.26 * HEIGHT * 1.15).all()
        bright, dark = thing.colours
        assert 0.8 * 255 <= bright.max() <= 255 and 0.2 * 255 <= dark.max() <= 0.45 * 255


def test_a_colour_stands_out_against_the_background():
    """Of eight pairs, the one whose bright tone is farthest from it."""
    for background in (numpy.zeros(3), numpy.full(3, 255.0), numpy.array([255.0, 0, 0])):
        chosen = [
            numpy.linalg.norm(
                scenes.class_colours(numpy.random.default_rng(seed), 1, background)[0] - background
            )
            for seed in range(40)
        ]
        alone = [
            numpy.linalg.norm(
                scenes.class_colours(numpy.random.default_rng(seed), 1, background, candidates=1)[0]
                - background
            )
            for seed in range(40)
        ]
        assert numpy.mean(chosen) > numpy.mean(alone) + 3


def test_paths_cross_the_middle_or_come_back():
    """A crossing path passes the middle of the frame; a returning one is outside for a while."""
    for seed in range(30):
        path = scenes.crossing_path(numpy.random.default_rng(seed), 40, HEIGHT, WIDTH) / (
            WIDTH,
            HEIGHT,
        )
        assert ((path > 0.05) & (path < 0.95)).all(1).any()
        assert numpy.abs(numpy.diff(path, axis=0)).max() < 0.08  # no jump
        radius = 8
        path = scenes.returning_path(numpy.random.default_rng(seed), 200, HEIGHT, WIDTH, radius)
        outside = ((path < -radius) | (path > numpy.array([WIDTH, HEIGHT]) + radius)).any(1)
        assert outside.any()


def test_objects_come_back_through_any_border():
    """As often through the upper or left one as through the others."""
    paths = [
        scenes.returning_path(numpy.random.default_rng(seed), 200, HEIGHT, WIDTH, radius=8)
        for seed in range(600)
    ]
    below = sum((path < -8).any(0).sum() for path in paths)
    beyond = sum((path > numpy.array([WIDTH, HEIGHT]) + 8).any(0).sum() for path in paths)
    assert below + beyond > 600 and 0.46 < below / (below + beyond) < 0.54


def test_a_changed_texture_is_another_one():
    rng = numpy.random.default_rng(0)
    things = [scenes.make_object(rng, 6, HEIGHT, WIDTH, numpy.zeros(3)) for _ in range(200)]
    changed, _ = scenes.make_harder(rng, things, HEIGHT, WIDTH, scenes.Difficulty(texture=1.0))
    assert all(thing.later_texture in set(scenes.TEXTURES) - {thing.texture} for thing in changed)
    assert {thing.changes_at for thing in changed} == {1, 2, 3, 4, 5}
    some, _ = scenes.make_harder(rng, things, HEIGHT, WIDTH, scenes.Difficulty(texture=0.3))
    assert 40 < sum(thing.changes_at is not None for thing in some) < 80


def test_covers_hide_as_many_objects_for_as_long_as_asked_for():
    rng = numpy.random.default_rng(0)
    things = [scenes.make_object(rng, 20, HEIGHT, WIDTH, numpy.zeros(3)) for _ in range(400)]
    difficulty = scenes.Difficulty(occluded=0.25, occluded_frames=(3, 5))
    _, covers = scenes.make_harder(numpy.random.default_rng(1), things, HEIGHT, WIDTH, difficulty)
    assert 70 < len(covers) < 130
    centres, lengths = numpy.stack([thing.centres for thing in things]), set()
    for cover in covers:
        distances = numpy.linalg.norm(centres - cover.centres, axis=2)  # (things, T)
        lengths.add(int((distances < 1e-6).sum(1).max()))  # frames in front of one
    assert lengths == {3, 4, 5}


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_so_many_frames_are_lost_in_noise(share):
    light, lost = scenes.make_degradation(
        numpy.random.default_rng(0), 40, scenes.Difficulty(noisy=share)
    )
    assert lost.sum() == 40 * share
    assert lost.dtype == bool
    assert (light == 1).all()
    assert light.shape == (40, 3)


def test_light_stays_as_it_has_become():
    changed = 0
    for seed in range(40):
        light, lost = scenes.make_degradation(
            numpy.random.default_rng(seed), 10, scenes.Difficulty(light=0.5)
        )
        steps = (numpy.diff(light, axis=0) != 0).any(1)
        assert steps.sum() <= 1 and not lost.any()
        after = light[-1]
        if (after != 1).any():
            changed += 1
            assert (after < 0.7).all() or (after > 1.15).all()
            assert numpy.ptp(after) > 0  # a tint of its own
    assert 10 < changed < 30
