"""Loading weights: official files fit, mismatches are errors, and no file executes code."""

import argparse
import copy
import pickle
import zipfile
from collections import OrderedDict
from functools import cache
from pathlib import Path

import numpy
import pytest
import torch

from backbone import build_backbone
from checkpoint import (
    default_short_side,
    find_propagation,
    load_backbone,
    load_weights,
    model_from_checkpoint,
    read_run,
    save_checkpoint,
    save_weights,
)
from data import InputError
from golden_set import meta, names_shapes
from model import PRESETS, TEST_SIDES, build_model
from outlines import outlined
from reading.translation import translate
from sparse_set import SMALLEST

pytestmark = pytest.mark.usefixtures("four_convolutions")


@cache
def shared_model(num_classes=3, propagation="gated", **options):
    """One model for all tests that change none of its weights."""
    torch.manual_seed(0)
    return build_model("toy", num_classes, propagation, **SMALLEST | options)


def tiny_model(num_classes=3, propagation="gated"):
    """A model of its own for a test that changes weights; copying is faster than initialising."""
    return copy.deepcopy(shared_model(num_classes, propagation))


def few_weights(*others):
    """Entries of the shared model that tell its class count and propagation, and some others.

    A file of them is enough where a test ends before all weights are needed, and fast to read.
    """
    state = shared_model().state_dict()
    names = ("tracker.class_embed.weight", "tracker.gate_proj.weight", *others)
    return {name: state[name] for name in names}


def official_preset(shapes: dict) -> str:
    if any("patch_embed" in name for name in shapes):
        return "swin_l"
    return "r101" if any("res4.22." in name for name in shapes) else "r50"


# Files of one model for other data sets have the same names.
OTHER_SETS = ("swinl_ovisyaml", "vita_r50_coco", "vita_r50_ytvis2019")


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(key, marks=[pytest.mark.slow] * (key in OTHER_SETS))
        for key in meta()["names_shapes"]
        if "swin_tiny" not in key
    ],
)
def test_golden_official_state_dicts_load(key):
    """Nothing is missing and nothing unexpected, in the mode that the names imply.

    Only constants are ignored.
    """
    rows = names_shapes(key)
    state = {
        name: torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device="meta")
        for name, shape, dtype in rows
    }
    shapes = {name: shape for name, shape, _ in rows}
    whole = "vita_module.class_embed.weight" in shapes
    propagation = find_propagation(translate(state)[0]) or "plain"
    with outlined():
        model = build_model(
            official_preset(shapes),
            shapes["vita_module.class_embed.weight"][0] - 1 if whole else 3,
            propagation,
        )
    report = load_weights(model, state)
    assert not report.unexpected
    assert all(not whole and not name.startswith("backbone.") for name in report.missing)
    assert all(name.endswith("empty_weight") for name in report.ignored)
    assert len(report.loaded) + len(report.ignored) == len(rows)


def test_a_contradicting_mode_is_reported_by_name():
    gated, plain = tiny_model(), tiny_model(propagation="plain")
    assert load_weights(plain, gated.state_dict()).unexpected == [
        "tracker.gate_proj.weight",
        "tracker.gate_proj.bias",
    ]
    assert load_weights(gated, plain.state_dict()).missing == [
        "tracker.gate_proj.weight",
        "tracker.gate_proj.bias",
    ]


@pytest.mark.slow
def test_detectron2_pickles_load_without_running_anything(tmp_path):
    """numpy arrays under "model", as the model zoo's .pkl files.

    Protocol 2 is how they were written.
    """
    model = tiny_model()
    arrays = OrderedDict((name, value.numpy()) for name, value in model.state_dict().items())
    for protocol in (2, 4, 5):
        path = tmp_path / f"zoo{protocol}.pkl"
        path.write_bytes(
            pickle.dumps(
                {"model": arrays, "__author__": "someone", "scale": numpy.float64(1)}, protocol
            )
        )
        other = build_model("toy", 3, **SMALLEST)
        assert not load_weights(other, path).missing
        assert all(
            torch.equal(value, model.state_dict()[name])
            for name, value in other.state_dict().items()
        )


class Malice:
    def __reduce__(self):
        import os

        return os.system, ("echo harm > harm",)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_files_that_run_code_are_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"bad{suffix}"
    payload = {"model": {"backbone.bn1.weight": Malice()}}
    path.write_bytes(pickle.dumps(payload)) if suffix == ".pkl" else torch.save(payload, path)
    with pytest.raises(InputError, match="no checkpoint that can be read safely"):
        load_weights(shared_model(), path)
    assert not (tmp_path / "harm").exists()


