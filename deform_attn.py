"""Multi-scale deformable attention: a pixel samples a few learned points of every pyramid level.

Deformable DETR (arXiv 2010.04159, eq. 3); upstream mask2former/modeling/pixel_decoder/ops. Shape
letters are declared in model.py. "pixels" are those of all levels, joined.

`deformable_attention` selects the implementation: a kernel of deform_attn_cuda/ on a GPU (KERNEL),
`attend_in_pytorch` elsewhere. docs/kernel.md explains the kernels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deform_attn_cuda

KERNEL = deform_attn_cuda.tuned  # runs on GPUs; deform_attn_cuda.plain is the one to read
LevelShapes = list[tuple[int, int]]  # (height, width) of each level, in the order of the pixels


class DeformableAttention(nn.Module):
    """Linear projections around `deformable_attention`.

    Each query pixel samples `points` points of every level, in each head. query (N, pixels, C),
    content and position, gives their offsets and weights; value (N, pixels, C) is sampled.
    """

    def __init__(self, channels: int, levels: int = 3, heads: int = 8, points: int = 4):
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels ({channels}) must be divisible by heads ({heads})")
        self.levels = levels
        self.heads = heads
        self.points = points
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head i samples in direction 2 pi i / heads, point p at distance p + 1; equal weights."""
        head = torch.arange(self.heads, dtype=torch.float32)
        angle = head * (2 * math.pi / self.heads)
        direction = torch.stack((angle.cos(), angle.sin()), -1)  # (heads, 2)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # on a square, not a circle
        distance = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = direction[:, None, None] * distance[:, None]  # (heads, 1, points, 2)
        offsets = offsets.expand(-1, self.levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)

    def project(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets and logits of `deformable_attention`."""
        offsets = self.sampling_offsets(query)
        offsets = offsets.unflatten(-1, (self.heads, self.levels, self.points, 2))
        logits = self.attention_weights(query)
        return offsets, logits.unflatten(-1, (self.heads, self.levels * self.points))

    def forward(self, query: Tensor, value: Tensor, level_shapes: LevelShapes) -> Tensor:
        value = self.value_proj(value).unflatten(-1, (self.heads, -1))
        offsets, logits = self.project(query)
        return self.output_proj(deformable_attention(value, level_shapes, offsets, logits))


def deformable_attention(
    value: Tensor, level_shapes: LevelShapes, offsets: Tensor, logits: Tensor
) -> Tensor:
    """Deformable self-attention of a pyramid: query i is pixel i.

    value    (N, pixels, heads, C / heads)
    offsets  (N, pixels, heads, levels, points, 2) from the pixel's centre, as (x, y), in pixels of
             the sampled level
    logits   (N, pixels, heads, levels * points)
    returns  (N, pixels, C)

    The inputs are promoted to one dtype, that of the output. Sums are in float32 or higher.

    Raises ValueError if value and level_shapes differ in the number of pixels.

    KERNEL runs on a GPU, unless it cannot be built or DEFORM_ATTN_CUDA=0. Training with
    torch.use_deterministic_algorithms uses PyTorch: the kernels' backward adds in varying order.
    """
    pixels = sum(height * width for height, width in level_shapes)
    if value.shape[1] != pixels:
        raise ValueError(
            f"value has {value.shape[1]} pixels, the levels {level_shapes} have {pixels}"
        )
    dtype = torch.promote_types(torch.promote_types(value.dtype, offsets.dtype), logits.dtype)
    value, offsets, logits = value.to(dtype), offsets.to(dtype), logits.to(dtype)
    deterministic = torch.is_grad_enabled() and torch.are_deterministic_algorithms_enabled()
    if value.is_cuda and not deterministic and deform_attn_cuda.load():
        sizes = [size for shape in level_shapes for size in shape]
        return KERNEL.forward(value, offsets, logits, sizes)
    return attend_in_pytorch(value, level_shapes, offsets, logits)


def implementation(device: torch.device) -> str:
    """Name of the implementation on this device. Builds the kernel if necessary."""
    if device.type != "cuda" or not deform_attn_cuda.load():
        return "PyTorch path"
    name = "plain CUDA kernel" if KERNEL is deform_attn_cuda.plain else "tuned CUDA kernel"
    if torch.are_deterministic_algorithms_enabled():
        return f"{name}, PyTorch in training"
    return name


def attend_in_pytorch(
    value: Tensor, level_shapes: LevelShapes, offsets: Tensor, logits: Tensor
) -> Tensor:
    """`deformable_attention` in PyTorch, on any device and for any floating-point dtype."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    with torch.autocast(value.device.type, enabled=False):
        locations, weights = sampling_locations(level_shapes, offsets.to(dtype), logits.to(dtype))
        output = weighted_samples(value.to(dtype), level_shapes, locations, weights)
        return output.to(value.dtype)


def sampling_locations(
    level_shapes: LevelShapes, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Where the pixels sample, and with which weights. Arguments as of `deformable_attention`.

    locations  (N, pixels, heads, levels, points, 2) as (x, y): pixel centre / size + offset / size,
               so 0 and 1 are the borders of a level
    weights    (N, pixels, heads, levels, points), softmax over all points of all levels
    """
    sizes = offsets.new_tensor([(width, height) for height, width in level_shapes])
    centres = pixel_centres(level_shapes, offsets)[:, None, None, None]
    locations = centres + offsets / sizes[:, None]
    return locations, logits.softmax(-1).view(offsets.shape[:-1])


def weighted_samples(
    value: Tensor, level_shapes: LevelShapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sum of bilinear samples: sum over levels v and points p of

        weights[v, p] * F.grid_sample(value of level v, 2 * locations[v, p] - 1)

    with align_corners=False and zeros outside. A bilinear sample is a weighted sum of four pixels,
    so all samples of a query are computed as one weighted sum of table rows, F.embedding_bag.

    Speed: the detector is 1.4 times as fast on a CPU as with F.grid_sample. On GPUs, backward is
    deterministic.

    value      (N, pixels, heads, C / heads)
    locations  (N, queries, heads, levels, points, 2) as (x, y)
    weights    (N, queries, heads, levels, points)
    returns    (N, queries, C)
    """
    batch, pixels, heads, head_channels = value.shape
    queries = locations.shape[1]
    indices, shares = [], []  # pixels and their weights, for each level: shapes below
    level_start = 0
    for level, (height, width) in enumerate(level_shapes):
        x, y = locations[:, :, :, level].unbind(-1)  # (N, queries, heads, points)
        columns = neighbours(x * width - 0.5, width)
        rows = neighbours(y * height - 0.5, height)
        corner_pixels, corner_shares = [], []  # of the four neighbours
        for row, row_share in rows:
            row_start = level_start + row * width
            row_share = weights[:, :, :, level] * row_share
            for column, column_share in columns:
                corner_pixels.append(row_start + column)
                corner_shares.append(row_share * column_share)
        # (N, queries, heads, points * 4)
        indices.append(torch.stack(corner_pixels, -1).flatten(3))
        shares.append(torch.stack(corner_shares, -1).flatten(3))
        level_start += height * width
    pixel = torch.cat(indices, -1)  # (N, queries, heads, samples)
    share = torch.cat(shares, -1)

    # The rows of the table are those of value in the order (image, pixel, head).
    table = value.reshape(-1, head_channels)
    image = torch.arange(batch, device=value.device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=value.device).view(-1, 1)
    table_rows = pixel * heads + (image * pixels * heads + head)
    output = F.embedding_bag(
        table_rows.flatten(0, 2), table, per_sample_weights=share.flatten(0, 2), mode="sum"
    )
    return output.view(batch, queries, heads * head_channels)


def neighbours(position: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Both pixels between which positions lie: (index, linear interpolation weight) of each.

    position: in pixels along one axis, 0 = the centre of the first. A pixel outside of 0..size - 1
    has weight 0.
    """
    low = position.detach().floor()
    fraction = position - low
    pairs = []
    for index, weight in ((low, 1 - fraction), (low + 1, fraction)):
        is_inside = (index >= 0) & (index < size)
        index = index.clamp(0, size - 1).long()
        pairs.append((index, weight * is_inside))
    return pairs


def pixel_centres(level_shapes: LevelShapes, like: Tensor) -> Tensor:
    """Centres of the pixels as (x, y) in 0..1: (pixels, 2), dtype and device of `like`."""
    centres = []
    for height, width in level_shapes:
        y = (torch.arange(height, dtype=like.dtype, device=like.device) + 0.5) / height
        x = (torch.arange(width, dtype=like.dtype, device=like.device) + 0.5) / width
        y, x = torch.meshgrid(y, x, indexing="ij")
        centres.append(torch.stack((x, y), -1).flatten(0, 1))
    return torch.cat(centres)
