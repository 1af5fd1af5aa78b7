"""The detector: what one frame shows, without a thought of the others. Feature maps -> pixel decoder -> frame decoder.

Paper: Mask2Former (2112.01527), sections 3.1 and 3.2; Deformable DETR (2010.04159) for the encoder. Upstream:
mask2former/modeling/pixel_decoder/msdeformattn.py and vita/modeling/transformer_decoder/vita_mask2former_transformer_decoder.py.
Shape letters are declared in model.py, which puts the backbone before it and the tracker behind.
"""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deform_attn import DeformableAttention
from transformer import MLP, CrossAttention, FeedForward, SelfAttention, mask_kernel, mask_logits

SUPERVISED_LAYERS = 3                    # L in training


def sine_position(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """Sine position encoding (1, channels, height, width): y in the first half, x in the second.

    Coordinates run from 1/size to 1 times 2 pi; always computed in at least float32.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    half = channels // 2
    exponent = 2 * torch.div(torch.arange(half, dtype=dtype, device=like.device), 2, rounding_mode="floor") / half

    def encode(size: int) -> Tensor:
        place = torch.arange(1, size + 1, dtype=dtype, device=like.device) / (size + 1e-6) * (2 * math.pi)
        phase = place[:, None] / 10000 ** exponent
        return torch.stack((phase[:, 0::2].sin(), phase[:, 1::2].cos()), 2).flatten(1)   # (size, half)

    y = encode(height)[:, None].expand(height, width, half)
    x = encode(width)[None].expand(height, width, half)
    return torch.cat((y, x), 2).permute(2, 0, 1)[None]


class DeformableEncoderLayer(nn.Module):
    """Post-norm encoder layer over the joined pixels of all levels."""

    def __init__(self, channels: int, heads: int, feed_forward: int):
        super().__init__()
        self.attention = DeformableAttention(channels, levels=3, heads=heads)
        self.norm = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, feed_forward)

    def forward(self, x: Tensor, position: Tensor, level_shapes: list[tuple[int, int]]) -> Tensor:
        x = self.norm(x + self.attention(x + position, x, level_shapes))
        return self.feed_forward(x)


class PixelDecoder(nn.Module):
    """Deformable encoder over strides 32, 16, 8 and one FPN step to stride 4 (Mask2Former, section 3.1)."""
    recompute = False  # in training: what layers keep for backward is made there again

    def __init__(self, in_channels: list[int], channels: int, heads: int, layers: int, feed_forward: int):
        super().__init__()
        res2, *others = in_channels
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, channels, 1), nn.GroupNorm(32, channels)) for inputs in reversed(others))
        self.level_embed = nn.Parameter(torch.randn(3, channels))
        self.layers = nn.ModuleList(DeformableEncoderLayer(channels, heads, feed_forward) for _ in range(layers))
        self.lateral = nn.Sequential(nn.Conv2d(res2, channels, 1, bias=False), nn.GroupNorm(32, channels))
        self.output = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                                    nn.GroupNorm(32, channels), nn.ReLU())
        self.mask_features = nn.Conv2d(channels, channels, 1)
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        for convolution in (self.lateral[0], self.output[0], self.mask_features):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """[res2, res3, res4, res5] -> maps of strides [32, 16, 8] and the FPN map of stride 4, all with C channels.

        Under autocast its products and the deformable attention run in 16 bit (the official code leaves autocast here: its
        operator has no 16 bit); the residual stream stays in float32.
        """
        res2, *others = maps
        dtype = torch.promote_types(res2.dtype, torch.float32)
        sources = [projection(m).to(dtype) for projection, m in zip(self.input_proj, reversed(others))]
        level_shapes = [tuple(source.shape[-2:]) for source in sources]
        position = torch.cat([
            sine_position(*shape, source.shape[1], source).flatten(2).transpose(1, 2) + embed
            for shape, source, embed in zip(level_shapes, sources, self.level_embed)], 1)
        x = torch.cat([source.flatten(2).transpose(1, 2) for source in sources], 1)      # (N, pixels, C)
        for layer in self.layers:
            x = self.run(layer, x, position, level_shapes)
        levels = x.transpose(1, 2).split([height * width for height, width in level_shapes], 2)
        levels = [level.unflatten(2, shape) for level, shape in zip(levels, level_shapes)]
        return levels, self.run(self.join, levels[-1], res2)

    def run(self, part: Callable[..., Tensor], x: Tensor, *others) -> Tensor:
        """part(x, *others), which keeps ten times x for backward, unless that is made again."""
        if self.recompute and x.requires_grad:
            return checkpoint(part, x, *others, use_reentrant=False, preserve_rng_state=False)
        return part(x, *others)

    def join(self, level: Tensor, res2: Tensor) -> Tensor:
        """The FPN step: the finest level, upsampled, and res2 -> (N, C, h, w)."""
        upsampled = F.interpolate(level, size=res2.shape[-2:], mode="bilinear", align_corners=False)
        return self.output(upsampled.add_(self.lateral(res2)))                           # in place: it is large


class FrameDecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward."""

    def __init__(self, channels: int, heads: int, feed_forward: int):
        super().__init__()
        self.cross_attention = CrossAttention(channels, heads)
        self.self_attention = SelfAttention(channels, heads)
        self.feed_forward = FeedForward(channels, feed_forward)

    def forward(self, x: Tensor, position: Tensor, tokens: Tensor, located: Tensor, blocked: Tensor) -> Tensor:
        x = self.cross_attention(x, position, self.cross_attention.read(tokens, located), blocked)
        return self.feed_forward(self.self_attention(x, position))


class FrameDecoder(nn.Module):
    """Mask2Former's decoder: learned queries read the levels in turn, each inside its own last mask (section 3.2)."""

    def __init__(self, num_classes: int, channels: int, queries: int, heads: int, layers: int, feed_forward: int):
        super().__init__()
        self.layers = nn.ModuleList(FrameDecoderLayer(channels, heads, feed_forward) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(channels)
        self.query_feat = nn.Embedding(queries, channels)
        self.query_embed = nn.Embedding(queries, channels)
        self.level_embed = nn.Embedding(3, channels)
        self.class_embed = nn.Linear(channels, num_classes + 1)
        self.mask_embed = MLP(channels, channels)

    def forward(self, levels: list[Tensor], features: Tensor, mask_features: nn.Conv2d) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """levels of strides [32, 16, 8], features (N, C, h, w) -> predictions before and after each layer, queries.

        A prediction is class logits (N, F, K + 1) and kernels (N, F, C + 1) of masks: an embedding of features that have gone through
        `mask_features` is a kernel of those that have not. While not training the last prediction alone.
        """
        tokens = [level.flatten(2).transpose(1, 2) + embed for level, embed in zip(levels, self.level_embed.weight)]
        located = [token + sine_position(*level.shape[-2:], level.shape[1], level).flatten(2).transpose(1, 2)
                   for level, token in zip(levels, tokens)]
        masks = MasksAtLevels(features, [level.shape[-2:] for level in levels])
        x = self.query_feat.weight.expand(len(features), -1, -1)
        normed, kernels = [self.decoder_norm(x)], []
        for index, layer in enumerate(self.layers):
            level = index % len(levels)
            kernels.append(mask_kernel(self.mask_embed(normed[-1]), mask_features))
            blocked = self.blocked_pixels(masks.at(level, kernels[-1]))
            x = layer(x, self.query_embed.weight, tokens[level], located[level], blocked)
            normed.append(self.decoder_norm(x))
        kernels.append(mask_kernel(self.mask_embed(normed[-1]), mask_features))
        first = 0 if self.training else -1
        predictions = [(self.class_embed(x), kernel) for x, kernel in zip(normed[first:], kernels[first:])]
        handed_on = SUPERVISED_LAYERS if self.training else 1
        return predictions, torch.stack(normed[1:][-handed_on:])

    @staticmethod
    @torch.no_grad()
    def blocked_pixels(masks: Tensor) -> Tensor:
        """Where mask logits (N, F, pixels) say background: bool (N, 1, F, pixels), True = may not attend; an all-True row is opened."""
        blocked = masks.sigmoid() < 0.5
        return (blocked & ~blocked.all(-1, keepdim=True))[:, None]


class MasksAtLevels:
    """The masks of kernels, resized to a level.

    Resizing is linear, so in 16 bit the features are resized, once, and no mask of full size is made. In float32 the masks are, as
    upstream: a layer asks which side of 0 a mask lies on, and what lies close to it follows the official code's rounding.
    """

    def __init__(self, features: Tensor, sizes: list[tuple[int, int]]):
        self.features, self.sizes, self.small = features, sizes, None
        if features.dtype in (torch.float16, torch.bfloat16):
            with torch.no_grad():
                self.small = [self.resize(features, size).flatten(2) for size in sizes]

    def at(self, level: int, kernel: Tensor) -> Tensor:
        """Kernels (N, F, C + 1) -> mask logits (N, F, pixels of the level), without a gradient."""
        with torch.no_grad():
            if self.small:
                return mask_logits(kernel, self.small[level])
            return self.resize(mask_logits(kernel, self.features), self.sizes[level]).flatten(2)

    @staticmethod
    def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
