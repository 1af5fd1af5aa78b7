"""Training: resumption, gradient accumulation, the best checkpoint, and parameter groups."""

import json
import math
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import train
from backbone import SwinBackbone
from data import InputError
from processes import ENVIRONMENT, free_port
from synthetic.suites import make_dataset
from train import learning_rate_factor, parameter_groups, parse_arguments
from trainer import held_out
from trainer.datasets import open_clips
from trainer.folder import trim_log
from training import TINY_FLAGS

pytestmark = pytest.mark.slow  # whole programs


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "synthetic"
    make_dataset(
        root, train_videos=3, valid_videos=1, frames=4, height=64, width=64, objects=(1, 2)
    )
    return root


def run(data_root, output, *more):
    train.main(
        parse_arguments(
            ["--data-root", str(data_root), "--output", str(output), *TINY_FLAGS, *more]
        )
    )
    return torch.load(output / "last.pt", weights_only=True)


def test_resuming_equals_not_stopping(data_root, tmp_path):
    """Weights, optimiser, schedule, clips, gate noise and sampled points: all the same after an
    interruption.
    """
    whole = run(data_root, tmp_path / "whole", "--iterations", "4", "--batch", "2")
    run(data_root, tmp_path / "halves", "--iterations", "2", "--batch", "2")
    halves = run(
        data_root,
        tmp_path / "halves",
        "--iterations",
        "4",
        "--batch",
        "2",
        "--resume",
        str(tmp_path / "halves/last.pt"),
    )
    assert whole["step"] == halves["step"] == 4
    for name, value in whole["model"].items():
        assert torch.equal(value, halves["model"][name]), name
    assert whole["schedule"] == halves["schedule"]
    for index, state in whole["optimizer"]["state"].items():
        assert torch.equal(state["exp_avg"], halves["optimizer"]["state"][index]["exp_avg"])


def test_training_learns_something(data_root, tmp_path):
    """The loss on three tiny videos falls; the log holds every loss by its official name."""
    run(
        data_root,
        tmp_path,
        "--iterations",
        "12",
        "--batch",
        "1",
        "--log-every",
        "1",
        "--lr",
        "1e-3",
        "--lr-steps",
        "100",
    )
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert {
        "step",
        "lr",
        "gradient_norm",
        "iterations_per_second",
        "data_share",
        "loss_ce",
        "loss_genvis_sim_clip1",
    } <= set(records[0])
    assert json.loads((tmp_path / "args.json").read_text())["lr"] == 1e-3


@pytest.mark.parametrize("propagation", ["clip", "memory", "gated+memory"])
def test_other_modes_train(data_root, tmp_path, propagation):
    checkpoint = run(
        data_root, tmp_path, "--iterations", "1", "--batch", "1", "--propagation", propagation
    )
    assert checkpoint["config"]["propagation"] == propagation


def test_a_frozen_detector_does_not_move(data_root, tmp_path):
    before = run(data_root, tmp_path / "zero", "--iterations", "0")["model"]
    after = run(
        data_root,
        tmp_path / "one",
        "--iterations",
        "1",
        "--batch",
        "1",
        "--freeze-detector",
        "--init",
        "",
    )["model"]
    moved = {
        name.split(".")[0]
        for name, value in after.items()
        if not torch.equal(value, before[name])
        and "running" not in name
        and "num_batches" not in name
    }
    assert moved == {"tracker"}


