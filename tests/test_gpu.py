"""GPU results: official numbers in float64, and training steps in 16 bit."""

import copy
import json

import pytest
import torch

import train
from backbone import DetectorWindowAttention, build_backbone
from clips import Clip
from detector import AttentionMask, UpsampleAdd
from evaluation.postprocess import mask_sum_and_area
from fast.cuda_graphs import CUDAGraphCache, GraphPool
from fast.detection_graphs import graph_detector
from fast.folded_resnet import FusedResNet, fold_frozen_resnet, fold_resnet
from fast.fused_masks import fused_mask_sum_and_area
from fast.fused_modules import (
    FusedAttentionMask,
    FusedGroupNorm,
    FusedResidualNorm,
    FusedUpsampleAdd,
    FusedWindowAttention,
    fuse_modules,
)
from fast.fused_sampling import fused_sample_features
from fast.half_precision import HalfLinear, LinearReLU, cast_weights
from fast.trained_resnet import fuse_trained_resnet
from fast.training_graphs import graph_tracker, tensors_of
from golden_set import PROPAGATION, golden_model, make_video, meta, read_arrays, relative_error
from losses import Criterion
from matcher import sample_features
from model import build_model
from runtime.loading import read_ahead
from runtime.packing import PackedBatch, kept_blocks
from synthetic.suites import make_dataset
from test_backbone import errors_in_16_bit
from test_masks_in_16_bit import assert_masks_in_16_bit
from test_runtime_loading import Items, assert_equal_items
from transformer import ResidualNorm

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch sees"
)


def test_golden_logits_on_the_gpu():
    spec = meta()["infer"]
    model = (
        golden_model(
            spec["names_shapes"],
            "r50",
            spec["num_classes"],
            PROPAGATION[spec["gated"], spec["use_mem"]],
            torch.float64,
        )
        .eval()
        .cuda()
    )
    for name, video in spec["videos"].items():
        result = model.segment_video(make_video(**video), top_k=spec["topk"])
        assert (
            relative_error(result.logits.cpu(), read_arrays(spec["files"][name])["f64.logits"])
            < 1e-8
        )


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_training_steps(tmp_path, amp):
    """Some steps in each precision: finite losses, and weights that moved."""
    make_dataset(
        tmp_path / "set",
        train_videos=2,
        valid_videos=1,
        frames=4,
        height=64,
        width=64,
        objects=(1, 2),
    )
    common = [
        "--data-root",
        str(tmp_path / "set"),
        "--frames",
        "2",
        "--points",
        "64",
        "--short-sides",
        "64",
        "--workers",
        "0",
        "--batch",
        "2",
        "--amp",
        amp,
    ]
    states = []
    for iterations in (0, 20):  # in fp16 the first steps only find the scale
        output = tmp_path / f"run{iterations}"
        train.main(
            train.parse_arguments(
                [*common, "--iterations", str(iterations), "--output", str(output)]
            )
        )
        states.append(
            torch.load(output / "last.pt", weights_only=True, map_location="cpu")["model"]
        )
    assert all(value.isfinite().all() for value in states[1].values())
    assert not torch.equal(
        states[0]["tracker.query_feat.weight"], states[1]["tracker.query_feat.weight"]
    )


