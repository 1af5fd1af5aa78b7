"""Inference over data sets equals `segment_video`, distributed, resumed, and for any length.

Results are compared byte by byte, so all tests use one thread: rounding on a CPU depends on the
number of threads.
"""

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
import zipfile
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from pycocotools import mask as rle

import evaluate
from conftest import fixed_threads
from data import InputError, Video, VideoSet, frames_at_test_size
from evaluation import postprocess
from evaluation.inference import FrameBatches, share
from evaluation.metric import evaluate_results
from evaluation.postprocess import EncodedVideo
from evaluation.unfinished import Unfinished
from processes import ENVIRONMENT, REPOSITORY, free_port, wait_until
from synthetic.suites import make_dataset
from test_metric import METRICS, ap_numbers
from test_model import HEIGHT, WIDTH, make_frames, make_model
from training import train_one_step

pytestmark = pytest.mark.slow  # whole programs

LENGTHS = (5, 2, 4, 3, 2, 2, 3, 2)  # frames of the videos
# The frames are shrunk, so that masks are enlarged again.
SIZES = ["--short-side", "48", "--top-k", "4"]
ONE_THREAD = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
one_thread = fixed_threads(1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with set/, whose held-out videos have LENGTHS frames, and run/last.pt, a model of
    one training step.
    """
    folder = tmp_path_factory.mktemp("inference")
    make_dataset(
        folder / "set",
        train_videos=1,
        valid_videos=len(LENGTHS),
        frames=max(LENGTHS),
        height=64,
        width=80,
        objects=(1, 3),
    )
    content = json.loads((folder / "set/valid.json").read_text())
    for entry in content["videos"] + content["annotations"]:
        entry["length"] = LENGTHS[entry.get("video_id", entry["id"]) - 1]
        for name in {"file_names", "segmentations", "bboxes", "areas"} & entry.keys():
            entry[name] = entry[name][: entry["length"]]
    for name in ("segmentations", "bboxes", "areas"):
        content["annotations"][0][name][0] = None  # an object that comes later
    (folder / "set/valid.json").write_text(json.dumps(content))
    train_one_step(folder / "set", folder / "run")
    return folder


def arguments(trained, output, *more):
    """The command line of an evaluation.

    Without --workers in `more`, this process reads the frames itself.
    """
    return [
        "--weights",
        str(trained / "run/last.pt"),
        "--data-root",
        str(trained / "set"),
        *SIZES,
        "--device",
        "cpu",
        "--output",
        str(output),
        "--workers",
        "0",
        *more,
    ]


def run(*given):
    return evaluate.main(evaluate.parse_arguments([str(argument) for argument in given]))


@pytest.fixture(scope="module")
def whole(trained):
    """The folder of an evaluation that nothing disturbed."""
    run(*arguments(trained, trained / "whole"))
    return trained / "whole"


@pytest.fixture(scope="module")
def ground_truth(trained):
    return json.loads((trained / "set/valid.json").read_text())


@pytest.fixture(scope="module")
def videos(trained):
    return VideoSet(trained / "set/valid.json", trained / "set/valid/JPEGImages").videos


# A video as codes

MODES = {
    "gated": {},
    "memory": {},
    "clip": {},
    "two frames": {"propagation": "gated", "clip_length": 2},
}


def make(mode):
    return make_model(**({"propagation": mode} | MODES.get(mode, {})))


def assert_same(found, expected, layers):
    """An EncodedVideo and a VideoResult of one video; layers: of the tracker, that have gates."""
    for name in ("scores", "labels", "track_ids"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    masks = [
        torch.from_numpy(rle.decode(codes)).permute(2, 0, 1).bool() for codes in found.segmentations
    ]
    assert torch.equal(torch.stack(masks), expected.masks)
    assert found.gates.shape == (len(masks), expected.masks.shape[1], layers)
    assert found.gates.dtype == torch.bool


@pytest.mark.parametrize("mode", MODES)
def test_codes_are_the_masks_of_segment_video(mode):
    """However the frames come in: one by one, two at once, so that the last batch is short, and all
    at once.
    """
    model, frames = make(mode), make_frames(3)
    layers = 0 if mode in ("memory", "clip") else 3
    expected = model.segment_video(frames, (50, 70), top_k=12)
    assert expected.masks.any() and not expected.masks.all()
    for count in (1, 2, 3):
        assert_same(model.encode_video(frames.split(count), (50, 70), top_k=12), expected, layers)


# less than a mask; 3 and 6 masks of 64 x 64 pixels, of 20 a frame; two frames with their 20 masks
# each, of three frames
@pytest.mark.parametrize("pixels", [1, 3 * 64 * 64, 6 * 64 * 64, 2 * 20 * HEIGHT * WIDTH])
def test_however_few_masks_are_there_at_once(monkeypatch, pixels):
    model, frames = make("two frames"), make_frames(3)
    expected = model.segment_video(frames, top_k=12)
    monkeypatch.setattr(postprocess, "MASK_PIXELS", pixels)
    assert_same(model.encode_video([frames], top_k=12), expected, layers=3)


# logits of 20 queries at stride 4, in float32: none kept, one frame, two of three frames
@pytest.mark.parametrize("frames", [0, 1, 2])
def test_however_few_logits_are_kept(monkeypatch, frames):
    model, video = make("gated"), make_frames(3)
    expected = model.encode_video([video], top_k=12)
    monkeypatch.setattr(postprocess, "KEPT_LOGITS", frames * 20 * HEIGHT * WIDTH // 16 * 4)
    found = model.encode_video([video], top_k=12)
    assert found.segmentations == expected.segmentations
    assert torch.equal(found.scores, expected.scores)


def test_all_pairs_are_encoded():
    """top_k larger than queries times classes, and a generator of batches of different lengths."""
    model, frames = make("gated"), make_frames(4)
    found = model.encode_video((part for part in (frames[:1], frames[1:])), top_k=1000)
    assert_same(found, model.segment_video(frames, top_k=1000), layers=3)
    assert all(code["size"] == [HEIGHT, WIDTH] for codes in found.segmentations for code in codes)


@pytest.mark.parametrize("mode", ["gated", "gated+memory"])
def test_gates_are_those_of_every_step(mode, monkeypatch):
    """Open where the tracker's logit is not negative.

    `step` and a look at the tracker itself agree on it.
    """
    model, frames, state, seen, logits = make(mode), make_frames(4), None, [], []
    forward = model.tracker.forward

    def watched(frame_queries, state):
        (prediction,), state = forward(frame_queries, state)
        logits.append(torch.stack(prediction.gate_logits)[:, -1, 0])
        return [prediction], state

    monkeypatch.setattr(model.tracker, "forward", watched)
    for frame in frames:
        tracks, state = model.step(frame, state, top_k=1000)
        seen.append(dict(zip(tracks.track_ids.tolist(), tracks.gates)))
    by_frame = torch.stack(logits) >= 0  # (T, D, Q)
    assert 0 < by_frame.double().mean() < 1

    found = model.encode_video([frames], top_k=12)
    for track, gates in zip(found.track_ids.tolist(), found.gates, strict=True):
        assert torch.equal(gates, torch.stack([tracks[track] for tracks in seen]))
        assert torch.equal(gates, by_frame[..., track])


def test_a_plain_tracker_has_no_gates():
    assert make("plain").encode_video([make_frames(2)], top_k=5).gates.shape == (5, 2, 0)


def test_what_is_no_video_is_not_encoded():
    model = make("gated")
    with pytest.raises(ValueError, match="the video has no frames"):
        model.encode_video([])
    with pytest.raises(ValueError, match=r"must have one size.*\(40, 50\).*\(40, 56\)"):
        model.encode_video([make_frames(1), make_frames(1, 40, 50)])
    with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        model.train().encode_video([make_frames(1)])


# Frames and shares


@pytest.mark.parametrize("chunk", [1, 2, 3, 32])
def test_batches_hold_all_frames_in_order(videos, chunk):
    batches = FrameBatches(videos, 48, 1333, chunk)
    found = [batches[index] for index in range(len(batches))]
    assert all(0 < len(batch) <= chunk for batch in found)
    ends = set(accumulate(len(batch) for batch in found))
    # A batch ends where a video ends.
    assert ends >= set(accumulate(LENGTHS))
    # And no earlier than it must.
    assert len(found) == sum(-(-length // chunk) for length in LENGTHS)
    expected = torch.stack(
        [frame for video in videos for frame in frames_at_test_size(video, 48, 1333)]
    )
    assert expected.shape[2:] == (48, 60) and torch.equal(torch.cat(found), expected)


def blank_videos(*lengths):
    """Videos of so many frames that are on no disk."""
    return [
        Video(number, 4, 4, [Path(f"{frame}.jpg") for frame in range(length)], [])
        for number, length in enumerate(lengths, 1)
    ]


@pytest.mark.parametrize(
    "lengths", [(5, 2, 4, 3, 2, 2, 3, 2), (1, 1, 1), (100, 1, 1, 1, 1, 1), (7,), ()], ids=str
)
@pytest.mark.parametrize("world", range(1, 6))
def test_every_video_has_one_process_and_none_has_much_more_than_another(lengths, world):
    everything = blank_videos(*lengths)
    shares = [share(everything, rank, world) for rank in range(world)]
    assert sorted(video.id for own in shares for video in own) == [video.id for video in everything]
    frames = [sum(len(video.files) for video in own) for own in shares]
    assert max(frames) <= min(frames) + max(lengths, default=0)


# Unfinished results

SETTING = {"weights": "last.pt", "top_k": 10, "amp": "torch.float32"}
CATEGORIES = [(3, "cat"), (90, "dog")]
CODES = [{"size": [4, 4], "counts": "`0"}, {"size": [4, 4], "counts": "4\\<"}]


def found_in(video):
    """Two instances in a video of odd id, none in the others."""
    count = 2 * (video.id % 2)
    frames = len(video.files)
    return EncodedVideo(
        torch.tensor([0.25, 1e-7])[:count],
        torch.tensor([1, 0])[:count],
        torch.tensor([7, 5])[:count],
        [[code] * frames for code in CODES[:count]],
        torch.arange(count * frames * 3).view(count, frames, 3) % 2 == 0,
    )


def test_what_is_done_is_not_done_again(tmp_path):
    everything, folder = blank_videos(3, 2, 4, 1), tmp_path / "out/unfinished"
    assert Unfinished(folder, SETTING).remaining(everything) == everything
    for done in (everything[2], everything[0]):
        Unfinished(folder, SETTING).save(done, found_in(done))
    assert Unfinished(folder, SETTING).remaining(everything) == [everything[1], everything[3]]


def test_saved_results_are_read_back_exactly(tmp_path):
    unfinished = Unfinished(tmp_path, SETTING)
    for video in blank_videos(3, 2):
        found = found_in(video)
        unfinished.save(video, found)
        again = unfinished.load(video)
        assert again.scores.tolist() == found.scores.tolist()
        assert again.segmentations == found.segmentations
        assert torch.equal(again.labels, found.labels)
        assert torch.equal(again.track_ids, found.track_ids)
        assert again.gates.dtype == torch.bool and again.gates.tolist() == found.gates.tolist()


@pytest.mark.parametrize(
    "change, named",
    [
        ({"top_k": 20}, "top_k"),
        ({"short_side": 360}, "short_side"),
        ({"weights": "best.pt", "amp": "off"}, "weights, amp"),
    ],
)
def test_results_of_another_setting_are_refused(tmp_path, change, named):
    everything = blank_videos(3)
    Unfinished(tmp_path, SETTING).save(everything[0], found_in(everything[0]))
    with pytest.raises(InputError, match=rf"of another setting \({named} differ\)") as refusal:
        Unfinished(tmp_path, SETTING | change)
    assert str(tmp_path) in str(refusal.value)
    assert Unfinished(tmp_path, SETTING).remaining(everything) == []  # and stay as they were


@pytest.mark.parametrize("edit", [("0.5", "0.6"), ('"labels"', '"label"'), ("{", "[1, {")])
def test_edited_results_are_refused(tmp_path, edit):
    (video,) = blank_videos(3)
    unfinished = Unfinished(tmp_path, SETTING)
    unfinished.save(video, dataclasses.replace(found_in(video), scores=torch.tensor([0.5, 0.5])))
    saved = unfinished.path(video).read_text()
    edited = saved.replace(*edit, 1) + "]" * edit[1].startswith("[")
    assert edited != saved
    unfinished.path(video).write_text(edited)
    with pytest.raises(InputError, match="is not as it was written: remove it"):
        unfinished.load(video)


def test_a_setting_of_another_form_is_refused(tmp_path):
    (tmp_path / "setting.json").write_text("[]")
    with pytest.raises(InputError, match="does not hold a setting"):
        Unfinished(tmp_path, SETTING)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_joined_results_are_one_list_in_the_order_of_the_videos(tmp_path, count):
    everything = blank_videos(*[1] * count)
    unfinished = Unfinished(tmp_path / "unfinished", SETTING)
    for video in reversed(everything):
        unfinished.save(video, found_in(video))
    unfinished.join(everything, CATEGORIES, tmp_path / "results.json")
    unfinished.remove()
    expected = [
        {"video_id": video.id, "score": score, "category_id": category_id, "segmentations": [code]}
        for video in everything
        if video.id % 2
        for score, category_id, code in zip(torch.tensor([0.25, 1e-7]).tolist(), (90, 3), CODES)
    ]
    assert json.loads((tmp_path / "results.json").read_text()) == expected
    # No folder, and no part of a file.
    assert list(tmp_path.iterdir()) == [tmp_path / "results.json"]


# The whole evaluation


def assert_equal_results(folder, whole):
    """The same results.json to the last byte, without unfinished results."""
    assert (folder / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    assert not (folder / "unfinished").exists()


def test_results_are_those_of_segment_video(trained, whole, videos):
    model, _ = evaluate.model_from_checkpoint(trained / "run/last.pt")
    results, areas = json.loads((whole / "results.json").read_text()), []
    assert [entry["video_id"] for entry in results] == [
        video.id for video in videos for _ in range(4)
    ]
    for video in videos:
        expected = model.segment_video(
            frames_at_test_size(video, 48), (video.height, video.width), 4
        )
        own = [entry for entry in results if entry["video_id"] == video.id]
        assert [entry["score"] for entry in own] == pytest.approx(
            expected.scores.tolist(), rel=1e-5
        )
        assert [entry["category_id"] for entry in own] == [
            label + 1 for label in expected.labels.tolist()
        ]
        for entry, masks in zip(own, expected.masks, strict=True):
            assert torch.equal(
                torch.from_numpy(rle.decode(entry["segmentations"])).permute(2, 0, 1).bool(), masks
            )
            areas += rle.area(entry["segmentations"]).tolist()
    # Not the same few masks all the time.
    assert len(set(areas)) > 10


@pytest.mark.parametrize(
    "more", [("--chunk", "1"), ("--chunk", "4", "--workers", "2"), ("--chunk", "32")], ids=" ".join
)
def test_chunks_and_workers_change_no_byte(trained, whole, tmp_path, more):
    run(*arguments(trained, tmp_path, *more))
    assert_equal_results(tmp_path, whole)


def test_two_processes_write_what_one_writes(trained, whole, tmp_path):
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        free_port(),
    ]
    process = subprocess.run(
        [sys.executable, *launcher, str(REPOSITORY / "evaluate.py"), *arguments(trained, tmp_path)],
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert_equal_results(tmp_path, whole)
    frames = [int(line.split()[0]) for line in process.stdout.splitlines() if " frames in " in line]
    assert len(frames) == 2 and sum(frames) == sum(LENGTHS) and min(frames) > 0
    assert (tmp_path / "metrics.json").read_text() == (whole / "metrics.json").read_text()


def test_a_killed_evaluation_goes_on_where_it_was(trained, whole, tmp_path, capsys):
    """kill -9 as soon as a video is done.

    Then the same command does the others, and nobody can tell.
    """

    def done():
        return [path for path in (tmp_path / "unfinished").glob("*.json") if path.stem.isdecimal()]

    # On a busy machine the murderer may come too late.
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "evaluate.py"), *arguments(trained, tmp_path)],
            env=ONE_THREAD,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            wait_until(done, process)
        finally:
            process.kill()
        _, printed = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL), printed.decode()[-3000:]
        if 0 < len(done()) < len(LENGTHS):
            break
        shutil.rmtree(tmp_path)
    count = len(done())
    assert 0 < count < len(LENGTHS), (
        f"it was killed with {count} of {len(LENGTHS)} videos done, not amid them"
    )
    assert not (tmp_path / "results.json").exists()

    with pytest.raises(InputError, match="short_side differ"):
        run(*arguments(trained, tmp_path, "--short-side", "64"))
    assert len(done()) == count
    capsys.readouterr()
    run(*arguments(trained, tmp_path))
    assert f"{count} of them done before" in capsys.readouterr().out
    assert_equal_results(tmp_path, whole)


def test_weights_that_make_no_numbers_write_no_results(trained, tmp_path):
    """The video is named; another one, or other weights, may have results later."""
    checkpoint = torch.load(trained / "run/last.pt", weights_only=True)
    checkpoint["model"]["tracker.query_feat.weight"].fill_(math.inf)
    torch.save(checkpoint, tmp_path / "damaged.pt")
    with pytest.raises(
        FloatingPointError, match=r"valid/JPEGImages/\d+: the scores are not finite"
    ):
        run("--weights", tmp_path / "damaged.pt", *arguments(trained, tmp_path / "out")[2:])
    assert [path.name for path in (tmp_path / "out").rglob("*.json")] == ["setting.json"]


def test_the_archive_holds_the_results_and_nothing_else(whole):
    with zipfile.ZipFile(whole / "results.json.zip") as archive:
        assert archive.namelist() == ["results.json"]
        assert archive.read("results.json") == (whole / "results.json").read_bytes()


# A results file scored alone


def perfect(ground_truth):
    """The ground truth as results, with null where an object is not seen."""
    return [
        {
            "video_id": annotation["video_id"],
            "category_id": annotation["category_id"],
            "score": 1,
            "segmentations": annotation["segmentations"],
        }
        for annotation in ground_truth["annotations"]
    ]


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def test_the_ground_truth_scores_one(trained, ground_truth, tmp_path):
    results = write(tmp_path / "own.json", perfect(ground_truth))
    metrics = run(
        "--results",
        results,
        "--annotations",
        trained / "set/valid.json",
        "--output",
        tmp_path / "out",
    )
    assert [metrics[name] for name in ("AP", "AP50", "AP75", "AR10", "AR100")] == pytest.approx(
        [1] * 5
    )
    # This set has all classes.
    assert all(value == pytest.approx(1) for value in metrics["per_class"].values())
    # Under the name that the server takes.
    with zipfile.ZipFile(tmp_path / "out/results.json.zip") as archive:
        assert archive.namelist() == ["results.json"]
        assert archive.read("results.json") == results.read_bytes()


def in_two_parts(ground_truth, folder):
    """The first three videos and the others, each with their annotations, as two files."""

    def part(keep):
        return ground_truth | {
            "videos": [video for video in ground_truth["videos"] if keep(video["id"])],
            "annotations": [
                entry for entry in ground_truth["annotations"] if keep(entry["video_id"])
            ],
        }

    parts = {"short": part(lambda number: number <= 3), "long": part(lambda number: number > 3)}
    return parts, [write(folder / f"{name}.json", content) for name, content in parts.items()]


def test_two_parts_are_scored_each_and_averaged(ground_truth, tmp_path):
    parts, paths = in_two_parts(ground_truth, tmp_path)
    results = perfect(ground_truth)
    # Some in the wrong class, so that scores differ.
    for number, entry in enumerate(results):
        entry["score"] = 1 - number / 100
        entry["category_id"] = (
            entry["category_id"] % 6 + 1 if number % 3 == 0 else entry["category_id"]
        )
    run(
        "--results",
        write(tmp_path / "r.json", results),
        "--annotations",
        *paths,
        "--output",
        tmp_path / "out",
    )
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())

    own = {"short": [entry for entry in results if entry["video_id"] <= 3]}
    own["long"] = [entry for entry in results if entry not in own["short"]]
    expected = {name: evaluate_results(own[name], part) for name, part in parts.items()}
    found = {name: ap_numbers(part) for name, part in metrics["parts"].items()}
    assert found == expected and expected["short"] != expected["long"]
    assert 0 < expected["short"]["AP"] < 1 and 0 < expected["long"]["AP"] < 1

    def mean(values):
        defined = [value for value in values if value >= 0]
        return pytest.approx(sum(defined) / len(defined) if defined else -1)

    def both(select):
        return mean([select(part) for part in expected.values()])

    per_class = metrics["per_class"]
    assert list(per_class) == [category["name"] for category in ground_truth["categories"]]
    assert all(
        value == both(lambda part: part["per_class"][name]) for name, value in per_class.items()
    )
    names = [*METRICS, "per_class", "causes", "oracle", "groups", "tracking", "parts"]
    assert list(metrics) == names
    assert all(metrics[name] == both(lambda part: part[name]) for name in METRICS)
    in_parts = [part["groups"]["gap"]["0"]["AP"] for part in metrics["parts"].values()]
    assert metrics["groups"]["gap"]["0"]["AP"] == mean(in_parts)
    # Tracks are counted in all videos together.
    write(tmp_path / "all.json", ground_truth)
    files = "--results", tmp_path / "r.json", "--annotations", tmp_path / "all.json"
    run(*files, "--output", tmp_path / "all")
    together = json.loads((tmp_path / "all/metrics.json").read_text())
    assert metrics["tracking"] == together["tracking"]
    in_parts = [part["tracking"]["tracks"] for part in metrics["parts"].values()]
    assert metrics["tracking"]["tracks"] == sum(in_parts) and min(in_parts) > 0


def test_results_of_an_unknown_video_are_not_even_zipped(ground_truth, tmp_path):
    _, paths = in_two_parts(ground_truth, tmp_path)
    results = perfect(ground_truth)
    results[-1]["video_id"] = 999
    with pytest.raises(InputError, match=rf"results\[{len(results) - 1}\] has video_id 999"):
        run(
            "--results",
            write(tmp_path / "r.json", results),
            "--annotations",
            *paths,
            "--output",
            tmp_path / "out",
        )
    assert not list(tmp_path.glob("**/*.zip*"))


def test_parts_of_one_name_are_both_scored(whole, ground_truth, tmp_path):
    """a/gt.json and b/gt.json are two files."""
    for name, half in (("a", ground_truth["videos"][:4]), ("b", ground_truth["videos"][4:])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "gt.json").write_text(json.dumps(ground_truth | {"videos": half}))
    metrics = run(
        "--results",
        whole / "results.json",
        "--annotations",
        tmp_path / "a/gt.json",
        tmp_path / "b/gt.json",
        "--output",
        tmp_path,
    )
    assert len(metrics["parts"]) == 2


def test_what_a_kill_left_of_a_removed_folder_is_not_taken_for_unfinished(tmp_path, videos):
    """The folder is moved away before the files in it are removed, one by one."""
    unfinished = Unfinished(tmp_path / "unfinished", {"top_k": 10})
    (tmp_path / "unfinished.done").mkdir()
    (tmp_path / "unfinished.done/7.json").write_text("[]")
    unfinished.remove()
    assert list(tmp_path.iterdir()) == []
    assert Unfinished(tmp_path / "unfinished", {"top_k": 20}).remaining(videos) == videos


def test_parts_of_other_categories_are_refused(whole, ground_truth, tmp_path):
    """And where annotations are missing in a part, the numbers of that part are undefined."""
    (tmp_path / "one.json").write_text(json.dumps(ground_truth))
    for name, change in (
        ("other", {"categories": ground_truth["categories"][1:]}),
        ("bare", {"annotations": None}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(ground_truth | change))
    given = (
        "--results",
        whole / "results.json",
        "--output",
        tmp_path / "scores",
        "--annotations",
        tmp_path / "one.json",
    )
    with pytest.raises(InputError, match="other.json has other categories than"):
        run(*given, tmp_path / "other.json")
    assert not (tmp_path / "scores").exists()
    assert run(*given, tmp_path / "bare.json")["parts"]["bare"]["AP"] == -1


@pytest.mark.parametrize(
    "lengths, frames",
    [((4, 1, 1, 1, 1), [4, 4]), ((100, 1, 1, 1, 1, 1), [100, 5]), ((1, 5, 1, 2, 1, 8), [8, 5, 5])],
    ids=str,
)
def test_a_long_video_is_shared_against_many_short_ones(lengths, frames):
    shares = [share(blank_videos(*lengths), rank, len(frames)) for rank in range(len(frames))]
    found = [sum(len(video.files) for video in own) for own in shares]
    assert sorted(found, reverse=True) == frames


@pytest.mark.parametrize(
    "before, now", [({"top_k": 1}, {"top_k": 2}), ({"top_k": 1}, {}), ({}, {"top_k": 1})]
)
def test_a_setting_that_lacks_a_part_is_another(tmp_path, before, now):
    """Also where a part of the setting has become known, or has gone."""
    Unfinished(tmp_path / "unfinished", {"seed": 0} | before)
    Unfinished(tmp_path / "unfinished", {"seed": 0} | before)  # the same setting continues
    with pytest.raises(InputError, match=r"another setting \(top_k differ\)"):
        Unfinished(tmp_path / "unfinished", {"seed": 0} | now)
