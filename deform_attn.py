"""Multi-scale deformable attention: each pixel of a feature pyramid gathers a few learned points of every level.

Deformable DETR (arXiv 2010.04159, eq. 3); upstream mask2former/modeling/pixel_decoder/ops. Letters: B frames, S the
pixels of all levels together, Q queries, M heads, D channels of a head, V levels, P points.

`deformable_attention` is what the pixel decoder calls and the one place where an implementation is chosen: the fused kernel
of deform_attn_cuda/ on a GPU, or plain PyTorch (`attend_in_pytorch`), which needs no compiler.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deform_attn_cuda

LevelShapes = list[tuple[int, int]]  # (height, width) of each level, in the order in which their pixels are joined


def deformable_attention(value: Tensor, level_shapes: LevelShapes, offsets: Tensor, logits: Tensor) -> Tensor:
    """Deformable self-attention of a pyramid: query s is pixel s of the joined levels.

    value    (B, S, M, D)
    offsets  (B, S, M, V, P, 2) from the pixel's own centre, in pixels of the level that is read, (x, y)
    logits   (B, S, M, V * P), softmaxed here over all points of all levels
    returns  (B, S, M * D), of the inputs' type; locations, weights and sums are in float32 or better

    Raises ValueError if the levels do not fit. This is the dispatch point: on a GPU the fused kernel of deform_attn_cuda/
    does the work, elsewhere (or where it cannot be built, or DEFORM_ATTN_CUDA=0) `attend_in_pytorch`; so it does in training under
    torch.use_deterministic_algorithms, as the order in which the kernel's backward adds up is left to chance.
    """
    if value.shape[1] != sum(height * width for height, width in level_shapes):
        raise ValueError(f"value holds {value.shape[1]} pixels, the levels {level_shapes} another number")
    dtype = torch.promote_types(torch.promote_types(value.dtype, offsets.dtype), logits.dtype)
    value, offsets, logits = value.to(dtype), offsets.to(dtype), logits.to(dtype)
    if value.is_cuda and deform_attn_cuda.load() and not (torch.is_grad_enabled() and torch.are_deterministic_algorithms_enabled()):
        return torch.ops.deform_attn.forward(value, offsets, logits, [size for shape in level_shapes for size in shape])
    return attend_in_pytorch(value, level_shapes, offsets, logits)


def implementation(device: torch.device) -> str:
    """What `deformable_attention` runs on this device, for people to read; builds the kernel if that has to be done."""
    fused = device.type == "cuda" and deform_attn_cuda.load()
    return "PyTorch path" if not fused else "fused CUDA kernel" + ", PyTorch in training" * torch.are_deterministic_algorithms_enabled()


def attend_in_pytorch(value: Tensor, level_shapes: LevelShapes, offsets: Tensor, logits: Tensor) -> Tensor:
    """`deformable_attention` in plain PyTorch, on any device and in any floating point type."""
    dtype = torch.promote_types(value.dtype, torch.float32)   # a place in an image needs more digits than 16 bit has
    with torch.autocast(value.device.type, enabled=False):
        offsets = offsets.to(dtype)
        weights = logits.to(dtype).softmax(-1).view(offsets.shape[:-1])
        sizes = offsets.new_tensor([(width, height) for height, width in level_shapes])  # (V, 2) as (x, y)
        centres = pixel_centres(level_shapes, offsets)[:, None, None, None]              # (S, 1, 1, 1, 2)
        return sample_points(value.to(dtype), level_shapes, centres + offsets / sizes[:, None], weights).to(value.dtype)


def sample_points(value: Tensor, level_shapes: LevelShapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples, in plain PyTorch; zero outside, align_corners False.

    value      (B, S, M, D)
    locations  (B, Q, M, V, P, 2) as (x, y); 0 and 1 are the outer borders of a level
    weights    (B, Q, M, V, P)
    returns    (B, Q, M * D)

    Every sample is four rows of value, so a query's sum is one of weighted rows: F.embedding_bag, with rows that lie outside
    at weight 0.
    """
    batch, pixels, heads, channels = value.shape
    _, queries, _, levels, points, _ = locations.shape

    def each(numbers: list[int]) -> Tensor:  # a number for each level -> for all M * V * P points of a query
        return locations.new_tensor(numbers).repeat_interleave(points).repeat(heads)

    def neighbours(axis: int, size: Tensor) -> list[tuple[Tensor, Tensor]]:  # index and weight of both, (B, Q, M V P) each
        place = locations[..., axis].flatten(2) * size - 0.5
        low = place.detach().floor()
        share = place - low
        return [(pixel.clamp(min=0).minimum(size - 1), part * ((pixel >= 0) & (pixel < size)))
                for pixel, part in ((low, 1 - share), (low + 1, share))]

    widths, starts = [width for _, width in level_shapes], [0]
    for height, width in level_shapes[:-1]:
        starts.append(starts[-1] + height * width)
    first = torch.arange(batch, device=value.device)[:, None, None] * pixels                # of each video's rows
    head = torch.arange(heads, device=value.device).repeat_interleave(levels * points)
    columns = [(x.long() * heads + head, beside) for x, beside in neighbours(0, each(widths))]
    rows, shares = [], []
    for y, above in neighbours(1, each([height for height, _ in level_shapes])):
        line, above = (first + (y * each(widths) + each(starts)).long()) * heads, weights.flatten(2) * above
        rows += [line + column for column, _ in columns]
        shares += [above * beside for _, beside in columns]
    rows, shares = (torch.stack(parts, -1).view(batch * queries * heads, -1) for parts in (rows, shares))
    out = F.embedding_bag(rows, value.reshape(-1, channels), per_sample_weights=shares, mode="sum")
    return out.view(batch, queries, heads * channels)