@pytest.mark.parametrize(
    "more",
    [(), ("--freeze-detector", "--init", ""), ("--propagation", "gated+memory", "--amp", "off")],
    ids=" ".join,
)
def test_deterministic_training(tmp_path, more):
    """Two runs of one seed: every loss and every weight to the last bit."""
    make_dataset(
        tmp_path / "set",
        train_videos=2,
        valid_videos=1,
        frames=4,
        height=96,
        width=96,
        objects=(2, 4),
    )
    common = [
        "--data-root",
        str(tmp_path / "set"),
        "--frames",
        "3",
        "--short-sides",
        "96",
        "--workers",
        "0",
        "--batch",
        "4",
        "--iterations",
        "10",
        "--log-every",
        "1",
        "--deterministic",
        *more,
    ]
    try:
        for name in ("one", "other"):
            train.main(train.parse_arguments([*common, "--output", str(tmp_path / name)]))
    finally:
        torch.use_deterministic_algorithms(False)
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
        ]
        for name in ("one", "other")
    ]
    assert losses[0] == losses[1] and len(set(losses[0])) == 10
    one, other = (
        torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
        for name in ("one", "other")
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_fused_kernels_are_as_exact_as_others(dtype):
    """In 16 bit, against float64: convolutions with all that follows them, and linear maps with
    their ReLU.
    """
    torch.manual_seed(0)
    network, images = (
        build_backbone("resnet50").cuda().eval(),
        torch.randn(2, 3, 64, 96, device="cuda"),
    )
    exact, errors = copy.deepcopy(network).double()(images.double()), []
    for fused in (False, True):
        own = copy.deepcopy(network)
        if fused:
            fold_resnet(own, dtype)
        assert isinstance(own, FusedResNet) == fused
        cast_weights(own.modules(), dtype)
        with torch.autocast("cuda", dtype):
            maps = own.to(memory_format=torch.channels_last)(images)
        errors.append(
            [
                (found.double() - expected).norm() / expected.norm()
                for found, expected in zip(maps, exact, strict=True)
            ]
        )
    assert all(fused < 0.02 and fused < 1.5 * plain for plain, fused in zip(*errors, strict=True))
    linear = LinearReLU(64, 256).to("cuda", dtype)
    x = torch.randn(3, 50, 64, device="cuda", dtype=dtype)
    expected = torch.nn.functional.linear(x, linear.weight, linear.bias).relu()
    assert torch.equal(linear(x), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_masks_in_16_bit(compiled):
    """Against those of a CPU in float32."""
    assert_masks_in_16_bit("cuda", compiled)


@pytest.mark.parametrize("propagation", ["gated", "memory", "gated+memory"])
def test_replayed_batches_are_what_their_kernels_compute(propagation, monkeypatch):
    """Seventeen frames, so a batch is filled up: however they come, through CUDA graphs or kernel
    by kernel, the very same result, and another one once the weights have changed."""
    torch.manual_seed(0)
    model = build_model("toy", 3, propagation).eval().cuda()
    frames = torch.randint(0, 256, (17, 3, 40, 56), dtype=torch.uint8)
    with torch.autocast("cuda", torch.bfloat16):
        whole = model.encode_video([frames], top_k=5)
        for chunk in (1, 4, 16):
            found = model.encode_video(frames.split(chunk), top_k=5)
            assert torch.equal(found.scores, whole.scores)
            assert found.segmentations == whole.segmentations
        logits = model.segment_video(frames).logits
        monkeypatch.setattr(
            CUDAGraphCache, "__call__", lambda self, function, *inputs: function(*inputs)
        )
        assert torch.equal(model.segment_video(frames).logits, logits)
        monkeypatch.undo()
        torch.nn.init.normal_(model.tracker.class_embed.weight)
    with torch.autocast("cuda", torch.bfloat16):  # a new context: it caches cast weights
        assert not torch.equal(model.segment_video(frames).logits, logits)


# Fused norms


@torch.no_grad()
@pytest.mark.parametrize("rows, channels", [(1, 16), (100, 256), (4099, 64)])
def test_a_residual_norm_is_one_kernel(rows, channels):
    torch.manual_seed(0)
    norm = ResidualNorm(channels).cuda()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = 3 + torch.randn(rows, channels, device="cuda")
    branch = torch.randn(rows, channels, device="cuda", dtype=torch.bfloat16)
    expected = copy.deepcopy(norm).double()(x.double(), branch.double())
    fuse_modules(norm)
    assert type(norm) is FusedResidualNorm
    with torch.autocast("cuda", torch.bfloat16):
        found = norm(x, branch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (96, 160)])
def test_a_group_norm_of_channels_last_maps(size, relu):
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(32, 256).cuda()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    parts = [torch.nn.Identity(), norm] + relu * [torch.nn.ReLU()]
    sequence = torch.nn.Sequential(*parts)
    x = 5 + torch.randn(2, 256, *size, device="cuda", dtype=torch.float16)
    expected = copy.deepcopy(sequence).double()(x.double())
    fuse_modules(sequence)
    assert type(norm) is FusedGroupNorm
    with torch.autocast("cuda", torch.float16):
        plain = sequence(x)
        found = sequence(x.contiguous(memory_format=torch.channels_last))
        again = sequence(x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(found, again)
    for result in (plain, found):
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (12, 20), (23, 41)])
def test_upsampling_in_one_kernel(size):
    """Of the last of two levels that are joined, as in the pixel decoder."""
    torch.manual_seed(0)
    tokens = torch.randn(2, 7 + size[0] * size[1], 256, device="cuda")
    level = tokens[:, 7:].unflatten(1, size).permute(0, 3, 1, 2)
    lateral = torch.randn(2, 2 * size[0], 2 * size[1], 256, device="cuda").permute(0, 3, 1, 2)
    expected = UpsampleAdd()(level.double(), lateral.double())
    with torch.autocast("cuda", torch.float16):
        found = FusedUpsampleAdd()(level, lateral)
    assert found.dtype == torch.float16 and found.stride() == lateral.stride()
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("window, shift", [(7, 3), (12, 0), (12, 6)])
def test_window_attention_in_one_kernel(window, shift):
    """A map with padding, against the plain module in float32."""
    torch.manual_seed(0)
    plain = DetectorWindowAttention(192, [window, window], [shift, shift], num_heads=6).cuda()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 28, 50, 192, device="cuda")
    fused = copy.deepcopy(plain)
    fuse_modules(fused)
    assert type(fused) is FusedWindowAttention
    cast_weights(fused.modules(), torch.float16)
    with torch.autocast("cuda", torch.float16):
        found = fused(x)
    torch.testing.assert_close(found.float(), plain.eval()(x), rtol=0.02, atol=0.02)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_masks_in_one_kernel(dtype):
    torch.manual_seed(0)
    logits = torch.randn(2, 50, 3840, device="cuda").to(dtype)
    logits[0, 1], logits[1, 2] = -1, 1  # an empty and a full mask
    logits[1, 3, ::7] = -1e-5  # rounds to a probability of 0.5
    with torch.autocast("cuda", dtype):
        blocked = AttentionMask().block_background(logits)
        found = FusedAttentionMask().block_background(logits)
    assert found.dtype == dtype
    assert torch.equal(found, torch.zeros_like(found).masked_fill(blocked, -torch.inf))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_mask_scores_in_one_kernel(dtype):
    torch.manual_seed(0)
    logits = 4 * torch.randn(3, 5, 179, 333, device="cuda", dtype=dtype)
    logits[1, 2] = -5  # an empty mask
    sums, areas = fused_mask_sum_and_area(logits)
    expected_sums, expected_areas = mask_sum_and_area(logits)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=1e-3)
    assert torch.equal(areas, expected_areas) and areas.dtype == torch.int64


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sampling_of_features_in_one_kernel(dtype, layout):
    torch.manual_seed(0)
    features = torch.randn(3, 256, 45, 80, device="cuda").to(dtype, memory_format=layout)
    points = torch.rand(3, 999, 2, device="cuda")
    found, expected = fused_sample_features(features, points), sample_features(features, points)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_graph_casts_its_inputs_at_every_replay():
    """Tensors remember their casts; a graph must not keep the one of its warm-up."""
    linear = torch.nn.Linear(64, 8).cuda()
    cast_weights([linear], torch.float16)
    assert type(linear) is HalfLinear
    graphs = CUDAGraphCache()
    with torch.autocast("cuda", torch.float16):
        for _ in range(3):
            x = torch.randn(5, 64, device="cuda")
            found = graphs(lambda x: (linear(x), linear(x)), x)
            assert len(graphs.graphs) == 1
            for result in found:
                torch.testing.assert_close(result, linear(x.clone()))


