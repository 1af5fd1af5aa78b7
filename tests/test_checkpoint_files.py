"""Checkpoint files of all versions: restored to the last bit, or rejected if they do not fit.

Models are tiny and random. Pickles are written as by NumPy, detectron2 and Python 2.
"""

import pickle
import signal
import struct
from collections import OrderedDict
from contextlib import contextmanager

import numpy
import pytest
import torch
from torch import nn

from checkpoint import (
    load_weights,
    model_from_checkpoint,
    save_checkpoint,
    save_weights,
)
from model import TEST_SIDES, build_model
from runtime.errors import InputError
from sparse_set import SMALLEST, save_tiny_model, tiny_model

pytestmark = pytest.mark.usefixtures("four_convolutions")


def make_model(*arguments, **options):
    return tiny_model(*arguments, **SMALLEST | options)


def same_weights(one, other):
    """Whether two models have the same weights, to the last bit."""
    expected = other.state_dict()
    return all(torch.equal(value, expected[name]) for name, value in one.state_dict().items())


@contextmanager
def within(seconds):
    """TimeoutError if the block takes longer, as one that never ends does."""

    def stop(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# Entries


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The contents of a file that fits its model."""
    path = tmp_path_factory.mktemp("entries") / "tiny.pt"
    save_tiny_model(path, options=SMALLEST)
    return torch.load(path, weights_only=True)


@pytest.fixture
def changed(checkpoint, tmp_path):
    """Write the file with some of its weights changed, and build its model."""

    def changed(**weights):
        model = {
            name: value
            for name, value in (checkpoint["model"] | weights).items()
            if value is not None
        }
        torch.save(checkpoint | {"model": model}, tmp_path / "changed.pt")
        return model_from_checkpoint(tmp_path / "changed.pt")

    return changed


@pytest.mark.parametrize(
    "name",
    [
        "backbone.stages.0.weight",
        "frame_decoder.query_feat.weight",
        "tracker.gate_proj.bias",
        "pixel_decoder.level_embed",
    ],
)
def test_a_missing_entry_is_refused_by_name(checkpoint, changed, name):
    assert name in checkpoint["model"]
    with pytest.raises(
        InputError, match=f"does not fit a toy with gated propagation: .*1 missing \\({name}\\)"
    ):
        changed(**{name: None})


@pytest.mark.parametrize(
    "name",
    ["backbone.conv2.weight", "tracker.second_gate.bias", "pixel_decoder.layers.9.norm.weight"],
)
def test_a_foreign_entry_is_refused_by_name(changed, name):
    with pytest.raises(
        InputError, match=f"does not fit a toy with gated propagation: .*1 unexpected \\({name}\\)"
    ):
        changed(**{name: torch.zeros(3)})


def test_a_renamed_entry_is_both(checkpoint, changed):
    with pytest.raises(InputError, match="1 missing .*; 1 unexpected "):
        changed(
            **{"tracker.mask_embed.0.bias": None, "tracker.mask_embed.00.bias": torch.zeros(32)}
        )


def test_constants_of_official_files_are_no_foreign_entries(checkpoint, changed):
    """Weights of the losses, the input's mean, Swin's attention masks, classifiers of ImageNet."""
    constants = (
        "criterion.empty_weight",
        "vita_criterion.empty_weight",
        "pixel_mean",
        "pixel_std",
        "backbone.norm.weight",
        "backbone.layers.0.blocks.1.attn_mask",
        "backbone.fc.bias",
        "backbone.head.weight",
        "backbone.stem.fc.weight",
    )
    changed(**{name: torch.zeros(2) for name in constants})
    report = load_weights(
        make_model(), checkpoint["model"] | {name: torch.zeros(2) for name in constants}
    )
    assert sorted(report.ignored) == sorted(constants)
    assert not report.unexpected
    assert not report.missing


def test_frozen_norms_need_no_counters_of_batches():
    """Nor do the others, which official files do not hold."""
    weights = tiny_model().state_dict()
    counters = {name for name in weights if name.endswith("num_batches_tracked")}
    report = load_weights(tiny_model(norm="frozen"), weights)
    assert counters
    assert set(report.ignored) == counters
    assert not report.unexpected
    assert not report.missing
    report = load_weights(
        tiny_model(),
        {name: value for name, value in weights.items() if name not in counters},
    )
    assert not report.missing


@pytest.mark.parametrize(
    "options", [{"channels": 64}, {"feed_forward": 48}, {"queries": 7}], ids=str
)
def test_weights_of_another_size_are_refused(checkpoint, options):
    """Also where class layers may be others, as that means their number of classes alone."""
    other = make_model(seed=1, **options)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    for reset_classes in (False, True):
        with pytest.raises(InputError, match="does not fit the model: .* there and .* here"):
            load_weights(other, checkpoint["model"], reset_classes)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("layer", ["tracker.class_embed", "frame_decoder.class_embed"])
def test_class_layers_of_another_width_are_not_another_number_of_classes(checkpoint, layer):
    weights = checkpoint["model"] | {f"{layer}.weight": torch.zeros(6, 31)}
    with pytest.raises(InputError, match=rf"{layer}.weight is \(6, 31\) there and \(4, 32\) here"):
        load_weights(make_model(), weights, reset_classes=True)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_weights_of_a_wrapped_model_are_found(checkpoint, wrapper):
    """With "module." before each name, or one level down, as other trainers write them."""
    model = make_model(seed=1)
    weights = {f"module.{name}": value for name, value in checkpoint["model"].items()}
    report = load_weights(model, weights if wrapper is None else {wrapper: weights, "epoch": 3})
    assert not report.missing and not report.unexpected
    assert all(
        torch.equal(value, checkpoint["model"][name]) for name, value in model.state_dict().items()
    )


def test_a_report_tells_the_first_entries(checkpoint):
    weights = {
        name: value
        for name, value in checkpoint["model"].items()
        if not name.startswith("tracker.encoder.")
    }
    report = load_weights(make_model(), weights)
    missing = [name for name in checkpoint["model"] if name not in weights]
    assert len(missing) > 4
    assert report.missing == missing
    assert sorted(report.loaded) == sorted(weights)
    assert (
        str(report)
        == f"{len(weights)} entries loaded; {len(missing)} missing ({', '.join(missing[:4])}, ...)"
    )


def test_reset_classes_leaves_the_classes_of_the_model(checkpoint):
    """Those of the model stay to the last bit, and all else is loaded."""
    model = make_model(classes=5, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_weights(model, checkpoint["model"], reset_classes=True)
    assert {name.rpartition(".")[0] for name in report.reset} == {
        "tracker.class_embed",
        "frame_decoder.class_embed",
    }
    for name, value in model.state_dict().items():
        assert torch.equal(
            value, before[name] if name in report.reset else checkpoint["model"][name]
        )


@pytest.mark.parametrize(
    "preset, propagation",
    [
        ("toy", "memory"),
        ("small", "gated"),
        pytest.param("toy", "plain", marks=pytest.mark.slow),
        pytest.param("toy", "clip", marks=pytest.mark.slow),
    ],
)
def test_the_config_of_a_file_says_what_is_built(tmp_path, preset, propagation):
    torch.manual_seed(0)
    model = build_model(preset, 2, propagation, **SMALLEST)
    config = {
        "preset": preset,
        "propagation": propagation,
        "model_options": SMALLEST,
        "categories": [[1, "a"], [5, "b"]],
    }
    save_checkpoint(
        tmp_path / "last.pt", {"model": model.state_dict(), "config": config, "step": 3}
    )
    built, found = model_from_checkpoint(tmp_path / "last.pt")
    assert same_weights(built, model)
    assert found == config
    assert built.num_classes == 2
    assert built.propagation == propagation
    assert TEST_SIDES[preset] == 96 and not built.training
    with pytest.raises(InputError, match="was made with preset"):
        model_from_checkpoint(tmp_path / "last.pt", "r50")
    with pytest.raises(InputError, match="was made with channels 32, not 64"):
        model_from_checkpoint(tmp_path / "last.pt", channels=64)


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, {}], ids=str)
def test_an_empty_config_says_nothing(tmp_path, config):
    torch.save({"model": build_model("toy", 2).state_dict(), "config": config}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="a.pt does not say its preset"):
        model_from_checkpoint(tmp_path / "a.pt")
    assert model_from_checkpoint(tmp_path / "a.pt", "toy")[0].num_classes == 2


@pytest.mark.parametrize(
    "propagation",
    ["gated+memory", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gated", "memory"))],
)
def test_the_names_of_an_official_file_tell_its_propagation(tmp_path, propagation):
    weights = make_model(4, propagation).state_dict()
    torch.save({"model": weights}, tmp_path / "official.pth")
    model, config = model_from_checkpoint(tmp_path / "official.pth", "toy", **SMALLEST)
    assert model.propagation == propagation and model.num_classes == 4 and config == {}
    with pytest.raises(
        InputError,
        match=f"was made with propagation '{propagation.replace('+', '.')}', not 'plain'",
    ):
        model_from_checkpoint(tmp_path / "official.pth", "toy", "plain")


# Weights to hand on


def test_norms_and_biases_handed_on_are_what_they_were(checkpoint, tmp_path):
    """To the last bit, since small errors in them show.

    Matrices and tables are rounded to 16 bit.
    """
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in checkpoint["model"].items()
    }
    save_checkpoint(tmp_path / "last.pt", checkpoint | {"model": weights})
    written = save_weights(tmp_path / "last.pt", tmp_path / "handed/on.pt")
    assert written == (tmp_path / "handed/on.pt").stat().st_size
    handed_on = torch.load(tmp_path / "handed/on.pt", weights_only=True)["model"]
    assert handed_on.keys() == weights.keys()
    for name, value in weights.items():
        if value.ndim > 1:
            assert handed_on[name].dtype == torch.float16
            assert torch.equal(handed_on[name], value.half())
        else:
            assert handed_on[name].dtype == value.dtype and torch.equal(handed_on[name], value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 7e4])
def test_one_weight_that_float16_does_not_hold_is_refused(checkpoint, tmp_path, value):
    weights = {name: tensor.clone() for name, tensor in checkpoint["model"].items()}
    weights["tracker.query_feat.weight"][3, 5] = value
    save_checkpoint(tmp_path / "last.pt", checkpoint | {"model": weights})
    with pytest.raises(InputError, match="float16"):
        save_weights(tmp_path / "last.pt", tmp_path / "on.pt")
    assert not (tmp_path / "on.pt").exists()


@pytest.mark.parametrize(
    "contents", [{"model": {}}, {"config": {}}, {"model": [], "config": {}}], ids=str
)
def test_what_is_no_training_checkpoint_is_not_handed_on(tmp_path, contents):
    torch.save(contents, tmp_path / "odd.pt")
    with pytest.raises(InputError, match="odd.pt is no checkpoint of train.py"):
        save_weights(tmp_path / "odd.pt", tmp_path / "on.pt")


# Pickles


class Python2Pickler(pickle._Pickler):
    """Writes bytes and text as Python 2 wrote both: as strings of bytes."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value):
        written = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(written)) + written)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def write_pickle(path, contents, protocol=2, pickler=pickle.Pickler):
    with open(path, "wb") as file:
        pickler(file, protocol).dump(contents)
    return path


