"""Where a program runs: this process among those of torchrun, its device, and the dtype of autocast, with the reason."""
import os
from datetime import timedelta

import torch
import torch.distributed as distributed
from torch.distributed.rendezvous import rendezvous

from runtime.errors import InputError


def start_processes(asked: str) -> tuple[int, int, torch.device]:
    """(rank, processes, device) of this process; joins the group when torchrun has started several."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no GPU here")
    if asked.partition(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"--device {asked}: give auto, cpu or cuda")
    device = torch.device(asked)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    if world > 1:
        store, *_ = next(rendezvous("env://", rank, world))
        # torchrun --max-restarts keeps the store, and in it the addresses of the processes that died
        store = distributed.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        # long enough for one process to evaluate while the others wait
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                                       timeout=timedelta(hours=3))
    return rank, world, device


def make_deterministic() -> None:
    """The same run twice gives the same bits on a GPU, too (of one kind, with one PyTorch); slower. Before anything is computed."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def choose_amp(asked: str, device: torch.device, training: bool = False) -> tuple[torch.dtype, str]:
    """The dtype of autocast (float32 = off) and why: of the two of 16 bit, training wants the range of bfloat16, inference the digits of
    float16."""
    if asked != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[asked], "asked for"
    if device.type != "cuda":
        return torch.float32, "a CPU is not faster in 16 bit"
    if not training:
        return torch.float16, "nearer to float32 than bf16"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the GPU has it"
    return torch.float16, "the GPU has no bf16"
