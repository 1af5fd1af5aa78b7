"""Data sets on disk: file names, ids, COCO images, and image formats.

Data sets are those of sparse_set.py, with one change per test.
"""

import copy
import json
import sys

import numpy
import pytest
import torch
from PIL import Image

import data
from augmentation import Augmentation
from clips import ClipDataset
from data import VideoSet, frames_at_test_size, read_categories
from reading.layouts import find_ground_truth, find_split
from reading.pictures import read_picture
from runtime.errors import InputError
from sparse_set import (
    LABELS,
    VIDEOS,
    encode,
    rectangles,
    sparse_content,
    write_json,
    write_sparse_set,
)
from synthetic.suites import SUITES, make_dataset
from test_bad_input import read_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the set, to read alone."""
    folder = tmp_path_factory.mktemp("dataset")
    write_sparse_set(folder)
    return folder


@pytest.fixture
def open_set(folder, tmp_path):
    """Open a changed copy of the set's JSON, with the frames of the set."""

    def open_set(change=lambda content: None, **options):
        content = sparse_content()
        change(content)
        return VideoSet(
            write_json(tmp_path / "changed.json", content), folder / "JPEGImages", **options
        )

    return open_set


# Splits


@pytest.mark.parametrize("asked", ["valid", "val"])
@pytest.mark.parametrize(
    "json_path", ["valid.json", "val.json", "annotations/instances_val.json", "val/instances.json"]
)
@pytest.mark.parametrize("frames", ["valid/JPEGImages", "val/JPEGImages", "JPEGImages/val"])
def test_valid_and_val_are_one_split(tmp_path, asked, json_path, frames):
    """Of the JSON and of the frames, each by the name that it has."""
    (tmp_path / frames).mkdir(parents=True)
    (tmp_path / "test").mkdir()
    write_json(tmp_path / json_path, {})
    assert find_split(tmp_path, asked) == (tmp_path / json_path, tmp_path / frames)


@pytest.mark.parametrize("asked", ["valid", "val"])
def test_valid_goes_before_val(tmp_path, asked):
    """Wherever each of them lies."""
    for name in ("val.json", "annotations/instances_valid.json"):
        write_json(tmp_path / name, {})
    for name in ("val/JPEGImages", "valid"):
        (tmp_path / name).mkdir(parents=True)
    found = tmp_path / "annotations/instances_valid.json", tmp_path / "valid"
    assert find_split(tmp_path, asked) == found


def test_train_is_no_other_split(tmp_path):
    for name in ("valid", "val", "test"):
        write_json(tmp_path / f"{name}.json", {})
    with pytest.raises(InputError, match="no annotation file found"):
        find_split(tmp_path, "train")
    write_json(tmp_path / "train.json", {})
    # Which several splits may share
    (tmp_path / "JPEGImages").mkdir()
    assert find_split(tmp_path, "train") == (tmp_path / "train.json", tmp_path / "JPEGImages")


@pytest.mark.parametrize("split", ["valid", "val"])
@pytest.mark.parametrize("folder", [".", "annotations", "valid", "val"])
@pytest.mark.parametrize("name", ["valid_gt", "valGT", "gt", "instances_gt"])
def test_ground_truth_of_a_split_is_found(tmp_path, split, folder, name):
    """Beside its annotation file, in the root of the data set, or in the folder of the split."""
    path = write_json(tmp_path / folder / f"{name}.json", {})
    annotations = tmp_path / "annotations/instances.json"
    assert find_ground_truth(annotations, tmp_path, split) == [[path]]


def test_ground_truth_of_a_file_is_beside_it(tmp_path):
    """Under its own name, or any; the two parts of YouTube-VIS 2022 count together."""
    for name in ("train_gt.json", "gt_short.json", "../own_gt.json"):
        write_json(tmp_path / "set" / name, {})
    assert find_ground_truth(tmp_path / "set/own.json") == []
    paths = [tmp_path / "set" / name for name in ("own_gt.json", "ownGT.json", "gt.json")]
    for path in paths:
        write_json(path, {})
    assert find_ground_truth(tmp_path / "set/own.json") == [[path] for path in paths]
    long = write_json(tmp_path / "set/gt_long.json", {})
    parts = [tmp_path / "set/gt_short.json", long]
    assert find_ground_truth(tmp_path / "set/own.json")[0] == parts


# Ids


def test_videos_and_labels_are_in_the_order_of_ids(open_set):
    videos = open_set()
    assert [video.id for video in videos.videos] == sorted(VIDEOS) and len(videos) == 3
    assert videos.categories == [(3, "ant"), (7, "cat"), (90, "dog")]
    for video in videos.videos:
        assert [file.parent.name for file in video.files] == [str(video.id)] * VIDEOS[video.id][0]
        for annotation in video.annotations:
            assert annotation["video_id"] == video.id
            assert annotation["label"] == LABELS[annotation["category_id"]]
    assert sum(len(video.annotations) for video in videos.videos) == 5