def test_parameter_groups():
    """A tenth of the rate for the backbone.

    No decay for norms, embeddings, position tables and layer scales, but for biases and the weights
    of a gate.
    """
    model = nn.ModuleDict(
        {
            "backbone": SwinBackbone(24, [1, 1, 1, 1], [1, 2, 4, 8], 7),
            "query_feat": nn.Embedding(3, 4),
            "head": nn.Linear(4, 4),
            "norm": nn.GroupNorm(2, 4),
            "gate": nn.Linear(4, 1),
        }
    )
    model.layer_scale = nn.Parameter(torch.ones(4, 1, 1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, 1.0, 0.05, 0.1)
        for parameter in group["params"]
    }
    assert len(found) == len(names)
    assert found["head.weight"] == found["head.bias"] == (1.0, 0.05)
    assert found["norm.weight"] == found["query_feat.weight"] == (1.0, 0.0)
    assert (
        found["backbone.norms.0.bias"]
        == found["backbone.features.1.0.attn.relative_position_bias_table"]
        == (0.1, 0.0)
    )
    assert found["backbone.features.1.0.attn.qkv.bias"] == (0.1, 0.05)
    assert found["layer_scale"] == (1.0, 0.0)
    assert found["gate.weight"] == found["gate.bias"] == (1.0, 0.05)


def test_schedule():
    factors = [learning_rate_factor(step, 4, [6, 8]) for step in range(10)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def fixed_points(rows, count, like):
    """In the place of matcher.random_points: the same for every row, whatever is asked before."""
    points = torch.rand(
        1, count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    )
    return points.to(like).expand(rows, count, 2)


def test_parts_of_a_step_add_up(data_root, monkeypatch):
    """--accumulate 2 gives the mean of both halves' gradients and losses."""
    monkeypatch.setattr("matcher.random_points", fixed_points)
    args = parse_arguments(
        [
            "--data-root",
            str(data_root),
            "--batch",
            "2",
            "--norm",
            "group",
            "--propagation",
            "plain",
            *TINY_FLAGS,
            "--clip-gradient",
            "0",
        ]
    )
    clips = open_clips(args)
    model, _ = train.make_model(args, clips.categories, None, print)
    model.double()
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def gradients(batch, parts):
        args.accumulate = parts
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        losses, norm = train.train_step(
            model,
            train.Criterion(len(clips.categories), points=64),
            batch,
            args,
            torch.device("cpu"),
            torch.float32,
            optimizer,
            scaler,
        )
        found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        assert found.norm().item() == pytest.approx(norm)
        return found, losses

    (first, one), (second, other), (both, mean) = (
        gradients(batch, parts)
        for batch, parts in (([clips[0]], 1), ([clips[1]], 1), ([clips[0], clips[1]], 2))
    )
    torch.testing.assert_close(both, (first + second) / 2)
    assert mean == pytest.approx({name: (one[name] + other[name]) / 2 for name in one})


def test_evaluation_keeps_the_best(data_root, tmp_path, monkeypatch):
    """best.pt holds the weights of the best evaluation, here the second.

    Evaluations are lines of the log.
    """
    found = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(
        held_out, "evaluate_results", lambda results, truth: {"AP": next(found), "per_class": {}}
    )
    last = run(
        data_root,
        tmp_path,
        "--iterations",
        "3",
        "--batch",
        "1",
        "--evaluate-every",
        "1",
        "--test-short-side",
        "32",
        "--save-every",
        "1",
        "--ema",
        "0.5",
    )
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert (best["step"], best["best"], last["best"]) == (2, 3.0, 3.0)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["AP"] for record in records if "AP" in record] == [1.0, 3.0, 2.0]
    name = "tracker.class_embed.weight"
    averaged = last["ema"][f"module.{name}"]
    assert not torch.equal(averaged, last["model"][name])
    assert not torch.equal(best["model"][name], last["model"][name])


@pytest.mark.parametrize("found, kept", [((2.0, 2.0, 1.0), 2), ((0.0, 0.0, 0.0), 3)], ids=str)
def test_the_newest_of_equal_evaluations_is_kept(data_root, tmp_path, monkeypatch, found, kept):
    """It has been trained for longer."""
    found = iter(found)
    monkeypatch.setattr(
        held_out, "evaluate_results", lambda results, truth: {"AP": next(found), "per_class": {}}
    )
    evaluating = ["--batch", "1", "--evaluate-every", "1", "--test-short-side", "32"]
    run(data_root, tmp_path, "--iterations", "3", *evaluating)
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == kept


