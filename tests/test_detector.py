"""The detector against a plain reference, in 16 bit, and the weights it starts from."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import plain_model
from detector import AttentionMask, SinePosition, features_for_masks
from golden_set import relative_error
from model import build_model
from plain_model import Weights
from transformer import mask_logits

pytestmark = pytest.mark.usefixtures("four_convolutions")
SIZE = dict(
    backbone="four_convolutions",
    channels=32,
    heads=2,
    queries=5,
    frame_queries=6,
    pixel_layers=2,
    pixel_feed_forward=24,
    frame_layers=4,
    tracker_encoder_layers=2,
    feed_forward=24,
)
HEADS, CLASSES = 2, 3


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def randomised(model: torch.nn.Module, seed: int = 5) -> torch.nn.Module:
    """Weights without ones and zeros, such as a norm's, which would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like, scale):
        return scale * torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var") or (name.endswith("weight") and value.ndim == 1):
                value.copy_(1 + noise(value, 0.2).abs())
            elif name.endswith(
                ("bias", "running_mean", "sampling_offsets.weight", "attention_weights.weight")
            ):
                value.add_(noise(value, 0.3))
    return model


@pytest.fixture(scope="module")
def images():
    """Two images of 64 x 96 pixels, blank at the right."""
    images = torch.randn(
        2, 3, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    images[..., -4:] = 0
    return images.repeat_interleave(8, 2).repeat_interleave(8, 3)


@pytest.mark.parametrize("training", [False, True])
def test_every_prediction_is_that_of_plain_loops(images, training):
    """Classes and masks before the first layer and after each, and the gradients of both.

    In training the queries of the last three layers go to the tracker.
    """
    torch.manual_seed(0)
    model = randomised(build_model("toy", CLASSES, norm="frozen", **SIZE)).train(training)
    model.pixel_decoder.mask_features.bias.data *= 8  # so that some masks are empty
    found = model.detect(images)
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if "decoder." in name and "tracker" not in name
    }
    weights = Weights(parameters)
    head = weights.pixel_decoder.mask_features
    tracked_layers = 3 if training else 1
    assert len(found.queries) == tracked_layers
    assert len(found.predictions) == (1 + SIZE["frame_layers"] if training else 1)
    empty, total, expected_total = 0, 0, 0
    for number, maps in enumerate(zip(*model.backbone(images))):
        levels, fpn = plain_model.pixel_decoder(weights.pixel_decoder, HEADS, list(maps))
        torch.testing.assert_close(found.features[number], fpn)
        features = F.conv2d(fpn[None], head.weight, head.bias)[0]
        predictions, queries = plain_model.frame_decoder(
            weights.frame_decoder, HEADS, levels, features
        )
        pairs = zip(found.predictions[::-1], predictions[::-1])
        for (logits, kernel), (expected, expected_masks) in pairs:
            torch.testing.assert_close(logits[number], expected)
            masks = mask_logits(kernel, found.features)[number]
            torch.testing.assert_close(masks, expected_masks)
            coarse = F.interpolate(expected_masks[None], (2, 3), mode="bilinear")[0]
            empty += (coarse < 0).all((1, 2)).sum().item()
            total = total + (logits[number].square().sum() + masks.square().sum())
            expected_total = (
                expected_total + expected.square().sum() + expected_masks.square().sum()
            )
        for layer in range(1, tracked_layers + 1):
            torch.testing.assert_close(found.queries[-layer, number], queries[-layer])
    assert empty or not training  # the rule for empty masks was needed
    found, expected = (
        torch.autograd.grad(value, parameters.values()) for value in (total, expected_total)
    )
    for name, one, other in zip(parameters, found, expected):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


def test_sine_position():
    for size in ((3, 5), (1, 2), (7, 4)):
        found = SinePosition()(torch.zeros(2, 8, *size, dtype=torch.float64))
        torch.testing.assert_close(found, plain_model.sine_position(*size, 8)[None])
    in_16_bit = torch.zeros(1, 8, 2, 2, dtype=torch.float16)
    assert SinePosition()(in_16_bit).dtype == torch.float32


# In 16 bit


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_masks(dtype):
    """Masks are resized; in 16 bit the features are, which is the same up to rounding."""
    torch.manual_seed(0)
    features, kernel = torch.randn(2, 64, 16, 24), torch.randn(2, 3, 64 + 1)
    sizes = [(2, 3), (4, 6), (8, 12)]
    kernel[0, 0], kernel[1, 2] = 0, 0
    kernel[0, 0, -1], kernel[1, 2, -1] = -1, 1  # an empty and a full mask
    sources = features_for_masks(features.to(dtype), sizes)
    assert all(
        (source.shape[-2:] == size) == (dtype == torch.bfloat16)
        for source, size in zip(sources, sizes)
    )
    for source, size in zip(sources, sizes):
        masks = torch.einsum("nqc,nchw->nqhw", kernel[..., :-1].double(), features.double())
        masks += kernel[:, :, -1:, None].double()
        expected = F.interpolate(masks, size, mode="bilinear", align_corners=False).flatten(2)
        logits = mask_logits(kernel.to(dtype), source)
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False).flatten(2)
        assert logits.dtype == dtype and (logits - expected).norm() / expected.norm() < (
            1e-6 if dtype == torch.float64 else 1e-2
        )
        mask = AttentionMask()(kernel.to(dtype), source, size)
        assert mask.shape == (2, 1, 3, size[0] * size[1]) and mask.dtype == torch.bool
        blocked = expected < 0
        blocked[0, 0] = False  # an empty mask blocks nothing
        clear = expected.abs() > (0.0 if dtype == torch.float64 else 0.3)
        assert torch.equal(mask[:, 0][clear], blocked[clear])
        assert not mask[0, 0, 0].any() and not mask[1, 0, 2].any() and mask.any()