def test_categories_are_read_in_the_order_of_ids(folder, tmp_path):
    assert read_categories(folder / "valid.json") == [(3, "ant"), (7, "cat"), (90, "dog")]
    for content in ({}, {"categories": None}, {"categories": [{"id": 1}]}, [], {"categories": []}):
        with pytest.raises(InputError, match="categories"):
            read_categories(write_json(tmp_path / "odd.json", content))


@pytest.mark.parametrize(
    "key, change",
    [
        ("videos", lambda content: content["videos"][2].update(id=3)),
        ("videos", lambda content: content["videos"].append(copy.deepcopy(content["videos"][1]))),
        ("categories", lambda content: content["categories"][0].update(id=7)),
        ("categories", lambda content: content["categories"].append({"id": 3, "name": "bee"})),
    ],
    ids=["videos", "copied video", "categories", "new category"],
)
def test_an_id_that_two_entries_have_is_refused(open_set, key, change):
    with pytest.raises(InputError, match=f"has two {key} of one id"):
        open_set(change)


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_another_number_of_masks_than_frames_is_refused(open_set, count):
    # Annotation 8, of video 3, which has three frames
    def change(content):
        content["annotations"][3]["segmentations"] = (
            content["annotations"][3]["segmentations"] * 2
        )[:count]

    with pytest.raises(
        InputError, match=f"annotation 8 .* has {count} segmentations, its video has 3 frames"
    ):
        open_set(change)


@pytest.mark.parametrize("annotations", [None, [], "missing"], ids=str)
def test_a_set_may_have_no_annotations(open_set, folder, tmp_path, annotations):
    """As those have that a server scores, in both formats."""

    def change(content):
        content["annotations"] = annotations
        if annotations == "missing":
            del content["annotations"]

    coco = coco_content()
    change(coco)
    in_coco = VideoSet(write_json(tmp_path / "coco.json", coco), folder / "JPEGImages")
    for videos, count in ((open_set(change), 3), (in_coco, 2)):
        assert len(videos) == count and not any(video.annotations for video in videos.videos)


def test_an_empty_list_of_images_makes_no_coco_set(open_set):
    assert len(open_set(lambda content: content.update(images=[]))) == 3


def test_a_frame_of_another_format_is_another_file(open_set):
    def change(content):
        content["videos"][1]["file_names"][1] = "17/1.jpg"  # there is 17/1.png

    with pytest.raises(InputError, match="17/1.jpg of video 17 is missing"):
        open_set(change)


def test_what_is_wrong_is_skipped_if_asked_for(open_set, folder):
    """Videos without a frame or a file, with their annotations; and one of too many masks."""

    def change(content):
        content["videos"][1]["file_names"][1] = "17/missing.png"
        content["videos"].append(
            {"id": 4, "height": 40, "width": 56, "length": 0, "file_names": []}
        )
        content["annotations"].append(
            content["annotations"][0] | {"id": 60, "video_id": 4, "segmentations": []}
        )
        content["annotations"][1]["segmentations"].append(None)  # annotation 12, of video 3

    with pytest.raises(InputError):
        open_set(change)
    videos = open_set(change, skip_bad=True)
    assert [video.id for video in videos.videos] == [3, 5]
    assert [[entry["id"] for entry in video.annotations] for video in videos.videos] == [[8], [31]]
    assert videos.skipped.total == 3
    for told, expected in zip(
        sorted(videos.skipped.sentences()),
        (
            "annotations that cannot be used: 1; the first: annotation 12 ",
            f"videos that cannot be used: 2; the first: frame {folder}/JPEGImages/17/missing.png",
        ),
    ):
        assert told.startswith(expected)


def test_categories_of_another_set_are_mapped(open_set):
    """By a map of ids; annotations of other categories are left out without a word."""
    videos = open_set(
        category_map={90: 2, 3: 11}, categories=[(2, "wolf"), (11, "beetle"), (40, "bird")]
    )
    assert videos.categories == [(2, "wolf"), (11, "beetle"), (40, "bird")]
    assert not videos.skipped.total
    labels = {entry["id"]: entry["label"] for video in videos.videos for entry in video.annotations}
    assert labels == {44: 0, 31: 1, 8: 0, 27: 1}  # annotation 12 is a cat


# COCO


