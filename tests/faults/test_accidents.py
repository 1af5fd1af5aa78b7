"""Accidents on a cluster: full disks, read-only folders, killed processes, wrong clocks, hashes.

Each time, the program exits within seconds with a one-sentence error, earlier files stay readable,
and the same command then produces the same result as without the accident. (test_kills.py covers
kill -9 of the whole program.)
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import evaluate
import train
from conftest import fixed_threads
from load import end, family
from processes import ENVIRONMENT, REPOSITORY, free_port, wait_until
from synthetic.suites import make_dataset
from training import TINY_FLAGS

# A shell that may mount file systems, which are unmounted when it exits; the script follows.
pytestmark = pytest.mark.slow
MOUNT = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
STEPS = 3
one_thread = fixed_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with set/, whole/ (a run of STEPS steps that nothing has happened to) and
    whole/evaluation/.
    """
    folder = tmp_path_factory.mktemp("accidents")
    make_dataset(
        folder / "set",
        train_videos=3,
        valid_videos=8,
        frames=4,
        height=64,
        width=64,
        objects=(1, 2),
    )
    finish(training(folder, folder / "whole"))
    finish(evaluating(folder, folder / "whole/evaluation"))
    return folder


def training(folder, output, *more):
    """A command that trains and saves after every step."""
    return [
        sys.executable,
        str(REPOSITORY / "train.py"),
        "--data-root",
        str(folder / "set"),
        "--output",
        str(output),
        *TINY_FLAGS,
        "--batch",
        "2",
        "--log-every",
        "1",
        "--save-every",
        "1",
        "--iterations",
        str(STEPS),
        *more,
    ]


def evaluating(folder, output, *more):
    """A command that evaluates the run that nothing has happened to."""
    return [
        sys.executable,
        str(REPOSITORY / "evaluate.py"),
        "--weights",
        str(folder / "whole/last.pt"),
        "--data-root",
        str(folder / "set"),
        "--short-side",
        "48",
        "--device",
        "cpu",
        "--workers",
        "0",
        "--output",
        str(output),
        *more,
    ]


def shell(text):
    """Run a script where it may mount what it likes.

    Skips where the system allows no such thing.
    """
    if subprocess.run(
        [*MOUNT, "mount -t tmpfs -o size=1m none /mnt"], capture_output=True
    ).returncode:
        pytest.skip("needs unshare(1) and user namespaces that may mount")
    return subprocess.run(
        [*MOUNT, text], env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )


def quoted(command):
    return " ".join(f"'{word}'" for word in command)


def error_line(text):
    """The one line that says what was the matter."""
    (line,) = (line.strip() for line in text.splitlines() if line.strip().startswith("error: "))
    return line.removeprefix("error: ")


def finish(command):
    """The command in this process, which is faster than another; it has to end well."""
    program = {"train.py": train, "evaluate.py": evaluate}[os.path.basename(command[1])]
    program.main(program.parse_arguments(command[2:]))


def assert_same_run(folder, output):
    """Log and weights are those of the run that nothing has happened to; nothing is left over."""
    curves = [
        {
            record["step"]: record["loss"]
            for record in map(json.loads, (path / "log.jsonl").read_text().splitlines())
        }
        for path in (folder / "whole", output)
    ]
    assert curves[0] == curves[1] and list(curves[0]) == [1, 2, 3]
    expected, found = (
        torch.load(path / "last.pt", weights_only=True)["model"]
        for path in (folder / "whole", output)
    )
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert {path.name for path in output.iterdir()} == {"last.pt", "log.jsonl", "args.json"}


def assert_same_results(folder, output):
    assert (output / "results.json").read_bytes() == (
        folder / "whole/evaluation/results.json"
    ).read_bytes()
    assert {path.name for path in output.iterdir()} == {
        "results.json",
        "results.json.zip",
        "metrics.json",
    }


