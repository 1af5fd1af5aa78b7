"""Loader processes: the same batches as without them, and no deadlocks."""

import errno
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import Dataset

from processes import ENVIRONMENT
from runtime.errors import InputError
from runtime.loading import NICENESS, choose_workers, read_ahead
from runtime.packing import PackedBatch

CPU = torch.device("cpu")


@dataclass
class Item:
    frames: torch.Tensor
    ids: torch.Tensor
    source: str


class Items(Dataset):
    """Items of various shapes, dtypes and memory orders."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        frames = torch.randint(0, 256, (2, 5, 7, 3), generator=generator, dtype=torch.uint8)
        return Item(frames.permute(0, 3, 1, 2), torch.arange(index), f"clip {index}")


def assert_equal_items(found, expected):
    assert torch.equal(found.frames, expected.frames) and torch.equal(found.ids, expected.ids)
    assert found.frames.stride() == expected.frames.stride() and found.source == expected.source


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_those_of_the_dataset_in_order(workers):
    batches = list(read_ahead(Items(), workers, CPU, batch_sampler=[[3, 1], [0], [6, 5, 4]]))
    assert [len(batch) for batch in batches] == [2, 1, 3]
    for item, index in zip((item for batch in batches for item in batch), [3, 1, 0, 6, 5, 4]):
        assert_equal_items(item, Items()[index])
    for index, item in enumerate(read_ahead(Items(), workers, CPU)):
        assert_equal_items(item, Items()[index])


class Failing(Dataset):
    """A dataset whose second item raises."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 1:
            raise self.error
        return torch.zeros(2)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_a_dataset_arrive(workers):
    with pytest.raises(InputError, match="^frame 7.jpg cannot be read$"):
        list(read_ahead(Failing(InputError("frame 7.jpg cannot be read")), workers, CPU))
    with pytest.raises(ZeroDivisionError):  # a bug keeps its type and traceback
        list(read_ahead(Failing(ZeroDivisionError("a bug")), workers, CPU))
    with pytest.raises(RuntimeError, match="sizes differ"):
        list(read_ahead(Failing(RuntimeError("sizes differ")), workers, CPU))


def test_running_out_of_files_is_not_called_out_of_memory():
    error = OSError(errno.EMFILE, "Too many open files", "00007.jpg")
    with pytest.raises(InputError, match="ulimit -n"):
        list(read_ahead(Failing(error), 1, CPU))


class Dying(Failing):
    """A dataset whose second item kills its process."""

    def __getitem__(self, index):
        if index == 1:
            os.kill(os.getpid(), self.error)
        return torch.zeros(2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_the_death_of_a_worker_is_one_sentence(number):
    with pytest.raises(InputError, match="a loader process was killed .* fewer --workers"):
        list(read_ahead(Dying(number), 1, CPU))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_does_not_kill_workers(number):
    """The main process decides: it may need the batches that are on their way."""
    assert len(list(read_ahead(Dying(number), 1, CPU))) == 4


class Niceness(Dataset):
    """The niceness of the process that loads."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return os.nice(0)


def test_workers_give_way_to_the_main_process():
    (niceness,) = read_ahead(Niceness(), 1, CPU)
    assert niceness == min(os.nice(0) + NICENESS, 19)  # the highest


class Unsendable(Dataset):
    """Its batches can be pickled in the worker, but not by its queue."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.zeros(2)


def test_an_error_while_sending_arrives(monkeypatch):
    """Python prints it in a background thread and sends nothing: the main process would wait."""
    monkeypatch.setattr(PackedBatch, "__reduce__", lambda self: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(Unsendable(), 1, CPU))


def test_the_default_number_of_workers_fits_shared_memory(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    usage = type("Usage", (), {"free": 64 * 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert choose_workers(16, batch_bytes=10**6) == 16
    assert choose_workers(16, batch_bytes=2**23) == 2  # two batches each, in half of it
    assert choose_workers(16, batch_bytes=10**8) == 0
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # no /dev/shm at all
    assert choose_workers(16, batch_bytes=1) == 0


LIMITED = """
import torch
from runtime.errors import cli_errors
from runtime.loading import read_ahead
with cli_errors():
    items = [torch.full((3, 10 ** 6), index, dtype=torch.uint8) for index in range(6)]
    for item, index in zip(read_ahead(items, 2, torch.device("cpu")), range(6)):
        assert (item == index).all()
    print("all", index + 1)
"""


def run_limited(limit):
    """LIMITED in a shell with limited resources: exit status and what it printed last."""
    root = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "true"], capture_output=True
    )
    if root.returncode:
        pytest.skip("needs unshare(1) and user namespaces")
    shell = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'{limit} exec "$@"']
    done = subprocess.run(
        [*shell, "-", sys.executable, "-c", LIMITED],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, (done.stdout + done.stderr).strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["1m", "4m", "64m"])
def test_small_shared_memory_is_enough(size):
    """Batches that find no room go through a pipe."""
    assert run_limited(f"mount -t tmpfs -o size={size} none /dev/shm &&") == (0, "all 6")


@pytest.mark.slow
@pytest.mark.parametrize(
    "limit, expected",
    [
        (
            "mount -t tmpfs -o ro none /dev/shm &&",
            "loader processes need shared memory .*--workers 0",
        ),
        ("mount -t tmpfs -o size=8k none /dev/shm &&", "loader processes need shared memory"),
        ("ulimit -n 30 &&", "2 loader processes need about 56 open files and the limit is 30"),
        ("ulimit -n 12 &&", "the limit is 12: raise it .ulimit -n 56"),
    ],
)
def test_too_little_of_a_resource_is_one_sentence(limit, expected):
    status, said = run_limited(limit)
    assert status == 2 and re.match(f"error: .*{expected}", said)
