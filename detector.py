"""The detector: backbone maps of a frame -> pixel decoder -> frame decoder.

Paper: Mask2Former (arXiv 2112.01527), sections 3.2 and 4.1; Deformable DETR (2010.04159) for the
encoder of the pixel decoder. Upstream: mask2former/modeling/pixel_decoder/msdeformattn.py and
vita/modeling/transformer_decoder/vita_mask2former_transformer_decoder.py. Shape letters are
declared in model.py. Frames are independent: N is a batch of them.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone import checkpointed
from deform_attn import DeformableAttention
from transformer import (
    MLP,
    CrossAttention,
    FeedForward,
    ResidualNorm,
    SelfAttention,
    full_precision,
    mask_kernel,
    mask_logits,
)

TRACKED_LAYERS = 3  # L in training: the last layers, whose queries the tracker receives


@dataclass
class FrameOutput:
    """What the detector (backbone, pixel decoder, frame decoder) predicts for N frames."""

    # Class logits (N, F, K + 1) and mask kernels (N, F, C + 1), before the first layer of the frame
    # decoder and after each; outside of training after the last only.
    predictions: list[tuple[Tensor, Tensor]]
    queries: Tensor  # (L, N, F, C) after decoder_norm
    features: Tensor  # (N, C, h, w) of the pixel decoder: mask logits are kernels applied to them


class SinePosition(nn.Module):
    """Sine position encoding: the first half of the channels encodes y, the second half x.

    Positions are normalised to (0, 2 pi]. Speed: a module, like `UpsampleAdd` and `AttentionMask`,
    so that fast/ can replace it.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, C, h, w) -> their positions (1, C, h, w), in their dtype, at least float32."""
        channels, height, width = maps.shape[1:]
        dtype = torch.promote_types(maps.dtype, torch.float32)
        half = channels // 2
        pair = torch.arange(half, dtype=dtype, device=maps.device).div(2, rounding_mode="floor")
        wavelength = 10000 ** (2 * pair / half)
        y = self.encode(height, wavelength)[:, None].expand(height, width, half)
        x = self.encode(width, wavelength)[None].expand(height, width, half)
        position = torch.cat((y, x), 2)  # (h, w, C)
        return position.permute(2, 0, 1)[None]

    @staticmethod
    def encode(size: int, wavelength: Tensor) -> Tensor:
        """Positions along one side: (size, C / 2), sines and cosines in turn."""
        position = torch.arange(1, size + 1, dtype=wavelength.dtype, device=wavelength.device)
        position = position / (size + 1e-6) * (2 * math.pi)
        phase = position[:, None] / wavelength
        sine, cosine = phase[:, 0::2].sin(), phase[:, 1::2].cos()
        return torch.stack((sine, cosine), 2).flatten(1)


def to_tokens(maps: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, h * w, C)."""
    return maps.flatten(2).transpose(1, 2)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resizing of maps (N, C, h, w) without antialiasing: (N, C, *size)."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class UpsampleAdd(nn.Module):
    """Step of a feature pyramid network: a level, resized, plus the map of the next finer level."""

    def forward(self, level: Tensor, lateral: Tensor) -> Tensor:
        """level (N, C, h', w') and lateral (N, C, h, w) -> (N, C, h, w)."""
        x = resize(level, lateral.shape[-2:])
        x += lateral  # Memory: in place, since it is the largest map of the detector
        return x


class DeformableEncoderLayer(nn.Module):
    """Post-norm encoder layer over the pixels of all levels, joined."""

    def __init__(self, channels: int, heads: int, feed_forward: int):
        super().__init__()
        self.attention = DeformableAttention(channels, levels=3, heads=heads)
        self.norm = ResidualNorm(channels)
        self.feed_forward = FeedForward(channels, feed_forward)

    def forward(self, x: Tensor, position: Tensor, level_shapes: list[tuple[int, int]]) -> Tensor:
        attended = self.attention(x + position, x, level_shapes)
        x = self.norm(x, attended)
        return self.feed_forward(x)


