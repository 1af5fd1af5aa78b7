"""Videos in: data sets in the YouTube-VIS and COCO formats, and the built-in synthetic set.

    python data.py                              # writes datasets/synthetic (train and valid), to train and evaluate on
    python data.py --root /data/mine --videos 1000 --height 192 --width 320 --seed 7

A data set is a JSON (videos, categories, annotations with one mask or null a frame: polygons, compressed or uncompressed
RLE) and a folder of frames; categories are read from the JSON, in the order of their ids. A COCO JSON (images instead of
videos) is read as videos of one frame. Upstream: vita/data/datasets/ytvis.py and convert_coco2ytvis.py. Training clips are
made of them in clips.py. Shape letters: T frames, I instances, H, W.
"""
import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from reprlib import repr as shown          # one short line, whatever a file holds

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor

from augmentation import short_side_size
from reading.pictures import check_pixels, read_picture
from run_length import find_fault
from runtime.errors import InputError, cli_errors
from runtime.files import first_existing, read_json

LONGEST_OUTLINE = 2 ** 20  # pixels, of all polygons of one segmentation


@dataclass
class Video:
    """One video of a data set, as its JSON describes it."""
    id: int
    height: int
    width: int
    files: list[Path]
    annotations: list[dict]  # with "label": the 0-based class


# Reading a data set

JSON_PATHS = ("{}.json", "{}/instances.json", "instances_{}.json", "annotations_{}.json", "annotations/{}.json",
              "annotations/annotations_{}.json", "annotations/instances_{}.json")
FRAMES_PATHS = ("{}/JPEGImages", "JPEGImages/{}", "{}")


def find_split(root: str | Path, split: str) -> tuple[Path, Path]:
    """The annotation file and the frames folder of a split, under the names that people have on disk.

    Raises InputError naming every path tried.
    """
    root, names = Path(root), ("valid", "val") if split in ("valid", "val") else (split,)
    jsons = [root / path.format(name) for name in names for path in JSON_PATHS]
    folders = [root / path.format(name) for name in names for path in FRAMES_PATHS]
    return first_existing("annotation file", jsons), first_existing("folder of frames", [*folders, root / "JPEGImages"])