def test_the_disk_is_full_while_a_checkpoint_is_written(folder, tmp_path):
    """It holds one and a half checkpoints: the first stays intact, and the run resumes from it."""
    size = (folder / "whole/last.pt").stat().st_size
    (tmp_path / "disk").mkdir()
    done = shell(
        f"mount -t tmpfs -o size={3 * size // 2} none {tmp_path}/disk\n"
        f"{quoted(training(folder, tmp_path / 'disk/run'))}\n"
        f"status=$?; cp -r {tmp_path}/disk/run {tmp_path}/run; exit $status"
    )
    assert done.returncode == 2
    assert (
        error_line(done.stderr)
        == f"{tmp_path}/disk/run/last.pt cannot be written: No space left on device; it is as it "
        "was before"
    )
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 1
    finish(training(folder, tmp_path / "run", "--resume", "auto"))
    assert_same_run(folder, tmp_path / "run")


def test_the_disk_is_full_while_results_are_written(folder, tmp_path):
    """Six pages: some videos have their results, which count when there is room."""
    (tmp_path / "disk").mkdir()
    done = shell(
        f"mount -t tmpfs -o size=24k none {tmp_path}/disk\n"
        f"{quoted(evaluating(folder, tmp_path / 'disk/out'))}\n"
        f"status=$?; cp -r {tmp_path}/disk/out {tmp_path}/out; exit $status"
    )
    assert done.returncode == 2
    assert re.fullmatch(
        rf"{tmp_path}/disk/out/.* cannot be written: No space left on device; it is as it was "
        r"before",
        error_line(done.stderr),
    )
    videos = [
        path for path in (tmp_path / "out/unfinished").glob("*.json") if path.stem.isdecimal()
    ]
    assert 0 < len(videos) < 8 and not list(tmp_path.glob("out/**/*.part"))
    for path in videos:
        json.loads(path.read_text())
    finish(evaluating(folder, tmp_path / "out"))
    assert_same_results(folder, tmp_path / "out")


def of_both_programs(attempt):
    """attempt(command), of training and of evaluating, both at once: starting takes the time."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(attempt, (training, evaluating)))


def test_a_folder_that_may_not_be_written(folder, tmp_path):
    """Said before anything is computed."""

    def attempt(command):
        disk = tmp_path / command.__name__
        disk.mkdir()
        return disk, shell(
            f"mount -t tmpfs -o size=1m,ro none {disk}\n{quoted(command(folder, disk / 'out'))}"
        )

    for disk, done in of_both_programs(attempt):
        assert done.returncode == 2
        assert re.fullmatch(f"{disk}/out.*: Read-only file system", error_line(done.stderr))
        assert "it/s" not in done.stderr and "frame/s" not in done.stderr


def test_a_loaders_process_is_killed(folder, tmp_path):
    """As the kernel does when memory runs out."""

    def attempt(command):
        output = tmp_path / command.__name__
        arguments = command(folder, output, "--workers", "1")
        process = subprocess.Popen(
            arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        # A step or a video is done.
        wait_until(
            lambda: len(family(process.pid)) > 1 and list(output.glob("**/[l0-9]*")), process
        )
        for child in family(process.pid)[1:]:
            os.kill(child, signal.SIGKILL)
        began = time.perf_counter()
        _, said = process.communicate(timeout=60)
        assert time.perf_counter() - began < 20
        return arguments, process.returncode, said

    (trained, *of_training), (evaluated, *of_evaluating) = of_both_programs(attempt)
    for status, said in (of_training, of_evaluating):
        if status:  # else it had read all that it needed
            assert status == 2, said[-3000:]
            assert re.match(
                "a loader process was killed .*try fewer --workers; the same command continues",
                error_line(said),
            )
    finish([*trained, "--resume", "auto"])
    assert_same_run(folder, tmp_path / "training")
    finish(evaluated)
    assert_same_results(folder, tmp_path / "evaluating")


DYING_LOADER = """
import multiprocessing.reduction, os, signal, sys
import torch
from runtime.errors import cli_errors
from runtime.loading import read_ahead

# Called after the shared memory has been allocated.
multiprocessing.reduction.send_handle = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
torch.multiprocessing.set_start_method("fork")
with cli_errors():
    for _ in read_ahead([torch.zeros(1000)] * 2, 1, torch.device("cpu")):
        pass
