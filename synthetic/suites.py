"""Synthetic videos for training and testing where no real data set is at hand: those of scenes.py, painted and written.

A few textured shapes move, cross, hide one another, leave the frame and come back, over a textured background that drifts
slowly. The masks hold the visible pixels only: an object that is hidden or outside the frame has none there. Such gaps are what the
gated queries of GRAtt-VIS have to survive. `SUITES` names the settings that results are compared on.

A set is written in the YouTube-VIS format, so the rest of the code reads it like the real one:

    root/train.json   root/train/JPEGImages/<video>/00000.jpg ...
    root/valid.json   root/valid/JPEGImages/<video>/00000.jpg ...

Launch it through the data module:

    python data.py --root datasets/synthetic
    python data.py --suite occlusion --root datasets/occlusion
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from tqdm import tqdm

from runtime.files import checksum
from synthetic.scenes import (
    CATEGORIES,
    SHAPES,
    TEXTURES,
    Difficulty,
    make_degradation,
    make_harder,
    make_object,
)

MIN_VISIBLE_PIXELS = 12  # fewer are a sliver that nobody could label: the object counts as absent
JPEG_QUALITY = 90
HEIGHT, WIDTH = 96, 160  # pixels, unless other sides are asked for


@dataclass(frozen=True)
class Suite:
    """A setting to compare results on: the scenes of a set."""
    difficulty: Difficulty = Difficulty()
    frames: int = 20
    objects: tuple = (1, 4)


SUITES = {
    "easy": Suite(),
    "occlusion": Suite(Difficulty(occluded=0.7, occluded_frames=(3, 10)), frames=24),
    "look-alike": Suite(Difficulty(look_alike=0.8), objects=(2, 4)),
    "degraded": Suite(Difficulty(blur=0.7, light=0.5, texture=0.3, noisy=0.2)),
    "long": Suite(Difficulty(occluded=0.5, occluded_frames=(5, 20), returning=0.6), frames=100),
}


# ---- Painting ----

@dataclass(frozen=True)
class Background:
    """A picture larger than a frame, over which the frames drift slowly."""
    picture: np.ndarray     # (rows, columns, 3) uint8
    corners: np.ndarray     # (T, 2) float, (x, y) in pixels: where in the picture each frame begins
    height: int             # of a frame, pixels
    width: int

    def view(self, time):
        """The background of that frame, (H, W, 3) uint8, bilinear: what Pillow's affine transform gives, in half the time."""
        # Places of the pixel centres, in Pillow's order of operations, for the last digits.
        x, y = (np.arange(side) + 0.5 + corner - 0.5 for side, corner in zip((self.width, self.height), self.corners[time]))
        left, top = int(x[0]), int(y[0])
        to_right, down = np.repeat(x - (left + np.arange(self.width)), 3), (y - (top + np.arange(self.height)))[:, None]
        part = self.picture[top:top + self.height + 1, left:left + self.width + 1].reshape(self.height + 1, -1)
        rows = np.subtract(part[:, 3:], part[:, :-3], dtype=float)
        rows *= to_right
        rows += part[:, :-3]
        view = rows[1:] - rows[:-1]
        view *= down
        view += rows[:-1]
        return view.astype(np.uint8).reshape(self.height, self.width, 3)

    def estimate_colour(self):
        """mean_colour of all frames, (3,) float, to a few hundredths of a grey level, without making them."""
        # How much of each column and row of the picture the frames see.
        columns, rows = (np.clip(np.minimum(np.arange(length) + 1 - begin, begin + side - np.arange(length)), 0, 1)
                         for length, begin, side in zip(self.picture.shape[1::-1], self.corners.T[..., None], (self.width, self.height)))
        seen = rows.T @ columns / (len(self.corners) * self.height * self.width)
        return np.tensordot(seen, self.picture.astype(float), 2) - 0.5  # views round down, by so much on average


