"""Annotation files of different tools are converted to the same format without losses.

A small data set in the YouTube-VIS format is changed to imitate a tool, then opened, trained on and
evaluated. Masks are rectangles, so that their areas are known.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

import evaluate
import train
from data import InputError, Video, VideoSet
from evaluation import scoring
from evaluation.metric import evaluate_results
from reading.annotations import Skipped, complete, read_categories, unique_names
from reading.ids import id_order

HEIGHT, WIDTH, FRAMES = 40, 56, 3
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
    "32",
    "--iterations",
    "1",
    "--device",
    "cpu",
]
REPOSITORY = Path(train.__file__).parent


def box(left, top, width, height):
    """A rectangle as compressed RLE."""
    mask = numpy.zeros((HEIGHT, WIDTH), numpy.uint8, order="F")
    mask[top : top + height, left : left + width] = 1
    code = rle.encode(mask)
    return {"size": code["size"], "counts": code["counts"].decode()}


def make_content(videos=2):
    """Videos 1, 2, ... with a cat (10 x 20 pixels) and a dog (12 x 12) each, which move."""
    content = {
        "videos": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    for video in range(1, videos + 1):
        content["videos"].append(
            {
                "id": video,
                "height": HEIGHT,
                "width": WIDTH,
                "length": FRAMES,
                "file_names": [f"v{video}/{t}.png" for t in range(FRAMES)],
            }
        )
        for category, size in ((1, (10, 20)), (2, (12, 12))):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "video_id": video,
                    "category_id": category,
                    "iscrowd": 0,
                    "segmentations": [
                        box(4 + 20 * (category - 1) + t, 6, *size) for t in range(FRAMES)
                    ],
                    "areas": [size[0] * size[1]] * FRAMES,
                }
            )
    return content


def to_coco(content):
    """Every frame an image, as tools that know no videos export it."""
    images, annotations, first = [], [], {}
    for video in content["videos"]:
        first[video["id"]] = len(images) + 1
        images += [
            {"id": len(images) + 1 + t, "height": HEIGHT, "width": WIDTH, "file_name": name}
            for t, name in enumerate(video["file_names"])
        ]
    for track in content["annotations"]:
        for t, mask in enumerate(track["segmentations"]):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": first[track["video_id"]] + t,
                    "iscrowd": 0,
                    "category_id": track["category_id"],
                    "segmentation": mask,
                    "area": track["areas"][t],
                }
            )
    return {"images": images, "annotations": annotations, "categories": content["categories"]}


def write(path, content, encoding="utf-8"):
    path.write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)
    return path


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """The folder of the frames of three videos."""
    folder = tmp_path_factory.mktemp("frames")
    noise = numpy.random.default_rng(0).integers(
        0, 256, (3, FRAMES, HEIGHT, WIDTH, 3), dtype=numpy.uint8
    )
    for video, pictures in enumerate(noise, 1):
        (folder / f"v{video}").mkdir()
        for t, picture in enumerate(pictures):
            Image.fromarray(picture).save(folder / f"v{video}/{t}.png")
    return folder


def run_training(path, frames, output, *more):
    arguments = ["--train-json", path, "--train-images", frames, "--output", output, *SMALL, *more]
    train.main(train.parse_arguments(list(map(str, arguments))))
    return output / "last.pt"


def run_evaluation(weights, path, frames, output, *more):
    arguments = [
        "--weights",
        weights,
        "--json",
        path,
        "--images",
        frames,
        "--output",
        output,
        "--short-side",
        "32",
        "--top-k",
        "2",
        "--workers",
        "0",
        "--device",
        "cpu",
        *more,
    ]
    return evaluate.main(evaluate.parse_arguments(list(map(str, arguments))))


@pytest.fixture(scope="module")
def weights(frames, tmp_path_factory):
    """A model of one step of the classes cat and dog."""
    folder = tmp_path_factory.mktemp("weights")
    return run_training(write(folder / "set.json", make_content()), frames, folder / "run")


def perfect(content):
    return [
        {
            "video_id": entry["video_id"],
            "category_id": entry["category_id"],
            "score": 1,
            "segmentations": entry["segmentations"],
        }
        for entry in content["annotations"]
    ]


# Ids


def rename(content, video, category):
    """Give videos and categories other ids: functions of the number that they have."""
    for entry in content["videos"]:
        entry["id"] = video(entry["id"])
    for entry in content["categories"]:
        entry["id"] = category(entry["id"])
    for entry in content["annotations"]:
        entry["video_id"], entry["category_id"] = (
            video(entry["video_id"]),
            category(entry["category_id"]),
        )
    return content


NOTATIONS = {
    "uuids": (lambda i: f"7f3c{i}a-00d1", lambda i: f"c0ffee-{i}"),
    "names": (lambda i: f"video_{i:02d}", lambda i: f"class {i}"),
    "other script": (lambda i: f"видео {i}", lambda i: f"猫/{i}"),
    "gaps": (lambda i: 1000 * i + 7, lambda i: (90, 3)[i - 1]),
    "padded": (lambda i: f"{i:05d}", lambda i: f"{i:02d}"),
    "negative": (lambda i: -i, lambda i: i - 2),
    "paths": (lambda i: f"../../{i}", lambda i: f"/etc/{i}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("notation", NOTATIONS)
def test_results_have_the_ids_of_the_annotations(notation, frames, weights, tmp_path):
    content = rename(make_content(), *NOTATIONS[notation])
    if notation == "gaps":  # the order of ids is that of the classes
        content["categories"][0]["name"], content["categories"][1]["name"] = "dog", "cat"
    path = write(tmp_path / "set.json", content)
    metrics = run_evaluation(weights, path, frames, tmp_path / "out", "--draw", "2")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert {entry["video_id"] for entry in results} == {video["id"] for video in content["videos"]}
    assert {entry["category_id"] for entry in results} <= {
        category["id"] for category in content["categories"]
    }
    assert (
        len(list((tmp_path / "out/overlays").glob("*.webp"))) == 2
        and not (tmp_path / "out/unfinished").exists()
    )
    scored = evaluate.main(
        evaluate.parse_arguments(
            ["--results", str(tmp_path / "out/results.json"), "--annotations", str(path)]
        )
    )
    assert scored == metrics and set(metrics["per_class"]) == {"cat", "dog"}


@pytest.mark.slow
@pytest.mark.parametrize("notation", ["uuids", "other script", "gaps"])
def test_a_set_of_any_ids_is_trained_on(notation, frames, tmp_path):
    content = rename(make_content(), *NOTATIONS[notation])
    last = run_training(write(tmp_path / "set.json", content), frames, tmp_path / "run")
    categories = torch.load(last, weights_only=True)["config"]["categories"]
    assert sorted(map(str, categories)) == sorted(
        str([entry["id"], entry["name"]]) for entry in content["categories"]
    )


@pytest.mark.parametrize(
    "declared, referring", [(int, float), (int, str), (float, int), (str, int), (str, float)]
)
def test_references_are_matched_in_another_notation(declared, referring, frames, tmp_path):
    content = rename(make_content(), declared, declared)
    for entry in content["annotations"]:
        entry["video_id"], entry["category_id"] = (
            referring(int(entry[key])) for key in ("video_id", "category_id")
        )
    videos = VideoSet(write(tmp_path / "set.json", content), frames)
    assert [[entry["label"] for entry in video.annotations] for video in videos.videos] == [
        [0, 1],
        [0, 1],
    ]
    expected = ["1", "2"] if declared is str else [1, 2]  # 1.0 becomes 1
    assert (
        [video.id for video in videos.videos]
        == [entry[0] for entry in videos.categories]
        == expected
    )
    assert evaluate_results(perfect(content), videos.ground_truth)["AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    "value", [True, None, 1.5, float("nan"), float("inf"), [], [1], {"id": 1}, ""], ids=repr
)
@pytest.mark.parametrize("place", ["videos", "categories", "video_id", "category_id"])
def test_what_is_no_id_is_refused(value, place):
    content = make_content()
    entry, key = (
        (content[place][0], "id") if place in content else (content["annotations"][0], place)
    )
    entry[key] = value
    if key != "id" and (value is None or value != value):
        return  # it refers to nothing, which is skipped and counted
    with pytest.raises(
        InputError,
        match=rf"of x\.json has {key} .*, which is no id: ids are whole numbers or text$",
    ):
        complete(content, "x.json")


@pytest.mark.parametrize("value", [None, float("nan"), "missing"])
@pytest.mark.parametrize("key", ["video_id", "category_id"])
def test_a_missing_reference_is_skipped_and_counted(key, value):
    """As pandas leaves a gap in a column."""
    content = make_content()
    content["annotations"][0][key] = value
    if value == "missing":
        del content["annotations"][0][key]
    file = complete(content, "x.json")
    assert len(file.content["annotations"]) == len(content["annotations"]) - 1
    assert file.skipped.sentences() == [
        "annotations that refer to no video or category: 1; the first: annotation 1 of x.json"
    ]


@pytest.mark.parametrize("one, other", [(1, "1"), (1, 1), ("a", "a"), ("01", 1), ("1.0", 1.0)])
@pytest.mark.parametrize("place", ["videos", "categories"])
def test_two_entries_of_one_id_are_refused(one, other, place):
    content = make_content()
    content[place][0]["id"], content[place][1]["id"] = one, other
    with pytest.raises(InputError, match=f"^x.json has two {place} of one id: "):
        complete(content, "x.json")


def test_ids_are_ordered_as_people_do():
    ids = ["v10", "b", 10, "v9", "2", -1, "v9a", "a"]
    assert sorted(ids, key=id_order) == [-1, "2", 10, "a", "b", "v9", "v9a", "v10"]


@pytest.mark.parametrize(
    "video_id",
    ["a/b", "../x", "a\nb", "собака", "x" * 5000, "\ud800", " ", "CON", 10**30, -3, "7"],
    ids=repr,
)
def test_a_video_has_a_name_for_files(video_id, tmp_path):
    """Different ids have different names, even if case is ignored."""
    name = Video(video_id, 1, 1, [], []).name
    assert name.isascii() and name.isprintable() and len(name) < 60
    (tmp_path / f"{name}.json").touch()
    assert [path.stem for path in tmp_path.iterdir()] == [name]
    ids = {video_id, "a-b", "A/B", "A-B", "a b", 5}
    assert len({Video(other, 1, 1, [], []).name.lower() for other in ids}) == len(ids)


# What can be computed


def without(*places):
    """A change of a content: keys that a tool does not write, such as "videos.length"."""

    def change(content):
        for place in places:
            entries, key = place.split(".")
            for entry in content[entries]:
                del entry[key]

    return change


def put(value, *places):
    def change(content):
        for place in places:
            entries, key = place.split(".")
            for entry in content[entries]:
                entry[key] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        without("videos.length"),
        without("annotations.areas"),
        without("videos.length", "annotations.areas", "annotations.iscrowd"),
        put(None, "videos.length", "annotations.areas", "annotations.iscrowd"),
        put([], "annotations.areas"),
        put([200], "annotations.areas"),
        put([None] * 3, "annotations.areas"),
        put(float("nan"), "videos.length", "annotations.iscrowd"),
        put(3.0, "videos.length"),
        put("3", "videos.length"),
        put(False, "annotations.iscrowd"),
        without("annotations.id"),
        put(None, "annotations.id"),
        without("videos.height", "videos.width"),
        put(None, "videos.width"),
        put(float("nan"), "videos.height"),
        put(float(HEIGHT), "videos.height"),
        put(str(WIDTH), "videos.width"),
    ],
)
def test_what_is_missing_is_computed(change, frames, tmp_path):
    content, whole = make_content(), complete(make_content(), "whole").content
    change(content)
    videos = VideoSet(write(tmp_path / "set.json", content), frames)
    for found in (complete(content, "set").content, videos.ground_truth):
        assert [video["length"] for video in found["videos"]] == [FRAMES] * 2
        assert [(video["height"], video["width"]) for video in found["videos"]] == [
            (HEIGHT, WIDTH)
        ] * 2
        assert [entry["areas"] for entry in found["annotations"]] == [
            entry["areas"] for entry in whole["annotations"]
        ]
        assert [entry["iscrowd"] for entry in found["annotations"]] == [0] * 4
        assert all(isinstance(entry["id"], int) for entry in found["annotations"])
    assert evaluate_results(perfect(content), content) == evaluate_results(perfect(whole), whole)


def test_an_argument_is_not_changed():
    content = make_content()
    without("annotations.areas", "videos.length")(content)
    before = json.dumps(content)
    complete(content, "x.json")
    assert json.dumps(content) == before


def test_a_size_is_that_of_the_first_frame_where_no_mask_tells_it(frames, tmp_path):
    content = make_content()
    without("videos.height", "videos.width")(content)
    for entry in content["annotations"]:
        entry["segmentations"] = [[[4, 6, 14, 6, 14, 26, 4, 26]]] * FRAMES
        del entry["areas"]
    videos = VideoSet(write(tmp_path / "set.json", content), frames)
    assert [(video.height, video.width) for video in videos.videos] == [(HEIGHT, WIDTH)] * 2
    assert videos.ground_truth["annotations"][0]["areas"] == [200] * FRAMES
    with pytest.raises(
        InputError, match="video 1 of x.json has no height and width, and no mask tells them"
    ):
        complete(content, "x.json")


@pytest.mark.parametrize(
    "masks, expected", [([None] * 3, [None] * 3), ([None, 0, 1], [None, 200, 200])]
)
def test_frames_without_a_mask_have_no_area(masks, expected):
    content = make_content()
    entry = content["annotations"][0]
    entry["segmentations"] = [
        None if mask is None else entry["segmentations"][mask] for mask in masks
    ]
    del entry["areas"]
    assert complete(content, "x.json").content["annotations"][0]["areas"] == expected


# What refers to nothing or has no mask


def spoilt(**changes):
    content = make_content()
    content["annotations"][0] |= changes
    return content


@pytest.mark.parametrize(
    "content, reason",
    [
        (spoilt(video_id=99), "annotations of videos that do not exist"),
        (spoilt(video_id="v9"), "annotations of videos that do not exist"),
        (spoilt(category_id=0), "annotations of categories that do not exist"),
        (spoilt(segmentations=None), "annotations without a mask"),
        (spoilt(segmentations=[]), "annotations without a mask"),
        (spoilt(segmentations=""), "annotations without a mask"),
        (spoilt(segmentations=[[], [], []]), "annotations without a mask"),
        (spoilt(segmentations=[[[]], None, ""]), "annotations without a mask"),
    ],
)
def test_an_annotation_of_nothing_is_skipped_and_counted(content, reason, frames, tmp_path, capsys):
    path = write(tmp_path / "set.json", content)
    videos = VideoSet(path, frames)
    assert videos.skipped.total == 1 and videos.skipped.sentences()[0].startswith(
        f"{reason}: 1; the first: annotation 1 of {path}"
    )
    assert [len(video.annotations) for video in videos.videos] == [1, 2]
    results = write(tmp_path / "results.json", perfect(videos.ground_truth))
    metrics = evaluate.main(
        evaluate.parse_arguments(["--results", str(results), "--annotations", str(path)])
    )
    assert (
        metrics["AR10"] == pytest.approx(1) and f"skipped: {reason}: 1" in capsys.readouterr().out
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "segmentation", [None, "", [], {}, [[]], [[5, 5, 9, 9]], "missing"], ids=repr
)
def test_boxes_among_the_masks_of_a_coco_file_are_skipped(
    segmentation, frames, weights, tmp_path, capsys
):
    """As CVAT and Label Studio export them."""
    content = to_coco(make_content())
    for entry in content["annotations"][:4]:
        entry |= {"bbox": [4, 6, 10, 20], "segmentation": segmentation}
        if segmentation == "missing":
            del entry["segmentation"]
    path = write(tmp_path / "coco.json", content)
    assert VideoSet(path, frames).skipped.total == 4
    if segmentation in ([], "missing"):
        run_training(path, frames, tmp_path / "run")
        assert run_evaluation(weights, path, frames, tmp_path / "out")["AP"] >= 0
        printed = capsys.readouterr().out
        assert (
            printed.count("annotations without a mask: 4; the first: annotation 1 of") == 3
        )  # training, and both ends of evaluation


def test_a_track_that_is_never_seen_counts_as_missed():
    """As in the official metric: a list of null is no box."""
    content = spoilt(segmentations=[None] * FRAMES, areas=[None] * FRAMES)
    file = complete(content, "x.json")
    assert file.skipped.total == 0 and len(file.content["annotations"]) == 4
    assert evaluate_results(perfect(make_content())[1:], content)["per_class"]["cat"] < 1


@pytest.mark.slow
def test_ten_thousand_skipped_annotations_are_one_line(frames, tmp_path, capsys):
    content = make_content()
    content["annotations"] += [
        {"id": i, "video_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]} for i in range(100, 10_100)
    ]
    run_training(
        write(tmp_path / "set.json", content), frames, tmp_path / "run", "--log-every", "1"
    )
    printed = capsys.readouterr().out
    assert (
        printed.count("skipped: ") == 1
        and "annotations without a mask: 10000; the first: annotation 100 of" in printed
    )
    assert json.loads((tmp_path / "run/log.jsonl").read_text())["skipped"] == 10_000


@pytest.mark.parametrize(
    "change",
    [
        put(99, "annotations.category_id"),
        put([], "annotations.segmentations"),
        put("v", "annotations.video_id"),
        without("annotations.segmentations"),
    ],
)
def test_where_all_annotations_are_skipped_the_error_says_why(change, frames, tmp_path):
    content = make_content()
    change(content)
    with pytest.raises(
        InputError,
        match="^none of the 4 annotations of .*set.json can be used; annotations .*: 4; the first",
    ):
        VideoSet(write(tmp_path / "set.json", content), frames)


@pytest.mark.slow
def test_a_file_without_annotations_is_a_test_set(frames, weights, tmp_path):
    for number, annotations in enumerate((None, [], "missing")):
        content = make_content() | {"annotations": annotations}
        if annotations == "missing":
            del content["annotations"]
        path = write(tmp_path / f"{number}.json", content)
        assert run_evaluation(weights, path, frames, tmp_path / str(number)) is None
        assert len(json.loads((tmp_path / str(number) / "results.json").read_text())) == 4


# What cannot be read, with and without --skip-bad


def damaged(frames, folder):
    """A copy of the frames with a third video, whose last frame is cut off."""
    for path in frames.rglob("*.png"):
        copy = folder / path.relative_to(frames)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    bad = folder / "v3/2.png"
    bad.write_bytes(bad.read_bytes()[:300])
    return folder


def bad_mask(content):
    content["annotations"][0]["segmentations"][1] = {"size": [HEIGHT, WIDTH], "counts": "no RLE"}


def bad_polygon(content):
    content["annotations"][0]["segmentations"][1] = [[1, 2, 3, None, 5, 6]]


def too_few(content):
    content["annotations"][0]["segmentations"].pop()


def no_frame(content):
    content["videos"][0]["file_names"][1] = "v1/9.png"


def outside(content):
    content["videos"][0]["file_names"][1] = "../../x.png"


def wrong_length(content):
    content["videos"][0]["length"] = 9


def no_id(content):
    content["annotations"][0]["video_id"] = [1]


def no_entry(content):
    content["annotations"][0] = 7


@pytest.mark.parametrize(
    "spoil, sentence, tracks",
    [
        (bad_mask, "annotation 1 of .*, frame 1, has a segmentation that cannot be read: ", [1, 2]),
        (
            bad_polygon,
            "annotation 1 of .*, frame 1, has a segmentation that cannot be read: ",
            [1, 2],
        ),
        (too_few, "annotation 1 of .* has 2 segmentations, its video has 3 frames", [1, 2]),
        (no_id, r"annotation 1 of .* has video_id \[1\], which is no id", [1, 2]),
        (no_entry, "annotation at index 0 of .* is 7, which is no entry", [1, 2]),
        (no_frame, "frame .*v1/9.png of video 1 is missing", [2]),
        (outside, r"video 1 of .* has the file name '../../x.png', which leads outside of", [2]),
        (wrong_length, "video 1 of .* has 3 file_names, but a length of 9", [2]),
    ],
)
def test_what_is_bad_is_refused_or_left_out(spoil, sentence, tracks, frames, tmp_path):
    content = make_content()
    spoil(content)
    path = write(tmp_path / "set.json", content)
    with pytest.raises(InputError, match=sentence):
        VideoSet(path, frames)
    videos = VideoSet(path, frames, skip_bad=True)
    assert [
        len(video.annotations) for video in videos.videos
    ] == tracks and videos.skipped.total == 1
    assert len(videos.ground_truth["annotations"]) == sum(tracks)


@pytest.mark.slow
def test_training_and_evaluation_leave_out_the_same(frames, weights, tmp_path, capsys):
    content = make_content(3)
    no_frame(content)
    content["annotations"][2]["segmentations"].pop()
    content["annotations"][3]["segmentations"][1] = {"size": [HEIGHT, WIDTH], "counts": "no RLE"}
    path, told = write(tmp_path / "set.json", content), []
    for run in (
        lambda *more: run_training(path, frames, tmp_path / "run", *more),
        lambda *more: run_evaluation(weights, path, frames, tmp_path / "out", *more),
    ):
        with pytest.raises(InputError, match="v1/9.png of video 1 is missing"):
            run()
        run("--skip-bad")
        printed = capsys.readouterr().out
        told.append({line for line in printed.splitlines() if line.startswith("skipped: ")})
    assert (
        told[0] == told[1]
        and len(told[0]) == 2
        and "annotations that cannot be used: 2; the first: annotation 3 of" in printed
    )
    assert "1 of 3 videos are left out of the metric, the first: 1" in printed
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert {entry["video_id"] for entry in results} == {2, 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [["--chunk", "1"], ["--chunk", "2", "--workers", "2"]], ids=" ".join
)
def test_a_frame_that_turns_out_damaged_costs_its_video_alone(
    more, frames, weights, tmp_path, capsys
):
    folder, path = (
        damaged(frames, tmp_path / "frames"),
        write(tmp_path / "set.json", make_content(3)),
    )
    with pytest.raises(InputError, match="v3/2.png cannot be read"):
        run_evaluation(weights, path, folder, tmp_path / "strict", *more)
    metrics = run_evaluation(weights, path, folder, tmp_path / "out", "--skip-bad", *more)
    printed = capsys.readouterr().out
    assert (
        "v3/2.png cannot be read" in printed
        and "1 of 3 videos are left out of the metric, the first: 3" in printed
    )
    expected = run_evaluation(
        weights, write(tmp_path / "two.json", make_content(2)), folder, tmp_path / "two"
    )
    assert metrics == expected
    assert (tmp_path / "out/results.json").read_bytes() == (
        tmp_path / "two/results.json"
    ).read_bytes()


@pytest.mark.slow
def test_a_resumed_evaluation_tries_again_what_was_left_out(frames, weights, tmp_path, monkeypatch):
    folder, path = (
        damaged(frames, tmp_path / "frames"),
        write(tmp_path / "set.json", make_content(3)),
    )

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate.Unfinished, "join", killed)
        run_evaluation(weights, path, folder, tmp_path / "out", "--skip-bad")
    (folder / "v3/2.png").write_bytes((frames / "v3/2.png").read_bytes())
    metrics = run_evaluation(weights, path, folder, tmp_path / "out", "--skip-bad")
    assert metrics == run_evaluation(weights, path, frames, tmp_path / "whole")


@pytest.mark.slow
def test_a_video_that_is_left_out_is_left_out_of_other_annotations(frames, weights, tmp_path):
    folder, path = (
        damaged(frames, tmp_path / "frames"),
        write(tmp_path / "set.json", make_content(3)),
    )
    given = write(tmp_path / "given.json", rename(make_content(3), str, int))
    metrics = run_evaluation(
        weights, path, folder, tmp_path / "out", "--skip-bad", "--annotations", given
    )
    assert metrics == run_evaluation(weights, path, folder, tmp_path / "again", "--skip-bad")


@pytest.mark.slow
def test_a_damaged_frame_does_not_end_periodic_evaluation(frames, tmp_path, capsys):
    root = tmp_path / "set"
    damaged(frames, root / "valid")
    damaged(frames, root / "train")
    write(root / "train.json", make_content())
    write(root / "valid.json", make_content(3))
    arguments = [
        "--data-root",
        root,
        "--output",
        tmp_path / "run",
        *SMALL,
        "--evaluate-every",
        "1",
        "--test-short-side",
        "32",
    ]
    with pytest.raises(InputError, match="v3/2.png cannot be read"):
        train.main(train.parse_arguments(list(map(str, arguments))))
    arguments[3] = tmp_path / "again"
    train.main(train.parse_arguments(list(map(str, [*arguments, "--skip-bad"]))))
    assert (
        "v3/2.png cannot be read" in capsys.readouterr().out
        and (tmp_path / "again/last.pt").exists()
    )


@pytest.mark.slow
def test_where_everything_is_bad_the_error_says_so(frames, weights, tmp_path):
    content = make_content()
    put(["v1/8.png", "v1/9.png"], "videos.file_names")(content)
    put(2, "videos.length")(content)
    path = write(tmp_path / "set.json", content)
    with pytest.raises(
        InputError,
        match="nothing of .*set.json can be used; videos that cannot be used: 2; the first: frame ",
    ):
        VideoSet(path, frames, skip_bad=True)
    folder = damaged(frames, tmp_path / "frames")
    content = make_content(3)
    content["videos"], content["annotations"] = content["videos"][2:], content["annotations"][4:]
    path = write(tmp_path / "set.json", content)
    with pytest.raises(InputError, match="all 1 videos of .*set.json are left out"):
        run_evaluation(weights, path, folder, tmp_path / "out", "--skip-bad")


def test_predictions_for_videos_that_are_left_out_do_not_count(tmp_path):
    content = make_content()
    wrong_length(content)
    path, results = (
        write(tmp_path / "gt.json", content),
        write(tmp_path / "results.json", perfect(content)),
    )
    given = ["--results", str(results), "--annotations", str(path)]
    with pytest.raises(InputError, match="a length of 9"):
        evaluate.main(evaluate.parse_arguments(given))
    metrics = evaluate.main(evaluate.parse_arguments([*given, "--skip-bad"]))
    assert metrics["AP"] == pytest.approx(1)


# COCO


@pytest.mark.slow
def test_a_coco_file_is_trained_on_evaluated_and_scored(frames, weights, tmp_path):
    content = to_coco(make_content())
    path = write(tmp_path / "coco.json", content)
    metrics = run_evaluation(weights, path, frames, tmp_path / "out")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert {entry["video_id"] for entry in results} == {image["id"] for image in content["images"]}
    assert all(len(entry["segmentations"]) == 1 for entry in results) and metrics["AP"] >= 0
    ideal = [
        {
            "image_id": entry["image_id"],
            "category_id": entry["category_id"],
            "score": 1,
            "segmentation": entry["segmentation"],
        }
        for entry in content["annotations"]
    ]
    scored = evaluate.main(
        evaluate.parse_arguments(
            ["--results", str(write(tmp_path / "ideal.json", ideal)), "--annotations", str(path)]
        )
    )
    assert scored["AP"] == pytest.approx(1) and scored["per_class"] == {
        "cat": pytest.approx(1),
        "dog": pytest.approx(1),
    }


def test_images_and_videos_may_lack_what_the_other_task_needs():
    """Scoring a file needs no file names; a box has no say in anything."""
    content = to_coco(make_content())
    for image in content["images"]:
        del image["file_name"]
    assert complete(content | {"videos": []}, "x.json").content["videos"][0]["length"] == 1
    with pytest.raises(InputError, match="image at index 0 of x.json has id None, which is no id"):
        complete(content | {"images": [{"height": 4, "width": 4}]}, "x.json")


# Names and encodings

NAMES = ["собака", "猫", "kočička 🐈", "\u06af\u0631\u0628\u0647\u200c\u0647\u0627"]


@pytest.mark.slow
@pytest.mark.parametrize("name, encoding", list(zip(NAMES, ["utf-8", "utf-8-sig", "utf-16"])))
def test_names_survive_from_the_file_to_the_metrics(name, encoding, frames, tmp_path):
    content = make_content()
    content["categories"][1]["name"] = name
    path = write(tmp_path / "set.json", content, encoding)
    assert read_categories(path) == [(1, "cat"), (2, name)]
    last = run_training(path, frames, tmp_path / "run")
    assert torch.load(last, weights_only=True)["config"]["categories"] == [[1, "cat"], [2, name]]
    metrics = run_evaluation(last, path, frames, tmp_path / "out")
    assert list(metrics["per_class"]) == ["cat", name]
    assert json.loads((tmp_path / "out/metrics.json").read_bytes()) == metrics


ASCII = {
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "OMP_NUM_THREADS": "1",
}  # a locale that is not UTF-8
OPEN = """
import sys
sys.path.insert(0, sys.argv[1])
from data import VideoSet, read_frame
videos = VideoSet(sys.argv[2], sys.argv[3])
print(ascii([name for _, name in videos.categories]))
for video in videos.videos:
    for file in video.files:
        read_frame(file, video.height, video.width)
