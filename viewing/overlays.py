"""Pictures of results: frames with the instances' masks over them, as a PNG sheet and an animated WebP of each video.

A colour belongs to a track and stays with it over the video; the fill lets half of the frame through, the outline is solid. Where
the model has gates (GRAtt-VIS, arXiv 2305.17096, method section), a strip below each frame tells what they have done so far.
"""
import math
import sys
from collections.abc import Iterable, Iterator
from colorsys import hsv_to_rgb
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as rle
from scipy.ndimage import binary_erosion
from tqdm import tqdm

from evaluation.postprocess import EncodedVideo

GOLDEN_RATIO = 0.618034  # steps of it never come back to a hue, and neighbours are far apart
SMALLEST_HEIGHT = 240  # pixels; smaller frames are enlarged by a whole factor, so that labels can be read
LARGEST_ENLARGED = 4096  # pixels; no frame is enlarged beyond this width
LONGEST_NAME = 32  # characters of a class name in a caption
SHEET_FRAMES = 6
SHEET_PIXELS = 2 ** 26  # of a whole sheet; six frames of 3840x2160 fit
ANIMATED_FRAMES = 240  # are held in memory until the animation is written
ANIMATION_BYTES = 2 ** 29  # of that memory; larger pictures are shrunk to fit
BYTES_A_PIXEL = 4  # as Pillow stores RGB
WEBP_SIDE = 16383  # pixels; the format has no larger pictures
FRAME_MILLISECONDS = 125
BAND_HEIGHT, LINE_HEIGHT = 7, 4  # pixels of the strip: where a track is seen, a layer's gates
PAPER, UNDRAWN, INK = (255, 255, 255), (244, 244, 244), (30, 30, 30)


def colour_of(track: int) -> tuple[int, int, int]:
    """The RGB colour of a track id, the same in every picture."""
    return tuple(round(255 * part) for part in hsv_to_rgb(track * GOLDEN_RATIO % 1, 0.75, 0.92))