def read_categories(path: str | Path) -> list[tuple[int, str]]:
    """The categories of a data set's JSON, in the order of their ids; InputError if it has none."""
    content = read_json(path)
    try:
        categories = sorted((int(category["id"]), str(category["name"])) for category in content["categories"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path} has no list of categories") from error
    if not categories:
        raise InputError(f"{path} has an empty list of categories")
    return categories


def inside(root: Path, name: str, where: str | Path) -> Path:
    """The file of that name in a folder; InputError if a JSON's name leads out of it, or is no name."""
    plain = os.path.normpath(name)
    if os.path.isabs(plain) or plain.split(os.sep)[0] == os.pardir or name.splitlines() != [name]:
        raise InputError(f"{where} names the file {name!r}, which cannot be inside of {root}")
    return root / plain


def images_to_videos(content: dict) -> dict:
    """A COCO JSON as one in the YouTube-VIS format: every image a video of one frame."""
    videos = [{"id": image["id"], "height": image["height"], "width": image["width"], "file_names": [image["file_name"]]}
              for image in content["images"]]
    annotations = [{"id": annotation["id"], "video_id": annotation["image_id"], "category_id": annotation["category_id"],
                    "iscrowd": annotation.get("iscrowd", 0), "segmentations": [annotation["segmentation"]]}
                   for annotation in content.get("annotations") or []]
    return {"videos": videos, "annotations": annotations, "categories": content["categories"]}


class VideoSet:
    """A data set in the YouTube-VIS or the COCO format, checked when it is opened.

    categories: [(id, name), ...] in the order of their ids, which is the order of the 0-based labels.
    skipped: with skip_bad, a sentence for every video and annotation that was left out because something is wrong with it.
    """

    def __init__(self, json_path: str | Path, frames_root: str | Path, skip_bad: bool = False,
                 category_map: dict[int, int] | None = None, categories: list[tuple[int, str]] | None = None):
        """category_map: from the JSON's category ids to those of `categories`, which another data set has; annotations of a
        category that is not in it are left out, as convert_coco2ytvis.py does."""
        self.path, root = Path(json_path), first_existing("folder of frames", [Path(frames_root)])
        self.skip_bad, self.category_map, self.skipped = skip_bad, category_map, []
        content = read_json(json_path)
        try:
            if isinstance(content, dict) and "images" in content and "videos" not in content:
                content = images_to_videos(content)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{json_path} is not in the COCO format: {error!r} in an entry") from error
        self.ground_truth = content
        for key in ("videos", "categories"):
            if not isinstance(content, dict) or not isinstance(content.get(key), list) or not content[key]:
                raise InputError(f"{json_path} has no list of {key}: it is not in the YouTube-VIS format")
        try:
            own = sorted((int(category["id"]), str(category["name"])) for category in content["categories"])
            self.categories = own if category_map is None else categories
            self.videos = [Video(int(video["id"]), int(video["height"]), int(video["width"]),
                                 [inside(root, name, json_path) for name in video["file_names"]], []) for video in content["videos"]]
            self.videos.sort(key=lambda video: video.id)
            for what, ids in (("video", [video.id for video in self.videos]), ("category", [i for i, _ in own])):
                if len(set(ids)) < len(ids):
                    raise InputError(f"{json_path} has two entries of one {what} id")
            whole = [video for video in self.videos if self.accept(self.check_frames, video)]
            left_out, self.videos = {video.id for video in self.videos} - {video.id for video in whole}, whole
            self.add_annotations(content.get("annotations") or [], left_out)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{json_path} is not in the YouTube-VIS format: {error!r} in an entry") from error

    def accept(self, check: Callable, *arguments) -> bool:
        """Whether the check raised no InputError; without skip_bad the error goes on."""
        try:
            check(*arguments)
        except InputError as error:
            if not self.skip_bad:
                raise
            self.skipped.append(str(error))
            return False
        return True

    def add_annotations(self, annotations: list[dict], left_out: set[int]) -> None:
        """Hand every annotation to its video, with its 0-based label; those of videos that were left out are left out too."""
        labels = {category_id: label for label, (category_id, _) in enumerate(self.categories)}
        if self.category_map is not None:
            labels = {source: labels[target] for source, target in self.category_map.items()}
            annotations = [annotation for annotation in annotations if annotation["category_id"] in labels]
        videos = {video.id: video for video in self.videos}
        for annotation in annotations:
            if annotation["video_id"] not in left_out and self.accept(self.check_annotation, annotation, videos, labels):
                videos[annotation["video_id"]].annotations.append(annotation | {"label": labels[annotation["category_id"]]})

    def check_annotation(self, annotation: dict, videos: dict[int, Video], labels: dict[int, int]) -> None:
        """Its video and its category exist, and it has a segmentation or null for every frame."""
        for key in ("id", "video_id", "category_id"):
            if not isinstance(annotation[key], int):
                raise InputError(f"an annotation of {self.path} has {key} {shown(annotation[key])}, which is no whole number")
        where = f"annotation {annotation['id']} of {self.path}"
        if annotation["video_id"] not in videos:
            raise InputError(f"{where} belongs to video {annotation['video_id']}, which does not exist")
        if annotation["category_id"] not in labels:
            raise InputError(f"{where} has category {annotation['category_id']}, which is not among the categories")
        masks, length = annotation["segmentations"], len(videos[annotation["video_id"]].files)
        if not isinstance(masks, list) or len(masks) != length:
            raise InputError(f"{where} has {len(masks) if isinstance(masks, list) else 'no list of'} segmentations, "
                             f"its video has {length} frames")

    def check_frames(self, video: Video) -> None:
        """At least one frame, every file there, and a size that can be read."""
        check_pixels(video.height, video.width, f"video {video.id} of {self.path}")
        if not video.files:
            raise InputError(f"video {video.id} of {self.path} has no frames")
        for file in video.files:
            if file.name not in folder_names(file.parent):
                raise InputError(f"frame {file} of video {video.id} is missing")

    def __len__(self) -> int:
        return len(self.videos)


@cache
def folder_names(folder: Path) -> frozenset[str]:
    """The names in a folder, listed once: a data set has a hundred thousand frames, but few thousand folders."""
    return frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()


def read_frame(path: Path, height: int, width: int) -> Image.Image:
    """An RGB picture of the size that the JSON states; InputError if it is damaged or of another size."""
    picture = read_picture(path)
    if picture.size != (width, height):
        raise InputError(f"frame {path} is {picture.width}x{picture.height}, its JSON says {width}x{height}")
    return picture


def to_rle(segmentation: dict | list | None, height: int, width: int, where: str, checked: bool = False) -> dict | None:
    """Compressed RLE of one frame's segmentation: polygons, uncompressed or compressed RLE; None for null and no polygon.

    `where` names it in the InputError that a damaged one gets; `checked`: a compressed one is known to be right.
    """
    try:
        if isinstance(segmentation, list):
            if not all(isinstance(polygon, list) for polygon in segmentation):
                raise ValueError("a part of it is no list of coordinates")
            polygons = [polygon for polygon in segmentation if len(polygon) % 2 == 0 and len(polygon) >= 6]
            check_outlines(polygons)
            return rle.merge(rle.frPyObjects(polygons, height, width)) if polygons else None
        if not segmentation:
            return None
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"its size is {shown(segmentation['size'])}, its video's [height, width] {[height, width]}")
        counts = segmentation["counts"]
        if not isinstance(counts, list):
            if fault := None if checked else find_fault([counts], [height * width]):
                raise ValueError(fault[1])
            return segmentation
        if min(counts, default=0) < 0 or any(run % 1 for run in counts) or sum(counts) != height * width:
            raise ValueError("its runs do not fill the frame")
        return rle.frPyObjects(segmentation, height, width)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise InputError(f"{where} has a segmentation that cannot be read: {reason}") from error


