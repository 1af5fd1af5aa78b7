"""The detector: backbone maps of a frame -> pixel decoder -> frame decoder.

Paper: Mask2Former (arXiv 2112.01527), sections 3.1 and 3.2; Deformable DETR (2010.04159) for the
encoder of the pixel decoder. Upstream: mask2former/modeling/pixel_decoder/msdeformattn.py and
vita/modeling/transformer_decoder/vita_mask2former_transformer_decoder.py. Shape letters are
declared in model.py. Frames are independent: N is a batch of them.
"""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deform_attn import DeformableAttention
from transformer import MLP, CrossAttention, FeedForward, SelfAttention, mask_kernel, mask_logits

TRACKED_LAYERS = 3  # L in training: the last layers, whose queries the tracker receives


def sine_position(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """Sine position encoding (1, channels, height, width), on the device of `like`.

    The first half of the channels encodes y, the second half x; positions are normalised to
    (0, 2 pi]. The dtype is that of `like`, but at least float32.
    """
    dtype, device = torch.promote_types(like.dtype, torch.float32), like.device
    half = channels // 2
    pair = torch.arange(half, dtype=dtype, device=device).div(2, rounding_mode="floor")
    wavelength = 10000 ** (2 * pair / half)

    def encode(size: int) -> Tensor:
        position = torch.arange(1, size + 1, dtype=dtype, device=device) / (size + 1e-6)
        phase = (position * (2 * math.pi))[:, None] / wavelength
        return torch.stack((phase[:, 0::2].sin(), phase[:, 1::2].cos()), 2).flatten(1)

    y = encode(height)[:, None].expand(height, width, half)
    x = encode(width)[None].expand(height, width, half)
    return torch.cat((y, x), 2).permute(2, 0, 1)[None]


def to_tokens(maps: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, h * w, C)."""
    return maps.flatten(2).transpose(1, 2)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, h, w) -> (N, C, *size), bilinear."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class DeformableEncoderLayer(nn.Module):
    """Post-norm encoder layer over the pixels of all levels, joined."""

    def __init__(self, channels: int, heads: int, feed_forward: int):
        super().__init__()
        self.attention = DeformableAttention(channels, levels=3, heads=heads)
        self.norm = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, feed_forward)

    def forward(self, x: Tensor, position: Tensor, level_shapes: list[tuple[int, int]]) -> Tensor:
        x = self.norm(x + self.attention(x + position, x, level_shapes))
        return self.feed_forward(x)


class PixelDecoder(nn.Module):
    """Deformable encoder over strides 32, 16, 8 and an FPN step to stride 4 (section 3.1)."""
    recompute = False  # in training: recompute activations in backward, to save memory

    def __init__(self, in_channels: list[int], channels: int, heads: int, layers: int,
                 feed_forward: int):
        super().__init__()
        res2, *others = in_channels
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, channels, 1), nn.GroupNorm(32, channels))
            for inputs in reversed(others))
        self.level_embed = nn.Parameter(torch.randn(3, channels))
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(channels, heads, feed_forward) for _ in range(layers))
        self.lateral = nn.Sequential(
            nn.Conv2d(res2, channels, 1, bias=False), nn.GroupNorm(32, channels))
        self.output = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(32, channels), nn.ReLU())
        self.mask_features = nn.Conv2d(channels, channels, 1)  # applied through mask_kernel
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        for convolution in (self.lateral[0], self.output[0], self.mask_features):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """[res2, res3, res4, res5] -> maps of strides [32, 16, 8] and the FPN map of stride 4.

        All outputs have C channels. Under autocast, linear layers and deformable attention run in
        16 bit and the residual stream stays in float32. (Upstream disables autocast here.)
        """
        res2, *others = maps
        dtype = torch.promote_types(res2.dtype, torch.float32)
        sources = [projection(level).to(dtype)
                   for projection, level in zip(self.input_proj, reversed(others))]
        level_shapes = [tuple(source.shape[-2:]) for source in sources]
        position = torch.cat([
            to_tokens(sine_position(*source.shape[-2:], source.shape[1], source)) + embed
            for source, embed in zip(sources, self.level_embed)], 1)
        x = torch.cat([to_tokens(source) for source in sources], 1)     # (N, pixels, C)
        for layer in self.layers:
            x = self.checkpointed(layer, x, position, level_shapes)
        levels = x.transpose(1, 2).split([height * width for height, width in level_shapes], 2)
        levels = [level.unflatten(2, shape) for level, shape in zip(levels, level_shapes)]
        return levels, self.checkpointed(self.fpn_step, levels[-1], res2)

    def fpn_step(self, level: Tensor, res2: Tensor) -> Tensor:
        """Add the upsampled map of stride 8 to the projected res2 -> (N, C, h, w)."""
        x = resize(level, res2.shape[-2:])
        x += self.lateral(res2)  # in place: the largest map of the detector
        return self.output(x)

    def checkpointed(self, function: Callable[..., Tensor], x: Tensor, *others) -> Tensor:
        """function(x, *others), with activation checkpointing if `recompute` is set."""
        if self.recompute and x.requires_grad:
            return checkpoint(function, x, *others, use_reentrant=False, preserve_rng_state=False)
        return function(x, *others)


class FrameDecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward."""

    def __init__(self, channels: int, heads: int, feed_forward: int):
        super().__init__()
        self.cross_attention = CrossAttention(channels, heads)
        self.self_attention = SelfAttention(channels, heads)
        self.feed_forward = FeedForward(channels, feed_forward)

    def forward(self, x: Tensor, query_pos: Tensor, memory: Tensor, memory_pos: Tensor,
                mask: Tensor) -> Tensor:
        x = self.cross_attention(x, query_pos, memory, memory_pos, mask)
        x = self.self_attention(x, query_pos)
        return self.feed_forward(x)


class FrameDecoder(nn.Module):
    """Mask2Former's decoder: each layer attends to one level, within a mask (section 3.2)."""

    def __init__(self, num_classes: int, channels: int, queries: int, heads: int, layers: int,
                 feed_forward: int):
        super().__init__()
        self.layers = nn.ModuleList(
            FrameDecoderLayer(channels, heads, feed_forward) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(channels)
        self.query_feat = nn.Embedding(queries, channels)
        self.query_embed = nn.Embedding(queries, channels)  # query_pos
        self.level_embed = nn.Embedding(3, channels)
        self.class_embed = nn.Linear(channels, num_classes + 1)
        self.mask_embed = MLP(channels, channels)

    def forward(self, levels: list[Tensor], features: Tensor, mask_features: nn.Conv2d
                ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """levels: maps of strides [32, 16, 8]. features: the FPN map (N, C, h, w).

        Returns predictions and the frame queries (L, N, F, C) of the last L layers, normed. A
        prediction is class logits (N, F, K + 1) and mask kernels (N, F, C + 1), see `mask_kernel`.
        In training there is one before the first layer and one after each, otherwise only the last.
        """
        memory = [to_tokens(level) + embed
                  for level, embed in zip(levels, self.level_embed.weight)]
        memory_pos = [to_tokens(sine_position(*level.shape[-2:], level.shape[1], level))
                      for level in levels]
        sizes = [level.shape[-2:] for level in levels]
        sources = mask_sources(features, sizes)

        x = self.query_feat.weight.expand(len(features), -1, -1)
        query_pos = self.query_embed.weight
        outputs, kernels = [], []
        for index, layer in enumerate(self.layers):
            level = index % len(levels)
            outputs.append(self.decoder_norm(x))
            kernels.append(mask_kernel(self.mask_embed(outputs[-1]), mask_features))
            mask = attention_mask(kernels[-1], sources[level], sizes[level])
            x = layer(x, query_pos, memory[level], memory_pos[level], mask)
        outputs.append(self.decoder_norm(x))
        kernels.append(mask_kernel(self.mask_embed(outputs[-1]), mask_features))

        first = 0 if self.training else -1
        predictions = [(self.class_embed(output), kernel)
                       for output, kernel in zip(outputs[first:], kernels[first:])]
        layers = TRACKED_LAYERS if self.training else 1
        return predictions, torch.stack(outputs[1:][-layers:])


@torch.no_grad()
def mask_sources(features: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Features (N, C, h, w) from which `attention_mask` computes the masks of each level.

    Usually these are the features themselves: masks are computed at full size, then resized, as
    upstream. In 16 bit the features are resized instead, once for all layers. Bilinear resizing is
    linear, so for a mask embedding e and features f, resize(e . f) = e . resize(f) up to rounding.
    In float32 even rounding is that of upstream, since it decides the sign of logits close to 0.
    """
    if features.dtype in (torch.float16, torch.bfloat16):
        return [resize(features, size) for size in sizes]
    return [features] * len(sizes)


@torch.no_grad()
def attention_mask(kernel: Tensor, source: Tensor, size: tuple[int, int]) -> Tensor:
    """Masked attention (section 3.2.1): attend to where the last mask is foreground.

    kernel (N, F, C + 1), source of `mask_sources` -> bool (N, 1, F, pixels of the level), True =
    must not attend. A query with an empty mask attends everywhere.
    """
    logits = mask_logits(kernel, source)
    if logits.shape[-2:] != size:
        logits = resize(logits, size)
    background = logits.flatten(2).sigmoid() < 0.5
    is_empty = background.all(-1, keepdim=True)
    return (background & ~is_empty)[:, None]
