"""Videos in: data sets in the YouTube-VIS and COCO formats, and the built-in synthetic set.

    python data.py                              # writes datasets/synthetic (train and valid)
    python data.py --root /data/mine --videos 1000 --height 192 --width 320 --seed 7

A data set is a JSON, which reading/annotations.py reads, and a folder of frames. Training clips are
made of it in clips.py. Upstream: vita/data/datasets/ytvis.py and convert_coco2ytvis.py. Shape
letters: T frames, H, W.
"""
import argparse
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from augmentation import short_side_size
from reading.annotations import read_annotations, read_categories
from reading.ids import EntryName, Id, id_key, id_order
from reading.masks import read_mask, to_rle
from reading.pictures import read_picture
from runtime.errors import InputError, cli_errors, shown
from runtime.files import first_existing

__all__ = ["InputError", "Video", "VideoSet", "at_test_size", "find_split", "read_categories",
           "read_frame", "read_mask", "read_picture", "test_frames", "to_rle"]


@dataclass
class Video:
    """One video of a data set, as its JSON describes it."""
    id: Id                   # as in the JSON: a whole number or text
    height: int              # pixels
    width: int               # pixels
    files: list[Path]        # of its T frames
    annotations: list[dict]  # as reading/annotations.py says, with "label": the 0-based class

    @property
    def name(self) -> str:
        """A name for files that belong to the video; no other video of its set has it."""
        key = id_key(self.id)
        if isinstance(key, int) and abs(key) < 10 ** 18:
            return f"{key:05d}"
        # Unlike file_name_for: names differ also where "A" and "a" are the same file.
        text = str(key)
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        return re.sub("[^A-Za-z0-9]+", "-", text)[:40].strip("-") + f"-{digest}"


# Reading a data set

JSON_PATHS = ("{}.json", "{}/instances.json", "instances_{}.json", "annotations_{}.json",
              "annotations/{}.json", "annotations/annotations_{}.json",
              "annotations/instances_{}.json")
FRAMES_PATHS = ("{}/JPEGImages", "JPEGImages/{}", "{}")


def find_split(root: str | Path, split: str) -> tuple[Path, Path]:
    """The annotation file and the frames folder of a split, under the names people have on disk.

    Raises InputError naming every path tried.
    """
    root, names = Path(root), ("valid", "val") if split in ("valid", "val") else (split,)
    jsons = [root / path.format(name) for name in names for path in JSON_PATHS]
    folders = [root / path.format(name) for name in names for path in FRAMES_PATHS]
    folders.append(root / "JPEGImages")
    return first_existing("annotation file", jsons), first_existing("folder of frames", folders)


class VideoSet:
    """A data set in the YouTube-VIS or the COCO format, checked when it is opened.

    path: of the JSON.
    videos: in the order of their ids.
    categories: [(id, name), ...] in the order of their ids, which is that of the 0-based labels.
    file: the JSON as reading/annotations.py gives it, less the videos that are left out.
    ground_truth: its content, for the metric.
    skipped: what was left out, by reason.
    """

    def __init__(self, json_path: str | Path, frames_root: str | Path, skip_bad: bool = False,
                 category_map: dict[int, int] | None = None,
                 categories: list[tuple[Id, str]] | None = None):
        """skip_bad: leave out what is wrong, instead of an InputError.

        category_map: from the JSON's category ids to those of `categories`, which another data set
            has; annotations of other categories are left out, as convert_coco2ytvis.py does.
        """
        self.path, self.category_map = Path(json_path), category_map
        root, files = first_existing("folder of frames", [Path(frames_root)]), {}
        folder_names.cache_clear()  # what was there when another set was opened
        folder_inside.cache_clear()

        def locate(video: dict, where: EntryName) -> None:
            files[id_key(video["id"])] = found = find_frames(root, video, where)
            if video["height"] is None:
                video["width"], video["height"] = read_picture(found[0]).size

        self.file = read_annotations(json_path, skip_bad, locate)
        self.ground_truth, self.skipped = self.file.content, self.file.skipped
        self.categories = categories or self.file.categories
        videos = {video["id"]: Video(video["id"], video["height"], video["width"],
                                     files[id_key(video["id"])], [])
                  for video in self.ground_truth["videos"]}
        self.videos = sorted(videos.values(), key=lambda video: id_order(video.id))
        labels = {id_key(category_id): label
                  for label, (category_id, _) in enumerate(self.categories)}
        if category_map is not None:
            labels = {source: labels[target] for source, target in category_map.items()}
        for annotation in self.ground_truth["annotations"]:
            label = labels.get(id_key(annotation["category_id"]))
            if label is not None:
                videos[annotation["video_id"]].annotations.append(annotation | {"label": label})

    def __len__(self) -> int:
        return len(self.videos)


# Frames on disk

def find_frames(root: Path, video: dict, where: EntryName) -> list[Path]:
    """The files of a video's frames; InputError if one is missing, or not in the folder."""
    if video.get("file_names") is None:
        raise InputError(f"{where} has no file_names, by which its frames are found")
    return [find_frame(root, name, where) for name in video["file_names"]]