"""


@pytest.mark.slow
def test_files_are_utf8_whatever_the_locale_says(frames, tmp_path):
    """The JSON, the names in it, and the names of frames on the disk."""
    content = make_content(1)
    content["categories"][0]["name"] = NAMES[1]
    content["videos"][0]["file_names"] = [f"видео/кадр {t} 猫.png" for t in range(FRAMES)]
    for t, name in enumerate(content["videos"][0]["file_names"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((frames / f"v1/{t}.png").read_bytes())
    arguments = [
        sys.executable,
        "-c",
        OPEN,
        str(REPOSITORY),
        str(write(tmp_path / "set.json", content)),
        str(tmp_path),
    ]
    done = subprocess.run(arguments, env=os.environ | ASCII, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.decode().strip() == ascii([NAMES[1], "dog"]), (
        done.stderr.decode()
    )


def test_metrics_and_plots_are_saved_before_anything_is_printed(tmp_path, monkeypatch):
    """No terminal, closed pipe or encoding can lose them."""
    monkeypatch.setattr(evaluate, "require_matplotlib", lambda: None)
    for name in ("plot_precision", "plot_classes"):
        monkeypatch.setattr(scoring, name, lambda path, values: path.touch())
    content = make_content()
    given = [
        "--results",
        str(write(tmp_path / "results.json", perfect(content))),
        "--plot",
        "1",
        "--annotations",
        str(write(tmp_path / "gt.json", content)),
        "--output",
        str(tmp_path / "out"),
    ]

    def no_terminal(*lines, **options):
        raise OSError("the terminal has gone")

    monkeypatch.setattr("builtins.print", no_terminal)
    with pytest.raises(OSError, match="the terminal has gone"):
        evaluate.main(evaluate.parse_arguments(given))
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == [
        "classes_gt.png",
        "metrics.json",
        "precision_gt.png",
        "results.json.zip",
    ]


@pytest.mark.slow
def test_classes_of_one_name_are_told_apart(frames, tmp_path):
    content = make_content()
    content["categories"][1]["name"] = "cat"
    path = write(tmp_path / "set.json", content)
    last = run_training(path, frames, tmp_path / "run")
    metrics = run_evaluation(last, path, frames, tmp_path / "out")
    assert list(metrics["per_class"]) == ["cat (id 1)", "cat (id 2)"]


def test_names_become_unique_whatever_they_are():
    categories = [(1, "cat"), (2, "dog"), (3, "cat"), (4, "cat (id 3)"), ("a", "")]
    assert unique_names(categories[:3]) == ["cat (id 1)", "dog", "cat (id 3)"]
    names = unique_names(categories)
    assert len(set(names)) == 5 and names[1] == "dog"
    assert unique_names(list(zip(range(5), names))) == names


@pytest.mark.parametrize(
    "given, name",
    [
        (7, "7"),
        (" a  cat\n", "a cat"),
        ("two\nlines", "two lines"),
        ("\x1b[2Jcat", "\ufffd[2Jcat"),
        ("chat\xa0noir", "chat noir"),
        (NAMES[3], NAMES[3]),
    ],
)
def test_a_name_is_one_line_of_text(given, name):
    content = make_content()
    content["categories"][0]["name"] = given
    assert complete(content, "x.json").content["categories"][0]["name"] == name


@pytest.mark.parametrize("name", [None, True, [], {"en": "cat"}, float("nan")], ids=repr)
def test_what_is_no_name_is_refused(name):
    content = make_content()
    content["categories"][0]["name"] = name
    with pytest.raises(InputError, match=r"category 1 of x.json has the name .*, which is no text"):
        complete(content, "x.json")


# File names of frames


@pytest.mark.parametrize(
    "notation",
    [
        "{root}/v1/0.png",
        "./v1/0.png",
        "v2/../v1/./0.png",
        "v1\\0.png",
        ".\\v2\\..\\v1\\0.png",
        "{link}/v1/0.png",
        "{link}\\v1\\0.png",
        "//{root}/v1/0.png",
        "../{name}/v1/0.png",
        "{link_to_video}/0.png",
    ],
)
@pytest.mark.parametrize("opened", ["root", "link"])
def test_a_frame_inside_of_the_folder_is_found_in_any_notation(notation, opened, frames, tmp_path):
    (tmp_path / "link").symlink_to(frames)
    (tmp_path / "link_to_video").symlink_to(frames / "v1")
    places = {
        "root": frames,
        "link": tmp_path / "link",
        "link_to_video": tmp_path / "link_to_video",
    }
    content = make_content(1)
    content["videos"][0]["file_names"][0] = notation.format(
        **places, name=places[opened].name
    ).replace("///", "//")
    (video,) = VideoSet(write(tmp_path / "set.json", content), places[opened]).videos
    assert video.files[0].samefile(frames / "v1/0.png")


def test_a_folder_that_links_elsewhere_is_inside(frames, tmp_path):
    """People keep videos on several disks."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set/v1").symlink_to(frames / "v1")
    for name in ("v1/0.png", f"{tmp_path}/set/v1/0.png"):
        content = make_content(1)
        content["videos"][0]["file_names"][0] = name
        (video,) = VideoSet(write(tmp_path / "set.json", content), tmp_path / "set").videos
        assert video.files[0] == tmp_path / "set/v1/0.png"


