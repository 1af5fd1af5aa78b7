"""Converts frames and one mask image per frame to a data set in the YouTube-VIS format.

    python data.py --from-masks MASKS --images FRAMES --root datasets/mine --classes classes.csv

    FRAMES/VIDEO/NAME.jpg        frames of a video (or FRAMES/VIDEO.mp4, read with ffmpeg)
    MASKS/VIDEO/NAME.png         the mask image of a frame: one value per instance, 0 = background
    classes.csv                  columns video, instance, class; without it, one class for all

Values are grey values (8 or 16 bits), palette indices, or colours (each colour is an instance, with
the number red + 256 green + 65536 blue). DAVIS, SAM 2 tools, CVAT, label editors and demo.py (ids/)
write such images. A value is the same instance in all frames of a video. Frames without a mask
image are left out, and counted in a message: a frame without objects has an image of zeros. Writes
ROOT/train.json, ROOT/train/, ROOT/valid.json and ROOT/valid/.
"""

import csv
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from pycocotools import mask as rle
from tqdm import tqdm

from reading.pictures import check_pixels, open_picture, read_picture
from reading.videos import read_video
from runtime.errors import InputError, shown
from runtime.files import save_json

FOR_ALL = ("*", 0)  # key of the class that holds for every instance
COLUMNS = ("video", "instance", "class")  # of the CSV file of classes
LOSSY_FORMATS = ("JPEG", "MPO")  # of Pillow; their values are not those that were saved
EXAMPLES = 3  # in a message


def convert(
    frames: Path,
    masks: Path,
    root: Path,
    classes: dict[tuple[str, int], str],
    valid_share: float,
    ignored: list[int],
    seed: int,
    held_out: list[str] | None = None,
) -> None:
    """Write a data set to `root`, which must not exist yet.

    classes: {(video, instance): class}, or {("*", 0): class} for all. ignored: values that are no
    instance, such as 255 for borders. The split valid has the videos `held_out`; None: a share of
    all videos, valid_share (0..1), chosen at random by `seed`.
    """
    if root.exists():
        raise InputError(f"{root} exists: choose another folder")
    folders = sorted(masks.iterdir()) if masks.is_dir() else []
    videos = [folder.name for folder in folders if folder.is_dir()]
    if not videos:
        raise InputError(f"{masks} holds no folders of mask images, one for each video")
    if held_out is None:
        count = round(valid_share * len(videos))
        if valid_share and len(videos) > 1:
            count = max(1, count)
        held_out = random.Random(seed).sample(videos, count)
    valid = set(held_out)
    if valid - set(videos):
        raise InputError(
            f"{masks} holds no video to hold out named {examples(valid - set(videos))}"
        )
    splits = {"train": [video for video in videos if video not in valid], "valid": sorted(valid)}
    root.parent.mkdir(parents=True, exist_ok=True)
    lines, seen = [], set()
    # Renamed when it is complete, so that a failure leaves nothing.
    with tempfile.TemporaryDirectory(prefix=f"{root.name}.", dir=root.parent) as folder:
        partial = Path(folder, "set")
        for split, chosen in splits.items():
            (partial / split).mkdir(parents=True)
            content = {"categories": [], "videos": [], "annotations": []}
            for number, name in enumerate(sorted(set(classes.values())), 1):
                content["categories"].append({"id": number, "name": name})
            for video in tqdm(chosen, desc=split, unit="video", disable=None):
                found = add_video(content, video, frames, masks, partial / split, classes, ignored)
                seen |= {(video, instance) for instance in found}
            save_json(partial / f"{split}.json", content, indent=None)
            lines.append(
                f"{root / split}.json: {len(chosen)} videos, {len(content['annotations'])} "
                f"instances, {len(content['categories'])} classes"
                + (f" ({', '.join(chosen)})" if 0 < len(chosen) <= 8 else "")
            )
        partial.rename(root)
    print("\n".join(lines))
    unused = [f"{video},{instance}" for video, instance in classes.keys() - seen - {FOR_ALL}]
    if unused:
        print(
            f"warning: no mask image has the video and instance of {len(unused)} of "
            f"{len(classes)} rows of the classes: {examples(unused)}"
        )


def examples(names: Iterable[str]) -> str:
    """The first names for a message, in order."""
    names = sorted(names)
    return ", ".join(names[:EXAMPLES]) + ", ..." * (len(names) > EXAMPLES)


def add_video(
    content: dict,
    video: str,
    frames: Path,
    masks: Path,
    output: Path,
    classes: dict[tuple[str, int], str],
    ignored: list[int],
) -> list[int]:
    """Append a video to an annotation file, and put its frames into `output`.

    Returns the numbers of its instances.
    """
    pairs = list(pair_frames(frames, masks / video, output / video))
    instances, (height, width) = read_instances([image for _, image in pairs], {0, *ignored})
    for frame, image in pairs:
        picture = read_picture(frame)
        if picture.size != (width, height):
            raise InputError(
                f"mask image {image} is {width}x{height}, its frame {frame.name} "
                f"{picture.width}x{picture.height}: scale the masks of this video to the size of "
                "its frames, without interpolation"
            )
    category_ids = {category["name"]: category["id"] for category in content["categories"]}
    number = len(content["videos"]) + 1
    content["videos"].append(
        {
            "id": number,
            "height": height,
            "width": width,
            "length": len(pairs),
            "file_names": [f"{video}/{frame.name}" for frame, _ in pairs],
        }
    )
    for instance in sorted(instances):
        content["annotations"].append(
            {
                "id": len(content["annotations"]) + 1,
                "video_id": number,
                "category_id": category_ids[class_of(classes, video, instance)],
                "segmentations": instances[instance],
            }
        )
    return list(instances)


