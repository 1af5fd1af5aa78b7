"""Training compared with a plain loop: optimizer, schedule, clipping, average, log.

The loop imports nothing from train.py. It takes two things from the observed run: the initial
weights and the seed of every step. Everything is in float64 to keep rounding errors small.
"""

import math

import pytest
import torch
from torch import nn

from augmentation import Augmentation
from clips import ClipDataset
from data import VideoSet
from losses import Criterion
from model import build_model
from reading.layouts import find_split
from synthetic.suites import make_dataset
from trainer.flags import parse_arguments
from training import TINY, TINY_MODEL, train_tiny

CASES = {  # all values differ from the defaults of the command line
    "schedule, clipping, average": dict(
        iterations=4,
        lr=2e-3,
        warmup=2,
        warmup_start=0.25,
        lr_steps=[2, 3],
        lr_gamma=0.5,
        clip_gradient=0.05,
        weight_decay=0.3,
        ema=0.7,
        evaluate_every=2,
        seed=5,
        frames=4,
        reach=1,
        short_sides=[48],
        flip=False,
    ),
    "losses, accumulated": dict(
        iterations=2,
        batch=2,
        accumulate=2,
        points=24,
        no_object_weight=0.3,
        similarity_weight=1.5,
        similarity_span="video",
        gate_weight=0.7,
        gate_loss="released",
        gate_mask="blocked",
        clip_gradient=0.0,
        norm="group",
        frames=4,
        clip_length=2,
        backbone_lr_factor=0.5,
    ),
    "frozen detector, memory": dict(
        iterations=3,
        batch=2,
        propagation="memory",
        freeze_detector=True,
        init="",
        evaluate_every=1,
        lr=5e-3,
    ),
    "whole videos in windows": dict(
        iterations=2, propagation="clip", window=2, frames=5, evaluate_every=1
    ),
}
DEFAULTS = dict(  # of the command line, for what TINY and a case leave out
    lr=1e-3,
    lr_gamma=0.1,
    warmup_start=0.0,
    clip_gradient=0.1,
    weight_decay=0.05,
    backbone_lr_factor=1.0,
    ema=0.0,
    accumulate=1,
    seed=0,
    reach=6,
    flip=True,
    max_long_side=768,
    freeze_detector=False,
    propagation="gated",
    gate_mask="additive",
    norm="batch",
    window=None,
    clip_length=1,
    no_object_weight=0.1,
    similarity_weight=0.5,
    similarity_span="clip",
    gate_weight=0.0,
    gate_loss="logits",
    evaluate_every=0,
)
WITHOUT_DECAY = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding)


@pytest.fixture(scope="module", autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "set"
    make_dataset(
        root, train_videos=3, valid_videos=1, frames=5, height=64, width=64, objects=(1, 2)
    )
    return root


def rate_of(setting: dict, step: int) -> float:
    """The learning rate: linear warm-up to lr, then times lr_gamma at each of lr_steps."""
    start, warm = setting["warmup_start"], 1.0
    if step < setting["warmup"]:
        warm = start + (1 - start) * (step + 1) / setting["warmup"]
    passed = [milestone for milestone in setting["lr_steps"] if milestone <= step]
    return setting["lr"] * warm * setting["lr_gamma"] ** len(passed)


def make_clips(setting: dict, root) -> ClipDataset:
    augmentation = Augmentation(
        tuple(setting["short_sides"]), setting["max_long_side"], flip=setting["flip"]
    )
    return ClipDataset(
        VideoSet(*find_split(root, "train")),
        setting["frames"],
        setting["reach"],
        augmentation,
        setting["seed"],
    )


def train_by_hand(setting: dict, root, start: dict, seeds: list[int]) -> tuple[list[dict], ...]:
    """The lines of the log, the weights and their averages after each step.

    start: the weights before the first step. seeds: of all steps.
    """
    clips = make_clips(setting, root)
    classes = len(clips.categories)
    options = {} if setting["window"] is None else {"window": setting["window"]}
    options |= {"norm": setting["norm"], "clip_length": setting["clip_length"]}
    model = build_model(
        "toy", classes, setting["propagation"], setting["gate_mask"], **TINY_MODEL | options
    )
    model.load_state_dict(start)
    criterion = Criterion(
        classes,
        points=setting["points"],
        no_object_weight=setting["no_object_weight"],
        similarity_weight=setting["similarity_weight"],
        similarity_span=setting["similarity_span"],
        gate_weight=setting["gate_weight"],
        gate_loss=setting["gate_loss"],
        freeze_detector=setting["freeze_detector"],
    )
    undecayed = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, WITHOUT_DECAY)
        for parameter in module.parameters(recurse=False)
    }
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith("tracker.") or not setting["freeze_detector"]
    }
    mean = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    square = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    lines, weights, averages, seeds = [], [], [], iter(seeds)

    for step in range(setting["iterations"]):
        batch = [clips[step * setting["batch"] + number] for number in range(setting["batch"])]
        parts, size = setting["accumulate"], setting["batch"] // setting["accumulate"]
        model.train()
        model.zero_grad()
        line = {}
        for part in range(parts):
            seed = next(seeds)
            if part == 0:
                torch.manual_seed(seed)
            part_of_batch = batch[part * size : (part + 1) * size]
            output = model([clip.frames for clip in part_of_batch])
            losses, _ = criterion(output, part_of_batch, setting["propagation"] == "clip")
            sum(losses.values()).backward()
            for name, loss in losses.items():
                line[name] = line.get(name, 0) + loss.item() / parts

        gradients = {name: parameter.grad / parts for name, parameter in trained.items()}
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
        scale = min(1.0, setting["clip_gradient"] / norm) if setting["clip_gradient"] else 1.0
        with torch.no_grad():
            for name, parameter in trained.items():
                rate = rate_of(setting, step)
                if name.startswith("backbone."):
                    rate *= setting["backbone_lr_factor"]
                decay = 0.0 if id(parameter) in undecayed else setting["weight_decay"]
                gradient = gradients[name] * scale
                mean[name] = 0.9 * mean[name] + 0.1 * gradient
                square[name] = 0.999 * square[name] + 0.001 * gradient**2
                parameter -= rate * decay * parameter
                unbiased_mean = mean[name] / (1 - 0.9 ** (step + 1))
                unbiased_square = square[name] / (1 - 0.999 ** (step + 1))
                parameter -= rate * unbiased_mean / (unbiased_square.sqrt() + 1e-8)

        now = {name: value.clone() for name, value in model.state_dict().items()}
        average, decay = dict(now), setting["ema"]
        for name, _ in model.named_parameters() if averages else ():  # buffers are not averaged
            average[name] = decay * averages[-1][name] + (1 - decay) * now[name]
        lines.append(line | {"step": step + 1, "loss": sum(line.values()), "gradient_norm": norm})
        weights.append(now)
        averages.append(average)
    return lines, weights, averages