CLAIMS = {
    "nested": b"\x80\x02}(K\x01" + b"\x85" * 300_000 + b"K\x01u.",
    "memory": b"\x80\x02}r\xff\xff\xff\x7f.",
    "bytes": b"\x80\x05\x96" + (2**34).to_bytes(8, "little") + b"x.",
    "shape": pickle.dumps({"a": numpy.zeros((2, 3), "f4")}, 2).replace(
        b"K\x02K\x03\x86", b"J\0\0\0\x7fK\x03\x86"
    ),
    "objects": pickle.dumps({"a": numpy.array([[], {}], dtype=object)}, 2),
    "pointers": pickle.dumps({"a": numpy.zeros((2, 3))}, 2).replace(b"f8", b"O8"),
}


@pytest.mark.parametrize("kind", CLAIMS)
def test_pickles_that_claim_what_they_do_not_hold_are_refused(tmp_path, kind):
    (tmp_path / "claim.pkl").write_bytes(CLAIMS[kind])
    with pytest.raises(InputError, match="claim.pkl is no checkpoint "):
        load_weights(shared_model(), tmp_path / "claim.pkl")


class Zeros:
    def __reduce__(self):
        return bytearray, (2**34,)


def test_an_endless_row_of_zeros_is_refused(tmp_path):
    for new in (True, False):
        torch.save({"a": Zeros()}, tmp_path / "zeros.pth", _use_new_zipfile_serialization=new)
        with pytest.raises(InputError, match="it asks for builtins.bytearray"):
            load_weights(shared_model(), tmp_path / "zeros.pth")


def test_an_archive_that_unpacks_to_more_is_refused(tmp_path):
    torch.save({"a": torch.zeros(10_000)}, tmp_path / "whole.pth")
    with (
        zipfile.ZipFile(tmp_path / "whole.pth") as whole,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
    with pytest.raises(InputError, match="bomb.pth is no checkpoint that can be read safely"):
        load_weights(shared_model(), tmp_path / "bomb.pth")


@pytest.mark.parametrize(
    "tensor, expected",
    [
        (
            torch.zeros(1).expand(10**12),
            r"holds a tensor of shape \(1000000000000,\), but not so many numbers",
        ),
        (torch.empty(10**12, device="meta"), "a tensor that is not plain numbers"),
        (torch.eye(3).to_sparse(), "a tensor that is not plain numbers"),
    ],
    ids=["expanded", "meta", "sparse"],
)
def test_tensors_that_claim_what_they_do_not_hold_are_refused(tmp_path, tensor, expected):
    torch.save({"model": {"tracker.class_embed.weight": tensor}}, tmp_path / "claim.pth")
    with pytest.raises(InputError, match=expected):
        model_from_checkpoint(tmp_path / "claim.pth", "toy")


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"preset": ["toy"]}, "holds a config that training did not write"),
        (
            {"preset": "toy", "categories": [[1, "a\nb"]]},
            "holds a config that training did not write",
        ),
        ({"preset": "toy", "test_short_side": 10.5}, "holds a config that training did not write"),
        (
            {"preset": "toy", "model_options": {"channels": 10**6}},
            "cannot be built: it has [0-9]+ numbers, the file [0-9]+",
        ),
        (
            {"preset": "toy", "model_options": {"frame_layers": 10**9}},
            "cannot be built: it has more layers than the file has entries",
        ),
        ({"preset": "toy", "model_options": {"heads": 0}}, "cannot be built: "),
    ],
    ids=["preset", "name", "side", "channels", "layers", "heads"],
)
def test_a_config_that_asks_for_the_impossible(tmp_path, config, expected):
    torch.save({"model": few_weights(), "config": config}, tmp_path / "odd.pt")
    with pytest.raises(InputError, match=expected):
        model_from_checkpoint(tmp_path / "odd.pt", propagation="gated")


