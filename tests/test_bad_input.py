"""Bad input ends in one clear sentence, which names the mistake.

A valid data set and run are created once and copied; each test breaks one thing. Programs are
called in this process, where the sentence is an InputError. Three real command lines check that it
is the only output on stderr, with exit status 2.
"""

import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

import evaluate
import train
from data import InputError, read_mask, read_picture
from model import PRESETS
from sparse_set import SMALLEST
from synthetic import suites as synthetic
from synthetic.scenes import CATEGORIES

SMALL = [
    "--batch",
    "1",
    "--frames",
    "2",
    "--points",
    "64",
    "--workers",
    "0",
    "--short-sides",
    "64",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module", autouse=True)
def small_toy(four_convolutions):
    """The preset of all runs here, smaller: what is refused does not depend on its size."""
    with mock.patch.dict(PRESETS, toy=PRESETS["toy"] | SMALLEST):
        yield


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with a data set, good/set, and a run of one iteration on it, good/run."""
    folder = tmp_path_factory.mktemp("good")
    synthetic.make_dataset(
        folder / "set", train_videos=2, valid_videos=1, frames=3, height=64, width=96
    )
    train.main(train.parse_arguments(train_arguments(folder / "set", folder / "run")))
    return folder


@pytest.fixture
def dataset(good, tmp_path):
    """A copy of the data set, to spoil."""
    return Path(shutil.copytree(good / "set", tmp_path / "set"))


def train_arguments(dataset, output, *more):
    return [
        "--data-root",
        str(dataset),
        "--output",
        str(output),
        "--iterations",
        "1",
        *SMALL,
        *map(str, more),
    ]


def sentence(program, arguments):
    """What the program refuses its arguments with: an InputError of one line."""
    with pytest.raises(InputError) as refusal:
        program.main(program.parse_arguments([str(argument) for argument in arguments]))
    message = str(refusal.value)
    assert message and message.splitlines() == [message]
    return message


def refuse_training(dataset, tmp_path, *more):
    return sentence(train, train_arguments(dataset, tmp_path / "run", *more))


def refuse_evaluating(dataset, tmp_path, weights, *more):
    return sentence(
        evaluate,
        [
            "--data-root",
            dataset,
            "--weights",
            weights,
            "--short-side",
            "64",
            "--device",
            "cpu",
            "--workers",
            "0",
            "--output",
            tmp_path / "evaluation",
            *more,
        ],
    )


def read_files(folder):
    """All files of a folder, {path inside it: bytes}."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# Real command lines


def run(program, *arguments):
    """Exit code of a command line, and the lines on stderr that are neither empty nor a progress
    bar.
    """
    root = Path(train.__file__).parent
    ended = subprocess.run(
        [sys.executable, root / program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    return ended.returncode, [
        line for line in ended.stderr.splitlines() if line.strip() and "it/s]" not in line
    ]


@pytest.mark.slow
def test_training_without_data_exits_with_one_sentence(tmp_path):
    code, lines = run("train.py", "--data-root", tmp_path / "nothing", "--output", tmp_path / "run")
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith("error: no annotation file found; tried ")
    assert str(tmp_path / "nothing/train.json") in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_evaluating_without_weights_exits_with_one_sentence(good, tmp_path):
    code, lines = run("evaluate.py", "--data-root", good / "set", "--weights", tmp_path / "last.pt")
    assert code == 2 and lines == [f"error: no checkpoint at {tmp_path / 'last.pt'}"]


def test_who_reads_what_is_printed_may_leave():
    """Like head: the program continues to its end.

    A pipe to another program that breaks is an error.
    """
    reading, writing = os.pipe()
    os.close(reading)
    for statement, stdout, said in [
        ("print('enough', flush=True)", writing, ""),
        ("raise BrokenPipeError('ffmpeg has gone')", None, "BrokenPipeError: ffmpeg has gone"),
    ]:
        script = f"from runtime import errors\nwith errors.cli_errors():\n    {statement}"
        ended = subprocess.run(
            [sys.executable, "-c", script],
            cwd=Path(train.__file__).parent,
            text=True,
            stdout=stdout,
            stderr=subprocess.PIPE,
            timeout=120,
        )
        assert ended.returncode == bool(said)
        assert ended.stderr.strip().endswith(said)
        assert bool(ended.stderr) == bool(said)
    os.close(writing)


@pytest.mark.slow
def test_an_error_in_a_loader_process_exits_with_one_sentence(dataset, tmp_path):
    spoil_frames(dataset, "train", cut_short)
    code, lines = run("train.py", *train_arguments(dataset, tmp_path / "run"), "--workers", "1")
    assert code == 2 and len(lines) == 1
    assert re.match(
        f"error: frame {dataset}/train/JPEGImages/.*jpg cannot be read: .*truncated", lines[0]
    )


# The data set


def edit(dataset, split, change):
    """Change the parsed JSON of a split, in place."""
    path = dataset / f"{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def put(value, *place):
    """A change of a JSON that puts the value at that place."""

    def change(content):
        for key in place[:-1]:
            content = content[key]
        content[place[-1]] = value

    return change


def test_a_missing_json_names_every_path_tried(dataset, tmp_path):
    (dataset / "train.json").unlink()
    message = refuse_training(dataset, tmp_path)
    for name in (
        "train.json",
        "train/instances.json",
        "annotations/train.json",
        "annotations/annotations_train.json",
        "annotations/instances_train.json",
    ):
        assert str(dataset / name) in message


@pytest.mark.parametrize(
    "text", [b'{"videos": [', b"", b"\xff\xfe\x00"], ids=["cut", "empty", "binary"]
)
def test_a_malformed_json(dataset, tmp_path, text):
    (dataset / "train.json").write_bytes(text)
    assert refuse_training(dataset, tmp_path).startswith(
        f"{dataset / 'train.json'} is not a JSON file: "
    )


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda content: content.pop("videos"), "train.json has no list of videos"),
        (put([], "videos"), "train.json has an empty list of videos"),
        (put({}, "categories"), "train.json has no list of categories"),
        (
            put([None], "annotations", 0, "segmentations"),
            "annotation 1 of .* has 1 segmentations, its video has 3 frames",
        ),
        (
            lambda content: content["videos"].append(
                {"id": 9, "height": 64, "width": 96, "file_names": []}
            ),
            "video 9 of .*train.json has no frames",
        ),
        (put([], "annotations"), "train.json has no annotated video to train on"),
        (
            lambda content: content["videos"][0].pop("file_names"),
            "video 1 of .*train.json has no file_names",
        ),
        (
            put("a name", "videos", 0),
            "video at index 0 of .*train.json is 'a name', which is no entry",
        ),
        (
            put("tall", "videos", 0, "height"),
            "video 1 of .*train.json has height 'tall', which is no whole number",
        ),
        (
            put(float("inf"), "videos", 0, "height"),
            "video 1 of .*train.json has height inf, which is no whole number",
        ),
        (
            put(10**6, "videos", 0, "height"),
            "video 1 of .*train.json is said to be 96x1000000: at least 1x1 and at most",
        ),
        (put(0, "videos", 0, "width"), "video 1 of .*train.json is said to be 0x64"),
        (
            put([1], "annotations", 0, "video_id"),
            r"annotation 1 of .* has video_id \[1\], which is no id",
        ),
        (
            put(9, "videos", 0, "length"),
            "video 1 of .*train.json has 3 file_names, but a length of 9",
        ),
    ],
    ids=[
        "videos missing",
        "videos empty",
        "categories no list",
        "number of masks",
        "no frames",
        "no annotations",
        "no file names",
        "no entry",
        "height no number",
        "endless height",
        "huge",
        "no width",
        "video no id",
        "length",
    ],
)
def test_an_impossible_entry_is_named(dataset, tmp_path, change, expected):
    edit(dataset, "train", change)
    assert re.search(expected, refuse_training(dataset, tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        "/etc/hostname",
        "../valid.json",
        "00000/../../../valid.json",
        "..",
        "//etc/hostname",
        "..\\..\\valid.json",
        "C:\\frames\\00000.jpg",
    ],
)
def test_a_frame_outside_of_the_folder_is_refused(dataset, tmp_path, name):
    edit(dataset, "train", put(name, "videos", 0, "file_names", 0))
    message = refuse_training(dataset, tmp_path)
    assert message == (
        f"video 1 of {dataset / 'train.json'} has the file name {name!r}, which leads outside of "
        f"{dataset / 'train/JPEGImages'}"
    )


