"""GPU results: official numbers in float64, and training steps in 16 bit."""

import copy
import json

import pytest
import torch

import train
from backbone import build_backbone
from fast.cuda_graphs import CUDAGraphCache
from fast.folded_resnet import FusedResNet, fold_resnet
from fast.half_precision import LinearReLU, cast_weights
from golden_set import PROPAGATION, golden_model, make_video, meta, read_arrays, relative_error
from model import build_model
from synthetic.suites import make_dataset
from test_golden_inference import assert_masks_in_16_bit

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