"""


def test_a_loaders_process_is_killed_while_it_hands_over():
    done = subprocess.run(
        [sys.executable, "-c", DYING_LOADER],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and error_line(done.stderr).startswith(
        "a loader process was killed"
    ), done.stderr


def with_rank(process, rank):
    """The process of that rank, once torchrun has started it."""
    for child in family(process.pid)[1:]:
        try:
            with (
                open(f"/proc/{child}/environ", "rb") as environment,
                open(f"/proc/{child}/cmdline", "rb") as line,
            ):
                if (
                    b"\0RANK=%d\0" % rank in b"\0" + environment.read()
                    and b"train.py" in line.read()
                ):
                    return child
        except OSError:
            pass
    return None


@pytest.mark.parametrize("restarts", [0, pytest.param(1, marks=pytest.mark.faults)])
def test_a_rank_is_killed(folder, tmp_path, restarts):
    """The job ends in seconds and names the rank.

    Or torchrun starts it again and it goes on from its checkpoint.
    """
    arguments = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        free_port(),
        "--max-restarts",
        str(restarts),
        *training(folder, tmp_path / "run", "--resume", "auto")[1:],
        # It cannot end before it is killed.
        *(() if restarts else ("--iterations", "10000")),
    ]
    process = subprocess.Popen(
        arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        log = tmp_path / "run/log.jsonl"
        # A step after the first is done.
        wait_until(lambda: log.exists() and len(log.read_text().splitlines()) > 1, process)
        os.kill(with_rank(process, 1), signal.SIGKILL)
        began = time.perf_counter()
        said, _ = process.communicate(timeout=180)
    finally:  # no job that hangs is left behind
        end(process)
    step = torch.load(tmp_path / "run/last.pt", weights_only=True)["step"]
    if restarts:
        assert process.returncode == 0, said[-3000:]
        assert "iterations 1 to 3" in said or "iterations 2 to 3" in said
        steps = [
            json.loads(line)["step"]
            for line in (tmp_path / "run/log.jsonl").read_text().splitlines()
        ]
        assert step == STEPS and steps == [1, 2, 3]
    else:
        assert process.returncode == 1 and time.perf_counter() - began < 20 and 0 < step < 10000
        assert re.search(r"rank +: 1 ", said) and "Signal 9 (SIGKILL)" in said


@pytest.mark.faults
def test_clocks_and_hashes_that_change(folder, tmp_path):
    """Files from the past and from the future, another seed of Python's hashes, another time zone
    after each kill.
    """
    for number, (step, changed) in enumerate({1: 0, 2: 2**31 - 1, STEPS: 86400}.items()):
        command = training(folder, tmp_path / "run", "--resume", "auto", "--iterations", str(step))
        other = ENVIRONMENT | {"PYTHONHASHSEED": str(number + 1), "TZ": f"X{5 * number}"}
        subprocess.run(command, env=other, check=True, capture_output=True)
        for path in (tmp_path / "run").iterdir():
            os.utime(path, (changed, changed))
    assert_same_run(folder, tmp_path / "run")


NO_NETWORK = """
import runpy, socket, sys
connect = socket.socket.connect
def refuse(self, address):
    if self.family != socket.AF_UNIX:                # those connect a loader's processes
        sys.exit(f"asked for the network: {address}")
    return connect(self, address)
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = lambda *asked, **more: sys.exit(f"asked for the network: {asked}")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_nothing_asks_for_the_network(folder, tmp_path):
    def attempt(command):
        arguments = command(folder, tmp_path / command.__name__, "--workers", "1")
        return subprocess.run(
            [sys.executable, "-c", NO_NETWORK, *arguments[1:]],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )

    for done in of_both_programs(attempt):
        assert done.returncode == 0, done.stderr[-2000:]


def test_the_network_guard_guards(tmp_path):
    (tmp_path / "asks.py").write_text(
        "import urllib.request; urllib.request.urlopen('http://localhost:9')"
    )
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, str(tmp_path / "asks.py")],
        capture_output=True,
        text=True,
    )
    assert "asked for the network" in done.stderr


def test_workers_change_no_bit(folder, tmp_path):
    """Nor does anything else between two runs of one seed."""
    finish(training(folder, tmp_path / "run", "--workers", "2"))
    assert_same_run(folder, tmp_path / "run")
