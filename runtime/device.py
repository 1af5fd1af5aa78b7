"""Selects the device and the autocast dtype of a program, and copies tensors to the device."""

import os

import numpy as np
import torch
from torch import Tensor

from runtime.errors import InputError


def choose_device(name: str, local_rank: str | None = None) -> torch.device:
    """The device of this process; InputError if it is not available.

    Args:
        name: "auto" (a GPU if available), "cpu", "cuda", "cuda:N", or another device of PyTorch,
            such as "mps" or "xpu" (not tested).
        local_rank: LOCAL_RANK of torchrun, the index of the GPU; None for a single process.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no GPU here")
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # depends on the backend
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: PyTorch cannot use it: {reason}") from error
    if device.type == "cuda":
        number = device.index or 0 if local_rank is None else int(local_rank)
        if number >= torch.cuda.device_count():
            raise InputError(
                f"GPU {number} was asked for, but this machine has "
                f"{torch.cuda.device_count()} (--device, --nproc-per-node)"
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    return device


def make_deterministic() -> None:
    """Make GPU runs deterministic, at some cost in speed. Must be called before any computation.

    Runs are then bitwise reproducible on the same kind of GPU and the same version of PyTorch.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def choose_amp(name: str, device: torch.device, training: bool = False) -> tuple[torch.dtype, str]:
    """The autocast dtype (float32 = off) and the reason for it.

    name: "auto", "bf16", "fp16" or "off". "auto" selects bfloat16 for training, which needs its
        range, and float16 for inference, which needs its precision.
    """
    if name != "auto":
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
        return dtypes[name], "asked for"
    if device.type != "cuda":
        is_cpu = device.type == "cpu"
        return torch.float32, "a CPU is not faster in 16 bit" if is_cpu else "16 bit is not tested"
    if not training:
        return torch.float16, "nearer to float32 than bf16"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the GPU has it"
    return torch.float16, "the GPU has no bf16"


def upload(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device, from pinned memory, so that nothing waits for the copy."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


class CopyToCPU:
    """Tensors that are copied to the CPU while their GPU continues."""

    def __init__(self, *tensors: Tensor):
        self.copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self.copied = None
        if tensors[0].is_cuda:
            self.copied = torch.cuda.current_stream(tensors[0].device).record_event()

    def wait(self) -> list[np.ndarray]:
        """The tensors as arrays."""
        if self.copied:
            self.copied.synchronize()
        return [copy.numpy() for copy in self.copies]
