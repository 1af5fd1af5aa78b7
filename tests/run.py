"""Run the tests, one process for each core.

    python tests/run.py                    # as `python -m pytest tests`, on all cores
    python tests/run.py -m fast            # options are passed on to pytest
    python tests/run.py tests/test_model.py tests/test_tracker.py::test_what_is_carried

Each process runs one long test file, or a few short ones. The processes are forked from this one,
which has imported torch and the programs, since that takes longer than most files. Files are
printed once they are done: one line if they passed, everything that pytest printed if not. The last
line has the totals. If files fail together, each is run again by itself.
"""

import gc
import io
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout, suppress
from multiprocessing.connection import wait
from pathlib import Path

import pytest

import processes

os.environ |= processes.ONE_THREAD  # before torch is imported, which reads it once

import scipy.optimize  # noqa: E402, F401
import torch  # noqa: E402, F401
import torchvision  # noqa: E402, F401

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER.parent))
with suppress(Exception):  # if a program is broken, its tests say so
    import demo  # noqa: F401
    import evaluate  # noqa: F401
    import train  # noqa: F401

START_FIRST = (
    "test_golden_training.py",
    "test_kills.py",
    "test_runtime_stopping.py",
    "test_golden_inference.py",
    "test_accidents.py",
    "test_runtime_loading.py",
    "test_train.py",
    "test_model.py",
    "test_flags.py",
    "test_tutorial.py",
    "test_pages.py",
)  # they take longest
TOGETHER = 6  # other files in a process
# For every test, the plugin of logging would look through all loggers of torch, six times.
PLUGINS = ("-p", "no:cacheprovider", "-p", "no:logging")
PASSED = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
OPTIONS_WITH_VALUES = ("-k", "-m", "-p")  # the value may look like a folder
FORK = multiprocessing.get_context("fork" if hasattr(os, "fork") else None)


def warm_up() -> None:
    """Import what most processes would import again: pytest's plugins, conftest.py, matplotlib."""
    with redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-q", *PLUGINS, str(FOLDER / "conftest.py")])
    with suppress(ImportError):
        import matplotlib.backends.backend_agg  # noqa: F401
    gc.freeze()  # otherwise each process collects, and thereby copies, all of torch


def select(arguments: list[str]) -> tuple[dict[Path, list[str]], list[str]]:
    """Split the arguments into {test file: what to run of it} and options for pytest.

    As for pytest, a path selects a file, some of its tests (file::test), or a folder of files.
    """
    selected, options = {}, []
    for previous, argument in zip(["", *arguments], arguments):
        path = Path(argument.partition("::")[0])
        if previous in OPTIONS_WITH_VALUES or not (path.suffix == ".py" or path.is_dir()):
            options.append(argument)
        elif path.is_dir():
            selected |= {file.resolve(): [str(file)] for file in path.rglob("test_*.py")}
        else:
            selected.setdefault(path.resolve(), []).append(argument)
    if not selected:
        selected = {file: [str(file)] for file in FOLDER.rglob("test_*.py")}
    return selected, options


def run_pytest(arguments: list[str], output: int) -> None:
    """Run pytest in this process and end it. output: where everything is printed."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = open(1, "w", encoding="utf-8", buffering=1, closefd=False)
    sys.exit(pytest.main(["-q", *PLUGINS, *arguments]))


def run_files(selected: dict[Path, list[str]], options: list[str], cores: int) -> Iterator[tuple]:
    """Run the files in processes, as many at a time as there are cores.

    Yields (files, exit code, output) of each process in the order in which they end.
    """
    waiting = batches(selected, () if "fast" in options else START_FIRST)
    running = {}
    while waiting or running:
        while waiting and len(running) < cores:
            files, output = waiting.pop(0), tempfile.TemporaryFile()
            tests = [test for file in files for test in selected[file]]
            if len(files) > 1:  # if a test fails, it runs again, and pytest explains the assertion
                tests.append("--assert=plain")
            process = FORK.Process(target=run_pytest, args=([*tests, *options], output.fileno()))
            process.start()
            running[process.sentinel] = files, process, output
        for sentinel in wait(list(running)):
            files, process, output = running.pop(sentinel)
            process.join()
            if len(files) > 1 and process.exitcode not in PASSED:
                names = " ".join(file.name for file in files)
                print(f"failed together, so each runs again by itself: {names}", flush=True)
                waiting = [[file] for file in files] + waiting
                continue
            with output:
                output.seek(0)
                yield files, process.exitcode, output.read().decode(errors="replace").strip()


def batches(files: Iterable[Path], long_ones: Iterable[str]) -> list[list[Path]]:
    """The files of each process: a long one by itself, others together."""
    long = [file for file in files if file.name in long_ones]
    short = sorted(file for file in files if file.name not in long_ones)
    return [[file] for file in sorted(long)] + [
        short[first : first + TOGETHER] for first in range(0, len(short), TOGETHER)
    ]


def main(arguments: list[str]) -> int:
    """Run the selected files and print the results; 0 if all tests passed."""
    began, totals, failed = time.monotonic(), Counter(), []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for files, code, output in run_files(*select(arguments), cores):
        name = " ".join(os.path.relpath(file, FOLDER.parent) for file in files)
        summary = output.rpartition("\n")[2]
        if code not in PASSED:
            failed.append(name)
            print(output)
        print(f"{name}: {summary}", flush=True)
        for count, outcome in re.findall(r"(\d+) (passed|failed|error|skipped)", summary):
            totals[outcome] += int(count)
    for name in failed:
        print(f"FAILED {name}")
    counts = ", ".join(f"{count} {outcome}" for outcome, count in totals.items())
    print(f"{counts} in {time.monotonic() - began:.2f}s on {cores} cores")
    return 1 if failed or not totals["passed"] else 0


if __name__ == "__main__":
    warm_up()
    sys.exit(main(sys.argv[1:]))
