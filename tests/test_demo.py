"""The demo: all sources give the same frames, and it writes and prints what the model predicts.

The model has trained for one step: its tracks are bad, but they are tracks. Most tests call the
program in this process; the live test starts it and sends it one picture at a time.
"""

import functools
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

import demo
import train
from checkpoint import model_from_checkpoint
from data import InputError, at_test_size
from evaluation.postprocess import FrameTracks
from processes import ENVIRONMENT, REPOSITORY, fake_ffmpeg
from reading.annotations import one_line
from reading.sources import read_frames
from reading.videos import read_ppm
from synthetic.scenes import CATEGORIES
from synthetic.suites import SUITES, Suite, make_dataset
from test_bad_input import read_files, sentence, train_arguments
from test_overlays import read_animation
from viewing import results as writing
from viewing.overlays import overlays
from viewing.results import check_output, publish, staging_folder

pytestmark = pytest.mark.slow  # whole programs

FRAMES, HEIGHT, WIDTH = 4, 64, 80
# Shrunk for the model; twice as many instances as there are tracks.
SHORT_SIDE, TOP_K = 48, 40
needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="video files are read and written with ffmpeg"
)


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """Loading the model takes longer than most of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "model_from_checkpoint", functools.cache(demo.model_from_checkpoint))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with set/, a video of FRAMES frames to train on and another one, and run/last.pt, a
    model of one training step.
    """
    folder = tmp_path_factory.mktemp("demo")
    make_dataset(
        folder / "set",
        train_videos=1,
        valid_videos=1,
        frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        objects=(1, 3),
    )
    train.main(train.parse_arguments(train_arguments(folder / "set", folder / "run")))
    return folder


@pytest.fixture(scope="module")
def weights(trained):
    return trained / "run/last.pt"


@pytest.fixture(scope="module")
def folder(trained):
    """The frames of the held-out video, 00000.jpg and so on."""
    return next((trained / "set/valid/JPEGImages").iterdir())


@pytest.fixture(scope="module")
def pictures(folder):
    return [Image.open(folder / f"{t:05d}.jpg").convert("RGB") for t in range(FRAMES)]


@pytest.fixture(scope="module")
def model(weights):
    return model_from_checkpoint(weights)[0]


def command(source, weights, *more):
    return [
        str(argument)
        for argument in (
            source,
            "--weights",
            weights,
            "--short-side",
            SHORT_SIDE,
            "--top-k",
            TOP_K,
            "--device",
            "cpu",
            "--keep-duplicates",  # after one training step, many tracks are alike
            *more,
        )
    ]


def run(*given):
    demo.main(demo.parse_arguments(command(*given)))


def pixels_of(source):
    """All frames that the demo reads from a source, (T, H, W, 3)."""
    return numpy.stack([numpy.asarray(picture) for picture in read_frames(str(source))])


def stacked(pictures):
    return numpy.stack([numpy.asarray(picture) for picture in pictures])


def save_animation(path, pictures, **options):
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=125, **options)
    return path


# Frames from anywhere


def test_a_folder_and_a_pattern_are_read_in_the_order_of_the_names(tmp_path, pictures):
    """In any order of writing, with other files and folders next to them."""
    for t in (3, 0, 2, 1):
        pictures[t].save(tmp_path / f"{t:03d}.{'PNG' if t % 2 else 'bmp'}")
    (tmp_path / "002.txt").write_text("no picture")
    (tmp_path / "004.png").mkdir()
    assert numpy.array_equal(pixels_of(tmp_path), stacked(pictures))
    assert numpy.array_equal(pixels_of(tmp_path / "*"), stacked(pictures))
    assert numpy.array_equal(pixels_of(tmp_path / "00[1-3].*"), stacked(pictures[1:4]))
    # A video of one frame.
    assert numpy.array_equal(pixels_of(tmp_path / "003.PNG"), stacked(pictures[3:4]))


