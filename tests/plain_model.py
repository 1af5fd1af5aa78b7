"""The model once more, as plainly as it can be said: one frame, one query, one head after the other, straight from a state dict.

For tests to compare with, in float64. Nothing here is imported from the model: the equations are those of the papers
(Mask2Former 2112.01527, Deformable DETR 2010.04159, VITA 2206.04403, GenVIS 2211.08834, GRAtt-VIS 2305.17096), and the only
things that are shared are the names of the weights. Letters as in model.py, without the batch: T frames, F frame queries,
Q queries of the tracker, C channels, K classes.
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


# ---- Blocks ---------------------------------------------------------------------------------------------------------

def attention(weights: Weights, heads: int, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """query (Q, C), key and value (S, C); bias (Q, S) is added to the logits of every head."""
    (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias) = (
        part.chunk(3) for part in (weights.in_proj_weight, weights.in_proj_bias))
    q, k, v = query @ q_weight.T + q_bias, key @ k_weight.T + k_bias, value @ v_weight.T + v_bias
    size, outputs = q.shape[1] // heads, []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        logits = q[:, own] @ k[:, own].T / math.sqrt(size) + bias
        outputs.append(logits.softmax(1) @ v[:, own])
    return weights.out_proj.linear(torch.cat(outputs, 1))


def feed_forward(weights: Weights, x: Tensor) -> Tensor:
    return weights.norm.layer_norm(x + weights.linear2.linear(weights.linear1.linear(x).clamp(min=0)))


def self_attention(weights: Weights, heads: int, x: Tensor, position: Tensor | float = 0.0, bias: Tensor | float = 0.0) -> Tensor:
    return weights.norm.layer_norm(x + attention(weights.attention, heads, x + position, x + position, x, bias))


def cross_attention(weights: Weights, heads: int, x: Tensor, position: Tensor, tokens: Tensor, token_position: Tensor,
                    bias: Tensor | float = 0.0) -> Tensor:
    return weights.norm.layer_norm(
        x + attention(weights.attention, heads, x + position, tokens + token_position, tokens, bias))


def sine_position(height: int, width: int, channels: int) -> Tensor:
    """(C, height, width): y in the first half of the channels, x in the second; sines and cosines in turn."""
    position, half = torch.zeros(channels, height, width), channels // 2
    for channel in range(channels):
        number = channel % half
        wave = math.cos if number % 2 else math.sin
        for y in range(height):
            for x in range(width):
                place = (y + 1) / (height + 1e-6) if channel < half else (x + 1) / (width + 1e-6)
                position[channel, y, x] = wave(2 * math.pi * place / 10000 ** (2 * (number // 2) / half))
    return position


def to_pixels(level: Tensor) -> Tensor:
    """(C, h, w) -> (h w, C)."""
    return level.flatten(1).T


# ---- Detector -------------------------------------------------------------------------------------------------------

def prepare(frame: Tensor) -> Tensor:
    """uint8 (3, H, W) -> normalised, zeros at the right and below up to multiples of 32."""
    height, width = frame.shape[1:]
    image = torch.zeros(3, -(-height // 32) * 32, -(-width // 32) * 32)
    for channel in range(3):
        image[channel, :height, :width] = (frame[channel] - MEAN[channel]) / STD[channel]
    return image


def deformable_attention(weights: Weights, heads: int, query: Tensor, value: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    """query and value (S, C), of the pixels of all levels; four points a head and level."""
    value = weights.value_proj.linear(value).unflatten(1, (heads, -1))                    # (S, heads, C / heads)
    offsets = weights.sampling_offsets.linear(query).unflatten(1, (heads, len(shapes), 4, 2))
    shares = weights.attention_weights.linear(query).unflatten(1, (heads, -1)).softmax(-1).unflatten(2, (len(shapes), 4))
    centres = torch.cat([torch.stack(((torch.arange(w) + 0.5).expand(h, w) / w, (torch.arange(h) + 0.5)[:, None].expand(h, w) / h),
                                     -1).flatten(0, 1) for h, w in shapes])                # (S, 2), (x, y) in 0..1
    outputs = []
    for head in range(heads):
        total, first = 0, 0
        for level, (height, width) in enumerate(shapes):
            pixels = value[first:first + height * width, head].T.unflatten(1, (height, width))
            first += height * width
            places = centres[:, None] + offsets[:, head, level] / torch.tensor([width, height])
            sampled = F.grid_sample(pixels[None], (2 * places - 1)[None], align_corners=False)[0]     # (C / heads, S, 4)
            total = total + (sampled * shares[:, head, level]).sum(-1).T
        outputs.append(total)
    return weights.output_proj.linear(torch.cat(outputs, 1))


def pixel_decoder(weights: Weights, heads: int, maps: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """[res2, res3, res4, res5] of a frame, (C_i, h_i, w_i) -> maps of strides 32, 16, 8 and the FPN map of stride 4."""
    res2, *others = maps
    sources = [projection[1].group_norm(F.conv2d(level[None], projection[0].weight, projection[0].bias))[0]
               for projection, level in zip(weights.input_proj.each(), reversed(others), strict=True)]
    shapes = [tuple(source.shape[1:]) for source in sources]
    x = torch.cat([to_pixels(source) for source in sources])
    position = torch.cat([to_pixels(sine_position(*shape, x.shape[1])) + embed
                          for shape, embed in zip(shapes, weights.level_embed, strict=True)])
    for layer in weights.layers.each():
        x = layer.norm.layer_norm(x + deformable_attention(layer.attention, heads, x + position, x, shapes))
        x = feed_forward(layer.feed_forward, x)
    levels = [level.T.unflatten(1, shape) for level, shape in zip(x.split([h * w for h, w in shapes]), shapes)]
    finest = F.interpolate(levels[-1][None], res2.shape[1:], mode="bilinear", align_corners=False)
    joined = finest + weights.lateral[1].group_norm(F.conv2d(res2[None], weights.lateral[0].weight))
    return levels, weights.output[1].group_norm(F.conv2d(joined, weights.output[0].weight, padding=1)).clamp(min=0)[0]


def frame_decoder(weights: Weights, heads: int, levels: list[Tensor], mask_features: Tensor) -> tuple[list, list]:
    """Predictions (class logits (F, K + 1), mask logits (F, h, w)) before the first layer and after every one, and the normed
    queries (F, C) behind them."""
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
        small = F.interpolate(masks[None], level.shape[1:], mode="bilinear", align_corners=False)[0].flatten(1)
        bias = torch.zeros_like(small)
        for query, own in enumerate(small):
            background = own.sigmoid() < 0.5
            if not background.all():                       # an empty mask reads everywhere
                bias[query, background] = -math.inf
        token_position = to_pixels(sine_position(*level.shape[1:], x.shape[1]))
        x = cross_attention(layer.cross_attention, heads, x, position, tokens, token_position, bias)
        x = self_attention(layer.self_attention, heads, x, position)
        x = feed_forward(layer.feed_forward, x)
        masks = predict(x)
    return predictions, queries


# ---- Tracker --------------------------------------------------------------------------------------------------------

def window_of(frame: int, frames: int, window: int, shifted: bool) -> tuple:
    """Frames of equal windows see each other. Shifted windows begin half a window earlier; what a shift brings from the end of
    the (padded) video into the first window stays apart."""
    if not window:
        return ()
    if not shifted:
        return (frame // window,)
    padded, place = -(-frames // window) * window, frame + math.ceil(window / 2)
    return place % padded // window, place >= padded


def encode(weights: Weights, heads: int, frame_queries: Tensor, window: int, training: bool) -> Tensor:
    """Frame queries (T, F, C) of a clip -> tokens (T F, C)."""
    frames, count, _ = frame_queries.shape
    x = weights.input_proj.linear(frame_queries).flatten(0, 1)
    for index, layer in enumerate(weights.encoder.each()):
        shifted = index % 2 == 1 and not training
        windows = [window_of(token // count, frames, window, shifted) for token in range(frames * count)]
        bias = torch.tensor([[0.0 if row == column else -math.inf for column in windows] for row in windows])
        x = feed_forward(layer.feed_forward, self_attention(layer.self_attention, heads, x, bias=bias))
    return x


def read_memory(weights: Weights, query: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The carried queries (Q, C) and what each of them finds in its own past."""
    read = query + weights.query_value.linear(query)
    for number, key in enumerate(weights.query_key.linear(query) if past else ()):
        shares = torch.stack([key @ keys[number] for keys, _ in past]).softmax(0)
        read[number] = read[number] + sum(share * values[number] for share, (_, values) in zip(shares, past))
    return read


