"""Masks of annotation files: polygons, compressed and uncompressed RLE.

    mask = read_mask(annotation["segmentations"][0], height, width, "annotation 5, frame 0,")

pycocotools does not validate its input: it reads past the end of a damaged code, and follows
outlines of any length. Masks are therefore validated here first. Letters: H, W of the frame.
"""

from collections.abc import Iterator
from math import isnan

import numpy as np
from pycocotools import mask as rle

from evaluation.run_length import UNFILLED, find_fault
from runtime.errors import InputError, shown

MAX_OUTLINE = 2**20  # pixels, of all polygons of a segmentation
FAR_AWAY = "a coordinate is no number or lies far outside of the frame"
TRACKS_PER_BATCH = 64  # validated together, which is much faster

Segmentation = dict | list | None


def is_polygon(coordinates: list) -> bool:
    """Whether [x, y, x, y, ...] encloses an area; Detectron2 drops the others too."""
    return len(coordinates) % 2 == 0 and len(coordinates) >= 6


def polygons_of(segmentation: list[list]) -> list[list]:
    """The polygons that enclose an area."""
    return [polygon for polygon in segmentation if is_polygon(polygon)]


def has_mask(segmentation: Segmentation) -> bool:
    """Whether there is a mask; False for None, "", [], and polygons without an area."""
    if not isinstance(segmentation, list):
        return bool(segmentation)
    # Entries that are no polygons count as a mask, which is then invalid.
    return any(not isinstance(entry, list) or is_polygon(entry) for entry in segmentation)


def to_rle(
    segmentation: Segmentation, height: int, width: int, where: str, checked: bool = False
) -> dict | None:
    """Convert the segmentation of one frame to compressed RLE; None if it has no mask.

    where: its name in the InputError for an invalid segmentation. checked: skip validation.
    """
    if not checked and (fault := find_track_fault([([segmentation], height, width)])):
        raise InputError(f"{where} has a segmentation that cannot be read: {fault[2]}")
    if not has_mask(segmentation):
        return None
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(polygons_of(segmentation), height, width))
    code = {"size": [height, width], "counts": segmentation["counts"]}
    return rle.frPyObjects(code, height, width) if isinstance(code["counts"], list) else code


def read_mask(
    segmentation: Segmentation, height: int, width: int, where: str, checked: bool = False
) -> np.ndarray:
    """Decode the segmentation of one frame to bool (H, W); arguments as for `to_rle`."""
    encoded = to_rle(segmentation, height, width, where, checked)
    return rle.decode(encoded).astype(bool) if encoded else np.zeros((height, width), bool)


def mask_areas(segmentations: list[Segmentation], height: int, width: int) -> list[int | None]:
    """Area of the mask in every frame, None if it is empty. The masks must be valid."""
    codes = [
        to_rle(segmentation, height, width, "", checked=True) for segmentation in segmentations
    ]
    return [int(rle.area(code)) or None if code else None for code in codes]


# Validation

Track = tuple[list[Segmentation], int, int]  # one segmentation per frame, height, width


def find_bad_tracks(tracks: list[Track]) -> Iterator[tuple[int, int, str]]:
    """Yield (track number, frame, reason) for every track with an invalid mask."""
    for begin in range(0, len(tracks), TRACKS_PER_BATCH):
        block = tracks[begin : begin + TRACKS_PER_BATCH]
        if find_track_fault(block) is None:
            continue
        for number, track in enumerate(block, begin):
            if fault := find_track_fault([track]):
                _, frame, reason = fault
                yield number, frame, reason


def find_track_fault(tracks: list[Track]) -> tuple[int, int, str] | None:
    """(track number, frame, reason) of an invalid mask; None if all are valid."""
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
    """What is wrong with a segmentation, except for the characters of compressed codes."""
    if not segmentation:
        return None
    try:
        if isinstance(segmentation, list):
            return find_outline_fault(segmentation)
        if not isinstance(segmentation, dict):
            return f"it is a {type(segmentation).__name__}"
        if list(segmentation["size"]) != [height, width]:
            return (
                f"its size is {shown(segmentation['size'])}, "
                f"its video's [height, width] {[height, width]}"
            )
        counts = segmentation["counts"]
        if isinstance(counts, list):
            valid = all(run % 1 == 0 and run >= 0 for run in counts)
            return None if valid and sum(counts) == height * width else UNFILLED
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
            if not (-MAX_OUTLINE < low and high < MAX_OUTLINE) or isnan(sum(polygon)):
                return FAR_AWAY
        except TypeError:  # null, text
            return FAR_AWAY
        bound += len(polygon) / 2 * (high - low)  # no edge is longer than high - low
    if bound > MAX_OUTLINE and outline_length(polygons_of(segmentation)) > MAX_OUTLINE:
        return f"its outline is longer than {MAX_OUTLINE} pixels"
    return None


def outline_length(polygons: list[list]) -> float:
    """Length of all outlines in pixels, as followed by pycocotools."""
    corners = [np.array(polygon, dtype=np.float64).reshape(-1, 2) for polygon in polygons]
    return sum(np.abs(points - np.roll(points, 1, axis=0)).max(1).sum() for points in corners)