def mean_colour(pictures):
    """The mean of pictures, (H, W, 3) uint8 each: (3,) float32."""
    total = np.zeros(3, dtype=np.float32)
    for picture in pictures:
        # Added one after another, as numpy does to all of them at once: the choice of a colour may hang on the last digits.
        values = np.ascontiguousarray(picture.reshape(-1, 3).T, dtype=np.float32)
        values[:, 0] += total
        total = np.add.accumulate(values, axis=1)[:, -1]
    return (total / np.float64(len(pictures) * pictures[0].size / 3)).astype(np.float32)


def make_background(rng, frames, height, width):
    """Draw the Background of T frames at random."""
    margin = 0.04 * width
    border = int(np.ceil(margin)) + 2
    picture_size = (width + 2 * border, height + 2 * border)
    # A few large patches of colour and, fainter, grains of a few pixels and a ripple.
    patches = smooth_noise(rng, 4, picture_size, contrast=45)
    grains = smooth_noise(rng, height // rng.integers(3, 7), picture_size, contrast=20)
    x, y = np.arange(picture_size[0]), np.arange(picture_size[1])[:, None]
    direction, wavelength = rng.uniform(0, np.pi), rng.uniform(5, 12)
    ripple = np.sin(2 * np.pi * (x * np.cos(direction) + y * np.sin(direction)) / wavelength)
    picture = rng.uniform(60, 195, 3) + patches + grains + rng.uniform(3, 12) * ripple[..., None]

    # Swinging, unlike drifting one way, never runs out of picture however long the video is.
    turns = np.arange(frames)[:, None] / rng.uniform(40, 80, 2) + rng.uniform(0, 1, 2)
    return Background(picture.clip(0, 255).astype(np.uint8), border + margin * np.sin(2 * np.pi * turns), height, width)


def smooth_noise(rng, cells, size, contrast):
    """Return coloured noise, (H, W, 3) float in -contrast .. contrast, with that many cells along the height.

    size is (W, H) in pixels."""
    columns = max(1, round(cells * size[0] / size[1]))
    coarse = Image.fromarray(rng.integers(0, 256, (cells, columns, 3), dtype=np.uint8))
    return (np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) / 127.5 - 1) * contrast


def draw_object(image, thing, time, centre=None):
    """Paint the object at that frame over image, (H, W, 3) float32, in place; return its (H, W) bool mask.

    centre, (x, y) in pixels, puts it elsewhere than it is."""
    height, width = image.shape[:2]
    mask = np.zeros((height, width), dtype=bool)
    centre_x, centre_y = thing.centres[time] if centre is None else centre
    radius, angle = thing.radii[time], thing.angles[time]
    # Only the square around the object is worth computing; it is empty when the object is outside the frame.
    top, bottom = (int(min(max(side, 0), height)) for side in (centre_y - radius - 1, centre_y + radius + 2))
    left, right = (int(min(max(side, 0), width)) for side in (centre_x - radius - 1, centre_x + radius + 2))
    if top == bottom or left == right:
        return mask
    y, x = (np.arange(top, bottom)[:, None] - centre_y) / radius, (np.arange(left, right) - centre_x) / radius
    x, y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x

    distance = SHAPES[CATEGORIES[thing.category_id - 1]](x, y) * radius
    texture = thing.texture if thing.changes_at is None or time < thing.changes_at else thing.later_texture
    pattern_x, pattern_y = x * thing.frequency + thing.phase[0], y * thing.frequency + thing.phase[1]
    blend = np.minimum(np.maximum(0.5 + 2 * TEXTURES[texture](pattern_x, pattern_y), 0), 1)
    bright, dark = thing.colours[..., None, None]
    colour = bright * blend + dark * (1 - blend)  # (3, h, w): a channel at a time is faster
    # Pixels that the outline cuts are covered in part, which keeps the drawn edge from looking like stairs.
    coverage = np.minimum(np.maximum(0.5 - distance, 0), 1)
    window = image[top:bottom, left:right].transpose(2, 0, 1)
    window += coverage * (colour - window)
    mask[top:bottom, left:right] = distance < 0
    return mask


