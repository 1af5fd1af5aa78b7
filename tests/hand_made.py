"""Hand-made predictions and ground truth: squares that stand still, and tiny random videos."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask


def seeds(count, fast=4):
    """The parameters of a random test: `count` seeds, all but the first few marked slow."""
    more = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(fast, count)]
    return [*range(fast), *more]


def encode(mask):
    """Compressed RLE, as in a results.json, of an (H, W) bool array."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def square(left, side=2):
    """An 8 x 8 frame's RLE of a square with its top left corner at row 1 and the given column."""
    mask = np.zeros((8, 8), dtype=bool)
    mask[1 : 1 + side, left : left + side] = True
    return encode(mask)


def prediction(segmentations, score=0.9, video=1, category=1):
    return {
        "video_id": video,
        "category_id": category,
        "score": score,
        "segmentations": segmentations,
    }


def annotation(segmentations, number=1, video=1, category=1, crowd=0):
    areas = [None if rle is None else int(coco_mask.area(rle)) for rle in segmentations]
    return {
        "id": number,
        "video_id": video,
        "category_id": category,
        "iscrowd": crowd,
        "segmentations": segmentations,
        "areas": areas,
    }


def truth(*annotations, videos=(1,), frames=4, size=(8, 8), categories=(1,)):
    return {
        "videos": [
            {"id": v, "length": frames, "height": size[0], "width": size[1]} for v in videos
        ],
        "categories": [{"id": category, "name": f"class{category}"} for category in categories],
        "annotations": list(annotations),
    }


LEFT, RIGHT = [square(0)] * 4, [square(5)] * 4  # two objects that stand still for four frames


def random_set(seed, videos=(3, 1, 2), frames=3, size=(5, 6), categories=(4, 2, 9)):
    """Random results and ground truth: noise, switches, breaks, crowds, equal scores and masks.

    The last category has no ground truth.
    """
    random = np.random.default_rng(seed)
    annotations, masks_of = [], {}
    for number in range(3 * len(videos)):
        video, category = int(random.choice(videos)), int(random.choice(categories[:-1]))
        masks = random.random((frames, *size)) < random.uniform(0.2, 0.5)
        masks[random.random(frames) < 0.2] = False
        masks_of.setdefault(video, []).append((category, masks))
        annotations.append(
            annotation(to_segmentations(masks), number, video, category, int(number % 6 == 5))
        )
    results = []
    for video, objects in masks_of.items():
        for category, masks in objects * 3:
            masks = masks ^ (random.random(masks.shape) < random.choice([0, 0.02, 0.1, 0.3]))
            other = objects[random.integers(len(objects))][1]
            switched = random.random(frames) < random.choice([0, 0.5])
            masks[switched] = other[switched]
            masks[random.random(frames) < random.choice([0, 0.3])] = False
            for _ in range(random.integers(1, 3)):  # several labels of one track
                label = category if random.random() < 0.7 else int(random.choice(categories))
                score = int(random.integers(0, 6)) / 5
                results.append(prediction(to_segmentations(masks), score, video, label))
    return results, truth(
        *annotations, videos=videos, frames=frames, size=size, categories=categories
    )


def to_segmentations(masks):
    """An RLE for every mask of (L, H, W) bool, None for an empty one."""
    return [encode(mask) if mask.any() else None for mask in masks]