def small_module(seed=0):
    """Layers with names of this model family, for files of which nothing else matters."""
    torch.manual_seed(seed)
    return nn.ModuleDict({"backbone": nn.Conv2d(3, 4, 5), "tracker": nn.Linear(20, 32)})


def arrays_of(model):
    return OrderedDict((name, value.numpy()) for name, value in model.state_dict().items())


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "change",
    [lambda array: array, numpy.asfortranarray, lambda array: array[::-1][::-1]],
    ids=["rows", "columns", "view"],
)
def test_arrays_are_read_in_the_order_they_were_written_in(tmp_path, protocol, change):
    """Row by row or column by column, by every protocol of pickle."""
    model, other = small_module(), small_module(seed=1)
    arrays = {
        name: change(array) if array.ndim else array for name, array in arrays_of(model).items()
    }
    assert not load_weights(
        other, write_pickle(tmp_path / "zoo.pkl", {"model": arrays}, protocol)
    ).missing
    assert same_weights(other, model)


@pytest.mark.parametrize("order", "<>=")
@pytest.mark.parametrize("kind", ["f8", "f4", "f2"])
def test_arrays_of_any_byte_order_keep_their_values(tmp_path, kind, order):
    model, table = small_module(), numpy.arange(32 * 20).reshape(32, 20) % 251
    written = table.astype(numpy.dtype(kind).newbyteorder(order))
    load_weights(model, write_pickle(tmp_path / "zoo.pkl", {"model": {"tracker.weight": written}}))
    assert torch.equal(model.tracker.weight, torch.from_numpy(table).float())


