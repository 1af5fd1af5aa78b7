"""Small animations of videos for a report: ground truth beside prediction, and a table of tracks.

    shown = ShownVideo.choose(overlaps, explanation)
    uri = animate(shown, video, files, max_bytes)    # "data:image/webp;base64,..." or None
    gate_picture(shown_track, gates)                 # a strip over time, as a data URI

Ground truth tracks are called A, B, ... and predictions 1, 2, ... A prediction has the colour of
its object, the ground truth track that it overlaps most, so an identity switch is a colour that
moves to another object. Predictions without an object are grey.

Letters: L frames, D predictions and G ground truth tracks, H, W.
"""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as rle

from data import read_frame
from evaluation.causes import BACKGROUND_IOU, CAUSES, NONE, Explanation
from evaluation.linking import different_tracks
from evaluation.overlaps import VideoOverlaps, track_rles
from runtime.errors import InputError
from viewing.overlays import LUMA, colour_of, draw_label, outline, strip_colours

PANEL_SIDE = 240  # pixels, the longest side of either half
GAP = 4  # pixels between the halves
FRAMES = 12
SECONDS = 3.0  # duration of an animation
QUALITIES = (60, 35, 15)  # of WebP, the first that fits
SHOWN_SCORE = 0.3
MAX_LUMA = 110  # of 255, of colours behind white letters
LINE = 13  # pixels, height of a caption
MAX_SHOWN = 8  # predictions, and ground truth tracks
GREY, PLAIN = (128, 128, 128), 60  # colour without object, brightness without frame
PICTURE_THRESHOLD = 5  # index into IOU_THRESHOLDS: errors in pictures are those at IoU 0.75


@dataclass
class ShownTrack:
    """A prediction that is drawn."""

    index: int  # into VideoOverlaps.predictions
    name: str  # 1, 2, ...
    object: int | None  # index of the ground truth track that it overlaps most
    iou: float  # with that
    outcomes: list[str]  # "right", "ignored", or the cause, at each IoU threshold


@dataclass
class ShownVideo:
    """What is drawn of a video."""

    overlaps: VideoOverlaps
    tracks: list[ShownTrack]
    objects: list[int]  # indices of annotations
    missed: set[int]  # those of them that no prediction finds at PICTURE_THRESHOLD

    @staticmethod
    def choose(overlaps: VideoOverlaps, explained: Explanation) -> "ShownVideo":
        """The best label of each different track that scores at least SHOWN_SCORE, best first.

        At least the best track is shown, and at most MAX_SHOWN.
        """
        track_of, _ = different_tracks(overlaps)
        best = {}
        for column, index in enumerate(explained.predictions.tolist()):
            if not best or explained.scores[column] >= SHOWN_SCORE:
                best.setdefault(track_of[index], (column, index))
        tracks = [
            describe_track(str(number), overlaps, explained, *chosen)
            for number, chosen in enumerate(list(best.values())[:MAX_SHOWN], 1)
        ]
        counted = np.flatnonzero(~overlaps.crowd)
        missed = set(counted[explained.missed[PICTURE_THRESHOLD]].tolist())
        objects = list(range(len(overlaps.annotations)))[:MAX_SHOWN]
        return ShownVideo(overlaps, tracks, objects, missed)


def describe_track(
    name: str, overlaps: VideoOverlaps, explained: Explanation, column: int, index: int
) -> ShownTrack:
    """A prediction with its object and outcomes. column: of the Explanation."""
    ious = np.where(overlaps.crowd, -1.0, overlaps.track_ious[index])
    nearest = int(ious.argmax()) if ious.size else None
    iou = float(ious.max(initial=0.0))
    outcomes = [
        "right" if true else CAUSES[cause] if cause != NONE else "ignored"
        for true, cause in zip(explained.true[:, column], explained.causes[:, column])
    ]
    return ShownTrack(index, name, nearest if iou >= BACKGROUND_IOU else None, iou, outcomes)


