"""Where a program runs, and in which precision."""
import pytest
import torch

from runtime.device import choose_amp

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("asked, device, training, has_bfloat16, expected", [
    ("auto", CPU, False, False, torch.float32),
    ("auto", CPU, True, False, torch.float32),
    ("auto", GPU, False, True, torch.float16),      # the nearer to float32
    ("auto", GPU, True, True, torch.bfloat16),      # needs no scale
    ("auto", GPU, True, False, torch.float16),
    ("bf16", CPU, False, False, torch.bfloat16),
    ("off", GPU, False, True, torch.float32)])
def test_precision(asked, device, training, has_bfloat16, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    dtype, reason = choose_amp(asked, device, training)
    assert dtype == expected and reason