def refused_config(tmp_path, config):
    """The line that a checkpoint with such a config is refused with."""
    torch.save({"model": few_weights(), "config": config}, tmp_path / "odd.pt")
    with pytest.raises(InputError) as refusal:
        model_from_checkpoint(tmp_path / "odd.pt", propagation="gated")
    assert len(str(refusal.value).splitlines()) == 1
    return str(refusal.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("preset", 3),
        ("propagation", torch.ones(2, 2)),
        ("categories", "red"),
        ("categories", [[1]]),
        ("test_short_side", 10**9),
        ("test_short_side", True),
        ("test_short_side", float("nan")),
        ("model_options", [1]),
        ("args", argparse.Namespace(seed=0)),
    ],
)
def test_a_value_that_training_does_not_write(tmp_path, name, value):
    message = refused_config(tmp_path, {"preset": "toy"} | {name: value})
    assert f"odd.pt holds a config that training did not write: {name} is " in message


@pytest.mark.parametrize(
    "option, value, expected",
    [
        ("heads", 0, "heads is 0, not a whole number from 1"),
        ("heads", 7, "must be divisible by heads"),
        ("clip_length", 2.5, "clip_length is 2.5, not a whole number from 1"),
        ("window", -5, "window is -5, not a whole number from 0"),
        ("queries", float("nan"), "queries is nan, not a whole number"),
        ("queries", True, "queries is True, not a whole number"),
        ("queries", "20", "queries is '20', not a whole number"),
        ("queries", None, "queries is None, not a whole number"),
        ("channels", torch.ones(2, 2), "channels is tensor("),
        ("swin_window", 10**6, "swin_window is 1000000, not a whole number from 1 to 1000"),
        ("query_noise", float("inf"), "query_noise is inf, not a finite number"),
        ("query_noise", True, "query_noise is True, not a finite number"),
        ("norm", ["batch"], "norm is ['batch'], not a name"),
        ("norm", "layer", "unknown norm 'layer'"),
        ("depth", 3, "GRAttVIS has no option depth"),
        ("num_classes", 3, "GRAttVIS has no option num_classes"),
    ],
)
def test_model_options_have_types_and_ranges(tmp_path, option, value, expected):
    message = refused_config(tmp_path, {"preset": "toy", "model_options": {option: value}})
    assert "odd.pt asks for a model that cannot be built: " in message and expected in message


@pytest.mark.parametrize(
    "config",
    [
        [],
        "configs/r50.yaml",
        argparse.Namespace(preset="toy"),
        {"lr": torch.ones(2, 2), "clip_length": 2.5, "window": -5},
        {"model_options": 3, "categories": None, "test_short_side": float("nan")},
    ],
)
def test_a_config_of_another_program_does_not_matter(tmp_path, config):
    """Only one that names a preset is ours."""
    args = argparse.Namespace(output=Path("x"))
    contents = {"state_dict": shared_model().state_dict(), "config": config, "args": args}
    torch.save(contents, tmp_path / "other.pth")
    model, found = model_from_checkpoint(tmp_path / "other.pth", "toy", **SMALLEST)
    assert found == {} and model.propagation == "gated"


@pytest.mark.parametrize(
    "changes",
    [
        {"config": argparse.Namespace(preset="toy")},
        {"config": [1]},
        {"config": {"preset": "toy"}},
        {"step": None},
        {"step": -1},
        {"step": torch.ones(2)},
        {"optimizer": torch.optim.AdamW},
    ],
)
def test_only_what_training_has_written_is_resumed(tmp_path, changes):
    contents = {"step": 3, "optimizer": {"state": {}}, "config": {"preset": "toy", "args": {}}}
    torch.save(contents, tmp_path / "last.pt")
    assert read_run(tmp_path / "last.pt") == contents
    torch.save(contents | changes, tmp_path / "last.pt")
    with pytest.raises(InputError, match="last.pt is no checkpoint of a training run"):
        read_run(tmp_path / "last.pt")


