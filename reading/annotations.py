"""Reads annotation files: validation, defaults, and conversion to one format.

    file = read_annotations("instances.json")     # YouTube-VIS, OVIS, or COCO
    file.content["videos"], file.content["categories"], file.content["annotations"]
    file.skipped.sentences()                      # what was skipped, and why

The format is that of YouTube-VIS. Other fields of an entry are kept.

    videos       id, height, width, length, and "file_names" if the file has them
    categories   id, name (unique)
    annotations  id, video_id, category_id, iscrowd (0 or 1), segmentations (per frame: polygons,
                 RLE or None), areas (per frame: pixels or None)

A COCO image is a video of one frame. An id is an int or a str, and 7, 7.0 and "7" are the same id.
References are replaced by the id of the entry that they refer to, so that results are written with
the ids of the file.

Annotations that refer to nothing or have no mask are skipped and counted. Any other error raises
InputError or, with skip_bad, skips the video or annotation.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path

import numpy as np

from reading.ids import EntryName, Id, by_id, id_key, id_order, read_id
from reading.masks import find_bad_tracks, has_mask, mask_areas
from reading.pictures import check_pixels
from runtime.errors import InputError, shown
from runtime.files import read_json

MAX_AREA = 1e10  # pixels: the end of the metric's last range
MAX_SUFFIXES = 5  # of a name; a checkpoint may contain any number of equal names and ids


# Results


class Skipped:
    """Skipped entries by reason: their number, and the first one as an example."""

    def __init__(self, files: Iterable["Skipped"] = ()):
        """files: the skipped entries of several files, to be merged."""
        self.reasons: dict[str, tuple[int, str]] = {}
        for file in files:
            for reason, (count, first) in file.reasons.items():
                self.add(reason, first, count)

    def add(self, reason: str, example: str, count: int = 1) -> None:
        before, first = self.reasons.get(reason, (0, example))
        self.reasons[reason] = before + count, first

    @property
    def total(self) -> int:
        """The number of entries."""
        return sum(count for count, _ in self.reasons.values())

    def sentences(self) -> list[str]:
        """One line per reason."""
        return [
            f"{reason}: {count}; the first: {first}"
            for reason, (count, first) in self.reasons.items()
        ]


@dataclass
class AnnotationFile:
    """An annotation file in the format described above."""

    name: str  # for messages
    content: dict  # "videos", "categories", "annotations"
    skipped: Skipped = field(default_factory=Skipped)
    left_out: list[Id] = field(default_factory=list)  # ids of videos skipped by skip_bad

    @property
    def categories(self) -> list[tuple[Id, str]]:
        """(id, name), sorted by id: the order of the 0-based labels."""
        return ordered_categories(self.content["categories"])

    def without(self, videos: Iterable[Id]) -> "AnnotationFile":
        """The file without some videos and their annotations; unknown ids are ignored.

        Raises InputError if no video remains.
        """
        keys = set(map(id_key, videos))
        videos, annotations = self.content["videos"], self.content["annotations"]
        removed = [video["id"] for video in videos if id_key(video["id"]) in keys]
        if not removed:
            return self
        if len(removed) == len(videos):
            raise InputError(f"all {len(removed)} videos of {self.name} are left out")
        ids = set(removed)
        content = self.content | {
            "videos": [video for video in videos if video["id"] not in ids],
            "annotations": [entry for entry in annotations if entry["video_id"] not in ids],
        }
        return AnnotationFile(self.name, content, self.skipped, self.left_out + removed)


# Reading


def read_annotations(
    path: str | Path,
    skip_bad: bool = False,
    locate: Callable[[dict, EntryName], None] | None = None,
) -> AnnotationFile:
    """Read an annotation file; see `complete`."""
    return complete(read_json(path), str(path), skip_bad, locate)


def read_categories(path: str | Path) -> list[tuple[Id, str]]:
    """(id, name) of the categories of an annotation file, sorted by id."""
    content = read_json(path)
    categories = content.get("categories") if isinstance(content, dict) else None
    return ordered_categories(complete_categories(categories, str(path)))


def complete(
    content,
    name: str,
    skip_bad: bool = False,
    locate: Callable[[dict, EntryName], None] | None = None,
) -> AnnotationFile:
    """Convert a parsed annotation file to the format above; `content` is not modified.

    Args:
        name: of the file, for messages.
        skip_bad: skip invalid videos and annotations instead of raising InputError.
        locate: called with every video and its EntryName, to find its frames. It may set "height"
            and "width" if they are None (neither the file nor a mask defines them), and raise
            InputError.

    Raises InputError naming the invalid entry, or listing what was skipped if nothing remains.
    """
    content, what = to_videos(content, name)
    categories = complete_categories(content["categories"], name)
    file = AnnotationFile(name, {"categories": categories})
    file.content["videos"] = complete_videos(content, what, file, skip_bad, locate)
    file.content["annotations"] = complete_annotations(content, what, file, skip_bad)
    return file


def to_videos(content, name: str) -> tuple[dict, str]:
    """Rename the lists of a file to those of YouTube-VIS; also returns "video" or "image"."""
    what = "video"
    if isinstance(content, dict) and content.get("images") and not content.get("videos"):
        content, what = images_to_videos(content, name), "image"
    for key in ("videos", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(
                f"{name} has no list of {key}: it is neither in the YouTube-VIS nor "
                "in the COCO format"
            )
        if not content[key]:
            raise InputError(f"{name} has an empty list of {key}")
    if not isinstance(content.get("annotations") or [], list):
        raise InputError(f"{name} has annotations that are no list")
    return content | {"annotations": content.get("annotations") or []}, what


def images_to_videos(content: dict, name: str) -> dict:
    """Convert a COCO file to the format of YouTube-VIS: every image is a video of one frame.

    Entries that are not dicts are kept, for a later error message.
    """

    def video(image):
        files = {"file_names": [image["file_name"]]} if "file_name" in image else {}
        return image | {"length": 1} | files

    def track(annotation):
        segmentation, area = annotation.get("segmentation"), annotation.get("area")
        return annotation | {
            "video_id": annotation.get("image_id"),
            "areas": [area],
            "segmentations": [segmentation] if has_mask(segmentation) else None,
        }

    changed = {}
    for key, change, source in (("videos", video, "images"), ("annotations", track, "annotations")):
        entries = content.get(source) or []
        if not isinstance(entries, list):
            raise InputError(f"{name} has {source} that are no list")
        changed[key] = [change(entry) if isinstance(entry, dict) else entry for entry in entries]
    return content | changed


def as_dict(entry, where: EntryName) -> dict:
    """The entry; InputError if it is not a dict."""
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {shown(entry)}, which is no entry")
    return entry


def whole_number(entry: dict, key: str, where: EntryName) -> int | None:
    """The integer under a key; None if it is missing (or NaN, as written by pandas)."""
    value = entry.get(key)
    if value is None or isinstance(value, float) and isnan(value):
        return None
    if not isinstance(id_key(value), int):
        raise InputError(f"{where} has {key} {shown(value)}, which is no whole number")
    return id_key(value)


# Categories


def complete_categories(entries, name: str) -> list[dict]:
    """Categories with ids and unique names; InputError if there are none."""
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{name} has no list of categories")
    categories = []
    for index, entry in enumerate(entries):
        where = EntryName("category", index, entry, name)
        label = as_dict(entry, where).get("name")
        if isinstance(label, bool) or not isinstance(label, (str, int, float)) or label != label:
            raise InputError(f"{where} has the name {shown(label)}, which is no text")
        categories.append(entry | {"id": read_id(entry, "id", where), "name": one_line(str(label))})
    by_id(categories, "categories", name)
    names = unique_names([(category["id"], category["name"]) for category in categories])
    return [category | {"name": label} for category, label in zip(categories, names)]


def one_line(text: str) -> str:
    """Normalise whitespace, and replace control characters and lone surrogates."""
    text = " ".join(text.split())
    return "".join(
        "\ufffd" if unicodedata.category(letter) in ("Cc", "Cs") else letter for letter in text
    )


def unique_names(categories: list[tuple[Id, str]]) -> list[str]:
    """The names of categories; ambiguous ones with the id: "cat (id 3)"."""
    names = [name for _, name in categories]
    for _ in range(MAX_SUFFIXES):  # "cat (id 3)" may exist already
        count = Counter(names)
        names = [
            f"{name} (id {category_id})" if count[name] > 1 else name
            for name, (category_id, _) in zip(names, categories)
        ]
    return names


def ordered_categories(categories: list[dict]) -> list[tuple[Id, str]]:
    """(id, name), sorted by id."""
    pairs = [(category["id"], category["name"]) for category in categories]
    return sorted(pairs, key=lambda pair: id_order(pair[0]))


# Videos


def complete_videos(
    content: dict,
    what: str,
    file: AnnotationFile,
    skip_bad: bool,
    locate: Callable[[dict, EntryName], None] | None,
) -> list[dict]:
    """Videos with ids, lengths and sizes."""
    sizes, videos = find_sizes(content), []
    for index, entry in enumerate(content["videos"]):
        where = EntryName(what, index, entry, file.name)
        try:
            video = complete_video(entry, sizes, where)
            if locate:
                locate(video, where)
            check_size(video, where)
        except InputError as error:
            if not skip_bad:
                raise
            file.skipped.add(f"{what}s that cannot be used", str(error))
            if isinstance(entry, dict) and id_key(entry.get("id")) is not None:
                file.left_out.append(entry["id"])
        else:
            videos.append(video)
    if not videos:
        raise InputError(f"nothing of {file.name} can be used; {file.skipped.sentences()[0]}")
    by_id(videos, f"{what}s", file.name)
    return videos


def complete_video(entry, sizes: dict[Id, tuple[int, int]], where: EntryName) -> dict:
    """A video with id, length, and size (None if unknown)."""
    length, files = whole_number(as_dict(entry, where), "length", where), entry.get("file_names")
    if files is not None:
        if not isinstance(files, list):
            raise InputError(f"{where} has file_names {shown(files)}, which are no list")
        if length not in (None, len(files)):
            raise InputError(f"{where} has {len(files)} file_names, but a length of {length}")
        length = len(files)
    if length is None:
        raise InputError(f"{where} has neither file_names nor a length")
    if length < 1:
        raise InputError(f"{where} has no frames")
    video = entry | {"id": read_id(entry, "id", where), "length": length}
    size = whole_number(entry, "height", where), whole_number(entry, "width", where)
    if None in size:
        size = sizes.get(id_key(video["id"]), (None, None))
    return video | {"height": size[0], "width": size[1]}


def check_size(video: dict, where: EntryName) -> None:
    """InputError unless the size is known and valid."""
    if video["height"] is None:
        raise InputError(f"{where} has no height and width, and no mask tells them")
    check_pixels(video["height"], video["width"], where)


def find_sizes(content: dict) -> dict[Id, tuple[int, int]]:
    """{id_key of a video: (height, width)} from its first RLE; {} if all videos have a size."""
    if all(
        isinstance(video, dict) and id_key(video.get("height")) and id_key(video.get("width"))
        for video in content["videos"]
    ):
        return {}
    sizes = {}
    for entry in content["annotations"]:
        masks = entry.get("segmentations") if isinstance(entry, dict) else None
        for mask in masks if isinstance(masks, list) else []:
            size = mask.get("size") if isinstance(mask, dict) else None
            sides = [id_key(side) for side in size] if isinstance(size, list) else []
            if len(sides) == 2 and all(isinstance(side, int) for side in sides):
                sizes.setdefault(id_key(entry.get("video_id")), tuple(sides))
    return sizes


# Annotations


def complete_annotations(
    content: dict, what: str, file: AnnotationFile, skip_bad: bool
) -> list[dict]:
    """The annotations with valid references and masks, with areas."""
    videos = by_id(file.content["videos"], f"{what}s", file.name)
    categories = by_id(file.content["categories"], "categories", file.name)
    left_out = set(map(id_key, file.left_out))
    annotations = []
    for index, entry in enumerate(content["annotations"]):
        where = EntryName("annotation", index, entry, file.name)
        try:
            video_key = reference(entry, f"{what}_id", where)
            category_key = reference(entry, "category_id", where)
            if video_key in left_out:
                continue
            if video_key is None or category_key is None:
                file.skipped.add(f"annotations that refer to no {what} or category", str(where))
                continue
            if video_key not in videos:
                file.skipped.add(
                    f"annotations of {what}s that do not exist",
                    f"{where}, of {what} {shown(video_key)}",
                )
            elif category_key not in categories:
                file.skipped.add(
                    "annotations of categories that do not exist",
                    f"{where}, of category {shown(category_key)}",
                )
            elif not has_track(entry.get("segmentations")):
                file.skipped.add("annotations without a mask", str(where))
            else:
                refers_to = videos[video_key], categories[category_key]
                annotations.append(complete_annotation(entry, index, *refers_to, where))
        except InputError as error:
            if not skip_bad:
                raise
            file.skipped.add("annotations that cannot be used", str(error))
    annotations = with_readable_masks(annotations, videos, file, skip_bad)
    if content["annotations"] and not annotations:
        raise InputError(
            f"none of the {len(content['annotations'])} annotations of {file.name} "
            f"can be used; {'; '.join(file.skipped.sentences())}"
        )
    return annotations


def reference(entry, key: str, where: EntryName) -> Id | None:
    """The id_key of what an annotation refers to; None if it is missing."""
    value = as_dict(entry, where).get(key)
    if value is None or value != value:  # NaN, as written by pandas
        return None
    value_key = id_key(value)
    return id_key(read_id(entry, key, where)) if value_key is None else value_key


def has_track(segmentations) -> bool:
    """Whether an annotation has masks, not only a box.

    A list of None is an object that is never visible, which counts in the official metric.
    """
    if not segmentations or not isinstance(segmentations, list):
        return bool(segmentations)
    return any(map(has_mask, segmentations)) or all(mask is None for mask in segmentations)


def complete_annotation(
    entry: dict, index: int, video: dict, category: dict, where: EntryName
) -> dict:
    """An annotation with the ids of its references; areas are None if they must be computed."""
    masks, areas, length = entry["segmentations"], entry.get("areas"), video["length"]
    crowd = entry.get("iscrowd")
    if not isinstance(masks, list) or len(masks) != length:
        count = len(masks) if isinstance(masks, list) else "no list of"
        raise InputError(f"{where} has {count} segmentations, its video has {length} frames")
    crowd = int(crowd) if isinstance(crowd, bool) else whole_number(entry, "iscrowd", where) or 0
    if crowd not in (0, 1):
        raise InputError(f"{where} has iscrowd {shown(crowd)}, which is neither 0 nor 1")
    return entry | {
        "id": index if entry.get("id") is None else read_id(entry, "id", where),
        "video_id": video["id"],
        "category_id": category["id"],
        "iscrowd": crowd,
        "areas": areas if are_areas(areas, length) else None,
    }


def are_areas(areas, length: int) -> bool:
    """Whether these are areas: pixels or None per frame, and not only None."""
    if not isinstance(areas, list) or len(areas) != length:
        return False
    known = [area for area in areas if area is not None]
    return bool(known) and all(
        isinstance(area, (int, float, np.number)) and 0 <= area <= MAX_AREA for area in known
    )


def with_readable_masks(
    annotations: list[dict], videos: dict[Id, dict], file: AnnotationFile, skip_bad: bool
) -> list[dict]:
    """The annotations with valid masks; missing areas are computed."""
    tracks = []
    for annotation in annotations:
        video = videos[id_key(annotation["video_id"])]
        tracks.append((annotation["segmentations"], video["height"], video["width"]))
    bad = set()
    for number, frame, reason in find_bad_tracks(tracks):
        where = EntryName("annotation", number, annotations[number], file.name)
        fault = f"{where}, frame {frame}, has a segmentation that cannot be read: {reason}"
        if not skip_bad:
            raise InputError(fault)
        file.skipped.add("annotations that cannot be used", fault)
        bad.add(number)
    kept = [number for number in range(len(annotations)) if number not in bad]
    for number in kept:
        if annotations[number]["areas"] is None:
            annotations[number]["areas"] = mask_areas(*tracks[number])
    return [annotations[number] for number in kept]
