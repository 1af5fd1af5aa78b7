"""Distributed processes: incomplete variables, disagreement and errors are reported by all."""

import subprocess
import sys
from pathlib import Path

import pytest

import train
from processes import ENVIRONMENT, REPOSITORY, free_port
from runtime.device import choose_device
from runtime.errors import InputError
from runtime.processes import start_processes
from synthetic.suites import make_dataset

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"RANK": "1"}, "has RANK but not WORLD_SIZE"),
        ({"RANK": "0"}, "has RANK but not WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE but not RANK and MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "but not MASTER_PORT"),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "RANK is 2 in the environment and WORLD_SIZE 2",
        ),
        ({"RANK": "3", "WORLD_SIZE": "1"}, "RANK is 3 in the environment and WORLD_SIZE 1"),
        (
            {"RANK": "one", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "RANK is 'one'",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "-2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "WORLD_SIZE is '-2'",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "http"},
            "MASTER_PORT is 'http'",
        ),
    ],
)
def test_incomplete_variables_are_named(monkeypatch, given, expected):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=expected):
        start_processes("cpu")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"MASTER_ADDR": "login-node", "MASTER_PORT": "29500"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"LOCAL_RANK": "3"},
    ],
)
def test_a_single_process_needs_no_variables(monkeypatch, given):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    rank, world, device = start_processes("cpu")
    assert (rank, world, device.type) == (0, 1, "cpu")


def test_a_gpu_that_the_machine_lacks(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(InputError, match="GPU 3 was asked for, but this machine has 2"):
        choose_device("cuda", local_rank="3")


def start_two(script, *arguments, folder):
    """Two processes that run a script, each with its own rank in RANK."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        free_port(),
        str(script),
        *map(str, arguments),
    ]
    return subprocess.Popen(
        command,
        env=ENVIRONMENT,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


COLLECTIVES = """
import os
from runtime.errors import cli_errors, InputError
from runtime.processes import *
with cli_errors():
    rank, world, device = start_processes("cpu")
    assert gather(rank * 10) == [0, 10] and broadcast(rank + 5) == 5 and largest(rank) == 1
    assert gather_to_first({"rank": rank}) == ([{"rank": 0}, {"rank": 1}] if rank == 0 else [])
    with in_turn(rank, world):
        with open("order.txt", "a") as file:
            file.write(str(rank))
    require_agreement({"--seed": 7, "the contents of a.json": "0f"})
    try:
        require_agreement({"--seed": 7, "the contents of a.json": f"{rank}f"})
    except InputError as error:
        assert str(error) == ("the processes disagree about the contents of a.json: '0f' in "
                              "process 0, '1f' in process 1")
    else:
        raise AssertionError
    for guilty, expected in ((0, "no file a"), (1, "process 1 cannot go on: no file a")):
        try:
            with errors_of_any_process():
                if rank == guilty:
                    raise InputError("no file a")
        except InputError as error:
            assert str(error) == (expected if guilty != rank else "no file a") or guilty == 0
        else:
            raise AssertionError
    open(f"{rank}.done", "w").close()
    stop_processes()
"""


@pytest.mark.slow
def test_what_processes_tell_one_another(tmp_path):
    (tmp_path / "script.py").write_text(COLLECTIVES)
    process = start_two(tmp_path / "script.py", folder=tmp_path)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert (tmp_path / "0.done").exists() and (tmp_path / "1.done").exists()
    assert Path(tmp_path / "order.txt").read_text() == "01"


# A training whose two processes see different things

SEES_OTHER_THINGS = """
import os, sys
sys.argv = sys.argv[1:]
if os.environ["RANK"] == "1":
    sys.argv = [{change}(word) for word in sys.argv]
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    for name, seed in (("one", 0), ("two", 1)):
        make_dataset(folder / name, 2, 1, 3, 48, 64, (1, 2), seed=seed)
    return folder


DISAGREEMENTS = {  # arguments of process 1 -> the error
    "word.replace('/one', '/two')": "the processes disagree about the contents of the annotation "
    "files",
    "'64' if word == '48' else word": "the processes disagree about --short-sides",
    "word.replace('/one', '/three')": "no annotation file found; tried",
    "'0.5' if word == '0.25' else word": "the processes disagree about --lr: 0.25",
}


@pytest.mark.slow
def test_processes_that_see_different_things_do_not_train(datasets, tmp_path):
    """All four pairs at once: what takes the time is starting them."""
    started = []
    for number, change in enumerate(DISAGREEMENTS):
        script, output = tmp_path / f"{number}.py", tmp_path / f"run{number}"
        script.write_text(SEES_OTHER_THINGS.format(change=f"(lambda word: {change})"))
        started.append(
            (
                output,
                start_two(
                    script,
                    REPOSITORY / "train.py",
                    "--data-root",
                    datasets / "one",
                    "--output",
                    output,
                    "--device",
                    "cpu",
                    "--frames",
                    2,
                    "--points",
                    64,
                    "--short-sides",
                    48,
                    "--batch",
                    2,
                    "--workers",
                    0,
                    "--iterations",
                    2,
                    "--lr",
                    0.25,
                    folder=tmp_path,
                ),
            )
        )
    for (output, process), expected in zip(started, DISAGREEMENTS.values(), strict=True):
        said, _ = process.communicate(timeout=240)
        assert process.returncode, said
        assert f"error: {expected}" in said or f"cannot go on: {expected}" in said, said
        assert not (output / "log.jsonl").exists()


def arguments(datasets, output, *more):
    return train.parse_arguments(
        [
            "--data-root",
            str(datasets / "one"),
            "--output",
            str(output),
            "--device",
            "cpu",
            "--frames",
            "2",
            "--points",
            "64",
            "--short-sides",
            "48",
            "--batch",
            "1",
            "--workers",
            "0",
            "--iterations",
            "1",
            "--log-every",
            "1",
            *map(str, more),
        ]
    )


@pytest.mark.parametrize("part", ["best.pt", "log.jsonl", "args.json"])
@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]])
def test_a_folder_with_any_part_of_a_run_is_refused(datasets, tmp_path, part, resume):
    (tmp_path / part).write_text("precious")
    with pytest.raises(InputError, match=f"holds {part} of a run that has no last.pt"):
        train.main(arguments(datasets, tmp_path, *resume))
    assert [path.name for path in tmp_path.iterdir()] == [part]
    assert (tmp_path / part).read_text() == "precious"


@pytest.mark.slow
def test_a_run_has_a_checkpoint_before_its_first_step(datasets, tmp_path, monkeypatch):
    """So a run that dies early can be resumed, and is not overwritten."""

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train.main(arguments(datasets, tmp_path / "run"))
    monkeypatch.undo()
    with pytest.raises(InputError, match="last.pt exists: resume it"):
        train.main(arguments(datasets, tmp_path / "run"))
    train.main(arguments(datasets, tmp_path / "run", "--resume", "auto"))
    train.main(arguments(datasets, tmp_path / "whole"))
    resumed, whole = ((tmp_path / name / "log.jsonl").read_text() for name in ("run", "whole"))
    assert resumed.split('"lr"')[0] == whole.split('"lr"')[0]
