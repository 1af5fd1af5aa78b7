"""The tutorial of docs/training.md, run from the page at a small size."""

import json
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from processes import ENVIRONMENT, REPOSITORY

PAGE = (REPOSITORY / "docs/training.md").read_text(encoding="utf-8")
SMALLER = {  # flags that make the commands short
    "train.py": "--iterations 2 --lr-steps 1 --evaluate-every 2 --batch 1 --frames 2 --points 64 "
    "--short-sides 64 --test-short-side 64 --log-every 1 --workers 0 --device cpu",
    "evaluate.py": "--device cpu --workers 0",
}


def commands() -> list[list[str]]:
    """The commands of the block after the words "Convert them"."""
    block = re.search(r"^Convert them.*?^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1]
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def write_footage(folder) -> None:
    """Five videos of two squares that move, with mask images and classes."""
    rows = ["video,instance,class"]
    for video in range(5):
        for kind in ("frames", "masks"):
            (folder / kind / f"v{video}").mkdir(parents=True)
        for t in range(3):
            ids = np.zeros((64, 96), dtype=np.uint8)
            ids[5:25, 5 + 4 * t : 25 + 4 * t] = 1
            ids[35:55, 60 - 4 * t : 80 - 4 * t] = 2
            colours = np.array([[20, 20, 20], [200, 40, 40], [40, 40, 200]], dtype=np.uint8)
            Image.fromarray(colours[ids]).save(folder / f"frames/v{video}/{t:05d}.jpg")
            Image.fromarray(ids).save(folder / f"masks/v{video}/{t:05d}.png")
        rows += [f"v{video},1,car", f"v{video},2,bus"]
    (folder / "classes.csv").write_text("\n".join(rows))


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path):
    has_matplotlib = find_spec("matplotlib") is not None
    write_footage(tmp_path)
    for command in commands():
        assert command[0] == "python"
        if command[2] == "viewing.curves" and not has_matplotlib:
            continue
        smaller = shlex.split(SMALLER.get(command[1], ""))
        program = ["-m", command[2]] if command[1] == "-m" else [str(REPOSITORY / command[1])]
        arguments = command[3:] if command[1] == "-m" else command[2:]
        arguments = [
            argument.replace("weights/small.pt", str(REPOSITORY / "weights/small.pt"))
            for argument in arguments
        ]
        done = subprocess.run(
            [sys.executable, *program, *arguments, *smaller],
            cwd=tmp_path,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads((tmp_path / "datasets/own/train.json").read_text())
    assert len(content["videos"]) == 4 and len(content["annotations"]) == 8
    metrics = json.loads((tmp_path / "runs/own/evaluation/metrics.json").read_text())
    assert metrics["AP"] >= 0
    assert list((tmp_path / "runs/own/evaluation/overlays").iterdir())
    assert (tmp_path / "runs/own/curves.png").exists() == has_matplotlib
