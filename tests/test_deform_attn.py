"""Deformable attention: the PyTorch path against a loop over every sample, and against the official
numbers.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from deform_attn import (
    DeformableAttention,
    deformable_attention,
    implementation,
    neighbours,
    pixel_centres,
    weighted_samples,
)
from golden_set import meta, read_arrays, relative_error


def bilinear(plane, x, y):
    """Value of plane (H, W, D) at x, y in 0..1 over the whole plane, zero outside: one sample, by
    its four neighbours.
    """
    height, width, channels = plane.shape
    column, row = x * width - 0.5, y * height - 0.5
    total = torch.zeros(channels, dtype=plane.dtype)
    for j in (math.floor(row), math.floor(row) + 1):
        for i in (math.floor(column), math.floor(column) + 1):
            if 0 <= j < height and 0 <= i < width:
                total += plane[j, i] * (1 - abs(column - i)) * (1 - abs(row - j))
    return total


def test_equals_a_loop_over_every_sample():
    torch.manual_seed(0)
    shapes, batch, heads, channels, points = [(2, 3), (4, 5)], 2, 2, 3, 2
    pixels = sum(height * width for height, width in shapes)
    value = torch.randn(batch, pixels, heads, channels, dtype=torch.float64)
    # Many fall outside.
    offsets = 2 * torch.randn(batch, pixels, heads, len(shapes), points, 2, dtype=torch.float64)
    logits = torch.randn(batch, pixels, heads, len(shapes) * points, dtype=torch.float64)
    ours = deformable_attention(value, shapes, offsets, logits).view(batch, pixels, heads, channels)

    planes = [
        p.view(batch, h, w, heads, channels)
        for p, (h, w) in zip(value.split([h * w for h, w in shapes], 1), shapes)
    ]
    centres = [
        ((i + 0.5) / w, (j + 0.5) / h) for h, w in shapes for j in range(h) for i in range(w)
    ]
    weights = logits.softmax(-1).view(batch, pixels, heads, len(shapes), points)
    for b in range(batch):
        for query in range(pixels):
            for head in range(heads):
                total = torch.zeros(channels, dtype=torch.float64)
                for level, (height, width) in enumerate(shapes):
                    for point in range(points):
                        x = (
                            centres[query][0]
                            + offsets[b, query, head, level, point, 0].item() / width
                        )
                        y = (
                            centres[query][1]
                            + offsets[b, query, head, level, point, 1].item() / height
                        )
                        total += weights[b, query, head, level, point] * bilinear(
                            planes[level][b, :, :, head], x, y
                        )
                torch.testing.assert_close(ours[b, query, head], total)


def test_weighted_samples_are_those_of_grid_sample():
    """The form that a reader of Deformable DETR knows, with its gradients.

    Queries are no pixels.
    """
    torch.manual_seed(0)
    shapes, batch, heads, channels, queries, points = [(2, 3), (4, 5), (1, 7)], 2, 3, 4, 6, 2
    pixels = sum(height * width for height, width in shapes)
    inputs = [
        torch.randn(batch, pixels, heads, channels, dtype=torch.float64),
        torch.rand(batch, queries, heads, len(shapes), points, 2, dtype=torch.float64) * 1.6 - 0.3,
        torch.randn(batch, queries, heads, len(shapes), points, dtype=torch.float64),
    ]
    value, locations, weights = (tensor.requires_grad_() for tensor in inputs)
    expected, start = 0, 0
    for level, (height, width) in enumerate(shapes):
        image = value[:, start : start + height * width].permute(0, 2, 3, 1).flatten(0, 1)
        # (B heads, C / heads, height, width).
        image = image.unflatten(2, (height, width))
        # (B heads, queries, points, 2).
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        samples = F.grid_sample(
            image, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        shares = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]
        # (B heads, C / heads, queries).
        expected = expected + (samples * shares).sum(-1)
        start += height * width
    expected = expected.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)
    found = weighted_samples(value, shapes, locations, weights)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    ):
        torch.testing.assert_close(one, other)


def test_neighbours_by_hand():
    """Positions in a row of three pixels: between two, on one, and at both ends, half outside."""
    (low, low_weight), (high, high_weight) = neighbours(
        torch.tensor([0.25, 1.0, -0.5, 2.5, 7.0]), 3
    )
    assert low.tolist() == [0, 1, 0, 2, 2] and high.tolist() == [1, 2, 0, 2, 2]
    assert low_weight.tolist() == [0.75, 1, 0, 0.5, 0]
    assert high_weight.tolist() == [0.25, 0, 0.5, 0, 0]


def test_golden_values_and_gradients():
    spec = meta()["msda_core"]
    golden, shapes = read_arrays(spec["file"]), [tuple(shape) for shape in spec["levels"]]
    batch, queries, heads, channels = spec["N"], spec["Lq"], spec["heads"], spec["head_dim"]
    pixels, points = sum(height * width for height, width in shapes), spec["points"]
    generator = torch.Generator().manual_seed(spec["seed"])
    draw = dict(generator=generator, dtype=torch.float64)
    value = torch.randn(batch, pixels, heads, channels, **draw)
    locations = (
        torch.rand(batch, queries, heads, len(shapes), points, 2, **draw) * spec["loc_scale"]
        + spec["loc_shift"]
    )
    weights = torch.randn(batch, queries, heads, len(shapes) * points, **draw).softmax(-1)
    weights = weights.view(batch, queries, heads, len(shapes), points)
    grad = torch.randn(batch, queries, heads * channels, **draw)
    assert relative_error(value.flatten()[:16], golden["value_first16"]) == 0

    inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    out = weighted_samples(inputs[0], shapes, *inputs[1:])
    grads = torch.autograd.grad(out, inputs, grad)
    assert relative_error(out.detach(), golden["out"]) < 1e-12
    assert relative_error(grads[0].flatten()[::3], golden["grad_value_s3"]) < 1e-12
    assert grads[0].sum().item() == pytest.approx(golden["grad_value_sum"].item(), rel=1e-9)
    assert relative_error(grads[1], golden["grad_loc"]) < 1e-12
    assert relative_error(grads[2], golden["grad_attn"]) < 1e-12


def test_float32_is_as_good_as_float32_can_be():
    torch.manual_seed(0)
    shapes = [(6, 10), (12, 20)]
    layer = DeformableAttention(32, levels=2, heads=4).double()
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.3)
    x = torch.randn(1, 300, 32, dtype=torch.float64)
    with torch.no_grad():
        exact = layer(x, x, shapes)
        single = layer.float()(x.float(), x.float(), shapes)
    assert relative_error(single, exact) < 1e-5


def test_starts_by_looking_in_all_directions():
    """Head h looks at angle 2 pi h / 8.

    Its points are 1, 2, 3, 4 steps away, alike on all levels, equally weighted.
    """
    layer = DeformableAttention(64, levels=3, heads=8, points=4)
    start = layer.sampling_offsets.bias.detach().view(8, 3, 4, 2)
    for head, direction in enumerate(
        [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    ):
        for point in range(4):
            expected = (point + 1) * torch.tensor(direction, dtype=torch.float32)
            torch.testing.assert_close(start[head, :, point], expected.expand(3, 2))
    assert not layer.sampling_offsets.weight.any() and not layer.attention_weights.weight.any()


def test_pixel_centres_are_x_then_y():
    centres = pixel_centres([(1, 2), (2, 1)], torch.zeros(()))
    assert centres.tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]


def test_levels_that_do_not_fit_are_refused():
    layer = DeformableAttention(32, levels=1, heads=4)
    x = torch.zeros(1, 7, 32)
    with pytest.raises(ValueError, match="7 pixels"):
        layer(x, x, [(2, 3)])
    with pytest.raises(ValueError, match="divisible"):
        DeformableAttention(30, heads=4)


@pytest.mark.parametrize(
    "dtype, error",
    [(torch.bfloat16, 0.01), (torch.float16, 0.002), (torch.float32, 2e-4), (torch.float64, 1e-12)],
)
def test_the_result_has_the_type_of_the_inputs_and_the_digits_of_float32(dtype, error):
    """Places in a wide level need more than 16 bit: only inputs and result are rounded."""
    torch.manual_seed(0)
    shapes, heads, channels, points = [(1, 700), (2, 300)], 2, 3, 2
    value = torch.randn(1, 1300, heads, channels).to(dtype)
    offsets = torch.randn(1, 1300, heads, len(shapes), points, 2).to(dtype)
    logits = torch.randn(1, 1300, heads, len(shapes) * points).to(dtype)
    found = deformable_attention(value, shapes, offsets, logits)
    assert found.dtype == dtype
    assert (
        relative_error(
            found.double(),
            deformable_attention(value.double(), shapes, offsets.double(), logits.double()),
        )
        < error
    )


def test_the_query_says_where_and_the_value_what():
    """The layer is four linear maps around the operator."""
    torch.manual_seed(0)
    layer, shapes = DeformableAttention(16, levels=2, heads=2, points=3).double(), [(2, 3), (4, 5)]
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    query, value = torch.randn(2, 2, 26, 16, dtype=torch.float64)
    sampled = deformable_attention(
        layer.value_proj(value).view(2, 26, 2, 8),
        shapes,
        layer.sampling_offsets(query).view(2, 26, 2, 2, 3, 2),
        layer.attention_weights(query).view(2, 26, 2, 6),
    )
    torch.testing.assert_close(layer(query, value, shapes), layer.output_proj(sampled))


def test_weights_start_within_xavier_bounds():
    """Uniform up to the square root of 6 / (inputs + outputs); biases but the offsets' are 0."""
    layer = DeformableAttention(96)
    assert (layer.levels, layer.heads, layer.points) == (3, 8, 4)
    for projection in (layer.value_proj, layer.output_proj):
        bound = math.sqrt(6 / (96 + 96))
        assert 0.98 * bound < projection.weight.abs().max() <= bound
        assert not projection.bias.any()
    assert not layer.attention_weights.bias.any() and layer.sampling_offsets.bias.any()


def test_a_cpu_runs_the_pytorch_path():
    assert implementation(torch.device("cpu")) == "PyTorch path"
