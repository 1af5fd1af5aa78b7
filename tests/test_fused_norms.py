"""Triton kernels without a GPU: interpreted, and compiled for one. test_gpu.py runs them."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from fast import fused_norms
from fast.fused_norms import FusedGroupNorm, FusedResidualNorm, fuse_norms
from transformer import ResidualNorm

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
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
    monkeypatch.setattr(fused_norms, "triton_works", lambda: True)
    monkeypatch.setattr(fused_norms, "can_fuse", lambda x: True)


@torch.no_grad()
def test_interpreted_residual_norm(on_this_device):
    norm = random_weights(ResidualNorm(64))
    x, branch = 3 + torch.randn(37, 64), torch.randn(37, 64)
    expected = norm(x, branch)
    fuse_norms(norm)
    assert type(norm) is FusedResidualNorm
    torch.testing.assert_close(norm(x, branch), expected)


@torch.no_grad()
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (50, 60)])
def test_interpreted_group_norm(on_this_device, size, relu):
    norm = random_weights(nn.GroupNorm(GROUPS, C))
    sequence = nn.Sequential(nn.Identity(), norm, *([nn.ReLU()] if relu else []))
    x = (2 + torch.randn(2, C, *size)).contiguous(memory_format=torch.channels_last)
    expected = sequence(x)
    fuse_norms(sequence)
    assert type(norm) is FusedGroupNorm
    torch.testing.assert_close(sequence(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("name", ["add_norm_kernel", "group_sums_kernel", "group_norm_kernel"])
def test_kernels_compile_for_a_gpu(name):
    """For Hopper: the interpreter accepts more than the compiler does."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(fused_norms, name)
    constants = {"C": C, "GROUPS": GROUPS, "TILE": 32, "BLOCKS": 64, "ROWS": 8, "RELU": True}
    numbers = {"rows": "i32", "pixels": "i32", "tiles": "i32", "eps": "fp32"}
    types = {"x": "*fp16", "branch": "*fp16"} | numbers | dict.fromkeys(constants, "constexpr")
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
