"""The post-norm blocks that the frame decoder (detector.py) and the tracker (tracker.py) are made of.

One residual branch each, LayerNorm after the sum (post-norm), no dropout: `SelfAttention`, `CrossAttention`,
`FeedForward`; and how a query becomes a mask: `MLP`, `mask_kernel`, `mask_logits`. Batch comes first everywhere: (N, tokens, C).

Source: upstream mask2former/modeling/transformer_decoder/mask2former_transformer_decoder.py and
vita/modeling/transformer_decoder/vita.py, which hold the same three blocks twice.
"""
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention with parameters as in nn.MultiheadAttention.

    Unlike there, the mask is passed as what it is: an additive `bias` (float) or a `blocked` mask (bool, True = may
    NOT attend). Handing a float mask to an argument that reads like a bool one is how the released gate mask came to
    add 1.0 instead of blocking (tracker.py).
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels ({channels}) must be divisible by heads ({heads})")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, x: Tensor, first: int, count: int = 1) -> tuple[Tensor, ...]:
        """x (N, tokens, C) as queries (0), keys (1) or values (2), `count` of them in one product: (N, heads, tokens, C / heads) each."""
        rows = slice(first * x.shape[-1], (first + count) * x.shape[-1])
        projected = F.linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])
        return tuple(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in projected.chunk(count, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, blocked: Tensor | None = None) -> Tensor:
        """Projected q, k and v -> (N, Q, C); bias float or blocked bool, broadcastable to (N, heads, Q, S)."""
        if blocked is not None:
            mask = ~blocked  # scaled_dot_product_attention reads True as "may attend"
        else:
            mask = None if bias is None else bias.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None,
                blocked: Tensor | None = None) -> Tensor:
        """query (N, Q, C), key and value (N, S, C); bias and blocked as for `attend`."""
        q, k, v = (self.project(x, part)[0] for part, x in enumerate((query, key, value)))
        return self.attend(q, k, v, bias, blocked)


class SelfAttention(nn.Module):
    """x = norm(x + attention(x + position, x + position, x))."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.attention = Attention(channels, heads)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, position: Tensor | None = None, bias: Tensor | None = None,
                blocked: Tensor | None = None) -> Tensor:
        project = self.attention.project
        qkv = project(x, 0, 3) if position is None else (*project(x + position, 0, 2), *project(x, 2))
        return self.norm(x + self.attention.attend(*qkv, bias, blocked))


class CrossAttention(nn.Module):
    """x = norm(x + attention(x + position, tokens + token position, tokens)), in two steps: what is read does not depend on x."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.attention = Attention(channels, heads)
        self.norm = nn.LayerNorm(channels)

    def read(self, tokens: Tensor, located: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, (N, heads, S, C / heads) each, of tokens (N, S, C); located = tokens + their positions."""
        return *self.attention.project(located, 1), *self.attention.project(tokens, 2)

    def forward(self, x: Tensor, position: Tensor, read: tuple[Tensor, Tensor], blocked: Tensor | None = None) -> Tensor:
        query, = self.attention.project(x + position, 0)
        return self.norm(x + self.attention.attend(query, *read, blocked=blocked))


class FeedForward(nn.Module):
    """x = norm(x + linear2(relu(linear1(x))))."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.linear1 = nn.Linear(channels, hidden)
        self.linear2 = nn.Linear(hidden, channels)
        self.norm = nn.LayerNorm(channels)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear2(linear_relu(self.linear1, x)))


def linear_relu(linear: nn.Linear, x: Tensor) -> Tensor:
    """relu(linear(x)); on a GPU, where weights are cast for inference, in one kernel: nothing of the hidden width is read again."""
    if torch.is_grad_enabled() or not x.is_cuda or linear.weight.dtype not in (torch.float16, torch.bfloat16):
        return F.relu(linear(x))
    flat = x.to(linear.weight.dtype).flatten(0, -2)
    return torch._addmm_activation(linear.bias, flat, linear.weight.T).unflatten(0, x.shape[:-1])


class MLP(nn.Sequential):
    """Three linear layers with ReLU between: a query's mask embedding."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels), nn.ReLU(),
                         nn.Linear(channels, out_channels))


def mask_kernel(embed: Tensor, convolution: nn.Conv2d) -> Tensor:
    """Mask embeddings e (..., C) of features that go through a 1x1 convolution -> kernels (..., inputs + 1) of its inputs f.

    e (W f + b) = (e W) f + e b: the convolution goes to the few queries instead of to the many pixels, and its output is never
    made. The last number of a kernel is the constant e b."""
    return F.linear(embed, torch.cat((convolution.weight.flatten(1), convolution.bias[:, None]), 1).T)


def mask_logits(kernel: Tensor, features: Tensor) -> Tensor:
    """Kernels (N, Q, C + 1) on features (N, C, h, w) or (N, C, pixels): logits (N, Q, h, w) or (N, Q, pixels)."""
    logits = kernel[..., :-1].contiguous() @ features.flatten(2)
    return (logits + kernel[..., -1:]).unflatten(2, features.shape[2:])


def cast_products(modules: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Turn the weights of linear maps, convolutions and attention into `dtype`, in place: what autocast does at every use."""
    for module in modules:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(dtype)
        elif isinstance(module, Attention):
            module.in_proj_weight.data, module.in_proj_bias.data = module.in_proj_weight.to(dtype), module.in_proj_bias.to(dtype)
