"""The tracker: instance queries propagated from clip to clip through a gate (the GRAtt block).

Paper: GRAtt-VIS (arXiv 2305.17096), method section. Upstream: grattvis/modeling/grattvis.py,
grattvis/modeling/gumble_softmax.py and vita/modeling/transformer_decoder/vita.py. Shape letters are
declared in model.py.

`Tracker.decode_clip` is the paper's method. A decoder layer takes x, the queries on their way
through the layers, and q, the queries propagated from the previous clip:

    cross-attention              x = CrossAttention(x, frame queries of the clip)
    gate                         g = 1[Linear(norm(x)) >= 0]      Gumbel-sigmoid in training
    gated residual connection    x = g * x + (1 - g) * q          a closed gate restores q
    masked self-attention        x = SelfAttention(x, mask(g))
    feed-forward                 x = FeedForward(x)

Propagation modes:
    "gated"         GRAtt-VIS: the gate decides which queries the clip updates
    "memory"        GenVIS: no gate; queries attend to a memory of their own past
    "gated+memory"  both
    "plain"         neither: the output queries of a clip are the input queries of the next
    "clip"          VITA: no propagation; the clip is the whole video
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
MASKED_LOGIT = -1000.0        # finite, so that a row of masked logits has a softmax


@dataclass
class TrackerState:
    """What one clip passes to the next. Its size is constant, except with a memory."""
    query: Tensor                     # (S, Q, C), before decoder_norm, not detached
    memory_key: Tensor | None = None  # (S, past clips, Q, C)
    memory_value: Tensor | None = None


@dataclass
class ClipPrediction:
    """Predictions for one clip.

    Lists run over the D decoder layers. Outside of training, logits, mask_embed and mask_kernel
    have one entry, that of the last layer.
    """
    logits: list[Tensor]       # (L, B, Q, K + 1)
    mask_embed: list[Tensor]   # (L, B, Q, C), for features projected by the tracker's mask_features
    mask_kernel: list[Tensor]  # (L, B, Q, C + 1), the same for unprojected features
    clip_embed: Tensor         # (L, B, Q, C), similarity embedding of the instance queries
    frame_embed: Tensor        # (L, B, T, F, C), similarity embedding of the frame queries
    gate_logits: list[Tensor]  # (L, B, Q); empty without gates
    gate_soft: list[Tensor]    # (L, B, Q) in 0..1, sampled; empty outside of training


def logistic_noise(logits: Tensor) -> Tensor:
    """Difference of two Gumbel samples, drawn as log(u) - log(1 - u)."""
    uniform = torch.rand_like(logits)
    return torch.log(uniform + 1e-8) - torch.log(1 - uniform + 1e-8)


class Tracker(nn.Module):
    """Maps the frame queries of a clip to class logits and mask embeddings of instance queries.

    window: 0 = the frame queries of a clip attend to each other; W > 0 = within windows of W
    frames (VITA).
    query_noise: probability that a propagated query is perturbed in training (DVIS).
    """

    def __init__(self, num_classes: int, channels: int = 256, mask_channels: int = 256,
                 queries: int = 100, frame_queries: int = 100, encoder_layers: int = 6,
                 decoder_layers: int = 3, heads: int = 8, feed_forward: int = 2048,
                 propagation: str = "gated", gate_mask: str = "additive", window: int = 0,
                 query_noise: float = 0.0):
        super().__init__()
        if propagation not in PROPAGATIONS:
            raise ValueError(f"unknown propagation {propagation!r}: "
                             f"choose one of {', '.join(PROPAGATIONS)}")
        if gate_mask not in GATE_MASKS:
            raise ValueError(f"unknown gate mask {gate_mask!r}: "
                             f"choose one of {', '.join(GATE_MASKS)}")
        self.propagation, self.gate_mask = propagation, gate_mask
        self.window, self.query_noise = window, query_noise
        self.gated, self.use_memory = "gated" in propagation, "memory" in propagation

        self.input_proj = nn.Linear(channels, channels)
        self.encoder = nn.ModuleList(
            EncoderLayer(channels, heads, feed_forward) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(
            DecoderLayer(channels, heads, feed_forward) for _ in range(decoder_layers))
        self.decoder_norm = nn.LayerNorm(channels)
        self.query_feat = nn.Embedding(queries, channels)         # the queries of the first clip
        self.query_embed = nn.Embedding(queries, channels)        # query_pos
        self.frame_query_embed = nn.Embedding(frame_queries, channels)  # frame_query_pos
        self.mask_features = nn.Conv2d(mask_channels, channels, 1)
        self.class_embed = nn.Linear(channels, num_classes + 1)
        self.mask_embed = MLP(channels, channels)
        self.frame_similarity = nn.Linear(channels, channels)
        self.clip_similarity = nn.Linear(channels, channels)
        if self.gated:
            self.gate_proj = nn.Linear(channels, 1)               # shared by all layers
        if self.use_memory:
            self.memory_key = nn.Linear(channels, channels)
            self.memory_value = nn.Linear(channels, channels)
            self.query_key = nn.Linear(channels, channels)
            self.query_value = nn.Linear(channels, channels)

    def initial_state(self, streams: int) -> TrackerState:
        """State before the first clip: the learned queries and an empty memory."""
        return TrackerState(self.query_feat.weight.expand(streams, -1, -1))

    def forward(self, frame_queries: Tensor, state: TrackerState | None = None
                ) -> tuple[ClipPrediction | list[ClipPrediction], TrackerState]:
        """Track one clip, or several consecutive ones.

        frame_queries: (L, B, T, F, C) of one clip -> (ClipPrediction, state), or
            (L, B, clips, T, F, C) -> (list of ClipPrediction, state).
        state: returned for the previous clip; None at the start of a video.
        """
        if frame_queries.ndim == 6:
            return self.track_clips(frame_queries, state)
        (prediction,), state = self.track_clips(frame_queries[:, :, None], state)
        return prediction, state

    def track_clips(self, frame_queries: Tensor, state: TrackerState | None = None
                    ) -> tuple[list[ClipPrediction], TrackerState]:
        """Consecutive clips: frame_queries (L, B, clips, T, F, C).

        Clips are decoded in sequence. The encoder and the prediction heads, which look at one clip
        at a time, run on all of them at once.
        """
        layers, batch, clips = frame_queries.shape[:3]
        if state is None:
            state = self.initial_state(layers * batch)
        memory = self.encode(frame_queries.movedim(2, 0).flatten(0, 2))     # (clips * S, T, F, C)
        frame_embed = self.frame_similarity(memory).unflatten(0, (clips, layers, batch))
        outputs, gate_logits, gate_soft = [], [], []                        # of each clip
        for clip, clip_memory in enumerate(memory.flatten(1, 2).chunk(clips)):
            if clip and self.training and self.query_noise:
                state = replace(state, query=self.add_query_noise(state.query))
            decoded, state = self.decode_clip(clip_memory, state, layers)
            for values, of_clips in zip(decoded, (outputs, gate_logits, gate_soft)):
                of_clips.append([value.unflatten(0, (layers, batch)) for value in values])

        predicted = slice(None) if self.training else slice(-1, None)       # decoder layers
        outputs = torch.stack([torch.stack(each[predicted]) for each in outputs])
        logits = self.class_embed(outputs)                          # (clips, D, L, B, Q, K + 1)
        mask_embed = self.mask_embed(outputs)
        kernel = mask_kernel(mask_embed, self.mask_features)
        clip_embed = self.clip_similarity(outputs[:, -1])
        return [ClipPrediction(list(logits[clip]), list(mask_embed[clip]), list(kernel[clip]),
                               clip_embed[clip], frame_embed[clip],
                               gate_logits[clip], gate_soft[clip])
                for clip in range(clips)], state

    def decode_clip(self, memory: Tensor, state: TrackerState, layers: int
                    ) -> tuple[tuple[list[Tensor], ...], TrackerState]:
        """Update the instance queries with one clip.

        memory: encoded frame queries (S, T * F, C). layers: L.

        Returns (outputs, gate_logits, gate_soft) and the next state. The three lists run over the
        decoder layers: normed queries (S, Q, C), from which all predictions are made, and what
        `gate` returns.
        """
        query_pos = self.query_embed.weight
        frames = memory.shape[1] // len(self.frame_query_embed.weight)
        frame_query_pos = self.frame_query_embed.weight.expand(frames, -1, -1).flatten(0, 1)
        query = self.read_memory(state) if self.use_memory else state.query
        x, mask = query, None
        outputs, gate_logits, gate_soft = [], [], []
        for layer in self.decoder:
            x = layer.cross_attention(x, query_pos, memory, frame_query_pos)
            if self.gated:
                gate, logits, soft = self.gate(x, layers)
                x = gate * x + (1 - gate) * query     # gated residual connection
                mask = self.attention_mask(gate)      # for the masked self-attention
                gate_logits.append(logits)
                gate_soft.append(soft)
            x = layer.self_attention(x, query_pos, mask)
            x = layer.feed_forward(x)
            outputs.append(self.decoder_norm(x))
        state = self.next_state(x, outputs[-1], state)
        return (outputs, gate_logits, gate_soft if self.training else []), state

    def gate(self, x: Tensor, layers: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Decide which queries x (S, Q, C) the clip updates.

        Returns the gates (S, Q, 1), 1 = open and 0 = closed, their logits (S, Q), and in training
        the soft gates (S, Q).

        In training, gates are sampled with the Gumbel-sigmoid and have the gradient of the soft
        gates (straight-through). The gates of the last of the L detector layers serve all layers,
        because it is the only one at inference.
        """
        logits = self.gate_proj(self.decoder_norm(x)).squeeze(-1)
        # The noise needs float32: in 16 bit it is not logistic.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not self.training:
            return (logits >= 0).to(x.dtype)[..., None], logits, None
        soft = torch.sigmoid((logits + logistic_noise(logits)) / GUMBEL_TEMPERATURE)
        hard = ((soft >= 0.5).to(soft.dtype) - soft).detach() + soft
        last = hard.unflatten(0, (layers, -1))[-1]                          # (B, Q)
        return last.repeat(layers, 1)[..., None].to(x.dtype), logits, soft

    def attention_mask(self, gate: Tensor) -> Tensor:
        """Self-attention mask (S, 1, Q, Q) of gates (S, Q, 1): rows of closed queries.

        "blocked" is the paper's masked self-attention: a closed query attends only to itself.
        "additive" is the released code and the default, because all released checkpoints were
        trained with it: its mask is float, so attention adds it to the logits, and a closed query
        attends to the others slightly more (logits + 1).
        """
        closed = (gate == 0)[:, None]                                       # (S, 1, Q, 1)
        others = ~torch.eye(gate.shape[1], dtype=torch.bool, device=gate.device)
        mask = closed & others
        return mask if self.gate_mask == "blocked" else mask.to(gate.dtype)

    def add_query_noise(self, query: Tensor) -> Tensor:
        """Mix queries (S, Q, C) with random others of their stream, with weight up to 1/2.

        The noise of DVIS (arXiv 2306.03413), section 3.3, weighted averaging; not in GRAtt-VIS.
        """
        other = query[:, torch.randperm(query.shape[1], device=query.device)]
        weight = torch.rand(*query.shape[:2], 1, device=query.device, dtype=query.dtype) / 2
        noisy = torch.rand_like(weight) < self.query_noise
        return torch.where(noisy, query + weight * (other - query), query)

    def read_memory(self, state: TrackerState) -> Tensor:
        """GenVIS: each query attends to its own past, without scaling. Returns (S, Q, C)."""
        query = state.query
        output = query + self.query_value(query)
        if state.memory_key is None:
            return output
        logits = torch.einsum("sqc,smqc->smq", self.query_key(query), state.memory_key)
        return output + torch.einsum("smq,smqc->sqc", logits.softmax(1), state.memory_value)

    def next_state(self, x: Tensor, output: Tensor, state: TrackerState) -> TrackerState:
        """Propagate the queries x of the last layer; append its normed output to the memory."""
        if not self.use_memory:
            return TrackerState(x)
        key, value = self.memory_key(output)[:, None], self.memory_value(output)[:, None]
        if state.memory_key is not None:
            key = torch.cat((state.memory_key, key), 1)
            value = torch.cat((state.memory_value, value), 1)
        return TrackerState(x, key, value)

    def encode(self, frame_queries: Tensor) -> Tensor:
        """Self-attention among the frame queries (N, T, F, C) of each of N clips; same shape."""
        x = self.input_proj(frame_queries)
        if self.window:
            return self.encode_in_windows(x)
        tokens = x.flatten(1, 2)
        for layer in self.encoder:
            tokens = layer(tokens)
        return tokens.view(x.shape)

    def encode_in_windows(self, x: Tensor) -> Tensor:
        """VITA: layers alternate between plain windows of W frames and windows shifted by W / 2.

        As upstream, windows are not shifted in training.
        """
        frames, window = x.shape[1], self.window
        x = F.pad(x, (0, 0, 0, 0, 0, -frames % window))                     # (N, T', F, C)
        is_padding = torch.arange(x.shape[1], device=x.device) >= frames    # (T')
        blocked = is_padding.expand(len(is_padding), -1)                    # (T', T'), columns
        shift = math.ceil(window / 2)
        for index, layer in enumerate(self.encoder):
            if index % 2 == 1 and not self.training:
                x = x.roll(shift, 1)
                x = self.attend_in_windows(layer, x, self.shifted_mask(is_padding, shift))
                x = x.roll(-shift, 1)
            else:
                x = self.attend_in_windows(layer, x, blocked)
        return x[:, :frames]

    def shifted_mask(self, is_padding: Tensor, shift: int) -> Tensor:
        """Pairs of frames that must not attend to each other after the roll: bool (T', T')."""
        is_padding = is_padding.roll(shift)
        wrapped = torch.arange(len(is_padding), device=is_padding.device) < shift
        return is_padding[:, None] | is_padding | (wrapped[:, None] != wrapped)

    def attend_in_windows(self, layer: nn.Module, x: Tensor, blocked: Tensor) -> Tensor:
        """Apply an encoder layer to windows of W frames of x (N, T', F, C).

        blocked: bool (T', T'), of which pairs inside a window are used. The mask is additive and
        finite, because a window of padding would be blocked completely, which gives NaN.
        """
        clips, frames, frame_queries, channels = x.shape
        window, windows = self.window, frames // self.window
        blocked = blocked.reshape(windows, window, windows, window)
        blocked = blocked.diagonal(dim1=0, dim2=2).permute(2, 0, 1)         # (windows, W, W)
        mask = blocked.to(x.dtype) * MASKED_LOGIT
        mask = mask.repeat_interleave(frame_queries, 1).repeat_interleave(frame_queries, 2)
        x = x.reshape(clips * windows, window * frame_queries, channels)
        x = layer(x, mask.repeat(clips, 1, 1)[:, None])
        return x.view(clips, frames, frame_queries, channels)


class EncoderLayer(nn.Module):
    """Self-attention of frame queries, without positions, and a feed-forward block."""

    def __init__(self, channels: int, heads: int, feed_forward: int):
        super().__init__()
        self.self_attention = SelfAttention(channels, heads)
        self.feed_forward = FeedForward(channels, feed_forward)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.feed_forward(self.self_attention(x, mask=mask))


class DecoderLayer(nn.Module):
    """The blocks of a decoder layer. It has no forward: `Tracker.decode_clip` calls them."""

    def __init__(self, channels: int, heads: int, feed_forward: int):
        super().__init__()
        self.cross_attention = CrossAttention(channels, heads)
        self.self_attention = SelfAttention(channels, heads)
        self.feed_forward = FeedForward(channels, feed_forward)