@torch.no_grad()
def test_pixel_decoder_in_16_bit():
    """Under autocast only products are in 16 bit: little is lost over six layers."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = build_model("toy", CLASSES, **SIZE | {"pixel_layers": 6, "channels": 64}).eval()
    for layer in model.pixel_decoder.layers:  # these weights are zero at first
        torch.nn.init.normal_(layer.attention.sampling_offsets.weight, std=0.01)
        torch.nn.init.normal_(layer.attention.attention_weights.weight, std=0.02)
    maps = [
        torch.randn(1, channels, 64 // step, 96 // step)
        for channels, step in zip(model.backbone.channels, (1, 2, 4, 8))
    ]
    levels, output = model.pixel_decoder(maps)
    with torch.autocast("cpu", torch.bfloat16):
        levels_16, output_16 = model.pixel_decoder(maps)
    assert output_16.dtype == torch.bfloat16
    assert all(level.dtype == torch.float32 for level in levels_16)
    for ours, exact in zip([*levels_16, output_16], [*levels, output]):
        assert 0 < relative_error(ours.double(), exact) < 0.015


# Forward hooks


@pytest.mark.parametrize("propagation", ["gated", "gated+memory", "clip"])
def test_forward_hooks_fire_on_every_module(propagation):
    """In a live step and in a training step, but for these:

    mask_features are applied to the queries instead of the pixels, see `mask_kernel`; embeddings
    are tables, of which `weight` is read; the model's own forward is for training.
    """
    torch.set_default_dtype(torch.float32)
    model = build_model("toy", CLASSES, propagation, **SIZE)
    frames = torch.randint(0, 256, (3, 3, 32, 64), dtype=torch.uint8)
    names = {
        module: name
        for name, module in model.named_modules()
        if type(module).forward is not nn.Module.forward
    }
    silent = {
        name
        for module, name in names.items()
        if name.endswith("mask_features") or isinstance(module, nn.Embedding)
    }
    called = set()
    for module in names:
        module.register_forward_hook(lambda module, inputs, output: called.add(names[module]))

    model.train()([frames])
    assert set(names.values()) - called == silent
    called.clear()
    model.eval()
    if propagation == "clip":
        model.segment_video(frames)
    else:
        _, state = model.step(frames[0])
        model.step(frames[1], state)
    assert set(names.values()) - called == silent | {""}


# How weights start


def assert_uniform(weight: torch.Tensor, bound: float) -> None:
    """Whether the values are uniform in -bound..bound, by their deviation and largest value."""
    assert weight.abs().max() <= bound
    assert weight.abs().max().item() == pytest.approx(bound, rel=0.05)
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert abs(weight.mean().item()) < 0.1 * bound


def xavier(weight: torch.Tensor) -> float:
    """The bound of Xavier's uniform distribution."""
    outputs, inputs = weight.shape[0], weight[0].numel()
    return math.sqrt(6 / (inputs + outputs))


def test_initial_weights_of_the_pixel_decoder():
    torch.manual_seed(0)
    decoder = build_model("toy", CLASSES, **SIZE).pixel_decoder
    for projection in decoder.input_proj:
        assert_uniform(projection[0].weight, xavier(projection[0].weight))
        assert not projection[0].bias.any()
    for convolution in (decoder.lateral[0], decoder.output[0], decoder.mask_features):
        # Kaiming's, without a ReLU
        assert_uniform(convolution.weight, math.sqrt(3 / convolution.weight[0].numel()))
    assert decoder.lateral[0].bias is None and decoder.output[0].bias is None
    assert not decoder.mask_features.bias.any()
    assert decoder.level_embed.std().item() == pytest.approx(1, rel=0.3)


def test_initial_weights_of_attention_and_feed_forward():
    """In frame decoder and tracker, of every layer."""
    torch.manual_seed(0)
    model = build_model("toy", CLASSES, **SIZE)
    counted = 0
    for name, parameter in model.named_parameters():
        if name.startswith("backbone.") or "deform" in name:
            continue
        if name.endswith(
            (
                "in_proj_weight",
                "out_proj.weight",
                "linear1.weight",
                "linear2.weight",
                "value_proj.weight",
                "output_proj.weight",
            )
        ):
            assert_uniform(parameter, xavier(parameter))
            counted += 1
        if name.endswith(("in_proj_bias", "out_proj.bias")):
            assert not parameter.any(), name
        if name.endswith(("query_feat.weight", "query_embed.weight", "level_embed.weight")):
            assert parameter.std().item() == pytest.approx(1, rel=0.3), name
    assert counted > 30
