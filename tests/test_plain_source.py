"""Replacements in fast/ are used only while the plain code is what they were written for."""

import pytest
import torch
from torch import nn

from evaluation.postprocess import mask_sum_and_area
from fast import fused_modules, plain_source
from fast.folded_resnet import DIGESTS
from fast.fused_masks import MASK_SCORES_DIGEST
from fast.fused_modules import FUSED, fuse_modules
from fast.half_precision import PROJECT_DIGEST, HalfAttention, cast_weights
from fast.plain_source import digest_of, is_unchanged
from transformer import Attention, ResidualNorm

KNOWN = DIGESTS | {mask_sum_and_area: MASK_SCORES_DIGEST, Attention.project: PROJECT_DIGEST}
KNOWN |= {plain: digest for plain, (_, digest) in FUSED.items() if digest}


@pytest.mark.parametrize("plain", KNOWN, ids=lambda plain: plain.__qualname__)
def test_digests_are_those_of_the_plain_code(plain):
    """After an edit of plain code: edit its replacement as well, then store the new digest."""
    assert digest_of(plain) == KNOWN[plain]


@pytest.fixture
def edited(monkeypatch):
    """As if all plain code had been edited."""
    monkeypatch.setattr(plain_source, "digest_of", lambda plain: "other")
    monkeypatch.setattr(fused_modules, "triton_works", lambda: True)
    is_unchanged.cache_clear()
    yield
    is_unchanged.cache_clear()


def test_edited_code_is_not_replaced(edited):
    model = nn.ModuleList([ResidualNorm(16), Attention(16, 2), nn.LayerNorm(16)])
    with pytest.warns(UserWarning, match="ResidualNorm has been edited .digest other"):
        fuse_modules(model)
    assert type(model[0]) is ResidualNorm
    assert type(model[2]) is not nn.LayerNorm  # PyTorch's own
    with pytest.warns(UserWarning, match="Attention.project has been edited"):
        cast_weights(model.modules(), torch.bfloat16)
    assert type(model[1]) is Attention and type(model[1]) is not HalfAttention