def track_clips(weights: Weights, heads: int, clips: list[list[Tensor]], gate_mask: str = "additive", window: int = 0,
                training: bool = False) -> list[dict]:
    """The clips of a video in a row. clips[c][l]: frame queries (T, F, C) that detector layer l hands on; each has its own stream
    of carried queries, and in training the gates of the last one serve all. No noise is added to a gate's logit.

    Returns for each clip, for every stream: logits, embed (mask embeddings), gate_logits and gate_soft of all decoder layers,
    clip_embed of the last, frame_embed (T, F, C), and query, which is carried on.
    """
    streams, position = range(len(clips[0])), weights.query_embed.weight
    carried = [weights.query_feat.weight for _ in streams]
    past, found = [[] for _ in streams], []
    for clip in clips:
        tokens = [encode(weights, heads, frame_queries, window, training) for frame_queries in clip]
        token_position = weights.frame_query_embed.weight.repeat(len(clip[0]), 1)
        start = [read_memory(weights, carried[s], past[s]) if "memory_key" in weights else carried[s] for s in streams]
        x = list(start)
        result = {name: [[] for _ in streams] for name in ("logits", "embed", "gate_logits", "gate_soft")}
        for layer in weights.decoder.each():
            x = [cross_attention(layer.cross_attention, heads, x[s], position, tokens[s], token_position) for s in streams]
            bias = [0.0 for _ in streams]
            if "gate_proj" in weights:
                logits = [weights.gate_proj.linear(weights.decoder_norm.layer_norm(x[s]))[:, 0] for s in streams]
                for s in streams:
                    deciding = logits[-1] if training else logits[s]
                    is_open = (deciding >= 0)[:, None]
                    gate = is_open.to(deciding.dtype)
                    if training:                            # its gradient is that of the soft gate
                        soft = (deciding[:, None] / TEMPERATURE).sigmoid()
                        gate = gate + soft - soft.detach()
                    x[s] = gate * x[s] + (1 - gate) * start[s]
                    closed = torch.where(is_open, 0.0, 1.0 if gate_mask == "additive" else -math.inf)
                    bias[s] = closed.repeat(1, len(is_open)).fill_diagonal_(0.0)
                    result["gate_logits"][s].append(logits[s])
                    result["gate_soft"][s].append((logits[s] / TEMPERATURE).sigmoid())
            for s in streams:
                x[s] = feed_forward(layer.feed_forward, self_attention(layer.self_attention, heads, x[s], position, bias[s]))
                normed = weights.decoder_norm.layer_norm(x[s])
                result["logits"][s].append(weights.class_embed.linear(normed))
                result["embed"][s].append(weights.mask_embed.mlp(normed))
        normed = [weights.decoder_norm.layer_norm(x[s]) for s in streams]
        if "memory_key" in weights:
            for s in streams:
                past[s].append((weights.memory_key.linear(normed[s]), weights.memory_value.linear(normed[s])))
        result["clip_embed"] = [weights.clip_similarity.linear(normed[s]) for s in streams]
        result["frame_embed"] = [weights.frame_similarity.linear(tokens[s]).view(clip[s].shape) for s in streams]
        result["query"] = carried = x
        found.append(result)
    return found