# Graphs of training


def make_clip(frames, height, width, instances):
    """Random frames; rectangles that move to the right."""
    masks = torch.zeros(instances, frames, height, width, dtype=torch.bool)
    for number in range(instances):
        for t in range(frames):
            masks[number, t, 8 * number : 8 * number + 24, 4 * t : 4 * t + 32] = True
    shape = frames, 3, height, width
    return Clip(
        frames=torch.randint(0, 256, shape, dtype=torch.uint8),
        labels=torch.arange(instances),
        masks=masks,
    )


def gradients_of_steps(model, criterion, clips, steps=2):
    """Losses and gradients of steps under bfloat16; each step adds two backward passes."""
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        model.zero_grad()
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                output = model([clip.frames.cuda() for clip in clips])
            losses, _ = criterion(output, clips)
            sum(losses.values()).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((losses, gradients))
    return found


@pytest.mark.parametrize("frozen", [True, False])
def test_a_model_trains_in_graphs(frozen):
    """Losses and gradients are those of the plain model, and a change drops the graphs."""
    torch.manual_seed(0)
    model = build_model("toy", 3, norm="group", channels=64).cuda().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or name.startswith("tracker."))
    criterion = Criterion(3, points=100, freeze_detector=frozen)
    clips = [make_clip(3, 64, 96, 2) for _ in range(2)]
    expected = gradients_of_steps(model, criterion, clips)
    pool = GraphPool()
    graph_tracker(model, pool)
    graph_detector(model, pool)
    for _ in range(3):  # captured, then replayed
        found = gradients_of_steps(model, criterion, clips)
        for (losses, gradients), (plain_losses, plain_gradients) in zip(found, expected):
            torch.testing.assert_close(losses, plain_losses, rtol=1e-3, atol=1e-3)
            assert gradients.keys() == plain_gradients.keys()
            for name, gradient in gradients.items():
                error = (gradient - plain_gradients[name]).norm()
                assert error <= 0.03 * plain_gradients[name].norm() + 1e-4, name
    assert len(model.tracker.training_graphs.graphs) == len(model.detection_graphs.graphs) == 1
    assert (model.detection_graphs.pool is pool) == frozen
    assert copy.deepcopy(model).tracker.training_graphs.graphs == {}
    model.tracker.gate_mask = "blocked"
    changed = gradients_of_steps(model, criterion, clips, 1)
    assert any(changed[0][0][name] != value for name, value in expected[0][0].items())


