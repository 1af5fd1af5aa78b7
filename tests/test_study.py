"""The gate study: switches, gaps and bins of hand-made tracks, noisy frames, and tables."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint import save_checkpoint
from conftest import fixed_threads
from data import InputError, Video
from evaluation import metric
from evaluation.causes import CAUSES
from evaluation.occlusion import GAP
from evaluation.postprocess import EncodedVideo
from evaluation.run_length import encode
from hand_made import LEFT, RIGHT, annotation, prediction, truth
from model import build_model
from synthetic.rendering import make_video
from synthetic.scenes import Difficulty
from synthetic.suites import SUITES, make_dataset

# At the end: some of its files have names of ours.
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import gate_measures  # noqa: E402
import gate_tables  # noqa: E402
import study  # noqa: E402

threads = fixed_threads(1)
NOTHING = encode(torch.zeros(1, 8, 8, dtype=torch.bool))[0]


def found_of(*tracks, labels=None, scores=None, ids=None, gates=0):
    """An EncodedVideo of hand-made tracks, lists of a code or None a frame; all gates closed."""
    return EncodedVideo(
        torch.tensor(scores or [0.9] * len(tracks)),
        torch.tensor(labels or [0] * len(tracks)),
        torch.tensor(ids or list(range(len(tracks)))),
        [[code or NOTHING for code in track] for track in tracks],
        torch.zeros(len(tracks), len(tracks[0]) if tracks else 1, gates, dtype=torch.bool),
    )


def assigned(found, *instances):
    """The tracks (T, G) of instances given as tracks are."""
    video = Video(
        1, 8, 8, [Path()] * len(instances[0]), [annotation(instance) for instance in instances]
    )
    tracks = gate_measures.best_labels(found, gate_measures.MIN_SCORE)
    return gate_measures.assign_tracks(gate_measures.frame_overlaps(found, tracks, video))


# Identity switches


def test_a_swap_of_two_tracks_is_two_switches():
    found = found_of(LEFT[:2] + RIGHT[2:], RIGHT[:2] + LEFT[2:])
    given = assigned(found, LEFT, RIGHT)
    assert given.tolist() == [[0, 1], [0, 1], [1, 0], [1, 0]]
    assert gate_measures.count_switches(given) == 2


@pytest.mark.parametrize("returning, switches", [(0, 0), (1, 1)])
def test_coming_back_after_occluded_frames(returning, switches):
    """With the same track it is no switch, with another it is one."""
    tracks = [[LEFT[0], None, None, None], [None] * 4]
    tracks[returning][3] = LEFT[3]
    given = assigned(found_of(*tracks), [LEFT[0], None, None, LEFT[3]])
    assert given[:, 0].tolist() == [0, -1, -1, returning]
    assert gate_measures.count_switches(given) == switches


def test_one_query_under_two_labels_is_one_track():
    found = found_of(LEFT, LEFT, RIGHT, labels=[0, 1, 0], ids=[7, 7, 3])
    given = assigned(found, LEFT, RIGHT)
    assert gate_measures.best_labels(found, gate_measures.MIN_SCORE) == [0, 2]
    assert given.tolist() == [[0, 1]] * 4 and gate_measures.count_switches(given) == 0


def test_a_track_is_kept_while_it_overlaps_enough():
    """Against a better one, but not below the threshold.

    What is not kept goes where it overlaps most.
    """
    overlaps = np.array([[[0.6, 0.0]], [[0.5, 0.9]], [[0.4, 0.9]], [[0.8, 0.6]]])
    assert gate_measures.assign_tracks(overlaps)[:, 0].tolist() == [0, 0, 1, 1]
    assert gate_measures.count_switches(gate_measures.assign_tracks(overlaps)) == 1
    assert gate_measures.assign_tracks(np.array([[[0.9, 0.8], [0.8, 0.1]]])).tolist() == [[1, 0]]


def test_weak_tracks_and_none_at_all():
    assert (assigned(found_of(LEFT, scores=[0.2]), LEFT) == -1).all()
    assert gate_measures.count_switches(assigned(found_of(), LEFT)) == 0


# States


def test_states_and_shares_of_frames():
    areas = np.array([0, 8, 2, 0, 3, 0])
    groups = {
        name: chosen.nonzero()[0].tolist()
        for name, chosen in gate_measures.frame_groups(areas, None).items()
    }
    assert groups == {
        "visible": [1, 2, 4],
        "occluded": [3],
        "outside": [0, 5],
        "visible, clean frame": [],
        "visible, noisy frame": [],
        "0": [3],
        "0-25 %": [2],
        "25-50 %": [4],
        "50-75 %": [],
        "75-100 %": [1],
    }
    noisy = gate_measures.frame_groups(areas, np.array([True, False, True, True, False, False]))
    assert noisy["visible, clean frame"].nonzero()[0].tolist() == [1, 4]
    assert noisy["visible, noisy frame"].nonzero()[0].tolist() == [2]


# AP by occlusion

OCCLUDED = [RIGHT[0], None, None, RIGHT[3]]


def test_one_bin_with_all_instances_is_the_whole_metric():
    ground_truth = truth(annotation(LEFT), annotation(RIGHT, category=2), categories=(1, 2))
    results = [
        prediction(LEFT[:3] + [None]),
        prediction(RIGHT, 0.8),
        prediction(RIGHT, 0.5, category=2),
    ]
    wanted = metric.evaluate_results(results, ground_truth)
    found = gate_measures.scores_by_gap(results, ground_truth)
    assert found["AP by gap"] == {name: -1 for name in GAP.ranges} | {"0": wanted["AP"]}
    assert 0 < wanted["AP"] < 1
    assert found["AR10 by gap"]["0"] == wanted["AR10"]
    assert found["instances by gap"] == {"0": 2, "1-3": 0, "4-6": 0, "7-10": 0, "11+": 0}


def test_a_perfect_result_is_perfect_in_every_bin():
    found = gate_measures.scores_by_gap(
        [prediction(LEFT), prediction(OCCLUDED)], truth(annotation(LEFT), annotation(OCCLUDED))
    )
    for key in ("AP by gap", "AR10 by gap"):
        assert found[key] == {
            "0": pytest.approx(1),
            "1-3": pytest.approx(1),
            "4-6": -1,
            "7-10": -1,
            "11+": -1,
        }


def test_an_unmatched_detection_is_an_error_in_every_bin():
    results = [prediction(LEFT[:1] + [None] * 3, 0.95), prediction(LEFT), prediction(OCCLUDED)]
    found = gate_measures.scores_by_gap(results, truth(annotation(LEFT), annotation(OCCLUDED)))
    assert found["AP by gap"]["0"] == found["AP by gap"]["1-3"] == pytest.approx(0.5)
    assert found["AR10 by gap"]["0"] == found["AR10 by gap"]["1-3"] == 1


# From frames to records


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder with sets of two suites, each of one held-out video.

    In the first, an object is occluded for three of six frames.
    """
    folder = tmp_path_factory.mktemp("sets")
    for name, size in (("occlusion", (6, 48, 80)), ("degraded", (20, 96, 160))):
        make_dataset(
            folder / name, 1, 1, *size, SUITES[name].objects, difficulty=SUITES[name].difficulty
        )
    return folder


