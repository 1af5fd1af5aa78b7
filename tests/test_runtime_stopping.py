"""Signals: training saves its step, evaluation its videos, with a one-sentence message."""

import json
import signal
import subprocess
import sys

import pytest
import torch

from processes import ENVIRONMENT, REPOSITORY, free_port, wait_until
from synthetic.suites import make_dataset

pytestmark = pytest.mark.slow
SMALL = [
    "--device",
    "cpu",
    "--frames",
    "2",
    "--points",
    "64",
    "--short-sides",
    "48",
    "--batch",
    "2",
    "--log-every",
    "1",
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("stopping") / "set"
    make_dataset(
        root, train_videos=3, valid_videos=24, frames=3, height=48, width=64, objects=(1, 2)
    )
    return root


def start(program, *arguments, handler=None):
    """A program of ours; `handler` runs in the child before it starts, as a shell may do."""
    program = program if program.startswith("-") else str(REPOSITORY / program)
    return subprocess.Popen(
        [sys.executable, program, *map(str, arguments)],
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=handler,
        start_new_session=True,
    )


def default_signals():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def train(dataset, output, *more, handler=default_signals):
    return start(
        "train.py", "--data-root", dataset, "--output", output, *SMALL, *more, handler=handler
    )


def steps(output):
    log = output / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line)["step"] for line in lines]


def last_line(text):
    return text.replace("\r", "\n").strip().splitlines()[-1]


def test_training_saves_the_step_and_resumes_exactly(dataset, tmp_path):
    """With SIGINT and with SIGTERM, both at once: starting takes the time."""
    cases = {signal.SIGINT: ["--workers", 0], signal.SIGTERM: ["--workers", 1]}
    options = ["--save-every", 1000]
    started = {}
    for number, workers in cases.items():
        run = tmp_path / number.name
        started[number] = train(dataset, run, "--iterations", 5000, *options, *workers)
    for number, process in started.items():
        wait_until(lambda: len(steps(tmp_path / number.name)) >= 2, process)
        process.send_signal(number)

    resumed = {}
    for number, process in started.items():
        run = tmp_path / number.name
        _, said = process.communicate(timeout=60)
        assert process.returncode == 128 + number and "Traceback" not in said
        message = f"stopped by {number.name}: {run}/last.pt holds iteration"
        assert last_line(said).startswith(message)
        done = torch.load(run / "last.pt", weights_only=True)["step"]
        assert done == steps(run)[-1]
        resumed[number] = (
            done + 2,
            train(
                dataset, run, "--iterations", done + 2, *options, *cases[number], "--resume", "auto"
            ),
        )
    longest = max(iterations for iterations, _ in resumed.values())
    whole = train(dataset, tmp_path / "whole", "--iterations", longest, *options, "--workers", 0)
    for process in (*(process for _, process in resumed.values()), whole):
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said

    def losses(run):
        log = (run / "log.jsonl").read_text()
        return [json.loads(line)["loss"] for line in log.splitlines()]

    for number, (iterations, _) in resumed.items():
        assert losses(tmp_path / number.name) == losses(tmp_path / "whole")[:iterations]


def test_a_second_signal_exits_at_once():
    """The first one waits for a step that never ends."""
    process = start("-c", HANGING, handler=default_signals)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) in (128 + signal.SIGTERM, 128 + signal.SIGINT)


HANGING = """
import time
from runtime.errors import cli_errors
from runtime.stopping import deferred_stop
with cli_errors(), deferred_stop():
    print("started", flush=True)
    while True:
        time.sleep(0.01)
"""


def test_an_interrupted_evaluation_of_a_run_is_repeated(dataset, tmp_path):
    """Its line of the log and best.pt are those of an uninterrupted run."""
    options = ["--workers", 0, "--evaluate-every", 2, "--test-short-side", 48, "--iterations", 4]
    process = train(dataset, tmp_path / "run", *options)
    wait_until(lambda: 2 in steps(tmp_path / "run"), process)
    process.send_signal(signal.SIGTERM)  # the evaluation has begun
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    again = train(dataset, tmp_path / "run", *options, "--resume", "auto")
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert steps(tmp_path / "run") == [1, 2, 2, 3, 4, 4]
    assert (tmp_path / "run/best.pt").exists()


def test_an_ignored_signal_stays_ignored(dataset, tmp_path):
    """As under nohup, or for background jobs of a script."""

    def ignored():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = train(dataset, tmp_path / "run", "--iterations", 4, "--workers", 0, handler=ignored)
    wait_until(lambda: steps(tmp_path / "run"), process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said


def test_evaluation_keeps_what_is_done(dataset, tmp_path):
    process = train(dataset, tmp_path / "run", "--iterations", 1, "--workers", 0)
    assert process.wait(timeout=60) == 0
    command = [
        "evaluate.py",
        "--weights",
        tmp_path / "run/last.pt",
        "--data-root",
        dataset,
        "--short-side",
        48,
        "--device",
        "cpu",
        "--workers",
        1,
        "--output",
        tmp_path / "out",
    ]
    process = start(*command, handler=default_signals)
    unfinished = tmp_path / "out/unfinished"
    wait_until(lambda: len(list(unfinished.glob("[0-9]*.json"))) > 1, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    done = len(list(unfinished.glob("[0-9]*.json")))
    assert last_line(said) == (
        f"stopped by SIGINT: {done} of 24 videos are done and kept in "
        f"{unfinished}; the same command continues"
    )
    process = start(*command)
    printed, said = process.communicate(timeout=120)
    assert process.returncode == 0 and f"{done} of them done before" in printed, said


def test_all_processes_stop_after_the_same_step(dataset, tmp_path):
    """The signal reaches one of two only; torchrun's own would reach both."""
    arguments = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        2,
        "--master-port",
        free_port(),
        REPOSITORY / "train.py",
        "--data-root",
        dataset,
        "--output",
        tmp_path / "run",
        *SMALL,
        "--workers",
        0,
        "--iterations",
        5000,
    ]
    process = start(*arguments)
    wait_until(lambda: len(steps(tmp_path / "run")) >= 2, process)
    children = subprocess.run(
        ["pgrep", "-f", f"train.py.*{tmp_path}/run"], capture_output=True, text=True
    ).stdout.split()
    second = [int(child) for child in children if rank_of(child) == b"1"]
    subprocess.run(["kill", "-TERM", str(second[0])], check=True)
    _, said = process.communicate(timeout=120)
    assert (
        "stopped by SIGTERM" in said
        and 'Traceback (most recent call last):\n  File "'
        not in said.split("stopped by SIGTERM")[0]
    )
    done = torch.load(tmp_path / "run/last.pt", weights_only=True)["step"]
    assert done == steps(tmp_path / "run")[-1]


def rank_of(process):
    with open(f"/proc/{process}/environ", "rb") as environment:
        variables = dict(entry.partition(b"=")[::2] for entry in environment.read().split(b"\0"))
    return variables.get(b"RANK")