@pytest.mark.skipif(os.name == "nt", reason="a backslash is no letter there")
def test_a_file_may_have_a_backslash_in_its_name(frames, tmp_path):
    (tmp_path / "v1").mkdir()
    for t, name in enumerate(["v1\\0.png", "..\\1.png", "v1/\\2.png"]):
        (tmp_path / name).write_bytes((frames / f"v1/{t}.png").read_bytes())
    content = make_content(1)
    content["videos"][0]["file_names"] = ["v1\\0.png", "..\\1.png", "v1/\\2.png"]
    (video,) = VideoSet(write(tmp_path / "set.json", content), tmp_path).videos
    assert [file.name for file in video.files] == ["v1\\0.png", "..\\1.png", "\\2.png"]


@pytest.mark.parametrize("name", ["v1/\ud800.png", "\ud800/0.png", "кадр.png", "C:\\\ud800"])
def test_a_name_that_no_file_has_is_missing(name, frames, tmp_path):
    content = make_content(1)
    content["videos"][0]["file_names"][0] = name
    path = tmp_path / "set.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="of video 1 is missing|leads outside of"):
        VideoSet(path, frames)


def test_letters_with_accents_are_found_as_macos_writes_them(frames, tmp_path):
    """One letter in the JSON, a letter and an accent on the disk."""
    (tmp_path / "cafe\u0301.png").write_bytes((frames / "v1/0.png").read_bytes())
    content = make_content(1)
    content["videos"][0]["file_names"][0] = "caf\u00e9.png"
    for t in (1, 2):
        content["videos"][0]["file_names"][t] = "cafe\u0301.png"
    (video,) = VideoSet(write(tmp_path / "set.json", content), tmp_path).videos
    assert {file.name for file in video.files} == {"cafe\u0301.png"}


