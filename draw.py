"""Pictures of results: frames with the instances' masks over them, as a PNG sheet and an animated WebP of each video.

A colour belongs to a track and stays with it over the video; the fill lets half of the frame through, the outline is solid.
"""
from pathlib import Path

import numpy
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion
from torch import Tensor

PALETTE = [(230, 60, 60), (60, 120, 235), (60, 180, 75), (250, 190, 40), (150, 70, 200), (40, 190, 200), (240, 110, 190),
           (140, 220, 60), (245, 130, 50), (0, 130, 120), (170, 110, 60), (110, 110, 250)]
SMALLEST_HEIGHT = 240  # pixels; smaller frames are enlarged by a whole factor, so that labels can be read
SHEET_FRAMES = 6
FRAME_MILLISECONDS = 125


def overlay(frame: numpy.ndarray, masks: numpy.ndarray, colours: list[int], captions: list[str]) -> Image.Image:
    """frame uint8 (H, W, 3), masks bool (I, H, W) best first, a colour number and a caption each -> the picture."""
    scale = max(1, -(-SMALLEST_HEIGHT // frame.shape[0]))
    canvas = frame.repeat(scale, 0).repeat(scale, 1).astype(numpy.float32)
    places = []
    for mask, colour in reversed(list(zip(masks, colours))):     # the best is drawn last, on top
        mask = mask.repeat(scale, 0).repeat(scale, 1)
        colour = numpy.array(PALETTE[colour % len(PALETTE)], numpy.float32)
        canvas[mask] = (canvas[mask] + colour) / 2
        canvas[mask & ~binary_erosion(mask, iterations=2)] = colour
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        places.append((int(columns[0]), int(rows[0])) if len(rows) else None)
    picture = Image.fromarray(canvas.astype(numpy.uint8))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    for place, caption, colour in zip(reversed(places), captions, colours):
        if place and caption:
            box = draw.textbbox((place[0], max(0, place[1] - 14)), caption, font=font)
            draw.rectangle(box, fill=PALETTE[colour % len(PALETTE)])
            draw.text((place[0], max(0, place[1] - 14)), caption, fill="white", font=font)
    return picture


def save_pictures(folder: Path, name: str, frames: list[numpy.ndarray], masks: Tensor, track_ids: list[int],
                  captions: list[str]) -> None:
    """Write folder/name.webp (all frames) and folder/name.png (a sheet of some), and make the folder if it is not there.

    frames: T of uint8 (H, W, 3); masks bool (I, T, H, W), best first; a track id and a caption for each instance.
    """
    folder.mkdir(parents=True, exist_ok=True)
    colours = {track: number for number, track in enumerate(dict.fromkeys(track_ids))}
    pictures = [overlay(frame, masks[:, t].numpy(), [colours[track] for track in track_ids], captions)
                for t, frame in enumerate(frames)]
    pictures[0].save(folder / f"{name}.webp", save_all=True, append_images=pictures[1:], duration=FRAME_MILLISECONDS, loop=0)
    shown = numpy.unique(numpy.linspace(0, len(frames) - 1, SHEET_FRAMES).round().astype(int))
    width, height = pictures[0].size
    columns = min(3, len(shown))
    sheet = Image.new("RGB", (columns * width, -(-len(shown) // columns) * height))
    for place, t in enumerate(shown):
        sheet.paste(pictures[t], (place % columns * width, place // columns * height))
    sheet.save(folder / f"{name}.png")
