"""CUDA kernels of deformable attention: a plain one to read, and a tuned one to run.

    deform_attn_cuda.load()                   # find or build the library
    deform_attn_cuda.tuned.forward(value, offsets, logits, level_shapes)
    deform_attn_cuda.plain.forward(value, offsets, logits, level_shapes)

`plain` (plain.cu) and `tuned` (tuned/) have the same operators; deform_attn.KERNEL selects one.
docs/kernel.md explains both.

    forward(value, offsets, logits, level_shapes)       raw offsets and logits, as deform_attn.py
    sample(value, locations, weights, level_shapes)     the signature of Deformable-DETR

    value                (N, pixels, heads, channels)
    offsets, locations   (N, queries, heads, levels, points, 2), as (x, y)
    logits               (N, queries, heads, levels * points)
    weights              (N, queries, heads, levels, points)
    level_shapes         [height, width, height, width, ...]
    returns              (N, queries, heads * channels)

All tensors are float32, float16, bfloat16 or float64, all of the same dtype; sums are in float32 or
float64. The operators are differentiable once. The order of additions in the gradient of the value
varies between runs, and so do its last digits. Values that are not finite can spread to queries
next to those that read them.

`load()` looks for a library built from exactly these sources: in this folder, in an installed
package deform_attn_cuda (`python -m pip install --no-build-isolation ./deform_attn_cuda`), and in
the cache, TORCH_EXTENSIONS_DIR or else ~/.cache/torch_extensions. If there is none, it is built and
cached. If that fails, a warning says why, and deform_attn.py uses PyTorch.
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

tuned = torch.ops.deform_attn  # binding.cpp registers the operators
plain = torch.ops.deform_attn_plain

INSTALL = f"python -m pip install --no-build-isolation {shlex.quote(str(FOLDER))}"
_loaded: bool | None = None  # None: not tried yet


@torch.compiler.assume_constant_result
def load() -> bool:
    """Whether the operators are available. The first call finds or builds their library.

    DEFORM_ATTN_CUDA=0 switches them off. Errors of the library itself are raised.
    """
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
                warnings.warn(
                    "deformable attention runs in PyTorch, many times slower than its CUDA "
                    f"kernel, because: {error}\n"
                    f"Once that is fixed, build the kernel with: {INSTALL}",
                    stacklevel=3,
                )
    return _loaded


def cache_folder() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root, "deform_attn_cuda")


def find_library() -> Path | None:
    """A library of these sources that runs on every visible GPU, or None."""
    installed = (Path(entry, "deform_attn_cuda") for entry in sys.path if entry)
    prefix = f"deform_attn_{source_digest()}_"
    for folder in (FOLDER, *installed, cache_folder()):
        for path in sorted(folder.glob(f"{prefix}*.so")):
            if runs_on_all_gpus(path.stem.removeprefix(prefix).split("_")):
                return path
    return None


def runs_on_all_gpus(architectures: list[str]) -> bool:
    """Whether a library for these architectures has code for every visible GPU."""
    devices = range(torch.cuda.device_count())
    capabilities = [torch.cuda.get_device_capability(index) for index in devices]
    return all(
        any(runs_on(architecture, capability) for architecture in architectures)
        for capability in capabilities
    )


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture runs on a GPU of this compute capability.

    Machine code runs on later GPUs of the same major version ("9.0a" on 9.0 only), PTX on any later
    GPU.
    """
    number, has_ptx = architecture.removesuffix("+PTX"), architecture.endswith("+PTX")
    major, minor = (int(part) for part in number.rstrip("af").split("."))
    if number[-1] in "af":
        return (major, minor) == capability
    if major == capability[0] and minor <= capability[1]:
        return True
    return has_ptx and (major, minor) <= capability


def build_in_cache() -> Path:
    """Build for the visible GPUs. If several processes call this, one builds and the rest wait."""
    if os.name != "posix":
        raise BuildError(f"it is built on Linux, not on {sys.platform}")
    import fcntl  # not available on every platform

    architectures = wanted_architectures()
    if not runs_on_all_gpus(architectures):
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST asks for {', '.join(architectures)}, which a GPU here cannot run"
        )
    target = cache_folder() / library_name(architectures)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            start = time.monotonic()
            print(
                "building the CUDA kernels of deformable attention for "
                f"{', '.join(architectures)}, once ...",
                flush=True,
            )
            build_library(target, architectures)
            print(f"built in {time.monotonic() - start:.0f} s: {target}", flush=True)
    return target


def declare() -> None:
    """Declare output shapes (for torch.compile) and gradients of all operators."""
    for namespace in (tuned, plain):
        for name, backward_name in (("forward", "backward"), ("sample", "sample_backward")):
            qualified = f"{namespace.name}::{name}"
            qualified_backward = f"{namespace.name}::{backward_name}"
            torch.library.register_fake(qualified, fake_forward)
            torch.library.register_fake(qualified_backward, fake_backward)
            torch.library.register_autograd(
                qualified,
                make_backward(getattr(namespace, backward_name)),
                setup_context=save_inputs,
            )
            torch.library.register_autograd(qualified_backward, refuse_second_derivatives)


def fake_forward(value: Tensor, points: Tensor, scores: Tensor, level_shapes: list[int]) -> Tensor:
    return value.new_empty(value.shape[0], points.shape[1], value.shape[2] * value.shape[3])


def fake_backward(
    grad: Tensor, value: Tensor, points: Tensor, scores: Tensor, level_shapes: list[int]
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (value, points, scores))


def save_inputs(ctx, inputs, output) -> None:
    *tensors, ctx.level_shapes = inputs
    ctx.save_for_backward(*tensors)


def make_backward(operator):
    def backward(ctx, grad: Tensor):
        return *operator(grad, *ctx.saved_tensors, ctx.level_shapes), None

    return backward


def refuse_second_derivatives(ctx, *grads: Tensor):
    raise NotImplementedError("deformable attention has no second derivatives")
