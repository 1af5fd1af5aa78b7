"""Ablation study of the gate: AP by occlusion, identity switches, and when gates are open.

    python train.py --stage vita --preset small --output runs/study/vita \\
        --render easy occlusion look-alike degraded ...
    python benchmarks/study.py train --init runs/study/vita/last.pt --seeds 3
    python benchmarks/study.py measure runs/study/*-*/last.pt
    python benchmarks/study.py table runs/study.json --plot runs/study/plots

`train` trains the tracker of every configuration with several seeds, starting from one VITA model
with a frozen detector (the last stage of the paper). Only the flags of CONFIGURATIONS and the seed
differ. Several runs share a GPU, because one does not saturate it. `measure` runs every checkpoint
on the held-out videos of every suite (synthetic/suites.py; missing suites are written) and writes
one record each into a JSON file. `table` prints means and standard deviations over the records with
the same name and suite.

AP by occlusion: ground truth instances are binned by their longest gap, the number of consecutive
frames without a mask between two frames with one (occluded, or outside the frame). In the AP of a
bin, instances of other bins are ignored like those of other area ranges. An unmatched detection has
no gap, so it counts as a false positive in every bin. Bins with few instances therefore have a
lower AP; compare models, not bins. AR10 ignores false positives and is comparable across bins.

Identity switches: in each frame, tracks with a score of at least 0.3 are assigned to instances by
mask IoU (Hungarian matching, at least 0.5, ignoring classes). An instance keeps its track of the
previous frame if possible, as in CLEAR-MOT (Bernardin and Stiefelhagen 2008). A switch is an
instance whose track differs from its last one, possibly after an occlusion. A query with several
labels is one track. Losing a track without getting another is not a switch; AP covers it.

Gates: the share of open gates, over frames and decoder layers, of the track that an instance has
most often, if it has it in at least half of its visible frames. A closed gate resets the query to
the one propagated from the previous frame, so the gate of the last layer decides whether anything
from this frame is kept; it is also listed separately. An object is visible where it has a mask,
hidden between two frames with a mask, and outside before the first and after the last. Its visible
share is relative to its largest area in the video.

Letters: T frames, G ground truth instances, K tracks, D decoder layers.
"""
import argparse
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from pycocotools import mask as rle
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from checkpoint import default_short_side, model_from_checkpoint  # noqa: E402
from data import Video, VideoSet, read_frame  # noqa: E402
from evaluate import check_categories, open_suite  # noqa: E402
from evaluation.inference import segment_videos, to_entries  # noqa: E402
from evaluation.metric import (  # noqa: E402
    accumulate,
    evaluate_results,
    mean_defined,
    summarize,
    track_rles,
)
from evaluation.postprocess import EncodedVideo  # noqa: E402
from model import GRAttVIS  # noqa: E402
from runtime.device import choose_amp, choose_device  # noqa: E402
from runtime.errors import InputError, cli_errors  # noqa: E402
from runtime.files import checksum, read_json, save_json  # noqa: E402
from runtime.flags import at_least  # noqa: E402
from synthetic.scenes import Difficulty  # noqa: E402
from synthetic.suites import SUITES  # noqa: E402
from viewing.overlays import best_labels  # noqa: E402
from viewing.plots import new_figure, require_matplotlib  # noqa: E402

CONFIGURATIONS = {  # name: flags of train.py
    "plain": ("--propagation", "plain"),
    # As released: closed queries attend a little more.
    "gated": ("--propagation", "gated"),
    "gated-blocked": ("--propagation", "gated", "--gate-mask", "blocked"),     # as in the paper
    "memory": ("--propagation", "memory"),
    "gated+memory": ("--propagation", "gated+memory"),
    "gate-loss": ("--propagation", "gated", "--gate-weight", "1"),
    # About as many frames a step.
    "long-clips": ("--propagation", "gated", "--frames", "10", "--reach", "12", "--batch", "10"),
    # Over all clips of a video, as in CTVIS.
    "contrast": ("--propagation", "gated", "--similarity-span", "video"),
    "query-noise": ("--propagation", "gated", "--query-noise", "0.5"),         # as in DVIS
}
COMMON = (
    "--stage", "grattvis", "--preset", "small", "--render", "easy", "occlusion", "look-alike",
    "degraded", "--frames", "6", "--reach", "10", "--batch", "16", "--short-sides", "128",
    "--test-short-side", "128", "--lr", "5e-4", "--warmup", "100", "--workers", "2", "--log-every",
    "100",
)
MAX_LONG_SIDE, TOP_K = 1333, 10
MIN_SCORE = 0.3                                # of a track that can be given to an instance
MIN_IOU = 0.5
# Frames, both ends included.
GAPS = {"0": (0, 0), "1-3": (1, 3), "4-6": (4, 6), "7-10": (7, 10), "11+": (11, float("inf"))}
# Lower end excluded.
SHARES = ("0", "0-25 %", "25-50 %", "50-75 %", "75-100 %")
STATES = ("visible", "hidden", "outside", "visible, clean frame", "visible, noisy frame")
TITLES = {  # what a record holds, each a number for every column; -1 where it is not defined
    "scores": "Scores, percent; identity switches a video",
    "AP by gap": "AP by occlusion (longest gap, frames), percent",
    "AR10 by gap": "AR10 by occlusion (longest gap, frames), percent",
    "open by state": "Open gates by state of the object, all layers, percent",
    "last open by state": "Open gates by state of the object, last layer, percent",
    "open by share": "Open gates by visible share of the object, all layers, percent",
    "last open by share": "Open gates by visible share of the object, last layer, percent",
}