@pytest.mark.parametrize(
    "name, options",
    [("clip.webp", {"lossless": True}), ("clip.apng", {"format": "PNG"}), ("clip.png", {})],
)
def test_a_lossless_animation_has_the_pixels_of_its_frames(
    tmp_path, folder, pictures, name, options
):
    assert numpy.array_equal(
        pixels_of(save_animation(tmp_path / name, pictures, **options)), pixels_of(folder)
    )


def test_a_gif_has_as_many_frames_in_the_same_order(tmp_path, pictures):
    """Its colours are rounded to 256, so each frame is only the nearest to its own."""
    found, expected = (
        pixels_of(save_animation(tmp_path / "clip.gif", pictures)).astype(int),
        stacked(pictures),
    )
    distances = numpy.abs(found[:, None] - expected).mean((2, 3, 4))
    assert distances.shape == (FRAMES, FRAMES)
    assert distances.argmin(1).tolist() == list(range(FRAMES))


def ppm(*pictures):
    """The pictures as Pillow writes them, one behind the other."""
    stream = io.BytesIO()
    for picture in pictures:
        picture.save(stream, "PPM")
    return stream.getvalue()


def ppm_pictures(content):
    return list(read_ppm(io.BytesIO(content), "the camera"))


def test_ppm_pictures_one_behind_the_other(pictures):
    # Of two sizes, as that is for others to refuse.
    one, other = pictures[0], pictures[1].resize((31, 17))
    assert [
        (found.mode, found.size, found.tobytes()) for found in ppm_pictures(ppm(one, other))
    ] == [("RGB", picture.size, picture.tobytes()) for picture in (one, other)]
    assert ppm_pictures(b"") == []


@pytest.mark.parametrize(
    "content",
    [
        b"garbage",
        b"\x89PNG\r\n\x1a\n",
        b"P5\n2 1\n255\n\0\0",
        b"P6\n2\n255\n",
        b"P6\n2 1\n65535\n" + bytes(12),
    ],
    ids=["garbage", "PNG", "grey", "one side", "16 bit"],
)
def test_what_is_no_stream_of_ppm_pictures_is_refused(content):
    with pytest.raises(InputError, match="^the camera is no stream of PPM pictures"):
        # The first picture, whatever comes behind it.
        next(read_ppm(io.BytesIO(content), "the camera"))


@pytest.mark.parametrize("missing", [1, 14, 6 * 5 * 3])
def test_a_picture_that_is_cut_off_is_refused_and_the_one_before_is_not(missing):
    whole = Image.new("RGB", (6, 5), "red")
    found = read_ppm(io.BytesIO(ppm(whole, whole)[:-missing]), "the camera")
    assert next(found).tobytes() == whole.tobytes()
    with pytest.raises(InputError, match="^the camera ends in the middle of a picture$"):
        next(found)


def test_a_camera_is_opened_by_ffmpeg(tmp_path, monkeypatch, pictures):
    """/dev/null is no camera, but a device as a camera is one."""
    (tmp_path / "seen.ppm").write_bytes(ppm(*pictures))
    fake_ffmpeg(tmp_path, monkeypatch, f"cat {tmp_path}/seen.ppm")
    assert numpy.array_equal(pixels_of("/dev/null"), stacked(pictures))
    assert " -f v4l2 -i /dev/null -fps_mode passthrough " in (tmp_path / "given").read_text()


@pytest.mark.parametrize(
    "script, reason",
    [
        (
            "echo '[mov @ 0x5f] no light' >&2; echo 'Error opening input files: no' >&2; exit 1",
            "no light",
        ),
        ("exit 3", "exit status 3"),
    ],
)
def test_what_ffmpeg_cannot_read_is_named_with_the_cause(tmp_path, monkeypatch, script, reason):
    fake_ffmpeg(tmp_path, monkeypatch, script)
    (tmp_path / "clip.mkv").touch()
    with pytest.raises(InputError, match=f"^ffmpeg cannot read {tmp_path}/clip.mkv: {reason}$"):
        list(read_frames(str(tmp_path / "clip.mkv")))


# The folder of results


