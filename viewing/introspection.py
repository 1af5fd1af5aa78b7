"""Attention weights, sampling points and gate logits of a model, recorded with forward hooks.

    with record_attention(model) as record:
        model.segment_video(frames)
    record.weights["tracker.decoder.0.cross_attention.attention"]     # a list, one entry per call

Any forward hook works in the same way. Modules of a compiled model call hooks within
torch.compiler.set_stance("force_eager").
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from deform_attn import DeformableAttention, sampling_locations
from model import GRAttVIS
from tracker import Tracker
from transformer import Attention


@dataclass
class AttentionRecord:
    """What `record_attention` collects, on the CPU.

    Keys are module names; a list has one entry per call of the module. The tracker's decoder is
    called clip by clip, so its entries are clips. The detector and the tracker's encoder may be
    called with several frames at once (N), as on a GPU, where the last frame of a video is repeated
    to fill up a batch: entries past the last frame are such copies.
    """

    weights: dict[str, list[Tensor]]  # of Attention: (N, heads, queries, keys); rows sum to 1
    sampling: dict[str, list[tuple[Tensor, Tensor]]]  # of DeformableAttention: `sampling_locations`
    gate_logits: list[Tensor]  # of each clip: (D, L, B, Q), open where >= 0; empty without gates


@contextmanager
def record_attention(model: GRAttVIS, within: str = "") -> Iterator[AttentionRecord]:
    """Record all attention of the model while the context is active.

    within: prefix of the modules to record, such as "tracker" or "frame_decoder.layers.0". All
    modules of a long video may not fit into memory. Gates are recorded with the tracker ("tracker"
    or ""). ValueError if there is nothing to record.

    Compiled functions do not call hooks, so compilation is disabled meanwhile. (CUDA graphs are not
    used while a model has hooks.) Results of the model do not change, up to rounding.
    """
    record = AttentionRecord(defaultdict(list), defaultdict(list), [])
    handles = []
    for name, module in model.named_modules():
        if name.startswith(within):
            for kind, hook in HOOKS.items():
                if isinstance(module, kind):
                    handles.append(module.register_forward_hook(partial(hook, record, name)))
    if not handles:
        raise ValueError(f"the model has no attention in modules that start with {within!r}")
    try:
        with model.cuda_graphs.disabled(), torch.compiler.set_stance("force_eager"):
            yield record
    finally:
        for handle in handles:
            handle.remove()
        record.weights = dict(record.weights)  # a wrong name is a KeyError from now on
        record.sampling = dict(record.sampling)


def pixel_maps(weights: Tensor, frame_size: tuple[int, int]) -> Tensor:
    """Cross-attention (N, heads, F, pixels) of a frame decoder layer as maps (N, heads, F, h, w).

    A layer attends to the map of stride 32, 16 or 8 of the padded frame. frame_size: height and
    width of the frame that went into the model.
    """
    height, width = (math.ceil(side / 32) for side in frame_size)  # at stride 32
    scale = math.isqrt(weights.shape[3] // (height * width))
    return weights.unflatten(3, (scale * height, scale * width))


@torch.no_grad()
def attention_weights(
    attention: Attention, query: Tensor, key: Tensor, mask: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(C / heads) + mask): (N, heads, queries, keys), rows of which sum to 1.

    Arguments as for `Attention.forward`, which never holds this matrix.
    """
    q, k, _ = attention.project(query, key, key)
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is None:
        return logits.softmax(-1)
    if mask.dtype == torch.bool:
        return logits.masked_fill(mask, -math.inf).softmax(-1)
    return (logits + mask).softmax(-1)


def record_weights(
    record: AttentionRecord, name: str, module: Attention, inputs: tuple, output: Tensor
) -> None:
    query, key, _, mask = inputs
    record.weights[name].append(attention_weights(module, query, key, mask).cpu())


@torch.no_grad()
def record_sampling(
    record: AttentionRecord, name: str, module: DeformableAttention, inputs: tuple, output: Tensor
) -> None:
    query, _, level_shapes = inputs
    offsets, logits = module.project(query)
    dtype = torch.promote_types(offsets.dtype, torch.float32)
    locations, weights = sampling_locations(level_shapes, offsets.to(dtype), logits.to(dtype))
    record.sampling[name].append((locations.cpu(), weights.cpu()))


def record_gates(
    record: AttentionRecord, name: str, module: Tracker, inputs: tuple, output: tuple
) -> None:
    predictions, _ = output
    for prediction in predictions:
        if prediction.gate_logits:
            record.gate_logits.append(torch.stack(prediction.gate_logits).detach().cpu())


HOOKS = {Attention: record_weights, DeformableAttention: record_sampling, Tracker: record_gates}