def coco_content():
    """Two images and three annotations, one of them of a crowd; ids in no order."""
    return {
        "images": [
            {"id": 900, "height": 40, "width": 56, "file_name": "3/1.png"},
            {"id": 20, "height": 56, "width": 40, "file_name": "17/0.png"},
        ],
        "categories": [{"id": 90, "name": "dog"}, {"id": 3, "name": "ant"}],
        "annotations": [
            {
                "id": 5,
                "image_id": 900,
                "category_id": 3,
                "iscrowd": 1,
                "segmentation": encode(rectangles(5, 1, 40, 56)[0]),
            },
            {
                "id": 9,
                "image_id": 900,
                "category_id": 90,
                "iscrowd": 0,
                "segmentation": [[4, 3, 24, 3, 24, 19, 4, 19]],
            },
            {
                "id": 2,
                "image_id": 20,
                "category_id": 3,
                "segmentation": encode(rectangles(2, 1, 56, 40)[0]),
            },
        ],
    }


def test_images_are_videos_of_one_frame(folder, tmp_path):
    videos = VideoSet(write_json(tmp_path / "coco.json", coco_content()), folder / "JPEGImages")
    first, second = videos.videos
    assert (first.id, first.height, first.width) == (20, 56, 40)
    assert first.files == [folder / "JPEGImages/17/0.png"]
    assert (second.id, second.height, second.width) == (900, 40, 56)
    assert second.files == [folder / "JPEGImages/3/1.png"]
    found = {
        entry["id"]: (entry["label"], bool(entry["iscrowd"]), len(entry["segmentations"]))
        for video in videos.videos
        for entry in video.annotations
    }
    assert found == {5: (0, True, 1), 9: (1, False, 1), 2: (0, False, 1)}


def test_crowds_of_images_are_not_trained_on(folder, tmp_path):
    videos = VideoSet(write_json(tmp_path / "coco.json", coco_content()), folder / "JPEGImages")
    clips = ClipDataset(videos, 2, 1, Augmentation(short_sides=(40,), flip=False))
    for clip in (clips[0], clips[1]):
        if clip.frames.shape[-2:] == (40, 56):
            expected, mask = [1], torch.zeros(40, 56, dtype=torch.bool)
            mask[3:19, 4:24] = True
        else:
            expected, mask = [0], torch.from_numpy(rectangles(2, 1, 56, 40)[0])
        assert clip.labels.tolist() == expected
        assert all(torch.equal(found, mask) for found in clip.masks[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["images"][0].pop("file_name"),
        lambda content: content["annotations"][0].update(image_id=[900]),
        lambda content: content.pop("categories"),
        lambda content: content.update(images=5),
    ],
    ids=["file", "image", "categories", "list"],
)
def test_images_in_another_form_are_refused(folder, tmp_path, change):
    content = coco_content()
    change(content)
    with pytest.raises(
        InputError, match="coco.json (has no (file_names|list of)|has image_id|has images)"
    ):
        VideoSet(write_json(tmp_path / "coco.json", content), folder / "JPEGImages")


# Frames


@pytest.mark.parametrize(
    "short_side, longest, size", [(32, 1333, (32, 45)), (32, 40, (29, 40)), (80, 56, (40, 56))]
)
def test_frames_at_test_size_obey_both_sides(folder, short_side, longest, size):
    video = VideoSet(folder / "valid.json", folder / "JPEGImages").videos[0]
    frames = torch.stack(list(frames_at_test_size(video, short_side, longest)))
    assert frames.shape == (3, 3, *size) and frames.dtype == torch.uint8
    for frame, file in zip(frames, video.files):
        with Image.open(file) as picture:
            expected = numpy.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR))
        assert numpy.array_equal(frame.permute(1, 2, 0), expected)
    assert torch.equal(
        torch.stack(list(frames_at_test_size(video, short_side, longest, slice(1, 3)))), frames[1:]
    )


def test_the_longest_side_is_1333_unless_it_is_said(tmp_path):
    write_json(
        tmp_path / "one.json",
        {
            "videos": [{"id": 1, "height": 10, "width": 100, "length": 1, "file_names": ["a.png"]}],
            "categories": [{"id": 1, "name": "one"}],
            "annotations": [],
        },
    )
    Image.new("RGB", (100, 10)).save(tmp_path / "a.png")
    (frame,) = frames_at_test_size(VideoSet(tmp_path / "one.json", tmp_path).videos[0], 360)
    assert frame.shape == (3, 133, 1333)


