"""The synthetic scenes, planned: which objects there are, where each is in every frame, what makes it hard. suites.py paints them.

An object is a textured shape (disc, square, triangle, star, cross, ring) with a path that crosses the frame or leaves it and comes
back. A class is a shape and a hue, so that it is learned in minutes; texture, tone, size and motion are drawn independently of it,
so that two objects of one class are told apart by little more than their paths.

`Difficulty` makes scenes harder in one respect or several: objects hidden for some frames behind a cover, objects that look alike,
faster and blurred ones, changes of light or texture, frames lost in noise. Everything random is drawn from a numpy Generator, `rng`.
"""

import math
from colorsys import hsv_to_rgb
from dataclasses import dataclass, replace

import numpy as np

RETURNING_SHARE = 0.35  # of the objects leave the frame and come back; the others cross it


# ---- Shapes and textures ----

def pointed(x, y, points, notch):
    """Signed distance to a figure with so many tips at radius 1 and notches between them at radius notch."""
    sector = 2 * math.pi / points
    # Folding the plane onto half a sector leaves one piece of outline: the line from a tip to its notch.
    angle, radius = np.abs((np.arctan2(y, x) + sector / 2) % sector - sector / 2), np.hypot(x, y)
    rise, run = notch * math.sin(sector / 2), 1 - notch * math.cos(sector / 2)
    return ((radius * np.cos(angle) - 1) * rise + radius * np.sin(angle) * run) / math.hypot(rise, run)


def bar(x, y):
    """Signed distance to a bar along x."""
    return np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.31)


# Signed distance to the outline, negative inside, at object coordinates, which put the farthest tip at 1.
SHAPES = {
    "disc": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: pointed(x, y, points=4, notch=math.cos(math.pi / 4)),
    "triangle": lambda x, y: pointed(x, y, points=3, notch=math.cos(math.pi / 3)),
    "star": lambda x, y: pointed(x, y, points=5, notch=0.48),
    "cross": lambda x, y: np.minimum(bar(x, y), bar(y, x)),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.74) - 0.26,
}
CATEGORIES = tuple(SHAPES)  # category id = position + 1

# The sign, at object coordinates stretched to radians, chooses one of the two colours of the object.
TEXTURES = {
    "stripes": lambda x, y: np.sin(x),
    "checks": lambda x, y: np.sin(x) * np.sin(y),
    "dots": lambda x, y: np.cos(x) + np.cos(y) - 0.5,
    # Waves bent by other waves no longer look regular.
    "blotches": lambda x, y: (np.sin(0.7 * x + 1.6 * np.sin(0.6 * y)) +
                              np.sin(0.6 * y + 1.4 * np.sin(0.8 * x))),
}


# ---- Difficulties ----

@dataclass(frozen=True)
class Difficulty:
    """What makes a video harder, each on its own; the defaults leave it as easy as it was."""
    occluded: float = 0.0             # share of the objects that are hidden altogether for a while, each behind a cover of its own
    occluded_frames: tuple = (3, 8)   # how long, fewest and most frames
    look_alike: float = 0.0           # share of the objects that have class, colours, texture and size of the one before
    returning: float = RETURNING_SHARE
    speed: float = 1.0                # factor of the objects' speed
    blur: float = 0.0                 # share of the way to the next frame that is smeared, as by an open shutter
    light: float = 0.0                # share of the videos in which the light changes from one frame to the next, once
    texture: float = 0.0              # share of the objects whose texture does
    noisy: float = 0.0                # share of the frames that are lost in noise, in bursts of one to three
    noise: float = 70.0               # its standard deviation, grey levels

    def check(self):
        """Raise a ValueError that names the first impossible value."""
        for name in ("occluded", "look_alike", "returning", "blur", "light", "texture", "noisy"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"The difficulty {name} is a share from 0 to 1, not {getattr(self, name)}.")
        if not 1 <= self.occluded_frames[0] <= self.occluded_frames[-1] or len(self.occluded_frames) != 2:
            raise ValueError(f"occluded_frames must be (fewest, most) with 1 <= fewest <= most, not {self.occluded_frames}.")
        if self.speed <= 0 or self.noise < 0:
            raise ValueError(f"speed must be above 0 and noise not below, not {self.speed} and {self.noise}.")


