"""From files to metrics with unordered ids that have gaps: nothing is confused.

A model is trained for one step on the set of sparse_set.py and evaluated from the command line.
The expected output is computed from `segment_video`, the ids of the JSON and the metric alone.
"""

import json
import shutil
import zipfile

import pytest
import torch

import evaluate
from checkpoint import model_from_checkpoint
from data import VideoSet, frames_at_test_size
from evaluation.metric import evaluate_results
from model import GRAttVIS, build_model
from runtime.errors import InputError
from sparse_set import (
    CATEGORIES,
    INSTANCES,
    LABELS,
    SIDE,
    VIDEOS,
    decode,
    part_of_set,
    perfect_results,
    save_tiny_model,
    sparse_content,
    write_json,
    write_sparse_set,
)
from test_metric import ap_numbers
from training import train_one_step

pytestmark = pytest.mark.slow  # whole programs

TOP_K = 7


def run(*arguments):
    return evaluate.main(evaluate.parse_arguments([str(argument) for argument in arguments]))


def evaluate_on(folder, *more):
    """Evaluate the trained model on its set, but for what is given: later arguments count."""
    return run(
        "--weights",
        folder / "run/last.pt",
        "--data-root",
        folder,
        "--short-side",
        SIDE,
        "--device",
        "cpu",
        "--workers",
        0,
        *more,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the set and run/last.pt, a model of one training step on it."""
    folder = tmp_path_factory.mktemp("wiring")
    write_sparse_set(folder)
    train_one_step(folder, folder / "run", SIDE)
    return folder


@pytest.fixture(scope="module")
def output(folder):
    """What evaluate.py writes for that model."""
    evaluate_on(folder, "--top-k", TOP_K, "--output", folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def results(output):
    return json.loads((output / "results.json").read_text())


# A model evaluated


def test_labels_follow_the_order_of_category_ids(folder):
    videos = VideoSet(folder / "train.json", folder / "JPEGImages")
    assert [video.id for video in videos.videos] == [3, 5, 17]
    for video in videos.videos:
        assert len(video.files) == VIDEOS[video.id][0]
        assert (video.height, video.width) == VIDEOS[video.id][1:]
        found = {entry["id"]: (entry["category_id"], entry["label"]) for entry in video.annotations}
        assert found == {
            number: (category, LABELS[category])
            for number, owner, category in INSTANCES
            if owner == video.id
        }


def test_a_checkpoint_knows_its_classes_in_the_order_of_their_ids(folder):
    model, config = model_from_checkpoint(folder / "run/last.pt")
    assert list(map(list, config["categories"])) == [[3, "ant"], [7, "cat"], [90, "dog"]]
    assert model.num_classes == 3


def test_results_have_the_ids_of_the_files(folder, results):
    """And masks have the size and length of their own video."""
    model, _ = model_from_checkpoint(folder / "run/last.pt")
    assert [entry["video_id"] for entry in results] == [3] * TOP_K + [5] * TOP_K + [17] * TOP_K
    category_ids, areas = {label: number for number, label in LABELS.items()}, set()
    for video in VideoSet(folder / "valid.json", folder / "JPEGImages").videos:
        own = [entry for entry in results if entry["video_id"] == video.id]
        found = model.segment_video(frames_at_test_size(video, SIDE), VIDEOS[video.id][1:], TOP_K)
        scores = [entry["score"] for entry in own]
        assert scores == pytest.approx(found.scores.tolist(), rel=1e-5)
        assert scores == sorted(scores, reverse=True)
        expected = [category_ids[label] for label in found.labels.tolist()]
        assert [entry["category_id"] for entry in own] == expected
        for entry, masks in zip(own, found.masks, strict=True):
            assert masks.shape == VIDEOS[video.id]
            assert torch.equal(decode(entry["segmentations"]), masks)
            areas.update(masks.sum((1, 2)).tolist())
    assert {entry["category_id"] for entry in results} == set(CATEGORIES) and len(areas) > 10


def test_metrics_are_those_of_the_results(output, results):
    metrics = json.loads((output / "metrics.json").read_text())
    assert ap_numbers(metrics) == evaluate_results(results, sparse_content())
    assert list(metrics["per_class"]) == list(CATEGORIES.values())
    with zipfile.ZipFile(output / "results.json.zip") as archive:
        assert json.loads(archive.read("results.json")) == results


def test_the_same_classes_in_another_order_are_refused(folder, tmp_path):
    """Labels would get the ids of other classes."""
    save_tiny_model(tmp_path / "other.pt", categories=[[3, "dog"], [7, "cat"], [90, "ant"]])
    with pytest.raises(InputError, match="was trained on other classes"):
        evaluate_on(folder, "--weights", tmp_path / "other.pt", "--output", tmp_path / "out")


@pytest.mark.parametrize("classes", [2, 4, 7])
def test_another_number_of_classes_is_refused(folder, tmp_path, classes):
    """Of a file that does not say what its classes are."""
    save_tiny_model(tmp_path / "other.pt", classes=classes)
    with pytest.raises(InputError, match=f"other.pt has {classes} classes, .*valid.json has 3"):
        evaluate_on(folder, "--weights", tmp_path / "other.pt", "--output", tmp_path / "out")


@pytest.mark.parametrize(
    "code",
    [
        {"size": [40, 56], "counts": "1"},
        {"size": [56, 40], "counts": [2240]},
        {"size": [40, 56], "counts": [40, 57]},
    ],
    ids=["end", "size", "sum"],
)
def test_a_broken_ground_truth_is_refused_first(folder, tmp_path, monkeypatch, code):
    """Before the model runs."""
    content = sparse_content()
    content["annotations"][1]["segmentations"][2] = code
    path = write_json(tmp_path / "odd.json", content)
    monkeypatch.setattr(GRAttVIS, "encode_video", lambda *given: pytest.fail("the model was run"))
    with pytest.raises(InputError, match="annotation"):
        evaluate_on(
            folder, "--json", path, "--images", folder / "JPEGImages", "--output", tmp_path / "out"
        )


# Results scored


def score(tmp_path, results, *ground_truths):
    """metrics.json of a results file; the ground truth is that of the set, or several files."""
    contents = dict(zip("abc", ground_truths or [sparse_content()]))
    paths = [write_json(tmp_path / name / "gt.json", part) for name, part in contents.items()]
    run(
        "--results",
        write_json(tmp_path / "results.json", results),
        "--annotations",
        *paths,
        "--output",
        tmp_path / "scores",
    )
    return json.loads((tmp_path / "scores/metrics.json").read_text())


def test_the_ground_truth_as_results_scores_one(tmp_path):
    metrics = score(tmp_path, perfect_results())
    for name in ("AP", "AP50", "AP75", "APs", "AR10", "AR100"):
        assert metrics[name] == pytest.approx(1)
    assert metrics["per_class"] == {name: pytest.approx(1) for name in CATEGORIES.values()}


@pytest.mark.parametrize("number, name", CATEGORIES.items())
def test_one_found_class_has_its_own_name(tmp_path, number, name):
    found = [entry for entry in perfect_results() if entry["category_id"] == number]
    metrics = score(tmp_path, found)
    expected = {other: float(other == name) for other in CATEGORIES.values()}
    assert metrics["per_class"] == pytest.approx(expected)
    assert metrics["AP"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "key, one, other", [("category_id", 3, 90), ("category_id", 7, 90), ("video_id", 3, 5)]
)
def test_exchanged_ids_cost_precision(tmp_path, key, one, other):
    exchange = {one: other, other: one}
    results = [entry | {key: exchange.get(entry[key], entry[key])} for entry in perfect_results()]
    assert score(tmp_path, results)["AP"] < 0.7


@pytest.mark.parametrize("key, position", [("video_id", 4), ("category_id", 0), ("category_id", 2)])
def test_positions_in_place_of_ids_are_refused(tmp_path, key, position):
    results = perfect_results()
    results[0][key] = position
    with pytest.raises(InputError, match=rf"results\[0\] has {key} {position}, which"):
        score(tmp_path, results)


def test_a_class_that_one_part_has_not_counts_in_the_other_alone(tmp_path):
    """Video 17 has no cat, and its ant is not found."""
    results = [
        entry for entry in perfect_results() if (entry["video_id"], entry["category_id"]) != (17, 3)
    ]
    metrics = score(tmp_path, results, part_of_set(17), part_of_set(3, 5))
    first, second = metrics["parts"].values()
    assert first["per_class"] == pytest.approx({"dog": 1, "cat": -1, "ant": 0})
    assert second["per_class"] == pytest.approx({"dog": 1, "cat": 1, "ant": 1})
    assert metrics["per_class"] == pytest.approx({"dog": 1, "cat": 1, "ant": 0.5})
    assert metrics["AP"] == pytest.approx((0.5 + 1) / 2)


@pytest.mark.parametrize("names", [{}, {3: "ant"}, {3: "ant", 7: "dog", 90: "cat"}], ids=len)
def test_parts_of_other_categories_are_not_averaged(tmp_path, names):
    categories = [{"id": number, "name": name} for number, name in names.items()]
    with pytest.raises(
        InputError, match="b/gt.json has (other categories than .*a/gt.json|an empty list of)"
    ):
        score(tmp_path, [], part_of_set(17), part_of_set(3, 5) | {"categories": categories})
    assert not (tmp_path / "scores").exists()


def hidden_content():
    """The set as published for a benchmark: without annotations."""
    return {key: value for key, value in sparse_content().items() if key != "annotations"}


def test_results_without_annotations_are_zipped(tmp_path, capsys):
    """The output says how to score them, and no address."""
    metrics = run(
        "--results",
        write_json(tmp_path / "r.json", perfect_results()),
        "--annotations",
        write_json(tmp_path / "hidden.json", hidden_content()),
        "--output",
        tmp_path / "out",
    )
    assert metrics is None and not (tmp_path / "out/metrics.json").exists()
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'hidden.json'} has no annotations: nothing is scored" in printed
    assert f"{tmp_path / 'out/results.json.zip'} is what the server of a benchmark takes" in printed
    for name in ("--annotations", "valid_gt.json", "validGT.json", "gt.json"):
        assert name in printed
    assert "http" not in printed
    with zipfile.ZipFile(tmp_path / "out/results.json.zip") as archive:
        assert json.loads(archive.read("results.json")) == perfect_results()


@pytest.mark.parametrize("name", ["hidden_gt.json", "hiddenGT.json", "gt.json"])
def test_annotations_beside_a_set_without_any_are_found(folder, tmp_path, capsys, name):
    hidden = write_json(tmp_path / "hidden.json", hidden_content())
    write_json(tmp_path / name, sparse_content())
    arguments = ["--json", hidden, "--images", folder / "JPEGImages", "--output", tmp_path / "out"]
    metrics = evaluate_on(folder, *arguments)
    assert metrics["AP"] >= 0
    assert f"ground truth: {tmp_path / name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        part_of_set(17, 3),
        hidden_content(),
        sparse_content() | {"categories": [{"id": 3, "name": "a"}]},
    ],
    ids=["videos", "no annotations", "classes"],
)
def test_annotations_of_another_set_are_not_used(folder, tmp_path, capsys, content):
    """But said to be there."""
    hidden = write_json(tmp_path / "hidden.json", hidden_content())
    write_json(tmp_path / "gt.json", content)
    arguments = ["--json", hidden, "--images", folder / "JPEGImages", "--output", tmp_path / "out"]
    assert evaluate_on(folder, *arguments) is None
    assert f"not of these videos: {tmp_path / 'gt.json'}" in capsys.readouterr().out


def test_a_broken_file_beside_a_set_is_no_obstacle(folder, tmp_path, capsys):
    hidden = write_json(tmp_path / "hidden.json", hidden_content())
    (tmp_path / "gt.json").write_text("{")
    arguments = ["--json", hidden, "--images", folder / "JPEGImages", "--output", tmp_path / "out"]
    assert evaluate_on(folder, *arguments) is None
    assert "not used as ground truth: " in capsys.readouterr().out


def test_annotations_in_parts_beside_a_set_without_any_are_found(folder, tmp_path):
    """gt_short.json and gt_long.json, as YouTube-VIS 2022 has them; one alone is not enough."""
    hidden = write_json(tmp_path / "hidden.json", hidden_content())
    arguments = ["--json", hidden, "--images", folder / "JPEGImages", "--output"]
    write_json(tmp_path / "gt_short.json", part_of_set(17))
    assert evaluate_on(folder, *arguments, tmp_path / "one") is None
    write_json(tmp_path / "gt_long.json", part_of_set(3, 5))
    metrics = evaluate_on(folder, *arguments, tmp_path / "both")
    assert list(metrics["parts"]) == ["gt_short", "gt_long"]


def test_causes_and_oracle_are_in_the_metrics_of_each_part_and_their_mean(tmp_path):
    """In one part, a class is missed; in the other, all is found."""
    results = [
        entry for entry in perfect_results() if (entry["video_id"], entry["category_id"]) != (17, 3)
    ]
    metrics = score(tmp_path, results, part_of_set(17), part_of_set(3, 5))
    first, second = metrics["parts"].values()
    missed = [part["causes"]["missed"]["AP"] for part in (first, second, metrics)]
    assert missed == pytest.approx([0.5, 0, 0.25])
    bounds = [part["oracle"]["bound"]["AP"] for part in (first, second, metrics)]
    assert bounds == pytest.approx([0.5, 1, 0.75])
    assert metrics["oracle"]["linking"]["AP"] == pytest.approx(metrics["AP"])
    assert metrics["oracle"]["order"]["AP"] == pytest.approx(metrics["AP"])


# An evaluation that was stopped


def stop_after_one_video(folder, *arguments):
    """Run an evaluation that is interrupted in its second video."""
    done, encode_video = [], GRAttVIS.encode_video

    def interrupted(model, *given):
        if done:
            raise KeyboardInterrupt
        done.append(given)
        return encode_video(model, *given)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GRAttVIS, "encode_video", interrupted)
        evaluate_on(folder, *arguments)


@pytest.fixture(scope="module")
def stopped(folder):
    """An output folder with the results of one video alone."""
    stop_after_one_video(folder, "--output", folder / "stopped")
    return folder / "stopped"


def test_a_stopped_evaluation_goes_on_without_the_videos_that_are_done(
    folder, stopped, tmp_path, capsys
):
    """What changes no result may be another."""
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    evaluate_on(folder, "--output", whole)
    shutil.copytree(stopped, rest)
    capsys.readouterr()
    evaluate_on(folder, "--chunk", 1, "--draw", 1, "--output", rest)
    assert "1 of them done before" in capsys.readouterr().out
    assert len(list((rest / "overlays").iterdir())) == 2  # of the video that was done before
    for name in ("results.json", "metrics.json"):
        assert json.loads((rest / name).read_text()) == json.loads((whole / name).read_text())


@pytest.mark.parametrize(
    "changed",
    [
        ("--top-k", 3),
        ("--short-side", 48),
        ("--max-long-side", 40),
        ("--amp", "bf16"),
        ("--split", "train"),
        ("--compile",),
    ],
    ids=str,
)
def test_results_of_other_arguments_are_not_gone_on_with(
    folder, stopped, tmp_path, monkeypatch, changed
):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    shutil.copytree(stopped, tmp_path / "rest")
    with pytest.raises(InputError, match=changed[0][2:].replace("-", "_") + ".* differ"):
        evaluate_on(folder, *changed, "--output", tmp_path / "rest")


@pytest.mark.parametrize(
    "propagation, first, then",
    [
        ("plain", ("--propagation", "plain"), ("--propagation", "clip")),
        ("gated", (), ("--gate-mask", "blocked")),
    ],
    ids=["propagation", "gate mask"],
)
def test_results_of_another_model_are_not_gone_on_with(folder, tmp_path, propagation, first, then):
    """One official file may be several models."""
    model = build_model("toy", 3, propagation)
    torch.save({"model": model.state_dict()}, tmp_path / "official.pth")
    arguments = [
        "--weights",
        tmp_path / "official.pth",
        "--preset",
        "toy",
        "--output",
        tmp_path / "out",
    ]
    stop_after_one_video(folder, *arguments, *first)
    with pytest.raises(InputError, match=then[0][2:].replace("-", "_") + ".* differ"):
        evaluate_on(folder, *arguments, *then)


def test_results_of_weights_that_have_changed_since_are_not_gone_on_with(folder, stopped, tmp_path):
    """Their contents count, not the time at which the file was written."""
    shutil.copytree(stopped, tmp_path / "rest")
    weights = folder / "run/last.pt"
    before = weights.read_bytes()
    other = torch.load(weights, weights_only=True)
    other["model"]["tracker.query_feat.weight"] += 1
    try:
        torch.save(other, weights)
        with pytest.raises(InputError, match="weights differ"):
            evaluate_on(folder, "--output", tmp_path / "rest")
    finally:
        weights.write_bytes(before)
    evaluate_on(folder, "--output", tmp_path / "rest")
