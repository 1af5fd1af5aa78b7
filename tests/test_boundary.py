"""AP by boundaries: erosion in plain loops, and small examples."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from scipy import ndimage

from evaluation import metric
from evaluation.boundary import boundary_rle, boundary_thickness, erode, evaluate_boundary
from evaluation.overlaps import measure_overlaps
from test_metric import annotation, encode, prediction, truth

SIZE = (150, 200)  # a diagonal of 250 pixels: boundaries are 5 pixels thick


def numbers(results, ground_truth):
    results, ground_truth = metric.check_results(results, ground_truth)
    return evaluate_boundary(results, ground_truth, measure_overlaps(results, ground_truth))


def rectangle(top, left, height, width):
    mask = np.zeros(SIZE, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def plain_erosion(mask, times):
    """As OpenCV defines it: the minimum of the 3 x 3 pixels around each pixel, again and again.

    The published code surrounds the frame by zeros.
    """
    for _ in range(times):
        before, mask = mask, np.zeros_like(mask)
        for y in range(1, mask.shape[0] - 1):
            for x in range(1, mask.shape[1] - 1):
                mask[y, x] = min(before[y + dy, x + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1))
    return mask


@pytest.mark.parametrize("seed", range(6))
def test_erosion_in_plain_loops(seed):
    random = np.random.default_rng(seed)
    mask = ndimage.zoom(random.random((5, 6)), 3, order=1) > 0.25
    mask = mask.astype(np.uint8)
    for times in (1, 2, 3, 5):
        np.testing.assert_array_equal(
            erode(mask, times), plain_erosion(np.pad(mask, 1), times)[1:-1, 1:-1]
        )


def test_erosion_of_a_large_mask_is_that_of_scipy():
    mask = (ndimage.zoom(np.random.default_rng(0).random((9, 16)), 20, order=1) > 0.3).astype(
        np.uint8
    )
    for times in (4, 7, 15):
        expected = ndimage.binary_erosion(mask, np.ones((3, 3)), times)
        assert expected.any()
        np.testing.assert_array_equal(erode(mask, times), expected)


@pytest.mark.parametrize(
    "height, width, thickness",
    [(1, 1, 1), (30, 40, 1), (45, 60, 2), (360, 640, 15), (720, 1280, 29)],
)
def test_boundaries_are_two_percent_of_the_diagonal(height, width, thickness):
    assert boundary_thickness(height, width) == thickness


def test_a_boundary_is_inside_of_the_mask_and_along_the_frame():
    mask = rectangle(0, 20, 40, 60)  # touches the upper side
    boundary = coco_mask.decode(boundary_rle(encode(mask), 5)).astype(bool)
    np.testing.assert_array_equal(boundary, mask & ~rectangle(5, 25, 30, 50))
    empty = encode(np.zeros(SIZE, bool))
    assert not coco_mask.area(boundary_rle(empty, 5))


def test_a_loose_outline_of_a_large_object():
    """80 x 80 pixels instead of 76 x 76: the IoU of the masks is 0.90, of the boundaries 0.43.

    The smaller boundary has 76 ** 2 - 66 ** 2 pixels, the larger one 80 ** 2 - 70 ** 2: 76 ** 2 -
    70 ** 2 are in both, 80 ** 2 - 66 ** 2 in any.
    """
    assert (76**2 - 70**2) / (80**2 - 66**2) == pytest.approx(0.429, abs=0.001)
    masks = [encode(rectangle(20, 20, 80, 80))], [encode(rectangle(22, 22, 76, 76))]
    ground_truth = truth(annotation(masks[0]), frames=1, size=SIZE)
    results = [prediction(masks[1])]
    assert metric.evaluate_results(results, ground_truth)["AP"] == pytest.approx(0.9)
    videos = measure_overlaps(results, ground_truth)
    assert videos[0].track_ious[0, 0] == pytest.approx(76**2 / 80**2)
    found = numbers(results, ground_truth)
    assert found["boundary_iou"]["AP"] == found["min_iou"]["AP"] == 0


def test_intersections_and_unions_are_summed_over_frames():
    """A perfect frame of a large object, and a frame in which a small one is missed."""
    large, small = rectangle(10, 10, 100, 100), rectangle(10, 10, 40, 40)
    ground_truth = truth(annotation([encode(large), encode(small)]), frames=2, size=SIZE)
    found = numbers([prediction([encode(large), None])], ground_truth)
    large, small = 100**2 - 90**2, 40**2 - 30**2  # boundaries
    thresholds = np.linspace(0.5, 0.95, 10)
    expected = np.mean(large / (large + small) >= thresholds)
    assert 0 < expected < 1
    assert found["boundary_iou"]["AP"] == pytest.approx(expected)


def test_boundaries_alone_ignore_what_is_inside():
    """A frame around the object has the same boundary. The minimum is the IoU of the masks."""
    mask, hole = rectangle(20, 20, 80, 80), rectangle(25, 25, 70, 70)
    ground_truth = truth(annotation([encode(mask)]), frames=1, size=SIZE)
    found = numbers([prediction([encode(mask & ~hole)])], ground_truth)
    assert found["boundary_iou"]["AP"] == pytest.approx(1)
    assert found["min_iou"]["AP"] == 0


def test_crowds_are_matched_by_masks():
    """The prediction overlaps the crowd enough, so it is no error."""
    crowd, loose = rectangle(20, 20, 80, 80), rectangle(21, 21, 78, 78)
    other = rectangle(110, 110, 30, 30)
    ground_truth = truth(
        annotation([encode(crowd)], 1, crowd=1), annotation([encode(other)], 2), frames=1, size=SIZE
    )
    found = numbers([prediction([encode(loose)]), prediction([encode(other)], 0.5)], ground_truth)
    assert found["boundary_iou"]["AP"] == found["min_iou"]["AP"] == pytest.approx(1)
    assert list(found["min_iou"]) == list(metric.evaluate_results([], ground_truth))