# ---- Paths: (T, 2) float centres (x, y) in pixels, moving about 1 to 6 pixels a frame at width 160 ----

def crossing_path(rng, frames, height, width, speed_factor=1.0):
    """Cross the frame, straight or swinging, through a point of its middle, where the other paths meet it."""
    middle = rng.uniform(0.25, 0.75, 2) * (width, height)
    clock = np.arange(frames) - rng.uniform(0.3, 0.7) * frames
    heading = rng.uniform(0, 2 * np.pi)
    # The cap keeps the objects of long videos from spending most of the time outside the frame.
    speed = min(speed_factor * rng.uniform(0.010, 0.034), 1.2 / frames)
    path = middle + clock[:, None] * speed * (width * np.cos(heading), height * np.sin(heading))
    swing = rng.choice([0, rng.uniform(0.08, 0.16)]) * height
    path[:, 1] += swing * np.sin(2 * np.pi * clock / rng.uniform(18, 30))
    return path


def returning_path(rng, frames, height, width, radius, speed_factor=1.0):
    """Slide along one border, leave through it, and come back."""
    inside, outside = rng.uniform(0.8, 1.4) * radius, rng.uniform(1.25, 1.6) * radius
    # A bell curve is steepest at 0.86 x its height / its duration: this duration bounds the speed.
    duration = 0.86 * (inside + outside) / (speed_factor * rng.uniform(0.025, 0.035) * width)
    clock = np.arange(frames) - rng.uniform(0.3, 0.7) * frames
    depth = inside - (inside + outside) * np.exp(-(clock / duration) ** 2)
    path = crossing_path(rng, frames, height, width, speed_factor)
    axis = rng.integers(2)
    path[:, axis] = depth if rng.random() < 0.5 else (width, height)[axis] - depth
    return path


# ---- Scenes ----

@dataclass(frozen=True)
class MovingObject:
    """One object and its whole trajectory over T frames."""
    category_id: int        # 1 .. len(CATEGORIES)
    centres: np.ndarray     # (T, 2) float, (x, y) in pixels, may lie outside the frame
    radii: np.ndarray       # (T,) float, pixels from the centre to the farthest tip
    angles: np.ndarray      # (T,) float, radians
    colours: np.ndarray     # (2, 3) float, RGB in 0 .. 255
    texture: str            # key of TEXTURES
    frequency: float        # texture radians per radius
    phase: np.ndarray       # (2,) float, texture radians
    changes_at: int | None = None  # frame from which the texture is another one
    later_texture: str = ""


def make_object(rng, frames, height, width, background_colour, difficulty=Difficulty()):
    """Draw a MovingObject at random, in colours that stand out against background_colour, (3,) RGB."""
    radius = rng.uniform(0.14, 0.26) * height
    breath = np.sin(2 * np.pi * np.arange(frames) / rng.uniform(20, 40) + rng.uniform(0, 2 * np.pi))
    if rng.random() < difficulty.returning:
        centres = returning_path(rng, frames, height, width, radius, difficulty.speed)
    else:
        centres = crossing_path(rng, frames, height, width, difficulty.speed)
    category_id = int(rng.integers(len(CATEGORIES))) + 1
    return MovingObject(
        category_id=category_id,
        centres=centres,
        radii=radius * (1 + rng.uniform(0, 0.15) * breath),
        angles=rng.uniform(0, 2 * np.pi) + rng.uniform(-0.08, 0.08) * np.arange(frames),
        colours=class_colours(rng, category_id, background_colour),
        texture=str(rng.choice(list(TEXTURES))),
        frequency=rng.uniform(5, 9),
        phase=rng.uniform(0, 2 * np.pi, 2),
    )