def name_to_draw(name: str) -> str:
    """A class name on one line and of at most LONGEST_NAME characters, without control characters.

    Of a longer one, the begin and the end are kept, which tell numbered classes apart.
    """
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME - 13]}...{name[-10:]}"
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def stack(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """The two pictures, of one width, one above the other."""
    both = Image.new("RGB", (upper.width, upper.height + lower.height))
    both.paste(upper)
    both.paste(lower, (0, upper.height))
    return both


def overlay(frame: np.ndarray, masks: np.ndarray, track_ids: list[int], captions: list[str]) -> Image.Image:
    """frame uint8 (H, W, 3), masks bool (I, H, W) best first, a track id and a caption each -> the picture."""
    scale = max(1, min(-(-SMALLEST_HEIGHT // frame.shape[0]), LARGEST_ENLARGED // frame.shape[1]))
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
    for place, caption, track in zip(places, reversed(captions), reversed(track_ids)):
        if place and caption:
            left = max(0, min(place[0], picture.width - 1 - math.ceil(draw.textlength(caption, font=font))))
            corner = left, max(0, place[1] - 14)
            draw.rectangle(draw.textbbox(corner, caption, font=font), fill=colour_of(track))
            draw.text(corner, caption, fill="white", font=font)
    return picture


def gate_strip(width: int, now: int, seen: np.ndarray, gates: np.ndarray, track_ids: list[int], captions: list[str]) -> Image.Image:
    """What goes below frame `now`: a row for each of I tracks, time to the right, with nothing yet of later frames.

    seen bool (I, T), gates bool (I, T, D), a track id and a caption each. A row has a band in the track's colour in the frames that
    show it, and a line for each of D layers: dark where its gate is open, pale where it is closed.
    """
    layers, palette = gates.shape[2], list(map(strip_colours, track_ids))
    font, small = ImageFont.load_default(size=12), ImageFont.load_default(size=10)
    left, right = min(width // 2, math.ceil(max(map(font.getlength, captions))) + 8), width - 4
    row_height = max(18, BAND_HEIGHT + layers * (LINE_HEIGHT + 1) + 5)
    tops = [4 + row * row_height for row in range(len(captions))]
    bottom = tops[-1] + row_height
    strip = Image.new("RGB", (width, bottom + 15), PAPER)
    draw = ImageDraw.Draw(strip)
    for top, caption, (colour, _, _) in zip(tops, captions, palette):
        draw.rectangle(draw.textbbox((4, top), caption, font=font), fill=colour)
        draw.text((4, top), caption, fill="white", font=font)
    place = 4
    for meaning, colour in zip(("seen", "gate open", "gate closed"), palette[0]):
        draw.rectangle((place, bottom + 3, place + 7, bottom + 9), fill=colour)
        draw.text((place + 11, bottom), meaning, fill=INK, font=small)
        place += 21 + math.ceil(small.getlength(meaning))
    draw.text((place, bottom), f"open gates update the track; {layers} layers, a line each", fill=INK, font=small)

    pixels = np.array(strip)
    pixels[:bottom, left:] = PAPER                                            # cuts long captions off
    frame_of = np.arange(right - left) * seen.shape[1] // (right - left)      # the frame of each column of pixels
    begun = (frame_of <= now)[:, None]
    for top, in_frame, layer_gates, (colour, dark, pale) in zip(tops, seen, gates, palette):
        for height, filled, yes, no in [(BAND_HEIGHT, in_frame, colour, UNDRAWN),
                                        *((LINE_HEIGHT, gate, dark, pale) for gate in layer_gates.T)]:
            pixels[top:top + height, left:right] = np.where(begun, np.where(filled[frame_of, None], yes, no), UNDRAWN)
            top += height + 1
    pixels[:bottom - 1, left + begun.sum()] = INK                             # the cursor, behind the last column that is drawn
    return Image.fromarray(pixels)


def strip_colours(track: int) -> tuple[tuple[int, int, int], ...]:
    """The RGB colours of a track's row: of the band, of an open gate, of a closed one."""
    colour = colour_of(track)
    return colour, tuple(round(0.4 * part) for part in colour), tuple(round(153 + 0.4 * part) for part in colour)


def best_labels(found: EncodedVideo, least: float) -> list[int]:
    """Which instances are shown: those that score at least so much, of each track under its best label only; best first."""
    first = {}
    for index, (track, score) in enumerate(zip(found.track_ids.tolist(), found.scores.tolist())):
        if score >= least:
            first.setdefault(track, index)
    return list(first.values())


def overlays(frames: Iterable[np.ndarray], found: EncodedVideo, names: list[str], least: float) -> Iterator[Image.Image]:
    """Every frame, uint8 (H, W, 3), with the masks of the instances that score at least so much, and the strip of their gates below.

    names: of the classes. There is no strip where the model has no gates, or no instance scores enough.
    """
    chosen = best_labels(found, least)
    tracks = found.track_ids[chosen].tolist()
    captions = [f"{name_to_draw(names[found.labels[index]])} {found.scores[index]:.2f}"
                for index in chosen]
    seen, gates = np.array([rle.area(found.segmentations[index]) > 0 for index in chosen]), found.gates[chosen].numpy()
    for t, frame in enumerate(frames):
        codes = [found.segmentations[index][t] for index in chosen]
        masks = rle.decode(codes).transpose(2, 0, 1).astype(bool) if codes else np.zeros((0, *frame.shape[:2]), bool)
        picture = overlay(frame, masks, tracks, captions)
        yield stack(picture, gate_strip(picture.width, t, seen, gates, tracks, captions)) if gates.size else picture


def save_pictures(folder: Path, name: str, pictures: Iterable[Image.Image], count: int,
                  milliseconds: float = FRAME_MILLISECONDS, frames: Path | None = None) -> None:
    """Write `count` pictures of one size as folder/name.webp, and some as folder/name.png, a sheet.

    Of a video of more than ANIMATED_FRAMES, every second frame is in the animation, or every third,
    and so on; and its pictures are smaller if they would take more than ANIMATION_BYTES. If they
    are too large for WebP, every picture is written to the folder folder/name instead, as PNG, and
    a note is printed. `frames`: a folder that every picture is written to in any case.
    """
    pictures = iter(pictures)
    first = next(pictures)
    animate = max(first.size) <= WEBP_SIDE
    if not animate:
        frames = frames or folder / name
        tqdm.write(f"{name}.webp was not made: WebP has at most {WEBP_SIDE} pixels a side, the "
                   f"pictures are {first.width}x{first.height}; they are in {frames.name}/ as PNG",
                   file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    if frames:
        frames.mkdir(parents=True, exist_ok=True)
    step = -(-count // ANIMATED_FRAMES)
    size = fit(first.size, ANIMATION_BYTES // BYTES_A_PIXEL // -(-count // step))
    animation = []
    sheet = Sheet(first.size, count)
    for t, picture in enumerate(chain([first], pictures)):
        if frames:
            picture.save(frames / f"{t:05d}.png")
        if animate and t % step == 0:
            animation.append(resized(picture, size))
        sheet.add(t, picture)
    if animate:
        animation[0].save(folder / f"{name}.webp", save_all=True, append_images=animation[1:],
                          duration=max(1, round(step * milliseconds)), loop=0)
    sheet.picture.save(folder / f"{name}.png")


class Sheet:
    """SHEET_FRAMES pictures of a video, from the first to the last, beside one another."""

    def __init__(self, size: tuple[int, int], count: int):
        """size: (width, height) of each picture; count: how many the video has."""
        shown = sorted({int(t) for t in np.linspace(0, count - 1, SHEET_FRAMES).round()})
        columns = min(3, len(shown))
        rows = -(-len(shown) // columns)
        self.size = fit(size, SHEET_PIXELS // (rows * columns))
        self.places = {t: (place % columns * self.size[0], place // columns * self.size[1])
                       for place, t in enumerate(shown)}
        self.picture = Image.new("RGB", (columns * self.size[0], rows * self.size[1]))

    def add(self, t: int, picture: Image.Image) -> None:
        """Put picture number t onto the sheet, if it is one of those that are shown."""
        if t in self.places:
            self.picture.paste(resized(picture, self.size), self.places[t])


def fit(size: tuple[int, int], pixels: int) -> tuple[int, int]:
    """(width, height) of the same shape and at most so many pixels, but at least one a side."""
    scale = min(1, math.sqrt(pixels / (size[0] * size[1])))
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at (width, height); the picture itself if it has that size."""
    return picture if picture.size == size else picture.resize(size, reducing_gap=2)
