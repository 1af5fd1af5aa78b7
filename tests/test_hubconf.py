"""hubconf.py: torch.hub loads models from another directory, next to modules of other projects."""

import re
import subprocess
import sys

import pytest
import torch

import hubconf
from checkpoint import SHIPPED_WEIGHTS, load_weights, model_from_checkpoint
from model import build_model
from processes import ENVIRONMENT, REPOSITORY

LOAD = f"""
import sys, torch
def load(name, *values, **options):
    return torch.hub.load({str(REPOSITORY)!r}, name, *values, source="local", **options)
"""


def run(folder, script: str) -> subprocess.CompletedProcess:
    """Run a script in a folder from which no module of ours is found."""
    return subprocess.run(
        [sys.executable, "-c", LOAD + script],
        cwd=folder,
        env={name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_models_are_those_of_the_repository(tmp_path):
    """The shipped one, one of a file, one for other classes, and one with random weights."""
    script = f"""
small = load("gratt_vis_small")
same = load("gratt_vis", weights={str(SHIPPED_WEIGHTS)!r})
other = load("gratt_vis", preset="small", num_classes=2, weights={str(SHIPPED_WEIGHTS)!r})
toy = load("gratt_vis", "toy", 4, propagation="clip", window=2)
assert not any(model.training for model in (small, same, other, toy))
assert (toy.num_classes, toy.propagation, toy.tracker.window) == (4, "clip", 2)
frames = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
torch.save([small.segment_video(frames).logits, same.state_dict(), other.state_dict()], "all.pt")
"""
    done = run(tmp_path, script)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 reset (frame_decoder.class_embed" in done.stdout
    logits, same, other = torch.load(tmp_path / "all.pt")
    model, _ = model_from_checkpoint(SHIPPED_WEIGHTS)
    frames = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    torch.testing.assert_close(logits, model.segment_video(frames).logits)
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())
    expected = build_model("small", 2)
    load_weights(expected, SHIPPED_WEIGHTS, reset_classes=True)
    expected = expected.state_dict()
    differing = {name for name in other if not torch.equal(expected[name], other[name])}
    assert differing and all("class_embed" in name for name in differing)


def test_entry_points_and_their_help():
    """As torch.hub.list and torch.hub.help see them, which take no local folders."""
    public = [name for name in dir(hubconf) if not name.startswith("_")]
    callables = [name for name in public if callable(getattr(hubconf, name))]
    assert callables == ["gratt_vis", "gratt_vis_small"]
    assert all(getattr(hubconf, name).__doc__ for name in callables)
    required = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8")
    assert {*hubconf.dependencies, "pytest"} == set(re.findall(r"^\w+", required, re.MULTILINE))
    with pytest.raises(ValueError, match="give weights, or num_classes for a model with random"):
        hubconf.gratt_vis("r50")


@pytest.mark.slow
def test_every_module_that_is_imported_must_be_ours(tmp_path):
    """hubconf.py names them all; whatever else another project has may have any name."""
    (tmp_path / "data.py").write_text("mine = True")
    script = f"""
import data
load("gratt_vis", "toy", 4)
assert data.mine and {str(REPOSITORY)!r} not in sys.path
for name, module in sys.modules.items():
    file = getattr(module, "__file__", None) or ""
    if "." not in name and file.startswith({str(REPOSITORY)!r}):
        print(name)
"""
    done = run(tmp_path, script)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.split()) == hubconf._MODULES


@pytest.mark.slow
@pytest.mark.parametrize("path", ["model.py", "runtime/other.py"])  # the latter has no __init__.py
def test_a_module_of_another_project_is_named(tmp_path, path):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text("")
    name = path.partition("/")[0].removesuffix(".py")
    done = run(tmp_path, f"import {name}\nload('gratt_vis_small')")
    message = f"GRAtt-VIS has a module named {name}, and {tmp_path / path.partition('/')[0]}"
    assert f"ImportError: {message} of that name is imported already: move" in done.stderr