def draw_blurred(image, thing, time, blur, samples=5):
    """draw_object with an open shutter: the mean of the object in so many places of its way; the mask is that of the middle."""
    if not blur:
        return draw_object(image, thing, time)
    before, after = (thing.centres[np.clip(time + step, 0, len(thing.centres) - 1)] for step in (-1, 1))
    total, masks = np.zeros_like(image), []
    for share in np.linspace(-0.5, 0.5, samples):
        copy = image.copy()
        masks.append(draw_object(copy, thing, time, thing.centres[time] + share * blur * (after - before) / 2))
        total += copy
    np.divide(total, samples, out=image)
    return masks[samples // 2]


def draw_scene(image, things, covers, time, blur):
    """Paint all objects at that frame over image, (H, W, 3) float32, in place; return the masks of `things`, (I, H, W) bool."""
    masks = np.zeros((len(things), *image.shape[:2]), dtype=bool)
    for index, thing in enumerate([*things, *covers]):  # from the farthest to the nearest
        drawn = draw_blurred(image, thing, time, blur)
        masks[:index] &= ~drawn
        if index < len(things):
            masks[index] = drawn
    for mask in masks:
        if np.count_nonzero(mask) < MIN_VISIBLE_PIXELS:
            mask[:] = False
    return masks


def make_video(rng, frames, height, width, objects, difficulty=Difficulty(), only=None):
    """Draw one scene at random; the same state of rng, a numpy Generator, gives the same scene.

    objects is the range (fewest, most), both included, from which the number of objects is drawn.
    Returns the images, (T, H, W, 3) uint8 RGB, and the list of instances (category_id, masks), masks being
    (T, H, W) bool of the visible pixels. Objects that no frame shows are left out; at least one is shown.

    only, a list of frame numbers, paints those alone, in much less time; perhaps they show no object. They are as in the whole
    video, but for an object (none of 10,000 tried) for which two pairs of colours stand out alike, to a few hundredths of a grey
    level: it may have the other pair, since the colour of the background is estimated. Raises ValueError for impossible numbers."""
    check_scene(frames, height, width, objects)
    difficulty.check()
    wanted = range(frames) if only is None else only
    if not wanted or not 0 <= min(wanted) <= max(wanted) < frames:
        raise ValueError(f"only must hold frame numbers from 0 to {frames - 1}, not {only}.")
    hard = rng.spawn(1)[0]  # chance of its own: a scene made harder is still the same scene
    background = make_background(rng, frames, height, width)
    views = {time: background.view(time) for time in wanted}
    background_colour = mean_colour([*views.values()]) if only is None else background.estimate_colour()
    shown = False
    while not shown:  # chance may put every object outside the frame all the time: draw them again
        count = rng.integers(objects[0], objects[1] + 1)
        things = [make_object(rng, frames, height, width, background_colour, difficulty) for _ in range(count)]
        things, covers = make_harder(hard, things, height, width, difficulty)
        images = {time: view.astype(np.float32) for time, view in views.items()}
        masks = {time: draw_scene(image, things, covers, time, difficulty.blur) for time, image in images.items()}
        shown = any(seen.any() for seen in masks.values()) or only is not None and any(
            draw_scene(np.zeros((height, width, 3), np.float32), things, covers, time, blur=0).any() for time in range(frames))

    light, lost = make_degradation(hard, frames, difficulty)
    for time in range(max(wanted) + 1):
        # Noise is drawn for frames that are not wanted too: that of the later ones depends on it.
        noise = hard.normal(0, difficulty.noise, (height, width, 3)) if lost[time] else None
        if time in images and (light[time] != 1).any():
            images[time] *= light[time]
        if time in images and lost[time]:
            images[time] += noise
    painted = np.stack([images[time].round().clip(0, 255).astype(np.uint8) for time in wanted])
    masks = np.stack([masks[time] for time in wanted], 1)
    return painted, [(thing.category_id, seen) for thing, seen in zip(things, masks) if seen.any()]


# ---- Files ----

def make_dataset(root, train_videos=240, valid_videos=24, frames=20, height=HEIGHT, width=WIDTH, objects=(1, 4),
                 seed=0, difficulty=Difficulty()):
    """Write a data set of two splits to the folder root, which must be empty or not exist yet.

    frames is the length of each video; height and width are in pixels; objects is the range (fewest, most) of
    objects in a video. A set with more videos begins with the videos of a smaller one of the same seed.
    Raises ValueError for impossible numbers and FileExistsError rather than overwrite anything."""
    check_scene(frames, height, width, objects)
    difficulty.check()
    if min(train_videos, valid_videos) < 1:
        raise ValueError(f"Each split needs at least 1 video, not {train_videos} and {valid_videos}.")
    root = Path(root).resolve()
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise FileExistsError(f"{root} exists and is not an empty folder: remove it or choose another one.")

    root.parent.mkdir(parents=True, exist_ok=True)
    # Build it next to its place and move it there when whole: an interrupted run leaves no half-made set.
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        draft, instances = Path(scratch) / root.name, 0
        for split_index, (split, videos) in enumerate([("train", train_videos), ("valid", valid_videos)]):
            # One generator per video: neither the number of videos nor the other split changes a scene.
            generators = (np.random.default_rng((seed, split_index, index)) for index in range(videos))
            scenes = (make_video(rng, frames, height, width, objects, difficulty) for rng in generators)
            instances += write_split(draft, split, tqdm(scenes, desc=split, total=videos, unit="video"), difficulty)
        try:
            draft.rename(root)  # also onto an empty folder
        except OSError as error:
            raise FileExistsError(f"{root} was made by another process meanwhile.") from error
    print(f"{root}: {train_videos} train + {valid_videos} valid videos of {frames} frames, "
          f"{width} x {height} pixels, {instances} instances; valid.json has the checksum {checksum(root / 'valid.json')}.")


def check_scene(frames, height, width, objects):
    """Raise a ValueError that says which of the numbers describes no possible scene."""
    if frames < 1:
        raise ValueError(f"A video needs at least 1 frame, not {frames}.")
    if min(height, width) < 32:
        raise ValueError(f"Height and width must be at least 32 pixels, not {height} and {width}.")
    if len(objects) != 2 or not 1 <= objects[0] <= objects[1]:
        raise ValueError(f"objects must be (fewest, most) with 1 <= fewest <= most, not {objects}.")


def write_split(folder, split, scenes, difficulty=Difficulty()):
    """Write the images and the JSON of scenes, as make_video returns them; return the number of instances."""
    videos, annotations = [], []
    for index, (images, instances) in enumerate(scenes):
        length, height, width, _ = images.shape
        name = f"{index:05d}"
        file_names = [f"{name}/{time:05d}.jpg" for time in range(length)]
        videos.append({"id": index + 1, "width": width, "height": height, "length": length,
                       "file_names": file_names})
        image_folder = folder / split / "JPEGImages"
        (image_folder / name).mkdir(parents=True)
        for image, file_name in zip(images, file_names):
            Image.fromarray(image).save(image_folder / file_name, quality=JPEG_QUALITY)
        for category_id, masks in instances:
            annotations.append(describe_instance(len(annotations) + 1, index + 1, category_id, masks))
    content = {
        "info": {"description": "Moving textured shapes", "split": split} | (
            {"difficulty": asdict(difficulty)} if difficulty != Difficulty() else {}),
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(CATEGORIES)],
        "videos": videos,
        "annotations": annotations,
    }
    (folder / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return len(annotations)


def describe_instance(annotation_id, video_id, category_id, masks):
    """Return the YouTube-VIS entry of an instance, masks (T, H, W) bool; None stands for an absent frame."""
    length, height, width = masks.shape
    codes = rle.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8))
    areas, boxes = rle.area(codes).tolist(), rle.toBbox(codes).tolist()
    texts = [{"size": code["size"], "counts": code["counts"].decode("ascii")} for code in codes]
    return {
        "id": annotation_id, "video_id": video_id, "category_id": category_id, "iscrowd": 0,
        "width": width, "height": height, "length": length,
        "bboxes": [box if area else None for box, area in zip(boxes, areas)],
        "segmentations": [text if area else None for text, area in zip(texts, areas)],
        "areas": [area or None for area in areas],
    }
