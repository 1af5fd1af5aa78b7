"""Draws results: masks over the frames of a video, as an animated WebP and a PNG sheet.

Each track has one colour throughout the video, with a half-transparent fill and a solid outline. If
the model has gates (GRAtt-VIS, arXiv 2305.17096, method section), a strip below each frame shows
the gates so far.

Letters: I instances, T frames, D decoder layers, H, W.
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
from tqdm import tqdm

from evaluation.postprocess import EncodedVideo, VideoResult

GOLDEN_RATIO = 0.618034  # hue step: never repeats, and consecutive hues are far apart
SHADES = ((0.9, 1.0), (1.0, 0.6), (0.5, 1.0))  # (saturation, value): bright, dark and pale in turn
MIN_HEIGHT = 240  # pixels; smaller frames are enlarged by an integer factor, for legible labels
MAX_ENLARGED_WIDTH = 4096  # pixels
MAX_NAME_LENGTH = 32  # characters of a class name in a caption
SHEET_FRAMES = 6
MAX_SHEET_PIXELS = 2**26  # of the whole sheet; enough for six frames of 3840x2160
MAX_ANIMATION_FRAMES = 240  # held in memory until the animation is written
MAX_ANIMATION_BYTES = 2**29  # of memory; larger pictures are shrunk
BYTES_PER_PIXEL = 4  # of RGB pictures in Pillow
MAX_WEBP_SIDE = 16383  # pixels, a limit of the format
FRAME_MILLISECONDS = 125
BAND_HEIGHT, LINE_HEIGHT = 7, 4  # pixels of the strip: visibility of a track, gates of a layer
LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue
MAX_LUMA_BELOW_WHITE = 140  # of 255, of the background of white letters
WHITE, LIGHT_GREY, DARK_GREY = (255, 255, 255), (244, 244, 244), (30, 30, 30)


def colour_of(track: int) -> tuple[int, int, int]:
    """The RGB colour of a track id. Those of the first 16 ids are easy to tell apart."""
    rgb = hsv_to_rgb(track * GOLDEN_RATIO % 1, *SHADES[track % len(SHADES)])
    return tuple(round(255 * value) for value in rgb)


def name_to_draw(name: str) -> str:
    """A class name for captions: one line, at most MAX_NAME_LENGTH printable characters.

    Long names keep their start and end, which distinguish numbered classes.
    """
    if len(name) > MAX_NAME_LENGTH:
        name = f"{name[: MAX_NAME_LENGTH - 13]}...{name[-10:]}"
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def stack(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """Two pictures of the same width, one above the other."""
    both = Image.new("RGB", (upper.width, upper.height + lower.height))
    both.paste(upper)
    both.paste(lower, (0, upper.height))
    return both


def overlay(
    frame: np.ndarray, masks: np.ndarray, track_ids: list[int], captions: list[str]
) -> Image.Image:
    """Draw masks and captions over a frame.

    frame: uint8 (H, W, 3). masks: bool (I, H, W), best first. track_ids, captions: I each.
    """
    height, width = frame.shape[:2]
    scale = max(1, min(math.ceil(MIN_HEIGHT / height), MAX_ENLARGED_WIDTH // width))
    canvas = enlarged(frame, scale).astype(np.float32)
    instances = list(zip(masks, track_ids, captions))[::-1]  # the best is drawn last, on top
    corners = []
    for mask, track, _ in instances:
        mask = enlarged(mask, scale)
        colour = np.array(colour_of(track), np.float32)
        canvas[mask] = (canvas[mask] + colour) / 2
        canvas[outline(mask)] = colour
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        corners.append((int(columns[0]), int(rows[0])) if len(rows) else None)
    picture = Image.fromarray(canvas.astype(np.uint8))
    for corner, (_, track, caption) in zip(corners, instances):
        if corner and caption:
            draw_caption(picture, corner, caption, colour_of(track))
    return picture


def outline(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask, bool (H, W), that are at most two steps from its background."""
    from scipy.ndimage import binary_erosion  # Speed: importing it takes 0.3 s

    return mask & ~binary_erosion(mask, iterations=2)


def enlarged(array: np.ndarray, scale: int) -> np.ndarray:
    """Repeat each pixel of an (H, W, ...) array."""
    return array.repeat(scale, 0).repeat(scale, 1)


