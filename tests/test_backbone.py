"""Backbones: ResNet equals torchvision's, Swin equals the detectors' (and torchvision's where the
two agree).
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import get_model
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.swin_transformer import SwinTransformer

from backbone import (
    BACKBONES,
    FrozenBatchNorm,
    ResNetBackbone,
    SwinBackbone,
    build_backbone,
    wrapped_pairs,
)
from fast.folded_resnet import fold_norms, fold_resnet, fuse_blocks, space_to_depth
from fast.trained_resnet import (
    FusedTrainedResNet,
    convolution_relu,
    fuse_trained_resnet,
    fused_kernel,
)
from golden_set import make_video, meta, official_weights, read_arrays, subsampled_error
from outlines import outlined
from reading.translation import translate


@torch.no_grad()
def test_resnet_is_torchvisions():
    torch.manual_seed(0)
    theirs = ResNet(Bottleneck, [1, 2, 1, 1], num_classes=2).eval()
    ours = ResNetBackbone(Bottleneck, [1, 2, 1, 1], torch.nn.BatchNorm2d).eval()
    ours.load_state_dict(
        {name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    )
    images = torch.randn(1, 3, 64, 96)
    maps = ours(images)
    assert [tuple(m.shape[1:]) for m in maps] == [
        (256, 16, 24),
        (512, 8, 12),
        (1024, 4, 6),
        (2048, 2, 3),
    ]
    torch.testing.assert_close(theirs.fc(maps[-1].mean((2, 3))), theirs(images))


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "swin_t", "swin_s", "swin_b"])
def test_weights_are_named_and_shaped_as_torchvisions(name):
    """So that its ImageNet weights fit, but for the classifier and, of a Swin, the last norm."""
    with outlined():
        theirs = {
            key: value.shape
            for key, value in get_model(name).state_dict().items()
            if not key.startswith(("fc.", "head.", "norm."))
        }
        ours = build_backbone(name, "batch") if "resnet" in name else build_backbone(name)
    assert {
        key: value.shape for key, value in ours.state_dict().items() if not key.startswith("norms.")
    } == theirs


def test_the_heads_of_a_swin():
    """Their number is in the table of relative positions, those of torchvision's sizes are compared
    above.
    """
    with outlined():
        network = build_backbone("swin_l")
    tables = [
        value
        for key, value in network.state_dict().items()
        if key.endswith("relative_position_bias_table")
    ]
    assert [table.shape[1] for table in tables] == [6] * 2 + [12] * 2 + [24] * 18 + [48] * 2
    # Windows of 12.
    assert {table.shape[0] for table in tables} == {23**2}


def test_another_window():
    for window in (None, 5):
        with outlined():
            network = build_backbone("swin_t", window=window)
        tables = [
            value
            for key, value in network.state_dict().items()
            if key.endswith("relative_position_bias_table")
        ]
        assert {len(table) for table in tables} == {(2 * (window or 7) - 1) ** 2}


def test_a_group_norm_has_32_groups():
    network = build_backbone("resnet10", "group")
    groups = [
        module.num_groups for module in network.modules() if isinstance(module, torch.nn.GroupNorm)
    ]
    # 1 + 4 * 2, and 3 beside.
    assert len(groups) == 12 and set(groups) == {32}


def test_norms():
    """A frozen norm has no parameters and does not move.

    A learning one does; an unknown name is refused.
    """
    for norm in ("frozen", "batch", "group"):
        network = build_backbone("resnet10", norm).train()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        network(torch.randn(2, 3, 64, 64))
        moved = [
            name
            for name, value in network.state_dict().items()
            if not torch.equal(value, before[name])
        ]
        assert bool(moved) == (norm == "batch")
        assert ("bn1.weight" in dict(network.named_parameters())) == (norm != "frozen")
    with pytest.raises(ValueError, match="frozen, batch, group"):
        build_backbone("resnet10", "layer")
    with pytest.raises(ValueError, match="swin_l"):
        build_backbone("vgg")


@pytest.fixture
def bottlenecks(monkeypatch):
    """A ResNet with the blocks of ResNet-50, two in its first stage."""
    build = lambda norm, _: ResNetBackbone(Bottleneck, [2, 1, 1, 1], norm, 128)  # noqa: E731
    monkeypatch.setitem(BACKBONES, "bottlenecks", build)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["frozen", "batch", "group"])
@pytest.mark.parametrize("name", ["resnet10_thin", "bottlenecks"])
@pytest.mark.usefixtures("bottlenecks")
def test_folded_norms_change_nothing(name, norm):
    """Statistics and affine maps of all kinds; a group norm looks at its input and stays."""
    torch.manual_seed(0)
    network = build_backbone(name, norm).double().eval()
    for key, value in network.state_dict().items():
        if value.ndim == 1 and "num_batches" not in key:
            value.uniform_(0.5, 1.5)
    images = torch.randn(1, 3, 64, 96).double()
    expected = network(images)
    fold_norms(network)
    for found, before in zip(network(images), expected, strict=True):
        torch.testing.assert_close(found, before, rtol=1e-9, atol=1e-9)
    assert isinstance(network.layer4[0].downsample[1], torch.nn.Identity) == (norm != "group")


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet10", "bottlenecks"])
@pytest.mark.usefixtures("bottlenecks")
def test_fused_convolutions_are_the_same(monkeypatch, name):
    """What cuDNN's kernels are to compute, computed by PyTorch: the same maps, with the first
    convolution on pairs of pixels.
    """

    def convolve(x, weight, bias, stride, padding, dilation, groups):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    def convolve_and_add(x, weight, residual, alpha, bias, *how):
        return (F.conv2d(x, weight, bias, *how) + alpha * residual).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", convolve, raising=False)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", convolve_and_add, raising=False)
    torch.manual_seed(0)
    network, images = build_backbone(name).double().eval(), torch.randn(2, 3, 64, 96).double()
    for key, value in network.state_dict().items():
        if value.ndim == 1:
            value.uniform_(0.5, 1.5)
    expected = network(images)
    fold_norms(network)
    fuse_blocks(network)
    for found, before in zip(network(images), expected, strict=True):
        torch.testing.assert_close(found, before, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 12), (64, 96), (2, 2)])
def test_the_stem_convolution_on_squares_of_pixels(size):
    convolution = build_backbone("resnet10").conv1.double()
    images = torch.randn(2, 3, *size).double()
    found = F.conv2d(*space_to_depth(images, convolution.weight))
    torch.testing.assert_close(found, convolution(images))


def test_only_norms_are_folded_on_a_cpu():
    """The fused kernels are cuDNN's; a group norm cannot be folded at all."""
    for norm, expected in (("frozen", torch.nn.Identity), ("group", torch.nn.GroupNorm)):
        network = build_backbone("resnet10", norm)
        fold_resnet(network, torch.float16)
        assert type(network) is ResNetBackbone and isinstance(network.bn1, expected)