def check_outlines(polygons: list[list]) -> None:
    """ValueError unless every coordinate is a number and all outlines together have an end: pycocotools walks along them."""
    length = 0.0
    for polygon in polygons:
        points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        if not (np.abs(points) < LONGEST_OUTLINE).all():       # nor is that so of NaN
            raise ValueError("a coordinate is no number or lies far outside of the frame")
        length += np.abs(np.diff(points, axis=0, append=points[:1])).max(1).sum()
    if length > LONGEST_OUTLINE:
        raise ValueError(f"its outline is longer than {LONGEST_OUTLINE} pixels")


def read_mask(segmentation: dict | list | None, height: int, width: int, where: str) -> np.ndarray:
    """bool (H, W) of one frame's segmentation; arguments and InputError as of `to_rle`."""
    encoded = to_rle(segmentation, height, width, where)
    return rle.decode(encoded).astype(bool) if encoded else np.zeros((height, width), bool)


# Frames at test size

def test_frames(video: Video, short_side: int, max_long_side: int = 1333, part: slice = slice(None)) -> Iterator[Tensor]:
    """The frames of a video at test size, uint8 (3, H, W), one by one, or of a part of it."""
    for file in video.files[part]:
        yield at_test_size(read_frame(file, video.height, video.width), short_side, max_long_side)


def at_test_size(picture: Image.Image, short_side: int, max_long_side: int = 1333) -> Tensor:
    """An RGB picture -> uint8 (3, H, W) of so many pixels; bilinear by Pillow, as detectron2 does."""
    height, width = short_side_size(picture.height, picture.width, short_side, max_long_side)
    return torch.from_numpy(np.array(picture.resize((width, height), Image.Resampling.BILINEAR))).permute(2, 0, 1)


test_frames.__test__ = False  # its name is not pytest's business


def main() -> None:
    """Write the synthetic set as the command line says."""
    from synthetic import SUITES, make_dataset
    parser = argparse.ArgumentParser(description="Write the synthetic data set: textured shapes that move, cross, occlude one "
                                     "another, leave and come back, in the YouTube-VIS format.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--root", default="datasets/synthetic", help="folder to write; must not exist yet")
    parser.add_argument("--videos", type=int, default=240, help="training videos")
    parser.add_argument("--valid-videos", type=int, default=24, help="held-out videos")
    parser.add_argument("--suite", choices=SUITES, default="easy", help="how hard, and in which respect: a named setting, which also "
                        "says frames and objects unless they are given")
    parser.add_argument("--frames", type=int, help="frames a video (default: the suite's, 20 for easy)")
    parser.add_argument("--height", type=int, default=96, help="pixels")
    parser.add_argument("--width", type=int, default=160, help="pixels")
    parser.add_argument("--objects", type=int, nargs=2, metavar=("MIN", "MAX"), help="objects a video (default: the suite's, 1 4 for easy)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same set, to the last pixel")
    args = parser.parse_args()
    suite = SUITES[args.suite]
    with cli_errors():
        try:
            make_dataset(args.root, args.videos, args.valid_videos, suite.frames if args.frames is None else args.frames, args.height,
                         args.width, tuple(args.objects or suite.objects), args.seed, suite.difficulty)
        except ValueError as error:
            raise InputError(str(error)) from error


if __name__ == "__main__":
    main()
