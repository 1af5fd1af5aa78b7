"""Norms and other small modules in 16-bit programs on a GPU, each in one or two kernels.

    fuse_modules(model)    # in place, for inference or for frozen parts in training

Under autocast a norm reads and writes float32. Launched one by one, the residual sum, the norm, the
activation and copies between memory formats each read and write the whole tensor; at a stride of 4
that takes longer than the convolutions. Layer norms also write a copy in 16 bit, for the layers
that follow (`cast_once`).

A fused module is a subclass of the plain one (backbone.py, detector.py, transformer.py), which runs
with gradients, on other devices, and once it has been edited (plain_source.py). Results are equal
up to rounding (tests/test_triton_kernels.py).
"""

import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMerging, SwinTransformerBlock

from backbone import DetectorWindowAttention, SwinBackbone, wrapped_pairs
from detector import AttentionMask, UpsampleAdd
from fast import triton_kernels as kernels
from fast.half_precision import HALF, remember_cast
from fast.plain_source import is_unchanged
from fast.triton_kernels import triton, triton_works
from transformer import ResidualNorm

TOKEN_CHANNELS = 2048  # numbers that a program of `layer_norm_kernel` takes
TILE = 32  # pixels that a program of other kernels takes at once
ATTENTION_TILE = 64  # tokens of a window that are queries, or keys, at once
PIXELS = 1024  # pixels of a mask that `block_background_kernel` takes at once
PROGRAMS = 256  # of the group norm for an image, divided by the batch size, 4 at most


def fuse_modules(model: nn.Module) -> None:
    """Let small modules of a model run in fused kernels where possible, in place."""
    if not triton_works():
        return
    fused = {
        plain: replacement
        for plain, (replacement, digests) in FUSED.items()
        if all(is_unchanged(code, digest) for code, digest in digests.items())
    }
    for module in model.modules():
        if type(module) in fused:
            module.__class__ = fused[type(module)]
        elif isinstance(module, nn.Sequential):
            fuse_group_norm(module)
    # In Swin, linear layers or convolutions follow all norms.
    for module in model.modules():
        if isinstance(module, SwinTransformerBlock):
            module.norm1.half_output = module.norm2.half_output = True
        elif isinstance(module, PatchMerging):
            module.norm.half_output = True
        elif isinstance(module, SwinBackbone):
            for norm in module.norms:
                norm.half_output = True


def fuse_group_norm(sequence: nn.Sequential) -> None:
    """Fuse the group norm of [convolution, norm] or [convolution, norm, ReLU]."""
    norm, relu = (*sequence, None, None, None)[1:3]
    if type(norm) is not nn.GroupNorm or not is_power_of_2(norm.num_channels):
        return
    norm.__class__ = FusedGroupNorm
    norm.relu = isinstance(relu, nn.ReLU)
    if norm.relu:
        sequence[2] = nn.Identity()


def is_power_of_2(number: int) -> bool:
    return number & number - 1 == 0


def can_fuse(x: Tensor) -> bool:
    """Whether the kernels take this input: they have no backward, and run on the current device."""
    if torch.is_grad_enabled() or not x.is_cuda or not torch.is_autocast_enabled("cuda"):
        return False
    return x.device.index == torch.cuda.current_device()


class FusedLayerNorm(nn.LayerNorm):
    """Layer norm in one kernel; with `half_output`, its result is in 16 bit only."""

    half_output = False

    def forward(self, x: Tensor) -> Tensor:
        if not can_fuse(x) or len(self.normalized_shape) != 1 or self.bias is None:
            return super().forward(x)
        return fused_layer_norm(x, None, self, self.half_output)


class FusedResidualNorm(ResidualNorm):
    """norm(x + branch) in one kernel."""

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        if not can_fuse(x) or x.shape != branch.shape:
            return super().forward(x, branch)
        return fused_layer_norm(x, branch, self)


