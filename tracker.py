"""The tracker: instance queries propagated from clip to clip through a gate (the GRAtt block).

Paper: GRAtt-VIS (arXiv 2305.17096), method section. Upstream: grattvis/modeling/grattvis.py,
grattvis/modeling/gumble_softmax.py and vita/modeling/transformer_decoder/vita.py. Shape letters are
declared in model.py.

`Tracker.decode_clip` is the paper's method. q are the queries at the start of a clip: those
propagated from the previous clip or, with a memory, what `read_memory` makes of them. x are the
queries on their way through the decoder layers; x = q before the first one.

    cross-attention              x = CrossAttention(x, frame queries of the clip)
    gate                         g = 1[Linear(norm(x)) >= 0]      Gumbel-sigmoid in training
    gated residual connection    x = g * x + (1 - g) * q
    masked self-attention        x = SelfAttention(x, mask(g))
    feed-forward                 x = FeedForward(x)

A closed gate (g = 0) sends a query back to q: what it has read from the clip so far is dropped. It
does not freeze the query, because self-attention and feed-forward follow in every layer.

Propagation modes:
    "gated"         GRAtt-VIS: a gate decides which queries keep what they read from the clip
    "memory"        GenVIS: no gate; queries attend to a memory of their own past
    "gated+memory"  both, as in most official recipes of GRAtt-VIS
    "plain"         neither: the output queries of a clip are the input queries of the next
    "clip"          VITA: no propagation; the clip is the whole video
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer import (
    MLP,
    CrossAttention,
    FeedForward,
    SelfAttention,
    full_precision,
    mask_kernel,
)

# A mode with "gated" in its name has gates, one with "memory" a memory.
PROPAGATIONS = (
    "gated",
    "plain",
    "memory",
    "gated+memory",
    "clip",
)
GATE_MASKS = ("additive", "blocked")
GUMBEL_TEMPERATURE = 0.66667
MASKED_LOGIT = -1000.0  # finite, so that a row of masked logits has a softmax


class EncoderLayer(nn.Module):
    """Self-attention of frame queries, without positions, and a feed-forward block."""

    def __init__(self, channels: int, heads: int, feed_forward: int):
        super().__init__()
        self.self_attention = SelfAttention(channels, heads)
        self.feed_forward = FeedForward(channels, feed_forward)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.self_attention(x, mask=mask)
        return self.feed_forward(x)


class DecoderLayer(nn.Module):
    """The blocks of a decoder layer. It has no forward: `Tracker.decode_clip` calls them."""

    def __init__(self, channels: int, heads: int, feed_forward: int):
        super().__init__()
        self.cross_attention = CrossAttention(channels, heads)
        self.self_attention = SelfAttention(channels, heads)
        self.feed_forward = FeedForward(channels, feed_forward)


@dataclass
class TrackerState:
    """What one clip passes to the next. Its size is constant, except with a memory.

    Nothing is detached: gradients flow back through all clips.
    """

    query: Tensor  # (S, Q, C), output of the last layer before decoder_norm
    past_keys: Tensor | None = None  # (S, past clips, Q, C), the memory
    past_values: Tensor | None = None


@dataclass
class ClipPrediction:
    """Predictions for one clip.

    Lists run over the D decoder layers. Outside of training, logits and mask_kernel have one entry,
    that of the last layer.
    """

    logits: list[Tensor]  # (L, B, Q, K + 1)
    mask_kernel: list[Tensor]  # (L, B, Q, C + 1), see transformer.mask_kernel
    clip_embed: Tensor  # (L, B, Q, C), similarity embedding of the queries
    frame_embed: Tensor  # (L, B, U, F, C), similarity embedding of the frame queries
    gate_logits: list[Tensor]  # (L, B, Q); empty without gates
    gate_soft: list[Tensor]  # (L, B, Q) in 0..1, sampled; empty outside of training


class Tracker(nn.Module):
    """Maps the frame queries of clips to class logits and mask kernels of instance queries.

    window: 0 = the frame queries of a clip attend to each other; otherwise within windows of so
        many frames (VITA).
    query_noise: probability in training that a query propagated from an earlier clip is perturbed
        (DVIS).
    """

    def __init__(
        self,
        num_classes: int,
        channels: int = 256,
        queries: int = 100,
        frame_queries: int = 100,
        encoder_layers: int = 6,
        decoder_layers: int = 3,
        heads: int = 8,
        feed_forward: int = 2048,
        propagation: str = "gated",
        gate_mask: str = "additive",
        window: int = 0,
        query_noise: float = 0.0,
    ):
        super().__init__()
        if propagation not in PROPAGATIONS:
            raise ValueError(
                f"unknown propagation {propagation!r}: choose one of {', '.join(PROPAGATIONS)}"
            )
        if gate_mask not in GATE_MASKS:
            raise ValueError(
                f"unknown gate mask {gate_mask!r}: choose one of {', '.join(GATE_MASKS)}"
            )
        self.propagation = propagation
        self.gate_mask = gate_mask
        self.window = window
        self.query_noise = query_noise
        self.gated = "gated" in propagation
        self.use_memory = "memory" in propagation

        self.input_proj = nn.Linear(channels, channels)
        self.encoder = nn.ModuleList(
            EncoderLayer(channels, heads, feed_forward) for _ in range(encoder_layers)
        )
        self.decoder = nn.ModuleList(
            DecoderLayer(channels, heads, feed_forward) for _ in range(decoder_layers)
        )
        self.decoder_norm = nn.LayerNorm(channels)
        self.query_feat = nn.Embedding(queries, channels)  # the queries of the first clip
        self.query_embed = nn.Embedding(queries, channels)  # positions of queries
        self.frame_query_embed = nn.Embedding(frame_queries, channels)  # of frame queries
        # A layer, never called, named as in checkpoints: `mask_kernel` reads its W and b.
        self.mask_features = nn.Conv2d(channels, channels, 1)
        self.class_embed = nn.Linear(channels, num_classes + 1)  # class logits
        self.mask_embed = MLP(channels)  # mask embeddings
        self.frame_similarity = nn.Linear(channels, channels)  # similarity embeddings
        self.clip_similarity = nn.Linear(channels, channels)
        if self.gated:
            self.gate_proj = nn.Linear(channels, 1)  # shared by all layers
        if self.use_memory:
            self.memory_key = nn.Linear(channels, channels)
            self.memory_value = nn.Linear(channels, channels)
            self.query_key = nn.Linear(channels, channels)
            self.query_value = nn.Linear(channels, channels)

    def initial_state(self, streams: int) -> TrackerState:
        """State before the first clip: the learned queries and an empty memory."""
        return TrackerState(self.query_feat.weight.expand(streams, -1, -1))

    def forward(
        self, frame_queries: Tensor, state: TrackerState | None = None
    ) -> tuple[list[ClipPrediction], TrackerState]:
        """Track G consecutive clips: frame_queries (L, B, G, U, F, C).

        state: what was returned for the clips before; None at the start of a video.

        Returns the predictions for each clip, and the state after the last one.
        """
        detector_layers, batch, clips = frame_queries.shape[:3]
        streams = detector_layers, batch  # S = L * B
        # Speed: the encoder and the heads, in which clips do not meet, take all clips at once.
        encoded = self.encode(frame_queries.movedim(2, 0).flatten(0, 2))  # (G * S, U, F, C)
        outputs, gate_logits, gate_soft = [], [], []
        for encoded_clip in encoded.flatten(1, 2).chunk(clips):  # (S, U * F, C)
            if state is None:
                state = self.initial_state(detector_layers * batch)
            elif self.training and self.query_noise:
                state = replace(state, query=self.add_query_noise(state.query))
            layer_outputs, layer_gate_logits, layer_gate_soft, state = self.decode_clip(
                encoded_clip, state, detector_layers
            )
            outputs += layer_outputs
            gate_logits.append(layer_gate_logits)
            gate_soft.append(layer_gate_soft)

        # (G * D, S, Q, C) -> (G, D, L, B, Q, C)
        outputs = torch.stack(outputs).unflatten(1, streams).unflatten(0, (clips, -1))
        clip_embed = self.clip_similarity(outputs[:, -1])  # (G, L, B, Q, C)
        frame_embed = self.frame_similarity(encoded).unflatten(0, (clips, *streams))
        if not self.training:
            outputs = outputs[:, -1:]  # the last decoder layer
        class_logits = self.class_embed(outputs)  # (G, D, L, B, Q, K + 1)
        kernels = mask_kernel(self.mask_embed(outputs), self.mask_features)
        predictions = [
            ClipPrediction(
                logits=list(class_logits[clip]),
                mask_kernel=list(kernels[clip]),
                clip_embed=clip_embed[clip],
                frame_embed=frame_embed[clip],
                gate_logits=[layer.unflatten(0, streams) for layer in gate_logits[clip]],
                gate_soft=[layer.unflatten(0, streams) for layer in gate_soft[clip]],
            )
            for clip in range(clips)
        ]
        return predictions, state

    def decode_clip(
        self, encoded_clip: Tensor, state: TrackerState, detector_layers: int
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], TrackerState]:
        """Update the instance queries with one clip.

        encoded_clip: encoded frame queries (S, U * F, C). detector_layers: L.

        Returns three lists over the decoder layers and the next state: normed queries (S, Q, C),
        from which all predictions are made; gate logits and soft gates (S, Q), see `gate`.
        """
        query_pos = self.query_embed.weight
        frames = encoded_clip.shape[1] // len(self.frame_query_embed.weight)
        frame_query_pos = self.frame_query_embed.weight.repeat(frames, 1)  # (U * F, C)
        key = encoded_clip + frame_query_pos  # not added to values
        query = self.read_memory(state) if self.use_memory else state.query
        x, mask = query, None
        outputs, gate_logits, gate_soft = [], [], []
        for layer in self.decoder:
            x = layer.cross_attention(x, query_pos, key, encoded_clip)
            if self.gated:
                gate, logits, soft = self.gate(x, detector_layers)
                x = gate * x + (1 - gate) * query  # gated residual connection
                mask = self.attention_mask(gate)  # for the masked self-attention
                gate_logits.append(logits)
                if self.training:
                    gate_soft.append(soft)
            x = layer.self_attention(x, query_pos, mask)
            x = layer.feed_forward(x)
            outputs.append(self.decoder_norm(x))
        state = self.next_state(x, outputs[-1], state)
        return outputs, gate_logits, gate_soft, state

    def gate(self, x: Tensor, detector_layers: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Decide which queries x (S, Q, C) keep what they have read from the clip.

        Returns the gates (S, Q, 1), 1 = open and 0 = closed, their logits (S, Q), and in training
        the soft gates (S, Q).

        In training, gates are sampled with the Gumbel-sigmoid; the gradient is that of the soft
        gates (straight-through). The gates of the last detector layer, the only one at inference,
        are applied to the streams of all L layers. Gate logits of the other layers therefore get no
        gradient through the gates.
        """
        logits = self.gate_proj(self.decoder_norm(x)).squeeze(-1)
        logits = full_precision(logits)  # in 16 bit, the noise would not be logistic
        if not self.training:
            gate = (logits >= 0).to(x.dtype)
            return gate[..., None], logits, None
        soft = torch.sigmoid((logits + logistic_noise(logits)) / GUMBEL_TEMPERATURE)
        hard = (soft >= 0.5).to(soft.dtype)
        gate = (hard - soft).detach() + soft  # straight-through
        last_layer = gate.chunk(detector_layers)[-1]  # (B, Q)
        gate = last_layer.repeat(detector_layers, 1).to(x.dtype)  # (S, Q)
        return gate[..., None], logits, soft

    def attention_mask(self, gate: Tensor) -> Tensor:
        """Self-attention mask (S, 1, Q, Q) of gates (S, Q, 1); they get no gradient through it.

        "additive", the default, is the released code, and all released checkpoints were trained
            with it: it adds 1 to the logits of a closed query's row, except its own. So a closed
            query attends slightly more to the others.
        "blocked" is the paper's masked self-attention: a closed query attends only to itself.

        The released code passes a float mask, which attention adds; a bool mask would block.
        """
        is_closed = (gate == 0)[:, None]  # (S, 1, Q, 1), rows
        is_other = ~torch.eye(gate.shape[1], dtype=torch.bool, device=gate.device)
        mask = is_closed & is_other
        return mask if self.gate_mask == "blocked" else mask.to(gate.dtype)

    def read_memory(self, state: TrackerState) -> Tensor:
        """GenVIS: each query q attends to its own past, without scaling. Returns (S, Q, C).

        q + query_value(q) + sum over past clips m of softmax_m(query_key(q) . key_m) value_m
        """
        query = state.query
        output = query + self.query_value(query)
        if state.past_keys is None:
            return output
        logits = torch.einsum("sqc,smqc->smq", self.query_key(query), state.past_keys)
        return output + torch.einsum("smq,smqc->sqc", logits.softmax(1), state.past_values)

    def next_state(self, x: Tensor, output: Tensor, state: TrackerState) -> TrackerState:
        """Propagate the queries x of the last layer; append its normed output to the memory."""
        if not self.use_memory:
            return TrackerState(x)
        keys = self.memory_key(output)[:, None]
        values = self.memory_value(output)[:, None]
        if state.past_keys is not None:
            keys = torch.cat((state.past_keys, keys), 1)
            values = torch.cat((state.past_values, values), 1)
        return TrackerState(x, keys, values)

    # The encoder. Here N = G * S: the clips of all streams are a batch.

    def encode(self, frame_queries: Tensor) -> Tensor:
        """Self-attention among the frame queries (N, U, F, C) of each clip; same shape."""
        x = self.input_proj(frame_queries)
        if self.window:
            return self.encode_in_windows(x)
        tokens = x.flatten(1, 2)
        for layer in self.encoder:
            tokens = layer(tokens)
        return tokens.view(x.shape)

    def encode_in_windows(self, x: Tensor) -> Tensor:
        """VITA: every other layer has its windows shifted by half a window.

        The last window is filled with frames of zeros, which no frame attends to. As upstream,
        windows are not shifted in training.
        """
        frames, window = x.shape[1], self.window
        x = F.pad(x, (0, 0, 0, 0, 0, -frames % window))  # (N, U', F, C)
        is_padding = torch.arange(x.shape[1], device=x.device) >= frames  # (U')
        blocked = is_padding.expand(len(is_padding), -1)  # (U', U')
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
        """Pairs of frames that must not attend to each other after the roll: bool (U', U')."""
        is_padding = is_padding.roll(shift)
        wrapped = torch.arange(len(is_padding), device=is_padding.device) < shift
        return is_padding[:, None] | is_padding | (wrapped[:, None] != wrapped)

    def attend_in_windows(self, layer: EncoderLayer, x: Tensor, blocked: Tensor) -> Tensor:
        """Apply an encoder layer to each window of the frames of x (N, U', F, C).

        blocked: bool (U', U'), of which pairs inside a window are used. The mask is additive and
        finite, because a window of padding would be blocked completely, which gives NaN.
        """
        clips, frames, frame_queries, channels = x.shape
        window, windows = self.window, frames // self.window
        # Pairs within one window are the blocks on the diagonal: (windows, window, window).
        blocks = blocked.reshape(windows, window, windows, window)
        blocks = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        mask = blocks.to(x.dtype) * MASKED_LOGIT
        mask = mask.repeat_interleave(frame_queries, 1).repeat_interleave(frame_queries, 2)
        x = x.reshape(clips * windows, window * frame_queries, channels)
        x = layer(x, mask.repeat(clips, 1, 1)[:, None])
        return x.view(clips, frames, frame_queries, channels)

    # Noise in training

    def add_query_noise(self, query: Tensor) -> Tensor:
        """Mix queries (S, Q, C) with random others of their stream, with weight up to 1/2.

        The noise of DVIS (arXiv 2306.03413), section 3.3, weighted averaging; not in GRAtt-VIS.
        """
        other = query[:, torch.randperm(query.shape[1], device=query.device)]
        weight = torch.rand(*query.shape[:2], 1, device=query.device, dtype=query.dtype) / 2
        is_noisy = torch.rand_like(weight) < self.query_noise
        return torch.where(is_noisy, query + weight * (other - query), query)


def logistic_noise(logits: Tensor) -> Tensor:
    """Difference of two Gumbel samples, drawn as log(u) - log(1 - u)."""
    uniform = torch.rand_like(logits)
    return torch.log(uniform + 1e-8) - torch.log(1 - uniform + 1e-8)