def test_a_graph_holds_the_activations_of_one_pass():
    model = build_model("toy", 3, norm="group").cuda().train()
    graph_tracker(model)
    model.tracker.training_graphs.calls_before_capture = 0
    frames = make_clip(3, 64, 96, 1).frames.cuda()
    first, _ = (model([frames]).clips[-1].clip_embed.sum() for _ in range(2))
    with pytest.raises(RuntimeError, match="have been overwritten"):
        first.backward()


@torch.no_grad()
def test_a_frozen_resnet_runs_as_a_folded_copy():
    backbone = build_backbone("resnet50").cuda().requires_grad_(False)
    backbone = backbone.to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 96, device="cuda")
    expected, before = backbone(images), backbone.state_dict()
    fold_frozen_resnet(backbone, torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        found = backbone(images)
    assert found[0].dtype == torch.bfloat16
    for ours, exact in zip(found, expected):
        assert (ours - exact).norm() < 0.03 * exact.norm()
    assert backbone.state_dict().keys() == before.keys()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_trained_resnet_runs_in_fused_kernels(recompute):
    error, fused_error = errors_in_16_bit("resnet50", "cuda", recompute)
    assert 0 < fused_error < 1.2 * error


@pytest.mark.parametrize("weight", ["conv1.weight", "layer2.0.conv2.weight", "layer4.0.bn2.bias"])
def test_nan_in_a_fused_resnet_is_noticed(weight):
    """cuDNN's ReLU keeps NaN, so it reaches the maps in training and the scores in inference."""
    torch.manual_seed(0)
    model = build_model("toy", 3, backbone="resnet10", norm="frozen").cuda()
    model.to(memory_format=torch.channels_last)
    parts = dict(model.backbone.named_parameters()) | dict(model.backbone.named_buffers())
    with torch.no_grad():
        parts[weight][(0,) * parts[weight].ndim] = torch.nan
    frames = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)

    trained = copy.deepcopy(model).train()
    fuse_trained_resnet(trained.backbone, torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        maps = trained.backbone(trained.prepare([frames]))
    assert not maps[-1].isfinite().all()

    model.accelerate(torch.float16)
    assert isinstance(model.backbone, FusedResNet)
    with pytest.raises(FloatingPointError), torch.autocast("cuda", torch.float16):
        model.encode_video(frames)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_trained_detector_runs_in_graphs(recompute):
    """Sizes in any order: outputs and gradients are those of the plain detector."""
    torch.manual_seed(0)
    model = build_model("toy", 3, norm="group", channels=64).cuda().train()
    model.pixel_decoder.recompute = recompute
    plain = copy.deepcopy(model)
    graph_detector(model)
    sizes = [(64, 96)] * 4 + [(32, 64)] * 4 + [(64, 96), (96, 128)] * 4 + [(32, 64)] * 2
    for size in sizes:
        images = torch.randn(3, 3, *size, device="cuda")
        found = []
        for some_model in (model, plain):
            some_model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                output = some_model.detect(images)
            tensors = tensors_of(output)
            sum(tensor.float().square().mean() for tensor in tensors).backward()
            found.append(([tensor.detach().clone() for tensor in tensors], some_model))
        (outputs, _), (plain_outputs, _) = found
        for output, expected in zip(outputs, plain_outputs, strict=True):
            assert (output - expected).norm() <= 0.02 * expected.norm()
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
            assert (ours.grad is None) == (theirs.grad is None), name
            if ours.grad is not None:
                error = (ours.grad - theirs.grad).norm()
                assert error <= 0.03 * theirs.grad.norm() + 1e-5, name
    assert len(model.detection_graphs.graphs) == 3


@torch.no_grad()
def test_a_frozen_detector_runs_in_graphs():
    """Sizes in any order: results are those of the plain detector, also after a change."""
    torch.manual_seed(0)
    model = build_model("toy", 3, channels=64).cuda().train().requires_grad_(False)
    sizes = [(64, 96)] * 4 + [(32, 64)] * 4 + [(64, 96), (96, 128)] * 4 + [(32, 64)]
    plain = copy.deepcopy(model)
    graph_detector(model)

    def compare():
        for size in sizes:
            images = torch.randn(3, 3, *size, device="cuda")
            with torch.autocast("cuda", torch.bfloat16):
                found, expected = model.detect(images), plain.detect(images)
            torch.testing.assert_close(found.features, expected.features)
            torch.testing.assert_close(found.queries, expected.queries)
            for ours, theirs in zip(found.predictions, expected.predictions, strict=True):
                torch.testing.assert_close(ours, theirs)
        assert len(model.detection_graphs.graphs) == 3

    compare()
    for changed in (model, plain):
        changed.frame_decoder.query_feat.weight = torch.nn.Parameter(
            torch.ones_like(changed.frame_decoder.query_feat.weight)
        )
    compare()


@torch.no_grad()
@pytest.mark.parametrize("propagation", ["gated", "gated+memory"])
def test_streams_are_tracked_together(propagation):
    torch.manual_seed(0)
    model = build_model("toy", 3, propagation, norm="group").cuda().eval()
    alone, together = [None] * 3, [None] * 3
    for _ in range(3):
        frames = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
        found, together = model.step_streams(frames, together)
        for stream, tracks in enumerate(found):
            expected, alone[stream] = model.step(frames[stream], alone[stream])
            torch.testing.assert_close(tracks.scores, expected.scores, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(tracks.logits, expected.logits, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_exclusive_masks():
    """Of a video and of its steps, under autocast."""
    torch.manual_seed(0)
    model = build_model("toy", 3, norm="group").cuda().eval().accelerate(torch.float16)
    model.exclusive = True
    frames = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    state = None
    with torch.autocast("cuda", torch.float16):
        video = model.segment_video(frames)
        for frame in frames:
            tracks, state = model.step(frame, state)
    assert tracks.masks.shape == video.masks[:, -1].shape
    torch.testing.assert_close(tracks.scores, video.scores, rtol=0.02, atol=0.02)


# Loading


@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches_are_those_of_the_dataset(workers):
    """Workers fill their blocks of shared memory again."""
    order = [[3, 1], [0], [6, 5, 4], [2]] * 10
    batches = read_ahead(Items(), workers, torch.device("cuda"), batch_sampler=order)
    for batch, indices in zip(batches, order, strict=True):
        assert len(kept_blocks) <= workers and bool(kept_blocks) == bool(workers)
        for item, index in zip(batch, indices, strict=True):
            assert item.frames.is_pinned()
            assert_equal_items(item, Items()[index])
    assert not kept_blocks


def test_pinned_memory_is_kept_until_it_has_been_copied():
    """A batch may be dropped while its tensors still wait for their copy to the GPU."""
    packed = PackedBatch([torch.ones(1000), torch.ones(10**6)], shared=False).pin_memory()
    address = packed.block.data_ptr()
    x = torch.randn(8192, 8192, device="cuda")
    for _ in range(20):
        x = x @ x  # keeps the GPU busy
    copied = packed.unpack()[1].to("cuda", non_blocking=True)
    del packed
    other = PackedBatch([torch.zeros(1000), torch.zeros(10**6)], shared=False).pin_memory()
    assert other.block.data_ptr() != address
    assert copied.eq(1).all()