def turned(pixels, orientation):
    """What a photograph of these EXIF orientations shows, (H, W, 3)."""
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: numpy.rot90(pixels, -1),
        7: pixels[::-1, ::-1].swapaxes(0, 1),
        8: numpy.rot90(pixels),
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_it_says(tmp_path, orientation):
    pixels = numpy.random.default_rng(0).integers(0, 256, (6, 9, 3), numpy.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    picture = read_picture(tmp_path / "photo.png")
    assert picture.mode == "RGB"
    assert numpy.array_equal(numpy.asarray(picture), turned(pixels, orientation))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_pictures_of_all_kinds_become_rgb(tmp_path, mode):
    pixels = numpy.random.default_rng(0).integers(0, 2, (6, 9, 1), numpy.uint8).repeat(3, 2) * 255
    picture = Image.fromarray(pixels).convert(mode)
    picture.save(tmp_path / f"picture.{'tif' if mode == 'CMYK' else 'png'}")
    found = read_picture(next(tmp_path.iterdir()))
    assert found.mode == "RGB" and numpy.array_equal(numpy.asarray(found), pixels)


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "ppm", "tif", "gif"])
def test_pictures_of_all_formats_are_read(tmp_path, suffix):
    pixels = numpy.zeros((6, 9, 3), numpy.uint8)
    pixels[2:4, 3:] = 255
    Image.fromarray(pixels).save(
        tmp_path / f"picture.{suffix}", **({"lossless": True} if suffix == "webp" else {})
    )
    assert numpy.array_equal(numpy.asarray(read_picture(tmp_path / f"picture.{suffix}")), pixels)


@pytest.mark.parametrize("size", [(57, 40), (56, 41), (40, 56)])
def test_a_frame_of_another_size_than_its_json_says_is_refused(tmp_path, size):
    content = write_sparse_set(tmp_path)
    name = content["videos"][0]["file_names"][1]
    Image.new("RGB", size).save(tmp_path / "JPEGImages" / name)
    videos = VideoSet(tmp_path / "valid.json", tmp_path / "JPEGImages")
    with pytest.raises(InputError, match=f"{name} is {size[0]}x{size[1]}, its JSON says 56x40"):
        list(frames_at_test_size(videos.videos[0], 32))


# The synthetic set from the command line


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (
            [
                "--videos",
                "2",
                "--valid-videos",
                "1",
                "--frames",
                "3",
                "--height",
                "40",
                "--width",
                "64",
                "--objects",
                "2",
                "2",
                "--seed",
                "5",
                "--suite",
                "degraded",
            ],
            dict(
                train_videos=2,
                valid_videos=1,
                frames=3,
                height=40,
                width=64,
                objects=(2, 2),
                seed=5,
                difficulty=SUITES["degraded"].difficulty,
            ),
        ),
        (
            [
                "--videos",
                "1",
                "--valid-videos",
                "2",
                "--height",
                "32",
                "--width",
                "32",
                "--suite",
                "look-alike",
            ],
            dict(
                train_videos=1,
                valid_videos=2,
                frames=20,
                height=32,
                width=32,
                objects=(2, 4),
                difficulty=SUITES["look-alike"].difficulty,
            ),
        ),
    ],
    ids=["all flags", "a suite's own"],
)
def test_the_flags_of_data_py_are_the_arguments_of_make_dataset(
    tmp_path, monkeypatch, arguments, expected
):
    monkeypatch.setattr(sys, "argv", ["data.py", "--root", str(tmp_path / "flags"), *arguments])
    data.main()
    make_dataset(tmp_path / "called", **expected)
    assert read_files(tmp_path / "flags") == read_files(tmp_path / "called")
    assert (
        len(json.loads((tmp_path / "flags/train.json").read_text())["videos"])
        == expected["train_videos"]
    )


def test_a_synthetic_set_that_is_impossible_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data.py", "--root", str(tmp_path / "set"), "--height", "31"])
    with pytest.raises(SystemExit) as ended:
        data.main()
    assert ended.value.code == 2 and not (tmp_path / "set").exists()


@pytest.mark.parametrize("count, is_read", [(5, True), (30, False)])
def test_many_outlines_have_an_end_together(count, is_read):
    """Each of these is a hundred thousand pixels long; a million are too many."""
    polygons = [[0, 0, 5e4, 0, 5e4, 1]] * count
    if is_read:
        assert data.read_mask(polygons, 40, 56, "annotation 1").shape == (40, 56)
    else:
        with pytest.raises(InputError, match="annotation 1 has a segmentation that cannot be read"):
            data.read_mask(polygons, 40, 56, "annotation 1")


@pytest.mark.parametrize("counts", [[5, -5, 2240], [-1, 2241], [0, 2250, -10]], ids=str)
def test_runs_of_negative_length_are_refused(counts):
    """Though they add up to the number of pixels."""
    with pytest.raises(InputError, match="its runs do not fill the frame"):
        data.read_mask({"size": [40, 56], "counts": counts}, 40, 56, "annotation 1")
