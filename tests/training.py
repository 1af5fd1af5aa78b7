"""Tiny training runs that record the inputs of the model and the output files."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.data import DataLoader

import train
from model import PRESETS, GRAttVIS

TINY_MODEL = dict(
    backbone="resnet10_thin",
    norm="batch",
    channels=32,
    heads=2,
    queries=6,
    frame_queries=8,
    pixel_layers=1,
    pixel_feed_forward=32,
    frame_layers=3,
    tracker_encoder_layers=2,
    feed_forward=32,
)
TINY = dict(
    preset="tiny",
    device="cpu",
    frames=2,
    points=32,
    short_sides=[64],
    workers=0,
    batch=1,
    iterations=1,
    lr_steps=[],
    warmup=0,
    log_every=1,
    test_short_side=64,
)

# The same for programs in a process of their own.
TINY_FLAGS = (
    "--device cpu --frames 2 --points 64 --short-sides 64 --workers 0 --lr-steps 3 --warmup 0"
).split()


def train_one_step(data_root: Path, output: Path, short_side: int = 64) -> None:
    """Train the toy model for one step on one clip, to have a checkpoint."""
    flags = "--iterations 1 --batch 1 --frames 2 --points 64 --workers 0 --device cpu".split()
    paths = ["--data-root", str(data_root), "--output", str(output)]
    train.main(train.parse_arguments([*paths, *flags, "--short-sides", str(short_side)]))


@dataclass
class Run:
    """What was observed of a run. Lists have one entry for each call of the model in training."""

    clips: object = None  # the data set of the training clips
    workers: int = -1  # loader processes
    start: dict[str, Tensor] = field(default_factory=dict)  # weights before the first step
    seeds: list[int] = field(default_factory=list)  # of torch
    frames: list[list[Tensor]] = field(default_factory=list)  # videos, uint8 (T, 3, H, W)
    outputs: list = field(default_factory=list)  # of the model
    # Of every call of the first convolution in evaluation: its weights and its input.
    evaluated: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    lines: list[dict] = field(default_factory=list)  # of log.jsonl, about training
    evaluations: list[dict] = field(default_factory=list)  # of log.jsonl, about evaluations
    last: dict = field(default_factory=dict)  # contents of last.pt
    best: dict = field(default_factory=dict)  # contents of best.pt, if any


def as_arguments(options: dict) -> list[str]:
    """{"lr_steps": [1, 2], "flip": False} -> ["--lr-steps", "1", "2", "--no-flip"]."""
    arguments = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, (list, tuple)) else [value]
            arguments += [f"--{flag}", *map(str, values)]
    return arguments


def watch(run: Run) -> list:
    """Register hooks on all modules, which fill in `run`; the caller removes them."""

    def before(module: nn.Module, inputs: tuple) -> None:
        if isinstance(module, GRAttVIS) and module.training:
            if not run.start:
                run.start = {name: value.clone() for name, value in module.state_dict().items()}
            run.seeds.append(torch.initial_seed())
            run.frames.append([video.clone() for video in inputs[0]])
        elif isinstance(module, nn.Conv2d) and module.in_channels == 3 and not module.training:
            run.evaluated.append((module.weight.detach().clone(), inputs[0].clone()))

    def after(module: nn.Module, inputs: tuple, output) -> None:
        if isinstance(module, GRAttVIS) and module.training:
            run.outputs.append(output)

    return [register_module_forward_pre_hook(before), register_module_forward_hook(after)]


def train_tiny(output: Path, **options) -> Run:
    """Run train.py in this process. options: its flags, which override those of TINY."""
    run, hooks = Run(), []
    arguments = as_arguments(TINY | {"output": output} | options)
    try:
        with mock.patch.object(
            DataLoader, "__init__", autospec=True, side_effect=DataLoader.__init__
        ) as opened:
            hooks = watch(run)
            with mock.patch.dict(PRESETS, tiny=TINY_MODEL):
                train.main(train.parse_arguments(arguments))
    finally:
        for hook in hooks:
            hook.remove()
    if opened.call_args_list:
        call = opened.call_args_list[0]  # the loader of the training clips is the first
        run.clips, run.workers = call.args[1], call.kwargs.get("num_workers", 0)
    read_folder(run, output)
    return run


def read_folder(run: Run, output: Path) -> None:
    """Fill in what the run wrote."""
    if (output / "log.jsonl").exists():
        lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        run.lines = [line for line in lines if "loss" in line]
        run.evaluations = [line for line in lines if "AP" in line]
    for name in ("last", "best"):
        if (output / f"{name}.pt").exists():
            setattr(run, name, torch.load(output / f"{name}.pt", weights_only=True))
