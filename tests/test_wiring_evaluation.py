"""From files to numbers with ids that are neither contiguous nor in order: nothing is mistaken for anything else.

A model is trained for one step on the set of sparse_set.py and evaluated through the command line.
What it must write is computed from `segment_video`, the ids of the JSON and the metric alone.
"""
import copy
import json
import os
import shutil
import zipfile

import pytest
import torch

import evaluate
import train
from checkpoint import model_from_checkpoint
from data import VideoSet, test_frames
from metric import evaluate_results
from model import GRAttVIS, build_model
from runtime.errors import InputError
from sparse_set import (CATEGORIES, INSTANCES, LABELS, SIDE, VIDEOS, decode, save_tiny_model, sparse_content,
                        write_json, write_sparse_set)

TOP_K = 7


def run(*arguments):
    return evaluate.main(evaluate.parse_arguments([str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the set and run/last.pt, a model of one training step on it."""
    folder = tmp_path_factory.mktemp("wiring")
    write_sparse_set(folder)
    train.main(train.parse_arguments(["--data-root", str(folder), "--output", str(folder / "run"), "--iterations", "1",
                                      "--batch", "1", "--frames", "2", "--points", "64", "--short-sides", str(SIDE),
                                      "--workers", "0", "--device", "cpu"]))
    return folder


@pytest.fixture(scope="module")
def output(folder):
    """What evaluate.py writes for that model."""
    run("--weights", folder / "run/last.pt", "--data-root", folder, "--short-side", SIDE, "--top-k", TOP_K,
        "--device", "cpu", "--workers", 0, "--output", folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def results(output):
    return json.loads((output / "results.json").read_text())


# A model evaluated

def test_labels_follow_the_order_of_category_ids(folder):
    videos = VideoSet(folder / "train.json", folder / "JPEGImages")
    assert [video.id for video in videos.videos] == [3, 5, 17]
    for video in videos.videos:
        assert len(video.files) == VIDEOS[video.id][0] and (video.height, video.width) == VIDEOS[video.id][1:]
        found = {entry["id"]: (entry["category_id"], entry["label"]) for entry in video.annotations}
        assert found == {number: (category, LABELS[category]) for number, owner, category in INSTANCES
                         if owner == video.id}


def test_a_checkpoint_knows_its_classes_in_the_order_of_their_ids(folder):
    model, config = model_from_checkpoint(folder / "run/last.pt")
    assert [list(category) for category in config["categories"]] == [[3, "ant"], [7, "cat"], [90, "dog"]]
    assert model.num_classes == 3


def test_results_have_the_ids_of_the_files(folder, results):
    """Video ids in ascending order, the category id of each label, masks at the size and length of their own video."""
    model, _ = model_from_checkpoint(folder / "run/last.pt")
    assert [entry["video_id"] for entry in results] == [3] * TOP_K + [5] * TOP_K + [17] * TOP_K
    category_ids, areas = {label: number for number, label in LABELS.items()}, set()
    for video in VideoSet(folder / "valid.json", folder / "JPEGImages").videos:
        own = [entry for entry in results if entry["video_id"] == video.id]
        found = model.segment_video(test_frames(video, SIDE), VIDEOS[video.id][1:], TOP_K)
        assert [entry["score"] for entry in own] == pytest.approx(found.scores.tolist(), rel=1e-5)
        assert [entry["score"] for entry in own] == sorted((entry["score"] for entry in own), reverse=True)
        assert [entry["category_id"] for entry in own] == [category_ids[label] for label in found.labels.tolist()]
        for entry, masks in zip(own, found.masks, strict=True):
            assert {tuple(code["size"]) for code in entry["segmentations"]} == {VIDEOS[video.id][1:]}
            assert torch.equal(decode(entry["segmentations"]), masks) and len(masks) == VIDEOS[video.id][0]
            areas.update(masks.sum((1, 2)).tolist())
    assert {entry["category_id"] for entry in results} == set(CATEGORIES) and len(areas) > 10


def test_metrics_are_those_of_the_results(folder, output, results):
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics == evaluate_results(results, sparse_content())
    assert list(metrics["per_class"]) == list(CATEGORIES.values())
    with zipfile.ZipFile(output / "results.json.zip") as archive:
        assert json.loads(archive.read("results.json")) == results


def test_a_checkpoint_of_the_same_classes_in_another_order_is_refused(folder, tmp_path):
    """Its labels would get the ids of other classes."""
    save_tiny_model(tmp_path / "other.pt", categories=[[3, "dog"], [7, "cat"], [90, "ant"]])
    with pytest.raises(InputError, match="was trained on other classes"):
        run("--weights", tmp_path / "other.pt", "--data-root", folder, "--output", tmp_path / "out", "--workers", 0)


@pytest.mark.parametrize("classes", [2, 4, 7])
def test_another_number_of_classes_is_refused(folder, tmp_path, classes):
    """By a file that does not say what its classes are."""
    save_tiny_model(tmp_path / "other.pt", classes=classes)
    with pytest.raises(InputError, match=f"other.pt has {classes} classes, .*valid.json has 3"):
        run("--weights", tmp_path / "other.pt", "--data-root", folder, "--output", tmp_path / "out", "--workers", 0)


@pytest.mark.parametrize("code", [{"size": [40, 56], "counts": "1"}, {"size": [56, 40], "counts": [2240]},
                                  {"size": [40, 56], "counts": [40, 57]}], ids=["end", "size", "sum"])
def test_a_ground_truth_that_cannot_be_scored_is_refused_before_the_model_runs(folder, tmp_path, monkeypatch, code):
    content = sparse_content()
    content["annotations"][1]["segmentations"][2] = code
    monkeypatch.setattr(GRAttVIS, "encode_video", lambda *given: pytest.fail("the model was run"))
    with pytest.raises(InputError, match="annotation"):
        run("--weights", folder / "run/last.pt", "--json", write_json(tmp_path / "odd.json", content),
            "--images", folder / "JPEGImages", "--output", tmp_path / "out", "--workers", 0)


# Results scored

def perfect_results():
    """The annotations as results, one score each."""
    return [{"video_id": entry["video_id"], "category_id": entry["category_id"], "score": 0.5 + entry["id"] / 100,
             "segmentations": entry["segmentations"]} for entry in sparse_content()["annotations"]]


def score(tmp_path, results, *ground_truths):
    """metrics.json of a results file; the ground truth is that of the set, or several files."""
    paths = [write_json(tmp_path / name / "gt.json", content) for name, content in
             zip("abc", ground_truths or [sparse_content()])]
    run("--results", write_json(tmp_path / "results.json", results), "--annotations", *paths, "--output", tmp_path / "scores")
    return json.loads((tmp_path / "scores/metrics.json").read_text())


def swapped(results, key, one, other):
    """The results with two ids exchanged."""
    exchange = {one: other, other: one}
    return [entry | {key: exchange.get(entry[key], entry[key])} for entry in results]


def test_the_ground_truth_as_results_scores_one(tmp_path):
    metrics = score(tmp_path, perfect_results())
    assert [metrics[name] for name in ("AP", "AP50", "AP75", "APs", "AR10", "AR100")] == pytest.approx([1] * 6)
    assert metrics["per_class"] == {name: pytest.approx(1) for name in CATEGORIES.values()}


def test_one_found_class_has_its_own_name(tmp_path):
    for number, name in CATEGORIES.items():
        metrics = score(tmp_path, [entry for entry in perfect_results() if entry["category_id"] == number])
        assert metrics["per_class"] == {other: pytest.approx(float(other == name)) for other in CATEGORIES.values()}
        assert metrics["AP"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("key, one, other", [("category_id", 3, 90), ("category_id", 7, 90), ("video_id", 3, 5)])
def test_exchanged_ids_cost_precision(tmp_path, key, one, other):
    assert score(tmp_path, swapped(perfect_results(), key, one, other))["AP"] < 0.7


@pytest.mark.parametrize("change", [{"video_id": 4}, {"category_id": 0}, {"category_id": 2}], ids=str)
def test_positions_in_place_of_ids_are_refused(tmp_path, change):
    results = perfect_results()
    results[0] |= change
    with pytest.raises(InputError, match=r"results\[0\] has (video|category)_id \d, which the annotations do not define"):
        score(tmp_path, results)


def in_parts():
    """The set as two files: video 17, and videos 3 and 5. Class "cat" is annotated in the second alone."""
    content = sparse_content()

    def part(keep):
        return content | {"videos": [video for video in content["videos"] if keep(video["id"])],
                          "annotations": [entry for entry in content["annotations"] if keep(entry["video_id"])]}

    return part(lambda number: number == 17), part(lambda number: number != 17)


def test_a_class_that_one_part_has_not_counts_in_the_other_alone(tmp_path):
    results = [entry for entry in perfect_results() if (entry["video_id"], entry["category_id"]) != (17, 3)]
    metrics = score(tmp_path, results, *in_parts())
    first, second = metrics["parts"].values()
    assert first["per_class"] == {"dog": pytest.approx(1), "cat": -1, "ant": 0}
    assert second["per_class"] == {name: pytest.approx(1) for name in CATEGORIES.values()}
    assert metrics["per_class"] == {"dog": pytest.approx(1), "cat": pytest.approx(1), "ant": pytest.approx(0.5)}
    assert metrics["AP"] == pytest.approx((0.5 + 1) / 2)


@pytest.mark.parametrize("categories", [[], [{"id": 3, "name": "ant"}], [{"id": 3, "name": "ant"}, {"id": 7, "name": "dog"},
                                                                       {"id": 90, "name": "cat"}]], ids=len)
def test_parts_of_other_categories_are_not_averaged(tmp_path, categories):
    first, second = in_parts()
    with pytest.raises(InputError, match="b/gt.json has other categories than .*a/gt.json"):
        score(tmp_path, [], first, second | {"categories": categories})
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize("names, server", [
    (["Person", "Vehical"], "OVIS: https://codalab.lisn.upsaclay.fr/competitions/4763"),
    (["person", "ape"], "YouTube-VIS 2019: https://codalab.lisn.upsaclay.fr/competitions/6064"),
    (["flying_disc", "cow"], "YouTube-VIS 2021: https://codalab.lisn.upsaclay.fr/competitions/7680"),
    (["cow", "dog"], "the benchmark's server")])
def test_results_without_annotations_are_zipped_for_their_server(tmp_path, capsys, names, server):
    hidden = {"videos": sparse_content()["videos"],
              "categories": [{"id": number, "name": name} for number, name in zip((3, 90), names)]}
    results = [entry for entry in perfect_results() if entry["category_id"] != 7]
    assert run("--results", write_json(tmp_path / "r.json", results),
               "--annotations", write_json(tmp_path / "hidden.json", hidden), "--output", tmp_path / "out") is None
    assert f"submit {tmp_path / 'out/results.json.zip'} to {server}" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "out/results.json.zip") as archive:
        assert json.loads(archive.read("results.json")) == results
    assert not (tmp_path / "out/metrics.json").exists()


def test_annotations_in_parts_beside_a_set_without_any_are_found(tmp_path):
    """gt_short.json and gt_long.json, as YouTube-VIS 2022 has them; without both, there is nothing to score."""
    write_sparse_set(tmp_path)
    hidden = copy.deepcopy(sparse_content())
    del hidden["annotations"]
    write_json(tmp_path / "valid.json", hidden)
    save_tiny_model(tmp_path / "tiny.pt")
    arguments = ["--weights", tmp_path / "tiny.pt", "--data-root", tmp_path, "--workers", 0, "--output"]
    short, long = in_parts()
    write_json(tmp_path / "gt_short.json", short)
    assert run(*arguments, tmp_path / "one") is None
    write_json(tmp_path / "gt_long.json", long)
    assert list(run(*arguments, tmp_path / "both")["parts"]) == ["gt_short", "gt_long"]


# An evaluation that was stopped

def stop_after_one_video(*arguments):
    """Run an evaluation that is interrupted in its second video."""
    done, encode_video = [], GRAttVIS.encode_video

    def interrupted(model, *given):
        if done:
            raise KeyboardInterrupt
        done.append(given)
        return encode_video(model, *given)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GRAttVIS, "encode_video", interrupted)
        run(*arguments)


def arguments_for(folder, *more):
    return ["--weights", folder / "run/last.pt", "--data-root", folder, "--short-side", SIDE, "--workers", 0, *more]


@pytest.fixture(scope="module")
def stopped(folder):
    """An output folder with the results of one video alone."""
    stop_after_one_video(*arguments_for(folder, "--output", folder / "stopped"))
    return folder / "stopped"


def test_a_stopped_evaluation_goes_on_without_the_videos_that_are_done(folder, stopped, tmp_path, capsys):
    """What changes no result may be another."""
    run(*arguments_for(folder, "--output", tmp_path / "whole"))
    shutil.copytree(stopped, tmp_path / "rest")
    capsys.readouterr()
    run(*arguments_for(folder, "--chunk", 1, "--draw", 1, "--output", tmp_path / "rest"))
    assert "1 of them done before" in capsys.readouterr().out
    assert not (tmp_path / "rest/overlays").exists()          # the first video was done before
    for name in ("results.json", "metrics.json"):
        assert json.loads((tmp_path / "rest" / name).read_text()) == json.loads((tmp_path / "whole" / name).read_text())


@pytest.mark.parametrize("flag, value", [
    ("--top-k", 3), ("--short-side", 48), ("--max-long-side", 40), ("--amp", "bf16"), ("--split", "train"), ("--compile", None)])
def test_results_of_other_arguments_are_not_gone_on_with(folder, stopped, tmp_path, monkeypatch, flag, value):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    shutil.copytree(stopped, tmp_path / "rest")
    with pytest.raises(InputError, match=flag[2:].replace("-", "_") + ".* differ"):
        run(*arguments_for(folder, flag, *([] if value is None else [value]), "--output", tmp_path / "rest"))


@pytest.mark.parametrize("propagation, first, then", [
    ("plain", ("--propagation", "plain"), ("--propagation", "clip")), ("gated", (), ("--gate-mask", "blocked"))], ids=str)
def test_results_of_another_model_are_not_gone_on_with(folder, tmp_path, propagation, first, then):
    """One official file may be several models."""
    torch.save({"model": build_model("toy", 3, propagation).state_dict()}, tmp_path / "official.pth")
    arguments = ["--weights", tmp_path / "official.pth", "--preset", "toy", "--data-root", folder, "--workers", 0,
                 "--short-side", SIDE, "--output", tmp_path / "out"]
    stop_after_one_video(*arguments, *first)
    with pytest.raises(InputError, match=then[0][2:].replace("-", "_") + ".* differ"):
        run(*arguments, *then)


def test_results_of_weights_that_have_changed_since_are_not_gone_on_with(folder, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "rest")
    weights = folder / "run/last.pt"
    before = weights.stat()
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 10 ** 9))
    try:
        with pytest.raises(InputError, match="weights.* differ"):
            run(*arguments_for(folder, "--output", tmp_path / "rest"))
    finally:
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