# Training

@contextmanager
def ending(running: dict[Path, tuple[subprocess.Popen, IO]]) -> Iterator[None]:
    """However it is left, what is still running then is ended."""
    try:
        yield
    finally:
        for process, log in running.values():
            process.terminate()
            process.wait()
            log.close()


def train(args: argparse.Namespace) -> None:
    """Run train.py for every configuration and seed, so many at a time, on the GPUs in turn.

    InputError if one fails.
    """
    output, gpus = Path(args.output), torch.cuda.device_count()
    runs = [
        (name, seed, output / f"{name}-{seed}")
        for seed in range(args.seeds)
        for name in args.configurations
    ]
    for *_, folder in runs:
        if folder.exists():
            raise InputError(f"{folder} exists: remove it, or give another --output")
    output.mkdir(parents=True, exist_ok=True)
    steps = str(args.iterations * 4 // 5)
    waiting, running = list(enumerate(runs)), {}
    with tqdm(total=len(runs), desc="train", unit="run") as bar, ending(running):
        while waiting or running:
            while waiting and len(running) < args.parallel:
                number, (name, seed, folder) = waiting.pop(0)
                command = [
                    sys.executable, str(REPOSITORY / "train.py"), *COMMON, *CONFIGURATIONS[name],
                    "--seed", str(seed), "--init", args.init, "--output", str(folder),
                    "--iterations", str(args.iterations), "--lr-steps", steps, "--save-every",
                    str(args.iterations),
                ]
                device = {"CUDA_VISIBLE_DEVICES": str(number % gpus)} if gpus else {}
                log = open(folder.with_suffix(".txt"), "w+")
                environment = os.environ | device | {"OMP_NUM_THREADS": "1"}
                running[folder] = (
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log),
                    log,
                )
            time.sleep(1)
            for folder, (process, log) in list(running.items()):
                if process.poll() is not None:
                    log.close()
                    del running[folder]
                    bar.update()
                    if process.returncode:
                        raise InputError(
                            f"the run {folder} ended with {process.returncode}: see {log.name}"
                        )


# The ground truth

def visible_areas(annotation: dict) -> np.ndarray:
    """(T,) pixels, 0 where the instance has no mask."""
    return np.array([area or 0 for area in annotation["areas"]])


def longest_gap(annotation: dict) -> int:
    """The most frames in a row without a mask between two frames with one."""
    return int((np.diff(visible_areas(annotation).nonzero()[0]) - 1).max(initial=0))


def noisy_frames(video: Video, noise: float) -> np.ndarray:
    """bool (T,): the frames that are lost in noise of so many grey levels. No annotation tells
    them, but the pictures do.

    In noise of 70 the difference of neighbouring pixels has a standard deviation of 27 to 62, else
    of 1 to 12 (40 videos)."""
    greys = (
        np.asarray(read_frame(file, video.height, video.width).convert("L"), np.float32)
        for file in video.files
    )
    return np.array([np.diff(grey, axis=1).std() > noise / 4 for grey in greys])


# Which track an instance has

def frame_overlaps(result: EncodedVideo, tracks: list[int], video: Video) -> np.ndarray:
    """IoU (T, G, K) of the ground truth's masks with those of some of the predicted instances."""
    size = {"height": video.height, "width": video.width}
    actual = [track_rles(annotation, size) for annotation in video.annotations]
    overlaps = np.zeros((len(video.files), len(actual), len(tracks)))
    for t, overlap in enumerate(overlaps):
        if overlap.size:
            overlap[:] = rle.iou(
                [masks[t] for masks in actual],
                [result.segmentations[track][t] for track in tracks],
                [False] * len(tracks),
            )
    return overlaps