@pytest.mark.parametrize("name", ["two\nlines", "\u2028", "", "\0", None, 7, ["a.jpg"]], ids=repr)
def test_what_is_no_file_name_is_refused(dataset, tmp_path, name):
    edit(dataset, "train", put(name, "videos", 0, "file_names", 0))
    assert (
        refuse_training(dataset, tmp_path)
        == f"video 1 of {dataset / 'train.json'} has the file name {name!r}, which is none"
    )


def test_a_json_of_a_hundred_thousand_brackets(dataset, tmp_path):
    (dataset / "train.json").write_text("[" * 100_000)
    assert refuse_training(dataset, tmp_path).startswith(
        f"{dataset / 'train.json'} is not a JSON file: "
    )


@pytest.mark.parametrize(
    "segmentation, reason",
    [
        ([[-1e9, 0, 1e9, 0, 1e9, 1e9]], "a coordinate is no number or lies far outside"),
        ([[float("nan")] * 6], "a coordinate is no number"),
        ([[None] * 6], "a coordinate is no number"),
        ([[0, 0, 1e5, 1e5] * 500], "its outline is longer than"),
        ([[10**400] * 6], "a coordinate is no number or lies far outside"),
        ({"size": [64, 96], "counts": [0.5, 64 * 96 - 0.5]}, "its runs do not fill the frame"),
        ({"size": [2**32, 2**32], "counts": "0"}, "its size is .*, its video's"),
    ],
    ids=["far away", "nan", "null", "long", "huge number", "half pixels", "huge size"],
)
def test_a_mask_that_would_take_all_memory(segmentation, reason):
    with pytest.raises(
        InputError, match=f"^annotation 1 has a segmentation that cannot be read: .*{reason}"
    ):
        read_mask(segmentation, 64, 96, "annotation 1")