PREFIXES = [
    "module.",
    "model.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.model.",
    "module.model.module.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_training_tools_are_stripped(prefix):
    state = {prefix + name: value for name, value in shared_model().state_dict().items()}
    report = load_weights(shared_model(), state)
    assert not report.missing and not report.unexpected


@pytest.mark.parametrize(
    "part", ["_orig_mod.", "module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."]
)
def test_wrapped_parts_have_their_own_names(part):
    """torch.compile(model.backbone) puts its name into the middle of names."""
    state = {}
    for name, value in shared_model().state_dict().items():
        for owner in ("backbone.", "layers.0."):
            name = name.replace(owner, owner + part)
        state[name] = value
    report = load_weights(shared_model(), state)
    assert not report.missing and not report.unexpected


@pytest.mark.parametrize("key", [key for key in meta()["names_shapes"]])
def test_official_names_stay_what_they_are(key):
    """None of them has a part that is stripped, with or without a prefix."""
    names = [name for name, _, _ in names_shapes(key)]
    plain, _ = translate({name: torch.empty(1) for name in names})
    wrapped, _ = translate({f"module.{name}": torch.empty(1) for name in names})
    assert plain.keys() == wrapped.keys() and len(plain) >= len(names) - 10


@pytest.mark.slow
def test_real_wrappers_of_pytorch():
    """Their own state dicts, nested in one another."""
    model = build_model("toy", 3, **SMALLEST)
    compiled = torch.nn.Module()
    compiled.model = torch.compile(torch.nn.DataParallel(model))
    averaged = torch.optim.swa_utils.AveragedModel(compiled)
    report = load_weights(model, averaged.state_dict())
    assert not report.missing and not report.unexpected


@pytest.mark.parametrize(
    "wrappers",
    [["model"], ["state_dict"], ["model_state_dict"], ["module"], ["net"], ["model", "state_dict"]],
)
def test_state_dicts_are_found_next_to_other_things(wrappers):
    contents = {f"module.{name}": value for name, value in shared_model().state_dict().items()}
    optimizer = {"state": {0: {"step": torch.ones(1)}}}
    for wrapper in reversed(wrappers):
        contents = {wrapper: contents, "epoch": 3, "rng": torch.ones(4), "optimizer": optimizer}
    contents.setdefault("model", {"name": "GRAttVIS"})
    assert not load_weights(shared_model(), contents).missing


def test_entries_that_are_no_weights_are_ignored_by_their_names():
    state, model = shared_model().state_dict(), tiny_model()
    extras = {"epoch": 3, "date": "today", "meta.seed": 4, "n_averaged": torch.tensor(3)}
    report = load_weights(model, state | extras)
    assert not report.missing and not report.unexpected and "epoch" in report.ignored
    for value, kind in ((None, "NoneType"), ("x", "str"), (3, "int"), ([1.0], "list")):
        expected = f"entry tracker.decoder_norm.bias is a {kind}, not a tensor"
        with pytest.raises(InputError, match=expected):
            load_weights(model, state | {"tracker.decoder_norm.bias": value})


def test_two_entries_for_one_weight():
    state = shared_model().state_dict()
    state["module.tracker.decoder_norm.bias"] = torch.zeros(32)
    with pytest.raises(InputError, match="several entries for tracker.decoder_norm.bias"):
        load_weights(shared_model(), state)


def test_a_whole_model_in_the_place_of_its_weights(tmp_path):
    torch.save({"model": shared_model(), "epoch": 3}, tmp_path / "whole.pth")
    with pytest.raises(InputError, match="whole.pth holds a whole model.GRAttVIS: save its state"):
        load_weights(shared_model(), tmp_path / "whole.pth")


@pytest.mark.parametrize("dtype", ["complex64", "bool", "uint8", "int8", "int64", "float8_e4m3fn"])
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_weights_that_are_no_real_numbers_are_refused(tmp_path, dtype, suffix):
    """By name, and before anything is changed."""
    state, path = few_weights("tracker.query_feat.weight"), tmp_path / f"odd{suffix}"
    state["tracker.decoder_norm.bias"] = torch.zeros(32).to(getattr(torch, dtype))
    path.write_bytes(pickle.dumps(state)) if suffix == ".pkl" else torch.save(state, path)
    target = tiny_model()
    torch.nn.init.constant_(target.tracker.query_feat.weight, 7)
    expected = f"entry tracker.decoder_norm.bias is {dtype}: weights must be float16, bfloat16, "
    with pytest.raises(InputError, match=expected):
        load_weights(target, path)
    assert (target.tracker.query_feat.weight == 7).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precision_are_taken(dtype):
    """Counters, too, where all entries were cast to what holds whole numbers exactly."""
    state = shared_model().state_dict()
    cast = {
        name: value.to(dtype)
        for name, value in state.items()
        if dtype != torch.bfloat16 or value.is_floating_point()
    }
    model = tiny_model()
    assert not load_weights(model, state | cast).missing
    if dtype != torch.bfloat16:
        arrays = {name: value.numpy() for name, value in cast.items()}
        assert not load_weights(model, arrays).missing
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor(2.5),
        torch.tensor(float("nan")),
        torch.tensor(True),
        torch.tensor(1j),
        torch.tensor(3).bfloat16(),
    ],
)
def test_counters_must_be_whole_numbers(values):
    model = shared_model(backbone="resnet10_thin")
    state = model.state_dict() | {"backbone.bn1.num_batches_tracked": values}
    expected = "entry backbone.bn1.num_batches_tracked is .*: it must hold whole numbers"
    with pytest.raises(InputError, match=expected):
        load_weights(model, state)