@pytest.mark.slow
def test_frames_lost_in_noise_are_found(sets):
    """They are those that differ from the same scene without noise."""
    difficulty = SUITES["degraded"].difficulty
    noisy, clean = (
        make_video(
            np.random.default_rng((0, 1, 0)), 20, 96, 160, SUITES["degraded"].objects, setting
        )[0]
        for setting in (difficulty, replace(difficulty, noisy=0.0))
    )
    lost = (noisy != clean).any((1, 2, 3))
    assert lost.sum() == 4
    (video,) = study.open_suite("degraded", sets / "degraded", 24).videos
    assert gate_measures.noisy_frames(video, difficulty.noise).tolist() == lost.tolist()


@pytest.mark.parametrize(
    "layers, all_layers, last",
    [(2, [0.5, 0, -1, -1, -1], [1, 0, -1, -1, -1]), (0, [-1] * 5, [-1] * 5)],
)
def test_perfect_tracks_with_gates_that_close_when_occluded(
    sets, monkeypatch, layers, all_layers, last
):
    """The second of two layers' gates is open where the object is seen, the first never.

    A model without a gate has none.
    """
    videos = study.open_suite("occlusion", sets / "occlusion", 24)

    def perfect(model, videos, *_):
        for video in videos:
            empty = encode(torch.zeros(1, video.height, video.width, dtype=torch.bool))[0]
            codes = [
                [code or empty for code in entry["segmentations"]] for entry in video.annotations
            ]
            gates = torch.tensor(
                [
                    [[False, code is not None] for code in entry["segmentations"]]
                    for entry in video.annotations
                ]
            )
            count = len(video.annotations)
            yield (
                video,
                EncodedVideo(
                    torch.full((count,), 0.9),
                    torch.tensor([entry["label"] for entry in video.annotations]),
                    torch.arange(count),
                    codes,
                    gates[..., :layers],
                ),
            )

    monkeypatch.setattr(gate_measures, "segment_videos", perfect)
    monkeypatch.setattr(gate_measures, "milliseconds_per_frame", lambda *_: 7.0)
    found = gate_measures.measure_suite(None, videos, None, None, 96, Difficulty())
    perfect_scores = dict.fromkeys(["AP", "AP50", "AR10", "HOTA", "AssA"], pytest.approx(1))
    assert found["scores"] == perfect_scores | {"switches": 0, "ms per frame": 7.0}
    assert found["causes"] == dict.fromkeys(CAUSES, 0) | {"best linking": pytest.approx(1)}
    assert found["instances by gap"] == {"0": 0, "1-3": 1, "4-6": 0, "7-10": 0, "11+": 0}
    assert [found["open by state"][name] for name in gate_measures.STATES] == all_layers
    assert [found["last open by state"][name] for name in gate_measures.STATES] == last
    assert [found["last open by share"][name] for name in gate_measures.SHARES] == (
        [0, -1, -1, 1, 1] if layers else [-1] * 5
    )


