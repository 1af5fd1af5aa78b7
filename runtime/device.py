"""Where a program computes: its device, and the dtype of autocast with the reason for it."""
import os

import torch

from runtime.errors import InputError


def choose_device(asked: str, local_rank: str | None = None) -> torch.device:
    """The device of this process; InputError if it is not there.

    asked: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N". local_rank: torchrun's
    LOCAL_RANK, the number of the GPU on this machine; None for a single process.
    """
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no GPU here")
    if asked.partition(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"--device {asked}: give auto, cpu or cuda")
    device = torch.device(asked)
    if device.type == "cuda":
        number = device.index or 0 if local_rank is None else int(local_rank)
        if number >= torch.cuda.device_count():
            raise InputError(f"GPU {number} was asked for, but this machine has "
                             f"{torch.cuda.device_count()} (--device, --nproc-per-node)")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    return device


def make_deterministic() -> None:
    """Make GPU runs deterministic, at some cost in speed; call before anything is computed.

    The same run twice gives the same bits, on GPUs of one kind with one version of PyTorch.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def choose_amp(asked: str, device: torch.device, training: bool = False) -> tuple[torch.dtype, str]:
    """The dtype of autocast (float32 = off) and the reason for it.

    Of the two 16-bit types, training needs the range of bfloat16, inference the precision of
    float16.
    """
    if asked != "auto":
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
        return dtypes[asked], "asked for"
    if device.type != "cuda":
        return torch.float32, "a CPU is not faster in 16 bit"
    if not training:
        return torch.float16, "nearer to float32 than bf16"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the GPU has it"
    return torch.float16, "the GPU has no bf16"