def test_class_counts():
    """Another class count is an error that changes nothing.

    Reset_classes keeps the model's own class layers.
    """
    source, target = tiny_model(num_classes=5), tiny_model(num_classes=3)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(InputError, match="is for 5 classes, the model for 3"):
        load_weights(target, source.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    source.tracker.query_feat.weight.data.fill_(7)
    report = load_weights(target, source.state_dict(), reset_classes=True)
    assert sorted(report.reset) == [
        "frame_decoder.class_embed.bias",
        "frame_decoder.class_embed.weight",
        "tracker.class_embed.bias",
        "tracker.class_embed.weight",
    ]
    assert not report.missing
    assert (target.tracker.query_feat.weight == 7).all()
    assert torch.equal(target.tracker.class_embed.weight, before["tracker.class_embed.weight"])


@pytest.mark.parametrize(
    "propagation, new",
    [
        ("gated", {"gate_proj"}),
        ("memory", {"memory_key", "memory_value", "query_key", "query_value"}),
        ("plain", set()),
    ],
)
def test_a_stage_starts_from_vita(propagation, new):
    """Only what VITA has not is missing: the gate, or the memory."""
    vita = shared_model(propagation="clip")
    report = load_weights(tiny_model(propagation=propagation), vita.state_dict())
    assert {name.split(".")[1] for name in report.missing} == new and not report.unexpected


def test_other_shapes_are_refused_by_name():
    state = shared_model().state_dict()
    state["tracker.query_feat.weight"] = torch.zeros(4, 32)
    with pytest.raises(
        InputError, match=r"tracker\.query_feat\.weight is \(4, 32\) there and \(20, 32\) here"
    ):
        load_weights(shared_model(), state)


def test_first_mask2former_format():
    """Files from before the heads were nested, with queries called static_query.

    A tracker they do not have.
    """
    names = names_shapes("r50")
    state = {}
    for name, shape, _ in names:
        if name.startswith("sem_seg_head.pixel_decoder."):
            state[name.replace("pixel_decoder.", "", 1)] = torch.empty(shape, device="meta")
        elif name.startswith(("sem_seg_head.predictor.", "backbone.")):
            state[name.replace("query_feat", "static_query")] = torch.empty(shape, device="meta")
    with outlined():
        model = build_model(
            "r50",
            len(
                dict((n, range(s[0])) for n, s, _ in names)[
                    "sem_seg_head.predictor.class_embed.weight"
                ]
            )
            - 1,
        )
    report = load_weights(model, state)
    assert not report.unexpected and all(name.startswith("tracker.") for name in report.missing)


def test_torchvision_backbones(tmp_path):
    """torchvision's file, its classifier left out; group norms cannot take batch norms."""
    from torchvision.models.resnet import BasicBlock, ResNet

    theirs = ResNet(BasicBlock, [1, 1, 1, 1])
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    model = build_model("toy", 3, norm="frozen", **SMALLEST | {"backbone": "resnet10"})
    report = load_backbone(model, str(tmp_path / "resnet.pth"), "resnet10")
    assert not report.missing
    assert not report.unexpected
    assert {"backbone.fc.weight", "backbone.fc.bias"} <= set(report.ignored)
    assert torch.equal(model.backbone.layer4[0].conv1.weight, theirs.layer4[0].conv1.weight)
    with pytest.raises(InputError, match="norm 'frozen' or 'batch'"):
        load_backbone(
            build_model("toy", 3, norm="group", **SMALLEST | {"backbone": "resnet10"}),
            str(tmp_path / "resnet.pth"),
            "resnet10",
        )
    with pytest.raises(InputError, match="no ImageNet weights for resnet10"):
        load_backbone(model, "imagenet", "resnet10")


def test_detectron2_backbone_alone():
    """R-50.pkl of detectron2: names without a "backbone." in front."""
    state = {
        name.removeprefix("backbone."): torch.empty(shape, device="meta")
        for name, shape, _ in names_shapes("r50")
        if name.startswith("backbone.")
    }
    with outlined():
        model = build_model("r50", 3)
    report = load_weights(model, state | {"stem.fc.weight": torch.empty(1)})
    assert not report.unexpected
    assert not any(name.startswith("backbone.") for name in report.missing)


@pytest.mark.slow
def test_our_checkpoint_builds_its_model(tmp_path):
    model = build_model("toy", 3, "gated+memory", gate_mask="blocked", **SMALLEST)
    config = {
        "preset": "toy",
        "propagation": "gated+memory",
        "model_options": {"gate_mask": "blocked"} | SMALLEST,
    }
    save_checkpoint(
        tmp_path / "last.pt", {"model": model.state_dict(), "step": 3, "config": config}
    )
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]  # no temporary left
    built, found = model_from_checkpoint(tmp_path / "last.pt")
    assert found == config and built.tracker.gate_mask == "blocked" and not built.training
    assert all(
        torch.equal(value, model.state_dict()[name]) for name, value in built.state_dict().items()
    )
    with pytest.raises(InputError, match="was made with propagation 'gated\\+memory', not 'plain'"):
        model_from_checkpoint(tmp_path / "last.pt", propagation="plain")