@pytest.mark.slow
def test_measure_then_table(sets, tmp_path, capsys):
    """Of random weights; nothing is written over."""
    config = {"preset": "toy", "propagation": "gated", "args": {"seed": 3}}
    save_checkpoint(
        tmp_path / "last.pt", {"model": build_model("toy", 6).state_dict(), "config": config}
    )
    arguments = [
        "measure",
        str(tmp_path / "last.pt"),
        "--suites",
        "occlusion",
        "--sets",
        str(sets),
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "new/study.json"),
    ]
    study.measure(study.parse_arguments(arguments))
    (record,) = json.loads((tmp_path / "new/study.json").read_text())
    assert [record[key] for key in ("name", "seed", "suite", "videos", "amp")] == [
        "gated, additive",
        3,
        "occlusion",
        1,
        "float32",
    ]
    assert 0 <= record["scores"]["AP"] <= 1 and record["scores"]["ms per frame"] > 0
    assert record["AP by gap"].keys() == GAP.ranges.keys()
    capsys.readouterr()
    study.table(study.parse_arguments(["table", str(tmp_path / "new/study.json")]))
    printed = capsys.readouterr().out
    assert "| occlusion | gated, additive | 1 |" in printed
    assert "| suite | name | n | wrong class | loose mask | broken track |" in printed
    with pytest.raises(InputError, match="exists"):
        study.measure(study.parse_arguments(arguments))
    with pytest.raises(InputError, match="2 names for 1 checkpoints"):
        study.measure(study.parse_arguments([*arguments, "--names", "one", "two"]))


# Tables


def record_of(name, seed, average, switches=0.0, suite="easy", by_gap=(0.5, -1.0), checksum="a"):
    """A record with hand-made numbers, of bins of its own."""
    bins, shares = dict(zip(("0", "1-3"), by_gap)), {"0": 0.25, "75-100 %": 0.75}
    return {
        "name": name,
        "seed": seed,
        "suite": suite,
        "checksum": checksum,
        "instances by gap": {"0": 40, "1-3": 0},
        "scores": {"AP": average, "switches": switches},
        "AP by gap": bins,
        "AR10 by gap": bins,
        "open by state": {"visible": -1.0},
        "last open by state": {"visible": -1.0},
        "open by share": shares,
        "last open by share": shares,
    }


def write_records(path, *records):
    path.write_text(json.dumps(records))
    return str(path)


