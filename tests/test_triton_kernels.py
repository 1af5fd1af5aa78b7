"""Triton kernels without a GPU: interpreted, and compiled for one. test_gpu.py runs them."""

import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from backbone import DetectorWindowAttention
from detector import AttentionMask, UpsampleAdd
from evaluation.postprocess import mask_sum_and_area
from fast import fused_masks, fused_modules, fused_sampling, triton_kernels
from fast.fused_masks import fused_mask_sum_and_area
from fast.fused_modules import (
    FusedAttentionMask,
    FusedGroupNorm,
    FusedLayerNorm,
    FusedResidualNorm,
    FusedUpsampleAdd,
    FusedWindowAttention,
    fuse_modules,
)
from fast.fused_sampling import fused_sample_features
from matcher import sample_features
from transformer import ResidualNorm

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).resolve().parents[1]
C, GROUPS = 256, 32


def random_weights(norm):
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    """The tests below that need it, in a process of their own: the variable is read on import."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "interpreted", __file__]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture
def on_this_device(monkeypatch):
    if not INTERPRETED:
        pytest.skip("runs in the interpreter")
    monkeypatch.setattr(fused_modules, "triton_works", lambda: True)
    monkeypatch.setattr(fused_modules, "can_fuse", lambda x: True)


@torch.no_grad()
@pytest.mark.parametrize("channels", [64, 96])
@pytest.mark.parametrize("kind", [ResidualNorm, nn.LayerNorm])
def test_interpreted_layer_norm(on_this_device, kind, channels):
    norm = random_weights(kind(channels))
    inputs = [3 + torch.randn(37, channels), torch.randn(37, channels)]
    inputs = inputs if kind is ResidualNorm else inputs[:1]
    expected = norm(*inputs)
    fuse_modules(norm)
    assert type(norm) in (FusedResidualNorm, FusedLayerNorm)
    found = norm(*inputs)
    torch.testing.assert_close(found, expected)
    copy, _ = found.remembered_cast
    assert torch.equal(copy, found.half())


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 40)])
def test_interpreted_upsampling(on_this_device, size):
    """Of the last of two levels that are joined, as in the pixel decoder."""
    height, width = size
    tokens = torch.randn(2, 7 + height * width, 16)
    level = tokens[:, 7:].unflatten(1, size).permute(0, 3, 1, 2)
    lateral = torch.randn(2, 2 * height, 2 * width, 16).permute(0, 3, 1, 2)
    expected = UpsampleAdd()(level, lateral)
    found = FusedUpsampleAdd()(level, lateral)
    assert found.dtype == torch.float16 and found.stride() == lateral.stride()
    torch.testing.assert_close(found, expected.half(), rtol=1e-3, atol=1e-3)
    # Another factor than 2 takes the plain path.
    other = torch.randn(2, 16, 3 * height, 3 * width)
    torch.testing.assert_close(FusedUpsampleAdd()(level, other), UpsampleAdd()(level, other))


@torch.no_grad()
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(3, 4), (8, 8), (9, 17)])
def test_interpreted_window_attention(on_this_device, monkeypatch, size, shift):
    """Maps smaller than a window, of whole windows, and with padding; 25 tokens, in two tiles."""
    monkeypatch.setattr(fused_modules, "ATTENTION_TILE", 16)
    torch.manual_seed(0)
    plain = DetectorWindowAttention(64, [5, 5], [shift, shift], num_heads=4).eval()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, *size, 64)
    fused = copy.deepcopy(plain)
    fused.__class__ = FusedWindowAttention
    found = fused.half()(x.half())
    torch.testing.assert_close(found.float(), plain(x), rtol=0.02, atol=0.02)


@torch.no_grad()
@pytest.mark.parametrize("pixels", [1, 240, 3000])
def test_interpreted_attention_masks(on_this_device, pixels):
    logits = torch.randn(2, 5, pixels).half()
    logits[0, 1], logits[1, 2] = -1, 1  # an empty and a full mask
    logits[1, 3, 0] = -1e-5  # rounds to a probability of 0.5
    blocked = AttentionMask().block_background(logits)
    found = FusedAttentionMask().block_background(logits)
    assert found.shape == blocked.shape and found.dtype == torch.float16
    assert torch.equal(found, torch.zeros_like(found).masked_fill(blocked, -torch.inf))


def test_interpreted_mask_scores(monkeypatch):
    if not INTERPRETED:
        pytest.skip("runs in the interpreter")
    monkeypatch.setattr(fused_masks, "can_fuse", lambda logits: True)
    logits = 4 * torch.randn(2, 3, 70, 90)
    logits[0, 1] = -5  # an empty mask
    for some in (logits, logits.half(), logits[:0]):
        sums, areas = fused_mask_sum_and_area(some)
        expected_sums, expected_areas = mask_sum_and_area(some)
        torch.testing.assert_close(sums, expected_sums)
        assert torch.equal(areas, expected_areas) and areas.dtype == torch.int64
    logits[1, 2, 3, 4] = torch.nan
    assert fused_mask_sum_and_area(logits)[0].isnan().sum() == 1  # so that it is noticed


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_interpreted_sampling(monkeypatch, layout):
    if not INTERPRETED:
        pytest.skip("runs in the interpreter")
    monkeypatch.setattr(fused_sampling, "can_fuse", lambda features: True)
    features = torch.randn(2, 70, 5, 9).to(memory_format=layout)
    points = torch.rand(2, 41, 2)
    points[:, :2] = torch.tensor([[0.0, 0.0], [1.0, 1.0]])  # partly outside
    for some in (features, features.bfloat16(), features[1:, 3:]):
        found = fused_sample_features(some, points[: len(some)])
        expected = sample_features(some, points[: len(some)])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (50, 60)])
def test_interpreted_group_norm(on_this_device, size, relu):
    norm = random_weights(nn.GroupNorm(GROUPS, C))
    sequence = nn.Sequential(nn.Identity(), norm, *([nn.ReLU()] if relu else []))
    x = (2 + torch.randn(2, C, *size)).contiguous(memory_format=torch.channels_last)
    expected = sequence(x)
    fuse_modules(sequence)
    assert type(norm) is FusedGroupNorm
    torch.testing.assert_close(sequence(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize(
    "name",
    [
        "layer_norm_kernel",
        "group_sums_kernel",
        "group_norm_kernel",
        "upsample_add_kernel",
        "window_attention_kernel",
        "block_background_kernel",
        "mask_sums_kernel",
        "sample_features_kernel",
    ],
)
def test_kernels_compile_for_a_gpu(name):
    """For Hopper: the interpreter accepts more than the compiler does."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(triton_kernels, name)
    constants = {"C": C, "GROUPS": GROUPS, "TILE": 32, "BLOCKS": 64, "ROWS": 8, "RELU": True}
    constants |= {"WIDTH": C, "HAS_BRANCH": True, "HAS_COPY": True, "BLOCK": 4096}
    constants |= {"PIXELS": 1024, "D": 32, "WINDOW": 12, "SHIFT": 6, "TILE": 32, "REST": 16}
    constants |= {"POINTS": 32, "CHANNELS": 64}
    sizes = ("rows", "pixels", "tiles", "image_stride", "height", "width", "windows_y", "windows_x")
    sizes += ("channels", "count", "frame_stride", "channel_stride", "row_stride", "column_stride")
    numbers = dict.fromkeys(sizes, "i32") | {"eps": "fp32", "scale": "fp32", "areas": "*i32"}
    halves = ("x", "branch", "copy", "logits", "mask", "qkv", "qkv_bias", "features")
    halves = dict.fromkeys(halves, "*fp16")
    types = halves | numbers | dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, "*fp32") for argument in kernel.arg_names}
    constants = {key: value for key, value in constants.items() if key in signature}
    source = ASTSource(kernel, signature, constexprs=constants)
    assert ".entry" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


def test_plain_modules_run_without_a_gpu():
    norm = ResidualNorm(64)
    x = torch.randn(3, 64)
    expected = norm(x, x)
    norm.__class__ = FusedResidualNorm
    assert torch.equal(norm(x, x), expected)


def test_programs_run_without_triton(monkeypatch):
    """As PyTorch for CPUs, or for other systems than Linux, comes without it.

    Our modules are imported anew: another process would import PyTorch too, which takes seconds.
    """
    ours = {path.stem for path in ROOT.iterdir()} - {"tests"}

    def loaded():
        return [name for name in sys.modules if name.partition(".")[0] in ours]

    for name in loaded():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    try:
        for program in ("evaluate", "train"):
            importlib.import_module(program)
        assert sys.modules["fast.triton_kernels"].triton is None
    finally:
        for name in loaded():
            del sys.modules[name]