@pytest.fixture(scope="module")
def done(folder, weights, trained):
    """What the demo writes for the folder of frames, all tracks included."""
    run(folder, weights, "--score", 0, "--output", trained / "new/done")
    return trained / "new/done"


@pytest.fixture(scope="module")
def results(done):
    return json.loads((done / "results.json").read_text())


@pytest.fixture(scope="module")
def expected(model, pictures):
    """What the model finds in the same frames, all given to it at once."""
    frames = torch.stack([at_test_size(picture, SHORT_SIDE) for picture in pictures])
    assert frames.shape == (FRAMES, 3, SHORT_SIDE, SHORT_SIDE * WIDTH // HEIGHT)
    return model.encode_video([frames], (HEIGHT, WIDTH), TOP_K)


def best_of_each_track(track_ids):
    """Where each track comes first in a list of instances, best first."""
    track_ids = track_ids.tolist()
    return sorted(map(track_ids.index, set(track_ids)))


def test_results_are_those_of_encode_video(results, expected, folder):
    assert {name: value for name, value in results.items() if name != "tracks"} == {
        "source": str(folder),
        "height": HEIGHT,
        "width": WIDTH,
        "frames": FRAMES,
    }
    chosen = best_of_each_track(expected.track_ids)
    # Some are in the list under several labels.
    assert 1 < len(chosen) < len(expected.track_ids)
    for track, index in zip(results["tracks"], chosen, strict=True):
        assert track == {
            "track_id": expected.track_ids[index].item(),
            "category": CATEGORIES[expected.labels[index]],
            "score": expected.scores[index].item(),
            "segmentations": expected.segmentations[index],
            "gates_open": expected.gates[index].tolist(),
        }


def test_every_track_is_there_once_and_the_best_comes_first(results):
    tracks = results["tracks"]
    assert len({track["track_id"] for track in tracks}) == len(tracks)
    scores = [track["score"] for track in tracks]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1
    for track in tracks:
        assert len(track["segmentations"]) == len(track["gates_open"]) == FRAMES
        assert all(
            len(layers) == 3 and {*layers} <= {True, False} for layers in track["gates_open"]
        )


def test_masks_are_pictures_of_the_codes(done, results):
    shown = {}
    for track in results["tracks"]:
        name = f"{track['track_id']:03d}_{track['category']}"
        for t, code in enumerate(track["segmentations"]):
            shown[f"{name}/{t:05d}.png"] = rle.decode(code)
    files = {str(path.relative_to(done / "masks")): path for path in (done / "masks").rglob("*.*")}
    assert files.keys() == shown.keys() and len(files) == FRAMES * len(results["tracks"])
    for name, path in files.items():
        with Image.open(path) as file:
            assert file.format == "PNG" and file.mode == "L"
            assert numpy.array_equal(numpy.asarray(file), numpy.where(shown[name], 255, 0))
    assert any(mask.any() for mask in shown.values())


def test_pictures_are_overlays_of_every_frame(done, expected, pictures):
    video = {"overlay.mp4"} if shutil.which("ffmpeg") else set()
    assert {path.name for path in done.iterdir()} == {
        "frames",
        "ids",
        "masks",
        "overlay.png",
        "overlay.webp",
        "results.json",
    } | video
    drawn = list(overlays(map(numpy.asarray, pictures), expected, list(CATEGORIES), 0))
    assert sorted(path.name for path in (done / "frames").iterdir()) == [
        f"{t:05d}.png" for t in range(FRAMES)
    ]
    assert numpy.array_equal(pixels_of(done / "frames"), stacked(drawn))
    animation = read_animation(done / "overlay.webp")
    assert len(animation) == FRAMES
    # WebP is lossy.
    assert numpy.abs(numpy.stack(animation).astype(int) - stacked(drawn)).mean() < 8
    with Image.open(done / "overlay.png") as sheet:
        assert sheet.format == "PNG" and sheet.size == (3 * drawn[0].width, 2 * drawn[0].height)
        assert numpy.array_equal(
            numpy.asarray(sheet)[: drawn[0].height, : drawn[0].width], drawn[0]
        )


def test_where_nothing_scores_enough_the_frames_stay_as_they_are(
    tmp_path, monkeypatch, capsys, weights, pictures
):
    """From an animation, into the folder that is written when none is named, at another speed,
    without ffmpeg.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    run(
        save_animation(tmp_path / "two.webp", pictures[:2], lossless=True),
        weights,
        "--score",
        1.01,
        "--fps",
        4,
    )
    assert "2 frames, 0 tracks that score 1.01 or more\n" in capsys.readouterr().out
    output = tmp_path / "demo/two"
    assert {path.name for path in output.iterdir()} == {
        "frames",
        "overlay.png",
        "overlay.webp",
        "results.json",
    }
    assert json.loads((output / "results.json").read_text())["tracks"] == []
    # As all small frames are.
    enlarged = stacked(pictures[:2]).repeat(4, 1).repeat(4, 2)
    assert numpy.array_equal(pixels_of(output / "frames"), enlarged)
    with Image.open(output / "overlay.webp") as animation:
        animation.load()
        assert animation.n_frames == 2 and animation.info["duration"] == 250


def test_an_mp4_that_cannot_be_made_is_told(tmp_path, monkeypatch, capsys, weights, pictures):
    """By ffmpeg's own words; all else is there."""
    fake_ffmpeg(tmp_path, monkeypatch, "echo Unknown encoder >&2; exit 8")
    run(save_animation(tmp_path / "two.webp", pictures[:2]), weights, "--output", tmp_path / "out")
    assert "overlay.mp4 was not made: Unknown encoder\n" in capsys.readouterr().out
    assert {"results.json", "overlay.webp", "overlay.png"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_a_timeline_is_drawn_if_asked_for(tmp_path, weights, pictures):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    pictures[0].save(tmp_path / "one.png")
    run(tmp_path / "one.png", weights, "--plot", "--output", tmp_path / "out")
    with Image.open(tmp_path / "out/timeline.png") as file:
        assert file.format == "PNG"


# Whole or not at all


def stop(error):
    """A function that raises the error, whatever it is given."""

    def raising(*given, **more):
        raise error

    return raising


@pytest.mark.parametrize("where", ["save_json", "overlays", "save_pictures", "make_mp4", "publish"])
@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), SystemExit(143), OSError(28, "No space")],
    ids=["Ctrl-C", "SIGTERM", "disk full"],
)
def test_an_interruption_leaves_nothing_and_the_next_attempt_works(
    tmp_path, monkeypatch, weights, pictures, where, error
):
    (tmp_path / "in").mkdir()
    pictures[0].save(tmp_path / "in/one.png")
    fake_ffmpeg(tmp_path / "in", monkeypatch, "exit 1")
    arguments = tmp_path / "in/one.png", weights, "--output", tmp_path / "new/out", "--top-k", 1
    with monkeypatch.context() as patch:
        patch.setattr(demo if where == "publish" else writing, where, stop(error))
        with pytest.raises(type(error)):
            run(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    if where == "publish":
        run(*arguments)
        assert (tmp_path / "new/out/results.json").exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "new"]