# Frames


def spoil_frames(dataset, split, spoil):
    """Spoil every frame, as a clip begins anywhere."""
    for path in (dataset / split).rglob("*.jpg"):
        spoil(path)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil, expected",
    [
        (Path.unlink, "of video 1 is missing"),
        (cut_short, "cannot be read: .*truncated"),
        (
            lambda path: path.write_text("not a picture"),
            "cannot be read: cannot identify image file",
        ),
        (lambda path: path.write_bytes(b""), "cannot be read: cannot identify image file"),
        (lambda path: Image.new("RGB", (40, 30)).save(path), "is 40x30, its JSON says 96x64"),
    ],
    ids=["missing", "truncated", "no picture", "empty", "other size"],
)
def test_a_bad_frame_is_named(good, dataset, tmp_path, spoil, expected):
    spoil_frames(dataset, "train", spoil)
    spoil_frames(dataset, "valid", spoil)
    for split, message in (
        ("train", refuse_training(dataset, tmp_path)),
        ("valid", refuse_evaluating(dataset, tmp_path, good / "run/last.pt")),
    ):
        assert re.match(f"frame {dataset}/{split}/JPEGImages/0000./0000..jpg {expected}", message)


def picture_of(width, height):
    """The begin of a bitmap that says it is so large."""
    return b"BM" + struct.pack(
        "<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0
    )