def test_the_thin_backbone_has_half_of_the_weights():
    """Its last stage has 256 channels instead of 512."""
    thin, whole = (build_backbone(name, "batch") for name in ("resnet10_thin", "resnet10"))
    assert thin.channels == [64, 128, 256, 256]
    assert [maps.shape[1] for maps in thin(torch.randn(2, 3, 64, 64))] == thin.channels
    count = [
        sum(parameter.numel() for parameter in network.parameters()) for network in (thin, whole)
    ]
    assert 0.5 < count[0] / count[1] < 0.52


@torch.no_grad()
def test_swin_is_torchvisions_where_every_map_holds_a_window():
    """Same weights, maps larger than the window: torchvision's last stage, before its norm, equals
    ours, undone of its norm.
    """
    torch.manual_seed(0)
    ours = SwinBackbone(24, [2, 2, 2, 2], [1, 2, 2, 4], 2).eval()
    theirs = SwinTransformer([4, 4], 24, [2, 2, 2, 2], [1, 2, 2, 4], [2, 2], num_classes=2).eval()
    ours.load_state_dict(
        {
            name: value
            for name, value in theirs.state_dict().items()
            if name.startswith("features.")
        },
        strict=False,
    )
    images = torch.randn(1, 3, 160, 192)
    for norm in ours.norms:
        norm.weight.copy_(torch.rand_like(norm.weight) + 0.5)
    expected = ours.norms[-1](theirs.features(images)).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours(images)[-1], expected)


def test_shift_mask_by_hand():
    """One window row of two, window 2, shift 1: after the roll a window's second column or row may
    come from afar.
    """
    apart = wrapped_pairs(1, 2, 2, 1, torch.device("cpu"))
    # tokens of a window: (0,0) (0,1) / (1,0) (1,1); rows 0 and 1 never were neighbours, columns
    # only in the first window
    assert apart[0].tolist() == [
        [False, False, True, True],
        [False, False, True, True],
        [True, True, False, False],
        [True, True, False, False],
    ]
    assert apart[1].tolist() == [
        [False, True, True, True],
        [True, False, True, True],
        [True, True, False, True],
        [True, True, True, False],
    ]