def test_a_kill_leaves_no_folder_of_that_name(tmp_path):
    process = os.fork()
    if not process:
        try:
            with staging_folder(tmp_path / "out") as folder:
                (folder / "results.json").write_text("{}")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".")
    check_output(tmp_path / "out")
    with staging_folder(tmp_path / "out") as folder:
        publish(folder, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "appear",
    [os.mkdir, lambda path: path.write_text("of another"), lambda path: path.symlink_to("nowhere")],
    ids=["a folder", "a file", "a link"],
)
def test_what_appears_meanwhile_is_left_as_it_is(tmp_path, monkeypatch, weights, pictures, appear):
    pictures[0].save(tmp_path / "one.png")
    monkeypatch.setattr(writing, "make_mp4", lambda *given: [appear(tmp_path / "out")][:0])
    monkeypatch.setattr(shutil, "which", lambda name: name)
    arguments = command(tmp_path / "one.png", weights, "--output", tmp_path / "out", "--top-k", 1)
    assert sentence(demo, arguments) == (
        f"{tmp_path}/out has appeared meanwhile and is left as it is: give another --output"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "out"]
    before = (tmp_path / "out").lstat()
    assert before.st_size == len("of another") or not (tmp_path / "out").is_file()


def test_the_folder_may_be_read_by_whom_the_user_allows(tmp_path, done):
    (tmp_path / "usual").mkdir()
    assert done.stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize(
    "change",
    [
        lambda folder, frame: frame.save(folder / "9.png"),
        lambda folder, frame: (folder / "1.png").unlink(),
        lambda folder, frame: frame.resize((9, 9)).save(folder / "1.png"),
    ],
    ids=["one more", "one less", "another size"],
)
def test_a_source_that_changes_meanwhile_is_refused(
    tmp_path, monkeypatch, weights, pictures, change
):
    (tmp_path / "in").mkdir()
    for t in range(2):
        pictures[t].save(tmp_path / f"in/{t}.png")
    monkeypatch.setattr(
        writing, "overlays", lambda *given: change(tmp_path / "in", pictures[2]) or overlays(*given)
    )
    message = refuse(tmp_path, tmp_path / "in", weights, "--top-k", 1)
    assert re.search("has changed meanwhile|is 9x9, the first 80x64", message)