def assign_tracks(overlaps: np.ndarray) -> np.ndarray:
    """IoU (T, G, K) -> the track of each instance in each frame, int (T, G), -1 = none."""
    assigned = np.full(overlaps.shape[:2], -1)
    for t, overlap in enumerate(overlaps):
        worth = np.where(overlap >= MIN_IOU, overlap, 0.0)
        if t:
            kept = (assigned[t - 1, :, None] == np.arange(overlap.shape[1])) & (worth > 0)
            # More than the sum of all overlaps.
            worth += len(worth) * kept
        instances, tracks = linear_sum_assignment(worth, maximize=True)
        matched = worth[instances, tracks] > 0
        assigned[t, instances[matched]] = tracks[matched]
    return assigned


def count_switches(assigned: np.ndarray) -> int:
    """How often an instance has another track than the last it had.

    Assigned as assign_tracks gives it.
    """
    return sum(int(np.count_nonzero(np.diff(tracks[tracks >= 0]))) for tracks in assigned.T)


# Measuring

def scores_by_gap(results: list[dict], ground_truth: dict) -> dict[str, dict[str, float]]:
    """AP and AR10 of the instances in each bin of GAPS, and their number.

    Arguments as for metric.evaluate_results.
    """
    gaps = np.array([longest_gap(annotation) for annotation in ground_truth["annotations"]])
    scores = {"AP by gap": {}, "AR10 by gap": {}, "instances by gap": {}}
    for name, (fewest, most) in GAPS.items():
        inside = (gaps >= fewest) & (gaps <= most)
        precision, recall, _ = accumulate(results, ground_truth, ignored=~inside)
        metrics = summarize(precision, recall, ground_truth)
        for key, value in zip(scores, (metrics["AP"], metrics["AR10"], int(inside.sum()))):
            scores[key][name] = value
    return scores


def frame_groups(areas: np.ndarray, noisy: np.ndarray | None) -> dict[str, np.ndarray]:
    """An instance's visible pixels (T,), and which frames are noisy (T,) (None where none ever is)
    -> bool (T,) for every name of STATES and SHARES."""
    visible, clock = areas > 0, np.arange(len(areas))
    # From the first to the last frame.
    present = (clock >= visible.argmax()) & (clock < len(areas) - visible[::-1].argmax())
    clean, lost = (
        (np.zeros_like(visible),) * 2 if noisy is None else (visible & ~noisy, visible & noisy)
    )
    quarters = np.ceil(4 * areas / areas.max())
    shares = [present & (quarters == number) for number in range(len(SHARES))]
    return dict(zip(STATES + SHARES, (visible, present & ~visible, ~present, clean, lost, *shares)))


def measure_suite(
    model: GRAttVIS,
    videos: VideoSet,
    device: torch.device,
    amp: torch.dtype,
    short_side: int,
    difficulty: Difficulty,
) -> dict[str, dict]:
    """All that TITLES names, and "instances by gap", of a model on a set of that difficulty."""
    results, switches, opened = [], 0, defaultdict(list)
    for video, result in segment_videos(
        model, videos.videos, device, amp, short_side, MAX_LONG_SIDE, TOP_K
    ):
        results += to_entries(video, result, videos.categories)
        tracks = best_labels(result, MIN_SCORE)
        assigned = assign_tracks(frame_overlaps(result, tracks, video))
        switches += count_switches(assigned)
        noisy = noisy_frames(video, difficulty.noise) if difficulty.noisy else None
        for annotation, given in zip(video.annotations, assigned.T):
            areas, times = visible_areas(annotation), np.bincount(given[given >= 0], minlength=1)
            if 2 * times.max() >= np.count_nonzero(areas):
                gates = result.gates[tracks[times.argmax()]].numpy()              # (T, D)
                for name, chosen in frame_groups(areas, noisy).items():
                    opened[name] += gates[chosen].tolist()
    metrics = evaluate_results(results, videos.ground_truth)
    scores = {name: metrics[name] for name in ("AP", "AP50", "AR10")} | {
        "switches": switches / len(videos)
    }
    return {"scores": scores} | scores_by_gap(results, videos.ground_truth) | open_shares(opened)


