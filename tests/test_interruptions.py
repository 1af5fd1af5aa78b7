"""What must survive accidents: a run that is killed at any moment, a checkpoint half written, a step shared by processes.

KILLS=10 python -m pytest -s tests/test_interruptions.py kills the training ten times instead of twice.
"""
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from checkpoint import save_checkpoint
from synthetic import make_dataset

REPOSITORY = Path(__file__).parent.parent
KILLS = int(os.environ.get("KILLS", 2))
ENVIRONMENT = {"OMP_NUM_THREADS": "1"} | os.environ | {  # one thread: the cores may be busy
    "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])}
ITERATIONS = 3 * KILLS + 1  # of the run that is killed: a kill costs it about two
TINY = ["--device", "cpu", "--frames", "2", "--points", "64", "--short-sides", "64", "--workers", "0", "--lr-steps", "3",
        "--warmup", "0", "--log-every", "1"]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "synthetic"
    make_dataset(root, train_videos=3, valid_videos=1, frames=4, height=64, width=64, objects=(1, 2))
    return root


# A run that is killed

def start(folder, *arguments):
    """A training process that writes what it prints to printed.txt beside the run's folder."""
    resume = ["--resume", str(folder / "last.pt")] if (folder / "last.pt").exists() else []
    with open(folder.parent / "printed.txt", "a") as printed:
        return subprocess.Popen([sys.executable, str(REPOSITORY / "train.py"), "--output", str(folder), *arguments, *resume],
                                env=ENVIRONMENT, cwd=folder.parent, stdout=printed, stderr=subprocess.STDOUT,
                                start_new_session=True)


def finish(process, folder):
    """Wait for the process, which has to end well."""
    assert process.wait(timeout=300) == 0, (folder.parent / "printed.txt").read_text()[-3000:]


def wait_until(condition, process):
    """Look every 2 ms, until the condition holds or the process has ended."""
    while process.poll() is None and not condition():
        time.sleep(0.002)


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
    goal = last_step(folder) + chance.randint(1, 2)  # a half-written file of an earlier death is replaced before the goal
    wait_until(lambda: last_step(folder) >= goal, process)
    time.sleep(0.5 * chance.random())
    if while_saving:
        wait_until(lambda: half_written(folder), process)
    process.kill()


def test_killed_runs_resume_exactly(data_root, tmp_path):
    """However often a run dies, its loss curve, weights and optimiser state are those of a run that does not, bit for bit."""
    chance, began, deaths, deaths_while_saving = random.Random(0), time.perf_counter(), 0, 0
    arguments = ["--data-root", str(data_root), *TINY, "--iterations", str(ITERATIONS), "--batch", "1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, *arguments), whole)
    for number in range(KILLS):
        process = start(killed, *arguments, "--save-every", "1")
        try:
            kill_somewhere(process, killed, chance, while_saving=number % 2 == 0)
        finally:
            process.kill()
        if process.wait() == 0:
            break  # it was faster than its murderer
        assert process.returncode == -signal.SIGKILL, (tmp_path / "printed.txt").read_text()[-3000:]
        deaths, deaths_while_saving = deaths + 1, deaths_while_saving + half_written(killed)
        if not (killed / "last.pt").exists():
            shutil.rmtree(killed)  # it died before its first checkpoint: start anew
    finish(start(killed, *arguments, "--save-every", "1"), killed)
    print(f"{deaths} kills, {deaths_while_saving} of them while a checkpoint was written, {time.perf_counter() - began:.0f} s")
    assert not KILLS or deaths_while_saving

    curve, found_curve = ({record["step"]: record["loss"] for record in read_log(folder)} for folder in (whole, killed))
    assert list(curve) == list(range(1, ITERATIONS + 1))
    assert curve == found_curve  # of a step that was repeated, the last line
    expected, found = (torch.load(folder / "last.pt", weights_only=True) for folder in (whole, killed))
    assert expected["model"].keys() == found["model"].keys()
    for name, value in expected["model"].items():
        assert torch.equal(value, found["model"][name]), name
    for index, state in expected["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, found["optimizer"]["state"][index][name]), (index, name)


def test_half_a_line_in_the_log_costs_no_step(data_root, tmp_path):
    """A run that died while it logged leaves half a line: after its resumption every line reads, and every step has one."""
    arguments = ["--data-root", str(data_root), "--output", str(tmp_path), *TINY, "--batch", "1"]
    train.main(train.parse_arguments([*arguments, "--iterations", "1"]))
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 2, "loss": 12')
    train.main(train.parse_arguments([*arguments, "--iterations", "2", "--resume", str(tmp_path / "last.pt")]))
    assert {record["step"] for record in read_log(tmp_path)} == {1, 2}


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
    """kill -9 in the middle of a write: the checkpoint before it is still there, and the next one clears what was left."""
    path = tmp_path / "last.pt"
    process = subprocess.run([sys.executable, "-c", DYING_WRITER, str(path)], env=ENVIRONMENT, capture_output=True, timeout=120)
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


# A step shared by processes

SAME_POINTS = """
import sys
import torch
import matcher
import train

def same_points(rows, count, like):
    points = torch.rand(count, 2, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    return points.to(like).expand(rows, count, 2)

torch.set_default_dtype(torch.float64)
matcher.random_points = same_points
train.main(train.parse_arguments(sys.argv[1:]))
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def instances_per_video(root):
    """How many instances each training video has; all are visible in all frames."""
    annotations = json.loads((root / "train.json").read_text())["annotations"]
    assert all(mask is not None for annotation in annotations for mask in annotation["segmentations"])
    videos = [annotation["video_id"] for annotation in annotations]
    return sorted(map(videos.count, set(videos)))


def test_two_processes_have_the_gradients_of_one(tmp_path):
    """The gradients of 2 x 1 clip are those of 1 x 2 clips to rounding, where both draw the same points.

    One clip has one instance, the other two: a loss that a process divides by a count of its own differs by percents.
    In float64 what remains, relative to the largest gradient, is the 1e-6 that each process adds to its (here 12 and 48) pairs
    of the similarity loss; in float32 it is 1e-5.
    """
    make_dataset(tmp_path / "set", train_videos=2, valid_videos=1, frames=2, height=64, width=64, objects=(1, 2))
    assert instances_per_video(tmp_path / "set") == [1, 2]  # a batch of two is one clip of each
    (tmp_path / "driver.py").write_text(SAME_POINTS)
    arguments = [str(tmp_path / "driver.py"), "--data-root", str(tmp_path / "set"), *TINY, "--iterations", "1",
                 "--batch", "2", "--norm", "group", "--propagation", "plain", "--clip-gradient", "0"]
    launchers = {"one": [], "two": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]}
    moments = []
    for name, launcher in launchers.items():
        process = subprocess.run([sys.executable, *launcher, *arguments, "--output", str(tmp_path / name)], cwd=tmp_path,
                                 env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
        assert process.returncode == 0, process.stderr[-3000:]
        state = torch.load(tmp_path / name / "last.pt", weights_only=True)["optimizer"]["state"]
        moments.append({index: entry["exp_avg"] for index, entry in state.items()})  # after one step: a tenth of the gradient
    one, two = moments
    assert one.keys() == two.keys() and len(one) > 100
    largest = max(gradient.abs().max().item() for gradient in one.values())
    for index, gradient in one.items():
        assert gradient.dtype == torch.float64
        torch.testing.assert_close(two[index], gradient, rtol=0, atol=1e-7 * largest, msg=lambda text: f"{index}: {text}")
