"""Synthetic data sets for training and testing without real data.

`SUITES` names the settings on which results are compared; rendering.py generates the videos. A data
set is written in the YouTube-VIS format:

    root/train.json   root/train/JPEGImages/<video>/00000.jpg ...
    root/valid.json   root/valid/JPEGImages/<video>/00000.jpg ...

From the command line:

    python data.py --root datasets/synthetic
    python data.py --suite occlusion --root datasets/occlusion
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from tqdm import tqdm

from runtime.files import checksum
from synthetic.rendering import check_scene, make_video
from synthetic.scenes import CATEGORIES, Difficulty

JPEG_QUALITY = 90
HEIGHT, WIDTH = 96, 160  # pixels, by default


@dataclass(frozen=True)
class Suite:
    """The scenes of a data set."""

    difficulty: Difficulty = Difficulty()
    frames: int = 20
    objects: tuple = (1, 4)  # per video, minimum and maximum


SUITES = {
    "easy": Suite(),
    "occlusion": Suite(Difficulty(occluded=0.7, occluded_frames=(3, 10)), frames=24),
    "look-alike": Suite(Difficulty(look_alike=0.8), objects=(2, 4)),
    "degraded": Suite(Difficulty(blur=0.7, light=0.5, texture=0.3, noisy=0.2)),
    "long": Suite(Difficulty(occluded=0.5, occluded_frames=(5, 20), returning=0.6), frames=100),
}


def make_dataset(
    root,
    train_videos=240,
    valid_videos=24,
    frames=20,
    height=HEIGHT,
    width=WIDTH,
    objects=(1, 4),
    seed=0,
    difficulty=Difficulty(),
):
    """Write a training and a validation split.

    Each video has its own seed, so a larger data set of the same seed starts with the videos of a
    smaller one.

    Args:
        root: folder to write, which must be empty or not exist yet.
        frames: per video.
        height, width: in pixels.
        objects: (minimum, maximum) number of objects per video.

    Raises ValueError for numbers out of range, and FileExistsError if the folder is not empty.
    """
    check_scene(frames, height, width, objects)
    difficulty.check()
    if min(train_videos, valid_videos) < 1:
        raise ValueError(
            f"Each split needs at least 1 video, not {train_videos} and {valid_videos}."
        )
    root = Path(root).resolve()
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise FileExistsError(
            f"{root} exists and is not an empty folder: remove it or choose another one."
        )

    def scenes(split_index, videos):
        for index in range(videos):
            rng = np.random.default_rng((seed, split_index, index))
            yield make_video(rng, frames, height, width, objects, difficulty)

    root.parent.mkdir(parents=True, exist_ok=True)
    instances = 0
    # Written to a temporary folder and renamed, so that an interrupted run leaves no partial set.
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        draft = Path(scratch) / root.name
        splits = [("train", train_videos), ("valid", valid_videos)]
        for split_index, (split, videos) in enumerate(splits):
            bar = tqdm(scenes(split_index, videos), desc=split, total=videos, unit="video")
            instances += write_split(draft, split, bar, difficulty)
        try:
            draft.rename(root)  # works for an empty folder too
        except OSError as error:
            raise FileExistsError(f"{root} was created by another process.") from error
    print(
        f"{root}: {train_videos} train + {valid_videos} valid videos of {frames} frames, "
        f"{width} x {height} pixels, {instances} instances; "
        f"valid.json has the checksum {checksum(root / 'valid.json')}."
    )


def write_split(folder, split, scenes, difficulty=Difficulty()):
    """Write the images and the JSON file of a split.

    scenes: outputs of `make_video`. Returns the number of instances.
    """
    videos, annotations = [], []
    image_folder = folder / split / "JPEGImages"
    for video_id, (images, instances) in enumerate(scenes, 1):
        length, height, width, _ = images.shape
        name = f"{video_id - 1:05d}"
        file_names = [f"{name}/{time:05d}.jpg" for time in range(length)]
        videos.append(
            {
                "id": video_id,
                "width": width,
                "height": height,
                "length": length,
                "file_names": file_names,
            }
        )
        (image_folder / name).mkdir(parents=True)
        for image, file_name in zip(images, file_names):
            Image.fromarray(image).save(image_folder / file_name, quality=JPEG_QUALITY)
        for category_id, masks in instances:
            annotation_id = len(annotations) + 1
            annotations.append(describe_instance(annotation_id, video_id, category_id, masks))

    info = {"description": "Moving textured shapes", "split": split}
    if difficulty != Difficulty():
        info["difficulty"] = asdict(difficulty)
    categories = [{"id": index, "name": name} for index, name in enumerate(CATEGORIES, 1)]
    content = {
        "info": info,
        "categories": categories,
        "videos": videos,
        "annotations": annotations,
    }
    (folder / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return len(annotations)


def describe_instance(annotation_id, video_id, category_id, masks):
    """The YouTube-VIS annotation of an instance.

    masks: (T, H, W) bool. Frames in which the instance is not visible hold None.
    """
    length, height, width = masks.shape
    codes = rle.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8))
    areas = rle.area(codes).tolist()
    boxes = rle.toBbox(codes).tolist()
    segmentations = [
        {"size": code["size"], "counts": code["counts"].decode("ascii")} for code in codes
    ]
    return {
        "id": annotation_id,
        "video_id": video_id,
        "category_id": category_id,
        "iscrowd": 0,
        "width": width,
        "height": height,
        "length": length,
        "bboxes": [box if area else None for box, area in zip(boxes, areas)],
        "segmentations": [code if area else None for code, area in zip(segmentations, areas)],
        "areas": [area or None for area in areas],
    }