def open_shares(opened: dict[str, list[list[bool]]]) -> dict[str, dict[str, float]]:
    """D gates for each frame in every one of STATES and SHARES -> the share that is open, of all
    layers and of the last; -1 for none.
    """
    shares = {}
    for what, names in (("state", STATES), ("share", SHARES)):
        shares[f"open by {what}"] = {name: mean_defined(np.array(opened[name])) for name in names}
        shares[f"last open by {what}"] = {
            name: mean_defined(np.array([gates[-1:] for gates in opened[name]])) for name in names
        }
    return shares


def measure(args: argparse.Namespace) -> None:
    """Write the records; after each, so that what was measured before a kill is kept."""
    if args.names and len(args.names) != len(args.weights):
        raise InputError(
            f"{len(args.names)} names for {len(args.weights)} checkpoints: give one for each"
        )
    output = Path(args.output)
    if output.exists():
        raise InputError(f"{output} exists: give another --output (`table` takes several files)")
    output.parent.mkdir(parents=True, exist_ok=True)
    sets = {suite: open_suite(suite, Path(args.sets) / suite, args.videos) for suite in args.suites}
    device = choose_device(args.device)
    amp, _ = choose_amp(args.amp, device)
    records = []
    for number, weights in enumerate(args.weights):
        model, config = model_from_checkpoint(weights)
        model.to(device).accelerate(amp)
        setting = {
            "weights": weights,
            "propagation": model.propagation,
            "gate_mask": model.tracker.gate_mask,
            "short_side": default_short_side(config, None),
            "seed": config.get("args", {}).get("seed"),
            "amp": str(amp).removeprefix("torch."),
        }
        kind = (
            f"{model.propagation}, {model.tracker.gate_mask}"
            if model.tracker.gated
            else model.propagation
        )
        # Of gated-blocked-2/last.pt, gated-blocked.
        trained = Path(weights).parent.name.rpartition("-")[0]
        setting["name"] = (
            args.names[number] if args.names else trained if trained in CONFIGURATIONS else kind
        )
        for suite, videos in sets.items():
            check_categories(model, config, videos, weights)
            measured = measure_suite(
                model, videos, device, amp, setting["short_side"], SUITES[suite].difficulty
            )
            records.append(
                setting
                | {"suite": suite, "videos": len(videos), "checksum": checksum(videos.path)}
                | measured
            )
            save_json(output, records)
            scores = measured["scores"]
            print(f"{weights}, {setting['name']}, {suite}: AP {100 * scores['AP']:.1f}, "
                  f"{scores['switches']:.2f} identity switches a video", flush=True)


# Tables

def read_groups(paths: list[str]) -> dict[tuple[str, str], list[dict]]:
    """The records of several files by suite and name, both in their order.

    InputError where records cannot be put together.
    """
    groups, checksums = defaultdict(list), {}
    for path in paths:
        records = read_json(path)
        if not isinstance(records, list) or not all(
            isinstance(record, dict) and TITLES.keys() <= record.keys() for record in records
        ):
            raise InputError(f"{path} is no file that `measure` has written")
        for record in records:
            name, suite = record["name"], record["suite"]
            if checksums.setdefault(suite, record["checksum"]) != record["checksum"]:
                raise InputError(
                    f"{path}: {name} was measured on other videos of the suite {suite} than the "
                    "records before"
                )
            if record["seed"] in (other["seed"] for other in groups[suite, name]):
                raise InputError(
                    f"{path}: {name} has two records of seed {record['seed']} on the suite "
                    f"{suite}; other settings need "
                    "other --names"
                )
            groups[suite, name].append(record)
    order = [*SUITES, *CONFIGURATIONS]
    return dict(
        sorted(
            groups.items(),
            key=lambda item: [
                order.index(name) if name in order else len(order) for name in item[0]
            ],
        )
    )


def mean_and_spread(records: list[dict], key: str, column: str) -> tuple[float, float]:
    """The mean of a number over records, and its (sample) standard deviation, 0 of a single record.

    (-1, 0) if none defines it.
    """
    values = [record[key][column] for record in records if record[key][column] >= 0]
    return mean_defined(np.array(values)), statistics.stdev(values) if len(values) > 1 else 0.0


def format_cell(records: list[dict], key: str, column: str) -> str:
    """Mean and spread for people; "-" where it is not defined."""
    mean, spread = mean_and_spread(records, key, column)
    scale, digits = (1, 2) if column == "switches" else (100, 1)
    return (
        "-"
        if mean < 0
        else f"{scale * mean:.{digits}f}"
        + (f" ± {scale * spread:.{digits}f}" if len(records) > 1 else "")
    )