def draw_caption(picture: Image.Image, corner: tuple[int, int], caption: str, colour) -> None:
    """Draw a caption above the top left corner (x, y) of a mask, inside the picture."""
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=12)
    length = math.ceil(draw.textlength(caption, font=font))
    left = max(0, min(corner[0], picture.width - 1 - length))
    top = max(0, corner[1] - 14)
    draw_label(draw, (left, top), caption, colour, font)


def draw_label(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, colour, font) -> None:
    """Draw text on a coloured background: white, or black where the background is light."""
    draw.rectangle(draw.textbbox(corner, text, font=font), fill=colour)
    light = np.dot(colour, LUMA) > MAX_LUMA_BELOW_WHITE
    draw.text(corner, text, fill="black" if light else "white", font=font)


def gate_strip(
    width: int,
    now: int,
    visible: np.ndarray,
    gates: np.ndarray,
    track_ids: list[int],
    captions: list[str],
) -> Image.Image:
    """The strip below frame `now`: one row per track, time from left to right up to `now`.

    A row has a band in the track's colour where the track is visible, and one line per decoder
    layer, dark where its gate is open and pale where it is closed.

    visible: bool (I, T). gates: bool (I, T, D). track_ids, captions: I each.
    """
    layers = gates.shape[2]
    palette = [strip_colours(track) for track in track_ids]
    font = ImageFont.load_default(size=12)
    longest = math.ceil(max(map(font.getlength, captions)))
    left, right = min(width // 2, longest + 8), width - 4
    row_height = max(18, BAND_HEIGHT + layers * (LINE_HEIGHT + 1) + 5)
    tops = [4 + row * row_height for row in range(len(captions))]
    bottom = tops[-1] + row_height
    strip = Image.new("RGB", (width, bottom + 15), WHITE)
    draw = ImageDraw.Draw(strip)
    for top, caption, (colour, _, _) in zip(tops, captions, palette):
        draw_label(draw, (4, top), caption, colour, font)
    draw_legend(draw, bottom, palette[0], layers)

    pixels = np.array(strip)
    pixels[:bottom, left:] = WHITE  # truncates long captions
    columns = np.arange(right - left)
    frame_of_column = columns * visible.shape[1] // (right - left)
    is_past = (frame_of_column <= now)[:, None]
    for top, in_frame, layer_gates, (colour, dark, pale) in zip(tops, visible, gates, palette):
        lines = [(BAND_HEIGHT, in_frame, colour, LIGHT_GREY)]
        lines += [(LINE_HEIGHT, gate, dark, pale) for gate in layer_gates.T]
        for height, values, colour_if_true, colour_if_false in lines:
            values = values[frame_of_column, None]
            line = np.where(values, colour_if_true, colour_if_false)
            pixels[top : top + height, left:right] = np.where(is_past, line, LIGHT_GREY)
            top += height + 1
    cursor = left + is_past.sum()
    pixels[: bottom - 1, cursor] = DARK_GREY
    return Image.fromarray(pixels)


def draw_legend(draw: ImageDraw.ImageDraw, top: int, colours: tuple, layers: int) -> None:
    """The legend of a gate strip."""
    font = ImageFont.load_default(size=10)
    left = 4
    for meaning, colour in zip(("seen", "gate open", "gate closed"), colours):
        draw.rectangle((left, top + 3, left + 7, top + 9), fill=colour)
        draw.text((left + 11, top), meaning, fill=DARK_GREY, font=font)
        left += 21 + math.ceil(font.getlength(meaning))
    text = f"open gates update the track; {layers} gates, a line each"
    draw.text((left, top), text, fill=DARK_GREY, font=font)


def strip_colours(track: int) -> tuple[tuple[int, int, int], ...]:
    """RGB colours of a track in the gate strip: visible, gate open, gate closed."""
    colour = colour_of(track)
    dark = tuple(round(0.4 * value) for value in colour)
    pale = tuple(round(153 + 0.4 * value) for value in colour)
    return colour, dark, pale


def best_labels(result: EncodedVideo | VideoResult, min_score: float) -> list[int]:
    """Indices of the instances to show, best first.

    They score at least min_score, and of each track only the best label is shown.
    """
    best = {}
    scores = result.scores.tolist()
    for index, track in enumerate(result.track_ids.tolist()):
        if scores[index] >= min_score:
            best.setdefault(track, index)
    return list(best.values())


def overlays(
    frames: Iterable[np.ndarray], result: EncodedVideo, names: list[str], min_score: float
) -> Iterator[Image.Image]:
    """Draw the instances that score at least min_score over every frame.

    There is a strip of gates below, unless the model has no gates or there are no instances.

    frames: uint8 (H, W, 3) each. names: of the classes.
    """
    chosen = best_labels(result, min_score)
    tracks = result.track_ids[chosen].tolist()
    captions = [
        f"{name_to_draw(names[result.labels[index]])} {result.scores[index]:.2f}"
        for index in chosen
    ]
    visible = np.array([rle.area(result.segmentations[index]) > 0 for index in chosen])
    gates = result.gates[chosen].numpy()
    for t, frame in enumerate(frames):
        codes = [result.segmentations[index][t] for index in chosen]
        if codes:
            masks = rle.decode(codes).transpose(2, 0, 1).astype(bool)
        else:
            masks = np.zeros((0, *frame.shape[:2]), bool)
        picture = overlay(frame, masks, tracks, captions)
        if gates.size:
            strip = gate_strip(picture.width, t, visible, gates, tracks, captions)
            picture = stack(picture, strip)
        yield picture


def save_pictures(
    folder: Path,
    name: str,
    pictures: Iterable[Image.Image],
    count: int,
    milliseconds: float = FRAME_MILLISECONDS,
    frames: Path | None = None,
) -> None:
    """Write an animation, folder/name.webp, and a sheet of some pictures, folder/name.png.

    The animation contains at most MAX_ANIMATION_FRAMES frames: every second, third, ... frame of
    longer videos. Pictures are shrunk to MAX_ANIMATION_BYTES in total. If they are too large for
    WebP, a note is printed, and all pictures are written as PNG to `frames`, or else to the folder
    folder/name.

    Args:
        pictures: of one size.
        count: number of pictures.
        milliseconds: duration of a frame.
        frames: folder to write every picture to, as PNG.
    """
    pictures = iter(pictures)
    first = next(pictures)
    animate = max(first.size) <= MAX_WEBP_SIDE
    if not animate:
        frames = frames or folder / name
        tqdm.write(
            f"{name}.webp was not made: WebP has at most {MAX_WEBP_SIDE} pixels a side, the "
            f"pictures are {first.width}x{first.height}; they are in {frames.name}/ as PNG",
            file=sys.stderr,
        )
    folder.mkdir(parents=True, exist_ok=True)
    if frames:
        frames.mkdir(parents=True, exist_ok=True)
    step = math.ceil(count / MAX_ANIMATION_FRAMES)
    pixels = MAX_ANIMATION_BYTES // BYTES_PER_PIXEL
    size = fit(first.size, pixels // math.ceil(count / step))
    animation = []
    sheet = Sheet(first.size, count)
    for t, picture in enumerate(chain([first], pictures)):
        if frames:
            picture.save(frames / f"{t:05d}.png")
        if animate and t % step == 0:
            animation.append(resized(picture, size))
        sheet.add(t, picture)
    if animate:
        animation[0].save(
            folder / f"{name}.webp",
            save_all=True,
            append_images=animation[1:],
            duration=max(1, round(step * milliseconds)),
            loop=0,
        )
    sheet.picture.save(folder / f"{name}.png")


class Sheet:
    """SHEET_FRAMES pictures of a video, from the first to the last, side by side.

    size: (width, height) of each picture. count: number of pictures of the video.
    """

    def __init__(self, size: tuple[int, int], count: int):
        chosen = np.linspace(0, count - 1, SHEET_FRAMES).round().astype(int)
        chosen = sorted(set(chosen.tolist()))
        columns = min(3, len(chosen))
        rows = math.ceil(len(chosen) / columns)
        width, height = fit(size, MAX_SHEET_PIXELS // (rows * columns))
        self.size = width, height
        self.corners = {
            t: (place % columns * width, place // columns * height)
            for place, t in enumerate(chosen)
        }
        self.picture = Image.new("RGB", (columns * width, rows * height))

    def add(self, t: int, picture: Image.Image) -> None:
        """Add picture t to the sheet, if it is one of the chosen ones."""
        if t in self.corners:
            self.picture.paste(resized(picture, self.size), self.corners[t])


def fit(size: tuple[int, int], pixels: int) -> tuple[int, int]:
    """Scale a size (width, height) down to at most so many pixels, but at least one per side."""
    scale = min(1, math.sqrt(pixels / (size[0] * size[1])))
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at a size (width, height)."""
    return picture if picture.size == size else picture.resize(size, reducing_gap=2)
