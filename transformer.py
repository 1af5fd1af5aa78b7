"""Post-norm transformer blocks, shared by the detector (detector.py) and tracker (tracker.py).

`SelfAttention`, `CrossAttention` and `FeedForward` are one residual branch each, without dropout:
x = norm(x + branch(x)). `MLP`, `mask_kernel` and `mask_logits` turn a query into a mask.
Batch comes first: (N, tokens, C).

Source: upstream mask2former/modeling/transformer_decoder/mask2former_transformer_decoder.py and
vita/modeling/transformer_decoder/vita.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention with the parameter names of nn.MultiheadAttention.

    `mask` has the meaning of its `attn_mask`: a bool mask blocks where it is True, a float mask is
    added to the logits. It broadcasts to (N, heads, queries, keys).
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

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """query (N, queries, C), key and value (N, keys, C) -> (N, queries, C)."""
        q, k, v = self.project(query, key, value)
        if mask is not None:
            # nn.MultiheadAttention: True blocks; scaled_dot_product_attention: True allows.
            mask = ~mask if mask.dtype == torch.bool else mask.to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(x.transpose(1, 2).flatten(2))

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Query, key and value (N, tokens, C) -> q, k and v (N, heads, tokens, C / heads)."""
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3)
        projected = []
        for x, weight, bias in zip((query, key, value), weights, biases):
            x = F.linear(x, weight, bias)
            projected.append(x.unflatten(-1, (self.heads, -1)).transpose(1, 2))
        return projected


class ResidualNorm(nn.LayerNorm):
    """norm(x + branch): the end of every block, with the parameters of a layer norm."""

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return super().forward(x + branch)


class SelfAttention(nn.Module):
    """x = norm(x + attention(x + query_pos, x + query_pos, x))."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.attention = Attention(channels, heads)
        self.norm = ResidualNorm(channels)

    def forward(
        self, x: Tensor, query_pos: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        query = x if query_pos is None else x + query_pos
        attended = self.attention(query, query, x, mask)
        return self.norm(x, attended)


class CrossAttention(nn.Module):
    """x = norm(x + attention(x + query_pos, key, value)).

    The caller adds the positions of the keys, once for all layers: key = value + positions.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.attention = Attention(channels, heads)
        self.norm = ResidualNorm(channels)

    def forward(
        self,
        x: Tensor,
        query_pos: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        query = x + query_pos
        attended = self.attention(query, key, value, mask)
        return self.norm(x, attended)


class FeedForward(nn.Module):
    """x = norm(x + linear2(relu(linear1(x))))."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.linear1 = nn.Linear(channels, hidden)
        self.activation = nn.ReLU()
        self.linear2 = nn.Linear(hidden, channels)
        self.norm = ResidualNorm(channels)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.linear1(x))
        return self.norm(x, self.linear2(hidden))


class MLP(nn.Sequential):
    """Three linear layers with ReLU between them: the mask embedding of a query."""

    def __init__(self, channels: int):
        super().__init__(
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
        )


def mask_kernel(embed: Tensor, mask_projection: nn.Conv2d) -> Tensor:
    """Move the 1x1 convolution `mask_projection` from the pixels to the mask embeddings.

    Mask2Former computes mask logits as e (W f + b), for embedding e (C), pixel feature f (C) and
    convolution weights W and b. This function uses e (W f + b) = (e W) f + e b: it maps embed
    (..., C) to kernels (..., C + 1), which hold e W and the constant e b. `mask_logits` applies
    them to f.

    Memory: W f + b, as large as the features, is never stored. Training takes 7 % less memory.
    """
    weight = mask_projection.weight.flatten(1)  # (C, C)
    bias = mask_projection.bias[:, None]  # (C, 1)
    return embed @ torch.cat((weight, bias), 1)


def mask_logits(kernel: Tensor, features: Tensor) -> Tensor:
    """Mask logits of kernels (N, Q, C + 1) on features (N, C, h, w) or (N, C, pixels).

    Returns (N, Q, h, w) or (N, Q, pixels).
    """
    weight, constant = kernel[..., :-1], kernel[..., -1:]
    weight = weight.contiguous()  # Speed: rows of C + 1 numbers are not aligned
    logits = weight @ features.flatten(2) + constant
    return logits.unflatten(2, features.shape[2:])


def full_precision(x: Tensor) -> Tensor:
    """x in float32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