def test_a_pickle_of_python_2_is_read(tmp_path):
    """Its strings are bytes, of which the arrays have all 256."""
    model, other = small_module(), small_module(seed=1)
    contents = {
        "model": dict(arrays_of(model)),
        "iteration": numpy.float64(-1.5e-7),
        "__author__": "somebody",
    }
    path = write_pickle(tmp_path / "old.pkl", contents, pickler=Python2Pickler)
    assert b"_codecs" not in path.read_bytes()
    assert not load_weights(other, path).missing
    assert same_weights(other, model)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_a_container_that_holds_itself_is_refused(tmp_path, suffix):
    """In time: there is no end to what is in it."""
    model, other = small_module(), small_module(seed=1)
    history, log = [], {}
    history += [history, 3]
    log["log"], log["history"] = log, history
    contents = {
        "model": dict(arrays_of(model)) if suffix == ".pkl" else model.state_dict(),
        "log": log,
    }
    path = tmp_path / f"endless{suffix}"
    write_pickle(path, contents) if suffix == ".pkl" else torch.save(contents, path)
    with within(60), pytest.raises(InputError, match="it holds a container that holds itself"):
        load_weights(other, path)


# Files of PyTorch


@pytest.mark.parametrize("new", [True, False], ids=["archive", "five pickles"])
def test_files_of_old_and_new_pytorch_are_read(tmp_path, new):
    model, other = small_module(), small_module(seed=1)
    torch.save(
        {"model": model.state_dict()}, tmp_path / "some.pth", _use_new_zipfile_serialization=new
    )
    load_weights(other, tmp_path / "some.pth")
    assert same_weights(other, model)


