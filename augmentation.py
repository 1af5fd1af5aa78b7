"""Augmentation of training clips.

Resizing, flips and large-scale jitter are the same for all frames of a clip. Crops and rotations
drift over the frames, like a moving camera. train.py's flags make an Augmentation, and
clips.make_clip applies it. Frames are uint8 RGB, masks are bool (True = instance).

Upstream: vita/data/augmentation.py. The defaults here are upstream's defaults; recipes.py has the
settings of the configuration files. Letters: T frames, I instances, H, W.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from batching import short_side_size

MAX_CROP_LONG_SIDE = 1333  # pixels, of the image that is cropped
ROTATION_CENTRE = (0.4, 0.6)  # range of the centre, as a share of height and width
LSJ_SCALES = (0.1, 2.0)  # range of the large-scale jitter
LSJ_PADDING = 128  # grey level


@dataclass
class Augmentation:
    """Random augmentation of a clip.

    With probability 0.5, if crop_short_sides are given, crop: resize to one of crop_short_sides,
    and cut out a window of random size that drifts over the clip. Then resize to one of
    short_sides, flip horizontally with probability 0.5, and rotate.

    With lsj_size, large-scale jitter (arXiv 2012.07177) replaces crop and resize: flip, rotate,
    resize by a factor of 0.1 to 2 relative to a square of lsj_size pixels, and crop or pad to the
    square.

    At the end, with probability `occlude`, cover an instance in some frames.
    """

    short_sides: tuple[int, ...]  # pixels
    max_long_side: int = 1333  # pixels
    crop_short_sides: tuple[int, ...] = ()  # pixels; empty = no crop
    crop_size: tuple[float, float] = (384, 600)  # pixels, range of both sides, at most the image's
    crop_relative: bool = False  # crop_size is the minimum share of height and width
    flip: bool = True
    rotation: float = 0  # maximum angle in degrees; 0 = none
    lsj_size: int = 0  # pixels; 0 = no large-scale jitter
    occlude: float = 0  # probability that an instance is occluded in some frames

    def __call__(
        self, frames: tv_tensors.Video, masks: tv_tensors.Mask, generator: np.random.Generator
    ) -> tuple[tv_tensors.Video, tv_tensors.Mask]:
        """Augment frames, uint8 (T, 3, H, W), and masks, bool (I, T, H, W)."""
        if not self.lsj_size:
            frames, masks = self.crop_and_resize(frames, masks, generator)
        if self.flip and generator.random() < 0.5:
            frames = transforms.horizontal_flip(frames)
            masks = transforms.horizontal_flip(masks)
        if self.rotation:
            frames, masks = self.rotate(frames, masks, generator)
        if self.lsj_size:
            frames, masks = self.large_scale_jitter(frames, masks, generator)
        if self.occlude and generator.random() < self.occlude:
            frames, masks = occlude_instance(frames, masks, generator)
        return frames, masks

    def crop_and_resize(self, frames, masks, generator: np.random.Generator):
        """Crop with probability 0.5, then resize to one of short_sides."""
        if self.crop_short_sides and generator.random() < 0.5:
            short_side = generator.choice(self.crop_short_sides)
            frames, masks = self.resize(frames, masks, short_side, MAX_CROP_LONG_SIDE)
            frames, masks = self.crop(frames, masks, generator)
        short_side = generator.choice(self.short_sides)
        return self.resize(frames, masks, short_side, self.max_long_side)

    def resize(self, frames, masks, short_side: int, max_long_side: int):
        """Resize to a short side in pixels, or smaller to respect max_long_side."""
        height, width = frames.shape[-2:]
        size = short_side_size(height, width, short_side, max_long_side)
        return resize_to(frames, masks, size)

    def crop(self, frames, masks, generator: np.random.Generator):
        """Crop a window of one size, which moves straight down and right over the clip, or back."""
        sides = np.array(frames.shape[-2:])
        height, width = self.window_size(sides, generator)
        room = sides - (height, width)
        start = generator.integers(0, room + 1)
        end = generator.integers(start, room + 1)
        progress = monotonic(generator.random(len(frames)), generator)
        corners = np.rint(start + (end - start) * progress[:, None]).astype(int)
        windows = [(slice(top, top + height), slice(left, left + width)) for top, left in corners]
        # Channels last in memory, which is faster to resize.
        pictures = frames.permute(0, 2, 3, 1)
        frames = torch.stack([picture[window] for picture, window in zip(pictures, windows)])
        masks = torch.stack(
            [masks[:, t, rows, columns] for t, (rows, columns) in enumerate(windows)], 1
        )
        return tv_tensors.Video(frames.permute(0, 3, 1, 2)), tv_tensors.Mask(masks)

    def window_size(self, sides: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The size of a crop, (height, width) in pixels, of an image of the given size."""
        if self.crop_relative:
            size = (sides * generator.uniform(self.crop_size, 1) + 0.5).astype(int)
        else:
            smallest, largest = self.crop_size
            size = [
                generator.integers(min(side, smallest), min(side, largest) + 1) for side in sides
            ]
        return np.maximum(size, 1)  # a share can round to 0

    def rotate(self, frames, masks, generator: np.random.Generator):
        """Rotate about one centre by an angle that drifts over the clip; the corners are black."""
        height, width = frames.shape[-2:]
        x, y = generator.uniform(*ROTATION_CENTRE, 2) * (width, height)
        centre = [float(x), float(y)]
        angles = generator.uniform(-self.rotation, self.rotation, len(frames))
        angles = monotonic(angles, generator)
        frames = torch.stack(
            [
                transforms.rotate_image(frame, angle, InterpolationMode.BILINEAR, center=centre)
                for frame, angle in zip(frames.as_subclass(Tensor), angles)
            ]
        )
        pictures = masks.as_subclass(Tensor).view(torch.uint8)
        masks = torch.stack(
            [
                transforms.rotate_image(
                    pictures[:, t], angle, InterpolationMode.NEAREST, center=centre
                )
                for t, angle in enumerate(angles)
            ],
            1,
        )
        return tv_tensors.Video(frames), tv_tensors.Mask(masks.view(torch.bool))

    def large_scale_jitter(self, frames, masks, generator: np.random.Generator):
        """Resize by one random scale and crop one window; pad on the right and at the bottom."""
        side = self.lsj_size
        sides = np.array(frames.shape[-2:])
        scale = side * generator.uniform(*LSJ_SCALES) / sides.max()
        size = np.maximum(np.rint(sides * scale), 1).astype(int)
        frames, masks = resize_to(frames, masks, size.tolist())
        top, left = np.rint(np.maximum(size - side, 0) * generator.random()).astype(int)
        window = (..., slice(top, top + side), slice(left, left + side))
        frames = frames.as_subclass(Tensor)[window]
        masks = masks.as_subclass(Tensor)[window]
        height, width = frames.shape[-2:]
        padding = [0, 0, side - width, side - height]  # left, top, right, bottom
        frames = transforms.pad_image(frames, padding, fill=LSJ_PADDING)
        masks = transforms.pad_image(masks.view(torch.uint8), padding).view(torch.bool)
        return tv_tensors.Video(frames), tv_tensors.Mask(masks)