def class_colours(rng, category_id, background_colour, candidates=8):
    """The two colours of an object, (2, 3) float RGB: a bright and a dark tone of its class's hue.

    Of some random pairs, the one whose bright tone is farthest from the background's colour.
    """
    hues = (category_id - 1 + rng.uniform(-0.2, 0.2, candidates)) / len(CATEGORIES)
    bright = [hsv_to_rgb(hue, rng.uniform(0.7, 1), rng.uniform(0.8, 1)) for hue in hues]
    dark = [hsv_to_rgb(hue, rng.uniform(0.6, 1), rng.uniform(0.2, 0.45)) for hue in hues]
    colours = 255 * np.stack((bright, dark), 1)
    return colours[np.linalg.norm(colours[:, 0] - background_colour, axis=1).argmax()]


def make_harder(rng, things, height, width, difficulty):
    """The objects of a scene with look-alikes and changing textures, and the covers, MovingObjects too, that hide some of them."""
    things, covers = list(things), []
    for index, thing in enumerate(things):
        if index and rng.random() < difficulty.look_alike:
            seen = things[index - 1]
            thing = replace(seen, centres=thing.centres, angles=thing.angles)
        elif rng.random() < difficulty.texture:
            others = [texture for texture in TEXTURES if texture != thing.texture]
            thing = replace(thing, changes_at=int(rng.integers(1, max(2, len(thing.centres)))), later_texture=str(rng.choice(others)))
        things[index] = thing
        if rng.random() < difficulty.occluded:
            covers.append(make_cover(rng, thing, height, width, difficulty.occluded_frames))
    return things, covers


def make_cover(rng, thing, height, width, lengths):
    """A grey square that comes in front of the object, goes along with it for so many frames, which hide it whole, and leaves.

    It hides it where it would be in the frame, if there is such a time, and leaves it visible before and after if it can."""
    frames, clock = len(thing.centres), np.arange(len(thing.centres))
    length = min(int(rng.integers(lengths[0], lengths[1] + 1)), frames)
    inside = ((thing.centres >= 0) & (thing.centres < (width, height))).all(1)
    starts = np.arange(frames - length + 1)
    hidden = np.array([inside[start:start + length].sum() for start in starts])
    shown = np.array([inside[:start].any() and inside[start + length:].any() for start in starts])
    start = int(rng.choice(starts[2 * hidden + shown == (2 * hidden + shown).max()]))
    away = np.maximum(0, np.maximum(start - clock, clock - (start + length - 1)))  # frames from being in front
    radii = 1.5 * thing.radii + 2                                              # of the corners: the sides lie outside the object
    heading = rng.uniform(0, 2 * np.pi)
    side = np.where(clock < start, -1, 1) * away * 0.9 * radii                  # comes from one side, leaves to the other
    grey = rng.uniform(70, 180)
    return MovingObject(
        category_id=CATEGORIES.index("square") + 1,
        centres=thing.centres + side[:, None] * (np.cos(heading), np.sin(heading)),
        radii=radii,
        angles=np.full(frames, heading),
        colours=np.stack((np.full(3, grey), np.full(3, 0.8 * grey))),
        texture="checks",
        frequency=rng.uniform(8, 14),
        phase=rng.uniform(0, 2 * np.pi, 2),
    )


def make_degradation(rng, frames, difficulty):
    """What becomes of the T pictures: the light of every frame, (T, 3) float factors, and whether noise drowns it, (T,) bool."""
    light, lost = np.ones((frames, 3)), np.zeros(frames, dtype=bool)
    if rng.random() < difficulty.light:
        first = int(rng.integers(frames))
        light[first:] = rng.choice([rng.uniform(0.4, 0.6), rng.uniform(1.4, 1.8)]) * rng.uniform(0.85, 1.15, 3)
    while missing := round(difficulty.noisy * frames) - lost.sum():
        first, length = rng.integers(frames), rng.integers(1, 4)
        lost[first:first + min(length, missing)] = True
    return light, lost