# Quantised tensors are going to leave PyTorch
@pytest.mark.filterwarnings("ignore")
def test_a_quantised_tensor_is_refused(checkpoint, tmp_path):
    weights = checkpoint["model"] | {
        "tracker.query_feat.weight": torch.quantize_per_tensor(
            torch.rand(20, 32), 0.1, 0, torch.qint8
        )
    }
    torch.save(checkpoint | {"model": weights}, tmp_path / "quantised.pt")
    with pytest.raises(InputError, match="entry tracker.query_feat.weight is .*quantized"):
        model_from_checkpoint(tmp_path / "quantised.pt")


@pytest.mark.parametrize(
    "contents", [[1, 2], "text", torch.zeros(3), 5], ids=["list", "text", "tensor", "number"]
)
def test_a_file_without_named_tensors_is_refused(tmp_path, contents):
    torch.save(contents, tmp_path / "odd.pth")
    with pytest.raises(
        InputError, match="odd.pth is no checkpoint: it holds a .*, not named tensors"
    ):
        load_weights(small_module(), tmp_path / "odd.pth")


@pytest.mark.parametrize("value", ["text", 3, None, [torch.zeros(3)]], ids=str)
def test_an_entry_that_is_no_tensor_is_refused_by_name(checkpoint, value):
    with pytest.raises(InputError, match="entry tracker.query_feat.weight is a .*, not a tensor"):
        load_weights(make_model(), checkpoint["model"] | {"tracker.query_feat.weight": value})


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path):
    save_checkpoint(tmp_path / "last.pt", {"step": 1})
    with pytest.raises(Exception):
        # Which no file can hold
        save_checkpoint(tmp_path / "last.pt", {"step": 2, "odd": lambda: None})
    assert torch.load(tmp_path / "last.pt", weights_only=True) == {"step": 1}


@pytest.mark.parametrize("shape, stored", [((3, 2), 2), ((4, 4), 4), ((20, 32), 32)])
def test_a_tensor_that_repeats_few_numbers_is_refused(tmp_path, shape, stored):
    """However few: what a file claims is what it must hold."""
    torch.save({"tracker.weight": torch.rand(stored).expand(shape)}, tmp_path / "claim.pth")
    with pytest.raises(InputError, match="but not so many numbers"):
        load_weights(small_module(), tmp_path / "claim.pth")


@pytest.mark.parametrize("name", ["tracker.\x1b[31mred", "backbone.two\nlines", "tracker.\u2028"])
def test_a_name_that_cannot_be_printed_is_refused(name):
    with pytest.raises(InputError, match="which is no name"):
        load_weights(small_module(), {"tracker.weight": torch.zeros(32, 20), name: torch.zeros(3)})


@pytest.mark.parametrize(
    "names", [["tracker.other"], ["backbone.fc.weight", "pixel_mean"]], ids=str
)
def test_weights_of_which_nothing_is_used_are_refused(names):
    """Neither those of another model, nor constants alone."""
    with pytest.raises(InputError, match="none of its . entries is part of this model"):
        load_weights(small_module(), {name: torch.zeros(3) for name in names})


def test_a_file_that_is_not_there_is_not_called_damaged(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path} is a folder, not a regular file"):
        load_weights(small_module(), tmp_path)
    for path in (tmp_path / "missing.pt", tmp_path / "missing.pkl"):
        with pytest.raises(InputError, match=f"no checkpoint at {path}$"):
            load_weights(small_module(), path)
