"""The shared blocks against PyTorch's own: Attention is nn.MultiheadAttention, whose masks are
named for what they do.

An encoder layer made of our post-norm blocks is nn.TransformerEncoderLayer. Everything runs in
float64.
"""

import math

import pytest
import torch
from torch import nn

from transformer import (
    MLP,
    Attention,
    CrossAttention,
    FeedForward,
    SelfAttention,
    mask_kernel,
    mask_logits,
)
from viewing.introspection import attention_weights

CHANNELS, HEADS = 12, 3


def make_attention(seed: int = 0) -> tuple[Attention, nn.MultiheadAttention]:
    """Ours, biases drawn too, and PyTorch's with the same weights: the names of the parameters are
    equal.
    """
    torch.manual_seed(seed)
    ours = Attention(CHANNELS, HEADS).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.5)
    theirs = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def random_inputs(tokens: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Different query, key and value of two batch rows; 5 queries."""
    shapes = (2, 5, CHANNELS), (2, tokens, CHANNELS), (2, tokens, CHANNELS)
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def test_without_a_mask():
    ours, theirs = make_attention()
    inputs = random_inputs()
    torch.testing.assert_close(ours(*inputs), theirs(*inputs)[0])


def test_blocked_is_a_bool_mask():
    """One mask a row and head; True = may not attend, as MultiheadAttention reads a bool mask."""
    ours, theirs = make_attention()
    inputs = random_inputs()
    blocked = torch.rand(2, HEADS, 5, 7) < 0.5
    # Something is left to attend to.
    blocked[..., 0] = False
    expected = theirs(*inputs, attn_mask=blocked.flatten(0, 1))[0]
    torch.testing.assert_close(ours(*inputs, mask=blocked), expected)
    assert not torch.allclose(ours(*inputs), expected)


def test_bias_is_added_to_the_logits():
    """MultiheadAttention adds a float mask; so a "mask" of ones, in float, blocks nothing."""
    ours, theirs = make_attention()
    inputs = random_inputs()
    bias = torch.randn(2, HEADS, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(
        ours(*inputs, mask=bias), theirs(*inputs, attn_mask=bias.flatten(0, 1))[0]
    )
    mask = torch.rand(5, 7) < 0.5
    mask[:, 0], mask[:, 1] = False, True
    assert not torch.allclose(ours(*inputs, mask=mask.double()), ours(*inputs, mask=mask))
    # Ones everywhere: nothing.
    torch.testing.assert_close(ours(*inputs, mask=torch.ones(5, 7)), ours(*inputs))


def test_masks_are_broadcast():
    """(N, 1, Q, S) serves all heads, (Q, S) all rows too."""
    attention, _ = make_attention()
    inputs = random_inputs()
    blocked = torch.rand(5, 7) < 0.5
    blocked[:, 0] = False
    everywhere = attention(*inputs, mask=blocked.expand(2, HEADS, 5, 7))
    torch.testing.assert_close(attention(*inputs, mask=blocked), everywhere)
    torch.testing.assert_close(attention(*inputs, mask=blocked.expand(2, 1, 5, 7)), everywhere)


@pytest.mark.parametrize("kind", ["none", "bias", "blocked"])
def test_attention_weights_are_a_softmax(kind):
    """Written out head by head; applied to the values they give the output."""
    attention, theirs = make_attention()
    query, key, value = random_inputs()
    mask = {
        "none": None,
        "bias": torch.randn(2, 1, 5, 7, dtype=torch.float64),
        "blocked": torch.rand(2, 1, 5, 7) < 0.5,
    }[kind]
    if kind == "blocked":
        mask[..., 0] = False
    weights = attention_weights(attention, query, key, mask)
    assert weights.shape == (2, HEADS, 5, 7) and not weights.requires_grad
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 5, dtype=torch.float64))

    (q_weight, k_weight, v_weight), biases = (
        attention.in_proj_weight.chunk(3),
        attention.in_proj_bias.chunk(3),
    )
    q, k, v = (
        query @ q_weight.T + biases[0],
        key @ k_weight.T + biases[1],
        value @ v_weight.T + biases[2],
    )
    size, outputs = CHANNELS // HEADS, []
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        logits = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
        if kind == "bias":
            logits = logits + mask[:, 0]
        scores = logits.exp() * (~mask[:, 0] if kind == "blocked" else 1)
        torch.testing.assert_close(weights[:, head], scores / scores.sum(-1, keepdim=True))
        outputs.append(weights[:, head] @ v[..., part])
    torch.testing.assert_close(
        attention.out_proj(torch.cat(outputs, -1)), attention(query, key, value, mask)
    )
    if kind == "none":
        torch.testing.assert_close(
            weights, theirs(query, key, value, average_attn_weights=False)[1]
        )


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match=r"channels \(10\) must be divisible by heads \(3\)"):
        Attention(10, 3)


def test_positions_go_to_query_and_key_not_to_value():
    attention, theirs = make_attention()
    x, tokens, token_position = random_inputs()
    position = torch.randn(5, CHANNELS, dtype=torch.float64)

    block = SelfAttention(CHANNELS, HEADS).double()
    block.attention = attention
    expected = block.norm(x, theirs(x + position, x + position, x)[0])
    torch.testing.assert_close(block(x, position), expected)
    # No position is a zero one.
    torch.testing.assert_close(block(x), block(x, torch.zeros_like(position)))

    block = CrossAttention(CHANNELS, HEADS).double()
    block.attention = attention
    expected = block.norm(x, theirs(x + position, tokens + token_position, tokens)[0])
    torch.testing.assert_close(block(x, position, tokens + token_position, tokens), expected)


def test_self_attention_and_feed_forward_are_a_transformer_encoder_layer():
    torch.manual_seed(0)
    attend, feed = SelfAttention(CHANNELS, HEADS).double(), FeedForward(CHANNELS, 20).double()
    theirs = nn.TransformerEncoderLayer(CHANNELS, HEADS, 20, dropout=0, batch_first=True).double()
    # All weights random, those of the norms as well.
    for block in (attend, feed):
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.5)
    theirs.self_attn.load_state_dict(attend.attention.state_dict())
    theirs.norm1.load_state_dict(attend.norm.state_dict())
    theirs.norm2.load_state_dict(feed.norm.state_dict())
    theirs.linear1.load_state_dict(feed.linear1.state_dict())
    theirs.linear2.load_state_dict(feed.linear2.state_dict())
    x = torch.randn(2, 5, CHANNELS, dtype=torch.float64)
    torch.testing.assert_close(feed(attend(x)), theirs(x))


def test_mlp_is_three_layers_with_relu_between():
    torch.manual_seed(0)
    mlp, x = MLP(CHANNELS).double(), torch.randn(6, CHANNELS, dtype=torch.float64)
    first, second, third = (layer for layer in mlp if isinstance(layer, nn.Linear))
    hidden = (x @ first.weight.T + first.bias).clamp(min=0)
    hidden = (hidden @ second.weight.T + second.bias).clamp(min=0)
    torch.testing.assert_close(mlp(x), hidden @ third.weight.T + third.bias)
    assert mlp(x).min() < 0  # none after the last


def test_a_kernel_on_features_is_an_embedding_on_convolved_ones():
    """The convolution moved from the pixels to the queries: the same masks, of maps and of lists of
    pixels.
    """
    torch.manual_seed(0)
    convolution, embed, features = (
        nn.Conv2d(6, 8, 1).double(),
        torch.randn(2, 3, 8).double(),
        torch.randn(2, 6, 4, 5).double(),
    )
    expected = torch.einsum("nqc,nchw->nqhw", embed, convolution(features))
    kernel = mask_kernel(embed, convolution)
    assert kernel.shape == (2, 3, 7)
    torch.testing.assert_close(mask_logits(kernel, features), expected)
    torch.testing.assert_close(mask_logits(kernel, features.flatten(2)), expected.flatten(2))


@pytest.mark.parametrize(
    "make, names",
    [
        (lambda: Attention(64, 4), ("in_proj_weight", "out_proj.weight")),
        (lambda: FeedForward(64, 96), ("linear1.weight", "linear2.weight")),
    ],
)
def test_weights_start_as_xavier_says(make, names):
    """Uniform up to sqrt(6 / (inputs + outputs)); biases of attention at zero."""
    torch.manual_seed(0)
    parameters = dict(make().named_parameters())
    for name in names:
        outputs, inputs = parameters[name].shape
        bound = math.sqrt(6 / (inputs + outputs))
        assert parameters[name].abs().max().item() == pytest.approx(bound, rel=0.01)
        assert parameters[name].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    for name in ("in_proj_bias", "out_proj.bias"):
        assert not parameters.get(name, torch.zeros(1)).any()
