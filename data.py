"""Data sets in the YouTube-VIS and COCO formats; run as a program, writes the synthetic data set.

    python data.py                              # writes datasets/synthetic (train and valid)
    python data.py --root /data/mine --videos 1000 --height 192 --width 320 --seed 7
    python data.py --from-masks masks --images frames --root datasets/mine    # your own videos

A data set is a JSON file (see reading/annotations.py) and a folder of frames. clips.py samples
training clips from it. Upstream: vita/data/datasets/ytvis.py and convert_coco2ytvis.py.
Shape letters: T frames, H, W.
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

from batching import short_side_size
from reading.annotations import read_annotations, read_categories
from reading.id_masks import convert, read_classes
from reading.ids import EntryName, Id, id_key, id_order
from reading.masks import read_mask, to_rle
from reading.pictures import read_picture
from runtime.errors import InputError, cli_errors, shown
from runtime.files import first_existing

__all__ = [
    "InputError",
    "Video",
    "VideoSet",
    "at_test_size",
    "frames_at_test_size",
    "read_categories",
    "read_frame",
    "read_mask",
    "read_picture",
    "to_rle",
]


@dataclass
class Video:
    """One video of a data set, as described by its JSON file."""

    id: Id  # int or str, as in the JSON
    height: int  # pixels
    width: int  # pixels
    files: list[Path]  # its T frames
    annotations: list[dict]  # see reading/annotations.py; "label" is the 0-based class

    @property
    def name(self) -> str:
        """A file name for the video, unique in its data set."""
        key = id_key(self.id)
        if isinstance(key, int) and abs(key) < 10**18:
            return f"{key:05d}"
        # Unlike file_name_for, unique on file systems that ignore case as well.
        text = str(key)
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        return re.sub("[^A-Za-z0-9]+", "-", text)[:40].strip("-") + f"-{digest}"


# Reading a data set


class VideoSet:
    """A data set in the YouTube-VIS or the COCO format, validated when it is opened.

    Args:
        json_path: annotation file.
        frames_root: folder that the file names in the JSON are relative to.
        skip_bad: leave out invalid entries instead of raising InputError.
        category_map: maps category ids of the JSON to ids of `categories`, those of another data
            set. Annotations of other categories are dropped, as in convert_coco2ytvis.py.
        categories: used with category_map.

    Attributes:
        path: the JSON file.
        videos: list of Video, sorted by id.
        categories: [(id, name), ...], sorted by id: the order of the 0-based labels.
        file: the return value of reading/annotations.py, without the videos that were left out.
        ground_truth: its content, the ground truth of evaluation/metric.py.
        skipped: what was left out, by reason.
    """

    def __init__(
        self,
        json_path: str | Path,
        frames_root: str | Path,
        skip_bad: bool = False,
        category_map: dict[int, int] | None = None,
        categories: list[tuple[Id, str]] | None = None,
    ):
        self.path = Path(json_path)
        self.category_map = category_map
        root = first_existing("folder of frames", [Path(frames_root)])
        files = {}
        folder_names.cache_clear()  # the folders may have changed since the last data set
        folder_inside.cache_clear()

        def locate(video: dict, where: EntryName) -> None:
            paths = find_frames(root, video, where)
            files[id_key(video["id"])] = paths
            if video["height"] is None:
                video["width"], video["height"] = read_picture(paths[0]).size

        self.file = read_annotations(json_path, skip_bad, locate)
        self.ground_truth = self.file.content
        self.skipped = self.file.skipped
        self.categories = categories or self.file.categories
        videos = {}
        for video in self.ground_truth["videos"]:
            paths = files[id_key(video["id"])]
            videos[video["id"]] = Video(video["id"], video["height"], video["width"], paths, [])
        self.videos = sorted(videos.values(), key=lambda video: id_order(video.id))
        labels = self._labels()
        for annotation in self.ground_truth["annotations"]:
            label = labels.get(id_key(annotation["category_id"]))
            if label is not None:
                videos[annotation["video_id"]].annotations.append(annotation | {"label": label})

    def _labels(self) -> dict[Id, int]:
        """{category id of the JSON: 0-based label}."""
        labels = {
            id_key(category_id): label for label, (category_id, _) in enumerate(self.categories)
        }
        if self.category_map is None:
            return labels
        return {source: labels[target] for source, target in self.category_map.items()}

    def __len__(self) -> int:
        return len(self.videos)


# Frames on disk


def find_frames(root: Path, video: dict, where: EntryName) -> list[Path]:
    """The frame files of a video; InputError if one is missing or outside the folder."""
    if video.get("file_names") is None:
        raise InputError(f"{where} has no file_names, by which its frames are found")
    return [find_frame(root, name, where) for name in video["file_names"]]


def find_frame(root: Path, name, where: EntryName) -> Path:
    """The file of that name in a folder.

    The name may be absolute or of a form such as "./x", "a/../x" or "a\\x". Raises InputError if
    it is missing, outside the folder, or not a file name.
    """
    if not isinstance(name, str) or name.splitlines() != [name] or "\0" in name:
        raise InputError(f"{where} has the file name {shown(name)}, which is none")
    for notation in (name, name.replace("\\", "/")):  # Linux: an ordinary character
        for spelling in spellings(notation):
            inside = path_inside(root, spelling)
            if inside and (root / inside).name in folder_names((root / inside).parent):
                return root / inside
    if inside is None or re.match("[A-Za-z]:/", inside):  # a Windows drive
        raise InputError(f"{where} has the file name {name!r}, which leads outside of {root}")
    video = f"{where.what} {shown(where.entry['id'])}"
    raise InputError(f"frame {root / inside} of {video} is missing")


def spellings(name: str) -> list[str]:
    """A file name and its other possible encodings on disk.

    macOS stores accented letters in decomposed form (NFD). If the locale is not UTF-8, Python
    decodes UTF-8 file names with the locale's encoding, which may lack some characters.
    """
    if name.isascii():
        return [name]
    forms = [name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]
    forms += [os.fsdecode(form.encode("utf-8", "surrogatepass")) for form in forms]
    return [form for form in forms if can_be_named(form)]


def can_be_named(text: str) -> bool:
    """Whether the encoding of the file system has all characters of the text."""
    try:
        return bool(os.fsencode(text))
    except UnicodeEncodeError:
        return False


def path_inside(root: Path, name: str) -> str | None:
    """A file name relative to its folder, without any ".."; None if it is outside the folder."""
    start = os.path.abspath(root)
    path = os.path.normpath(os.path.join(start, name))
    folder, file = os.path.split(path)
    inside = folder_inside(start, folder)
    return None if inside is None else os.path.normpath(os.path.join(inside, file))


@cache
def folder_inside(root: str, folder: str) -> str | None:
    """A folder relative to another one, resolving links; None if it is not inside."""
    real_root, real = os.path.realpath(root), os.path.realpath(folder)
    for parent in (Path(folder), *Path(folder).parents):
        if os.path.realpath(parent) == real_root:
            return os.path.relpath(folder, parent)
    return os.path.relpath(real, real_root) if Path(real).is_relative_to(real_root) else None


@cache
def folder_names(folder: Path) -> frozenset[str]:
    """The names in a folder, cached: data sets have 100,000 frames in a few thousand folders."""
    return frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()


def read_frame(path: Path, height: int, width: int) -> Image.Image:
    """An RGB image; InputError if its size is not the given one, that of the JSON."""
    picture = read_picture(path)
    if picture.size != (width, height):
        raise InputError(
            f"frame {path} is {picture.width}x{picture.height}, its JSON says {width}x{height}"
        )
    return picture


# Frames at test size


def frames_at_test_size(
    video: Video, short_side: int, max_long_side: int = 1333, chunk: slice = slice(None)
) -> Iterator[Tensor]:
    """Yield the frames of a video (or of a chunk of it) at test size, uint8 (3, H, W)."""
    for file in video.files[chunk]:
        picture = read_frame(file, video.height, video.width)
        yield at_test_size(picture, short_side, max_long_side)


def at_test_size(picture: Image.Image, short_side: int, max_long_side: int = 1333) -> Tensor:
    """Resize an RGB image to uint8 (3, H, W), bilinear with Pillow as in detectron2."""
    height, width = short_side_size(picture.height, picture.width, short_side, max_long_side)
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


# Writing a data set

SYNTHETIC_FLAGS = ("videos", "valid_videos", "suite", "frames", "height", "width", "objects")
CONVERSION_FLAGS = ("images", "classes", "class_name", "valid_share", "held_out", "ignore_ids")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line of `python data.py`."""
    from synthetic.suites import SUITES

    parser = argparse.ArgumentParser(
        description="Write the synthetic data set, in the YouTube-VIS format: textured shapes that "
        "move, cross, occlude one another, leave the frame and come back.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--root", default="datasets/synthetic", help="folder to write; must not exist yet"
    )
    parser.add_argument("--videos", type=int, default=240, help="training videos")
    parser.add_argument("--valid-videos", type=int, default=24, help="held-out videos")
    parser.add_argument(
        "--suite",
        choices=SUITES,
        default="easy",
        help="a named difficulty; also sets the defaults of --frames and --objects",
    )
    parser.add_argument(
        "--frames", type=int, help="frames per video (default: the suite's, 20 for easy)"
    )
    parser.add_argument("--height", type=int, default=96, help="pixels")
    parser.add_argument("--width", type=int, default=160, help="pixels")
    parser.add_argument(
        "--objects",
        type=int,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="objects per video (default: the suite's, 1 4 for easy)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same data set, pixel by pixel"
    )
    own = parser.add_argument_group(
        "your own videos", "convert frames and mask images of instance ids (reading/id_masks.py)"
    )
    own.add_argument(
        "--from-masks",
        type=Path,
        metavar="FOLDER",
        help="one folder of mask images per video, one value per instance",
    )
    own.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="one folder of frames, or one video file, per video",
    )
    own.add_argument(
        "--classes",
        type=Path,
        metavar="CSV",
        help="columns video, instance and class (default: one class, --class-name)",
    )
    own.add_argument("--class-name", default="object", help="class of all instances")
    split = own.add_mutually_exclusive_group()
    split.add_argument(
        "--valid-share",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="of the videos, to be held out; chosen at random by --seed",
    )
    split.add_argument(
        "--held-out", nargs="+", metavar="VIDEO", help="hold out these videos, by their names"
    )
    own.add_argument(
        "--ignore-ids",
        type=int,
        nargs="*",
        default=[],
        metavar="ID",
        help="values that are no instance, beside 0",
    )
    args = parser.parse_args(arguments)
    # Those that are on the command line, even with the value of their default.
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))
    given = [
        name
        for name, value in vars(parser.parse_args(arguments, unset)).items()
        if value is not None
    ]
    others = SYNTHETIC_FLAGS if args.from_masks else CONVERSION_FLAGS
    for name in given:
        if name in others:
            condition = "is for synthetic videos: not with" if args.from_masks else "needs"
            parser.error(f"--{name.replace('_', '-')} {condition} --from-masks")
    if args.from_masks and not args.images:
        parser.error("--from-masks needs --images, the folder of the frames")
    if not 0 <= args.valid_share <= 1:
        parser.error("--valid-share must be between 0 and 1")
    return args


def main() -> None:
    """Write the data set that the command line describes."""
    with cli_errors():
        args = parse_arguments()
        if args.from_masks:
            classes = read_classes(args.classes, args.class_name)
            convert(
                args.images,
                args.from_masks,
                Path(args.root),
                classes,
                args.valid_share,
                args.ignore_ids,
                args.seed,
                args.held_out,
            )
        else:
            make_synthetic(args)


def make_synthetic(args: argparse.Namespace) -> None:
    """Write the synthetic data set."""
    # Imported here, so that loading real data does not depend on the renderer.
    from synthetic.suites import SUITES, make_dataset

    suite = SUITES[args.suite]
    frames = suite.frames if args.frames is None else args.frames
    objects = tuple(args.objects or suite.objects)
    try:
        make_dataset(
            args.root,
            args.videos,
            args.valid_videos,
            frames,
            args.height,
            args.width,
            objects,
            args.seed,
            suite.difficulty,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


if __name__ == "__main__":
    main()
