"""Masks of a video: resized by products with matrices, which is what PyTorch interpolates, side by side."""
import pytest
import torch
import torch.nn.functional as F

from results import mask_confidence, resize_masks


@pytest.mark.parametrize("size, output", [((40, 56), None), ((40, 56), (40, 56)), ((33, 60), (80, 112)), ((40, 64), (25, 31)),
                                          ((64, 64), (200, 1))], ids=str)
@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_resizing_is_bilinear(size, output, dtype, error):
    """To the padded frame, of which the frame is cut out, then to the output: PyTorch's own steps, in float64."""
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 16, 16, dtype=torch.float64)
    expected = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)[..., :size[0], :size[1]]
    if output:
        expected = F.interpolate(expected, size=output, mode="bilinear", align_corners=False)
    found = resize_masks(logits.to(dtype), size, output)
    assert found.dtype == dtype and found.shape == (3, 2, *(output or size))
    assert (found - expected).norm() / expected.norm() < error
    if dtype == torch.float64:
        torch.testing.assert_close(resize_masks(logits[1, 1], size, output), found[1, 1])    # any number of masks


def test_mask_confidence_is_a_loop():
    logits = torch.tensor([[[2.0, -1.0], [0.0, 0.5]], [[-3.0, -1.0], [-0.1, -9.0]]])
    mask_sum, mask_area = mask_confidence(logits)
    assert mask_sum.tolist() == pytest.approx([sum(1 / (1 + 2.718281828459045 ** -logit) for logit in (2.0, 0.5)), 0])
    assert mask_area.tolist() == [2, 0] and mask_area.dtype == torch.int64  # exact in videos of any length
