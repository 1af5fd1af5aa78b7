"""Weights and activations in 16 bit: cast once, instead of by autocast at every use.

    cast_weights(model.modules(), torch.float16)    # in place

`accelerate` and `cast_frozen_weights` (acceleration.py) call it. Results are those of autocast with
float32 weights, except that merged matmuls may round differently (tests/test_half_precision.py).
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.plain_source import is_unchanged
from transformer import Attention, FeedForward

HALF = (torch.float16, torch.bfloat16)
# Of the plain code for which HalfAttention.project and LinearReLU were written.
PROJECT_DIGEST = "c81713af"
FORWARD_DIGEST = "be4cbe1a"


def cast_weights(modules: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Cast the weights of linear layers, convolutions and attention to a 16-bit dtype, in place.

    Norms and embeddings stay as they are, as under autocast. Feed-forward blocks get a fused first
    layer, attention merged projections.
    """
    for module in modules:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(dtype)
        elif isinstance(module, Attention):
            module.in_proj_weight.data = module.in_proj_weight.to(dtype)
            module.in_proj_bias.data = module.in_proj_bias.to(dtype)
        elif isinstance(module, FeedForward):
            fuse_relu(module)
        if type(module) is nn.Linear:
            module.__class__ = HalfLinear
        elif type(module) is Attention and is_unchanged(Attention.project, PROJECT_DIGEST):
            module.__class__ = HalfAttention


# Activations


def cast_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which x remembers: the next layer that reads x gets the same copy."""
    if x.dtype == dtype or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return x.to(dtype)
    # A parameter may get new values through `.data`; inference tensors do not count changes.
    if isinstance(x, nn.Parameter) or x.is_inference():
        return x.to(dtype)
    copy, state = getattr(x, "remembered_cast", (None, None))
    if copy is None or copy.dtype != dtype or state != cast_state(x):
        copy = x.to(dtype)
        remember_cast(x, copy)
    return copy


def remember_cast(x: Tensor, copy: Tensor) -> None:
    """Let `cast_once` return this copy of x, until x is changed in place."""
    if not x.is_inference():
        x.remembered_cast = copy, cast_state(x)


def cast_state(x: Tensor) -> tuple[int, int, bool]:
    """What must not have changed since a cast was remembered.

    A CUDA graph must cast inside of its capture: an earlier copy would keep the values of the
    capture. A copied tensor has the attributes of the original, but another id.
    """
    return id(x), x._version, x.is_cuda and torch.cuda.is_current_stream_capturing()


# Layers


def is_half(weight: Tensor, x: Tensor) -> bool:
    """Whether autocast would cast x to the dtype of this 16-bit weight."""
    return weight.dtype in HALF and torch.is_autocast_enabled(x.device.type)


class HalfLinear(nn.Linear):
    """A linear layer of 16-bit weights whose input is cast once."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(cast_once(x, self.weight.dtype) if is_half(self.weight, x) else x)


class HalfAttention(Attention):
    """Attention that projects equal inputs, such as query and key, in one matmul."""

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Query, key and value (N, tokens, C) -> q, k and v (N, heads, tokens, C / heads)."""
        if query is not key:
            groups = [(query, 1), (key, 1), (value, 1)]
        elif key is not value:
            groups = [(query, 2), (value, 1)]
        else:
            groups = [(query, 3)]
        first, projected = 0, []
        for x, count in groups:
            end = first + count * x.shape[-1]
            weight, bias = self.in_proj_weight[first:end], self.in_proj_bias[first:end]
            x = cast_once(x, weight.dtype) if is_half(weight, x) else x
            for part in F.linear(x, weight, bias).chunk(count, -1):
                projected.append(part.unflatten(-1, (self.heads, -1)).transpose(1, 2))
            first = end
        return projected


def fuse_relu(feed_forward: FeedForward) -> None:
    """Let the first linear layer apply the ReLU, in place. Its weights do not move.

    A block with another activation stays as it is.
    """
    unchanged = is_unchanged(FeedForward.forward, FORWARD_DIGEST)
    if unchanged and type(feed_forward.activation) is nn.ReLU:
        feed_forward.linear1.__class__ = LinearReLU
        feed_forward.activation = nn.Identity()


class LinearReLU(nn.Linear):
    """relu(x W^T + b): one kernel in 16 bit on a GPU, which saves a pass over the hidden units.

    The kernel has no backward: the plain form is used with gradients enabled, and on other devices.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not x.is_cuda or self.weight.dtype not in HALF:
            return super().forward(x).relu()
        tokens = cast_once(x, self.weight.dtype).flatten(0, -2)
        output = torch._addmm_activation(self.bias, tokens, self.weight.T)
        return output.unflatten(0, x.shape[:-1])
