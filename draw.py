"""Pictures of results: frames with the instances' masks over them, as a PNG sheet and an animated WebP of each video.

A colour belongs to a track and stays with it over the video; the fill lets half of the frame through, the outline is solid.
"""
import math
from colorsys import hsv_to_rgb
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion
from torch import Tensor

GOLDEN_RATIO = 0.618034  # steps of it never come back to a hue, and neighbours are far apart
SMALLEST_HEIGHT = 240  # pixels; smaller frames are enlarged by a whole factor, so that labels can be read
SHEET_FRAMES = 6
FRAME_MILLISECONDS = 125


def colour_of(track: int) -> tuple[int, int, int]:
    """The RGB colour of a track id, the same in every picture."""
    return tuple(round(255 * part) for part in hsv_to_rgb(track * GOLDEN_RATIO % 1, 0.75, 0.92))


def overlay(frame: np.ndarray, masks: np.ndarray, track_ids: list[int], captions: list[str]) -> Image.Image:
    """frame uint8 (H, W, 3), masks bool (I, H, W) best first, a track id and a caption each -> the picture."""
    scale = max(1, -(-SMALLEST_HEIGHT // frame.shape[0]))
    canvas = frame.repeat(scale, 0).repeat(scale, 1).astype(np.float32)
    places = []
    for mask, track in reversed(list(zip(masks, track_ids))):    # the best is drawn last, on top
        mask = mask.repeat(scale, 0).repeat(scale, 1)
        colour = np.array(colour_of(track), np.float32)
        canvas[mask] = (canvas[mask] + colour) / 2
        canvas[mask & ~binary_erosion(mask, iterations=2)] = colour
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        places.append((int(columns[0]), int(rows[0])) if len(rows) else None)
    picture = Image.fromarray(canvas.astype(np.uint8))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    for place, caption, track in zip(reversed(places), captions, track_ids):
        if place and caption:
            left = max(0, min(place[0], picture.width - 1 - math.ceil(draw.textlength(caption, font=font))))
            corner = left, max(0, place[1] - 14)
            draw.rectangle(draw.textbbox(corner, caption, font=font), fill=colour_of(track))
            draw.text(corner, caption, fill="white", font=font)
    return picture


def save_pictures(folder: Path, name: str, frames: list[np.ndarray], masks: Tensor, track_ids: list[int],
                  captions: list[str]) -> None:
    """Write folder/name.webp (all frames) and folder/name.png (a sheet of some), and make the folder if it is not there.

    frames: T of uint8 (H, W, 3); masks bool (I, T, H, W), best first; a track id and a caption for each instance.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [overlay(frame, masks[:, t].numpy(), track_ids, captions) for t, frame in enumerate(frames)]
    pictures[0].save(folder / f"{name}.webp", save_all=True, append_images=pictures[1:], duration=FRAME_MILLISECONDS, loop=0)
    shown = np.unique(np.linspace(0, len(frames) - 1, SHEET_FRAMES).round().astype(int))
    width, height = pictures[0].size
    columns = min(3, len(shown))
    sheet = Image.new("RGB", (columns * width, -(-len(shown) // columns) * height))
    for place, t in enumerate(shown):
        sheet.paste(pictures[t], (place % columns * width, place // columns * height))
    sheet.save(folder / f"{name}.png")
