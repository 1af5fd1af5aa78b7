"""Data sets from mask images: every format, compared with the masks that were drawn."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from data import VideoSet, parse_arguments
from reading.id_masks import convert, read_classes, read_ids
from reading.layouts import find_split
from runtime.errors import InputError

SIZE = (24, 40)
CLASSES = {("a", 3): "cat", ("a", 200): "dog", ("b", 3): "dog", ("c", 9): "cat"}
VIDEOS = {"a": (3, 200), "b": (3,), "c": (9,)}


def ids_of(video, t):
    """(H, W): a square per instance, which moves; the last instance is absent in frame 1."""
    ids = np.zeros(SIZE, dtype=np.int64)
    for number, instance in enumerate(VIDEOS[video]):
        if t != 1 or instance != VIDEOS[video][-1]:
            ids[2 + 10 * number : 10 + 10 * number, 4 + t : 12 + t] = instance
    return ids


def save(ids, path, kind):
    if kind == "grey":
        picture = Image.fromarray(ids.astype(np.uint8))
    elif kind == "grey, 16 bits":
        picture = Image.fromarray(ids.astype(np.uint16))
    elif kind == "palette":
        picture = Image.fromarray(ids.astype(np.uint8), mode="P")
        picture.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    else:
        picture = Image.fromarray(np.stack((ids, 0 * ids, 0 * ids), 2).astype(np.uint8))
    picture.save(path)


def write(folder, kind="grey"):
    for video in VIDEOS:
        (folder / "frames" / video).mkdir(parents=True)
        (folder / "masks" / video).mkdir(parents=True)
        for t in range(3):
            Image.new("RGB", SIZE[::-1], (90 * t, 0, 0)).save(
                folder / f"frames/{video}/{t:03d}.jpg"
            )
            save(ids_of(video, t), folder / f"masks/{video}/{t:03d}.png", kind)


@pytest.mark.parametrize("kind", ["grey", "grey, 16 bits", "palette", "colours"])
def test_a_data_set_has_the_masks_that_were_drawn(tmp_path, kind):
    write(tmp_path, kind)
    convert(tmp_path / "frames", tmp_path / "masks", tmp_path / "set", CLASSES, 0.34, [], seed=0)
    seen = {}
    for split in ("train", "valid"):
        videos = VideoSet(*find_split(tmp_path / "set", split))
        names = [name for _, name in videos.categories]
        assert names == ["cat", "dog"]
        for video in videos.videos:
            name = video.files[0].parent.name
            assert [file.name for file in video.files] == ["000.jpg", "001.jpg", "002.jpg"]
            for entry, instance in zip(video.annotations, VIDEOS[name], strict=True):
                assert names[entry["label"]] == CLASSES[name, instance]
                for t, segmentation in enumerate(entry["segmentations"]):
                    expected = ids_of(name, t) == instance
                    if segmentation:
                        assert np.array_equal(rle.decode(segmentation), expected)
                    else:
                        assert not expected.any()
            seen[name] = split
    assert sorted(seen) == ["a", "b", "c"] and list(seen.values()).count("valid") == 1


def test_values_that_are_no_instances_and_frames_without_masks(tmp_path, capsys):
    """What is left out is told once for each video."""
    write(tmp_path)
    (tmp_path / "masks/a/001.png").unlink()
    (tmp_path / "frames/b/000.jpg").rename(tmp_path / "frames/b/.hidden.jpg")
    classes = {key: name for key, name in CLASSES.items() if key != ("a", 200)}
    convert(tmp_path / "frames", tmp_path / "masks", tmp_path / "set", classes, 0, [200], seed=0)
    content = json.loads((tmp_path / "set/train.json").read_text())
    assert [len(video["file_names"]) for video in content["videos"]] == [2, 2, 3]
    assert len(content["annotations"]) == 3
    assert json.loads((tmp_path / "set/valid.json").read_text())["videos"] == []
    assert [line for line in capsys.readouterr().out.splitlines() if "left out" in line] == [
        "video a: left out 1 of 3 files: frames without a mask image",
        "video b: left out 1 of 3 files: masks without a frame",
    ]


def test_large_instance_numbers(tmp_path):
    ids = np.array([[0, 255, 256, 65535]])
    save(ids, tmp_path / "ids.png", "grey, 16 bits")
    assert read_ids(tmp_path / "ids.png").tolist() == ids.tolist()


def test_classes_of_a_csv_file(tmp_path):
    with open(tmp_path / "classes.csv", "w", newline="") as file:
        csv.writer(file).writerows([("video", "instance", "class"), ("a", 3, "caf\u00e9, small")])
    assert read_classes(tmp_path / "classes.csv", "object") == {("a", 3): "caf\u00e9, small"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("a,3,cat\n", "must begin with the header video,instance,class, .* line is 'a,3,cat'"),
        ("vidoe,instance,class\na,3,cat\n", "first line is 'vidoe,instance,class'"),
        ("video;instance;class\na;3;cat\n", "must begin with the header video,instance,class"),
        ("", "must begin with the header"),
        (
            "video,instance,class\na,three,cat\n",
            "row of video 'a' .* whole number.*: 'three', 'cat'",
        ),
        ("video,instance,class\na,3\n", "row of video 'a' .* a class: '3', None"),
        ("video,instance,class\na\n", "row of video 'a' .* a class: None, None"),
    ],
    ids=["no header", "misspelt", "semicolons", "empty", "no number", "no class", "short"],
)
def test_what_is_no_file_of_classes(tmp_path, text, message):
    (tmp_path / "classes.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_classes(tmp_path / "classes.csv", "object")


def test_rows_of_classes_that_nothing_has(tmp_path, capsys):
    write(tmp_path)
    unused = {("a", 4): "cat", ("x", 3): "dog", ("y", 3): "dog", ("z", 3): "cat"}
    for root, classes in (
        ("one", CLASSES | unused),
        ("two", CLASSES),
        ("three", {("*", 0): "dog"}),
    ):
        convert(tmp_path / "frames", tmp_path / "masks", tmp_path / root, classes, 0.34, [], 0)
    assert [line for line in capsys.readouterr().out.splitlines() if "warning" in line] == [
        "warning: no mask image has the video and instance of 4 of 8 rows of the classes: "
        "a,4, x,3, y,3, ..."
    ]


@pytest.mark.parametrize("names", [["a"], ["c", "b"]], ids=str)
def test_videos_to_hold_out_are_chosen_by_name(tmp_path, names):
    write(tmp_path)
    folders = tmp_path / "frames", tmp_path / "masks"
    with pytest.raises(InputError, match="holds no video to hold out named x$"):
        convert(*folders, tmp_path / "set", CLASSES, 0.2, [], 0, [*names, "x"])
    convert(*folders, tmp_path / "set", CLASSES, 0.2, [], 0, names)
    held_out = VideoSet(*find_split(tmp_path / "set", "valid")).videos
    assert {video.files[0].parent.name for video in held_out} == set(names)
    assert len(VideoSet(*find_split(tmp_path / "set", "train")).videos) == 3 - len(names)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--from-masks m --images f --videos 240", "--videos is for synthetic videos"),
        ("--from-masks m --images f --suite=easy", "--suite is for synthetic videos"),
        ("--held-out a", "--held-out needs --from-masks"),
        ("--valid-share 0", "--valid-share needs --from-masks"),
        ("--from-masks m --images f --held-out a --valid-share 0.2", "not allowed with argument"),
        ("--from-masks m", "--from-masks needs --images"),
    ],
)
def test_flags_that_do_not_go_together(capsys, flags, message):
    """Also those with the value of their default."""
    with pytest.raises(SystemExit):
        parse_arguments(flags.split())
    assert message in capsys.readouterr().err


def break_size(folder):
    Image.new("L", (7, 7)).save(folder / "masks/a/002.png")


def break_frames(folder):
    shutil.rmtree(folder / "frames/b")


def break_names(folder):
    for file in (folder / "frames/b").iterdir():
        file.rename(file.with_name(f"x{file.name}"))


def break_image(folder):
    (folder / "masks/c/000.png").write_bytes(b"no picture")


def break_values(folder):
    """A JPEG, whatever its name says."""
    Image.open(folder / "masks/c/000.png").save(folder / "masks/c/000.png", "JPEG")


@pytest.mark.parametrize(
    "damage, message",
    [
        (break_size, "002.png is 7x7, the mask images before it 40x24"),
        (break_frames, "neither a folder nor a video file named b"),
        (break_names, "no frame in .* has the name of a mask image"),
        (break_image, "000.png cannot be read"),
        (break_values, "000.png is a JPEG, which changes the values of pixels: save .* as PNG"),
    ],
)
def test_errors_are_told_and_leave_nothing(tmp_path, damage, message):
    write(tmp_path)
    damage(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "frames", tmp_path / "masks", tmp_path / "set", CLASSES, 0, [], seed=0)
    assert sorted(tmp_path.iterdir()) == before


def test_masks_of_another_size_than_the_frames(tmp_path):
    write(tmp_path)
    for path in (tmp_path / "masks/b").iterdir():
        Image.open(path).resize((20, 12), Image.Resampling.NEAREST).save(path)
    message = "000.png is 20x12, its frame 000.jpg 40x24: scale the masks of this video"
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "frames", tmp_path / "masks", tmp_path / "set", CLASSES, 0.34, [], 0)
    assert not (tmp_path / "set").exists()


def test_one_of_two_videos_is_held_out(tmp_path, capsys):
    write(tmp_path)
    shutil.rmtree(tmp_path / "masks/c")
    convert(tmp_path / "frames", tmp_path / "masks", tmp_path / "set", CLASSES, 0.2, [], seed=0)
    train, valid = (
        json.loads((tmp_path / f"set/{split}.json").read_text())["videos"]
        for split in ("train", "valid")
    )
    assert len(train) == len(valid) == 1
    assert f"({valid[0]['file_names'][0][0]})" in capsys.readouterr().out


def test_an_instance_without_a_class(tmp_path):
    write(tmp_path)
    classes = {key: name for key, name in CLASSES.items() if key[0] != "b"}
    with pytest.raises(InputError, match="do not list instance 3 of video b"):
        convert(tmp_path / "frames", tmp_path / "masks", tmp_path / "set", classes, 0, [], seed=0)
