"""Evaluation from the command line: of a results file, and of a model."""

import json

import numpy
import pytest
from PIL import Image
from pycocotools import mask as rle

import evaluate
from data import frames_at_test_size
from golden_set import meta, occlusion_set, read_json
from synthetic.suites import SUITES, Suite, make_dataset
from test_tracking import assert_equal
from training import train_one_step

pytestmark = pytest.mark.slow  # whole programs


def test_golden_results_file_scored_from_the_command_line(golden_dir, tmp_path):
    spec = meta()["eval"]
    evaluate.main(
        evaluate.parse_arguments(
            [
                "--results",
                str(golden_dir / spec["results"]),
                "--annotations",
                str(golden_dir / spec["gt"]),
                "--output",
                str(tmp_path / "scores"),
            ]
        )
    )
    metrics = json.loads((tmp_path / "scores/metrics.json").read_text())
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    assert [metrics[name] for name in names] == pytest.approx(
        read_json(spec["stats"])["stats"], abs=1e-9
    )
    assert set(metrics) == {*names, "per_class", "causes", "oracle", "groups", "tracking"}


def test_golden_occlusion_and_tracking_from_the_command_line(tmp_path):
    """All numbers of OVIS's evaluator and of TrackEval, in metrics.json."""
    ground_truth, results, expected = occlusion_set()
    (tmp_path / "gt.json").write_text(json.dumps(ground_truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    arguments = ["--results", tmp_path / "results.json", "--annotations", tmp_path / "gt.json"]
    arguments += ["--track-score", expected["tracking"]["score_threshold"]]
    evaluate.main(evaluate.parse_arguments([str(argument) for argument in arguments]))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["ovis"] == pytest.approx(expected["ovis"], rel=0, abs=1e-9)
    assert_equal(metrics["tracking"], expected["tracking"])
    assert list(metrics["groups"]) == ["occlusion"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of one training step and the set it has seen: its results are bad, but they are
    results.
    """
    folder = tmp_path_factory.mktemp("evaluate")
    make_dataset(
        folder / "set",
        train_videos=1,
        valid_videos=2,
        frames=3,
        height=64,
        width=80,
        objects=(1, 2),
    )
    train_one_step(folder / "set", folder / "run")
    return folder


def test_from_frames_to_metrics_and_pictures(trained):
    arguments = [
        "--weights",
        str(trained / "run/last.pt"),
        "--data-root",
        str(trained / "set"),
        "--short-side",
        "64",
        "--top-k",
        "4",
        "--draw",
        "1",
        "--device",
        "cpu",
    ]
    metrics = evaluate.main(evaluate.parse_arguments(arguments))
    output = trained / "run/evaluation"
    assert json.loads((output / "metrics.json").read_text()) == metrics
    ground_truth = json.loads((trained / "set/valid.json").read_text())
    results = json.loads((output / "results.json").read_text())
    assert len(results) == 2 * 4
    for entry in results:
        video = next(video for video in ground_truth["videos"] if video["id"] == entry["video_id"])
        assert len(entry["segmentations"]) == video["length"] and 0 <= entry["score"] <= 1
        assert all(
            mask["size"] == [video["height"], video["width"]] for mask in entry["segmentations"]
        )
        assert entry["category_id"] in {category["id"] for category in ground_truth["categories"]}
    picture = Image.open(output / "overlays/00001.webp")
    assert picture.n_frames == 3 and len(list((output / "overlays").iterdir())) == 2

    # the results are the model's: the same masks, from segment_video alone
    model, _ = evaluate.model_from_checkpoint(trained / "run/last.pt")
    videos = evaluate.VideoSet(trained / "set/valid.json", trained / "set/valid/JPEGImages")
    found = model.segment_video(frames_at_test_size(videos.videos[0], 64), (64, 80), 4)
    assert numpy.array_equal(
        rle.decode(results[0]["segmentations"][1]).astype(bool), found.masks[0, 1].numpy()
    )


def test_a_set_without_annotations_gets_results_but_no_metrics(trained, tmp_path, capsys):
    ground_truth = json.loads((trained / "set/valid.json").read_text())
    del ground_truth["annotations"]
    (tmp_path / "hidden.json").write_text(json.dumps(ground_truth))
    assert (
        evaluate.main(
            evaluate.parse_arguments(
                [
                    "--weights",
                    str(trained / "run/last.pt"),
                    "--json",
                    str(tmp_path / "hidden.json"),
                    "--images",
                    str(trained / "set/valid/JPEGImages"),
                    "--output",
                    str(tmp_path / "out"),
                    "--short-side",
                    "64",
                    "--device",
                    "cpu",
                ]
            )
        )
        is None
    )
    assert (tmp_path / "out/results.json").exists() and not (tmp_path / "out/metrics.json").exists()
    assert "server" in capsys.readouterr().out


def test_without_arguments_the_shipped_weights_are_evaluated_on_suites(
    tmp_path, monkeypatch, capsys
):
    """Two suites, which are written; a model that has learned something.

    Here the suites are small.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("easy", "occlusion"):
        monkeypatch.setitem(SUITES, name, Suite(SUITES[name].difficulty, frames=6, objects=(1, 2)))
    monkeypatch.setattr(evaluate, "HELD_OUT", 2)
    metrics = evaluate.main(evaluate.parse_arguments(["--device", "cpu", "--workers", "0"]))
    assert list(metrics) == ["easy", "occlusion"]
    assert all(found["AP50"] > 0.2 for found in metrics.values())
    for suite in metrics:
        assert (
            json.loads((tmp_path / "runs/small/evaluation" / suite / "metrics.json").read_text())
            == metrics[suite]
        )
        assert (
            len(
                json.loads((tmp_path / "datasets/suites" / suite / "valid.json").read_text())[
                    "videos"
                ]
            )
            == 2
        )
    assert evaluate.SHIPPED_WEIGHTS.stat().st_size <= 10e6
    assert "small.pt: gated propagation" in capsys.readouterr().out
