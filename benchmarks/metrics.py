"""Time and memory of scoring a results file: AP alone, and with all other metrics.

    python benchmarks/metrics.py                     # 60 videos of 40 frames of 360x640, by default
    python benchmarks/metrics.py --videos 140 --frames 100 --height 720 --width 1280

Ground truth are 3 to 6 wobbly ellipses per video that move and pause. Predictions are 10 shifted
copies per video, some of another class. Times are the best of --repeats, in one process each, from
reading the files to writing metrics.json. Memory is the peak of the process, minus that of one
which only imports the same modules.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.metric import AREA, accumulate_videos, category_ids, check_predictions, summarize
from evaluation.overlaps import measure_overlaps
from evaluation.run_length import encode
from evaluation.scoring import join_parts, read_parts, score_results, zip_results
from runtime.files import read_json, save_json
from runtime.flags import at_least

MODES = ("imports", "AP", "all", "all with boundaries")
CLASSES, PREDICTIONS = 6, 10


def draw_track(random: np.random.Generator, frames: int, height: int, width: int) -> np.ndarray:
    """The masks of one object, bool (T, H, W)."""
    masks = np.zeros((frames, height, width), bool)
    radius = random.uniform(0.05, 0.2) * height
    begin, end = random.uniform(0, 1, (2, 2)) * (width, height)
    phases = random.uniform(0, 6.3, 3)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    pause = sorted(random.integers(0, frames, 2)) if random.random() < 0.4 else (0, 0)
    for t, mask in enumerate(masks):
        centre = begin + (end - begin) * t / frames
        dx, dy = x - centre[0], y - centre[1]
        angle = np.arctan2(dy, dx)
        outline = sum(np.sin(k * angle + phase + t / 5) / k for k, phase in enumerate(phases, 2))
        mask[:] = dx**2 + dy**2 < (radius * (1 + 0.2 * outline)) ** 2
    masks[pause[0] : pause[1]] = False
    return masks


def make_files(folder: Path, args: argparse.Namespace) -> None:
    """Write gt.json and results.json."""
    videos, annotations, results = [], [], []
    size = args.frames, args.height, args.width
    for number in range(1, args.videos + 1):
        random = np.random.default_rng(number)
        shape = {"length": args.frames, "height": args.height, "width": args.width}
        videos.append({"id": number} | shape)
        tracks = [draw_track(random, *size) for _ in range(random.integers(3, 7))]
        classes = random.integers(1, CLASSES + 1, len(tracks)).tolist()
        for category, masks in zip(classes, tracks):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "video_id": number,
                    "category_id": category,
                    "iscrowd": 0,
                    "areas": masks.sum((1, 2)).tolist(),
                    "segmentations": encode(torch.from_numpy(masks)),
                }
            )
        for index in range(PREDICTIONS):
            track = index % len(tracks)
            duplicate = index >= len(tracks)
            shift = random.integers(-6, 7, 2) * (1 + duplicate)
            moved = np.roll(tracks[track], shift, (1, 2))
            other_class = duplicate and random.random() < 0.5
            results.append(
                {
                    "video_id": number,
                    "category_id": int(random.integers(1, 7)) if other_class else classes[track],
                    "score": float(random.random() * (0.5 if duplicate else 1)),
                    "segmentations": encode(torch.from_numpy(moved)),
                }
            )
    categories = [{"id": c, "name": f"class {c}"} for c in range(1, CLASSES + 1)]
    save_json(
        folder / "gt.json",
        {"videos": videos, "categories": categories, "annotations": annotations},
        None,
    )
    save_json(folder / "results.json", results, None)


def score(mode: str, folder: Path) -> dict:
    """Score the files in this process: seconds, and the peak of memory in MiB."""
    began = time.perf_counter()
    if mode == "AP":
        parts = read_parts([folder / "gt.json"], skip_bad=False)
        ground_truth = join_parts(parts)
        results = check_predictions(read_json(folder / "results.json"), ground_truth)
        zip_results(folder / "results.json", folder / "results.json.zip")
        videos = measure_overlaps(results, ground_truth)
        curves = accumulate_videos(videos, category_ids(ground_truth), [AREA])
        save_json(folder / "metrics.json", summarize(*curves[:2], ground_truth))
    elif mode != "imports":
        parts = read_parts([folder / "gt.json"], skip_bad=False)
        boundary = mode == "all with boundaries"
        score_results(folder / "results.json", parts, folder, plot=False, boundary=boundary)
    seconds = time.perf_counter() - began
    status = Path("/proc/self/status").read_text()  # of Linux
    peak = int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024
    return {"seconds": seconds, "peak": peak}


def main(args: argparse.Namespace) -> None:
    """Print a table; with --mode, one line of JSON about this process."""
    if args.mode:
        print(json.dumps(score(args.mode, Path(args.folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder), args)
        measured = {mode: [] for mode in MODES}
        for _ in range(args.repeats):  # in turn, so that other load meets all modes alike
            for mode in MODES:
                command = [sys.executable, __file__, "--mode", mode, "--folder", folder]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                measured[mode].append(json.loads(output.splitlines()[-1]))
    imports = min(run["peak"] for run in measured.pop("imports"))
    fastest = {mode: min(run["seconds"] for run in runs) for mode, runs in measured.items()}
    print("| metrics | seconds | times AP alone | memory |\n|---|---|---|---|")
    for mode, runs in measured.items():
        memory = max(run["peak"] for run in runs) - imports
        ratio = fastest[mode] / fastest["AP"]
        print(f"| {mode} | {fastest[mode]:.2f} | {ratio:.2f} | {memory:.0f} MiB |")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Time and memory of scoring a results file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--videos", type=at_least(1), default=60)
    parser.add_argument("--frames", type=at_least(1), default=40, help="per video")
    parser.add_argument("--height", type=at_least(1), default=360, help="pixels")
    parser.add_argument("--width", type=at_least(1), default=640, help="pixels")
    parser.add_argument("--repeats", type=at_least(1), default=3)
    parser.add_argument("--mode", choices=MODES, help="measure this process")
    parser.add_argument("--folder", help="with --mode: the folder of gt.json and results.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse_arguments())