def occlude_instance(frames, masks, generator: np.random.Generator):
    """Cover the box of one instance in some consecutive frames, but not in the first.

    The cover has one random colour; what lies under it is in no mask. Not upstream; DVIS-DAQ (arXiv
    2404.00086) simulates disappearing objects as well, by other means.
    """
    first = generator.integers(1, max(2, len(frames)))
    last = generator.integers(first, max(first + 1, len(frames)))
    instance = generator.integers(max(1, len(masks)))
    colour = torch.from_numpy(generator.integers(0, 256, (3, 1, 1), dtype=np.uint8))
    frames, masks = frames.as_subclass(Tensor).clone(), masks.as_subclass(Tensor).clone()
    for frame, mask in zip(frames[first : last + 1], masks.transpose(0, 1)[first : last + 1]):
        rows, columns = torch.nonzero(mask[instance : instance + 1].any(0), as_tuple=True)
        if len(rows):
            box = (..., slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
            frame[box] = colour
            mask[box] = False
    return tv_tensors.Video(frames), tv_tensors.Mask(masks)


def monotonic(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The values in ascending or descending order, with equal probability."""
    return np.sort(values)[:: generator.choice((1, -1))]


def resize_to(frames, masks, size: tuple[int, int]):
    """Resize frames bilinearly, and masks to the nearest pixel centre.

    Mode "nearest" alone would be off by half a pixel. Masks are resized as images, because some
    torchvision versions always resize a Mask with "nearest".
    """
    pictures = masks.as_subclass(Tensor).view(torch.uint8)
    frames = transforms.resize(frames, size, InterpolationMode.BILINEAR, antialias=True)
    masks = transforms.resize_image(pictures, size, InterpolationMode.NEAREST_EXACT)
    return frames, tv_tensors.Mask(masks.view(torch.bool))
