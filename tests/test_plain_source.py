"""Replacements in fast/ are used only while the plain code is what they were written for."""

import pytest
import torch
from torch import nn

from detector import SinePosition
from evaluation.postprocess import mask_sum_and_area
from fast import fused_modules, fused_sampling, kept_positions, plain_source, trained_resnet
from fast.folded_resnet import DIGESTS
from fast.fused_masks import MASK_SCORES_DIGEST
from fast.fused_modules import FUSED, fuse_modules
from fast.fused_sampling import fuse_sampling
from fast.half_precision import FORWARD_DIGEST, PROJECT_DIGEST, cast_weights
from fast.plain_source import digest_of, is_unchanged
from losses import Criterion
from matcher import sample_features
from transformer import Attention, FeedForward, ResidualNorm

KNOWN = (
    DIGESTS
    | fused_sampling.DIGESTS
    | trained_resnet.PLAIN
    | {
        mask_sum_and_area: MASK_SCORES_DIGEST,
        Attention.project: PROJECT_DIGEST,
        FeedForward.forward: FORWARD_DIGEST,
        SinePosition: kept_positions.DIGEST,
    }
)
for _, digests in FUSED.values():
    KNOWN |= digests


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
    norm, attention, feed_forward = ResidualNorm(16), Attention(16, 2), FeedForward(16, 8)
    model = nn.ModuleList([norm, attention, nn.LayerNorm(16), feed_forward, SinePosition()])
    with pytest.warns(UserWarning, match="ResidualNorm has been edited .digest other"):
        fuse_modules(model)
    assert type(norm) is ResidualNorm
    assert type(model[2]) is not nn.LayerNorm  # PyTorch's own
    with pytest.warns(UserWarning, match="(Attention.project|FeedForward.forward) has been edited"):
        cast_weights(model.modules(), torch.bfloat16)
    assert type(attention) is Attention and type(feed_forward.activation) is nn.ReLU
    with pytest.warns(UserWarning, match="SinePosition has been edited"):
        kept_positions.keep_positions(model)
    assert type(model[4]) is SinePosition
    with pytest.warns(UserWarning, match="sample_features has been edited"):
        criterion = fuse_sampling(Criterion(3))
    assert criterion.sample_features is sample_features
