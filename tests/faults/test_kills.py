"""kill -9 at any time, also while a checkpoint is written: nothing is lost or repeated.

Twice by default, twenty times with `python -m pytest -s tests/faults -m faults`, which also prints
when the kills happened.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import evaluate
import train
from checkpoint import save_checkpoint
from processes import ENVIRONMENT, REPOSITORY, wait_until
from synthetic.suites import make_dataset
from training import TINY_FLAGS

pytestmark = pytest.mark.slow
# For each kill: on a busy machine the murderer may come too late.
TRIES = 10
KILLS = [2, pytest.param(20, marks=pytest.mark.faults)]
TINY = [*TINY_FLAGS, "--log-every", "1"]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "synthetic"
    make_dataset(
        root, train_videos=3, valid_videos=1, frames=4, height=64, width=64, objects=(1, 2)
    )
    return root


# A run that is killed


def start(folder, *arguments):
    """A training process whose output goes to printed.txt next to the run's folder."""
    resume = ["--resume", str(folder / "last.pt")] if (folder / "last.pt").exists() else []
    with open(folder.parent / "printed.txt", "a") as printed:
        return subprocess.Popen(
            [
                sys.executable,
                str(REPOSITORY / "train.py"),
                "--output",
                str(folder),
                *arguments,
                *resume,
            ],
            env=ENVIRONMENT,
            cwd=folder.parent,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(process, folder):
    """Wait for the process, which has to end well."""
    assert process.wait(timeout=300) == 0, (folder.parent / "printed.txt").read_text()[-3000:]


def read_log(folder):
    """The log's lines, without a last one that is not yet whole."""
    log = folder / "log.jsonl"
    return [json.loads(line) for line in log.read_text().split("\n")[:-1]] if log.exists() else []


def last_step(folder):
    return max((record["step"] for record in read_log(folder)[-1:]), default=0)


def half_written(folder):
    """Is there a part of a checkpoint under a temporary name?"""
    return any(folder.glob("last.pt?*"))


def kill_somewhere(process, folder, chance, while_saving):
    """kill -9 a training process, some steps and a part of one further than the run has been."""
    # A half-written file of an earlier death is replaced before the goal.
    goal = last_step(folder) + chance.randint(1, 2)
    wait_until(lambda: last_step(folder) >= goal, process)
    time.sleep(0.5 * chance.random())
    if while_saving:
        wait_until(lambda: half_written(folder), process)
    process.kill()


def assert_same_training(whole, killed, iterations):
    """Loss curve, weights and optimiser state, bit for bit."""
    curve, found_curve = (
        {record["step"]: record["loss"] for record in read_log(folder)}
        for folder in (whole, killed)
    )
    assert list(curve) == list(range(1, iterations + 1))
    assert curve == found_curve  # of a step that was repeated, the last line
    expected, found = (
        torch.load(folder / "last.pt", weights_only=True) for folder in (whole, killed)
    )
    assert expected["model"].keys() == found["model"].keys()
    for name, value in expected["model"].items():
        assert torch.equal(value, found["model"][name]), name
    for index, state in expected["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, found["optimizer"]["state"][index][name]), (index, name)


@pytest.mark.parametrize("kills", KILLS)
def test_killed_runs_resume_exactly(data_root, tmp_path, kills):
    """However often a run dies, its loss curve, weights and optimiser state are those of a run that
    does not, bit for bit.
    """
    chance, began, deaths, deaths_while_saving = random.Random(0), time.perf_counter(), 0, 0
    iterations = 3 * kills + 1  # a kill costs it about two
    arguments = [
        "--data-root",
        str(data_root),
        *TINY,
        "--iterations",
        str(iterations),
        "--batch",
        "1",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.main(train.parse_arguments([*arguments, "--output", str(whole)]))
    for number in range(TRIES * kills):
        if deaths >= kills and deaths_while_saving:
            break
        process = start(killed, *arguments, "--save-every", "1")
        try:
            kill_somewhere(process, killed, chance, while_saving=number % 2 == 0)
        finally:
            process.kill()
        if process.wait() == 0:  # it finished before the kill: start again
            assert_same_training(whole, killed, iterations)
            shutil.rmtree(killed)
            continue
        assert process.returncode == -signal.SIGKILL, (tmp_path / "printed.txt").read_text()[-3000:]
        deaths, deaths_while_saving = deaths + 1, deaths_while_saving + half_written(killed)
        if not (killed / "last.pt").exists():
            shutil.rmtree(killed)  # killed before its first checkpoint: start again
    finish(start(killed, *arguments, "--save-every", "1"), killed)
    print(
        f"{deaths} kills, {deaths_while_saving} of them while a checkpoint was written, "
        f"{time.perf_counter() - began:.0f} s"
    )
    assert deaths >= kills and deaths_while_saving
    assert_same_training(whole, killed, iterations)


def test_half_a_line_in_the_log_costs_no_step(data_root, tmp_path):
    """A run that died while it logged leaves half a line: after its resumption every line reads,
    and every step has one.
    """
    arguments = ["--data-root", str(data_root), "--output", str(tmp_path), *TINY, "--batch", "1"]
    train.main(train.parse_arguments([*arguments, "--iterations", "1"]))
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 2, "loss": 12')
    train.main(
        train.parse_arguments(
            [*arguments, "--iterations", "2", "--resume", str(tmp_path / "last.pt")]
        )
    )
    assert {record["step"] for record in read_log(tmp_path)} == {1, 2}


# An evaluation that is killed


@pytest.mark.parametrize("kills", KILLS)
def test_killed_evaluations_go_on_where_they_were(data_root, tmp_path, kills):
    """However often it dies, at whatever moment: the same results.json as of one that does not, to
    the last byte.
    """
    make_dataset(
        tmp_path / "set",
        train_videos=1,
        valid_videos=4 * kills,
        frames=2,
        height=64,
        width=64,
        objects=(1, 2),
    )
    train.main(
        train.parse_arguments(
            [
                "--data-root",
                str(data_root),
                "--output",
                str(tmp_path / "run"),
                *TINY,
                "--batch",
                "1",
                "--iterations",
                "1",
            ]
        )
    )
    command = [
        sys.executable,
        str(REPOSITORY / "evaluate.py"),
        "--weights",
        str(tmp_path / "run/last.pt"),
        "--data-root",
        str(tmp_path / "set"),
        "--short-side",
        "48",
        "--device",
        "cpu",
        "--workers",
        "0",
        "--output",
    ]
    results, unfinished, chance, moments = (
        tmp_path / "killed/results.json",
        tmp_path / "killed/unfinished",
        random.Random(0),
        [],
    )
    began = time.perf_counter()
    subprocess.run(
        [*command, str(tmp_path / "whole")], env=ENVIRONMENT, check=True, capture_output=True
    )
    # Machines differ.
    whole, expected = time.perf_counter() - began, (tmp_path / "whole/results.json").read_bytes()

    def done():
        return len(list(unfinished.glob("[0-9]*.json")))

    for number in range(TRIES * kills):
        if len(moments) >= kills:
            break
        before = done()
        process = subprocess.Popen(
            [*command, str(tmp_path / "killed")],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            if number % 4:  # else while it still starts, or a little later
                wait_until(lambda: done() > before, process)
            time.sleep(chance.random() * (0.1 if number % 4 else 0.9 * whole))
        finally:
            process.kill()
        assert process.wait() in (0, -signal.SIGKILL)
        # It was faster than its murderer, who may have come before it had cleared up.
        if results.exists():
            assert results.read_bytes() == expected
            results.unlink()
            continue
        assert before <= done(), "results are lost"
        moments.append(done())
    print(f"{len(moments)} kills, after which so many of {4 * kills} videos were done: {moments}")
    assert len(moments) >= kills
    evaluate.main(evaluate.parse_arguments([*command[2:], str(tmp_path / "killed")]))
    assert results.read_bytes() == expected
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


# A checkpoint half written

DYING_WRITER = """
import io, os, signal, sys
import torch
from checkpoint import save_checkpoint

save_checkpoint(sys.argv[1], {"step": 1, "model": {"weight": torch.full((1000,), 1.0)}})
save = torch.save

def save_half(contents, target):
    whole = io.BytesIO()
    save(contents, whole)
    file = target if hasattr(target, "write") else open(target, "wb")
    file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_half
save_checkpoint(sys.argv[1], {"step": 2, "model": {"weight": torch.full((1000,), 2.0)}})
"""


def test_half_a_checkpoint_never_takes_the_place_of_a_whole_one(tmp_path):
    """kill -9 in the middle of a write: the checkpoint before it is still there, and the next one
    clears what was left.
    """
    path = tmp_path / "last.pt"
    process = subprocess.run(
        [sys.executable, "-c", DYING_WRITER, str(path)],
        env=ENVIRONMENT,
        capture_output=True,
        timeout=120,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    left_behind = [file for file in tmp_path.iterdir() if file != path]
    assert len(left_behind) == 1 and left_behind[0].stat().st_size > 1000
    with pytest.raises((RuntimeError, EOFError)):
        torch.load(left_behind[0], weights_only=True)
    first = torch.load(path, weights_only=True)
    assert first["step"] == 1 and torch.equal(first["model"]["weight"], torch.full((1000,), 1.0))
    save_checkpoint(path, {"step": 3})
    assert torch.load(path, weights_only=True) == {"step": 3}
    assert list(tmp_path.iterdir()) == [path]
