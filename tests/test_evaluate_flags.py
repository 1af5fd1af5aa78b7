"""Every flag of evaluate.py has an effect.

One test per flag, named after it; a flag without a test fails the first test. Most tests check the
arguments of `GRAttVIS.encode_video`, the others the output files.
"""

import json
import multiprocessing
import re
import shutil
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image
from torch import nn

import evaluate
from evaluation.metric import evaluate_results
from evaluation.references import find_other
from model import GRAttVIS, build_model
from runtime.errors import InputError
from sparse_set import (
    SIDE,
    VIDEOS,
    part_of_set,
    perfect_results,
    save_tiny_model,
    sparse_content,
    write_json,
    write_sparse_set,
)
from synthetic.suites import SUITES, Suite, make_dataset
from test_bad_input import read_files
from test_metric import ap_numbers
from viewing.overlays import overlays, save_pictures

pytestmark = pytest.mark.slow  # whole programs

# Frames of the videos, in the order of their ids
LENGTHS = {number: VIDEOS[number][0] for number in sorted(VIDEOS)}


def test_every_flag_has_a_test():
    flags = vars(evaluate.parse_arguments([]))
    assert set(flags) == {
        name.removeprefix("test_flag_") for name in globals() if name.startswith("test_flag_")
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the set of sparse_set.py and tiny.pt, a model for it."""
    folder = tmp_path_factory.mktemp("flags")
    write_sparse_set(folder)
    save_tiny_model(folder / "tiny.pt")
    return folder


@pytest.fixture
def seen(monkeypatch):
    """What the model is asked for each video, and under which conditions."""
    seen, encode_video = [], GRAttVIS.encode_video

    def watched(model, batches, output_size=None, top_k=10):
        batches = list(batches)
        amp = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        seen.append(
            SimpleNamespace(
                model=model,
                batches=batches,
                output_size=output_size,
                top_k=top_k,
                amp=amp,
                training=model.training,
                processes=len(multiprocessing.active_children()),
                found=encode_video(model, batches, output_size, top_k),
            )
        )
        return seen[-1].found

    monkeypatch.setattr(GRAttVIS, "encode_video", watched)
    return seen


def evaluate_with(*arguments):
    return evaluate.main(evaluate.parse_arguments([str(argument) for argument in arguments]))


@pytest.fixture
def run(folder, tmp_path, seen):
    """Evaluate tiny.pt on the set into tmp_path/out, but for what the given arguments say."""

    def run(*arguments):
        defaults = [
            "--weights",
            folder / "tiny.pt",
            "--data-root",
            folder,
            "--output",
            tmp_path / "out",
            "--device",
            "cpu",
            "--workers",
            0,
        ]
        return evaluate_with(*defaults, *arguments)  # later ones count

    return run


def read_results(output):
    return json.loads((output / "results.json").read_text())


def test_defaults(run, seen, tmp_path, capsys):
    """What the flags below are to change."""
    run()
    bars = capsys.readouterr().err
    # Frames; and the share of the time spent waiting for them
    assert "8/8" in bars and "9/8" not in bars
    assert all(0 <= int(share) <= 100 for share in re.findall(r"waiting=(-?\d+)%", bars))
    assert "waiting=" in bars
    assert [len(call.batches) for call in seen] == [1, 1, 1]
    assert all(not call.processes for call in seen)
    assert [call.output_size for call in seen] == [VIDEOS[number][1:] for number in LENGTHS]
    assert [tuple(call.batches[0].shape) for call in seen] == [
        (3, 3, SIDE, 45),
        (3, 3, SIDE, 45),
        (2, 3, 45, SIDE),
    ]  # 56 x 32 / 40 is 44.8
    assert all(call.amp is None and call.top_k == 10 and not call.training for call in seen)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.json",
        "results.json.zip",
        "metrics.json",
    }


# Model


def test_flag_exclusive(run, seen, tmp_path):
    run()
    run("--exclusive", "--output", tmp_path / "exclusive")
    assert not seen[0].model.exclusive and seen[-1].model.exclusive


def save_official(path, propagation="plain"):
    """A file that says neither its preset nor anything else."""
    model = build_model("toy", 3, propagation)
    torch.save({"model": model.state_dict()}, path)
    return path


def test_flag_weights(run, seen, tmp_path):
    other = save_tiny_model(tmp_path / "other.pt", seed=1)
    run("--weights", tmp_path / "other.pt")
    assert torch.equal(seen[0].model.tracker.query_feat.weight, other.tracker.query_feat.weight)
    found = other.encode_video(seen[0].batches, VIDEOS[3][1:])
    assert torch.equal(found.scores, seen[0].found.scores)


def test_flag_preset(run, seen, tmp_path):
    save_official(tmp_path / "official.pth", "gated")
    with pytest.raises(InputError, match="give one of .*--preset"):
        run("--weights", tmp_path / "official.pth")
    run("--weights", tmp_path / "official.pth", "--preset", "toy")
    # The short side of that preset
    assert seen[0].batches[0].shape[-2] == 96


def test_flag_propagation(run, seen, tmp_path):
    save_official(tmp_path / "official.pth")
    for propagation in ("plain", "clip"):
        run(
            "--weights",
            tmp_path / "official.pth",
            "--preset",
            "toy",
            "--short-side",
            SIDE,
            "--propagation",
            propagation,
        )
        assert seen[-1].model.propagation == seen[-1].model.tracker.propagation == propagation


def test_flag_gate_mask(run, seen, tmp_path):
    save_official(tmp_path / "official.pth", "gated")
    for more, expected in ((), "additive"), (("--gate-mask", "blocked"), "blocked"):
        run("--weights", tmp_path / "official.pth", "--preset", "toy", "--short-side", SIDE, *more)
        assert seen[-1].model.tracker.gate_mask == expected


# Data


def test_flag_data_root(run, seen, tmp_path):
    write_sparse_set(tmp_path / "other")
    write_json(tmp_path / "other/valid.json", part_of_set(3))
    run("--data-root", tmp_path / "other")
    assert len(seen) == 1


def test_flag_split(run, seen, tmp_path):
    write_sparse_set(tmp_path / "set")
    write_json(tmp_path / "set/test.json", part_of_set(17))
    run("--data-root", tmp_path / "set", "--split", "test")
    assert [call.output_size for call in seen] == [VIDEOS[17][1:]]
    assert {entry["video_id"] for entry in read_results(tmp_path / "out")} == {17}


def test_flag_json(run, seen, folder, tmp_path):
    write_json(tmp_path / "one.json", part_of_set(5))
    run("--json", tmp_path / "one.json", "--images", folder / "JPEGImages")
    assert {entry["video_id"] for entry in read_results(tmp_path / "out")} == {5} and len(seen) == 1


def test_flag_images(run, seen, folder, tmp_path):
    """Frames of the same names in another folder."""
    for number, (length, height, width) in VIDEOS.items():
        (tmp_path / f"black/{number}").mkdir(parents=True)
        for t in range(length):
            Image.new("RGB", (width, height)).save(tmp_path / f"black/{number}/{t}.png")
    run("--json", folder / "valid.json", "--images", tmp_path / "black")
    assert len(seen) == 3 and not any(batch.any() for call in seen for batch in call.batches)


def test_a_json_and_its_images_go_together(folder):
    for flag, path in (("--json", "valid.json"), ("--images", "JPEGImages")):
        with pytest.raises(InputError, match="--json and --images go together"):
            evaluate_with("--weights", folder / "tiny.pt", flag, folder / path)


@pytest.fixture
def suites(tmp_path):
    """A folder with two suites, one video each, and six.pt, a model for their six classes."""
    for number, name in enumerate(("degraded", "long"), 2):
        make_dataset(tmp_path / "sets" / name, 1, 1, frames=number, height=32, width=48)
    save_tiny_model(tmp_path / "six.pt", classes=6)
    return tmp_path


def evaluate_suites(folder, *names, sets="sets"):
    return evaluate_with(
        "--weights",
        folder / "six.pt",
        "--device",
        "cpu",
        "--workers",
        0,
        "--output",
        folder / "out",
        "--sets",
        folder / sets,
        "--suites",
        *names,
    )


def test_flag_suites(suites, seen):
    assert set(evaluate_suites(suites, "long", "degraded")) == {"long", "degraded"}
    assert [sum(map(len, call.batches)) for call in seen] == [3, 2]
    assert {path.name for path in (suites / "out").iterdir()} == {"long", "degraded"}
    assert set(evaluate_suites(suites, "long")) == {"long"} and len(seen) == 3


def test_flag_sets(suites, seen):
    (suites / "sets").rename(suites / "elsewhere")
    evaluate_suites(suites, "degraded", sets="elsewhere")
    assert len(seen) == 1 and not (suites / "sets").exists()


def test_a_suite_that_is_not_there_is_written(suites, monkeypatch):
    """As `python data.py --suite` writes it: 24 held-out videos, here of one frame each."""
    suite = Suite(SUITES["degraded"].difficulty, frames=1, objects=(2, 3))
    monkeypatch.setitem(SUITES, "look-alike", suite)
    evaluate_suites(suites, "look-alike", sets="new")
    make_dataset(suites / "expected", 1, 24, 1, objects=(2, 3), difficulty=suite.difficulty)
    assert read_files(suites / "new/look-alike") == read_files(suites / "expected")


def test_flag_short_side(run, seen):
    run("--short-side", 50)
    assert [tuple(call.batches[0].shape[-2:]) for call in seen] == [(50, 70), (50, 70), (70, 50)]
    assert [call.output_size for call in seen] == [VIDEOS[number][1:] for number in LENGTHS]


def test_flag_max_long_side(run, seen):
    run("--max-long-side", 35)
    assert [tuple(call.batches[0].shape[-2:]) for call in seen] == [(25, 35), (25, 35), (35, 25)]


# Result


def test_flag_top_k(run, seen, tmp_path):
    run("--top-k", 3)
    assert [call.top_k for call in seen] == [3, 3, 3]
    video_ids = [entry["video_id"] for entry in read_results(tmp_path / "out")]
    assert video_ids == [3] * 3 + [5] * 3 + [17] * 3


def test_flag_output(run, folder, tmp_path):
    """A folder of any depth; next to the weights by default."""
    run("--output", tmp_path / "new/place")
    assert (tmp_path / "new/place/metrics.json").exists() and not (tmp_path / "out").exists()
    save_tiny_model(tmp_path / "last.pt")
    evaluate_with(
        "--weights", tmp_path / "last.pt", "--data-root", folder, "--device", "cpu", "--workers", 0
    )
    assert (tmp_path / "evaluation/metrics.json").exists()


def test_flag_draw(run, seen, folder, tmp_path):
    """Of the first two videos in the order of the ids, the instances that score 0.3 or more."""
    run("--draw", 2, "--short-side", 40)
    assert {path.name for path in (tmp_path / "out/overlays").iterdir()} == {
        f"{number:05d}.{suffix}" for number in (3, 5) for suffix in ("png", "webp")
    }
    scores = seen[1].found.scores
    assert (scores >= 0.3).any() and (scores < 0.3).any()
    frames = [numpy.asarray(Image.open(folder / f"JPEGImages/5/{t}.png")) for t in range(3)]
    pictures = overlays(frames, seen[1].found, ["ant", "cat", "dog"], 0.3)
    save_pictures(tmp_path / "expected", "00005", pictures, 3)
    for name in ("00005.png", "00005.webp"):
        drawn, expected = (tmp_path / part / name for part in ("out/overlays", "expected"))
        assert drawn.read_bytes() == expected.read_bytes()


def test_flag_plot(run, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    run("--plot", 1)
    assert {path.name for path in (tmp_path / "out/plots").iterdir()} == {
        "00003.png",
        "precision_valid.png",
        "classes_valid.png",
    }
    # No video, but the plots of the whole set
    run("--plot", 0, "--output", tmp_path / "none")
    assert {path.name for path in (tmp_path / "none/plots").iterdir()} == {
        "precision_valid.png",
        "classes_valid.png",
    }


def test_plots_without_matplotlib_are_refused_first(run, seen, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="matplotlib"):
        run("--plot", 0)
    assert not seen


def test_flag_report(run, folder, tmp_path):
    """With gates after a model ran; with frames, but no gates, for a results file."""
    run()
    assert not (tmp_path / "out/report.html").exists()
    run("--report")
    assert 'alt="gates"' in (tmp_path / "out/report.html").read_text(encoding="utf-8")
    plain = ["--results", tmp_path / "out/results.json", "--annotations", folder / "valid.json"]
    plain += ["--report", "--output", tmp_path / "scores"]
    root, images = ("--data-root", folder), ("--images", folder / "JPEGImages")
    for more, is_plain in (((), True), (root, False), (images, False)):
        evaluate_with(*plain, *more)
        page = (tmp_path / "scores/report.html").read_text(encoding="utf-8")
        assert ("Frames are not available" in page) is is_plain and 'alt="gates"' not in page


def test_flag_results(run, seen, folder, tmp_path):
    path = write_json(tmp_path / "scored/mine.json", perfect_results())
    arguments = ["--results", str(path), "--annotations", str(folder / "valid.json")]
    metrics = evaluate_with(*arguments)
    assert metrics["AP"] == pytest.approx(1) and not seen
    # Beside the results
    assert json.loads((tmp_path / "scored/metrics.json").read_text()) == metrics
    run(*arguments)
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == metrics
    with pytest.raises(InputError, match="scoring a file needs --results and --annotations"):
        run("--results", path)


def test_flag_annotations(run, tmp_path):
    """Another ground truth than the set's own, for a model too; and several parts of one."""
    one = sparse_content() | {"annotations": sparse_content()["annotations"][:1]}
    run("--annotations", write_json(tmp_path / "one.json", one))
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    undefined = {name for name, value in metrics["per_class"].items() if value == -1}
    assert undefined == {"ant", "cat"}
    parts = [write_json(tmp_path / f"part{number}.json", part_of_set(number)) for number in VIDEOS]
    metrics = run(
        "--results", write_json(tmp_path / "r.json", perfect_results()), "--annotations", *parts
    )
    assert list(metrics["parts"]) == ["part3", "part17", "part5"]
    assert metrics["AP"] == pytest.approx(1)
    own = [entry for entry in perfect_results() if entry["video_id"] == 17]
    assert ap_numbers(metrics["parts"]["part17"]) == evaluate_results(own, part_of_set(17))


def test_flag_compare(run, seen, tmp_path, capsys):
    """With a results file, or with the output of another evaluation; errors come first."""
    run()
    other = write_json(tmp_path / "perfect.json", perfect_results())
    metrics = run("--compare", other)
    difference = metrics["comparison"]["metrics"]["AP"]
    assert (difference["this"], difference["other"]) == pytest.approx((metrics["AP"], 1))
    assert difference["low"] <= difference["difference"] <= difference["high"]
    assert [entry["video_id"] for entry in metrics["comparison"]["videos"]] == [3, 5, 17]
    assert f"compared with {other}" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == metrics

    shutil.copytree(tmp_path / "out", tmp_path / "before")
    metrics = run("--compare", tmp_path / "before")
    assert metrics["comparison"]["metrics"]["AP"]["difference"] == 0

    del seen[:]
    broken = write_json(tmp_path / "broken.json", perfect_results() + [{}])
    for path, message in (
        (tmp_path / "none.json", "none.json cannot be compared: no file found"),
        (broken, "broken.json cannot be compared: results.* lacks video_id"),
    ):
        with pytest.raises(InputError, match=message):
            run("--compare", path)
    hidden = sparse_content() | {"annotations": []}
    with pytest.raises(InputError, match="--compare needs annotations"):
        run("--annotations", write_json(tmp_path / "hidden.json", hidden), "--compare", other)
    assert not seen


def test_suites_are_compared_with_a_folder(tmp_path):
    with pytest.raises(InputError, match="for suites, give the --output of another evaluation"):
        find_other(write_json(tmp_path / "r.json", []), "easy", {})


def test_flag_track_score(run, seen, folder, tmp_path):
    """The default is 0.3; a prediction of exactly that score is a track."""
    results = perfect_results()
    for entry, score in zip(results, (0.1, 0.3, 0.5)):
        entry["score"] = score
    assert len(results) == 5
    arguments = ["--results", write_json(tmp_path / "r.json", results)]
    arguments += ["--annotations", folder / "valid.json"]
    for more, expected in ((), 4), (("--track-score", 0.5), 3), (("--track-score", -1), 5):
        metrics = run(*arguments, *more)
        assert metrics["tracking"]["tracks"] == expected
        found = metrics["tracking"]["over_detections"]
        assert found["DetPr"] == pytest.approx(1) and (found["DetRe"] == 1) == (expected == 5)
    run("--track-score", 0.4)
    scores = torch.cat([call.found.scores for call in seen])
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["tracking"]["tracks"] == (scores >= 0.4).sum()
    with pytest.raises(SystemExit):
        run("--track-score", "nan")


def test_flag_boundary(run, folder, tmp_path, capsys):
    arguments = ["--results", write_json(tmp_path / "r.json", perfect_results())]
    arguments += ["--annotations", folder / "valid.json"]
    assert "boundary" not in run(*arguments)
    metrics = run(*arguments, "--boundary")
    for name in ("boundary_iou", "min_iou"):
        assert metrics["boundary"][name] == ap_numbers(metrics)
    assert "boundaries: AP 100.0   AP50 100.0   AP75 100.0" in capsys.readouterr().out
    run("--boundary")
    assert "boundary" in json.loads((tmp_path / "out/metrics.json").read_text())


# Run


def test_flag_device(run, seen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device cuda"):
        run("--device", "cuda")
    run("--device", "cpu")
    assert {parameter.device.type for parameter in seen[0].model.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    "amp, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("off", None)]
)
def test_flag_amp(run, seen, amp, dtype):
    """Autocast is entered around every video, and the weights of products are cast before."""
    run("--amp", amp)
    assert [call.amp for call in seen] == [dtype] * 3
    products = {
        module.weight.dtype
        for module in seen[0].model.modules()
        if type(module) in (nn.Linear, nn.Conv2d)
    }
    assert products == {dtype or torch.float32}


def test_flag_skip_bad(run, folder, tmp_path):
    """A video that cannot be read has no results, and costs the others nothing."""
    shutil.copytree(folder, tmp_path / "damaged")
    video = sparse_content()["videos"][0]
    (tmp_path / "damaged/JPEGImages" / video["file_names"][1]).write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot be read"):
        run("--data-root", tmp_path / "damaged")
    run("--data-root", tmp_path / "damaged", "--skip-bad", "--output", tmp_path / "rest")
    run("--output", tmp_path / "whole")
    expected = [
        entry for entry in read_results(tmp_path / "whole") if entry["video_id"] != video["id"]
    ]
    assert read_results(tmp_path / "rest") == expected


def test_flag_compile(run, seen, tmp_path, monkeypatch):
    """Here by a compiler that changes nothing: the results are the same but for rounding."""
    compiled = []

    def compile_nothing(function, **options):
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    run()
    assert not compiled
    run("--compile", "--output", tmp_path / "compiled")
    assert compiled
    for plain, fast in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(fast.found.scores, plain.found.scores, rtol=1e-4, atol=1e-5)


def test_flag_chunk(run, seen):
    run("--chunk", 2)
    assert [[len(batch) for batch in call.batches] for call in seen] == [[2, 1], [2, 1], [2]]


def test_flag_workers(run, seen):
    run("--workers", 2)
    assert seen[0].processes == 2
