"""Random scenes: which objects there are and where each is in every frame. rendering.py draws them.

An object is a textured shape (disc, square, triangle, star, cross, ring) on a path that crosses the
frame, or leaves it and comes back. A class is a shape and a hue, so that it is learned in minutes.
Texture, tone, size and motion are independent of the class, so that objects of one class differ by
little more than their paths.

`Difficulty` adds occlusion by covers, look-alikes, speed and motion blur, changes of light or
texture, and noisy frames. All randomness comes from a numpy Generator, `rng`.
"""

import math
from colorsys import hsv_to_rgb
from dataclasses import dataclass, replace

import numpy as np

RETURNING_SHARE = 0.35  # of the objects leave the frame and come back; the others cross it


# ---- Shapes and textures ----


def star_polygon(x, y, points, notch):
    """Signed distance to a polygon with tips at radius 1 and notches between them.

    points: number of tips. notch: radius of the notches.
    """
    sector = 2 * math.pi / points
    # Fold the plane onto half a sector, which contains one edge: from a tip to a notch.
    angle = np.abs((np.arctan2(y, x) + sector / 2) % sector - sector / 2)
    radius = np.hypot(x, y)
    rise = notch * math.sin(sector / 2)
    run = 1 - notch * math.cos(sector / 2)
    distance = (radius * np.cos(angle) - 1) * rise + radius * np.sin(angle) * run
    return distance / math.hypot(rise, run)


def bar(x, y):
    """Signed distance to a bar along x."""
    return np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.31)


# Signed distance to the outline, negative inside. In object coordinates, the farthest tip is at
# radius 1.
SHAPES = {
    "disc": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: star_polygon(x, y, points=4, notch=math.cos(math.pi / 4)),
    "triangle": lambda x, y: star_polygon(x, y, points=3, notch=math.cos(math.pi / 3)),
    "star": lambda x, y: star_polygon(x, y, points=5, notch=0.48),
    "cross": lambda x, y: np.minimum(bar(x, y), bar(y, x)),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.74) - 0.26,
}
CATEGORIES = tuple(SHAPES)  # category id = position + 1


def blotches(x, y):
    """Waves modulated by other waves, which do not look regular."""
    first = np.sin(0.7 * x + 1.6 * np.sin(0.6 * y))
    return first + np.sin(0.6 * y + 1.4 * np.sin(0.8 * x))


# The sign selects one of the two colours of an object. Coordinates are in radians.
TEXTURES = {
    "stripes": lambda x, y: np.sin(x),
    "checks": lambda x, y: np.sin(x) * np.sin(y),
    "dots": lambda x, y: np.cos(x) + np.cos(y) - 0.5,
    "blotches": blotches,
}


# ---- Difficulties ----


@dataclass(frozen=True)
class Difficulty:
    """Independent ways to make a video harder. The defaults are the easiest setting."""

    occluded: float = 0.0  # share of the objects that a cover occludes for some frames
    occluded_frames: tuple = (3, 8)  # duration of the occlusion, minimum and maximum
    look_alike: float = 0.0  # share of the objects that copy the object before them
    returning: float = RETURNING_SHARE
    speed: float = 1.0  # factor of the objects' speed
    blur: float = 0.0  # exposure time as a share of the frame interval
    light: float = 0.0  # share of the videos in which the light changes once
    texture: float = 0.0  # share of the objects whose texture changes once
    noisy: float = 0.0  # share of noisy frames, in bursts of one to three
    noise: float = 70.0  # its standard deviation in grey levels

    def check(self):
        """Raise ValueError for the first value out of range."""
        for name in ("occluded", "look_alike", "returning", "blur", "light", "texture", "noisy"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"The difficulty {name} is a share from 0 to 1, not {value}.")
        lengths = self.occluded_frames
        if len(lengths) != 2 or not 1 <= lengths[0] <= lengths[1]:
            raise ValueError(
                "occluded_frames must be (minimum, maximum) with "
                f"1 <= minimum <= maximum, not {lengths}."
            )
        if self.speed <= 0:
            raise ValueError(f"speed must be positive, not {self.speed}.")
        if self.noise < 0:
            raise ValueError(f"noise must be at least 0, not {self.noise}.")


