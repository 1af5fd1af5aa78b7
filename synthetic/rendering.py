"""Draws scenes: images and masks of the visible pixels.

The textured objects of scenes.py move over a textured background that drifts slowly. An object that
is occluded or outside the frame has no mask there. Such gaps are what the gated queries of
GRAtt-VIS have to survive.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from synthetic.scenes import (
    CATEGORIES,
    SHAPES,
    TEXTURES,
    Difficulty,
    make_degradation,
    make_harder,
    make_object,
)

MIN_VISIBLE_PIXELS = 12  # an object with fewer counts as not visible: no annotator would label it


# ---- Background ----


@dataclass(frozen=True)
class Background:
    """An image larger than a frame, over which the frames drift slowly."""

    picture: np.ndarray  # (rows, columns, 3) uint8
    corners: np.ndarray  # (T, 2) float, (x, y) in pixels: the top left corner of each frame
    height: int  # of a frame, pixels
    width: int

    def view(self, time):
        """The background of a frame, (H, W, 3) uint8.

        Bilinear, and identical to Pillow's affine transform, in half the time.
        """
        # Pixel centres. The additions are those of Pillow, for the same rounding.
        corner_x, corner_y = self.corners[time]
        x = np.arange(self.width) + 0.5 + corner_x - 0.5
        y = np.arange(self.height) + 0.5 + corner_y - 0.5
        left, top = int(x[0]), int(y[0])
        weight_x = np.repeat(x - (left + np.arange(self.width)), 3)
        weight_y = (y - (top + np.arange(self.height)))[:, None]

        crop = self.picture[top : top + self.height + 1, left : left + self.width + 1]
        crop = crop.reshape(self.height + 1, -1)
        # Interpolate along x, then along y: a + weight * (b - a).
        rows = np.subtract(crop[:, 3:], crop[:, :-3], dtype=float)
        rows *= weight_x
        rows += crop[:, :-3]
        view = rows[1:] - rows[:-1]
        view *= weight_y
        view += rows[:-1]
        return view.astype(np.uint8).reshape(self.height, self.width, 3)

    def estimate_colour(self):
        """An estimate of the mean colour of all frames, (3,) float, without rendering them.

        The error is a few hundredths of a grey level.
        """
        rows, columns, _ = self.picture.shape
        row_coverage = interval_coverage(rows, self.corners[:, 1], self.height)  # (T, rows)
        column_coverage = interval_coverage(columns, self.corners[:, 0], self.width)
        pixels = len(self.corners) * self.height * self.width
        weights = row_coverage.T @ column_coverage / pixels
        # Views are rounded down, by 0.5 on average.
        return np.tensordot(weights, self.picture.astype(float), 2) - 0.5


def interval_coverage(cells, begins, length):
    """How much of each of the cells [i, i + 1) lies in the intervals [begin, begin + length).

    begins: (T,). Returns (T, cells) in [0, 1].
    """
    cell = np.arange(cells)
    begin = begins[:, None]
    overlap = np.minimum(cell + 1 - begin, begin + length - cell)
    return np.clip(overlap, 0, 1)


def mean_colour(pictures):
    """The mean colour of images, (H, W, 3) uint8 each: (3,) float32."""
    total = np.zeros(3, dtype=np.float32)
    for picture in pictures:
        # Sequential sums, as in numpy's mean over all images at once: the choice of an object's
        # colour can depend on the last digits.
        values = np.ascontiguousarray(picture.reshape(-1, 3).T, dtype=np.float32)
        values[:, 0] += total
        total = np.add.accumulate(values, axis=1)[:, -1]
    pixels = np.float64(len(pictures) * pictures[0].size / 3)
    return (total / pixels).astype(np.float32)


def make_background(rng, frames, height, width):
    """A random Background of T frames."""
    margin = 0.04 * width
    border = int(np.ceil(margin)) + 2
    picture_size = (width + 2 * border, height + 2 * border)
    # A few large patches of colour and, with less contrast, small grains and a ripple.
    patches = smooth_noise(rng, 4, picture_size, contrast=45)
    grains = smooth_noise(rng, height // rng.integers(3, 7), picture_size, contrast=20)
    x = np.arange(picture_size[0])
    y = np.arange(picture_size[1])[:, None]
    direction, wavelength = rng.uniform(0, np.pi), rng.uniform(5, 12)
    distance = x * np.cos(direction) + y * np.sin(direction)
    ripple = np.sin(2 * np.pi * distance / wavelength)[..., None]
    picture = rng.uniform(60, 195, 3) + patches + grains + rng.uniform(3, 12) * ripple

    # The frames oscillate, so that they stay inside the image for any number of frames.
    turns = np.arange(frames)[:, None] / rng.uniform(40, 80, 2) + rng.uniform(0, 1, 2)
    corners = border + margin * np.sin(2 * np.pi * turns)
    return Background(picture.clip(0, 255).astype(np.uint8), corners, height, width)


def smooth_noise(rng, cells, size, contrast):
    """Coloured noise, (H, W, 3) float in -contrast .. contrast.

    cells: number of random values along the height. size: (W, H) in pixels.
    """
    columns = max(1, round(cells * size[0] / size[1]))
    coarse = Image.fromarray(rng.integers(0, 256, (cells, columns, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))
    return (smooth / 127.5 - 1) * contrast


# ---- Objects ----


def draw_object(image, thing, time, centre=None):
    """Draw an object onto an image, (H, W, 3) float32, in place.

    centre: (x, y) in pixels instead of the object's centre in that frame.
    Returns the mask, (H, W) bool.
    """
    height, width = image.shape[:2]
    mask = np.zeros((height, width), dtype=bool)
    centre_x, centre_y = thing.centres[time] if centre is None else centre
    radius, angle = thing.radii[time], thing.angles[time]
    # Only the square around the object is computed. It is empty if the object is outside.
    top, bottom = pixel_range(centre_y, radius, height)
    left, right = pixel_range(centre_x, radius, width)
    if top == bottom or left == right:
        return mask
    # Object coordinates: relative to the centre, in radii, rotated.
    y = (np.arange(top, bottom)[:, None] - centre_y) / radius
    x = (np.arange(left, right) - centre_x) / radius
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = cos * x + sin * y, cos * y - sin * x

    distance = SHAPES[CATEGORIES[thing.category_id - 1]](x, y) * radius
    # The pixels on the outline are covered in part, for antialiasing.
    coverage = np.minimum(np.maximum(0.5 - distance, 0), 1)
    colour = object_colour(thing, x, y, time)
    window = image[top:bottom, left:right].transpose(2, 0, 1)
    window += coverage * (colour - window)
    mask[top:bottom, left:right] = distance < 0
    return mask


def pixel_range(centre, radius, side):
    """The pixels around an object along one axis, (begin, end), clipped to the image."""
    begin, end = centre - radius - 1, centre + radius + 2
    return int(min(max(begin, 0), side)), int(min(max(end, 0), side))


def object_colour(thing, x, y, time):
    """The texture of an object at object coordinates: (3, h, w) float RGB."""
    changed = thing.changes_at is not None and time >= thing.changes_at
    texture = TEXTURES[thing.later_texture if changed else thing.texture]
    texture_x = x * thing.frequency + thing.phase[0]
    texture_y = y * thing.frequency + thing.phase[1]
    blend = np.minimum(np.maximum(0.5 + 2 * texture(texture_x, texture_y), 0), 1)
    bright, dark = thing.colours[..., None, None]
    return bright * blend + dark * (1 - blend)


def draw_blurred(image, thing, time, blur, samples=5):
    """`draw_object` with motion blur: the mean over positions during the exposure.

    Returns the mask of the middle position.
    """
    if not blur:
        return draw_object(image, thing, time)
    last = len(thing.centres) - 1
    before = thing.centres[max(time - 1, 0)]
    after = thing.centres[min(time + 1, last)]
    total = np.zeros_like(image)
    masks = []
    for share in np.linspace(-0.5, 0.5, samples):
        centre = thing.centres[time] + share * blur * (after - before) / 2
        copy = image.copy()
        masks.append(draw_object(copy, thing, time, centre))
        total += copy
    np.divide(total, samples, out=image)
    return masks[samples // 2]


def draw_scene(image, things, covers, time, blur):
    """Draw all objects and covers of a frame onto an image, (H, W, 3) float32, in place.

    Returns the masks of the visible pixels of the objects, (I, H, W) bool.
    """
    masks = np.zeros((len(things), *image.shape[:2]), dtype=bool)
    for index, thing in enumerate([*things, *covers]):  # from back to front
        drawn = draw_blurred(image, thing, time, blur)
        masks[:index] &= ~drawn
        if index < len(things):
            masks[index] = drawn
    for mask in masks:
        if np.count_nonzero(mask) < MIN_VISIBLE_PIXELS:
            mask[:] = False
    return masks


# ---- Videos ----


def make_video(rng, frames, height, width, objects, difficulty=Difficulty(), only=None):
    """Generate a random scene. The same state of rng gives the same scene.

    Args:
        rng: numpy Generator.
        objects: (minimum, maximum) number of objects, both inclusive.
        only: frame numbers to render; much faster than the whole video. The frames are those of
            the whole video, except that an object may have other colours if two candidates
            contrast with the background equally well, to a few hundredths of a grey level (not
            once in 10,000 objects): the colour of the background is then an estimate. The chosen
            frames may show no object.

    Returns the images, (T, H, W, 3) uint8 RGB, and a list of instances (category_id, masks). Masks
    are (T, H, W) bool, of the visible pixels. Objects that are never visible are left out; at
    least one object is visible in the whole video.

    Raises ValueError for numbers out of range.
    """
    check_scene(frames, height, width, objects)
    difficulty.check()
    times = chosen_times(frames, only)
    # The difficulties have a generator of their own, so that they do not change the scene.
    difficulty_rng = rng.spawn(1)[0]
    background = make_background(rng, frames, height, width)
    views = {time: background.view(time) for time in times}
    if only is None:
        background_colour = mean_colour([*views.values()])
    else:
        background_colour = background.estimate_colour()

    visible = False
    while not visible:  # draw again if all objects are outside the frame all the time
        count = rng.integers(objects[0], objects[1] + 1)
        things = [
            make_object(rng, frames, height, width, background_colour, difficulty)
            for _ in range(count)
        ]
        things, covers = make_harder(difficulty_rng, things, height, width, difficulty)
        images = {time: view.astype(np.float32) for time, view in views.items()}
        masks = {
            time: draw_scene(image, things, covers, time, difficulty.blur)
            for time, image in images.items()
        }
        visible = any(frame_masks.any() for frame_masks in masks.values())
        if not visible and only is not None:
            visible = any_visible(things, covers, frames, height, width)

    degrade(images, difficulty_rng, frames, difficulty)
    rendered = np.stack([images[time].round().clip(0, 255).astype(np.uint8) for time in times])
    tracks = np.stack([masks[time] for time in times], 1)
    categories = [thing.category_id for thing in things]
    return rendered, [pair for pair in zip(categories, tracks) if pair[1].any()]


def chosen_times(frames, only):
    """The frame numbers to render; ValueError if one is out of range."""
    times = range(frames) if only is None else only
    if not times or not 0 <= min(times) <= max(times) < frames:
        raise ValueError(f"only must hold frame numbers from 0 to {frames - 1}, not {only}.")
    return times


def any_visible(things, covers, frames, height, width):
    """Whether any frame of the video shows an object."""
    return any(
        draw_scene(np.zeros((height, width, 3), np.float32), things, covers, time, blur=0).any()
        for time in range(frames)
    )


def degrade(images, rng, frames, difficulty):
    """Apply changes of light and noise to images, {time: (H, W, 3) float32}, in place."""
    light, noisy = make_degradation(rng, frames, difficulty)
    for time in range(max(images) + 1):
        # Noise is drawn for the other frames too, because later noise depends on it.
        if noisy[time]:
            shape = next(iter(images.values())).shape
            noise = rng.normal(0, difficulty.noise, shape)
        if time not in images:
            continue
        if (light[time] != 1).any():
            images[time] *= light[time]
        if noisy[time]:
            images[time] += noise


def check_scene(frames, height, width, objects):
    """Raise ValueError if no scene has these numbers."""
    if frames < 1:
        raise ValueError(f"A video needs at least 1 frame, not {frames}.")
    if min(height, width) < 32:
        raise ValueError(f"Height and width must be at least 32 pixels, not {height} and {width}.")
    if len(objects) != 2 or not 1 <= objects[0] <= objects[1]:
        raise ValueError(
            f"objects must be (minimum, maximum) with 1 <= minimum <= maximum, not {objects}."
        )
