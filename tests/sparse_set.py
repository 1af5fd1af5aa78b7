"""A data set that reveals confusions of ids, labels and positions.

Ids of videos, categories and annotations have gaps and are unordered. Every video has its own size
or length, and every instance its own rectangles.
"""

import copy
import json
from functools import cache
from itertools import accumulate
from pathlib import Path

import numpy
import torch
from PIL import Image
from pycocotools import mask as rle
from torch import nn

from checkpoint import save_checkpoint
from model import GRAttVIS, build_model

# Id: frames, height, width, in the order of the file
VIDEOS = {3: (3, 40, 56), 17: (2, 56, 40), 5: (3, 40, 56)}
CATEGORIES = {90: "dog", 7: "cat", 3: "ant"}  # id: name, in the order of the file
# Category id: label, in the order of the ids
LABELS = {3: 0, 7: 1, 90: 2}
# Annotation, video and category id
INSTANCES = [(44, 17, 90), (12, 3, 7), (31, 5, 3), (8, 3, 90), (27, 17, 3)]
TINY = {
    "backbone": "resnet10_thin",
    "channels": 32,
    "heads": 2,
    "feed_forward": 32,
    "pixel_feed_forward": 32,
}
# For tests in one process, with the fixture `four_convolutions`.
SMALLEST = TINY | {"backbone": "four_convolutions"}
# Short side that tiny models are tested at, pixels
SIDE = 32


def rectangles(annotation_id: int, frames: int, height: int, width: int) -> numpy.ndarray:
    """The masks of one instance, bool (T, H, W), different for each annotation id."""
    masks = numpy.zeros((frames, height, width), bool)
    for t, mask in enumerate(masks):
        top, left = annotation_id % 20 + t, annotation_id * 3 % 19 + 2 * t
        mask[top : top + 12, left : left + 14] = True
    return masks


def encode(mask: numpy.ndarray) -> dict:
    """The run-length code of a bool (H, W) mask, as in results.json."""
    code = rle.encode(numpy.asfortranarray(mask, numpy.uint8))
    return {"size": list(mask.shape), "counts": code["counts"].decode()}


def decode(segmentations: list[dict]) -> torch.Tensor:
    """The masks of one track, bool (T, H, W)."""
    return torch.from_numpy(numpy.stack([rle.decode(code) for code in segmentations])).bool()


def sparse_content() -> dict:
    """The parsed JSON of the set."""
    videos = [
        {
            "id": number,
            "length": frames,
            "height": height,
            "width": width,
            "file_names": [f"{number}/{t}.png" for t in range(frames)],
        }
        for number, (frames, height, width) in VIDEOS.items()
    ]
    annotations = []
    for number, video, category in INSTANCES:
        masks = rectangles(number, *VIDEOS[video])
        annotations.append(
            {
                "id": number,
                "video_id": video,
                "category_id": category,
                "iscrowd": 0,
                "areas": masks.sum((1, 2)).tolist(),
                "segmentations": [encode(mask) for mask in masks],
            }
        )
    categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
    return {"videos": videos, "categories": categories, "annotations": annotations}


def perfect_results() -> list[dict]:
    """The annotations as results, each with a score of its own."""
    return [
        {
            "video_id": entry["video_id"],
            "category_id": entry["category_id"],
            "score": 0.5 + entry["id"] / 100,
            "segmentations": entry["segmentations"],
        }
        for entry in sparse_content()["annotations"]
    ]


def part_of_set(*video_ids: int) -> dict:
    """The parsed JSON of some videos and their annotations, with all categories."""
    content = sparse_content()
    return content | {
        "videos": [video for video in content["videos"] if video["id"] in video_ids],
        "annotations": [
            entry for entry in content["annotations"] if entry["video_id"] in video_ids
        ],
    }


def write_sparse_set(folder: Path) -> dict:
    """Write the set as the splits train and valid of `folder`; returns the parsed JSON of both."""
    content = sparse_content()
    for split in ("train", "valid"):
        write_json(folder / f"{split}.json", content)
    generator = numpy.random.default_rng(0)
    for video in content["videos"]:
        for name in video["file_names"]:
            blocks = generator.integers(
                0, 256, (video["height"] // 8, video["width"] // 8, 3), numpy.uint8
            )
            path = folder / "JPEGImages" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(path)
    return content


def write_json(path: Path, content) -> Path:
    """The path, which holds the content as JSON afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


class FourConvolutions(nn.Module):
    """The smallest backbone: a convolution for each map.

    tests/test_backbone.py has the real ones, which would take most of the time elsewhere.
    """

    channels = [16, 32, 48, 64]

    def __init__(self):
        super().__init__()
        widths = zip([3, *self.channels], self.channels, (4, 2, 2, 2))
        self.stages = nn.ModuleList(
            nn.Conv2d(before, after, 5, stride, padding=2) for before, after, stride in widths
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return list(accumulate(self.stages, lambda x, stage: stage(x).relu(), initial=x))[1:]


@cache
def tiny_model_once(classes: int, propagation: str, seed: int, **options) -> GRAttVIS:
    torch.manual_seed(seed)
    return build_model("toy", classes, propagation, **TINY | options).eval()


def tiny_model(classes: int = 3, propagation: str = "gated", seed: int = 0, **options) -> GRAttVIS:
    """A small model with random weights, in evaluation mode; a copy, which is faster to make."""
    return copy.deepcopy(tiny_model_once(classes, propagation, seed, **options))


def save_tiny_model(
    path: Path,
    classes: int = 3,
    propagation: str = "gated",
    seed: int = 0,
    options: dict = TINY,
    **config,
) -> GRAttVIS:
    """Write a tiny model as a checkpoint of train.py; returns the model."""
    model = tiny_model(classes, propagation, seed, **options)
    config = {
        "preset": "toy",
        "propagation": propagation,
        "model_options": options,
        "test_short_side": SIDE,
    } | config
    save_checkpoint(path, {"model": model.state_dict(), "config": config})
    return model
