"""A plain reference of the whole model: frame by frame, head by head, from a state dict.

Tests compare with it in float64. It imports nothing from the model and shares only the names of
the weights. Equations: Mask2Former (2112.01527), Deformable DETR (2010.04159), VITA (2206.04403),
GenVIS (2211.08834), GRAtt-VIS (2305.17096). Shape letters as in model.py, without the batch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
TEMPERATURE = 0.66667


class Weights:
    """The entries of a state dict whose names begin with a prefix."""

    def __init__(self, state: dict[str, Tensor], prefix: str = ""):
        self.state, self.prefix = state, prefix

    def __getattr__(self, name: str) -> "Weights | Tensor":
        """weights.norm is what follows "norm."; weights.weight is a tensor."""
        return self[name]

    def __getitem__(self, name: str | int) -> "Weights | Tensor":
        full = f"{self.prefix}{name}"
        return self.state[full] if full in self.state else Weights(self.state, f"{full}.")

    def __contains__(self, name: str) -> bool:
        return any(entry.startswith(f"{self.prefix}{name}.") for entry in self.state)

    def each(self) -> "list[Weights]":
        """Those of the modules 0, 1, ... of a list."""
        found = []
        while str(len(found)) in self:
            found.append(self[len(found)])
        return found

    def linear(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias

    def layer_norm(self, x: Tensor) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * self.weight + self.bias

    def group_norm(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.weight, self.bias)

    def mlp(self, x: Tensor) -> Tensor:
        return self[4].linear(self[2].linear(self[0].linear(x).clamp(min=0)).clamp(min=0))


# Blocks


def attention(
    weights: Weights,
    heads: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | float = 0.0,
) -> Tensor:
    """query (Q, C), key and value (S, C); bias (Q, S) is added to the logits of every head."""
    (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias) = (
        part.chunk(3) for part in (weights.in_proj_weight, weights.in_proj_bias)
    )
    q, k, v = query @ q_weight.T + q_bias, key @ k_weight.T + k_bias, value @ v_weight.T + v_bias
    size, outputs = q.shape[1] // heads, []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        logits = q[:, part] @ k[:, part].T / math.sqrt(size) + bias
        outputs.append(logits.softmax(1) @ v[:, part])
    return weights.out_proj.linear(torch.cat(outputs, 1))


def feed_forward(weights: Weights, x: Tensor) -> Tensor:
    hidden = weights.linear1.linear(x).clamp(min=0)
    return weights.norm.layer_norm(x + weights.linear2.linear(hidden))


def self_attention(
    weights: Weights,
    heads: int,
    x: Tensor,
    position: Tensor | float = 0.0,
    bias: Tensor | float = 0.0,
) -> Tensor:
    query = x + position
    return weights.norm.layer_norm(x + attention(weights.attention, heads, query, query, x, bias))


def cross_attention(
    weights: Weights,
    heads: int,
    x: Tensor,
    position: Tensor,
    tokens: Tensor,
    token_position: Tensor,
    bias: Tensor | float = 0.0,
) -> Tensor:
    query, key = x + position, tokens + token_position
    attended = attention(weights.attention, heads, query, key, tokens, bias)
    return weights.norm.layer_norm(x + attended)


def sine_position(height: int, width: int, channels: int) -> Tensor:
    """(C, height, width): y in the first half of the channels, x in the second."""
    position, half = torch.zeros(channels, height, width), channels // 2
    for channel in range(half):
        wave = math.cos if channel % 2 else math.sin
        wavelength = 10000 ** (2 * (channel // 2) / half)
        for y in range(height):
            place = (y + 1) / (height + 1e-6)
            position[channel, y] = wave(2 * math.pi * place / wavelength)
        for x in range(width):
            place = (x + 1) / (width + 1e-6)
            position[half + channel, :, x] = wave(2 * math.pi * place / wavelength)
    return position


def to_pixels(level: Tensor) -> Tensor:
    """(C, h, w) -> (h w, C)."""
    return level.flatten(1).T


def resize(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, h, w) -> (N, *size), bilinear."""
    return F.interpolate(masks[None], size, mode="bilinear", align_corners=False)[0]


