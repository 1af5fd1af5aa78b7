"""Scores of masks on a GPU in one kernel.

    model.mask_sum_and_area = fused_mask_sum_and_area    # what accelerate does

`step` scores the masks of all queries at frame size, so every pass over them counts.
"""

import math

import torch
from torch import Tensor

from evaluation.postprocess import mask_sum_and_area
from fast import triton_kernels as kernels
from fast.triton_kernels import triton, triton_works

MASK_SCORES_DIGEST = "4a757c44"  # of mask_sum_and_area, for which the kernel was written
BLOCK = 4096  # pixels that a program takes


def can_fuse(logits: Tensor) -> bool:
    """Whether the kernel takes these logits: it computes in float32, on the current device."""
    if not logits.is_cuda or logits.dtype == torch.float64:
        return False
    return logits.device.index == torch.cuda.current_device() and triton_works()


def fused_mask_sum_and_area(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`mask_sum_and_area`, up to rounding."""
    if not can_fuse(logits):
        return mask_sum_and_area(logits)
    *shape, height, width = logits.shape
    masks, pixels = math.prod(shape), height * width
    blocks = triton.cdiv(pixels, BLOCK)
    sums = logits.new_empty(masks, blocks, dtype=torch.float32)
    areas = logits.new_empty(masks, blocks, dtype=torch.int32)
    if masks:
        kernels.mask_sums_kernel[(masks, blocks)](logits.contiguous(), sums, areas, pixels, BLOCK)
    return sums.sum(1).view(shape), areas.sum(1).view(shape)