def test_older_records_lack_columns(tmp_path, capsys):
    records = [record_of("new", 0, 0.5), record_of("old", 0, 0.4)]
    records[0]["scores"]["HOTA"] = 0.25
    (tmp_path / "study.json").write_text(json.dumps(records))
    study.table(study.parse_arguments(["table", str(tmp_path / "study.json")]))
    printed = capsys.readouterr().out
    assert "| easy | new | 1 | 50.0 | 0.00 | 25.0 |" in printed
    assert "| easy | old | 1 | 40.0 | 0.00 | - |" in printed


def test_mean_and_spread_over_seeds(tmp_path, capsys):
    """Of records from several files.

    A single record has no spread, and what is not defined is a dash.
    """
    first = write_records(
        tmp_path / "first.json",
        record_of("gated", 0, 0.30, 1.0),
        record_of("plain", 0, 0.25, by_gap=(0.2, 0.4)),
    )
    second = write_records(
        tmp_path / "second.json",
        record_of("gated", 1, 0.40, 2.0),
        record_of("gated", 0, 0.1, suite="occlusion"),
    )
    study.table(study.parse_arguments(["table", first, second]))
    lines = capsys.readouterr().out.splitlines()
    assert "| easy | gated | 2 | 35.0 ± 7.1 | 1.50 ± 0.71 |" in lines
    assert "| easy | plain | 1 | 25.0 | 0.00 |" in lines
    assert "| occlusion | gated | 1 | 10.0 | 0.00 |" in lines
    start = lines.index(gate_tables.TITLES["AP by gap"])
    assert lines[start + 2 : start + 7] == [
        "| suite | name | n | 0 | 1-3 |",
        "| --- | --- | --- | --- | --- |",
        "| easy | *instances* |  | 40 | 0 |",
        "| easy | plain | 1 | 20.0 | 40.0 |",
        # In the order of CONFIGURATIONS.
        "| easy | gated | 2 | 50.0 ± 0.0 | - |",
    ]
    study.table(study.parse_arguments(["table", first, second, "--names", "plain"]))
    printed = capsys.readouterr().out
    assert "gated" not in printed
    assert "wrong class" not in printed  # older records lack causes
    with pytest.raises(InputError, match="no record has the name clip"):
        study.table(study.parse_arguments(["table", first, "--names", "clip", "gated"]))


@pytest.mark.parametrize(
    "records, message",
    [
        ([record_of("gated", 0, 0.3), record_of("gated", 0, 0.4)], "two records of seed 0"),
        (
            [record_of("gated", 0, 0.3), record_of("gated", 1, 0.4, checksum="b")],
            "other videos of the suite easy",
        ),
        ([{"name": "gated"}], "no file that `measure` has written"),
        ([], "no file that `measure` has written"),
        ([record_of("gated", 0, "high")], "no file that `measure` has written"),
        ([record_of("gated", 0, 0.3, checksum=None)], "no file that `measure` has written"),
    ],
)
def test_records_that_cannot_be_put_together(tmp_path, records, message):
    with pytest.raises(InputError, match=message):
        gate_tables.read_groups([write_records(tmp_path / "study.json", *records)], order=[])


@pytest.mark.slow
def test_plots(tmp_path):
    """A picture of each kind for every suite."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    path = write_records(
        tmp_path / "study.json",
        record_of("gated", 0, 0.3),
        record_of("gated", 1, 0.4, by_gap=(0.3, 0.2)),
        record_of("plain", 0, 0.2),
    )
    study.table(study.parse_arguments(["table", path, "--plot", str(tmp_path / "plots")]))
    assert sorted(file.name for file in (tmp_path / "plots").iterdir()) == [
        "AP_by_gap_easy.png",
        "last_open_by_share_easy.png",
        "open_by_share_easy.png",
    ]


# Training


def test_no_run_is_left_behind(tmp_path):
    """Whatever ends the study, Ctrl-C too."""
    said = open(tmp_path / "said.txt", "w")
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    with pytest.raises(KeyboardInterrupt), study.ending({tmp_path: (process, said)}):
        raise KeyboardInterrupt
    assert process.returncode == -signal.SIGTERM and said.closed
