"""Weights in 16 bit: cast once, instead of by autocast at every use, and a kernel for them.

    cast_weights(model.modules(), torch.float16)    # in place

`accelerate` and `cast_frozen_weights` (acceleration.py) call it. Results are those of autocast with
float32 weights (tests/test_model.py).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from transformer import Attention, FeedForward


def cast_weights(modules: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Cast the weights of linear layers, convolutions and attention, in place.

    Norms and embeddings stay as they are, as under autocast. Feed-forward blocks get a fused first
    layer.
    """
    for module in modules:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(dtype)
        elif isinstance(module, Attention):
            module.in_proj_weight.data = module.in_proj_weight.to(dtype)
            module.in_proj_bias.data = module.in_proj_bias.to(dtype)
        elif isinstance(module, FeedForward):
            fuse_relu(module)


def fuse_relu(feed_forward: FeedForward) -> None:
    """Let the first linear layer apply the activation, in place. Its weights do not move."""
    feed_forward.linear1.__class__ = LinearReLU
    feed_forward.activation = nn.Identity()


class LinearReLU(nn.Linear):
    """relu(x W^T + b): one kernel in 16 bit on a GPU, which saves a pass over the hidden units.

    The kernel has no backward: the plain form is used with gradients enabled, and on other devices.
    """

    def forward(self, x: Tensor) -> Tensor:
        in_16_bit = self.weight.dtype in (torch.float16, torch.bfloat16)
        if torch.is_grad_enabled() or not x.is_cuda or not in_16_bit:
            return super().forward(x).relu()
        tokens = x.to(self.weight.dtype).flatten(0, -2)
        output = torch._addmm_activation(self.bias, tokens, self.weight.T)
        return output.unflatten(0, x.shape[:-1])