# Detector


def prepare(frame: Tensor) -> Tensor:
    """uint8 (3, H, W) -> normalised, zeros at the right and below up to multiples of 32."""
    height, width = frame.shape[1:]
    image = torch.zeros(3, -(-height // 32) * 32, -(-width // 32) * 32)
    for channel in range(3):
        image[channel, :height, :width] = (frame[channel] - MEAN[channel]) / STD[channel]
    return image


def deformable_attention(
    weights: Weights, heads: int, query: Tensor, value: Tensor, shapes: list[tuple[int, int]]
) -> Tensor:
    """query and value (S, C), of the pixels of all levels; four points a head and level."""
    value = weights.value_proj.linear(value).unflatten(1, (heads, -1))  # (S, heads, C / heads)
    offsets = weights.sampling_offsets.linear(query).unflatten(1, (heads, len(shapes), 4, 2))
    shares = weights.attention_weights.linear(query).unflatten(1, (heads, -1)).softmax(-1)
    shares = shares.unflatten(2, (len(shapes), 4))
    centres = torch.tensor(
        [
            ((x + 0.5) / width, (y + 0.5) / height)
            for height, width in shapes
            for y in range(height)
            for x in range(width)
        ]
    )  # (S, 2)
    outputs = []
    for head in range(heads):
        total, first = 0, 0
        for level, (height, width) in enumerate(shapes):
            pixels = value[first : first + height * width, head].T.unflatten(1, (height, width))
            first += height * width
            places = centres[:, None] + offsets[:, head, level] / torch.tensor([width, height])
            # (C / heads, S, 4)
            sampled = F.grid_sample(pixels[None], (2 * places - 1)[None], align_corners=False)[0]
            total = total + (sampled * shares[:, head, level]).sum(-1).T
        outputs.append(total)
    return weights.output_proj.linear(torch.cat(outputs, 1))


def pixel_decoder(weights: Weights, heads: int, maps: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The backbone's maps res2..res5 of a frame -> maps of strides 32, 16, 8; the FPN map."""
    res2, *others = maps
    sources = []
    for projection, level in zip(weights.input_proj.each(), reversed(others), strict=True):
        projected = F.conv2d(level[None], projection[0].weight, projection[0].bias)
        sources.append(projection[1].group_norm(projected)[0])
    shapes = [tuple(source.shape[1:]) for source in sources]
    x = torch.cat([to_pixels(source) for source in sources])
    position = torch.cat(
        [
            to_pixels(sine_position(*shape, x.shape[1])) + embed
            for shape, embed in zip(shapes, weights.level_embed, strict=True)
        ]
    )
    for layer in weights.layers.each():
        attended = deformable_attention(layer.attention, heads, x + position, x, shapes)
        x = feed_forward(layer.feed_forward, layer.norm.layer_norm(x + attended))
    levels = x.split([height * width for height, width in shapes])
    levels = [level.T.unflatten(1, shape) for level, shape in zip(levels, shapes)]
    finest = F.interpolate(levels[-1][None], res2.shape[1:], mode="bilinear", align_corners=False)
    lateral = weights.lateral[1].group_norm(F.conv2d(res2[None], weights.lateral[0].weight))
    fpn = F.conv2d(finest + lateral, weights.output[0].weight, padding=1)
    return levels, weights.output[1].group_norm(fpn).clamp(min=0)[0]


def frame_decoder(
    weights: Weights, heads: int, levels: list[Tensor], mask_features: Tensor
) -> tuple[list, list]:
    """Predictions before the first layer and after each, and the normed queries (F, C) behind them.

    A prediction is class logits (F, K + 1) and mask logits (F, h, w).
    """
    predictions, queries = [], []

    def predict(x: Tensor) -> Tensor:
        queries.append(weights.decoder_norm.layer_norm(x))
        masks = torch.einsum("fc,chw->fhw", weights.mask_embed.mlp(queries[-1]), mask_features)
        predictions.append((weights.class_embed.linear(queries[-1]), masks))
        return masks

    x, position = weights.query_feat.weight, weights.query_embed.weight
    masks = predict(x)
    for index, layer in enumerate(weights.layers.each()):
        level = levels[index % 3]
        tokens = to_pixels(level) + weights.level_embed.weight[index % 3]
        bias = torch.zeros(len(x), tokens.shape[0])
        for query, mask in enumerate(resize(masks, level.shape[1:]).flatten(1)):
            background = mask.sigmoid() < 0.5
            if not background.all():  # a query with an empty mask attends everywhere
                bias[query, background] = -math.inf
        token_position = to_pixels(sine_position(*level.shape[1:], x.shape[1]))
        x = cross_attention(layer.cross_attention, heads, x, position, tokens, token_position, bias)
        x = self_attention(layer.self_attention, heads, x, position)
        x = feed_forward(layer.feed_forward, x)
        masks = predict(x)
    return predictions, queries


# Tracker


def window_of(frame: int, frames: int, window: int, shifted: bool) -> tuple:
    """The window of a frame: frames of equal windows attend to each other.

    Shifted windows begin half a window earlier. Frames that the shift moves from the end of the
    padded video into the first window stay apart.
    """
    if not window:
        return ()
    if not shifted:
        return (frame // window,)
    padded, place = -(-frames // window) * window, frame + math.ceil(window / 2)
    return place % padded // window, place >= padded


def encode(
    weights: Weights, heads: int, frame_queries: Tensor, window: int, training: bool
) -> Tensor:
    """Frame queries (T, F, C) of a clip -> tokens (T F, C)."""
    frames, count, _ = frame_queries.shape
    x = weights.input_proj.linear(frame_queries).flatten(0, 1)
    for index, layer in enumerate(weights.encoder.each()):
        shifted = index % 2 == 1 and not training
        windows = [
            window_of(token // count, frames, window, shifted) for token in range(frames * count)
        ]
        bias = torch.tensor(
            [[0.0 if row == column else -math.inf for column in windows] for row in windows]
        )
        x = self_attention(layer.self_attention, heads, x, bias=bias)
        x = feed_forward(layer.feed_forward, x)
    return x


def read_memory(weights: Weights, query: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The carried queries (Q, C), to which each adds what it reads from its own past."""
    read = query + weights.query_value.linear(query)
    for number, key in enumerate(weights.query_key.linear(query) if past else ()):
        shares = torch.stack([key @ keys[number] for keys, _ in past]).softmax(0)
        for share, (_, values) in zip(shares, past):
            read[number] = read[number] + share * values[number]
    return read


def track_clips(
    weights: Weights,
    heads: int,
    clips: list[list[Tensor]],
    gate_mask: str = "additive",
    window: int = 0,
    training: bool = False,
) -> list[dict]:
    """The clips of a video, in order.

    clips[c][l]: frame queries (T, F, C) of detector layer l. Each layer has its own stream of
    carried queries; in training the gates of the last stream serve all. Gates are not sampled.

    Returns for each clip {name: [value of each stream]}: logits, embed (mask embeddings),
    gate_logits and gate_soft are lists over the decoder layers; clip_embed (Q, C) is of the last
    one; frame_embed (T, F, C); query (Q, C) is carried to the next clip.
    """
    streams, position = range(len(clips[0])), weights.query_embed.weight
    carried = [weights.query_feat.weight for _ in streams]
    past, found = [[] for _ in streams], []
    for clip in clips:
        tokens = [encode(weights, heads, frame_queries, window, training) for frame_queries in clip]
        token_position = weights.frame_query_embed.weight.repeat(len(clip[0]), 1)
        start = carried
        if "memory_key" in weights:
            start = [read_memory(weights, carried[s], past[s]) for s in streams]
        x, names = list(start), ("logits", "embed", "gate_logits", "gate_soft")
        result = {name: [[] for _ in streams] for name in names}
        for layer in weights.decoder.each():
            x = [
                cross_attention(
                    layer.cross_attention, heads, x[s], position, tokens[s], token_position
                )
                for s in streams
            ]
            bias = [0.0 for _ in streams]
            if "gate_proj" in weights:
                logits = [
                    weights.gate_proj.linear(weights.decoder_norm.layer_norm(x[s]))[:, 0]
                    for s in streams
                ]
                for s in streams:
                    deciding = logits[-1] if training else logits[s]
                    is_open = (deciding >= 0)[:, None]
                    gate = is_open.to(deciding.dtype)
                    if training:  # its gradient is that of the soft gate
                        soft = (deciding[:, None] / TEMPERATURE).sigmoid()
                        gate = gate + soft - soft.detach()
                    x[s] = gate * x[s] + (1 - gate) * start[s]
                    of_closed = 1.0 if gate_mask == "additive" else -math.inf
                    rows = torch.where(is_open, 0.0, of_closed).repeat(1, len(is_open))
                    bias[s] = rows.fill_diagonal_(0.0)
                    result["gate_logits"][s].append(logits[s])
                    result["gate_soft"][s].append((logits[s] / TEMPERATURE).sigmoid())
            for s in streams:
                x[s] = self_attention(layer.self_attention, heads, x[s], position, bias[s])
                x[s] = feed_forward(layer.feed_forward, x[s])
                normed = weights.decoder_norm.layer_norm(x[s])
                result["logits"][s].append(weights.class_embed.linear(normed))
                result["embed"][s].append(weights.mask_embed.mlp(normed))
        normed = [weights.decoder_norm.layer_norm(x[s]) for s in streams]
        if "memory_key" in weights:
            for s in streams:
                past[s].append(
                    (weights.memory_key.linear(normed[s]), weights.memory_value.linear(normed[s]))
                )
        result["clip_embed"] = [weights.clip_similarity.linear(normed[s]) for s in streams]
        result["frame_embed"] = [
            weights.frame_similarity.linear(tokens[s]).view(clip[s].shape) for s in streams
        ]
        result["query"] = carried = x
        found.append(result)
    return found


# A whole video


def segment_video(
    weights: Weights,
    heads: int,
    backbone,
    frames: Tensor,
    output_size: tuple[int, int],
    top_k: int,
    clip_length: int,
    **options,
) -> tuple[list, Tensor]:
    """The instances of a video, best first, and the class logits (clips, Q, K + 1).

    An instance is (score, label, query, masks (T, *output_size) bool). backbone: a function of an
    image (1, 3, H, W) that returns four maps (1, C_i, h_i, w_i). options: those of track_clips.
    """
    queries, features, size = [], [], tuple(frames.shape[2:])
    for frame in frames:
        image = prepare(frame)
        levels, fpn = pixel_decoder(
            weights.pixel_decoder, heads, [level[0] for level in backbone(image[None])]
        )
        of_frames, of_clips = (
            F.conv2d(fpn[None], head.weight, head.bias)[0]
            for head in (weights.pixel_decoder.mask_features, weights.tracker.mask_features)
        )
        _, frame_queries = frame_decoder(weights.frame_decoder, heads, levels, of_frames)
        queries.append(frame_queries[-1])
        features.append(of_clips)
    clips = [
        [torch.stack(queries[first : first + clip_length])]
        for first in range(0, len(queries), clip_length)
    ]
    tracked = track_clips(weights.tracker, heads, clips, **options)
    logits = torch.stack([clip["logits"][0][-1] for clip in tracked])

    probabilities = logits.softmax(-1)[..., :-1]
    pairs = [
        (probabilities[:, query, label].max().item(), query, label)
        for query in range(logits.shape[1])
        for label in range(probabilities.shape[-1])
    ]
    instances = []
    for score, query, label in sorted(pairs, key=lambda pair: -pair[0])[:top_k]:
        inside, area, masks = 0.0, 0, []
        for t, feature in enumerate(features):
            embed = tracked[t // clip_length]["embed"][0][-1][query]
            mask = torch.einsum("c,chw->hw", embed, feature)[None]
            mask = resize(mask, image.shape[1:])[:, : size[0], : size[1]]
            inside += mask[mask > 0].sigmoid().sum().item()
            area += (mask > 0).sum().item()
            masks.append(resize(mask, output_size)[0] > 0)
        instances.append((score * inside / (area + 1e-6), label, query, torch.stack(masks)))
    return sorted(instances, key=lambda instance: -instance[0]), logits