# ---- Paths: (T, 2) float centres (x, y) in pixels, about 1 to 6 pixels a frame at width 160 ----


def crossing_path(rng, frames, height, width, speed_factor=1.0):
    """A straight or swinging path through the middle of the frame, where paths meet."""
    middle = rng.uniform(0.25, 0.75, 2) * (width, height)
    clock = np.arange(frames) - rng.uniform(0.3, 0.7) * frames
    heading = rng.uniform(0, 2 * np.pi)
    # Without the limit, objects of long videos would be outside most of the time.
    speed = min(speed_factor * rng.uniform(0.010, 0.034), 1.2 / frames)
    direction = (width * np.cos(heading), height * np.sin(heading))
    path = middle + clock[:, None] * speed * direction
    swing = rng.choice([0, rng.uniform(0.08, 0.16)]) * height
    path[:, 1] += swing * np.sin(2 * np.pi * clock / rng.uniform(18, 30))
    return path


def returning_path(rng, frames, height, width, radius, speed_factor=1.0):
    """A path along one border of the frame that leaves through it and comes back."""
    inside = rng.uniform(0.8, 1.4) * radius
    outside = rng.uniform(1.25, 1.6) * radius
    # The depth follows a bell curve, whose maximum slope is 0.86 * height / duration.
    max_speed = speed_factor * rng.uniform(0.025, 0.035) * width
    duration = 0.86 * (inside + outside) / max_speed
    clock = np.arange(frames) - rng.uniform(0.3, 0.7) * frames
    depth = inside - (inside + outside) * np.exp(-((clock / duration) ** 2))
    path = crossing_path(rng, frames, height, width, speed_factor)
    axis = rng.integers(2)
    if rng.random() < 0.5:
        path[:, axis] = depth
    else:
        path[:, axis] = (width, height)[axis] - depth
    return path


# ---- Scenes ----


@dataclass(frozen=True)
class MovingObject:
    """An object and its trajectory over T frames."""

    category_id: int  # 1 .. len(CATEGORIES)
    centres: np.ndarray  # (T, 2) float, (x, y) in pixels, may lie outside the frame
    radii: np.ndarray  # (T,) float, pixels from the centre to the farthest tip
    angles: np.ndarray  # (T,) float, radians
    colours: np.ndarray  # (2, 3) float, RGB in 0 .. 255
    texture: str  # key of TEXTURES
    frequency: float  # texture radians per radius
    phase: np.ndarray  # (2,) float, texture radians
    changes_at: int | None = None  # first frame with later_texture
    later_texture: str = ""


def make_object(rng, frames, height, width, background_colour, difficulty=Difficulty()):
    """A random MovingObject, in colours that contrast with background_colour, (3,) RGB."""
    radius = rng.uniform(0.14, 0.26) * height
    period, phase = rng.uniform(20, 40), rng.uniform(0, 2 * np.pi)
    growth = np.sin(2 * np.pi * np.arange(frames) / period + phase)
    if rng.random() < difficulty.returning:
        centres = returning_path(rng, frames, height, width, radius, difficulty.speed)
    else:
        centres = crossing_path(rng, frames, height, width, difficulty.speed)
    category_id = int(rng.integers(len(CATEGORIES))) + 1
    return MovingObject(
        category_id=category_id,
        centres=centres,
        radii=radius * (1 + rng.uniform(0, 0.15) * growth),
        angles=rng.uniform(0, 2 * np.pi) + rng.uniform(-0.08, 0.08) * np.arange(frames),
        colours=class_colours(rng, category_id, background_colour),
        texture=str(rng.choice(list(TEXTURES))),
        frequency=rng.uniform(5, 9),
        phase=rng.uniform(0, 2 * np.pi, 2),
    )