# ---- A whole video --------------------------------------------------------------------------------------------------

def resize(masks: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(masks[None], size, mode="bilinear", align_corners=False)[0]


def segment_video(weights: Weights, heads: int, backbone, frames: Tensor, output_size: tuple[int, int], top_k: int,
                  clip_length: int, **options) -> tuple[list, Tensor]:
    """The instances of a video, best first: (score, label, query, masks (T, *output_size) bool); and class logits (clips, Q, K + 1).

    backbone: image (1, 3, H, W) -> four maps (1, C_i, h_i, w_i). clip_length: frames; options: of track_clips.
    """
    queries, features, size = [], [], tuple(frames.shape[2:])
    for frame in frames:
        image = prepare(frame)
        levels, fpn = pixel_decoder(weights.pixel_decoder, heads, [level[0] for level in backbone(image[None])])
        own = weights.pixel_decoder.mask_features
        _, found = frame_decoder(weights.frame_decoder, heads, levels, F.conv2d(fpn[None], own.weight, own.bias)[0])
        queries.append(found[-1])
        own = weights.tracker.mask_features
        features.append(F.conv2d(fpn[None], own.weight, own.bias)[0])
    clips = [[torch.stack(queries[first:first + clip_length])] for first in range(0, len(queries), clip_length)]
    tracked = track_clips(weights.tracker, heads, clips, **options)
    logits = torch.stack([clip["logits"][0][-1] for clip in tracked])

    probabilities = logits.softmax(-1)[..., :-1]
    pairs = sorted(((probabilities[:, query, label].max().item(), query, label) for query in range(logits.shape[1])
                    for label in range(probabilities.shape[-1])), key=lambda pair: -pair[0])[:top_k]
    instances = []
    for score, query, label in pairs:
        inside, area, masks = 0.0, 0, []
        for t, feature in enumerate(features):
            embed = tracked[t // clip_length]["embed"][0][-1][query]
            mask = torch.einsum("c,chw->hw", embed, feature)[None]
            mask = resize(mask, image.shape[1:])[:, :size[0], :size[1]]
            inside += mask[mask > 0].sigmoid().sum().item()
            area += (mask > 0).sum().item()
            masks.append(resize(mask, output_size)[0] > 0)
        instances.append((score * inside / (area + 1e-6), label, query, torch.stack(masks)))
    return sorted(instances, key=lambda instance: -instance[0]), logits
