"""The tracker: instance queries carried from clip to clip, each through a gate (the GRAtt block).

Paper: GRAtt-VIS (arXiv 2305.17096), method section; upstream grattvis/modeling/grattvis.py, gumble_softmax.py and
vita/modeling/transformer_decoder/vita.py. Shape letters are declared in model.py; here also S = L * B streams, the
detector layers side by side (layer-major: stream l * B + b), each with its own carried queries.

The paper's three steps, for the queries q carried into a clip and x on its way through a decoder layer:

    gate                 g = 1[Linear(norm(x)) >= 0]             `gate`        (Gumbel-sigmoid while training)
    gated residual       x = g * x + (1 - g) * q                 `propagate`   (closed: back to the carried query)
    masked attention     x = SelfAttention(x, mask(g))           `gate_bias`   (the mask of closed queries)

Propagation modes:
    "gated"         GRAtt-VIS: the gate alone decides what of the past survives
    "memory"        GenVIS: a query reads a memory of its own past instead, no gate
    "gated+memory"  both
    "plain"         neither: the query is simply carried on
    "clip"          VITA: nothing is carried, one clip is the whole video
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer import MLP, CrossAttention, FeedForward, SelfAttention, mask_kernel

PROPAGATIONS = ("gated", "plain", "memory", "gated+memory", "clip")
GATE_MASKS = ("additive", "blocked")
GUMBEL_TEMPERATURE = 0.66667  # upstream passes it under the name eps
FAR = -1000.0                 # added to the logits of frames that a shifted window must not mix


@dataclass
class TrackerState:
    """What one clip hands to the next. The memory stays empty without "memory" in the mode, so the size is constant."""
    query: Tensor                     # (S, Q, C) before decoder_norm, not detached
    memory_key: Tensor | None = None  # (S, M, Q, C), one entry a past clip
    memory_value: Tensor | None = None


@dataclass
class ClipPrediction:
    """Predictions for one clip; lists run over the D decoder layers (while not training: the last one alone)."""
    logits: list[Tensor]              # (L, B, Q, K + 1)
    mask_embed: list[Tensor]          # (L, B, Q, C), of features that have gone through the tracker's mask_features
    mask_kernel: list[Tensor]         # (L, B, Q, C + 1), the same for features that have not
    clip_embed: Tensor                # (L, B, Q, C), last layer: similarity embedding of the clip queries
    frame_embed: Tensor               # (L, B, T, F, C): similarity embedding of the frame queries
    gate_logits: list[Tensor]         # (L, B, Q) of all D layers, empty without a gate
    gate_soft: list[Tensor]           # (L, B, Q) in 0..1, the noisy gates behind the hard ones; empty when not training


def logistic_noise(logits: Tensor) -> Tensor:
    """The difference of two Gumbel variables, drawn as log(u) - log(1 - u); a function of its own for tests to silence."""
    uniform = torch.rand_like(logits)
    return torch.log(uniform + 1e-8) - torch.log(1 - uniform + 1e-8)


class Tracker(nn.Module):
    """Frame queries of a clip in, class logits and mask embeddings of the carried instance queries out."""
    query_noise = 0.0  # in training: share of the carried queries that are mixed with another one

    def __init__(self, num_classes: int, channels: int = 256, mask_channels: int = 256, queries: int = 100,
                 frame_queries: int = 100, encoder_layers: int = 6, decoder_layers: int = 3, heads: int = 8,
                 feed_forward: int = 2048, propagation: str = "gated", gate_mask: str = "additive", window: int = 0):
        """window: 0 = every frame query of a clip sees all others; W > 0 = attention in windows of W frames (VITA)."""
        super().__init__()
        if propagation not in PROPAGATIONS:
            raise ValueError(f"unknown propagation {propagation!r}: choose one of {', '.join(PROPAGATIONS)}")
        if gate_mask not in GATE_MASKS:
            raise ValueError(f"unknown gate mask {gate_mask!r}: choose one of {', '.join(GATE_MASKS)}")
        self.propagation, self.gate_mask, self.window = propagation, gate_mask, window
        self.gated, self.remembers = "gated" in propagation, "memory" in propagation

        self.input_proj = nn.Linear(channels, channels)
        self.encoder = nn.ModuleList(EncoderLayer(channels, heads, feed_forward) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(channels, heads, feed_forward) for _ in range(decoder_layers))
        self.decoder_norm = nn.LayerNorm(channels)
        self.query_feat = nn.Embedding(queries, channels)         # the queries of the first clip
        self.query_embed = nn.Embedding(queries, channels)        # their positions, added anew in every clip
        self.frame_query_embed = nn.Embedding(frame_queries, channels)
        self.mask_features = nn.Conv2d(mask_channels, channels, 1)
        self.class_embed = nn.Linear(channels, num_classes + 1)
        self.mask_embed = MLP(channels, channels)
        self.frame_similarity = nn.Linear(channels, channels)
        self.clip_similarity = nn.Linear(channels, channels)
        if self.gated:
            self.gate_proj = nn.Linear(channels, 1)               # one for all layers
        if self.remembers:
            self.memory_key = nn.Linear(channels, channels)
            self.memory_value = nn.Linear(channels, channels)
            self.query_key = nn.Linear(channels, channels)
            self.query_value = nn.Linear(channels, channels)

    def initial_state(self, streams: int) -> TrackerState:
        """The state before the first clip: the learned queries, an empty memory."""
        return TrackerState(self.query_feat.weight.expand(streams, -1, -1))

    def forward(self, frame_queries: Tensor, state: TrackerState | None = None) -> tuple[ClipPrediction, TrackerState]:
        """One clip: frame_queries (L, B, T, F, C), state of the clip before (None at a video's start)."""
        (prediction,), state = self.follow(frame_queries[:, :, None], state)
        return prediction, state

    def follow(self, frame_queries: Tensor, state: TrackerState | None = None) -> tuple[list[ClipPrediction], TrackerState]:
        """Clips in a row: frame_queries (L, B, clips, T, F, C). What no clip needs of the others is done for all of them at once."""
        layers, batch, clips = frame_queries.shape[:3]
        frame_embed, read = self.read(frame_queries.flatten(0, 1))
        normed, gate_logits, gate_soft = [], [], []                              # of each clip, then of each decoder layer
        state = self.initial_state(layers * batch) if state is None else state
        for clip in range(clips):
            if clip and self.training and self.query_noise:
                state = replace(state, query=self.disturb(state.query))
            state, *found = self.carry([(keys[:, clip], values[:, clip]) for keys, values in read], state, layers)
            for values, all_clips in zip(found, (normed, gate_logits, gate_soft)):
                all_clips.append([value.unflatten(0, (layers, batch)) for value in values])
        outputs = torch.stack([torch.stack(own if self.training else own[-1:]) for own in normed])       # (clips, D, L, B, Q, C)
        logits, mask_embed, clip_embed = self.class_embed(outputs), self.mask_embed(outputs), self.clip_similarity(outputs[:, -1])
        kernel = mask_kernel(mask_embed, self.mask_features)
        frame_embed = frame_embed.unflatten(0, (layers, batch))
        return [ClipPrediction(list(logits[clip]), list(mask_embed[clip]), list(kernel[clip]), clip_embed[clip], frame_embed[:, :, clip],
                               gate_logits[clip], gate_soft[clip]) for clip in range(clips)], state

    def read(self, frame_queries: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Similarity embeddings (S, clips, T, F, C) of frame queries of that shape, and what each decoder layer reads of every clip:
        keys and values (S, clips, heads, T F, C / heads)."""
        streams, frames = frame_queries.shape[0], frame_queries.shape[2]
        tokens = self.encode(frame_queries.flatten(0, 1))                        # (S clips, T, F, C)
        frame_embed = self.frame_similarity(tokens).unflatten(0, (streams, -1))
        tokens = tokens.flatten(1, 2)                                            # (S clips, T F, C)
        located = tokens + self.frame_query_embed.weight.repeat(frames, 1)
        read = [[part.unflatten(0, (streams, -1)) for part in layer.cross_attention.read(tokens, located)] for layer in self.decoder]
        return frame_embed, read

    def carry(self, read: list[tuple[Tensor, Tensor]], state: TrackerState, layers: int
              ) -> tuple[TrackerState, list[Tensor], list[Tensor], list[Tensor]]:
        """The queries through one clip: the state after it, and of each decoder layer the normed queries (S, Q, C), the gates'
        logits (S, Q) and, while training, the soft gates (S, Q). read: keys and values (S, heads, T F, C / heads) a layer."""
        carried = self.read_memory(state) if self.remembers else state.query
        x, normed, gate_logits, gate_soft = carried, [], [], []
        for layer, own in zip(self.decoder, read):
            x = layer.cross_attention(x, self.query_embed.weight, own)
            bias = blocked = None
            if self.gated:
                gate, logits, soft = self.gate(x, layers)
                x = self.propagate(gate, x, carried)
                bias, blocked = self.gate_bias(gate)
                gate_logits.append(logits)
                if self.training:
                    gate_soft.append(soft)
            x = layer.self_attention(x, self.query_embed.weight, bias=bias, blocked=blocked)
            x = layer.feed_forward(x)
            normed.append(self.decoder_norm(x))
        return self.next_state(x, normed[-1], state), normed, gate_logits, gate_soft

    def gate(self, x: Tensor, layers: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hard gates (S, Q, 1) in {0, 1}, their logits (S, Q), and while training the soft gates (S, Q).

        In training the gate is sampled (Gumbel-sigmoid) and passes its gradient straight through; the hard gate of the
        last detector layer serves all L streams of a video, as only that layer exists at inference.
        """
        logits = self.gate_proj(self.decoder_norm(x)).squeeze(-1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))     # 16 bit noise is no logistic noise
        if not self.training:
            return (logits >= 0).to(x.dtype)[..., None], logits, None
        soft = torch.sigmoid((logits + logistic_noise(logits)) / GUMBEL_TEMPERATURE)
        hard = ((soft >= 0.5).to(soft.dtype) - soft).detach() + soft
        last = hard.unflatten(0, (layers, -1))[-1]                               # (B, Q)
        return last.repeat(layers, 1)[..., None].to(x.dtype), logits, soft

    @staticmethod
    def propagate(gate: Tensor, x: Tensor, carried: Tensor) -> Tensor:
        """The gated residual connection: a closed gate forgets this clip's layers so far and returns to `carried`."""
        return gate * x + (1 - gate) * carried

    def gate_bias(self, gate: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The self-attention mask of closed queries as (additive bias, blocked mask), one of them None; (S, 1, Q, Q).

        The paper masks closed queries out of the self-attention. The released code builds a float mask of ones, which
        attention adds to the logits, so a closed query attends the others a little MORE (rows, off the diagonal).
        All released checkpoints are trained so: "additive" is the default. "blocked" is what the paper says: a closed
        query attends to itself alone (True = blocked).
        """
        closed = (gate == 0)[:, None]                                            # (S, 1, Q, 1): rows, not columns
        others = ~torch.eye(gate.shape[1], dtype=torch.bool, device=gate.device)
        mask = closed & others
        return (None, mask) if self.gate_mask == "blocked" else (mask.to(gate.dtype), None)

    def disturb(self, query: Tensor) -> Tensor:
        """Carried queries (S, Q, C), some of them up to half another one of their stream, so that recovering is learned.

        Not of GRAtt-VIS: the noise of DVIS (arXiv 2306.03413), section 3.3, weighted averaging."""
        other = query[:, torch.randperm(query.shape[1], device=query.device)]
        share = torch.rand(*query.shape[:2], 1, device=query.device, dtype=query.dtype) / 2
        noisy = torch.rand_like(share) < self.query_noise
        return torch.where(noisy, query + share * (other - query), query)

    def read_memory(self, state: TrackerState) -> Tensor:
        """GenVIS: every query reads its own past, unscaled; its own value is added even when the memory is empty."""
        query = state.query
        read = query + self.query_value(query)
        if state.memory_key is not None:
            weights = torch.einsum("sqc,smqc->smq", self.query_key(query), state.memory_key).softmax(1)
            read = read + torch.einsum("smq,smqc->sqc", weights, state.memory_value)
        return read

    def next_state(self, x: Tensor, normed: Tensor, state: TrackerState) -> TrackerState:
        """The raw output of the last layer is carried on; the memory grows by its normed projection."""
        if not self.remembers:
            return TrackerState(x)
        key, value = self.memory_key(normed)[:, None], self.memory_value(normed)[:, None]
        if state.memory_key is not None:
            key, value = torch.cat((state.memory_key, key), 1), torch.cat((state.memory_value, value), 1)
        return TrackerState(x, key, value)

    def encode(self, frame_queries: Tensor) -> Tensor:
        """Frame queries (S, T, F, C) exchange what they saw: projection, then self-attention layers; same shape."""
        x = self.input_proj(frame_queries)
        if not self.window:
            shape = x.shape
            x = x.flatten(1, 2)
            for layer in self.encoder:
                x = layer(x)
            return x.view(shape)

        frames, window = x.shape[1], self.window
        x = F.pad(x, (0, 0, 0, 0, 0, -frames % window))                          # zeros after the projection: no bias
        padded = torch.arange(x.shape[1], device=x.device) >= frames             # (T',) True = not a frame
        plain = torch.zeros(x.shape[1], x.shape[1], device=x.device, dtype=torch.bool) | padded
        half = math.ceil(window / 2)
        for index, layer in enumerate(self.encoder):
            shifted = not self.training and index % 2 == 1                       # upstream trains unshifted only
            if shifted:
                x = self.attend_in_windows(layer, x.roll(half, 1), self.shifted_mask(padded, half)).roll(-half, 1)
            else:
                x = self.attend_in_windows(layer, x, plain)
        return x[:, :frames]

    def shifted_mask(self, padded: Tensor, half: int) -> Tensor:
        """Which frame (row) must not see which (column) after the roll: bool (T', T'), True = blocked."""
        padded = padded.roll(half)
        blocked = padded[:, None] | padded
        seam = torch.arange(len(padded), device=padded.device) < half            # frames rolled in from the video's end
        return blocked | (seam[:, None] != seam)

    def attend_in_windows(self, layer: nn.Module, x: Tensor, blocked: Tensor) -> Tensor:
        """One encoder layer within windows of W frames. x (S, T', F, C); blocked (T', T'), read inside windows only.

        A finite bias instead of a blocked mask: a window may start with nothing but padding, whose rows would be NaN.
        """
        streams, frames, count, channels = x.shape
        window, windows = self.window, frames // self.window
        own = blocked.view(windows, window, windows, window).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        bias = own.to(x.dtype).repeat_interleave(count, 1).repeat_interleave(count, 2) * FAR
        x = x.reshape(streams * windows, window * count, channels)
        x = layer(x, bias.repeat(streams, 1, 1)[:, None])
        return x.view(streams, frames, count, channels)


class EncoderLayer(nn.Module):
    """Self-attention of frame queries, without positions, and a feed-forward block."""

    def __init__(self, channels: int, heads: int, feed_forward: int):
        super().__init__()
        self.self_attention = SelfAttention(channels, heads)
        self.feed_forward = FeedForward(channels, feed_forward)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.feed_forward(self.self_attention(x, bias=bias))


class DecoderLayer(nn.Module):
    """The three blocks of a decoder layer; the tracker calls them one by one, to put the gate between them."""

    def __init__(self, channels: int, heads: int, feed_forward: int):
        super().__init__()
        self.cross_attention = CrossAttention(channels, heads)
        self.self_attention = SelfAttention(channels, heads)
        self.feed_forward = FeedForward(channels, feed_forward)