def assert_same_weights(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-6, atol=1e-9, msg=lambda text: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", CASES)
def test_no_value_of_a_case_is_the_default(case):
    defaults = vars(parse_arguments([]))
    assert not [name for name, value in CASES[case].items() if defaults[name] == value]


# The first case alone tells most mistakes.
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_equals_a_plain_loop(case, data_root, tmp_path):
    """Log, last.pt and best.pt. An evaluation in between changes nothing."""
    setting = DEFAULTS | TINY | CASES[case]
    run = train_tiny(tmp_path, data_root=data_root, **CASES[case])
    lines, weights, averages = train_by_hand(setting, data_root, run.start, run.seeds)

    assert len(run.lines) == len(lines) == setting["iterations"]
    for found, expected in zip(run.lines, lines):
        losses = ({name for name in line if "loss" in name} for line in (found, expected))
        assert next(losses) == next(losses)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert_same_weights(run.last["model"], weights[-1])
    moved = [
        name for name, value in run.last["model"].items() if not torch.equal(value, run.start[name])
    ]
    assert any(name.startswith("tracker.") for name in moved)

    if setting["ema"]:
        assert_same_weights(
            {name: run.last["ema"][f"module.{name}"] for name in averages[-1]}, averages[-1]
        )
    if setting["evaluate_every"]:
        # An untrained model finds nothing. The last of equal evaluations is the best.
        assert len({line["AP"] for line in run.evaluations}) == 1
        assert [line["step"] for line in run.evaluations] == list(
            range(setting["evaluate_every"], setting["iterations"] + 1, setting["evaluate_every"])
        )
        evaluated = averages if setting["ema"] else weights
        last = run.evaluations[-1]["step"]
        assert run.best["step"] == last
        assert_same_weights(run.best["model"], evaluated[last - 1])
        first = run.evaluations[0]["step"]
        convolution, _ = run.evaluated[0]
        torch.testing.assert_close(convolution, evaluated[first - 1]["backbone.conv1.weight"])


@pytest.mark.slow
def test_the_log_tells_the_rate_of_each_step(data_root, tmp_path):
    run = train_tiny(
        tmp_path,
        data_root=data_root,
        iterations=6,
        lr=0.002,
        warmup=4,
        warmup_start=0.5,
        lr_steps=[4, 5],
        lr_gamma=0.5,
    )
    expected = [0.00125, 0.0015, 0.00175, 0.002, 0.001, 0.0005]
    assert [line["lr"] for line in run.lines] == pytest.approx(expected)


@pytest.mark.slow
def test_seeds_of_the_steps_differ(data_root, tmp_path):
    """The same in another run with the same --seed."""
    runs = [
        train_tiny(tmp_path / name, data_root=data_root, iterations=3, seed=seed)
        for name, seed in (("one", 1), ("again", 1), ("other", 2))
    ]
    one, again, other = (run.seeds for run in runs)
    assert one == again and len(set(one + other)) == 6
