"""Every flag of train.py has an effect.

Flags that change a step are tested in test_train_by_hand.py, the others here. A new flag needs a
test with `covers`; until then, test_every_flag_is_tested fails.
"""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

import train
from augmentation import Augmentation
from backbone import build_backbone
from fast.acceleration import accelerate_training
from model import GRAttVIS, build_model
from runtime.errors import InputError
from synthetic.suites import make_dataset
from test_recipes import data_sets  # noqa: F401, a fixture
from test_train import poison
from test_train_by_hand import CASES
from training import TINY_MODEL, train_tiny
from viewing.curves import curves, read_log

COVERED = {name for case in CASES.values() for name in case}
CLASSES = 6  # of the synthetic set


def covers(*flags):
    """The flags that a test is about, which runs a whole program."""
    COVERED.update(flags)
    return pytest.mark.slow


def test_every_flag_is_tested():
    flags = set(vars(train.parse_arguments([])))
    assert COVERED == flags, "each flag of train.py needs a test with @covers in this file"


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "set"
    make_dataset(
        root, train_videos=3, valid_videos=1, frames=4, height=64, width=64, objects=(1, 2)
    )
    return root


@pytest.fixture
def run(data_root, tmp_path):
    """Train on the synthetic set: run(name of a folder, options...)."""

    def start(name, **options):
        return train_tiny(tmp_path / name, **{"data_root": data_root} | options)

    return start


# Setting, model