def pixel_centres(level_shapes: LevelShapes, like: Tensor) -> Tensor:
    """Centres of all pixels of all levels as (x, y) in 0..1: (S, 2), dtype and device of `like`."""
    centres = []
    for height, width in level_shapes:
        y = (torch.arange(height, dtype=like.dtype, device=like.device) + 0.5) / height
        x = (torch.arange(width, dtype=like.dtype, device=like.device) + 0.5) / width
        centres.append(torch.stack((x.expand(height, width), y[:, None].expand(height, width)), -1).flatten(0, 1))
    return torch.cat(centres)


class DeformableAttention(nn.Module):
    """The attention layer: four linear maps around `deformable_attention`.

    query (B, S, C) decides where to look and how much to weigh (content + position); value (B, S, C) is what is read.
    """

    def __init__(self, channels: int, levels: int = 3, heads: int = 8, points: int = 4):
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels ({channels}) must be divisible by heads ({heads})")
        self.levels, self.heads, self.points = levels, heads, points
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head h starts by looking in direction 2 pi h / heads, point p at p + 1 steps of it; all weights equal."""
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)          # the longer component becomes 1
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        start = direction[:, None, None] * steps[:, None]                       # (heads, 1, points, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(start.expand(-1, self.levels, -1, -1).flatten())
        for parameter in (self.sampling_offsets.weight, self.attention_weights.weight, self.attention_weights.bias,
                          self.value_proj.bias, self.output_proj.bias):
            nn.init.zeros_(parameter)
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.xavier_uniform_(self.output_proj.weight)

    def forward(self, query: Tensor, value: Tensor, level_shapes: LevelShapes) -> Tensor:
        heads, levels, points = self.heads, self.levels, self.points
        value = self.value_proj(value).unflatten(-1, (heads, -1))
        offsets = self.sampling_offsets(query).unflatten(-1, (heads, levels, points, 2))
        logits = self.attention_weights(query).unflatten(-1, (heads, levels * points))
        return self.output_proj(deformable_attention(value, level_shapes, offsets, logits))
