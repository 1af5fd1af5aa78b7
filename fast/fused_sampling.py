"""Features sampled at points for the matching costs, on a GPU in one kernel.

    criterion = fuse_sampling(Criterion(...))    # in place

`matcher.sample_features` converts the features of a frame to float32, copies them to append a
channel, and samples channels that lie far apart. The kernel reads features of 16 or 32 bits,
channels last, where they are.
"""

import torch
from torch import Tensor

from fast import triton_kernels as kernels
from fast.plain_source import is_unchanged
from fast.triton_kernels import triton, triton_works
from losses import Criterion
from matcher import sample_at, sample_features

# Of the code for which the kernel was written.
DIGESTS = {sample_features: "c53d08d9", sample_at: "58cfc6c6"}
POINTS, CHANNELS = 32, 64  # that a program takes


def fuse_sampling(criterion: Criterion) -> Criterion:
    """Let the criterion sample features with the kernel, in place, unless plain code changed."""
    if all(is_unchanged(plain, digest) for plain, digest in DIGESTS.items()):
        criterion.sample_features = fused_sample_features
    return criterion


def can_fuse(features: Tensor) -> bool:
    """Whether the kernel takes these features: it computes in float32, on the current device."""
    has_gradient = torch.is_grad_enabled() and features.requires_grad
    if not features.is_cuda or features.dtype == torch.float64 or has_gradient:
        return False
    return features.device.index == torch.cuda.current_device() and triton_works()


def fused_sample_features(features: Tensor, points: Tensor) -> Tensor:
    """`sample_features`, up to rounding."""
    if not can_fuse(features):
        return sample_features(features, points)
    frames, channels, height, width = features.shape
    count = points.shape[1]
    output = points.new_empty(frames, channels + 1, count)
    grid = triton.cdiv(count, POINTS), triton.cdiv(channels, CHANNELS), frames
    kernels.sample_features_kernel[grid](
        features, points.contiguous(), output,
        channels, height, width, count, *features.stride(), POINTS, CHANNELS,
    )  # fmt: skip
    return output
