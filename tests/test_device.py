"""Selection of the device and the precision."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as distributed

from runtime import processes
from runtime.device import choose_amp, choose_device, make_deterministic
from runtime.errors import InputError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "asked, device, training, has_bfloat16, expected",
    [
        ("auto", CPU, False, False, torch.float32),
        ("auto", CPU, True, False, torch.float32),
        ("auto", GPU, False, True, torch.float16),  # the nearer to float32
        ("auto", GPU, True, True, torch.bfloat16),  # needs no scale
        ("auto", GPU, True, False, torch.float16),
        ("bf16", CPU, False, False, torch.bfloat16),
        ("off", GPU, False, True, torch.float32),
    ],
)
def test_precision(asked, device, training, has_bfloat16, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    dtype, reason = choose_amp(asked, device, training)
    assert dtype == expected and reason


@pytest.mark.parametrize(
    "asked, local_rank, expected",
    [
        ("auto", None, 0),
        ("cuda", None, 0),
        ("cuda:2", None, 2),
        ("auto", "3", 3),
        ("cuda:2", "1", 1),
        ("cuda", "0", 0),
    ],
)
def test_the_gpu_of_a_process(asked, local_rank, expected, monkeypatch):
    """The one that torchrun numbers it by, else the one that is asked for."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    device = choose_device(asked, local_rank)
    assert device == torch.device("cuda", expected) and chosen == [device]
    assert choose_device("cpu", local_rank) == torch.device("cpu") and len(chosen) == 1


def test_a_computer_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    for asked in ("cuda", "cuda:1", "tpu"):
        with pytest.raises(InputError, match=f"--device {asked.partition(':')[0]}"):
            choose_device(asked)


def test_deterministic_algorithms(monkeypatch):
    """cuBLAS asks for its variable before anything is computed; a value of the user's stays."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        make_deterministic()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def second_of_three_starts(monkeypatch):
    """The environment of process 0 of 2 in a run that torchrun has restarted; returns the store."""
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_RANK", "1"),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", "1"),
        ("TORCHELASTIC_RESTART_COUNT", "2"),
    ):
        monkeypatch.setenv(name, value)
    store = distributed.HashStore()
    monkeypatch.setattr(processes, "CONNECT_TIMEOUT", timedelta(seconds=1), raising=False)
    monkeypatch.setattr(processes, "rendezvous", lambda *asked, **options: iter([(store, 0, 2)]))
    for name in ("world size 1", "start 0/world size 1"):  # left by nine processes
        store.set(name, "9")
    store.set("start 2/world size 1", "2")
    return store


@pytest.mark.parametrize("gpus, expected", [(0, torch.device("cpu")), (4, torch.device("cuda", 1))])
def test_a_restarted_process_joins_the_others(gpus, expected, second_of_three_starts, monkeypatch):
    """It does not read what processes of an earlier start have left in the store."""
    joined = []
    monkeypatch.setattr(
        distributed,
        "init_process_group",
        lambda backend, **options: joined.append((backend, options)),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert processes.start_processes("auto") == (0, 2, expected)
    ((backend, options),) = joined
    assert ("nccl" in backend) == (gpus > 0) and "gloo" in backend
    assert (options["rank"], options["world_size"]) == (0, 2)
    assert options["timeout"] >= timedelta(hours=1)  # an evaluation takes long
    options["store"].set("who", "I")
    assert second_of_three_starts.get("start 2/who") == b"I"
