"""Augmentation of training clips: what happens to all frames alike, and what drifts over them as a camera would.

Upstream: vita/data/augmentation.py; its defaults are here, its settings a recipe's. train.py's flags make an Augmentation and
clips.make_clip applies it to every clip. Frames stay uint8 RGB, masks bool (True = instance); letters as in data.py.
"""
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

CROP_LONG_SIDE = 1333                           # pixels, of a picture before a crop
CENTRE = (0.4, 0.6)                             # of a rotation: anywhere in this part of the picture, both ways
JITTER = (0.1, 2.0)                             # scales of the large-scale jitter
PADDING = 128                                   # grey level around a picture that jitter made small


def short_side_size(height: int, width: int, short_side: int, max_long_side: int) -> tuple[int, int]:
    """(height, width) with the short side at `short_side`, unless the long one would exceed
    `max_long_side`; at least one pixel each."""
    scale = short_side / min(height, width)
    if max(height, width) * scale > max_long_side:
        scale = max_long_side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


@dataclass
class Augmentation:
    """What may happen to a clip, to all of its frames alike or drifting over them.

    With probability one half a crop: resize to one of crop_short_sides, then cut a window of a random size in crop_size
    that drifts over the clip. Then resize to one of short_sides, then flip left to right in half of the clips, then rotate.

    With `jitter`, instead: flip, rotate, and put the picture, 0.1 to 2 times as large as would fit, into a square of `jitter`
    pixels (large-scale jitter, arXiv 2012.07177).
    """
    short_sides: tuple[int, ...]                # pixels
    max_long_side: int = 1333                   # pixels
    crop_short_sides: tuple[int, ...] = ()      # pixels; empty = no crop
    crop_size: tuple[float, float] = (384, 600) # pixels, smallest and largest side of the window; or see crop_relative
    crop_relative: bool = False                 # crop_size is the smallest share of height and width instead
    flip: bool = True
    rotation: float = 0                         # degrees at most, either way; 0 = none
    jitter: int = 0                             # pixels; 0 = none

    def __call__(self, frames: tv_tensors.Video, masks: tv_tensors.Mask, generator: np.random.Generator):
        """frames uint8 (T, 3, H, W), masks (I, T, H, W) -> the same, augmented alike."""
        if not self.jitter:
            if self.crop_short_sides and generator.random() < 0.5:
                frames, masks = self.resize(frames, masks, generator.choice(self.crop_short_sides), CROP_LONG_SIDE)
                frames, masks = self.crop(frames, masks, generator)
            frames, masks = self.resize(frames, masks, generator.choice(self.short_sides), self.max_long_side)
        if self.flip and generator.random() < 0.5:
            frames, masks = transforms.horizontal_flip(frames), transforms.horizontal_flip(masks)
        if self.rotation:
            frames, masks = self.rotate(frames, masks, generator)
        return self.jitter_scale(frames, masks, generator) if self.jitter else (frames, masks)

    def resize(self, frames, masks, short_side: int, max_long_side: int):
        return resize_to(frames, masks, short_side_size(*frames.shape[-2:], short_side, max_long_side))

    def crop(self, frames, masks, generator: np.random.Generator):
        """One window size for the clip; its corner moves on a straight line, forwards or backwards."""
        sides = np.array(frames.shape[-2:])
        if self.crop_relative:
            size = (sides * generator.uniform(self.crop_size, 1) + 0.5).astype(int)
        else:
            size = [generator.integers(min(side, self.crop_size[0]), min(side, self.crop_size[1]) + 1) for side in sides]
        size = np.maximum(size, 1)                                 # a share can round to 0
        room = sides - size
        start = generator.integers(0, room + 1)
        end = generator.integers(start, room + 1)
        progress = np.sort(generator.random(len(frames)))[::generator.choice((1, -1))]
        corners = np.rint(start + (end - start) * progress[:, None]).astype(int)
        windows = [(slice(top, top + size[0]), slice(left, left + size[1])) for top, left in corners]
        pictures = frames.permute(0, 2, 3, 1)                      # a pixel's bytes side by side, which resizes faster
        frames = torch.stack([picture[window] for picture, window in zip(pictures, windows)]).permute(0, 3, 1, 2)
        masks = torch.stack([masks[:, t, rows, columns] for t, (rows, columns) in enumerate(windows)], 1)
        return tv_tensors.Video(frames), tv_tensors.Mask(masks)

    def rotate(self, frames, masks, generator: np.random.Generator):
        """About one centre; the angle grows over the clip, or shrinks. Black where there was no picture."""
        centre = [float(place * side) for place, side in zip(generator.uniform(*CENTRE, 2), frames.shape[:-3:-1])]   # x, y
        angles = np.sort(generator.uniform(-self.rotation, self.rotation, len(frames)))[::generator.choice((1, -1))]
        pictures = masks.as_subclass(Tensor).to(torch.uint8)
        turned = [transforms.rotate_image(frame, angle, InterpolationMode.BILINEAR, center=centre)
                  for frame, angle in zip(frames.as_subclass(Tensor), angles)]
        outlines = [transforms.rotate_image(pictures[:, t], angle, InterpolationMode.NEAREST, center=centre)
                    for t, angle in enumerate(angles)]
        return tv_tensors.Video(torch.stack(turned)), tv_tensors.Mask(torch.stack(outlines, 1).bool())

    def jitter_scale(self, frames, masks, generator: np.random.Generator):
        """One scale and one window for the clip; what is missing of the square is grey, to the right and below."""
        sides = np.array(frames.shape[-2:])
        size = np.maximum(np.rint(sides * (self.jitter * generator.uniform(*JITTER) / sides.max())), 1).astype(int)
        frames, masks = resize_to(frames, masks, size.tolist())
        top, left = np.rint(np.maximum(size - self.jitter, 0) * generator.random()).astype(int)
        window = (..., slice(top, top + self.jitter), slice(left, left + self.jitter))
        frames, masks = frames.as_subclass(Tensor)[window], masks.as_subclass(Tensor)[window]
        margins = [0, 0, self.jitter - frames.shape[-1], self.jitter - frames.shape[-2]]      # left, top, right, bottom
        return (tv_tensors.Video(transforms.pad_image(frames, margins, fill=PADDING)),
                tv_tensors.Mask(transforms.pad_image(masks.to(torch.uint8), margins).bool()))


def resize_to(frames, masks, size: tuple[int, int]):
    """Bilinear for frames; for masks the nearest pixel centre, which "nearest" alone would miss by half a pixel.

    As pictures, since some torchvision versions resize a Mask by "nearest" whatever they are asked.
    """
    pictures = masks.as_subclass(Tensor).to(torch.uint8)
    return (transforms.resize(frames, size, InterpolationMode.BILINEAR, antialias=True),
            tv_tensors.Mask(transforms.resize_image(pictures, size, InterpolationMode.NEAREST_EXACT).bool()))
