"""Masks as annotation files hold them: polygons, compressed and uncompressed run-length codes.

    mask = read_mask(annotation["segmentations"][0], height, width, "annotation 5, frame 0,")

pycocotools trusts its input: it reads past the end of a damaged code and walks along outlines of
any length. Everything is therefore checked here first. Shape letters: H, W of the frame.
"""
from collections.abc import Iterator
from math import isnan

import numpy as np
from pycocotools import mask as rle

from evaluation.run_length import UNFILLED, find_fault
from runtime.errors import InputError, shown

LONGEST_OUTLINE = 2 ** 20  # pixels, of all polygons of one segmentation
FAR_AWAY = "a coordinate is no number or lies far outside of the frame"
TRACKS_AT_ONCE = 64        # whose compressed codes are checked together, which is much faster

Segmentation = dict | list | None


def is_polygon(coordinates: list) -> bool:
    """Whether [x, y, x, y, ...] has an inside; Detectron2 leaves the same ones out."""
    return len(coordinates) % 2 == 0 and len(coordinates) >= 6


def polygons_of(segmentation: list[list]) -> list[list]:
    """The polygons that have an inside."""
    return [polygon for polygon in segmentation if is_polygon(polygon)]


def has_mask(segmentation: Segmentation) -> bool:
    """Whether there is anything to read; False of None, "", [], and points without an inside."""
    if not isinstance(segmentation, list):
        return bool(segmentation)
    # what is no polygon at all is there, to be refused
    return any(not isinstance(part, list) or is_polygon(part) for part in segmentation)


def to_rle(segmentation: Segmentation, height: int, width: int, where: str,
           checked: bool = False) -> dict | None:
    """Compressed RLE of one frame's segmentation; None where it has no mask.

    where: names it in the InputError that an unreadable one gets. checked: it is known to be
    readable.
    """
    if not checked and (fault := find_track_fault([([segmentation], height, width)])):
        raise InputError(f"{where} has a segmentation that cannot be read: {fault[2]}")
    if not has_mask(segmentation):
        return None
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(polygons_of(segmentation), height, width))
    code = {"size": [height, width], "counts": segmentation["counts"]}
    return rle.frPyObjects(code, height, width) if isinstance(code["counts"], list) else code


def read_mask(segmentation: Segmentation, height: int, width: int, where: str,
              checked: bool = False) -> np.ndarray:
    """bool (H, W) of one frame's segmentation; arguments and InputError as of `to_rle`."""
    encoded = to_rle(segmentation, height, width, where, checked)
    return rle.decode(encoded).astype(bool) if encoded else np.zeros((height, width), bool)


def mask_areas(segmentations: list[Segmentation], height: int, width: int) -> list[int | None]:
    """Pixels of every frame's mask, None where it is empty; all are known to be readable."""
    codes = [to_rle(segmentation, height, width, "", checked=True)
             for segmentation in segmentations]
    return [int(rle.area(code)) or None if code else None for code in codes]


# Checks

Track = tuple[list[Segmentation], int, int]  # one segmentation a frame, height, width


def find_bad_tracks(tracks: list[Track]) -> Iterator[tuple[int, int, str]]:
    """(number of the track, frame, what is wrong) of every track with an unreadable mask."""
    for begin in range(0, len(tracks), TRACKS_AT_ONCE):
        block = tracks[begin:begin + TRACKS_AT_ONCE]
        if find_track_fault(block) is None:
            continue
        for number, track in enumerate(block, begin):
            if fault := find_track_fault([track]):
                _, frame, reason = fault
                yield number, frame, reason


def find_track_fault(tracks: list[Track]) -> tuple[int, int, str] | None:
    """(number of the track, frame, what is wrong) of an unreadable mask, None if there is none."""
    places, codes, pixels = [], [], []
    for number, (segmentations, height, width) in enumerate(tracks):
        for frame, segmentation in enumerate(segmentations):
            if reason := find_mask_fault(segmentation, height, width):
                return number, frame, reason
            if isinstance(segmentation, dict) and isinstance(segmentation["counts"], (str, bytes)):
                places.append((number, frame))
                codes.append(segmentation["counts"])
                pixels.append(height * width)
    if fault := find_fault(codes, pixels):
        place, reason = fault
        return *places[place], reason
    return None


def find_mask_fault(segmentation: Segmentation, height: int, width: int) -> str | None:
    """What is wrong with a segmentation; the characters of a compressed code are not looked at."""
    if not segmentation:
        return None
    try:
        if isinstance(segmentation, list):
            return find_outline_fault(segmentation)
        if not isinstance(segmentation, dict):
            return f"it is a {type(segmentation).__name__}"
        if list(segmentation["size"]) != [height, width]:
            return (f"its size is {shown(segmentation['size'])}, "
                    f"its video's [height, width] {[height, width]}")
        counts = segmentation["counts"]
        if isinstance(counts, list):
            whole = all(run % 1 == 0 and run >= 0 for run in counts)
            return None if whole and sum(counts) == height * width else UNFILLED
        return None if isinstance(counts, (str, bytes)) else f"its counts are {shown(counts)}"
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        return repr(error)


def find_outline_fault(segmentation: list) -> str | None:
    """What is wrong with a list of polygons."""
    if not all(isinstance(polygon, list) for polygon in segmentation):
        return "a part of it is no list of coordinates"
    bound = 0.0
    for polygon in polygons_of(segmentation):
        try:
            low, high = min(polygon), max(polygon)
            if not (-LONGEST_OUTLINE < low and high < LONGEST_OUTLINE) or isnan(sum(polygon)):
                return FAR_AWAY
        except TypeError:  # null, text
            return FAR_AWAY
        bound += len(polygon) / 2 * (high - low)  # no edge is longer than high - low
    if bound > LONGEST_OUTLINE and outline_length(polygons_of(segmentation)) > LONGEST_OUTLINE:
        return f"its outline is longer than {LONGEST_OUTLINE} pixels"
    return None


def outline_length(polygons: list[list]) -> float:
    """Pixels that pycocotools walks along all outlines."""
    corners = [np.array(polygon, dtype=np.float64).reshape(-1, 2) for polygon in polygons]
    return sum(np.abs(points - np.roll(points, 1, axis=0)).max(1).sum() for points in corners)