def find_frame(root: Path, name, where: EntryName) -> Path:
    """The file of that name in a folder, in any notation: absolute, "./x", "a/../x", "a\\x".

    InputError if it is missing, leads out of the folder, or is no file name.
    """
    if not isinstance(name, str) or name.splitlines() != [name] or "\0" in name:
        raise InputError(f"{where} has the file name {shown(name)}, which is none")
    for notation in (name, name.replace("\\", "/")):  # on Linux, \ is a letter like any other
        for spelling in spellings(notation):
            inside = path_inside(root, spelling)
            if inside and (root / inside).name in folder_names((root / inside).parent):
                return root / inside
    if inside is None or re.match("[A-Za-z]:/", inside):  # a disk of Windows
        raise InputError(f"{where} has the file name {name!r}, which leads outside of {root}")
    video = f"{where.what} {shown(where.entry['id'])}"
    raise InputError(f"frame {root / inside} of {video} is missing")


def spellings(name: str) -> list[str]:
    """A file name, and how else it may stand on the disk.

    macOS takes letters and accents apart. Where the locale is not UTF-8, Python knows a file by
    what its UTF-8 name means in the locale's encoding, which may not have all letters.
    """
    if name.isascii():
        return [name]
    forms = [name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]
    forms += [os.fsdecode(form.encode("utf-8", "surrogatepass")) for form in forms]
    return [form for form in forms if can_be_named(form)]


def can_be_named(text: str) -> bool:
    """Whether the file system's encoding has all letters."""
    try:
        return bool(os.fsencode(text))
    except UnicodeEncodeError:
        return False


def path_inside(root: Path, name: str) -> str | None:
    """A file name relative to its folder, without any ".."; None if it leads out of the folder."""
    start = os.path.abspath(root)
    folder, file = os.path.split(os.path.normpath(os.path.join(start, name)))
    inside = folder_inside(start, folder)
    return None if inside is None else os.path.normpath(os.path.join(inside, file))


@cache
def folder_inside(root: str, folder: str) -> str | None:
    """A folder relative to another one, whatever links lead to them; None if it is not inside."""
    real_root, real = os.path.realpath(root), os.path.realpath(folder)
    for parent in (Path(folder), *Path(folder).parents):
        if os.path.realpath(parent) == real_root:
            return os.path.relpath(folder, parent)
    return os.path.relpath(real, real_root) if Path(real).is_relative_to(real_root) else None


@cache
def folder_names(folder: Path) -> frozenset[str]:
    """The names in a folder, listed once: a set has 100,000 frames, but few thousand folders."""
    return frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()


def read_frame(path: Path, height: int, width: int) -> Image.Image:
    """An RGB picture of the size that the JSON states; InputError if it is not of that size."""
    picture = read_picture(path)
    if picture.size != (width, height):
        raise InputError(f"frame {path} is {picture.width}x{picture.height}, "
                         f"its JSON says {width}x{height}")
    return picture


# Frames at test size

def test_frames(video: Video, short_side: int, max_long_side: int = 1333,
                part: slice = slice(None)) -> Iterator[Tensor]:
    """The frames of a video at test size, uint8 (3, H, W), one by one, or of a part of it."""
    for file in video.files[part]:
        yield at_test_size(read_frame(file, video.height, video.width), short_side, max_long_side)


def at_test_size(picture: Image.Image, short_side: int, max_long_side: int = 1333) -> Tensor:
    """An RGB picture -> uint8 (3, H, W) of that size; bilinear by Pillow, as in detectron2."""
    height, width = short_side_size(picture.height, picture.width, short_side, max_long_side)
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


test_frames.__test__ = False  # its name is not pytest's business


def main() -> None:
    """Write the synthetic set as the command line says."""
    from synthetic.suites import SUITES, make_dataset
    parser = argparse.ArgumentParser(
        description="Write the synthetic data set: textured shapes that move, cross, occlude one "
        "another, leave and come back, in the YouTube-VIS format.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--root", default="datasets/synthetic",
                        help="folder to write; must not exist yet")
    parser.add_argument("--videos", type=int, default=240, help="training videos")
    parser.add_argument("--valid-videos", type=int, default=24, help="held-out videos")
    parser.add_argument("--suite", choices=SUITES, default="easy",
                        help="how hard, and in which respect: a named setting, which also says "
                        "frames and objects unless they are given")
    parser.add_argument("--frames", type=int,
                        help="frames a video (default: the suite's, 20 for easy)")
    parser.add_argument("--height", type=int, default=96, help="pixels")
    parser.add_argument("--width", type=int, default=160, help="pixels")
    parser.add_argument("--objects", type=int, nargs=2, metavar=("MIN", "MAX"),
                        help="objects a video (default: the suite's, 1 4 for easy)")
    parser.add_argument("--seed", type=int, default=0,
                        help="the same seed gives the same set, to the last pixel")
    args = parser.parse_args()
    suite = SUITES[args.suite]
    frames = suite.frames if args.frames is None else args.frames
    objects = tuple(args.objects or suite.objects)
    with cli_errors():
        try:
            make_dataset(args.root, args.videos, args.valid_videos, frames, args.height, args.width,
                         objects, args.seed, suite.difficulty)
        except ValueError as error:
            raise InputError(str(error)) from error


if __name__ == "__main__":
    main()
