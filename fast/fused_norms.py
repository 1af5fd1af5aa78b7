"""Norms of frozen weights in 16-bit programs on a GPU, each in one or two kernels (Triton).

    fuse_norms(model)    # in place, for inference or for frozen parts in training

Under autocast a norm reads and writes float32. Launched one by one, the residual sum, the norm, the
activation and copies between memory formats each read and write the whole tensor; at a stride of 4
that takes longer than the convolutions. With gradients, and on other devices, the plain modules run
(backbone.py, detector.py, transformer.py). Results equal theirs up to rounding
(tests/test_fused_norms.py).
"""

import subprocess
import warnings
from functools import cache

import torch
from torch import Tensor, nn

from transformer import ResidualNorm

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch brings Triton for NVIDIA GPUs on Linux only
    triton = None

ROWS = 8  # tokens that a program of `add_norm_kernel` takes
TILE = 32  # pixels that a program of the group norm takes at once
BLOCKS = 64  # parts of an image, with a program each, of the group norm


def fuse_norms(model: nn.Module) -> None:
    """Let the norms of a model run in fused kernels where possible, in place."""
    if not triton_works():
        return
    for module in model.modules():
        if type(module) is ResidualNorm and is_power_of_2(module.normalized_shape[0]):
            module.__class__ = FusedResidualNorm
        if isinstance(module, nn.Sequential):
            fuse_group_norm(module)


@cache
def triton_works() -> bool:
    """Whether Triton can compile a kernel, which takes a C compiler. If not, a warning says why."""
    if triton is None or not torch.cuda.is_available():
        return False
    x, weight = torch.zeros(1, 16, device="cuda"), torch.zeros(16, device="cuda")
    try:
        add_norm_kernel[(1,)](x, x, weight, weight, x, 1, 1e-5, 16, ROWS)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        warnings.warn(f"norms are not fused, because Triton fails: {error}", stacklevel=3)
        return False
    return True


def fuse_group_norm(sequence: nn.Sequential) -> None:
    """Fuse the group norm of [convolution, norm] or [convolution, norm, ReLU]."""
    norm, relu = (*sequence, None, None)[1:3]
    if type(norm) is not nn.GroupNorm or not is_power_of_2(norm.num_channels):
        return
    norm.__class__ = FusedGroupNorm
    norm.relu = isinstance(relu, nn.ReLU)
    if norm.relu:
        sequence[2] = nn.Identity()


def is_power_of_2(number: int) -> bool:
    return number & number - 1 == 0


def can_fuse(x: Tensor) -> bool:
    """Whether the kernels take this input: they have no backward."""
    return x.is_cuda and not torch.is_grad_enabled() and torch.is_autocast_enabled("cuda")


class FusedResidualNorm(ResidualNorm):
    """norm(x + branch) in one kernel."""

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        if not can_fuse(x) or x.shape != branch.shape:
            return super().forward(x, branch)
        x, branch = x.contiguous(), branch.contiguous()
        output = torch.empty_like(x, dtype=torch.float32)
        rows = x.numel() // x.shape[-1]
        grid = (triton.cdiv(rows, ROWS),)
        add_norm_kernel[grid](
            x, branch, self.weight, self.bias, output, rows, self.eps, x.shape[-1], ROWS
        )
        return output


class FusedGroupNorm(nn.GroupNorm):
    """Group norm, and ReLU behind it if `relu`, of channels-last maps."""

    relu = False

    def forward(self, x: Tensor) -> Tensor:
        if not can_fuse(x) or not x.is_contiguous(memory_format=torch.channels_last):
            x = super().forward(x)
            return x.relu() if self.relu else x
        batch, channels, height, width = x.shape
        pixels = height * width
        tiles = triton.cdiv(pixels, TILE * BLOCKS)  # of each program
        blocks = triton.cdiv(pixels, TILE * tiles)
        sums = x.new_empty(batch, blocks, 2, self.num_groups, dtype=torch.float32)
        output = torch.empty_like(x, dtype=torch.float32)
        sizes = channels, self.num_groups, TILE
        group_sums_kernel[(blocks, batch)](x, sums, pixels, tiles, *sizes)
        group_norm_kernel[(blocks, batch)](
            x,
            sums,
            self.weight,
            self.bias,
            output,
            pixels,
            tiles,
            self.eps,
            *sizes,
            BLOCKS,
            self.relu,
        )
        return output