def format_table(groups: dict[tuple[str, str], list[dict]], key: str) -> str:
    """A markdown table of one of TITLES, a row for each suite and name."""
    columns = list(next(iter(groups.values()))[0][key])
    rows = [["suite", "name", "n", *columns], ["---"] * (3 + len(columns))]
    for number, ((suite, name), records) in enumerate(groups.items()):
        if key.endswith("by gap") and suite not in (row[0] for row in rows):
            rows.append(
                [
                    suite,
                    "*instances*",
                    "",
                    *(str(records[0]["instances by gap"][column]) for column in columns),
                ]
            )
        rows.append(
            [
                suite,
                name,
                str(len(records)),
                *(format_cell(records, key, column) for column in columns),
            ]
        )
    return "\n".join([f"{TITLES[key]}\n", *(f"| {' | '.join(row)} |" for row in rows)])


def plot_lines(path: Path, groups: dict[tuple[str, str], list[dict]], suite: str, key: str) -> None:
    """A line for each name over the columns of one of TITLES, the spread shaded.

    A picture of one suite.
    """
    figure, axes = new_figure(6, 4.5)
    for (_, name), records in (
        (group, records) for group, records in groups.items() if group[0] == suite
    ):
        columns = list(records[0][key])
        means, spreads = (
            100 * np.array([mean_and_spread(records, key, column) for column in columns]).T
        )
        places = (means >= 0).nonzero()[0]
        if not len(places):                                        # gates of a model that has none
            continue
        line, = axes.plot(places, means[places], marker="o", label=f"{name} (n = {len(records)})")
        axes.fill_between(
            places,
            (means - spreads)[places],
            (means + spreads)[places],
            color=line.get_color(),
            alpha=0.2,
            linewidth=0,
        )
    axes.set_xticks(range(len(columns)), columns)
    axes.set(title=f"{TITLES[key]}: {suite}", ylim=(0, 100))
    axes.title.set_fontsize("small")
    axes.legend(fontsize="small")
    figure.savefig(path)


def table(args: argparse.Namespace) -> None:
    """Print the tables, and draw them where a folder is given."""
    if args.plot:
        require_matplotlib()
    groups = read_groups(args.files)
    if args.names:
        groups = {group: records for group, records in groups.items() if group[1] in args.names}
        if missing := set(args.names) - {name for _, name in groups}:
            raise InputError(f"no record has the name {', '.join(sorted(missing))}")
    print(
        "Mean ± standard deviation over n seeds.",
        *(format_table(groups, key) for key in TITLES),
        sep="\n\n",
    )
    if args.plot:
        folder = Path(args.plot)
        folder.mkdir(parents=True, exist_ok=True)
        for suite in dict.fromkeys(suite for suite, _ in groups):
            for key in ("AP by gap", "open by share", "last open by share"):
                plot_lines(folder / f"{key.replace(' ', '_')}_{suite}.png", groups, suite, key)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Study what the gate is good for.")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    training.add_argument(
        "--init", required=True, help="checkpoint of the stage vita, preset small, to start from"
    )
    training.add_argument(
        "--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS)
    )
    training.add_argument("--seeds", type=at_least(1), default=3)
    training.add_argument("--iterations", type=at_least(1), default=2000)
    training.add_argument(
        "--parallel", type=at_least(1), default=6, help="runs at a time, over all GPUs"
    )
    training.add_argument(
        "--output",
        default="runs/study",
        help="folder for the runs: NAME-SEED, and what they print in NAME-SEED.txt",
    )
    measuring = commands.add_parser(
        "measure", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    measuring.add_argument("weights", nargs="+", help="checkpoints of train.py")
    measuring.add_argument(
        "--names",
        nargs="+",
        help="one for each checkpoint, the same for those that differ in the seed alone "
        "(default: the configuration of `train`, else propagation and gate mask)",
    )
    measuring.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    measuring.add_argument(
        "--sets", default="datasets/suites", help="folder that holds a folder for each suite"
    )
    measuring.add_argument(
        "--videos",
        type=at_least(1),
        default=24,
        help="held-out videos of a suite that has to be written",
    )
    measuring.add_argument("--output", default="runs/study.json", help="file to write")
    measuring.add_argument("--device", default="auto", help="auto, cpu, cuda")
    measuring.add_argument(
        "--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="see evaluate.py"
    )
    tables = commands.add_parser("table")
    tables.add_argument("files", nargs="+", help="what `measure` has written")
    tables.add_argument("--names", nargs="+", help="leave out the others")
    tables.add_argument(
        "--plot",
        metavar="FOLDER",
        help="also draw AP over occlusion and open gates over visible share (needs matplotlib)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    with cli_errors():
        args = parse_arguments()
        {"train": train, "measure": measure, "table": table}[args.command](args)