# Without a source


@pytest.fixture
def short_scenes(tmp_path, monkeypatch):
    """In an empty folder, scenes of two frames; without ffmpeg."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SUITES, "occlusion", Suite(frames=2))
    monkeypatch.setattr(shutil, "which", lambda name: None)


def without_source(weights, *more):
    return command(None, weights, *more)[1:]


def test_without_a_source_three_scenes_are_shown_by_one_model(
    tmp_path, monkeypatch, short_scenes, weights
):
    loaded, load = [], demo.model_from_checkpoint
    monkeypatch.setattr(
        demo, "model_from_checkpoint", lambda *given: loaded.append(given) or load(*given)
    )
    demo.main(demo.parse_arguments(without_source(weights, "--score", 0, "--top-k", 2)))
    assert len(loaded) == 1
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {
        f"occlusion_{index}" for index in (0, 4, 6)
    }
    for index in (0, 4, 6):
        folder, source = tmp_path / f"demo/occlusion_{index}", f"occlusion:{index}"
        results = json.loads((folder / "results.json").read_text())
        assert (results["source"], results["frames"], results["height"], results["width"]) == (
            source,
            2,
            96,
            160,
        )
        run(
            source, weights, "--score", 0, "--top-k", 2, "--output", tmp_path / "alone" / str(index)
        )
        # As if it had been the only one.
        assert read_files(folder) == read_files(tmp_path / "alone" / str(index))


def test_without_a_source_nothing_is_written_if_one_of_the_scenes_is_there(
    tmp_path, short_scenes, weights
):
    (tmp_path / "out/occlusion_6").mkdir(parents=True)
    message = sentence(demo, without_source(weights, "--output", tmp_path / "out"))
    assert message == f"{tmp_path}/out/occlusion_6 is there already: give another --output"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["occlusion_6"]


def test_without_a_source_an_interruption_blocks_no_scene(
    tmp_path, monkeypatch, short_scenes, weights
):
    """Not even one that was finished before."""
    segment = demo.segment
    monkeypatch.setattr(
        demo,
        "segment",
        lambda model, source, *more: (
            stop(KeyboardInterrupt())()
            if source == "occlusion:6"
            else segment(model, source, *more)
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        demo.main(demo.parse_arguments(without_source(weights, "--top-k", 1)))
    assert not list(tmp_path.iterdir())


def test_without_a_source_the_first_scene_is_followed_live(tmp_path, capsys, short_scenes, weights):
    for arguments in (without_source(weights, "--live"), command("occlusion:0", weights, "--live")):
        demo.main(demo.parse_arguments(arguments))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[:2] == lines[2:] and not list(tmp_path.iterdir())


def test_the_weights_that_come_with_the_code_are_found_from_any_folder():
    assert demo.parse_arguments([]).weights == REPOSITORY / "weights/small.pt"


# Class names


def names_of(config, *more):
    return demo.class_names(demo.parse_arguments(["frames", *map(str, more)]), config, 3)


def test_class_names_are_the_checkpoints_or_of_categories_or_numbers(tmp_path):
    """Those of --categories in the order of their ids, and before the checkpoint's."""
    config = {"categories": [[1, "cat"], [2, "dog"], [7, "cow"]]}
    (tmp_path / "valid.json").write_text(
        json.dumps(
            {
                "videos": [],
                "categories": [
                    {"id": number, "name": name}
                    for number, name in ((9, "fly"), (3, "bee"), (5, "ant"))
                ],
            }
        )
    )
    assert names_of(config) == ["cat", "dog", "cow"]
    assert names_of({}) == ["class 0", "class 1", "class 2"]
    for known in (config, {}):
        assert names_of(known, "--categories", tmp_path / "valid.json") == ["bee", "ant", "fly"]