if triton:

    @triton.jit
    def add_norm_kernel(
        x, branch, weight, bias, output, rows, eps, C: tl.constexpr, ROWS: tl.constexpr
    ):
        """output (rows, C) = layer_norm(x + branch), for ROWS rows."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        channel = tl.arange(0, C)[None]
        inside = row < rows
        at = row.to(tl.int64) * C + channel
        value = tl.load(x + at, inside, 0).to(tl.float32)
        value += tl.load(branch + at, inside, 0).to(tl.float32)
        value -= tl.sum(value, 1, keep_dims=True) / C
        variance = tl.sum(value * value, 1, keep_dims=True) / C
        value *= tl.rsqrt(variance + eps)
        value = value * tl.load(weight + channel) + tl.load(bias + channel)
        tl.store(output + at, value, inside)

    @triton.jit
    def group_sums_kernel(
        x,
        sums,
        pixels,
        tiles,
        C: tl.constexpr,
        GROUPS: tl.constexpr,
        TILE: tl.constexpr,
    ):
        """Sum and sum of squares of each group of x (N, pixels, C), over some tiles of pixels.

        sums: (N, blocks, 2, GROUPS). They are not added atomically, so results are deterministic.
        """
        block, image, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
        total = tl.zeros((GROUPS,), tl.float32)
        squares = tl.zeros((GROUPS,), tl.float32)
        channel = tl.arange(0, C)[None]
        for tile in range(tiles):
            pixel = (block * tiles + tile) * TILE + tl.arange(0, TILE)[:, None]
            at = (image.to(tl.int64) * pixels + pixel) * C + channel
            value = tl.load(x + at, pixel < pixels, 0).to(tl.float32)
            total += tl.sum(tl.reshape(tl.sum(value, 0), (GROUPS, C // GROUPS)), 1)
            squares += tl.sum(tl.reshape(tl.sum(value * value, 0), (GROUPS, C // GROUPS)), 1)
        first = sums + (image * blocks + block) * 2 * GROUPS + tl.arange(0, GROUPS)
        tl.store(first, total)
        tl.store(first + GROUPS, squares)

    @triton.jit
    def group_norm_kernel(
        x,
        sums,
        weight,
        bias,
        output,
        pixels,
        tiles,
        eps,
        C: tl.constexpr,
        GROUPS: tl.constexpr,
        TILE: tl.constexpr,
        BLOCKS: tl.constexpr,
        RELU: tl.constexpr,
    ):
        """output (N, pixels, C) = group_norm(x), and ReLU, for some tiles of pixels."""
        image, blocks = tl.program_id(1), tl.num_programs(0)
        block = tl.arange(0, BLOCKS)[:, None]
        group = tl.arange(0, GROUPS)[None]
        channel = tl.arange(0, C)[None]
        first = sums + (image * blocks + block) * 2 * GROUPS + group
        count = pixels * (C // GROUPS)
        mean = tl.sum(tl.load(first, block < blocks, 0), 0) / count  # (GROUPS,)
        squares = tl.sum(tl.load(first + GROUPS, block < blocks, 0), 0) / count
        scale = tl.rsqrt(squares - mean * mean + eps)
        # From groups to channels: (1, C).
        each: tl.constexpr = C // GROUPS
        mean = tl.reshape(tl.broadcast_to(mean[:, None], (GROUPS, each)), (1, C))
        scale = tl.reshape(tl.broadcast_to(scale[:, None], (GROUPS, each)), (1, C))
        scale *= tl.load(weight + channel)
        shift = tl.load(bias + channel) - mean * scale
        for tile in range(tiles):
            pixel = (tl.program_id(0) * tiles + tile) * TILE + tl.arange(0, TILE)[:, None]
            at = (image.to(tl.int64) * pixels + pixel) * C + channel
            value = tl.load(x + at, pixel < pixels, 0).to(tl.float32) * scale + shift
            if RELU:
                value = tl.maximum(value, 0)
            tl.store(output + at, value, pixel < pixels)