@pytest.mark.parametrize(
    "content, expected",
    [
        (
            picture_of(10_000, 10_000),
            "frame .* is said to be 10000x10000: at least 1x1 and at most 89478485 pixels are read",
        ),
        (picture_of(10**5, 10**5), "frame .* cannot be read: Image size .* exceeds limit"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
            "cannot identify image file",
        ),
    ],
    ids=["large", "bomb", "program"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_is_too_much_to_ask(tmp_path, content, expected):
    (tmp_path / "picture.jpg").write_bytes(content)
    with pytest.raises(InputError, match=expected):
        read_picture(tmp_path / "picture.jpg")


# Checkpoints


class Shell:
    """Requests a command when unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("option", ["--init", "--resume", "--backbone-weights", "--weights"])
def test_files_that_are_no_checkpoints_are_refused(good, tmp_path, option):
    (tmp_path / "text.pth").write_text("hello world\n")
    (tmp_path / "shell.pkl").write_bytes(
        pickle.dumps({"model": Shell(f"touch {tmp_path / 'executed'}")})
    )
    whole = (good / "run/last.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    for name, expected in (
        ("missing.pt", "no checkpoint at .*missing.pt"),
        ("text.pth", "text.pth is no checkpoint"),
        ("shell.pkl", "shell.pkl is no checkpoint .* it asks for .*system"),
        ("truncated.pt", "truncated.pt is no checkpoint"),
        ("tensor.pt", "tensor.pt is no checkpoint: it holds a Tensor"),
    ):
        if option == "--weights":
            message = refuse_evaluating(good / "set", tmp_path, tmp_path / name)
        else:
            message = refuse_training(good / "set", tmp_path, option, tmp_path / name)
        assert re.search(expected, message)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_another_class_count(good, dataset, tmp_path):
    for split in ("train", "valid"):
        edit(
            dataset, split, lambda content: content["categories"].append({"id": 7, "name": "heart"})
        )
    weights = good / "run/last.pt"
    assert f"{weights} is for 6 classes, the model for 7" in refuse_training(
        dataset, tmp_path, "--init", weights
    )
    assert (
        refuse_evaluating(dataset, tmp_path, weights)
        == f"{weights} has 6 classes, {dataset / 'valid.json'} has 7"
    )


def test_a_checkpoint_of_other_class_names(good, dataset, tmp_path):
    edit(dataset, "valid", put("zebra", "categories", 0, "name"))
    message = refuse_evaluating(dataset, tmp_path, good / "run/last.pt")
    assert "was trained on other classes" in message
    assert message.endswith(": " + ", ".join(CATEGORIES))


def test_a_checkpoint_of_another_preset_or_propagation(good, tmp_path):
    for option, asked, found in (("--preset", "r50", "toy"), ("--propagation", "plain", "gated")):
        message = refuse_evaluating(good / "set", tmp_path, good / "run/last.pt", option, asked)
        assert f"was made with {option[2:]} '{found}', not '{asked}'" in message


# Runs


def test_a_run_is_not_overwritten(good):
    before = read_files(good / "run")
    assert "last.pt" in before
    message = sentence(train, train_arguments(good / "set", good / "run"))
    assert message.startswith(f"{good / 'run/last.pt'} exists: resume it")
    assert read_files(good / "run") == before


def test_a_resumed_run_overwrites_no_other_run(good, tmp_path):
    shutil.copytree(good / "run", tmp_path / "run")
    with open(tmp_path / "run/last.pt", "ab") as file:
        file.write(b"another run")
    before = read_files(tmp_path / "run")
    assert str(tmp_path / "run/last.pt") in refuse_training(
        good / "set", tmp_path, "--resume", good / "run/last.pt"
    )
    assert read_files(tmp_path / "run") == before


def test_only_a_training_checkpoint_is_resumed(good, tmp_path):
    checkpoint = torch.load(good / "run/last.pt", weights_only=True)
    torch.save(checkpoint["model"], tmp_path / "weights.pt")
    message = refuse_training(good / "set", tmp_path, "--resume", tmp_path / "weights.pt")
    assert (
        message
        == f"{tmp_path / 'weights.pt'} is no checkpoint of a training run: start from it with "
        "--init"
    )


def test_a_resumed_run_keeps_its_settings(good, tmp_path):
    message = refuse_training(
        good / "set",
        tmp_path,
        *("--resume", good / "run/last.pt"),
        *("--lr", "0.125", "--seed", "5"),
        *("--no-graphs", "--workers", "3"),  # these may change
    )
    assert re.search(r"was trained with --lr \S+ \(now 0.125\), --seed 0 \(now 5\)$", message)


def test_a_resumed_run_keeps_its_classes(good, dataset, tmp_path):
    edit(dataset, "train", put("zebra", "categories", 0, "name"))
    assert "classes" in refuse_training(dataset, tmp_path, "--resume", good / "run/last.pt")


def test_a_finished_run_is_not_cut_back(good, tmp_path):
    message = refuse_training(
        good / "set", tmp_path, "--resume", good / "run/last.pt", "--iterations", "0"
    )
    assert "is already at iteration 1, past --iterations 0" in message


# Options


def test_a_batch_that_cannot_be_shared(good, tmp_path, monkeypatch):
    # As if torchrun had started two.
    monkeypatch.setattr(train, "start_processes", lambda asked: (0, 2, torch.device(asked)))
    assert (
        refuse_training(good / "set", tmp_path, "--batch", "3")
        == "--batch 3 cannot be shared by 2 processes"
    )
    assert (
        refuse_training(good / "set", tmp_path, "--batch", "6", "--accumulate", "2")
        == "--batch 6 cannot be shared by 2 processes in 2 parts"
    )


def test_a_clip_length_that_does_not_divide_the_clip(good, tmp_path):
    message = refuse_training(good / "set", tmp_path, "--clip-length", "3")
    assert message == "--frames 2 is no multiple of --clip-length 3"


@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_an_unknown_device(good, tmp_path, program):
    if program == "train":
        message = refuse_training(good / "set", tmp_path, "--device", "abacus")
    else:
        message = refuse_evaluating(
            good / "set", tmp_path, good / "run/last.pt", "--device", "abacus"
        )
    assert "abacus" in message


def test_a_gpu_that_is_not_there(good, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda" in refuse_training(good / "set", tmp_path, "--device", "cuda")


def test_rendered_clips_stand_alone(good, dataset, tmp_path):
    file = good / "set/train.json"
    for other in (
        ["--train-json", file, "--train-images", good / "set/train"],
        ["--train-sets", "ovis_train"],
        ["--recipe", "grattvis/ovis/r50"],
    ):
        assert refuse_training(good / "set", tmp_path, "--render", "easy", *other).startswith(
            "--render draws the training clips: "
        )
    assert refuse_training(
        good / "set", tmp_path, "--render", "easy", "--num-classes", "5"
    ).endswith(
        "has 6 categories, not 5: give --num-classes 6 (recipes set the number of their data set)"
    )
    edit(dataset, "valid", put("zebra", "categories", 0, "name"))
    message = refuse_training(dataset, tmp_path, "--render", "easy", "--evaluate-every", "1")
    assert (
        message
        == f"--evaluate-every: {dataset / 'valid.json'} has other categories than the training "
        "clips"
    )


def test_options_that_go_together(good, tmp_path):
    file = good / "set/train.json"
    assert "--train-images" in refuse_training(good / "set", tmp_path, "--train-json", file)
    assert "--images" in refuse_evaluating(good / "set", tmp_path, "unread.pt", "--json", file)
    assert "--annotations" in refuse_evaluating(
        good / "set", tmp_path, "unread.pt", "--results", file
    )
