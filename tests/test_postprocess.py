"""Masks of a video: resized by one matrix product per side, equal to PyTorch's interpolation."""

import math

import pytest
import torch
import torch.nn.functional as F

from evaluation.postprocess import (
    RunningScores,
    best_pairs,
    check_finite,
    class_probabilities,
    mask_sum_and_area,
    resize_masks,
    with_mask_scores,
)


@pytest.mark.parametrize(
    "size, output",
    [
        ((40, 56), None),
        ((40, 56), (40, 56)),
        ((33, 60), (80, 112)),
        ((40, 64), (25, 31)),
        ((64, 64), (200, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "dtype, error", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_resizing_is_bilinear(size, output, dtype, error):
    """To the padded frame, of which the frame is cut out, then to the output.

    PyTorch's own steps, in float64.
    """
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 16, 16, dtype=torch.float64)
    expected = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)[
        ..., : size[0], : size[1]
    ]
    if output:
        expected = F.interpolate(expected, size=output, mode="bilinear", align_corners=False)
    found = resize_masks(logits.to(dtype), size, output)
    assert found.dtype == dtype and found.shape == (3, 2, *(output or size))
    assert (found - expected).norm() / expected.norm() < error
    if dtype == torch.float64:
        torch.testing.assert_close(
            resize_masks(logits[1, 1], size, output), found[1, 1]
        )  # any number of masks


def test_mask_sum_and_area_is_a_loop():
    logits = torch.tensor([[[2.0, -1.0], [0.0, 0.5]], [[-3.0, -1.0], [-0.1, -9.0]]])
    mask_sum, mask_area = mask_sum_and_area(logits)
    assert mask_sum.tolist() == pytest.approx(
        [sum(1 / (1 + 2.718281828459045**-logit) for logit in (2.0, 0.5)), 0]
    )
    assert (
        mask_area.tolist() == [2, 0] and mask_area.dtype == torch.int64
    )  # exact in videos of any length


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_masks_in_16_bit_have_the_score_of_float32(dtype):
    """A sum of 262,144 probabilities is more than float16 can hold."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 512, 512)).to(dtype)
    logits[0].abs_()
    for found, expected in zip(
        mask_sum_and_area(logits), mask_sum_and_area(logits.float()), strict=True
    ):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    mask_sum, mask_area = mask_sum_and_area(logits)
    inside = logits.double()[0].sigmoid()[logits[0] > 0]
    assert mask_area[0] == len(inside) > 2**17
    assert mask_sum[0].item() == pytest.approx(inside.sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    "scores", [[0.5, math.nan, 0.1], [math.inf, 0.5], [0.2, -math.inf], [math.nan] * 3], ids=str
)
def test_one_score_that_is_not_finite_is_told(scores):
    with pytest.raises(FloatingPointError, match="the scores are not finite"):
        check_finite(torch.tensor(scores))
    check_finite(torch.tensor([score for score in scores if math.isfinite(score)]))


def test_the_best_pairs_of_query_and_class():
    """Best first; equal scores in the order of queries, then of classes."""
    class_scores = torch.tensor([[0.1, 0.9, 0.3], [0.9, 0.2, 0.3]])
    scores, labels, queries = best_pairs(class_scores, 4)
    assert scores.tolist() == pytest.approx([0.9, 0.9, 0.3, 0.3])
    assert labels.tolist() == [1, 0, 2, 2] and queries.tolist() == [0, 1, 0, 1]
    assert len(best_pairs(class_scores, 100)[0]) == 6


def test_mask_scores_change_the_order():
    """A class score times the mean probability inside the mask.

    A mask of no pixels scores nothing.
    """
    scores, order = with_mask_scores(
        torch.tensor([0.9, 0.8, 0.7, 0.7]),
        torch.tensor([5.0, 9.0, 0.0, 8.0]),
        torch.tensor([10, 10, 0, 10]),
    )
    assert order.tolist() == [1, 3, 0, 2]
    assert scores.tolist() == pytest.approx([0.72, 0.56, 0.45, 0])


def test_scores_of_two_parts_of_a_video():
    """The maximum of class scores, the sums of all else."""
    one = RunningScores(
        torch.tensor([[0.1, 0.9], [0.5, 0.2]]), torch.tensor([2.0, 3.0]), torch.tensor([4, 5])
    )
    other = RunningScores(
        torch.tensor([[0.3, 0.8], [0.1, 0.6]]), torch.tensor([1.0, 0.5]), torch.tensor([2, 1])
    )
    for both in (one.merge(other), other.merge(one)):
        assert both.class_scores.tolist() == [pytest.approx([0.3, 0.9]), pytest.approx([0.5, 0.6])]
        assert both.mask_sum.tolist() == [3, 3.5] and both.mask_area.tolist() == [6, 6]
    scores, labels, queries = one.merge(other).best(2)
    assert labels.tolist() == [1, 1] and queries.tolist() == [0, 1]
    assert scores.tolist() == pytest.approx([0.9 * 3 / 6, 0.6 * 3.5 / 6])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_of_classes_leave_out_no_object(dtype):
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]], dtype=dtype)
    found = class_probabilities(logits)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.shape == (2, 2)
    total = sum(math.exp(value) for value in (1, 2, 3))
    assert found[0].tolist() == pytest.approx([math.exp(1) / total, math.exp(2) / total])
    assert found[1].tolist() == pytest.approx([1 / 3, 1 / 3])
