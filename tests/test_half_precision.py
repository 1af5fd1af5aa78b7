"""Weights and activations in 16 bit, against autocast of the plain modules."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fast.half_precision import (
    HalfAttention,
    HalfLinear,
    LinearReLU,
    cast_once,
    cast_weights,
    fuse_relu,
)
from transformer import Attention, CrossAttention, FeedForward, SelfAttention

CHANNELS, HEADS = 12, 3


def test_weights_cast_once():
    """Those of products, in place; norms and embeddings stay as they are."""
    block = nn.ModuleList(
        [
            SelfAttention(CHANNELS, HEADS),
            FeedForward(CHANNELS, 8),
            nn.Conv2d(3, 4, 1),
            nn.Embedding(2, 3),
        ]
    )
    cast_weights(block.modules(), torch.bfloat16)
    kept = {
        name for name, parameter in block.named_parameters() if parameter.dtype == torch.float32
    }
    assert kept == {"0.norm.weight", "0.norm.bias", "1.norm.weight", "1.norm.bias", "3.weight"}


@pytest.mark.parametrize("gradients", [False, True])
def test_a_fused_activation_changes_nothing(gradients):
    """The first layer of a feed-forward block applies it; hooks, names and copies are as before."""
    torch.manual_seed(0)
    plain, x = FeedForward(CHANNELS, 20), torch.randn(2, 5, CHANNELS)
    fused, called = copy.deepcopy(plain), []
    fused.linear1.register_forward_hook(lambda *call: called.append(call))
    fuse_relu(fused)
    with torch.set_grad_enabled(gradients):
        for block in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(plain))):
            assert torch.equal(block(x), plain(x))
    assert called and isinstance(fused.linear1, LinearReLU)
    assert all(map(torch.equal, fused.state_dict().values(), plain.state_dict().values()))
    assert fused.state_dict().keys() == plain.state_dict().keys()


def test_another_activation_is_kept():
    block = FeedForward(CHANNELS, 20)
    block.activation = nn.GELU()
    fuse_relu(block)
    assert type(block.linear1) is nn.Linear and type(block.activation) is nn.GELU


@torch.no_grad()
def test_results_are_those_of_autocast():
    """Blocks in a row, so that casts are remembered; inputs that are equal, or not."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(
        [
            SelfAttention(CHANNELS, HEADS),
            CrossAttention(CHANNELS, HEADS),
            FeedForward(CHANNELS, 20),
            nn.Linear(CHANNELS, 5),
        ]
    )
    half = copy.deepcopy(blocks)
    cast_weights(half.modules(), torch.bfloat16)
    assert type(half[0].attention) is HalfAttention and type(half[3]) is HalfLinear
    tokens, value = torch.randn(2, 7, CHANNELS), torch.randn(2, 9, CHANNELS)
    positions = torch.randn(7, CHANNELS)

    def run(attend, cross, feed, linear):
        x = attend(tokens)
        x = attend(x, positions)
        x = cross(x, positions, value + 1, value)
        return linear(feed(x))

    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(*half), run(*blocks), rtol=0.02, atol=0.02)
    # In one dtype, without autocast.
    exact = copy.deepcopy(blocks).double()
    for module in exact.modules():
        if type(module) is Attention:
            module.__class__ = HalfAttention
    tokens, value, positions = tokens.double(), value.double(), positions.double()
    torch.testing.assert_close(run(*exact), run(*blocks.double()))


@torch.no_grad()
def test_a_cast_is_made_once():
    x = torch.randn(3, 4)
    first = cast_once(x, torch.bfloat16)
    assert torch.equal(first, x.bfloat16())
    assert cast_once(x, torch.bfloat16) is first
    assert torch.equal(cast_once(x, torch.float16), x.half())
    first = cast_once(x, torch.bfloat16)
    x += 1  # another value
    assert torch.equal(cast_once(x, torch.bfloat16), x.bfloat16())
    assert cast_once(first, torch.bfloat16) is first


def test_casts_that_are_not_remembered():
    """Those with gradients, of parameters, and of tensors whose changes are not counted."""
    x = torch.randn(3, requires_grad=True)
    assert cast_once(x, torch.bfloat16).requires_grad
    with torch.no_grad():
        weight = nn.Parameter(torch.randn(3))
        cast_once(weight, torch.bfloat16)
        weight.data = torch.ones(3)
        assert cast_once(weight, torch.bfloat16).eq(1).all()
    with torch.inference_mode():
        x = torch.zeros(3)
        cast_once(x, torch.bfloat16)
        x += 1
        assert cast_once(x, torch.bfloat16).eq(1).all()


@pytest.mark.slow
def test_layers_compile_as_one_graph():
    block = nn.Sequential(SelfAttention(CHANNELS, HEADS), FeedForward(CHANNELS, 20))
    cast_weights(block.modules(), torch.bfloat16)
    x = torch.randn(2, 5, CHANNELS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = block(x)
        compiled = torch.compile(block, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), expected)
