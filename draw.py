"""Pictures of results: frames with the instances' masks over them, as a PNG sheet and an animated WebP of each video.

A colour belongs to a track and stays with it over the video; the fill lets half of the frame through, the outline is solid.
"""
import math
from collections.abc import Iterable, Iterator
from colorsys import hsv_to_rgb
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as rle
from scipy.ndimage import binary_erosion

from results import EncodedVideo

GOLDEN_RATIO = 0.618034  # steps of it never come back to a hue, and neighbours are far apart
SMALLEST_HEIGHT = 240  # pixels; smaller frames are enlarged by a whole factor, so that labels can be read
SHEET_FRAMES = 6
ANIMATED_FRAMES = 240  # are held in memory until the animation is written
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


def best_labels(found: EncodedVideo, least: float) -> list[int]:
    """Which instances are shown: those that score at least so much, of each track under its best label only; best first."""
    first = {}
    for index, (track, score) in enumerate(zip(found.track_ids.tolist(), found.scores.tolist())):
        if score >= least:
            first.setdefault(track, index)
    return list(first.values())


def overlays(frames: Iterable[np.ndarray], found: EncodedVideo, names: list[str], least: float) -> Iterator[Image.Image]:
    """Every frame, uint8 (H, W, 3), with the masks of the instances that score at least so much; names: of the classes."""
    chosen = best_labels(found, least)
    tracks = found.track_ids[chosen].tolist()
    captions = [f"{names[found.labels[index]]} {found.scores[index]:.2f}" for index in chosen]
    for t, frame in enumerate(frames):
        codes = [found.segmentations[index][t] for index in chosen]
        masks = rle.decode(codes).transpose(2, 0, 1).astype(bool) if codes else np.zeros((0, *frame.shape[:2]), bool)
        yield overlay(frame, masks, tracks, captions)


def save_pictures(folder: Path, name: str, pictures: Iterable[Image.Image], count: int,
                  milliseconds: float = FRAME_MILLISECONDS) -> None:
    """Write folder/name.webp and folder/name.png (a sheet of some), of `count` pictures; makes the folder if it is not there.

    Of a video of more than ANIMATED_FRAMES, every second frame is in the animation, or every third, and so on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = {int(t) for t in np.linspace(0, count - 1, SHEET_FRAMES).round()}
    step = -(-count // ANIMATED_FRAMES)
    animated, on_sheet = [], []
    for t, picture in enumerate(pictures):
        if t % step == 0:
            animated.append(picture)
        if t in shown:
            on_sheet.append(picture)
    animated[0].save(folder / f"{name}.webp", save_all=True, append_images=animated[1:], duration=round(step * milliseconds), loop=0)
    width, height = on_sheet[0].size
    columns = min(3, len(on_sheet))
    sheet = Image.new("RGB", (columns * width, -(-len(on_sheet) // columns) * height))
    for place, picture in enumerate(on_sheet):
        sheet.paste(picture, (place % columns * width, place // columns * height))
    sheet.save(folder / f"{name}.png")