def swin_maps(
    constructor: dict, window: int, key: str, spec: dict, normalise: dict, dtype: torch.dtype
):
    backbone = SwinBackbone(
        constructor["embed_dim"],
        constructor["depths"],
        constructor["num_heads"],
        window,
        constructor["drop_path_rate"],
    ).eval()
    weights, _ = translate(official_weights(key))
    missing, unexpected = backbone.load_state_dict(
        {name.removeprefix("backbone."): value for name, value in weights.items()}, strict=False
    )
    assert not unexpected and all(name.endswith("relative_position_index") for name in missing)
    frame = make_video(1, spec["H"], spec["W"], spec["salt"]).to(dtype)
    with torch.no_grad():
        return backbone.to(dtype)((frame - normalise["subtract"]) / normalise["divide"])


SWIN = meta()["swin"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "spec", SWIN["tiny"]["inputs"], ids=lambda spec: f"{spec['H']}x{spec['W']}"
)
@pytest.mark.parametrize("window", SWIN["tiny"]["windows"])
def test_golden_swin_tiny(window, spec, dtype):
    """Windows larger than the map, sizes that are no multiple of anything: where torchvision's
    function differs.
    """
    maps = swin_maps(
        SWIN["tiny"]["constructor"],
        window,
        SWIN["tiny"]["names_shapes"][str(window)],
        spec,
        SWIN["normalise"],
        dtype,
    )
    for stage, m in enumerate(maps, 2):
        key = f"tiny.w{window}.{spec['H']}x{spec['W']}.res{stage}"
        assert subsampled_error(m, read_arrays(SWIN["file"]), key) < 1e-5, key


@pytest.mark.slow
def test_golden_swin_large():
    large, golden = SWIN["large"], read_arrays(SWIN["file"])
    spec, constructor = large["input"], large["constructor"]
    with outlined():
        ours = build_backbone("swin_l")
    sizes = (constructor[name] for name in ("embed_dim", "depths", "num_heads", "window_size"))
    with outlined():
        official = SwinBackbone(*sizes)
    assert ours.channels == official.channels
    shapes = [
        {name: value.shape for name, value in network.state_dict().items()}
        for network in (ours, official)
    ]
    assert shapes[0] == shapes[1]
    maps = swin_maps(
        constructor,
        constructor["window_size"],
        large["names_shapes"],
        spec,
        SWIN["normalise"],
        torch.float32,
    )
    for stage, m in enumerate(maps, 2):
        key = f"large.{spec['H']}x{spec['W']}.res{stage}"
        assert subsampled_error(m, golden, key) < 1e-4, key
        assert abs(m.flatten()[:64].numpy() - golden[key + "__first64"]).max() < 1e-4


def test_strides():
    for name in BACKBONES:
        with outlined():
            network = build_backbone(name)
        factor = 4 if "thin" in name else 8
        assert len(network.channels) == 4
        assert network.channels[3] == factor * network.channels[0]


def test_paths_are_dropped_as_often_as_asked():
    """More often in later blocks: from never to that share."""
    backbone = SwinBackbone(48, (2, 2, 2, 2), (3, 6, 12, 24), 7, drop_path=0.4)
    dropped = [
        module.p for module in backbone.modules() if type(module).__name__ == "StochasticDepth"
    ]
    assert dropped[0] == 0 and dropped[-1] == pytest.approx(0.4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_frozen_norm_keeps_16_bit(dtype):
    """It equals the one in float32 up to rounding, and the type stays."""
    torch.manual_seed(0)
    norm = FrozenBatchNorm(4)
    for buffer in norm.buffers():
        buffer.copy_(torch.rand(4) + 0.5)
    x = torch.randn(2, 4, 5, 6)
    y = norm(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), norm(x), rtol=0.02, atol=0.02)


def with_random_norms(backbone):
    """Statistics and affine parameters unlike those of a new norm."""
    for norm in backbone.modules():
        if isinstance(norm, FrozenBatchNorm):
            for name, values in norm.named_buffers():
                values.uniform_(0.5, 1.5) if name != "bias" else values.normal_()
    return backbone


def outputs_and_gradients(backbone, images, amp):
    """Maps of the backbone, and the gradients of a weighted sum of all of them."""
    backbone.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        maps = backbone(images)
    weights = [torch.linspace(-1, 1, m.numel()).view(m.shape).to(images) for m in maps]
    sum((m.to(images.dtype) * weight).sum() for m, weight in zip(maps, weights)).backward()
    return maps, {name: p.grad.clone() for name, p in backbone.named_parameters()}