def test_class_names_are_in_the_results(tmp_path, weights, pictures, model):
    """Of one frame, which is shrunk further by its long side."""
    # With what no folder's name can have.
    names = [f"one/{letter}" for letter in "abcdef"]
    (tmp_path / "names.json").write_text(
        json.dumps({"categories": [{"id": i, "name": name} for i, name in enumerate(names)]})
    )
    pictures[0].save(tmp_path / "one.png")
    run(
        tmp_path / "one.png",
        weights,
        "--score",
        0,
        "--categories",
        tmp_path / "names.json",
        "--output",
        tmp_path / "out",
        "--max-long-side",
        40,
    )
    found = model.encode_video([at_test_size(pictures[0], 32)[None]], (HEIGHT, WIDTH), TOP_K)
    chosen = best_of_each_track(found.track_ids)
    tracks = json.loads((tmp_path / "out/results.json").read_text())["tracks"]
    assert [track["category"] for track in tracks] == [
        names[label] for label in found.labels[chosen]
    ]
    assert [track["score"] for track in tracks] == found.scores[chosen].tolist()
    folders = {path.name for path in (tmp_path / "out/masks").iterdir()}
    assert {re.sub("-[0-9a-f]+$", "", folder) for folder in folders} == {
        f"{track['track_id']:03d}_{track['category'].replace('/', '_')}" for track in tracks
    }


@pytest.mark.parametrize(
    "name", ["n" * 300, "../../a", "..", "CON", "nul\0byte", "two\nlines", "\ud800", "日本語" * 100]
)
def test_any_class_name_can_be_written(tmp_path, capsys, weights, pictures, name):
    """The results have it on one line; folders are named after it; a printed line stays a line."""
    categories = [{"id": i, "name": f"{name}{i}"} for i in range(6)]
    (tmp_path / "names.json").write_text(json.dumps({"categories": categories}))
    pictures[0].save(tmp_path / "one.png")
    run(
        tmp_path / "one.png",
        weights,
        "--score",
        0,
        "--categories",
        tmp_path / "names.json",
        "--output",
        tmp_path / "out",
    )
    tracks = json.loads((tmp_path / "out/results.json").read_text())["tracks"]
    names = {one_line(category["name"]) for category in categories}
    assert tracks and {track["category"] for track in tracks} <= names
    folders = list((tmp_path / "out/masks").iterdir())
    assert len(folders) == len(tracks)
    assert all(len(os.fsencode(folder.name)) < 100 for folder in folders)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["names.json", "one.png", "out"]
    assert len(capsys.readouterr().out.split("\n")) == 3


# What is refused