def object_name(index: int) -> str:
    """A, B, ..., Z, A1, B1, ..."""
    return chr(ord("A") + index % 26) + str(index // 26 or "")


def track_colour(track: ShownTrack) -> tuple[int, int, int]:
    """The colour of the object of a prediction, grey without one."""
    return GREY if track.object is None else label_colour(track.object)


def label_colour(index: int) -> tuple[int, int, int]:
    """The colour of a ground truth track, dark enough for white letters on it."""
    colour = np.array(colour_of(index))
    scale = min(1.0, MAX_LUMA / (colour @ LUMA))
    return tuple((colour * scale).astype(int).tolist())


def animate(shown: ShownVideo, video: dict, files: list[Path], max_bytes: int) -> str | None:
    """An animated WebP as a data URI of at most max_bytes; None if it does not fit.

    video: its entry in the annotation file. files: its frames; a plain background if empty.
    """
    chosen = np.unique(np.linspace(0, video["length"] - 1, FRAMES).round().astype(int)).tolist()
    pictures = draw_frames(shown, video, files, chosen)
    milliseconds = round(1000 * SECONDS / len(pictures))
    for quality in QUALITIES:
        buffer = io.BytesIO()
        pictures[0].save(
            buffer,
            "WEBP",
            save_all=True,
            append_images=pictures[1:],
            duration=milliseconds,
            loop=0,
            quality=quality,
            method=4,
        )
        uri = data_uri("webp", buffer)
        if len(uri) <= max_bytes:
            return uri
    return None


def data_uri(kind: str, buffer: io.BytesIO) -> str:
    """A picture as text."""
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def draw_frames(
    shown: ShownVideo, video: dict, files: list[Path], chosen: list[int]
) -> list[Image.Image]:
    """The frames `chosen`: the ground truth on the left, the predictions on the right."""
    height, width = video["height"], video["width"]
    scale = PANEL_SIDE / max(height, width)
    size = max(1, round(scale * width)), max(1, round(scale * height))
    objects = [
        (
            track_rles(shown.overlaps.annotations[index], video),
            label_colour(index),
            object_name(index) + (" missed" if index in shown.missed else ""),
        )
        for index in shown.objects
    ]
    tracks = [
        (
            track_rles(shown.overlaps.predictions[track.index], video),
            track_colour(track),
            caption_of(track),
        )
        for track in shown.tracks
    ]
    pictures = []
    for t in chosen:
        frame = background(files, t, height, width, size)
        both = Image.new("RGB", (2 * size[0] + GAP, size[1]), "white")
        both.paste(draw_panel(frame, objects, t))
        both.paste(draw_panel(frame, tracks, t), (size[0] + GAP, 0))
        pictures.append(both)
    return pictures


def caption_of(track: ShownTrack) -> str:
    """The label of a prediction in the picture: its number, and its cause if it is an error."""
    outcome = track.outcomes[PICTURE_THRESHOLD]
    return track.name if outcome == "right" else f"{track.name} {outcome}"


def background(files: list[Path], t: int, height: int, width: int, size) -> np.ndarray:
    """Frame t at a size (width, height), uint8 (H, W, 3); plain if it cannot be read."""
    try:
        picture = read_frame(files[t], height, width)
    except (IndexError, InputError):
        return np.full((size[1], size[0], 3), PLAIN, np.uint8)
    return np.asarray(picture.resize(size, reducing_gap=2))


def draw_panel(frame: np.ndarray, tracks: list[tuple], t: int) -> Image.Image:
    """Draw the masks of frame t over the frame, the first track on top.

    tracks: (L RLEs, colour, caption) each.
    """
    height, width = frame.shape[:2]
    canvas = frame.astype(np.float32)
    corners = []
    for codes, colour, caption in tracks[::-1]:
        mask = rle.decode(codes[t])
        rows = np.arange(height) * mask.shape[0] // height
        columns = np.arange(width) * mask.shape[1] // width
        mask = mask[rows[:, None], columns].astype(bool)
        canvas[mask] = (canvas[mask] + np.array(colour, np.float32)) / 2
        canvas[outline(mask)] = colour
        if mask.any():
            corner = int(mask.any(0).argmax()), int(mask.any(1).argmax())
            corners.append((corner, colour, caption))
    panel = Image.fromarray(canvas.astype(np.uint8))
    draw_captions(panel, corners[::-1])
    return panel


def draw_captions(panel: Image.Image, corners: list[tuple]) -> None:
    """Draw captions above corners (x, y), inside the panel and below those drawn before.

    corners: (corner, colour, caption) each.
    """
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(size=11)
    taken = []
    for (x, y), colour, caption in corners:
        width = int(draw.textlength(caption, font=font)) + 1
        x, y = max(0, min(x, panel.width - width)), max(0, y - LINE)
        while any(
            x < right and left < x + width and abs(y - top) < LINE for left, right, top in taken
        ):
            y += 1
        taken.append((x, x + width, y))
        draw_label(draw, (x, y), caption, colour, font)


def gate_picture(track: ShownTrack, visible: np.ndarray, gates: np.ndarray) -> str:
    """A strip over time as a data URI, a column per frame.

    Its first rows have the track's colour where it is visible; then there are two rows per decoder
    layer, dark where the gate is open and pale where it is closed.

    visible: (L,) bool. gates: (L, D) bool, D decoder layers.
    """
    _, dark, pale = strip_colours(track.object or 0)
    if track.object is None:
        dark, pale = (40, 40, 40), (200, 200, 200)
    bands = [np.where(visible[:, None], track_colour(track), 255)] * 3
    for gate in gates.T:
        bands += [np.full((len(gate), 3), 255)] + [np.where(gate[:, None], dark, pale)] * 2
    buffer = io.BytesIO()
    Image.fromarray(np.stack(bands).astype(np.uint8)).save(buffer, "PNG", optimize=True)
    return data_uri("png", buffer)