def read_classes(path: Path | None, default: str) -> dict[tuple[str, int], str]:
    """{(video, instance): class} of a CSV file with the columns video, instance and class."""
    if path is None:
        return {FOR_ALL: default}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            header, rows = reader.fieldnames or [], list(reader)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (csv.Error, ValueError) as error:
        raise InputError(f"{path} is not a CSV file: {error}") from error
    if not set(COLUMNS) <= set(header):
        raise InputError(
            f"{path} must begin with the header {','.join(COLUMNS)}, the names of its columns; its "
            f"first line is {shown(','.join(header))}"
        )
    classes = {}
    for row in rows:
        video, instance, name = (row[column] for column in COLUMNS)
        if name is None or not re.fullmatch("[0-9]{1,18}", instance.strip()):
            raise InputError(
                f"{path} has a row of video {shown(video)} that does not have an instance (a whole "
                f"number) and a class: {shown(instance)}, {shown(name)}"
            )
        classes[video, int(instance)] = name
    return classes


def class_of(classes: dict[tuple[str, int], str], video: str, instance: int) -> str:
    """The class of an instance. InputError if none is given."""
    try:
        return classes.get(FOR_ALL) or classes[video, instance]
    except KeyError as error:
        raise InputError(
            f"the classes do not list instance {instance} of video {video}, whose mask "
            "images contain it"
        ) from error


def pair_frames(frames: Path, masks: Path, output: Path) -> Iterator[tuple[Path, Path]]:
    """Put the frames of a video into `output`; yield (frame there, mask image) in order.

    Frames are hard links if possible, else copies. Those of a video file are written as JPEG, and
    belong to the mask images in the order of their names.
    """
    images = files_in(masks)
    output.mkdir(parents=True)
    folder = frames / masks.name
    if folder.is_dir():
        found = files_in(folder)
        pairs = [(found[stem], image) for stem, image in images.items() if stem in found]
        if not pairs:
            raise InputError(f"no frame in {folder} has the name of a mask image in {masks}")
        for what, files in (
            ("frames without a mask image", found),
            ("masks without a frame", images),
        ):
            left_out = len(files) - len(pairs)
            if left_out:
                tqdm.write(f"video {masks.name}: left out {left_out} of {len(files)} files: {what}")
        for frame, image in pairs:
            link_or_copy(frame, output / frame.name)
            yield output / frame.name, image
        return
    files = [path for path in sorted(frames.glob(f"{masks.name}.*")) if path.is_file()]
    if not files:
        raise InputError(f"{frames} holds neither a folder nor a video file named {masks.name}")
    count = 0
    for count, picture in enumerate(read_video(["-i", f"file:{files[0]}"], str(files[0])), 1):
        if count > len(images):
            break
        target = output / f"{count - 1:05d}.jpg"
        picture.save(target, quality=95)
        yield target, list(images.values())[count - 1]
    if count != len(images):
        raise InputError(
            f"{files[0]} has another number of frames than there are mask images in "
            f"{masks} ({len(images)})"
        )


def files_in(folder: Path) -> dict[str, Path]:
    """{name without suffix: file} in the order of the names, without hidden files."""
    return {path.stem: path for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, which takes no space, or a copy where links are not possible."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def read_instances(
    images: list[Path], ignored: set[int]
) -> tuple[dict[int, list], tuple[int, int]]:
    """{value: T run-length codes, None = not in this frame} of mask images, and their size.

    ignored: values that are no instance.
    """
    codes, size = {}, None
    for t, image in enumerate(images):
        ids = read_ids(image)
        if size not in (None, ids.shape):
            raise InputError(
                f"{image} is {ids.shape[1]}x{ids.shape[0]}, the mask images before it "
                f"{size[1]}x{size[0]}"
            )
        size = ids.shape
        for value in set(np.unique(ids).tolist()) - ignored:
            code = rle.encode(np.asfortranarray(ids == value, dtype=np.uint8))
            codes.setdefault(value, [None] * len(images))[t] = {
                "size": list(size),
                "counts": code["counts"].decode(),
            }
    return codes, size


def read_ids(path: Path) -> np.ndarray:
    """Instance numbers (H, W) of a mask image: grey values, palette indices, or colours."""
    with open_picture(path) as picture:
        if picture.format in LOSSY_FORMATS:
            raise InputError(
                f"mask image {path} is a JPEG, which changes the values of pixels: save masks "
                "without loss, as PNG"
            )
        check_pixels(picture.height, picture.width, f"mask image {path}")
        if picture.mode in ("1", "L", "P") or picture.mode.startswith("I"):
            return np.asarray(picture).astype(np.int64)
        colours = np.asarray(picture.convert("RGB")).astype(np.int64)
        return colours @ np.array([1, 256, 65536])