def test_a_model_is_read_at_the_size_it_was_made_for(tmp_path):
    """Our files contain it; for others the preset implies the official size."""
    sides = {(): 96, (("test_short_side", 128),): 128}
    for more, side in sides.items():
        config = {"preset": "toy", "propagation": "gated", "model_options": SMALLEST} | dict(more)
        save_checkpoint(
            tmp_path / "last.pt", {"model": shared_model().state_dict(), "config": config}
        )
        assert default_short_side(model_from_checkpoint(tmp_path / "last.pt")[1], None) == side
    assert (default_short_side({}, "r50"), default_short_side({}, "swin_l")) == (360, 448)
    assert PRESETS.keys() == TEST_SIDES.keys()


def test_official_checkpoint_needs_what_its_names_do_not_tell(tmp_path):
    path = tmp_path / "official.pth"
    torch.save({"model": tiny_model(propagation="plain").state_dict()}, path)
    with pytest.raises(InputError, match="does not say its preset"):
        model_from_checkpoint(path)
    with pytest.raises(InputError, match='may be "plain" or "clip"'):
        model_from_checkpoint(path, "toy", **SMALLEST)
    assert model_from_checkpoint(path, "toy", "plain", **SMALLEST)[0].propagation == "plain"
    torch.save({"model": build_backbone("resnet10").state_dict()}, path)
    with pytest.raises(InputError, match="has no tracker"):
        model_from_checkpoint(path, "toy")


@pytest.mark.slow
@pytest.mark.parametrize("averaged", [False, True])
def test_weights_alone(tmp_path, averaged):
    """Half the bytes, the same model but for rounding.

    The averaged weights where there are some; nothing is overwritten.
    """
    model, other = tiny_model(), tiny_model().requires_grad_(False)
    for parameter in other.parameters():
        parameter.mul_(1.5)
    contents = {
        "model": model.state_dict(),
        "step": 3,
        "optimizer": {"state": {}},
        "config": {
            "preset": "toy",
            "propagation": "gated",
            "model_options": SMALLEST,
            "args": {"seed": 0},
        },
    }
    if averaged:
        contents["ema"] = {"n_averaged": torch.tensor(3)} | {
            f"module.{name}": value for name, value in other.state_dict().items()
        }
    save_checkpoint(tmp_path / "last.pt", contents)
    bytes_written = save_weights(tmp_path / "last.pt", tmp_path / "weights/handed_on.pt")
    assert bytes_written < 0.6 * (tmp_path / "last.pt").stat().st_size / (2 if averaged else 1)
    loaded, config = model_from_checkpoint(tmp_path / "weights/handed_on.pt")
    for name, value in (other if averaged else model).state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-3, atol=1e-6)
    assert "args" not in config
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    with pytest.raises(InputError, match="exists"):
        save_weights(tmp_path / "last.pt", tmp_path / "weights/handed_on.pt")
    contents["model"]["tracker.query_feat.weight"][0] = 1e5
    contents.pop("ema", None)
    save_checkpoint(tmp_path / "large.pt", contents)
    with pytest.raises(InputError, match="float16"):
        save_weights(tmp_path / "large.pt", tmp_path / "large_weights.pt")
    assert not (tmp_path / "large_weights.pt").exists()
