"""Triton kernels of fast/: norms, upsampling, sampling, window attention, masks of attention, sums.

fused_modules.py, fused_masks.py and fused_sampling.py call them. Each computes in float32. Sums are
not added atomically, so results are deterministic. Tests: tests/test_triton_kernels.py,
tests/test_gpu.py.
"""

import warnings
from functools import cache

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch brings Triton for NVIDIA GPUs on Linux only
    triton = None


@cache
def triton_works() -> bool:
    """Whether Triton can compile a kernel, which takes a C compiler. If not, a warning says why."""
    if triton is None or not torch.cuda.is_available():
        return False
    logits = torch.zeros(1, 16, device="cuda")
    sums, areas = torch.zeros_like(logits), torch.zeros_like(logits)
    try:
        mask_sums_kernel[(1, 1)](logits, sums, areas, 16, 16)
    except Exception as error:  # of Triton, of the C compiler, of ptxas; the warning says which
        warnings.warn(f"kernels are not fused, because Triton fails: {error}", stacklevel=3)
        return False
    return True


if triton:

    @triton.jit
    def layer_norm_kernel(
        x,
        branch,
        weight,
        bias,
        output,
        copy,
        rows,
        eps,
        C: tl.constexpr,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        HAS_BRANCH: tl.constexpr,
        HAS_COPY: tl.constexpr,
    ):
        """output (rows, C) = copy = layer_norm(x + branch), for ROWS rows. WIDTH >= C."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        channel = tl.arange(0, WIDTH)[None]
        is_channel = channel < C
        inside = (row < rows) & is_channel
        at = row.to(tl.int64) * C + channel
        value = tl.load(x + at, inside, 0).to(tl.float32)
        if HAS_BRANCH:
            value += tl.load(branch + at, inside, 0).to(tl.float32)
        value -= tl.sum(value, 1, keep_dims=True) / C
        value = tl.where(is_channel, value, 0)
        variance = tl.sum(value * value, 1, keep_dims=True) / C
        value *= tl.rsqrt(variance + eps)
        value *= tl.load(weight + channel, is_channel, 0)
        value += tl.load(bias + channel, is_channel, 0)
        tl.store(output + at, value, inside)
        if HAS_COPY:
            tl.store(copy + at, value, inside)

    @triton.jit
    def group_sums_kernel(
        x,
        sums,
        pixels,
        tiles,
        C: tl.constexpr,
        GROUPS: tl.constexpr,
        TILE: tl.constexpr,
    ):
        """Sum and sum of squares of each group of x (N, pixels, C), over some tiles of pixels.

        sums: (N, blocks, 2, GROUPS).
        """
        block, image, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
        total = tl.zeros((GROUPS,), tl.float32)
        squares = tl.zeros((GROUPS,), tl.float32)
        channel = tl.arange(0, C)[None]
        for tile in range(tiles):
            pixel = (block * tiles + tile) * TILE + tl.arange(0, TILE)[:, None]
            at = (image.to(tl.int64) * pixels + pixel) * C + channel
            value = tl.load(x + at, pixel < pixels, 0).to(tl.float32)
            total += tl.sum(tl.reshape(tl.sum(value, 0), (GROUPS, C // GROUPS)), 1)
            squares += tl.sum(tl.reshape(tl.sum(value * value, 0), (GROUPS, C // GROUPS)), 1)
        first = sums + (image * blocks + block) * 2 * GROUPS + tl.arange(0, GROUPS)
        tl.store(first, total)
        tl.store(first + GROUPS, squares)

    @triton.jit
    def group_norm_kernel(
        x,
        sums,
        weight,
        bias,
        output,
        pixels,
        tiles,
        eps,
        C: tl.constexpr,
        GROUPS: tl.constexpr,
        TILE: tl.constexpr,
        BLOCKS: tl.constexpr,
        RELU: tl.constexpr,
    ):
        """output (N, pixels, C) = group_norm(x), and ReLU, for some tiles of pixels."""
        image, blocks = tl.program_id(1), tl.num_programs(0)
        block = tl.arange(0, BLOCKS)[:, None]
        group = tl.arange(0, GROUPS)[None]
        channel = tl.arange(0, C)[None]
        first = sums + (image * blocks + block) * 2 * GROUPS + group
        count = pixels * (C // GROUPS)
        mean = tl.sum(tl.load(first, block < blocks, 0), 0) / count  # (GROUPS,)
        squares = tl.sum(tl.load(first + GROUPS, block < blocks, 0), 0) / count
        scale = tl.rsqrt(tl.maximum(squares - mean * mean, 0) + eps)  # rounded below 0
        # From groups to channels: (1, C).
        each: tl.constexpr = C // GROUPS
        mean = tl.reshape(tl.broadcast_to(mean[:, None], (GROUPS, each)), (1, C))
        scale = tl.reshape(tl.broadcast_to(scale[:, None], (GROUPS, each)), (1, C))
        scale *= tl.load(weight + channel)
        shift = tl.load(bias + channel) - mean * scale
        for tile in range(tiles):
            pixel = (tl.program_id(0) * tiles + tile) * TILE + tl.arange(0, TILE)[:, None]
            at = (image.to(tl.int64) * pixels + pixel) * C + channel
            value = tl.load(x + at, pixel < pixels, 0).to(tl.float32) * scale + shift
            if RELU:
                value = tl.maximum(value, 0)
            tl.store(output + at, value, pixel < pixels)

    @triton.jit
    def mask_sums_kernel(logits, sums, areas, pixels, BLOCK: tl.constexpr):
        """Sum of the probabilities above 0.5, and their number, in a block of pixels of a mask.

        logits: (masks, pixels). sums and areas: (masks, blocks).
        """
        mask, block, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
        pixel = block * BLOCK + tl.arange(0, BLOCK)
        logit = tl.load(logits + mask.to(tl.int64) * pixels + pixel, pixel < pixels, float("-inf"))
        probability = tl.sigmoid(logit.to(tl.float32))
        # NaN is kept in the sum, so that it is noticed.
        total = tl.sum(tl.where(probability <= 0.5, 0, probability), 0)
        tl.store(sums + mask * blocks + block, total)
        tl.store(areas + mask * blocks + block, tl.sum((probability > 0.5).to(tl.int32), 0))

    @triton.jit
    def sample_features_kernel(
        features,
        points,
        output,
        channels,
        height,
        width,
        count,
        frame_stride,
        channel_stride,
        row_stride,
        column_stride,
        POINTS: tl.constexpr,
        CHANNELS: tl.constexpr,
    ):
        """output (T, C + 1, P): features (T, C, h, w) and ones, at points (T, P, 2) in 0..1.

        The bilinear mean of four pixels. Those outside are 0.
        """
        frame = tl.program_id(2).to(tl.int64)
        point = tl.program_id(0) * POINTS + tl.arange(0, POINTS)[None]
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
        is_point, is_channel = point < count, channel < channels
        points += (frame * count + point) * 2
        x = tl.load(points, is_point, 0) * width - 0.5
        y = tl.load(points + 1, is_point, 0) * height - 0.5
        left, top = tl.floor(x), tl.floor(y)
        value = tl.zeros((CHANNELS, POINTS), tl.float32)
        ones = tl.zeros((1, POINTS), tl.float32)
        for corner in tl.static_range(4):
            right, below = corner % 2, corner // 2
            weight_x = x - left if right else left + 1 - x
            weight_y = y - top if below else top + 1 - y
            column, row = left.to(tl.int32) + right, top.to(tl.int32) + below
            inside = is_point & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            weight = tl.where(inside, weight_x * weight_y, 0)
            at = frame * frame_stride + row * row_stride + column * column_stride
            pixel = tl.load(features + at + channel * channel_stride, inside & is_channel, 0)
            value += weight * pixel.to(tl.float32)
            ones += weight
        output += frame * (channels + 1) * count + point
        tl.store(output + channel * count, value, is_point & is_channel)
        if tl.program_id(1) == 0:
            tl.store(output + channels * count, ones, is_point)

    @triton.jit
    def upsample_add_kernel(
        level,
        lateral,
        output,
        image_stride,
        height,
        width,
        C: tl.constexpr,
        TILE: tl.constexpr,
    ):
        """output (N, 2 height, 2 width, C) = level, doubled bilinearly, + lateral.

        level: (N, height, width, C), its images image_stride apart. An output pixel lies 1/4 of a
        pixel beside the centre of a pixel of the level: it has 3/4 of that one and 1/4 of the next.
        """
        column = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
        row, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
        channel = tl.arange(0, C)[None]
        inside = column < 2 * width
        near_column, near_row = column // 2, row // 2
        # The next one is to the left of even pixels, to the right of odd ones; none at the border.
        far_column = near_column + (column % 2) * 2 - 1
        far_column = tl.minimum(tl.maximum(far_column, 0), width - 1)
        far_row = tl.minimum(tl.maximum(near_row + (row % 2) * 2 - 1, 0), height - 1)
        first = level + image * image_stride + channel
        near_line, far_line = first + near_row * width * C, first + far_row * width * C
        value = 0.5625 * tl.load(near_line + near_column * C, inside, 0).to(tl.float32)
        value += 0.1875 * tl.load(near_line + far_column * C, inside, 0)
        value += 0.1875 * tl.load(far_line + near_column * C, inside, 0)
        value += 0.0625 * tl.load(far_line + far_column * C, inside, 0)
        at = ((image * 2 * height + row) * 2 * width + column) * C + channel
        value += tl.load(lateral + at, inside, 0)
        tl.store(output + at, value, inside)

    @triton.jit
    def block_background_kernel(logits, mask, pixels, PIXELS: tl.constexpr):
        """mask (rows, pixels): -inf where a mask is background, 0 elsewhere or if it is empty."""
        first = tl.program_id(0).to(tl.int64) * pixels
        area = 0
        for start in range(0, pixels, PIXELS):
            pixel = start + tl.arange(0, PIXELS)
            logit = tl.load(logits + first + pixel, pixel < pixels, float("-inf"))
            # Rounded like a probability in 16 bit: a tiny negative logit is foreground.
            probability = tl.sigmoid(logit.to(tl.float32)).to(logit.dtype)
            area += tl.sum((probability >= 0.5).to(tl.int32), 0)
        for start in range(0, pixels, PIXELS):
            pixel = start + tl.arange(0, PIXELS)
            logit = tl.load(logits + first + pixel, pixel < pixels, float("-inf"))
            probability = tl.sigmoid(logit.to(tl.float32)).to(logit.dtype)
            blocked = (probability < 0.5) & (area > 0)
            tl.store(mask + first + pixel, tl.where(blocked, float("-inf"), 0.0), pixel < pixels)

    @triton.jit
    def locate_tokens(token, row, column, height, width, rows, columns, WINDOW, SHIFT):
        """Tokens of a window -> their pixels, whether these exist, and their zones.

        The map is padded to (rows, columns), and shifted. row, column: where the window begins.
        Tokens of a window in different zones were not neighbours before the shift.
        """
        row, column = row + token // WINDOW, column + token % WINDOW
        row_zone = (row >= rows - WINDOW).to(tl.int32) + (row >= rows - SHIFT).to(tl.int32)
        column_zone = (column >= columns - WINDOW).to(tl.int32)
        column_zone += (column >= columns - SHIFT).to(tl.int32)
        row, column = (row + SHIFT) % rows, (column + SHIFT) % columns
        exists = (row < height) & (column < width) & (token < WINDOW * WINDOW)
        return row * width + column, exists, 3 * row_zone + column_zone

    @triton.jit
    def load_tokens(qkv, qkv_bias, pixel, exists, first, C: tl.constexpr, D: tl.constexpr):
        """D channels of tokens, from `first`. Padding is 0, so its projection is the bias."""
        channel = first + tl.arange(0, D)[None]
        padding = tl.load(qkv_bias + channel)
        value = tl.load(qkv + pixel[:, None] * (3 * C) + channel, exists[:, None], 0)
        return tl.where(exists[:, None], value, padding)

    @triton.jit
    def attend_to_keys(
        q,
        query,
        query_zone,
        highest,
        total,
        value,
        first_key,
        qkv,
        qkv_bias,
        bias,
        row,
        column,
        height,
        width,
        rows,
        columns,
        head,
        scale,
        C: tl.constexpr,
        D: tl.constexpr,
        WINDOW: tl.constexpr,
        SHIFT: tl.constexpr,
        KEYS: tl.constexpr,
    ):
        """A step of flash attention: KEYS tokens, from first_key, join the sums of the softmax."""
        TOKENS: tl.constexpr = WINDOW * WINDOW
        key = first_key + tl.arange(0, KEYS)
        pixel, exists, zone = locate_tokens(
            key, row, column, height, width, rows, columns, WINDOW, SHIFT
        )
        k = load_tokens(qkv, qkv_bias, pixel, exists, C + head * D, C, D)
        v = load_tokens(qkv, qkv_bias, pixel, exists, 2 * C + head * D, C, D)
        inside = (query < TOKENS)[:, None] & (key < TOKENS)[None]
        logits = tl.dot(q, tl.trans(k)) * scale
        logits += tl.load(bias + query[:, None] * TOKENS + key[None], inside, 0)
        if SHIFT > 0:
            logits = tl.where(query_zone[:, None] != zone[None], logits - 100, logits)
        logits = tl.where((key < TOKENS)[None], logits, float("-inf"))
        # Sums so far are rescaled when the maximum rises.
        before, highest = highest, tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp(logits - highest[:, None])
        rescale = tl.exp(before - highest)
        total = total * rescale + tl.sum(weights, 1)
        value = value * rescale[:, None] + tl.dot(weights.to(v.dtype), v)
        return highest, total, value

    @triton.jit
    def window_attention_kernel(
        qkv,
        qkv_bias,
        bias,
        output,
        height,
        width,
        windows_y,
        windows_x,
        scale,
        C: tl.constexpr,
        D: tl.constexpr,
        WINDOW: tl.constexpr,
        SHIFT: tl.constexpr,
        TILE: tl.constexpr,
        REST: tl.constexpr,
    ):
        """Shifted window attention, for a tile of the queries of a window, in one head.

        qkv (N, height, width, 3 C) is projected; so is 0, to qkv_bias. bias (heads, T, T), for
        T = WINDOW^2 tokens. output (N, height, width, C). REST: a power of 2, at least the keys
        that remain after whole tiles, or 0.
        """
        TOKENS: tl.constexpr = WINDOW * WINDOW
        TILES: tl.constexpr = (TOKENS + TILE - 1) // TILE
        IN_TILES: tl.constexpr = TOKENS // TILE * TILE
        window, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
        head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
        row, column = window // windows_x * WINDOW, window % windows_x * WINDOW
        rows, columns = windows_y * WINDOW, windows_x * WINDOW
        qkv += image * height * width * 3 * C
        output += image * height * width * C
        bias += head * TOKENS * TOKENS

        query = tile * TILE + tl.arange(0, TILE)
        pixel, exists, zone = locate_tokens(
            query, row, column, height, width, rows, columns, WINDOW, SHIFT
        )
        q = load_tokens(qkv, qkv_bias, pixel, exists, head * D, C, D)
        highest = tl.full((TILE,), float("-inf"), tl.float32)
        total = tl.zeros((TILE,), tl.float32)
        value = tl.zeros((TILE, D), tl.float32)
        for key in range(0, IN_TILES, TILE):
            highest, total, value = attend_to_keys(
                q, query, zone, highest, total, value, key, qkv, qkv_bias, bias,
                row, column, height, width, rows, columns, head, scale, C, D, WINDOW, SHIFT, TILE,
            )  # fmt: skip
        if REST > 0:
            highest, total, value = attend_to_keys(
                q, query, zone, highest, total, value, IN_TILES, qkv, qkv_bias, bias,
                row, column, height, width, rows, columns, head, scale, C, D, WINDOW, SHIFT, REST,
            )  # fmt: skip
        at = pixel[:, None] * C + head * D + tl.arange(0, D)[None]
        tl.store(output + at, value / total[:, None], exists[:, None])
