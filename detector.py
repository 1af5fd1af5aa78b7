"""The detector: backbone maps of a frame -> pixel decoder -> frame decoder.

Paper: Mask2Former (arXiv 2112.01527), sections 3.1 and 3.2; Deformable DETR (2010.04159) for the
encoder of the pixel decoder. Upstream: mask2former/modeling/pixel_decoder/msdeformattn.py and
vita/modeling/transformer_decoder/vita_mask2former_transformer_decoder.py. Shape letters are
declared in model.py. Frames are independent: N is a batch of them.
"""

import math

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
    mask_kernel,
    mask_logits,
)

TRACKED_LAYERS = 3  # L in training: the last layers, whose queries the tracker receives


def sine_position(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """Sine position encoding (1, channels, height, width), on the device of `like`.

    The first half of the channels encodes y, the second half x; positions are normalised to
    (0, 2 pi]. The dtype is that of `like`, but at least float32.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    device = like.device
    half = channels // 2
    pair = torch.arange(half, dtype=dtype, device=device).div(2, rounding_mode="floor")
    wavelength = 10000 ** (2 * pair / half)

    def encode(size: int) -> Tensor:  # (size, half): sines and cosines in turn
        position = torch.arange(1, size + 1, dtype=dtype, device=device) / (size + 1e-6)
        phase = (position * (2 * math.pi))[:, None] / wavelength
        sine, cosine = phase[:, 0::2].sin(), phase[:, 1::2].cos()
        return torch.stack((sine, cosine), 2).flatten(1)

    y = encode(height)[:, None].expand(height, width, half)
    x = encode(width)[None].expand(height, width, half)
    position = torch.cat((y, x), 2)  # (height, width, channels)
    return position.permute(2, 0, 1)[None]


def to_tokens(maps: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, h * w, C)."""
    return maps.flatten(2).transpose(1, 2)


def shrink(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, C, h, w) resized bilinearly to 1/2, 1/4 or 1/8: (N, C, *size).

    Bilinear interpolation without antialiasing reads the 2x2 pixels in the middle of each square,
    with equal weights:

        F.interpolate(maps, size=size, mode="bilinear", align_corners=False)

    Speed: pooling takes a tenth of the time of that on a GPU, and half on a CPU.
    """
    factor = maps.shape[-1] // size[-1]
    middle = factor // 2 - 1
    return F.avg_pool2d(maps[..., middle:, middle:], kernel_size=2, stride=factor)


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
    """Deformable encoder over strides 32, 16, 8 and an FPN step to stride 4 (section 3.1)."""

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
        self.level_embed = nn.Parameter(torch.randn(3, channels))
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(channels, heads, feed_forward) for _ in range(layers)
        )
        self.lateral = nn.Sequential(
            nn.Conv2d(res2, channels, 1, bias=False), nn.GroupNorm(32, channels)
        )
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
        dtype = torch.promote_types(res2.dtype, torch.float32)
        tokens, positions, level_shapes = [], [], []
        projections = zip((res5, res4, res3), self.input_proj, self.level_embed)
        for backbone_map, projection, embed in projections:
            projected = projection(backbone_map).to(dtype)
            channels, height, width = projected.shape[1:]
            sine = sine_position(height, width, channels, projected)
            tokens.append(to_tokens(projected))
            positions.append(to_tokens(sine) + embed)
            level_shapes.append((height, width))
        x = torch.cat(tokens, 1)  # (N, pixels, C)
        position = torch.cat(positions, 1)  # added to the queries of attention, not to the values
        for layer in self.layers:
            x = checkpointed(self.recompute, layer, x, position, level_shapes)
        sizes = [height * width for height, width in level_shapes]
        levels = x.transpose(1, 2).split(sizes, 2)  # (N, C, pixels of a level)
        levels = [level.unflatten(2, shape) for level, shape in zip(levels, level_shapes)]
        return levels, checkpointed(self.recompute, self.fpn_step, levels[-1], res2)

    def fpn_step(self, level: Tensor, res2: Tensor) -> Tensor:
        """Add the upsampled level of stride 8 to the projected res2 -> (N, C, h, w)."""
        x = F.interpolate(level, size=res2.shape[-2:], mode="bilinear", align_corners=False)
        x += self.lateral(res2)  # Memory: in place, since it is the largest map of the detector
        return self.output(x)


class FrameDecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward."""

    def __init__(self, channels: int, heads: int, feed_forward: int):
        super().__init__()
        self.cross_attention = CrossAttention(channels, heads)
        self.self_attention = SelfAttention(channels, heads)
        self.feed_forward = FeedForward(channels, feed_forward)

    def forward(
        self, x: Tensor, query_pos: Tensor, context: Tensor, context_pos: Tensor, mask: Tensor
    ) -> Tensor:
        x = self.cross_attention(x, query_pos, context, context_pos, mask)
        x = self.self_attention(x, query_pos)
        return self.feed_forward(x)


class FrameDecoder(nn.Module):
    """Mask2Former's decoder: each layer attends to one level, within a mask (section 3.2)."""

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
        self.query_feat = nn.Embedding(queries, channels)  # queries before the first layer
        self.query_embed = nn.Embedding(queries, channels)  # positions of queries
        self.level_embed = nn.Embedding(3, channels)  # added to keys and values
        self.class_embed = nn.Linear(channels, num_classes + 1)  # class logits
        self.mask_embed = MLP(channels, channels)  # mask embeddings

    def forward(
        self, levels: list[Tensor], features: Tensor, mask_projection: nn.Conv2d
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Decode the queries of N frames.

        levels: of strides [32, 16, 8]. features: the FPN map (N, C, h, w). mask_projection: the
        layer `mask_features` of the pixel decoder, see `mask_kernel`.

        Returns predictions and the frame queries (L, N, F, C) of the last L layers, normed. A
        prediction is class logits (N, F, K + 1) and mask kernels (N, F, C + 1), see `mask_kernel`.
        In training there is one before the first layer and one after each, otherwise only the last.
        """
        inputs = []  # of each level: context, its positions, features for masks, size
        sizes = [tuple(level.shape[-2:]) for level in levels]
        sources = features_for_masks(features, sizes)
        for level, embed, source in zip(levels, self.level_embed.weight, sources):
            channels, height, width = level.shape[1:]
            context = to_tokens(level) + embed
            context_pos = to_tokens(sine_position(height, width, channels, level))
            inputs.append((context, context_pos, source, (height, width)))
        x = self.query_feat.weight.expand(len(features), -1, -1)
        query_pos = self.query_embed.weight
        output, kernel = self.mask_head(x, mask_projection)
        outputs, kernels = [output], [kernel]
        for index, layer in enumerate(self.layers):
            context, context_pos, source, size = inputs[index % len(inputs)]
            mask = attention_mask(kernel, source, size)
            x = layer(x, query_pos, context, context_pos, mask)
            output, kernel = self.mask_head(x, mask_projection)
            outputs.append(output)
            kernels.append(kernel)

        tracked = outputs[1:]  # outputs[0] are the learned queries, the same in every frame
        tracked = tracked[-TRACKED_LAYERS:] if self.training else tracked[-1:]
        if not self.training:
            outputs, kernels = outputs[-1:], kernels[-1:]
        predictions = [
            (self.class_embed(output), kernel) for output, kernel in zip(outputs, kernels)
        ]
        return predictions, torch.stack(tracked)

    def mask_head(self, x: Tensor, mask_projection: nn.Conv2d) -> tuple[Tensor, Tensor]:
        """Queries x (N, F, C) -> normed queries and their mask kernels (N, F, C + 1)."""
        output = self.decoder_norm(x)
        return output, mask_kernel(self.mask_embed(output), mask_projection)


@torch.no_grad()
def features_for_masks(features: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Features (N, C, h, w) from which `attention_mask` computes the masks of each level.

    Upstream resizes masks: resize(e . f), for a mask embedding e and features f. In float32 this
    does the same, so all levels get the features as they are.

    Speed: in 16 bit the features are resized instead, once for all layers. Bilinear resizing is
    linear, so resize(e . f) = e . resize(f) up to rounding.
    """
    if features.dtype in (torch.float16, torch.bfloat16):
        return [shrink(features, size) for size in sizes]
    return [features] * len(sizes)


@torch.no_grad()
def attention_mask(kernel: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
    """Masked attention (section 3.2.1): attend to where the last mask is foreground.

    kernel (N, F, C + 1), features of `features_for_masks` -> bool (N, 1, F, pixels of the level),
    True = must not attend. A query with an empty mask attends everywhere.
    """
    logits = mask_logits(kernel, features)
    if logits.shape[-2:] != size:
        logits = shrink(logits, size)
    # Not logits < 0: as upstream, the sigmoid of a tiny negative logit is 0.5, so foreground.
    background = logits.flatten(2).sigmoid() < 0.5
    is_empty = background.all(-1, keepdim=True)
    return (background & ~is_empty)[:, None]
