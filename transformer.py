"""The post-norm blocks that the frame decoder (model.py) and the tracker (tracker.py) are made of.

One residual branch each, LayerNorm after the sum (post-norm), no dropout: `SelfAttention`, `CrossAttention`,
`FeedForward`; and the `MLP` that turns a query into a mask embedding. Batch comes first everywhere: (N, tokens, C).

Source: upstream mask2former/modeling/transformer_decoder/mask2former_transformer_decoder.py and
vita/modeling/transformer_decoder/vita.py, which hold the same three blocks twice.
"""
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

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None,
                blocked: Tensor | None = None) -> Tensor:
        """query (N, Q, C), key and value (N, S, C); bias float or blocked bool, broadcastable to (N, heads, Q, S)."""
        parts = zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        q, k, v = (F.linear(x, weight, b).unflatten(-1, (self.heads, -1)).transpose(1, 2) for x, weight, b in parts)
        if blocked is not None:
            mask = ~blocked  # scaled_dot_product_attention reads True as "may attend"
        else:
            mask = None if bias is None else bias.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    """x = norm(x + attention(x + position, x + position, x))."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.attention = Attention(channels, heads)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, position: Tensor | None = None, bias: Tensor | None = None,
                blocked: Tensor | None = None) -> Tensor:
        located = x if position is None else x + position
        return self.norm(x + self.attention(located, located, x, bias, blocked))


class CrossAttention(nn.Module):
    """x = norm(x + attention(x + position, tokens + token_position, tokens))."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.attention = Attention(channels, heads)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, position: Tensor, tokens: Tensor, token_position: Tensor,
                blocked: Tensor | None = None) -> Tensor:
        return self.norm(x + self.attention(x + position, tokens + token_position, tokens, blocked=blocked))


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
        return self.norm(x + self.linear2(F.relu(self.linear1(x))))


class MLP(nn.Sequential):
    """Three linear layers with ReLU between: a query's mask embedding."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels), nn.ReLU(),
                         nn.Linear(channels, out_channels))
