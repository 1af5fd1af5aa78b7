"""The fused CUDA kernel of deformable attention: finding or building its library, and telling PyTorch of its operators.

`load()` is all that deform_attn.py calls. It looks for a library made from these very sources next to this file, in an
installed deform_attn_cuda package (`python -m pip install --no-build-isolation ./deform_attn_cuda`), and in the cache of
earlier builds (TORCH_EXTENSIONS_DIR, else ~/.cache/torch_extensions); failing that it builds one, once. Where that cannot be
done, a warning says why and what to run, and the PyTorch path does the work. Errors of the kernel itself are raised.

    torch.ops.deform_attn.forward(value, offsets, logits, level_shapes)       raw offsets and logits, as deform_attn.py
    torch.ops.deform_attn.sample(value, locations, weights, level_shapes)     Deformable-DETR's signature

value (B, S, M, D), offsets and locations (B, Q, M, V, P, 2), logits (B, Q, M, V * P), weights (B, Q, M, V, P), level_shapes
[h0, w0, h1, w1, ...] -> (B, Q, M * D). float32, float16, bfloat16 or float64, all inputs alike; sums are in float32 or
better. The value's gradient is summed in an order that varies from run to run, so its last digits do. A value that is not
finite spreads to queries beside those that read it. There are no second derivatives.
"""
import os
import shlex
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor

from .build import (
    FOLDER,
    BuildError,
    build_library,
    library_name,
    source_digest,
    wanted_architectures,
)

INSTALL = f"python -m pip install --no-build-isolation {shlex.quote(str(FOLDER))}"
_loaded: bool | None = None     # None = not tried yet


@torch.compiler.assume_constant_result
def load() -> bool:
    """Whether torch.ops.deform_attn is there; the first call finds or builds it. DEFORM_ATTN_CUDA=0 switches it off."""
    global _loaded
    if _loaded is None:
        if os.environ.get("DEFORM_ATTN_CUDA", "1") == "0":
            _loaded = False
        else:
            try:
                torch.ops.load_library(str(find_library() or build_in_cache()))
                declare()
                _loaded = True
            except (BuildError, OSError) as error:
                _loaded = False
                warnings.warn("deformable attention runs in PyTorch, many times slower than its CUDA kernel, because: "
                              f"{error}\n"
                              f"Once that is mended, build the kernel with: {INSTALL}", stacklevel=3)
    return _loaded


def cache_folder() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root, "deform_attn_cuda")


def find_library() -> Path | None:
    """A library of this version that serves every GPU seen, or None."""
    folders = [FOLDER, *(Path(entry, "deform_attn_cuda") for entry in sys.path if entry), cache_folder()]
    prefix = f"deform_attn_{source_digest()}_"
    for folder in folders:
        for path in sorted(folder.glob(f"{prefix}*.so")):
            if serves_all(path.stem.removeprefix(prefix).split("_")):
                return path
    return None


def serves_all(architectures: list[str]) -> bool:
    """Whether every GPU seen finds code for itself."""
    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    return all(any(serves(architecture, capability) for architecture in architectures) for capability in capabilities)


def serves(architecture: str, capability: tuple[int, int]) -> bool:
    """Machine code runs on later GPUs of its generation ("9.0a" on 9.0 alone), PTX on any later GPU."""
    number, ptx = architecture.removesuffix("+PTX"), architecture.endswith("+PTX")
    major, minor = (int(part) for part in number.rstrip("af").split("."))
    if number[-1] in "af":
        return (major, minor) == capability
    return (major == capability[0] and minor <= capability[1]) or (ptx and (major, minor) <= capability)


def build_in_cache() -> Path:
    """Build for the GPUs seen. Of several processes that come here together, one builds and the others wait for it."""
    if os.name != "posix":
        raise BuildError(f"it is built on Linux, not on {sys.platform}")
    import fcntl  # not everywhere
    architectures = wanted_architectures()
    if not serves_all(architectures):
        raise BuildError(f"TORCH_CUDA_ARCH_LIST asks for {', '.join(architectures)}, which a GPU here cannot run")
    target = cache_folder() / library_name(architectures)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            start = time.monotonic()
            print(f"building the CUDA kernel of deformable attention for {', '.join(architectures)}, once ...", flush=True)
            build_library(target, architectures)
            print(f"built in {time.monotonic() - start:.0f} s: {target}", flush=True)
    return target


def declare() -> None:
    """Shapes (for torch.compile) and gradients of the operators that binding.cpp registered."""
    for name in ("forward", "sample"):
        backward_name = {"forward": "backward", "sample": "sample_backward"}[name]
        torch.library.register_fake(f"deform_attn::{name}", fake_forward)
        torch.library.register_fake(f"deform_attn::{backward_name}", fake_backward)
        torch.library.register_autograd(f"deform_attn::{name}", differentiate(getattr(torch.ops.deform_attn, backward_name)),
                                        setup_context=save_inputs)
        torch.library.register_autograd(f"deform_attn::{backward_name}", refuse_second_derivatives)


def fake_forward(value: Tensor, points: Tensor, scores: Tensor, level_shapes: list[int]) -> Tensor:
    return value.new_empty(value.shape[0], points.shape[1], value.shape[2] * value.shape[3])


def fake_backward(grad: Tensor, value: Tensor, points: Tensor, scores: Tensor, level_shapes: list[int]) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (value, points, scores))


def save_inputs(ctx, inputs, output) -> None:
    *tensors, ctx.level_shapes = inputs
    ctx.save_for_backward(*tensors)


def refuse_second_derivatives(ctx, *grads: Tensor):
    raise NotImplementedError("deformable attention has no second derivatives")


def differentiate(operator):
    def backward(ctx, grad: Tensor):
        return *operator(grad, *ctx.saved_tensors, ctx.level_shapes), None
    return backward