def class_colours(rng, category_id, background_colour, candidates=8):
    """The colours of an object, (2, 3) float RGB: a bright and a dark tone of the class's hue.

    Of several random pairs, the one whose bright tone is farthest from the background's colour.
    """
    hues = (category_id - 1 + rng.uniform(-0.2, 0.2, candidates)) / len(CATEGORIES)
    bright = [hsv_to_rgb(hue, rng.uniform(0.7, 1), rng.uniform(0.8, 1)) for hue in hues]
    dark = [hsv_to_rgb(hue, rng.uniform(0.6, 1), rng.uniform(0.2, 0.45)) for hue in hues]
    colours = 255 * np.stack((bright, dark), 1)
    contrast = np.linalg.norm(colours[:, 0] - background_colour, axis=1)
    return colours[contrast.argmax()]


def make_harder(rng, things, height, width, difficulty):
    """Add look-alikes, changes of texture and covers to the objects of a scene.

    Returns the objects and the covers, which are MovingObjects too.
    """
    things = list(things)
    covers = []
    for index, thing in enumerate(things):
        if index and rng.random() < difficulty.look_alike:
            thing = replace(things[index - 1], centres=thing.centres, angles=thing.angles)
        elif rng.random() < difficulty.texture:
            others = [texture for texture in TEXTURES if texture != thing.texture]
            changes_at = int(rng.integers(1, max(2, len(thing.centres))))
            later_texture = str(rng.choice(others))
            thing = replace(thing, changes_at=changes_at, later_texture=later_texture)
        things[index] = thing
        if rng.random() < difficulty.occluded:
            covers.append(make_cover(rng, thing, height, width, difficulty.occluded_frames))
    return things, covers


def make_cover(rng, thing, height, width, lengths):
    """A grey square that occludes an object for some frames.

    It moves in front of the object, follows it for a number of frames in the range `lengths`, and
    moves away. The frames are chosen so that the occluded object would be inside the frame as long
    as possible, and so that it is visible before and after if possible.
    """
    frames = len(thing.centres)
    length = min(int(rng.integers(lengths[0], lengths[1] + 1)), frames)
    start = choose_occlusion(rng, thing, height, width, length)
    clock = np.arange(frames)
    # Number of frames until the cover is in front of the object, or since then.
    distance = np.maximum(0, np.maximum(start - clock, clock - (start + length - 1)))
    # The radius is that of the corners: the object must fit between the sides.
    radii = 1.5 * thing.radii + 2
    heading = rng.uniform(0, 2 * np.pi)
    # The cover comes from one side and leaves to the other.
    offset = np.where(clock < start, -1, 1) * distance * 0.9 * radii
    grey = rng.uniform(70, 180)
    return MovingObject(
        category_id=CATEGORIES.index("square") + 1,
        centres=thing.centres + offset[:, None] * (np.cos(heading), np.sin(heading)),
        radii=radii,
        angles=np.full(frames, heading),
        colours=np.stack((np.full(3, grey), np.full(3, 0.8 * grey))),
        texture="checks",
        frequency=rng.uniform(8, 14),
        phase=rng.uniform(0, 2 * np.pi, 2),
    )


def choose_occlusion(rng, thing, height, width, length):
    """The first frame of an occlusion of `length` frames (see `make_cover`)."""
    inside = ((thing.centres >= 0) & (thing.centres < (width, height))).all(1)
    starts = np.arange(len(thing.centres) - length + 1)
    occluded = np.array([inside[start : start + length].sum() for start in starts])
    seen_around = np.array(
        [inside[:start].any() and inside[start + length :].any() for start in starts]
    )
    score = 2 * occluded + seen_around
    return int(rng.choice(starts[score == score.max()]))


def make_degradation(rng, frames, difficulty):
    """Changes of light and noisy frames.

    Returns the light of every frame, (T, 3) float factors, and which frames are noisy, (T,) bool.
    """
    light = np.ones((frames, 3))
    noisy = np.zeros(frames, dtype=bool)
    if rng.random() < difficulty.light:
        first = int(rng.integers(frames))
        brightness = rng.choice([rng.uniform(0.4, 0.6), rng.uniform(1.4, 1.8)])
        light[first:] = brightness * rng.uniform(0.85, 1.15, 3)
    while missing := round(difficulty.noisy * frames) - noisy.sum():
        first, length = rng.integers(frames), rng.integers(1, 4)
        noisy[first : first + min(length, missing)] = True
    return light, noisy