def test_the_best_so_far_is_known_after_resuming(data_root, tmp_path, monkeypatch):
    found = iter([3.0, 2.0])
    monkeypatch.setattr(
        held_out, "evaluate_results", lambda results, truth: {"AP": next(found), "per_class": {}}
    )
    evaluating = ["--batch", "1", "--evaluate-every", "1", "--test-short-side", "32"]
    run(data_root, tmp_path, "--iterations", "1", *evaluating)
    assert (
        run(
            data_root,
            tmp_path,
            "--iterations",
            "2",
            *evaluating,
            "--resume",
            str(tmp_path / "last.pt"),
        )["best"]
        == 3.0
    )
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == 1


def test_averaged_weights_resume(data_root, tmp_path):
    whole = run(data_root, tmp_path / "whole", "--iterations", "3", "--batch", "1", "--ema", "0.9")
    run(data_root, tmp_path / "halves", "--iterations", "1", "--batch", "1", "--ema", "0.9")
    halves = run(
        data_root,
        tmp_path / "halves",
        "--iterations",
        "3",
        "--batch",
        "1",
        "--ema",
        "0.9",
        "--resume",
        str(tmp_path / "halves/last.pt"),
    )
    assert all(torch.equal(value, halves["ema"][name]) for name, value in whole["ema"].items())


def test_scenes_drawn_on_the_fly(data_root, tmp_path, capsys):
    """--render trains without a train split.

    Other suites are another run; the held-out videos are the data set's.
    """
    shown = ["--render", "easy", "occlusion", "--batch", "1"]
    run(tmp_path / "nothing", tmp_path, "--iterations", "1", *shown)
    assert "\nendless scenes (easy, occlusion) of 6 classes; " in capsys.readouterr().out
    resumed = ["--iterations", "2", "--resume", str(tmp_path / "last.pt")]
    with pytest.raises(InputError, match=r"--render \['easy', 'occlusion'\] \(now \['easy'\]\)"):
        run(data_root, tmp_path, "--render", "easy", "--batch", "1", *resumed)
    assert (
        run(
            data_root,
            tmp_path,
            "--evaluate-every",
            "1",
            "--test-short-side",
            "32",
            *shown,
            *resumed,
        )["step"]
        == 2
    )


def test_a_resumed_log_has_every_step_once(tmp_path):
    """Steps after the checkpoint, and half a line that a kill left, are taken out before they are
    done again.
    """
    log = tmp_path / "log.jsonl"
    log.write_text(
        "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)) + '{"step": 5, "lo'
    )
    trim_log(log, 2)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2]
    for strange in (b"a note of mine\n", b"\xff\xfe\n"):
        log.write_bytes(strange)
        with pytest.raises(InputError, match="log.jsonl holds a line that training did not write"):
            trim_log(log, 2)
        assert log.read_bytes() == strange


def test_seed_minus_one_is_drawn_once(data_root, tmp_path):
    run(data_root, tmp_path, "--iterations", "1", "--batch", "1", "--seed", "-1")
    seed = json.loads((tmp_path / "args.json").read_text())["seed"]
    assert seed >= 0
    run(
        data_root,
        tmp_path,
        "--iterations",
        "2",
        "--batch",
        "1",
        "--seed",
        "-1",
        "--resume",
        str(tmp_path / "last.pt"),
    )
    assert json.loads((tmp_path / "args.json").read_text())["seed"] == seed


