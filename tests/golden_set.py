"""Reading a folder of golden numbers (made with the official code): its meta.json says all that is
in it.

GOLDEN_DIR chooses the folder (default tests/golden). No value of a set stands in the tests; another
set of the same form (other seeds, salts, sizes, videos) must pass as well.
"""

import functools
import importlib.util
import json
import os
from pathlib import Path

import numpy
import pytest
import torch

from checkpoint import load_weights
from model import build_model

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
PROPAGATION = {
    (True, False): "gated",
    (False, False): "plain",
    (False, True): "memory",
    (True, True): "gated+memory",
}


@functools.cache
def read_json(name: str):
    return json.loads((GOLDEN_DIR / name).read_text())


def meta() -> dict:
    return read_json("meta.json")


@functools.cache
def read_arrays(name: str) -> dict:
    with numpy.load(GOLDEN_DIR / name) as arrays:
        return dict(arrays)


def names_shapes(key: str) -> list:
    return read_json(meta()["names_shapes"][key])


def official_weights(key: str) -> dict:
    """The made-up official state dict of one names_shapes list, by the set's own formula (its
    weights.py)."""
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN_DIR / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    return weights.fill_state_dict(names_shapes(key), **meta()["weights"])


def golden_model(
    key: str, preset: str, num_classes: int, propagation: str, dtype=torch.float32, **options
):
    model = build_model(preset, num_classes, propagation, **options)
    report = load_weights(model, official_weights(key))
    assert not report.missing and not report.unexpected, str(report)
    return model.to(dtype)


def make_video(T: int, H: int, W: int, salt: int, **_) -> torch.Tensor:
    """uint8 (T, 3, H, W) by the set's formula, in the integers t, c, y, x."""
    t, c, y, x = numpy.ogrid[:T, :3, :H, :W]
    formula = meta()["video_formula"]
    return torch.from_numpy(
        eval(formula, {}, dict(t=t, c=c, y=y, x=x, salt=salt)).astype(numpy.uint8)
    )


def relative_error(ours, golden) -> float:
    """Largest difference over the largest golden value."""
    ours, golden = (
        numpy.asarray(ours, dtype=numpy.float64),
        numpy.asarray(golden, dtype=numpy.float64),
    )
    assert ours.shape == golden.shape, f"{ours.shape} is not {golden.shape}"
    return float(abs(ours - golden).max() / max(abs(golden).max(), 1e-30))


def subsampled_error(ours: torch.Tensor, arrays: dict, key: str) -> float:
    """relative_error against a subsampled golden tensor, checking its shape and the statistics of
    all of it."""
    assert list(ours.shape) == arrays[key + "__shape"].tolist(), key
    flat = ours.detach().flatten().double()
    mean, std, largest = arrays[key + "__stats"]
    spread = (
        max(abs(flat.mean() - mean), abs(flat.std() - std), abs(flat.abs().max() - largest)).item()
        / largest
    )
    return max(spread, relative_error(flat[:: int(arrays[key + "__stride"])], arrays[key]))


def unpack_masks(arrays: dict, prefix: str) -> numpy.ndarray:
    shape = arrays[prefix + "masks_shape"]
    return (
        numpy.unpackbits(arrays[prefix + "masks_packed"], count=shape.prod())
        .reshape(shape)
        .astype(bool)
    )


LEVELS = {"0": "no_occlusion", "1": "slight_occlusion", "2": "severe_occlusion", "-": None}


def occlusion_set() -> tuple[dict, list, dict]:
    """Ground truth with occlusion levels, results, and the numbers of the published evaluators.

    eval_groups.json adds to the metric's set a digit of LEVELS per frame and annotation. A folder
    with gt_occlusion.json, results.json and expected.json has the same in full. Skips without both.
    """
    if (GOLDEN_DIR / "expected.json").exists():
        return tuple(map(read_json, ("gt_occlusion.json", "results.json", "expected.json")))
    if not (GOLDEN_DIR / "eval_groups.json").exists():
        pytest.skip("this golden set has no numbers by occlusion")
    expected, names = read_json("eval_groups.json"), meta()["eval"]
    ground_truth = read_json(names["gt"])
    annotations = [
        annotation
        | {"occlusion": [LEVELS[digit] for digit in expected["occlusion"][str(annotation["id"])]]}
        for annotation in ground_truth["annotations"]
    ]
    return ground_truth | {"annotations": annotations}, read_json(names["results"]), expected
