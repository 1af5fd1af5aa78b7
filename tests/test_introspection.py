"""What `record_attention` returns, and that the model is as before afterwards."""

import math
from functools import cache

import pytest
import torch

from deform_attn import DeformableAttention
from model import build_model
from test_detector import randomised
from transformer import Attention
from viewing.introspection import pixel_maps, record_attention

pytestmark = pytest.mark.usefixtures("four_convolutions")
SIZE = dict(
    backbone="four_convolutions",
    channels=32,
    heads=2,
    queries=4,
    frame_queries=5,
    pixel_layers=2,
    frame_layers=3,
    pixel_feed_forward=24,
    tracker_encoder_layers=2,
    tracker_decoder_layers=2,
    feed_forward=24,
)


@cache
def make_model(propagation="gated", **options):
    """Shared: recording leaves a model as it was."""
    torch.manual_seed(0)
    return randomised(build_model("toy", 3, propagation, **SIZE, **options).double().eval())


def make_frames(count=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 40, 56), dtype=torch.uint8, generator=generator)


def assert_distributions(weights):
    """Along the last dimension: positive, with sum 1."""
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_every_layer_and_frame_is_recorded():
    model, frames = make_model(), make_frames()
    expected = model.segment_video(frames)
    with record_attention(model) as record:
        found = model.segment_video(frames)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.masks, expected.masks)

    names = {name for name, module in model.named_modules() if isinstance(module, Attention)}
    assert record.weights.keys() == names and len(names) == 2 * 3 + 2 + 2 * 2
    shapes = {
        "frame_decoder.layers.0.cross_attention.attention": (1, 2, 5, 4),
        "frame_decoder.layers.2.cross_attention.attention": (1, 2, 5, 64),
        "tracker.encoder.1.self_attention.attention": (1, 2, 5, 5),
        "tracker.decoder.0.cross_attention.attention": (1, 2, 4, 5),
        "tracker.decoder.1.self_attention.attention": (1, 2, 4, 4),
    }
    for name, calls in record.weights.items():
        assert len(calls) == len(frames)
        for weights in calls:
            assert weights.shape == shapes.get(name, weights.shape)
            assert_distributions(weights)

    names = {
        name for name, module in model.named_modules() if isinstance(module, DeformableAttention)
    }
    assert record.sampling.keys() == names and len(names) == 2
    for calls in record.sampling.values():
        assert len(calls) == len(frames)
        for locations, weights in calls:
            assert locations.shape == (1, 84, 2, 3, 4, 2) and weights.shape == (1, 84, 2, 3, 4)
            assert_distributions(weights.flatten(3))


def test_weights_are_a_softmax_by_hand():
    """The tracker's self-attention, with the mask of its gates, from hooks of our own."""
    model, frames, layer, entered = make_model(), make_frames(2), 1, []
    attention = model.tracker.decoder[layer].self_attention
    hook = attention.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    with record_attention(model, "tracker.decoder") as record:
        model.segment_video(frames)
    hook.remove()
    assert all(name.startswith("tracker.decoder") for name in record.weights)
    assert not record.sampling and not record.gate_logits
    with record_attention(model, "tracker") as record:
        model.segment_video(frames)
    weights = attention.attention
    for frame in range(2):
        closed = record.gate_logits[frame][layer, 0, 0] < 0
        x = entered[frame][0] + model.tracker.query_embed.weight
        q, k, _ = (
            x @ part.T + bias
            for part, bias in zip(weights.in_proj_weight.chunk(3), weights.in_proj_bias.chunk(3))
        )
        for head, part in enumerate((slice(0, 16), slice(16, 32))):
            logits = q[:, part] @ k[:, part].T / math.sqrt(16)
            logits = logits + closed[:, None] * (1 - torch.eye(4))
            found = record.weights[f"tracker.decoder.{layer}.self_attention.attention"][frame]
            torch.testing.assert_close(found[0, head], logits.exp() / logits.exp().sum(1)[:, None])