def test_a_summary_of_several_sources_adds_up():
    one, other = Skipped(), Skipped()
    one.add("videos", "the first")
    one.add("videos", "the second")
    other.add("videos", "a third")
    other.add("annotations", "a fourth")
    together = Skipped([one, other])
    assert together.total == 4 and together.sentences() == [
        "videos: 3; the first: the first",
        "annotations: 1; the first: a fourth",
    ]


def test_a_file_with_videos_and_images_is_one_of_videos():
    content = make_content() | {"images": [{"id": 1, "file_name": "v1/0.png"}]}
    assert (
        complete(content, "x.json").content["videos"]
        == complete(make_content(), "x.json").content["videos"]
    )


def test_videos_are_left_out_with_their_annotations_one_after_another():
    file = complete(make_content(3), "x.json")
    less = file.without([1]).without(["3"])
    assert less.left_out == [1, 3]
    assert [video["id"] for video in less.content["videos"]] == [2]
    assert {annotation["video_id"] for annotation in less.content["annotations"]} == {2}
    assert len(file.content["videos"]) == 3


def test_a_set_is_looked_at_again_when_it_is_opened_again(frames, tmp_path):
    root = shutil.copytree(frames, tmp_path / "frames")
    path = write(tmp_path / "set.json", make_content())
    file = VideoSet(path, root).videos[0].files[1]
    file.unlink()
    with pytest.raises(InputError, match=f"frame {re.escape(str(file))} of video 1 is missing"):
        VideoSet(path, root)


def test_all_videos_that_cannot_be_used_are_left_out():
    content = make_content(3)
    content["videos"][0]["length"] = content["videos"][2]["length"] = 9
    file = complete(content, "x.json", skip_bad=True)
    assert file.left_out == [content["videos"][0]["id"], content["videos"][2]["id"]]
    assert [video["id"] for video in file.content["videos"]] == [content["videos"][1]["id"]]


def test_a_video_without_frames_is_refused():
    content = make_content(1)
    content["videos"][0]["file_names"], content["videos"][0]["length"] = [], 0
    with pytest.raises(InputError, match="has no frames"):
        complete(content, "x.json")