class PixelDecoder(nn.Module):
    """Deformable encoder over strides 32, 16, 8 and an FPN step to stride 4 (section 4.1)."""

    recompute = False  # Memory: recompute activations in backward

    def __init__(
        self, in_channels: list[int], channels: int, heads: int, layers: int, feed_forward: int
    ):
        super().__init__()
        res2, *others = in_channels
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, channels, 1), nn.GroupNorm(32, channels))
            for inputs in reversed(others)
        )
        self.sine_position = SinePosition()
        self.level_embed = nn.Parameter(torch.randn(3, channels))
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(channels, heads, feed_forward) for _ in range(layers)
        )
        self.lateral = nn.Sequential(
            nn.Conv2d(res2, channels, 1, bias=False), nn.GroupNorm(32, channels)
        )
        self.upsample_add = UpsampleAdd()
        self.output = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(32, channels),
            nn.ReLU(),
        )
        # A layer, never called, named as in checkpoints: `mask_kernel` reads its W and b.
        self.mask_features = nn.Conv2d(channels, channels, 1)
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        for convolution in (self.lateral[0], self.output[0], self.mask_features):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Maps [res2, res3, res4, res5] -> levels of strides [32, 16, 8] and the FPN map, stride 4.

        All outputs have C channels. Under autocast, linear layers and deformable attention run in
        16 bit and the residual stream stays in float32. (Upstream disables autocast here.)
        """
        res2, res3, res4, res5 = maps
        tokens, positions, level_shapes = [], [], []
        projections = zip((res5, res4, res3), self.input_proj, self.level_embed)
        for backbone_map, projection, embed in projections:
            projected = full_precision(projection(backbone_map))
            tokens.append(to_tokens(projected))
            positions.append(to_tokens(self.sine_position(projected)) + embed)
            level_shapes.append(tuple(projected.shape[-2:]))
        x = torch.cat(tokens, 1)  # (N, pixels, C)
        position = torch.cat(positions, 1)  # added to the queries of attention, not to the values
        for layer in self.layers:
            x = checkpointed(self.recompute, layer, x, position, level_shapes)
        sizes = [height * width for height, width in level_shapes]
        levels = [
            level.unflatten(1, shape).permute(0, 3, 1, 2)  # (N, C, h, w)
            for level, shape in zip(x.split(sizes, 1), level_shapes)
        ]
        return levels, checkpointed(self.recompute, self.fpn_step, levels[-1], res2)

    def fpn_step(self, level: Tensor, res2: Tensor) -> Tensor:
        """Add the upsampled level of stride 8 to the projected res2 -> (N, C, h, w)."""
        x = self.upsample_add(level, self.lateral(res2))
        return self.output(x)


class AttentionMask(nn.Module):
    """The mask of masked attention (section 3.2.1): attend inside the previous layer's mask."""

    @torch.no_grad()
    def forward(self, kernel: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
        """kernel (N, F, C + 1), features of `features_for_masks` -> bool (N, 1, F, pixels).

        True = must not attend. pixels are those of the level, of `size`.
        """
        logits = mask_logits(kernel, features)
        if logits.shape[-2:] != size:
            logits = resize(logits, size)
        return self.block_background(logits.flatten(2))

    def block_background(self, logits: Tensor) -> Tensor:
        """Mask logits (N, F, pixels) -> mask for `Attention` (N, 1, F, pixels).

        A query with an empty mask attends everywhere.
        """
        # Not logits < 0: as upstream, the sigmoid of a tiny negative logit is 0.5, so foreground.
        background = logits.sigmoid() < 0.5
        is_empty = background.all(-1, keepdim=True)
        return (background & ~is_empty)[:, None]


@torch.no_grad()
def features_for_masks(features: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Features (N, C, h, w) from which `AttentionMask` computes the masks of each level.

    Upstream resizes masks: resize(e . f), for a mask embedding e and features f. In float32 this
    does the same, so all levels get the features as they are.

    Speed: in 16 bit the features are resized instead, once for all layers. Bilinear resizing is
    linear, so resize(e . f) = e . resize(f) up to rounding.
    """
    if features.dtype not in (torch.float16, torch.bfloat16):
        return [features] * len(sizes)
    features = features.contiguous(memory_format=torch.channels_last)  # Speed: for GPUs
    return [resize(features, size) for size in sizes]


class FrameDecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward."""

    def __init__(self, channels: int, heads: int, feed_forward: int):
        super().__init__()
        self.cross_attention = CrossAttention(channels, heads)
        self.self_attention = SelfAttention(channels, heads)
        self.feed_forward = FeedForward(channels, feed_forward)

    def forward(
        self, x: Tensor, query_pos: Tensor, key: Tensor, value: Tensor, mask: Tensor
    ) -> Tensor:
        x = self.cross_attention(x, query_pos, key, value, mask)
        x = self.self_attention(x, query_pos)
        return self.feed_forward(x)


class FrameDecoder(nn.Module):
    """Mask2Former's decoder: layers attend to the levels in turn, within masks (section 3.2)."""

    def __init__(
        self,
        num_classes: int,
        channels: int,
        queries: int,
        heads: int,
        layers: int,
        feed_forward: int,
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            FrameDecoderLayer(channels, heads, feed_forward) for _ in range(layers)
        )
        self.decoder_norm = nn.LayerNorm(channels)
        self.sine_position = SinePosition()
        self.attention_mask = AttentionMask()
        self.query_feat = nn.Embedding(queries, channels)  # queries before the first layer
        self.query_embed = nn.Embedding(queries, channels)  # positions of queries
        self.level_embed = nn.Embedding(3, channels)  # added to keys and values
        self.class_embed = nn.Linear(channels, num_classes + 1)  # class logits
        self.mask_embed = MLP(channels)  # mask embeddings

    def forward(
        self, levels: list[Tensor], features: Tensor, mask_projection: nn.Conv2d
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Decode the queries of N frames.

        levels: of strides [32, 16, 8]. features: the FPN map (N, C, h, w). mask_projection: the
        layer `mask_features` of the pixel decoder, see `mask_kernel`.

        Returns `predictions` and `queries` of FrameOutput.
        """
        sizes = [tuple(level.shape[-2:]) for level in levels]
        mask_inputs = features_for_masks(features, sizes)
        values = [to_tokens(level) + embed for level, embed in zip(levels, self.level_embed.weight)]
        keys = [x + to_tokens(self.sine_position(level)) for x, level in zip(values, levels)]
        x = self.query_feat.weight.expand(len(features), -1, -1)
        query_pos = self.query_embed.weight
        output, kernel = self.mask_head(x, mask_projection)
        outputs, kernels = [output], [kernel]
        for index, layer in enumerate(self.layers):
            level = index % len(levels)  # strides 32, 16, 8, 32, ...
            mask = self.attention_mask(kernel, mask_inputs[level], sizes[level])
            x = layer(x, query_pos, keys[level], values[level], mask)
            output, kernel = self.mask_head(x, mask_projection)
            outputs.append(output)
            kernels.append(kernel)

        # outputs[0] are the learned queries, the same in every frame: they are not tracked.
        tracked = outputs[1:][-TRACKED_LAYERS:]
        if not self.training:
            tracked, outputs, kernels = tracked[-1:], outputs[-1:], kernels[-1:]
        predictions = [
            (self.class_embed(output), kernel) for output, kernel in zip(outputs, kernels)
        ]
        return predictions, torch.stack(tracked)

    def mask_head(self, x: Tensor, mask_projection: nn.Conv2d) -> tuple[Tensor, Tensor]:
        """Queries x (N, F, C) -> normed queries and their mask kernels (N, F, C + 1)."""
        output = self.decoder_norm(x)
        return output, mask_kernel(self.mask_embed(output), mask_projection)