@pytest.mark.parametrize("propagation", ["gated", "memory"])
def test_gate_logits(propagation):
    """Those of every decoder layer, by frame; their signs are the gates that `step` returns."""
    model, frames, state = make_model(propagation), make_frames(), None
    with record_attention(model, "tracker") as record:
        for number, frame in enumerate(frames):
            tracks, state = model.step(frame, state, top_k=1000)
            if propagation == "gated":
                logits = record.gate_logits[number]
                assert logits.shape == (2, 1, 1, 4)
                assert torch.equal(logits[:, 0, 0, tracks.track_ids] >= 0, tracks.gates.T)
    assert len(record.gate_logits) == (len(frames) if propagation == "gated" else 0)


def test_nothing_stays_behind():
    """After an error, too."""
    model = make_model()
    with pytest.raises(ZeroDivisionError), record_attention(model):
        assert not model.cuda_graphs.enabled
        1 / 0
    assert model.cuda_graphs.enabled
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.slow
def test_a_compiled_model_is_recorded(monkeypatch):
    """Compiled functions call no hooks that were added after compilation."""
    model, frames = make_model(), make_frames(2)
    with record_attention(model) as record:
        model.segment_video(frames)
    for owner, name in (
        (model.tracker, "encode"),
        (model.tracker, "decode_clip"),
        (model, "decode"),
    ):
        monkeypatch.setattr(owner, name, torch.compile(getattr(owner, name), backend="eager"))
    logits = model.segment_video(frames).logits
    with record_attention(model) as compiled:
        assert torch.equal(model.segment_video(frames).logits, logits)
    assert compiled.weights.keys() == record.weights.keys()
    for name, calls in record.weights.items():
        torch.testing.assert_close(compiled.weights[name], calls)


def test_only_modules_under_the_prefix_are_recorded():
    """ "tracker" is a prefix, and not just any part of a name; a wrong one is told."""
    model, frames = make_model(), make_frames(1)
    with pytest.raises(
        ValueError, match="no attention in modules that start with 'cross_attention'"
    ):
        with record_attention(model, "cross_attention"):
            pass
    with record_attention(model, "tracker.decoder.0") as record:
        model.segment_video(frames)
    assert record.weights and all(name.startswith("tracker.decoder.0") for name in record.weights)
    with pytest.raises(KeyError):
        record.weights["tracker.decoder.0.cross_attention"]  # .attention is missing


def test_pixel_maps():
    """Each row of weights is a map of the level that its layer attends to."""
    model, frames = make_model(), make_frames(2)
    with record_attention(model, "frame_decoder") as record:
        model.segment_video(frames)
    height, width = frames.shape[-2:]
    for layer, stride in zip(range(3), (32, 16, 8)):
        weights = record.weights[f"frame_decoder.layers.{layer}.cross_attention.attention"][0]
        maps = pixel_maps(weights, (height, width))
        assert maps.shape[-2:] == (-(-height // 32) * 32 // stride, -(-width // 32) * 32 // stride)
        torch.testing.assert_close(maps.sum((3, 4)), torch.ones_like(maps[..., 0, 0]))


def test_gates_of_several_clips():
    """One entry for each clip of a call of the tracker."""
    model = make_model()
    queries = torch.randn(1, 1, 3, 1, 5, 32).double()  # (L, B, G, U, F, C)
    with record_attention(model, "tracker") as record:
        predictions, _ = model.tracker(queries)
    for gates, prediction in zip(record.gate_logits, predictions, strict=True):
        assert torch.equal(gates, torch.stack(prediction.gate_logits))


def test_masked_keys_have_no_weight():
    """In the frame decoder, and between closed queries in the tracker."""
    model, frames, masks = make_model(gate_mask="blocked"), make_frames(), {}
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: masks.setdefault(name, []).append(inputs[3])
        )
        for name, module in model.named_modules()
        if isinstance(module, Attention)
    ]
    with record_attention(model) as record:
        model.segment_video(frames)
    for hook in hooks:
        hook.remove()
    blocked = 0
    for name, calls in record.weights.items():
        for weights, mask in zip(calls, masks[name], strict=True):
            if mask is not None:
                mask = mask.expand_as(weights)
                assert (weights[mask] == 0).all()
                blocked += mask.sum()
    assert blocked > 0