@covers("recipe", "stage", "dry_run")
def test_a_dry_run_prints_the_setting_and_leaves_no_trace(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    printed = []
    for arguments in (["--recipe", "grattvis/ovis/swin_l"], ["--stage", "vita"]):
        train.main(train.parse_arguments([*arguments, "--dry-run"]))
        printed.append(json.loads(capsys.readouterr().out))
    recipe, stage = printed
    assert recipe["recipe"] == "grattvis/ovis/swin_l"
    assert (recipe["num_classes"], recipe["init"]) == (25, "vita_swin_ovis.pth")
    assert (stage["stage"], stage["meta"], stage["enc_window"]) == ("vita", "Vita", 6)
    assert not list(tmp_path.iterdir())


@covers("preset")
def test_the_preset_is_the_model(run):
    weights = (
        run("small", preset="small", iterations=0).last["model"],
        build_model("small", CLASSES).state_dict(),
    )
    found, expected = ({name: value.shape for name, value in state.items()} for state in weights)
    assert found == expected


# Weights


def random_weights(classes):
    """A state dict of the tiny model without any initial value."""
    model = build_model("small", classes, **TINY_MODEL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.state_dict()


def differing(one, other):
    """The names of the tensors that differ."""
    return {name for name, value in one.items() if not torch.equal(value, other[name])}


@covers("init", "reset_classes")
def test_a_run_starts_from_a_checkpoint(run, tmp_path):
    for classes in (CLASSES, CLASSES + 2):
        torch.save(random_weights(classes), tmp_path / f"{classes}.pth")
    weights = torch.load(tmp_path / f"{CLASSES}.pth")
    found = run("same", init=tmp_path / f"{CLASSES}.pth", iterations=0).last["model"]
    assert not differing(weights, found)

    other = tmp_path / f"{CLASSES + 2}.pth"
    with pytest.raises(InputError):
        run("refused", init=other, iterations=0)
    found = run("reset", init=other, reset_classes=True, iterations=0).last["model"]
    weights = torch.load(other)
    new = differing(weights, found)
    assert new == {name for name in weights if "class_embed" in name} and len(new) == 4
    assert all(len(found[name]) == CLASSES + 1 for name in new)


@covers("backbone_weights")
def test_the_backbone_starts_from_a_file(run, tmp_path):
    weights = build_backbone(TINY_MODEL["backbone"], "batch").state_dict()
    torch.save(weights, tmp_path / "backbone.pth")
    found = run("run", backbone_weights=tmp_path / "backbone.pth", iterations=0).last["model"]
    found = {name.removeprefix("backbone."): value for name, value in found.items()}
    assert not differing(weights, found)


@covers("resume")
def test_a_run_goes_on_from_its_checkpoint(run, tmp_path):
    before = run("run")
    after = run("run", resume=tmp_path / "run/last.pt", iterations=2)
    assert [line["step"] for line in after.lines] == [1, 2] and len(after.seeds) == 1
    assert not differing(before.last["model"], after.start)


# Data


@covers("valid_json", "valid_images")
def test_evaluation_on_the_named_files(run, data_root, tmp_path):
    shutil.copytree(data_root, tmp_path / "other")
    train_files = {"train_json": tmp_path / "other/train.json"}
    train_files["train_images"] = tmp_path / "other/train/JPEGImages"
    valid_files = {"valid_json": tmp_path / "other/valid.json"}
    valid_files["valid_images"] = tmp_path / "other/valid/JPEGImages"
    by_root = run("root", evaluate_every=1)
    by_file = run("file", **train_files, **valid_files, evaluate_every=1)
    assert by_root.evaluations == by_file.evaluations != []
    with pytest.raises(InputError, match="--valid-json and --valid-images go together"):
        run("one", valid_json=valid_files["valid_json"], evaluate_every=1)


@covers("data_root", "train_json", "train_images")
def test_clips_come_from_the_named_files(run, data_root, tmp_path):
    shutil.copytree(data_root, tmp_path / "other")
    folder = str(tmp_path / "other/train/JPEGImages")
    file = tmp_path / "other/train.json"
    by_root = run("root", data_root=tmp_path / "other", iterations=0)
    by_file = run("file", train_json=file, train_images=folder, iterations=0)
    assert by_root.clips[0].source.startswith(folder)
    assert by_file.clips[0].source.startswith(folder)


@covers("train_sets", "train_ratio", "test_sets")
def test_sets_by_name(run, data_sets):  # noqa: F811
    """Three of four clips are of COCO; evaluation is on three videos of three frames."""
    seen = run(
        "run",
        data_root=data_sets,
        train_sets=["coco2ovis_train", "ovis_train"],
        train_ratio=[3, 1],
        test_sets=["ovis_train"],
        evaluate_every=1,
    )
    sources = [seen.clips[number].source for number in range(80)]
    images = sum(source.startswith(str(data_sets / "coco")) for source in sources)
    assert sum(source.startswith(str(data_sets / "ovis")) for source in sources) == 80 - images
    assert 45 <= images <= 75 and sum(len(images) for _, images in seen.evaluated) == 9


@covers("render")
def test_scenes_are_rendered(run, tmp_path):
    seen = run("run", data_root=tmp_path / "nothing", render=["occlusion"], iterations=0)
    assert "occlusion" in seen.clips[0].source


@covers("num_classes")
def test_the_number_of_classes_is_checked(run):
    run("right", num_classes=CLASSES, iterations=0)
    with pytest.raises(InputError, match=f"{CLASSES} categories, not 5"):
        run("wrong", num_classes=5, iterations=0)


@covers("skip_bad")
def test_what_cannot_be_read_is_left_out(run, data_root, tmp_path):
    shutil.copytree(data_root, tmp_path / "set")
    shutil.rmtree(tmp_path / "set/train/JPEGImages/00001")
    with pytest.raises(InputError, match="00001"):
        run("refused", data_root=tmp_path / "set", iterations=0)
    assert run("skipped", data_root=tmp_path / "set", skip_bad=True).lines[0]["skipped"] == 1


@covers("workers")
def test_the_loader_has_processes(run):
    assert run("run", workers=1).workers == 1


# Augmentation

CHANGES = dict(
    short_sides=[40, 44],
    pseudo_short_sides=[36],
    max_long_side=70,
    crop_short_sides=[48, 52],
    crop_size=[0.7, 0.8],
    crop_relative=True,
    pseudo_crop_size=[20, 30],
    rotation=7.0,
    flip=False,
    occlude=0.5,
)
OF_VIDEOS = Augmentation(
    short_sides=(40, 44),
    max_long_side=70,
    crop_short_sides=(48, 52),
    crop_size=(0.7, 0.8),
    crop_relative=True,
    flip=False,
    rotation=0,
    lsj_size=0,
    occlude=0.5,
)
OF_IMAGES = replace(
    OF_VIDEOS, short_sides=(36,), crop_size=(20, 30), crop_relative=False, rotation=7.0
)


@covers(
    "short_sides",
    "pseudo_short_sides",
    "max_long_side",
    "crop_short_sides",
    "crop_size",
    "crop_relative",
    "pseudo_crop_size",
    "rotation",
    "flip",
    "occlude",
)
def test_every_source_is_augmented_in_its_own_way(run, data_sets):  # noqa: F811
    named = dict(
        data_root=data_sets, train_sets=["coco2ovis_train", "ovis_train"], train_ratio=[1, 1]
    )
    mixed = run("mixed", iterations=0, **CHANGES, **named).clips
    assert [source.augmentation for source in mixed.sources] == [OF_IMAGES, OF_VIDEOS]
    assert run("videos", iterations=0, **CHANGES).clips.augmentation == OF_VIDEOS
    assert run("scenes", iterations=0, render=["easy"], **CHANGES).clips.augmentation == OF_VIDEOS
    mixed = run("same sides", iterations=0, short_sides=[40, 44], **named).clips
    assert [source.augmentation.short_sides for source in mixed.sources] == [(40, 44)] * 2


@covers("lsj", "lsj_size")
def test_all_sources_have_large_scale_jitter(run, data_sets):  # noqa: F811
    seen = run(
        "mixed",
        data_root=data_sets,
        train_sets=["coco2ovis_train", "ovis_train"],
        train_ratio=[1, 1],
        lsj=True,
        lsj_size=96,
    )
    assert [source.augmentation.lsj_size for source in seen.clips.sources] == [96, 96]
    assert seen.frames[0][0].shape[-2:] == (96, 96)


# Loss and optimisation


@covers("query_noise")
def test_queries_are_disturbed_between_clips(run):
    """With the same seed, the predictions for the first clip are equal, for the second not."""
    (quiet,), (noisy,) = (
        run(str(share), query_noise=share, propagation="plain").outputs for share in (0.0, 1.0)
    )
    for clip, same in ((0, True), (1, False)):
        for one, other in zip(quiet.clips[clip].logits, noisy.clips[clip].logits):
            assert torch.equal(one, other) == same


@covers("skip_nonfinite")
def test_a_step_that_is_not_finite_may_be_left_out(run, monkeypatch):
    for skipped in (0, 1):
        poison(monkeypatch, {0}, "loss")
        with nullcontext() if skipped else pytest.raises(FloatingPointError):
            assert run(str(skipped), skip_nonfinite=skipped, iterations=2).last["step"] == 2
        monkeypatch.undo()


@covers("amp")
@pytest.mark.parametrize("amp, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision(run, monkeypatch, amp, dtype):
    """The gradient is logged and clipped without the scale of float16."""
    scaler = partial(torch.amp.GradScaler, init_scale=8.0)  # small enough that nothing overflows
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    seen, exact = run(amp, amp=amp), run("exact")
    assert seen.outputs[0].clips[0].logits[-1].dtype == dtype
    assert seen.lines[0]["gradient_norm"] == pytest.approx(exact.lines[0]["gradient_norm"], rel=0.3)


@covers("recompute")
def test_some_modules_run_again_in_backward(run):
    """More of them with "all" than with "decoder"."""
    counts = []
    for what in ("off", "decoder", "all"):
        calls = []
        hook = register_module_forward_pre_hook(lambda module, inputs: calls.append(module))
        run(what, recompute=what)
        hook.remove()
        counts.append(len(calls))
    assert counts[0] < counts[1] < counts[2]


@covers("compile")
def test_parts_are_compiled(run):
    counts = []
    for what in ("off", "tracker", "all"):
        with mock.patch("torch.compile", side_effect=lambda part, **options: part) as compiled:
            run(what, compile=what)
        counts.append(compiled.call_count)
    assert counts[0] == 0 < counts[1] < counts[2]


@covers("graphs")
def test_the_tracker_runs_as_graphs_in_16_bit_on_a_gpu(run):
    """On a CPU it does not."""
    with mock.patch("fast.acceleration.graph_tracker") as graphed:
        run("cpu", graphs=True)
        assert not graphed.called
        model = build_model("toy", 3)
        with (
            mock.patch.object(GRAttVIS, "device", torch.device("cuda")),
            mock.patch("fast.acceleration.fuse_modules"),
        ):
            for graphs in (False, True):
                accelerate_training(model, torch.bfloat16, graphs=graphs)
                assert graphed.called == graphs


# Evaluation


@covers("test_short_side", "test_max_long_side")
@pytest.mark.parametrize("short, longest, side", [(96, 1333, 96), (128, 96, 96)])
def test_the_size_of_frames_that_are_evaluated_on(run, short, longest, side):
    seen = run("run", evaluate_every=1, test_short_side=short, test_max_long_side=longest)
    assert {images.shape[-2:] for _, images in seen.evaluated} == {(side, side)}
    assert seen.last["config"]["test_short_side"] == short  # used by evaluate.py


@covers("top_k")
def test_the_number_of_instances_that_are_evaluated(run):
    results, encode = [], GRAttVIS.encode_video

    def record(*arguments, **options):
        results.append(encode(*arguments, **options))
        return results[-1]

    with mock.patch.object(GRAttVIS, "encode_video", record):
        run("run", evaluate_every=1, top_k=3)
    assert [len(result.scores) for result in results] == [3]


# The run


@covers("output")
def test_everything_is_in_the_output_folder(run, tmp_path):
    run("some/where")
    written = {path.name for path in (tmp_path / "some/where").iterdir()}
    assert written >= {"last.pt", "args.json", "log.jsonl"}


@covers("device")
def test_a_cpu_may_be_asked_for_where_there_is_a_gpu(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run("run", device="cpu", iterations=0)


@covers("deterministic")
def test_algorithms_are_deterministic(run):
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        run("run", deterministic=True, iterations=0)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@covers("log_every", "save_every")
def test_how_often_is_logged_and_saved(run, tmp_path):
    """What is on disk when the sixth step fails."""
    calls = []

    def fail(module, inputs):
        if isinstance(module, GRAttVIS):
            calls.append(module)
            if len(calls) == 6:
                raise RuntimeError("enough")

    hook = register_module_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="enough"):
        run("run", iterations=9, log_every=2, save_every=3)
    hook.remove()
    assert torch.load(tmp_path / "run/last.pt")["step"] == 3
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


@covers("tensorboard")
def test_tensorboard_has_the_curves_of_the_log(run, tmp_path):
    """Also of a resumed run, whose second and third step it shows once, with the new values."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"tensorboard": True, "save_every": 1, "evaluate_every": 3}
    run("run", iterations=1, **options)
    shutil.copy(tmp_path / "run/last.pt", tmp_path / "first.pt")
    run("run", iterations=3, resume=tmp_path / "run/last.pt", **options)
    shutil.copy(tmp_path / "first.pt", tmp_path / "run/last.pt")
    run("run", iterations=4, resume=tmp_path / "run/last.pt", **options)
    written = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    found = {
        tag.replace("/", " "): [(event.step, event.value) for event in written.Scalars(tag)]
        for tag in written.Tags()["scalars"]
    }
    expected = curves(read_log(tmp_path / "run"))
    assert {"loss", "loss ce", "AP", "learning rate", "waiting for data"} <= expected.keys()
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert found[name] == [(step, pytest.approx(value)) for step, value in points]


@pytest.mark.slow
def test_tensorboard_is_required_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.tensorboard.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--tensorboard needs tensorboard: python -m pip install"):
        run("run", tensorboard=True)
    assert not (tmp_path / "run").exists()