def fused_layer_norm(
    x: Tensor, branch: Tensor | None, norm: nn.LayerNorm, half_output: bool = False
) -> Tensor:
    """norm(x + branch) in float32, which remembers its copy in 16 bit; or the copy alone."""
    has_branch = branch is not None
    x = x.contiguous()
    branch = branch.contiguous() if has_branch else x
    copy = torch.empty_like(x, dtype=torch.get_autocast_dtype("cuda"))
    output = copy if half_output else torch.empty_like(x, dtype=torch.float32)
    channels = x.shape[-1]
    rows = x.numel() // channels
    width = triton.next_power_of_2(channels)
    rows_each = max(1, TOKEN_CHANNELS // width)
    kernels.layer_norm_kernel[(triton.cdiv(rows, rows_each),)](
        x,
        branch,
        norm.weight,
        norm.bias,
        output,
        copy,
        rows,
        norm.eps,
        channels,
        width,
        rows_each,
        has_branch,
        not half_output,
    )
    if not half_output:
        remember_cast(output, copy)
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
        most_blocks = triton.next_power_of_2(PROGRAMS // min(batch, 4))
        tiles = triton.cdiv(pixels, TILE * most_blocks)  # of each program
        blocks = triton.cdiv(pixels, TILE * tiles)
        sums = x.new_empty(batch, blocks, 2, self.num_groups, dtype=torch.float32)
        output = torch.empty_like(x, dtype=torch.float32)
        sizes = channels, self.num_groups, TILE
        kernels.group_sums_kernel[(blocks, batch)](x, sums, pixels, tiles, *sizes)
        kernels.group_norm_kernel[(blocks, batch)](
            x,
            sums,
            self.weight,
            self.bias,
            output,
            pixels,
            tiles,
            self.eps,
            *sizes,
            most_blocks,
            self.relu,
        )
        return output


class FusedUpsampleAdd(UpsampleAdd):
    """Doubling in one kernel. The result is in 16 bit, since the next layer is a convolution."""

    def forward(self, level: Tensor, lateral: Tensor) -> Tensor:
        batch, channels, height, width = level.shape
        is_double = lateral.shape[-2:] == (2 * height, 2 * width)
        is_channels_last = level.stride()[1:] == (1, width * channels, channels)
        is_channels_last &= lateral.is_contiguous(memory_format=torch.channels_last)
        is_supported = is_double and is_channels_last and is_power_of_2(channels)
        if not can_fuse(level) or not is_supported:
            return super().forward(level, lateral)
        output = torch.empty_like(lateral, dtype=torch.get_autocast_dtype("cuda"))
        tiles = triton.cdiv(2 * width, TILE)
        kernels.upsample_add_kernel[(tiles, 2 * height, batch)](
            level, lateral, output, level.stride(0), height, width, channels, TILE
        )
        return output


class FusedAttentionMask(AttentionMask):
    """The mask of mask logits in one kernel: -inf where attention is blocked, instead of True."""

    def block_background(self, logits: Tensor) -> Tensor:
        if not can_fuse(logits) or logits.dtype != torch.get_autocast_dtype("cuda"):
            return super().block_background(logits)
        batch, queries, pixels = logits.shape
        logits = logits.contiguous()
        mask = torch.empty_like(logits)
        kernels.block_background_kernel[(batch * queries,)](logits, mask, pixels, PIXELS)
        return mask[:, None]


class FusedWindowAttention(DetectorWindowAttention):
    """Window attention in one kernel between both projections.

    It reads and writes pixels where they are in the map, so nothing is padded, rolled or copied.
    """

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        head_channels = channels // self.num_heads
        is_supported = is_power_of_2(head_channels) and head_channels >= 16
        if not can_fuse(x) or not is_supported or self.qkv.weight.dtype not in HALF:
            return super().forward(x)
        qkv = self.qkv(x)
        window, shift = self.window_size[0], self.shift_size[0]
        rows, columns = triton.cdiv(height, window), triton.cdiv(width, window)  # of windows
        tiles = triton.cdiv(window**2, ATTENTION_TILE)
        rest = window**2 % ATTENTION_TILE  # matrix products take 16 or more
        rest = max(16, triton.next_power_of_2(rest)) if rest else 0
        output = qkv.new_empty(x.shape)
        kernels.window_attention_kernel[(rows * columns * tiles, self.num_heads, batch)](
            qkv,
            self.qkv.bias,
            self.get_relative_position_bias().to(qkv.dtype),
            output,
            height,
            width,
            rows,
            columns,
            head_channels**-0.5,
            channels,
            head_channels,
            window,
            shift,
            ATTENTION_TILE,
            rest,
        )
        return self.proj(output)


# The fused module of each plain one, and digests of the plain code for which it was written.
FUSED = {
    nn.LayerNorm: (FusedLayerNorm, {}),
    ResidualNorm: (FusedResidualNorm, {ResidualNorm: "7adee26d"}),
    UpsampleAdd: (FusedUpsampleAdd, {UpsampleAdd: "8ba51f1e"}),
    AttentionMask: (FusedAttentionMask, {AttentionMask: "4c2546c7"}),
    DetectorWindowAttention: (
        FusedWindowAttention,
        {DetectorWindowAttention: "43847608", wrapped_pairs: "b6f6fa46"},
    ),
}
