"""Every flag of demo.py has an effect.

One test per flag, named after it; a flag without a test fails the first test. Most tests check the
arguments of `GRAttVIS.encode_video` or `GRAttVIS.step`, the others the output files.
"""

import json
import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

import demo
from checkpoint import save_checkpoint
from model import GRAttVIS, build_model
from runtime.errors import InputError
from sparse_set import SIDE, TINY, save_tiny_model, tiny_model, write_json
from test_demo import fake_ffmpeg

pytestmark = pytest.mark.slow  # whole programs

FRAMES, HEIGHT, WIDTH = 3, 40, 56
WHICH = shutil.which  # which the tests replace
NAMES = ["ant", "cat", "dog"]


def test_every_flag_has_a_test():
    flags = vars(demo.parse_arguments([]))
    assert set(flags) == {
        name.removeprefix("test_flag_") for name in globals() if name.startswith("test_flag_")
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with frames/, a video of blocks of colour, and tiny.pt, a model for it."""
    folder = tmp_path_factory.mktemp("demo_flags")
    save_tiny_model(
        folder / "tiny.pt", categories=[[number, name] for number, name in enumerate(NAMES, 1)]
    )
    write_frames(folder / "frames", FRAMES)
    return folder


def write_frames(folder, count, seed=0):
    folder.mkdir()
    generator = numpy.random.default_rng(seed)
    for t in range(count):
        blocks = generator.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), numpy.uint8)
        Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(folder / f"{t}.png")


@pytest.fixture
def seen(monkeypatch):
    """What the model is asked for each video or live frame, and under which conditions."""
    seen, encode_video, step = [], GRAttVIS.encode_video, GRAttVIS.step

    def note(model, frames, output_size, top_k, found):
        amp = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        seen.append(
            SimpleNamespace(
                model=model,
                frames=frames,
                output_size=output_size,
                top_k=top_k,
                amp=amp,
                found=found,
            )
        )
        return found

    def watched(model, batches, output_size=None, top_k=10):
        batches = list(batches)
        found = encode_video(model, batches, output_size, top_k)
        return note(model, batches, output_size, top_k, found)

    def watched_step(model, frame, state=None, output_size=None, top_k=10):
        found = step(model, frame, state, output_size, top_k)
        return note(model, frame, output_size, top_k, found)

    monkeypatch.setattr(GRAttVIS, "encode_video", watched)
    monkeypatch.setattr(GRAttVIS, "step", watched_step)
    return seen


@pytest.fixture
def run(folder, tmp_path, monkeypatch, seen):
    """Segment frames/ into tmp_path/out by tiny.pt, but for what is given; without an mp4."""
    monkeypatch.setattr(shutil, "which", lambda name: None)

    def run(*arguments, source=None):
        run_demo(
            source or folder / "frames",
            "--weights",
            folder / "tiny.pt",
            "--output",
            tmp_path / "out",
            "--device",
            "cpu",
            *arguments,
        )

    return run


def run_demo(*arguments):
    demo.main(demo.parse_arguments([str(argument) for argument in arguments]))


def read_results(output):
    return json.loads((output / "results.json").read_text())


def test_defaults(run, seen, tmp_path):
    """What the flags below are to change."""
    run()
    (call,) = seen
    # 56 x 32 / 40 is 44.8
    assert [tuple(batch.shape) for batch in call.frames] == [(FRAMES, 3, SIDE, 45)]
    assert call.output_size == (HEIGHT, WIDTH) and call.top_k == 20 and call.amp is None
    assert all(track["score"] >= 0.3 for track in read_results(tmp_path / "out")["tracks"])
    with Image.open(tmp_path / "out/overlay.webp") as animation:
        animation.load()
        assert animation.info["duration"] == 125 and animation.n_frames == FRAMES


def test_flag_source(run, seen, tmp_path):
    write_frames(tmp_path / "other", 2, seed=1)
    run(source=tmp_path / "other")
    (batch,) = seen[0].frames
    assert len(batch) == 2 and read_results(tmp_path / "out")["source"] == str(tmp_path / "other")


# Model


def test_flag_exclusive(run, seen, tmp_path):
    run()
    run("--exclusive", "--output", tmp_path / "exclusive")
    assert not seen[0].model.exclusive and seen[-1].model.exclusive


def save_official(path, propagation="plain"):
    """A file that says neither its preset nor anything else."""
    torch.save({"model": build_model("toy", 3, propagation).state_dict()}, path)
    return path


def test_flag_weights(run, seen, tmp_path):
    other = save_tiny_model(tmp_path / "other.pt", seed=1)
    run("--weights", tmp_path / "other.pt")
    assert torch.equal(seen[0].model.tracker.query_feat.weight, other.tracker.query_feat.weight)


def test_flag_preset(run, seen, tmp_path):
    save_official(tmp_path / "official.pth", "gated")
    with pytest.raises(InputError, match="give one of .*--preset"):
        run("--weights", tmp_path / "official.pth")
    run("--weights", tmp_path / "official.pth", "--preset", "toy", "--top-k", 1)
    # The short side of that preset
    assert seen[0].frames[0].shape[-2] == 96


@pytest.mark.parametrize("propagation", ["plain", "clip"])
def test_flag_propagation(run, seen, tmp_path, propagation):
    save_official(tmp_path / "official.pth")
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
    assert seen[0].model.propagation == seen[0].model.tracker.propagation == propagation


def test_flag_categories(run, tmp_path):
    """Names in the order of their ids, before those of the checkpoint."""
    categories = [{"id": number, "name": f"class of {number}"} for number in (90, 3, 7)]
    path = write_json(tmp_path / "names.json", {"categories": categories})
    run("--categories", path, "--score", 0)
    own = read_results(tmp_path / "out")["tracks"]
    run("--score", 0, "--output", tmp_path / "plain")
    plain = read_results(tmp_path / "plain")["tracks"]
    names = dict(zip(NAMES, ("class of 3", "class of 7", "class of 90")))
    assert [track["category"] for track in own] == [names[track["category"]] for track in plain]
    assert len({track["category"] for track in own}) > 1


# Frames and results


def test_flag_short_side(run, seen):
    run("--short-side", 50)
    assert seen[0].frames[0].shape[-2:] == (50, 70) and seen[0].output_size == (HEIGHT, WIDTH)


def test_flag_max_long_side(run, seen):
    run("--max-long-side", 35)
    assert seen[0].frames[0].shape[-2:] == (25, 35) and seen[0].output_size == (HEIGHT, WIDTH)


def test_flag_top_k(run, seen, tmp_path):
    run("--top-k", 1, "--score", 0)
    assert seen[0].top_k == 1 and len(read_results(tmp_path / "out")["tracks"]) == 1


def test_flag_score(run, seen, tmp_path):
    """Who scores less is left out: here all but two tracks, then all."""
    run("--score", 0, "--top-k", 5)
    scores = [track["score"] for track in read_results(tmp_path / "out")["tracks"]]
    assert len(set(scores)) == len(scores) > 2
    for least, count in (((scores[1] + scores[2]) / 2, 2), (1.01, 0)):
        output = tmp_path / str(count)
        run("--score", least, "--output", output)
        assert [track["score"] for track in read_results(output)["tracks"]] == scores[:count]
        assert len(list(output.glob("masks/*"))) == count
    # One picture of ids per frame; the best track is on top.
    results = read_results(tmp_path / "2")
    for t in range(results["frames"]):
        expected = numpy.zeros((results["height"], results["width"]), dtype=int)
        for track in results["tracks"][::-1]:
            expected[rle.decode(track["segmentations"][t]) > 0] = track["track_id"] + 1
        with Image.open(tmp_path / f"2/ids/{t:05d}.png") as picture:
            assert picture.mode == "P" and numpy.array_equal(numpy.asarray(picture), expected)


def doubled(found):
    """The best instance twice, as tracks 6 and 7."""
    best = {name: value[:1] for name, value in vars(found).items()}
    twice = {
        name: value * 2 if isinstance(value, list) else torch.cat([value, value])
        for name, value in best.items()
    }
    return replace(found, **twice | {"track_ids": torch.tensor([6, 7])})


def test_flag_keep_duplicates(run, tmp_path, monkeypatch, capsys):
    """By default, the second of two equal tracks is neither written nor printed."""
    encode_video, step = GRAttVIS.encode_video, GRAttVIS.step

    def doubled_step(*given):
        tracks, state = step(*given)
        return doubled(tracks), state

    monkeypatch.setattr(GRAttVIS, "encode_video", lambda *given: doubled(encode_video(*given)))
    monkeypatch.setattr(GRAttVIS, "step", doubled_step)
    for more, expected in ((), [6]), (("--keep-duplicates",), [6, 7]):
        output = tmp_path / str(len(expected))
        run("--score", 0, "--output", output, *more)
        assert [track["track_id"] for track in read_results(output)["tracks"]] == expected
        assert len(list(output.glob("masks/*"))) == len(expected)
        capsys.readouterr()
        run("--live", "--score", 0, *more)
        printed = re.findall(r"#(\d+)", capsys.readouterr().out)
        assert printed == [str(track) for track in expected] * FRAMES


def test_flag_output(run, tmp_path, monkeypatch, folder):
    run("--output", tmp_path / "a/b")
    assert (tmp_path / "a/b/results.json").exists() and not (tmp_path / "out").exists()
    # Not said: demo/ and the source's name
    monkeypatch.chdir(tmp_path)
    run_demo(folder / "frames", "--weights", folder / "tiny.pt", "--device", "cpu")
    assert (tmp_path / "demo/frames/results.json").exists()


def test_flag_fps(run, tmp_path, monkeypatch):
    """Of the animation, and of the mp4: here, ffmpeg writes down what it is asked."""
    fake_ffmpeg(tmp_path, monkeypatch, "exit 0")
    monkeypatch.setattr(shutil, "which", WHICH)
    run("--fps", 4)
    assert " -framerate 4 " in (tmp_path / "given").read_text()
    with Image.open(tmp_path / "out/overlay.webp") as animation:
        animation.load()
        assert animation.info["duration"] == 250


def test_flag_plot(run, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    run("--plot")
    assert (tmp_path / "out/timeline.png").stat().st_size > 1000
    run("--output", tmp_path / "plain")
    assert not (tmp_path / "plain/timeline.png").exists()


def test_a_plot_without_matplotlib_is_refused_first(run, seen, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="matplotlib"):
        run("--plot")
    assert not seen and not (tmp_path / "out").exists()


def test_flag_live(run, seen, tmp_path, capsys):
    """A line for each frame, of what `step` finds with the same settings; nothing is written."""
    run(
        "--live",
        "--score",
        0,
        "--top-k",
        2,
        "--short-side",
        50,
        "--max-long-side",
        60,
        "--amp",
        "bf16",
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"frame {t}" for t in range(FRAMES)]
    for line, call in zip(lines, seen, strict=True):
        assert call.frames.shape == (3, 43, 60)  # 40 x 60 / 56 is 42.9
        assert call.output_size == (HEIGHT, WIDTH)
        assert call.top_k == 2 and call.amp == torch.bfloat16
        tracks, _ = call.found
        assert f"{NAMES[tracks.labels[0]]} #{tracks.track_ids[0]} {tracks.scores[0]:.2f}" in line
    assert not (tmp_path / "out").exists()


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
    """Autocast is entered, and the weights of products are cast before."""
    run("--amp", amp)
    assert seen[0].amp == dtype and not seen[0].model.training
    assert seen[0].model.tracker.class_embed.weight.dtype == (dtype or torch.float32)


def test_flag_chunk(run, seen):
    run("--chunk", 2)
    assert [len(batch) for batch in seen[0].frames] == [2, 1]


@pytest.mark.parametrize(
    "propagation, options",
    [("gated", {"clip_length": 2}), ("plain", {"clip_length": 3}), ("clip", {})],
)
def test_a_model_that_reads_clips_follows_no_live_video(run, seen, tmp_path, propagation, options):
    model = tiny_model(propagation=propagation, **options)
    config = {"preset": "toy", "propagation": propagation, "model_options": TINY | options}
    save_checkpoint(tmp_path / "clips.pt", {"model": model.state_dict(), "config": config})
    with pytest.raises(InputError, match="clips.pt reads clips of several frames: it cannot"):
        run("--weights", tmp_path / "clips.pt", "--live")
    run("--weights", tmp_path / "clips.pt", "--short-side", SIDE)
    assert len(seen) == 1


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_names_for_another_number_of_classes_are_refused(run, seen, tmp_path, count):
    categories = [{"id": number, "name": f"class of {number}"} for number in range(count)]
    path = write_json(tmp_path / "names.json", {"categories": categories})
    with pytest.raises(InputError, match=f"tiny.pt has 3 classes, {path} has {count}"):
        run("--categories", path)
    assert not seen and not (tmp_path / "out").exists()