def errors_in_16_bit(name, device, recompute):
    """Of the plain and the fused ResNet against float64: maps and gradients of all weights."""
    torch.manual_seed(0)
    plain = with_random_norms(build_backbone(name, "frozen")).to(device)
    plain = plain.to(memory_format=torch.channels_last)
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64, device=device)
    exact = outputs_and_gradients(copy.deepcopy(plain).double(), images, amp=False)
    names = plain.state_dict().keys()

    fused = copy.deepcopy(plain)
    fused.recompute = recompute
    fuse_trained_resnet(fused, torch.bfloat16)
    assert type(fused) is FusedTrainedResNet and fused.state_dict().keys() == names
    errors = []
    for backbone in (plain, fused):
        maps, gradients = outputs_and_gradients(backbone, images.float(), amp=True)
        pairs = [*zip(maps, exact[0]), *((gradients[key], exact[1][key]) for key in gradients)]
        errors.append(sum(((a - b).norm() / b.norm()).item() for a, b in pairs) / len(pairs))
    return errors


@pytest.mark.parametrize("name", ["resnet10", "resnet50"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_fused_trained_resnet_is_as_exact_as_the_plain_one(name, recompute):
    error, fused_error = errors_in_16_bit(name, "cpu", recompute)
    assert 0 < fused_error < 1.2 * error


def test_the_gradients_of_a_fused_convolution():
    convolution = torch.nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False).double()
    convolution.scale = torch.rand(3, 1, 1, 1, dtype=torch.float64) + 0.5
    convolution.shift = torch.randn(3, dtype=torch.float64)
    x, residual = torch.randn(2, 2, 7, 9).double(), torch.randn(2, 3, 4, 5).double()
    expected = convolution(x) * convolution.scale[:, 0] + convolution.shift[:, None, None]
    torch.testing.assert_close(convolution_relu(convolution, x), expected.relu())
    x.requires_grad_(), residual.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, weight, residual: convolution_relu(convolution, x, residual),
        (x, convolution.weight, residual),
    )


def test_constants_are_those_of_the_norm():
    """Of a small variance, too; they follow the norm when weights are loaded."""
    fused = with_random_norms(build_backbone("resnet10", "frozen"))
    fused.bn1.running_var.fill_(1e-5)
    fuse_trained_resnet(fused, torch.float32)
    other = with_random_norms(build_backbone("resnet10", "frozen"))
    x = torch.randn(1, 64, 2, 3)
    for _ in range(2):
        scale, shift = fused.conv1.scale[:, 0], fused.conv1.shift[:, None, None]
        torch.testing.assert_close(scale * x + shift, fused.bn1(x))
        fused.load_state_dict(other.state_dict())


def test_activations_are_computed_again(monkeypatch):
    """Those of two of four stages, and only with `recompute`."""
    calls = []

    def count(*arguments):
        calls.append(1)
        return fused_kernel(*arguments)

    monkeypatch.setattr("fast.trained_resnet.fused_kernel", count)
    backbone = build_backbone("resnet10", "frozen")
    fuse_trained_resnet(backbone, torch.bfloat16)
    counts = []
    for backbone.recompute in (False, True):
        calls.clear()
        outputs_and_gradients(backbone, torch.randn(1, 3, 32, 32), amp=True)
        counts.append(len(calls))
    assert counts == [9, 13]  # stem and two convolutions a stage; two stages again


def test_a_changed_resnet_is_not_fused():
    class Adapted(torch.nn.Conv2d):
        pass

    changes = {
        "activation": lambda net: setattr(net.layer2[0], "relu", torch.nn.SiLU()),
        "norm": lambda net: setattr(net.layer1[0], "bn2", torch.nn.GroupNorm(1, 64)),
        "convolution": lambda net: setattr(net, "conv1", Adapted(3, 64, 7, 2, 3, bias=False)),
        "bias": lambda net: setattr(
            net.layer3[0].conv1, "bias", torch.nn.Parameter(torch.ones(256))
        ),
    }
    for change in changes.values():
        backbone = build_backbone("resnet10", "frozen")
        change(backbone)
        fuse_trained_resnet(backbone, torch.bfloat16)
        assert type(backbone) is ResNetBackbone
        backbone(torch.randn(1, 3, 32, 32))


def test_a_trained_resnet_can_be_folded():
    torch.manual_seed(0)
    backbone = with_random_norms(build_backbone("resnet10", "frozen")).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = backbone(images)
    fuse_trained_resnet(backbone, torch.bfloat16)
    fold_resnet(backbone, torch.float32)
    backbone.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        for found, exact in zip(backbone(images), expected):
            torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm, trained", [("batch", True), ("group", True), ("frozen", False)])
def test_other_resnets_are_not_fused(norm, trained):
    backbone = build_backbone("resnet10", norm).requires_grad_(trained)
    fuse_trained_resnet(backbone, torch.bfloat16)
    assert type(backbone) is ResNetBackbone