def refuse(tmp_path, source, weights, *more):
    """The sentence that a source is refused with, into a folder that is not there afterwards."""
    message = sentence(demo, command(source, weights, "--output", tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()
    return message


@pytest.mark.parametrize("more", [(), ("--live",)], ids=" ".join)
def test_weights_that_make_no_numbers_are_refused(tmp_path, folder, weights, more):
    checkpoint = torch.load(weights, weights_only=True)
    checkpoint["model"]["tracker.class_embed.weight"].fill_(math.nan)
    torch.save(checkpoint, tmp_path / "damaged.pt")
    with pytest.raises(
        FloatingPointError, match="the scores are not finite: the weights are damaged"
    ):
        demo.main(
            demo.parse_arguments(
                command(folder, tmp_path / "damaged.pt", "--output", tmp_path / "out", *more)
            )
        )
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_there_is_left_as_it_is(tmp_path, folder, weights):
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames/00000.png").write_text("of yesterday")
    before = read_files(tmp_path)
    message = sentence(demo, command(folder, weights, "--output", tmp_path))
    assert message == f"{tmp_path} is there already: give another --output"
    assert before and read_files(tmp_path) == before


def test_standard_input_is_only_followed_live(tmp_path, weights):
    assert (
        refuse(tmp_path, "-", weights)
        == "standard input can be read only once: follow it with --live"
    )


def test_sources_without_pictures_are_named(tmp_path, weights):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("no picture")
    for name in ("missing.mp4", "missing/*.jpg", "empty", "empty/*"):
        assert refuse(tmp_path, tmp_path / name, weights).startswith(
            f"no frames at {tmp_path / name}: "
        )


def test_a_picture_that_is_damaged_is_named(tmp_path, weights, folder):
    (tmp_path / "frames").mkdir()
    for name in ("00000.jpg", "00001.jpg"):
        shutil.copy(folder / name, tmp_path / "frames")
    path = tmp_path / "frames/00001.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    for source in (tmp_path / "frames", path):
        assert re.match(
            f"frame {path} cannot be read: .*truncated", refuse(tmp_path, source, weights)
        )


def test_a_file_that_is_no_picture_needs_ffmpeg(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"no picture")
    assert refuse(tmp_path, path, weights).startswith(
        f"{path} is read with ffmpeg, which is not on PATH"
    )


def test_frames_of_two_sizes_are_refused(tmp_path, weights, pictures):
    frames = tmp_path / "frames"
    frames.mkdir()
    for t, size in enumerate([(WIDTH, HEIGHT), (WIDTH, HEIGHT), (50, 70)]):
        pictures[t].resize(size).save(frames / f"{t}.png")
    assert (
        refuse(tmp_path, frames, weights)
        == f"frame 2 of {frames} is 50x70, the first {WIDTH}x{HEIGHT}"
    )


def test_class_names_of_another_number_are_refused(tmp_path, weights, folder):
    path = tmp_path / "names.json"
    path.write_text(
        json.dumps({"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]})
    )
    assert (
        refuse(tmp_path, folder, weights, "--categories", path)
        == f"{weights} has 6 classes, {path} has 2"
    )
    with pytest.raises(InputError, match="has 3 classes, its config has 1$"):
        names_of({"categories": [[1, "cat"]]})


# Live


def box_of(mask):
    """The first and last column and row of a mask as they are printed."""
    rows, columns = numpy.nonzero(numpy.asarray(mask))
    return f"{columns.min()},{rows.min()} to {columns.max()},{rows.max()}"


def test_standard_input_is_followed_picture_by_picture(tmp_path, weights, pictures, model):
    """The line of a frame comes before the next frame is sent.

    It has the class, number, score and box of every track of `step`.
    """
    # as many threads as here, since others round otherwise; and Python itself must not hand on what
    # is printed
    environment = ENVIRONMENT | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONUNBUFFERED": "",
    }
    process = subprocess.Popen(
        [
            sys.executable,
            str(REPOSITORY / "demo.py"),
            *command("-", weights, "--live", "--score", "0.0"),
        ],
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    # Rather than wait for a line that does not come.
    guard = threading.Timer(60, process.kill)
    guard.start()
    try:
        lines = []
        for picture in pictures:
            process.stdin.write(ppm(picture))
            process.stdin.flush()
            lines.append(process.stdout.readline().decode())
        rest, errors = process.communicate()
    finally:
        guard.cancel()
        process.kill()
    assert process.returncode == 0 and not rest, errors.decode()[-3000:]
    assert not list(tmp_path.iterdir())  # nothing is written

    state = None
    for number, (line, picture) in enumerate(zip(lines, pictures, strict=True)):
        tracks, state = model.step(at_test_size(picture, SHORT_SIDE), state, (HEIGHT, WIDTH), TOP_K)
        shown = [
            f"{CATEGORIES[tracks.labels[index]]} #{tracks.track_ids[index]} "
            f"{tracks.scores[index]:.2f} at "
            f"{box_of(tracks.masks[index])}"
            for index in best_of_each_track(tracks.track_ids)
            if tracks.masks[index].any()
        ]
        assert line == f"frame {number}: {'; '.join(shown)}\n" and len(shown) > 1


def test_a_line_has_what_is_seen_and_scores_enough(capsys):
    """Frames of a model that finds what is written here: not the empty mask, the low score, and a
    track under its second label.
    """
    masks = torch.zeros(5, HEIGHT, WIDTH, dtype=torch.bool)
    masks[0, 10:21, 30] = masks[1, 5, 7] = masks[2, 40:50, 60:70] = masks[4] = True
    values = (
        torch.tensor([0.9, 0.7, 0.6, 0.5, 0.2]),
        torch.tensor([1, 0, 0, 1, 0]),
        masks,
        torch.tensor([12, 3, 12, 4, 5]),
    )
    unread = torch.zeros(20, 3), torch.zeros(5, 0, dtype=torch.bool)
    found, nothing = (
        FrameTracks(*(value[first:] for value in values), *unread) for first in (0, 4)
    )
    sizes = []

    def step(frame, state, output_size, top_k):
        """One frame of the model; its state after a frame is a word."""
        sizes.append((tuple(frame.shape), output_size, top_k))
        return (nothing if state else found), "later"

    stub, black = SimpleNamespace(step=step), Image.new("RGB", (WIDTH, HEIGHT))
    args = demo.parse_arguments(
        [
            "-",
            "--live",
            "--short-side",
            "48",
            "--max-long-side",
            "40",
            "--top-k",
            "5",
            "--score",
            "0.25",
        ]
    )
    demo.run_live(stub, "-", iter([black, black]), ["cat", "dog"], args)
    assert (
        capsys.readouterr().out
        == "frame 0: dog #12 0.90 at 30,10 to 30,20; cat #3 0.70 at 7,5 to 7,5\nframe 1: nothing\n"
    )
    assert sizes == [((3, 32, 40), (HEIGHT, WIDTH), 5)] * 2


# With ffmpeg


@needs_ffmpeg
def test_an_mp4_has_every_frame_and_is_read_again(tmp_path, weights, pictures):
    """Sides of an odd number of pixels are made even; black there."""
    # High enough not to be enlarged.
    height, width = 241, 301
    (tmp_path / "frames").mkdir()
    for t, picture in enumerate(pictures[:3]):
        picture.resize((width, height)).save(tmp_path / f"frames/{t}.png")
    run(tmp_path / "frames", weights, "--score", 1.01, "--output", tmp_path / "out")
    found = pixels_of(tmp_path / "out/overlay.mp4")
    assert found.shape == (3, height + 1, width + 1, 3)
    difference = numpy.abs(found[:, :height, :width].astype(int) - pixels_of(tmp_path / "frames"))
    assert difference.mean() < 8  # H.264 is lossy


@needs_ffmpeg
def test_a_video_file_gives_as_many_frames_of_results(tmp_path, weights, done):
    run(done / "overlay.mp4", weights, "--score", 1.01, "--output", tmp_path / "out")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["frames"] == FRAMES == len(list((tmp_path / "out/frames").iterdir()))


@needs_ffmpeg
@pytest.mark.parametrize("keep", [0, 200], ids=["empty", "cut"])
def test_a_broken_video_is_named(tmp_path, weights, done, keep):
    path = tmp_path / "broken.mp4"
    path.write_bytes((done / "overlay.mp4").read_bytes()[:keep])
    assert refuse(tmp_path, path, weights).startswith(f"ffmpeg cannot read {path}: ")