def test_a_deterministic_run_is_not_compiled(data_root, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
    monkeypatch.setattr(torch, "compile", lambda part, **options: part)
    for parts in ("tracker", "all"):
        with pytest.raises(InputError, match="--deterministic and --compile"):
            run(data_root, tmp_path, "--deterministic", "--compile", parts, "--iterations", "0")


def test_warmup_may_start_anywhere():
    assert [learning_rate_factor(step, 2, [3], start=1.0, gamma=0.5) for step in range(4)] == [
        1,
        1,
        1,
        0.5,
    ]


def test_a_data_set_that_has_changed_is_told(data_root, tmp_path, capsys):
    """Not when it has only moved."""
    make_dataset(
        tmp_path / "other",
        train_videos=3,
        valid_videos=1,
        frames=4,
        height=64,
        width=64,
        objects=(1, 2),
        seed=1,
    )
    shutil.copytree(data_root, tmp_path / "moved")
    run(data_root, tmp_path / "run", "--iterations", "0", "--batch", "1")
    for root, told in ((tmp_path / "moved", False), (tmp_path / "other", True)):
        run(
            root,
            tmp_path / "run",
            "--iterations",
            "0",
            "--batch",
            "1",
            "--resume",
            str(tmp_path / "run/last.pt"),
        )
        assert ("the annotations are not those that" in capsys.readouterr().out) == told


# What is not finite


def poison(monkeypatch, steps, kind):
    """Make a loss NaN, or a gradient alone, in some iterations."""
    whole, number = train.Criterion.__call__, iter(range(100))

    def poisoned(self, output, *others, **more):
        losses, matches = whole(self, output, *others, **more)
        if next(number) in steps:
            broken = losses["loss_genvis_ce_clip0"]
            losses["loss_genvis_ce_clip0"] = (
                broken * math.nan if kind == "loss" else broken + (broken - broken.detach()).sqrt()
            )
        return losses, matches

    monkeypatch.setattr(train.Criterion, "__call__", poisoned)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_the_run(data_root, tmp_path, monkeypatch, kind):
    """The sentence says which loss, when, and the files of the clips.

    The last checkpoint is that of the last good step.
    """
    poison(monkeypatch, {2}, kind)
    what = "loss_genvis_ce_clip0 nan" if kind == "loss" else "the gradient's norm (nan|inf)"
    with pytest.raises(
        FloatingPointError,
        match=rf"^not finite at iteration 2, learning rate 0.001: {what}; clips: .*0000\d.jpg",
    ):
        run(data_root, tmp_path, "--iterations", "4", "--batch", "1", "--save-every", "1")
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert last["step"] == 2 and all(value.isfinite().all() for value in last["model"].values())


def test_some_steps_that_are_not_finite_need_not_be_taken(data_root, tmp_path, monkeypatch, capsys):
    """They change nothing, not even a batch norm: two in a row are allowed, three are not."""
    arguments = ["--batch", "1", "--skip-nonfinite", "2", "--weight-decay", "0"]
    before = run(data_root, tmp_path / "before", *arguments, "--iterations", "1")["model"]
    poison(monkeypatch, {1, 2}, "loss")
    after = run(data_root, tmp_path / "after", *arguments, "--iterations", "3")["model"]
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert capsys.readouterr().out.count("step not taken: not finite at iteration") == 2
    monkeypatch.undo()
    poison(monkeypatch, {0, 2, 3, 4}, "gradient")
    with pytest.raises(FloatingPointError, match="not finite at iteration 4"):
        run(data_root, tmp_path / "too_many", *arguments, "--iterations", "9")


def test_weights_that_are_not_finite_are_not_saved(data_root, tmp_path, monkeypatch):
    run(data_root, tmp_path, "--iterations", "1", "--batch", "1")
    whole = train.train_step

    def broken(network, *others):
        result = whole(network, *others)
        network.tracker.query_feat.weight.data[0, 0] = math.nan
        return result

    monkeypatch.setattr(train, "train_step", broken)
    arguments = ["--iterations", "2", "--batch", "1", "--resume", str(tmp_path / "last.pt")]
    for more in ([], ["--evaluate-every", "1", "--test-short-side", "32"]):
        with pytest.raises(
            FloatingPointError,
            match="tracker.query_feat.weight is not finite at iteration 2: the checkpoints were "
            "left",
        ):
            run(data_root, tmp_path, *arguments, *more)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 1
    assert not (tmp_path / "best.pt").exists()


# A step shared by processes

SAME_POINTS = """
import os
import pathlib
import sys
import torch
import matcher
import train
from model import GRAttVIS

def tell_seed(module, inputs):
    if isinstance(module, GRAttVIS):
        path = pathlib.Path("seed_of_rank_" + os.environ.get("RANK", "0"))
        path.write_text(str(torch.initial_seed()))

def same_points(rows, count, like):
    generator = torch.Generator().manual_seed(count)
    points = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return points.to(like).expand(rows, count, 2)

torch.set_default_dtype(torch.float64)
matcher.random_points = same_points
torch.nn.modules.module.register_module_forward_pre_hook(tell_seed)
train.main(train.parse_arguments(sys.argv[1:]))
"""


def instances_per_video(root):
    """How many instances each training video has; all are visible in all frames."""
    annotations = json.loads((root / "train.json").read_text())["annotations"]
    assert all(
        mask is not None for annotation in annotations for mask in annotation["segmentations"]
    )
    videos = [annotation["video_id"] for annotation in annotations]
    return sorted(map(videos.count, set(videos)))


def test_two_processes_have_the_gradients_of_one(tmp_path):
    """The gradients and losses of 2 x 1 clip are those of 1 x 2 clips to rounding, where both draw
    the same points; otherwise the processes are seeded differently.

    One clip has one instance, the other two: a loss that a process divides by a count of its own
    differs by percents.
    """
    make_dataset(
        tmp_path / "set",
        train_videos=2,
        valid_videos=1,
        frames=2,
        height=64,
        width=64,
        objects=(1, 2),
    )
    assert instances_per_video(tmp_path / "set") == [1, 2]  # a batch of two is one clip of each
    (tmp_path / "driver.py").write_text(SAME_POINTS)
    arguments = [
        str(tmp_path / "driver.py"),
        "--data-root",
        str(tmp_path / "set"),
        *TINY_FLAGS,
        "--iterations",
        "1",
        "--batch",
        "2",
        "--norm",
        "group",
        "--propagation",
        "plain",
        "--clip-gradient",
        "0",
        "--log-every",
        "1",
        "--tensorboard" if find_spec("tensorboard") else "--no-tensorboard",
    ]
    launchers = {
        "one": [],
        "two": [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            free_port(),
        ],
    }
    moments, losses, seeds, started = [], [], [], {}
    for name, launcher in launchers.items():
        (tmp_path / name).mkdir()
        command = [sys.executable, *launcher, *arguments, "--output", "run"]
        started[name] = subprocess.Popen(
            command,
            cwd=tmp_path / name,
            env=ENVIRONMENT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    for name, process in started.items():
        folder = tmp_path / name
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said[-3000:]
        state = torch.load(folder / "run/last.pt", weights_only=True)["optimizer"]["state"]
        # After one step: a tenth of the gradient.
        moments.append({index: entry["exp_avg"] for index, entry in state.items()})
        record = json.loads((folder / "run/log.jsonl").read_text())
        losses.append({key: value for key, value in record.items() if "loss" in key})
        seeds.append({path.name[-1]: path.read_text() for path in folder.glob("seed_of_rank_*")})
        # Only rank 0 writes for TensorBoard.
        assert len(list(folder.glob("run/tensorboard/*"))) == bool(find_spec("tensorboard"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-12) and len(losses[0]) > 20
    assert seeds[0]["0"] == seeds[1]["0"] != seeds[1]["1"]
    one, two = moments
    assert one.keys() == two.keys() and len(one) > 100
    largest = max(gradient.abs().max().item() for gradient in one.values())
    for index, gradient in one.items():
        assert gradient.dtype == torch.float64
        torch.testing.assert_close(
            two[index], gradient, rtol=0, atol=1e-12 * largest, msg=lambda text: f"{index}: {text}"
        )
