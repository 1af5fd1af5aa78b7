"""Speed of loading training clips from 1280x720 JPEGs: time by stage, frames per second by workers.

    python benchmarks/loading.py                   # temporary data set; 0, 1 and 2 workers
    python benchmarks/loading.py --root /data/loading --workers 1 2 4 8 16  # keeps the data set
    python benchmarks/loading.py --json rows.json  # also write all numbers to a file

The data set is in the YouTube-VIS format: synthetic scenes of 1280x720 with six objects per video
and camera noise (standard deviation 5 grey levels), as JPEGs of quality 90, about 250 kB each, and
masks as compressed RLE. Clips are those of --recipe without pseudo videos. The default is the
official R-50 setting for OVIS: 5 frames within 6 of a reference frame, short sides 288 to 512, half
of the clips cropped, half flipped.

Stages are CPU time of one process with one thread, as in a loader worker, measured by wrapping the
functions that ClipDataset calls. A frame chosen twice is read once but counted twice. Rates are
wall time, the median of --repeats, for train.py's loader with the batches of one of --processes
processes, after WARM batches per worker. Files are in the page cache, so disks are not measured.
Other load on the machine lowers the rates.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from unittest.mock import patch

import numpy as np
import PIL
import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clips as clips_module
from augmentation import Augmentation, transforms
from clips import ClipDataset, StepSampler
from runtime.loading import read_ahead
from synthetic.rendering import make_video
from synthetic.scenes import CATEGORIES
from synthetic.suites import write_split
from train import PREFETCH
from trainer.datasets import open_clips
from trainer.flags import parse_arguments as parse_training_arguments

HEIGHT, WIDTH, FRAMES, OBJECTS = 720, 1280, 14, 6  # of a video; reach 6 sees 13 frames
NOISE = 5.0  # grey levels, standard deviation
WARM = 2  # batches a worker that are not counted
# Timed functions: a label, the object that has the function, and its name. Indented rows are
# included in the row above.
STAGES = (
    ("reading JPEGs", clips_module, "read_frame"),
    ("decoding masks", clips_module, "read_mask"),
    ("augmentation", Augmentation, "__call__"),
    ("  resizing frames", transforms, "resize"),
    ("  resizing masks", transforms, "resize_image"),
    ("  cropping", Augmentation, "crop"),
)


def make_scene(number: int) -> tuple[np.ndarray, list]:
    """Frames and instances of a video."""
    generator = np.random.default_rng(number)
    images, instances = make_video(generator, FRAMES, HEIGHT, WIDTH, (OBJECTS, OBJECTS))
    for image in images:  # one by one, for the memory of the noise
        image[:] = (image + generator.normal(0, NOISE, image.shape)).round().clip(0, 255)
    return images, instances


def make_set(root: Path, videos: int) -> None:
    """Write the train split of a data set."""
    write_split(root, "train", map(make_scene, range(videos)))


def describe_set(root: Path) -> dict:
    """Statistics of the data set."""
    sizes = [path.stat().st_size for path in root.glob("train/JPEGImages/*/*.jpg")]
    content = json.loads((root / "train.json").read_text(encoding="utf-8"))
    areas = [area for annotation in content["annotations"] for area in annotation["areas"] if area]
    return {
        "videos": len(content["videos"]),
        "frames": len(sizes),
        "kilobytes_a_frame": sum(sizes) / len(sizes) / 1000,
        "instances_a_video": len(content["annotations"]) / len(content["videos"]),
        "masks_a_frame": len(areas) / len(sizes),
        "mask_share_of_frame": sum(areas) / len(areas) / (HEIGHT * WIDTH),
    }


class Stopwatch:
    """Seconds of processor time spent in functions that it wraps, by name."""

    def __init__(self):
        self.seconds = {}

    def wrap(self, name: str, function: Callable) -> Callable:
        def timed(*arguments, **options):
            start = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start

        return timed


def measure_stages(clips: ClipDataset, numbers: range) -> list[dict]:
    """A row for every stage of loading these clips in this process, and for the total."""
    watch = Stopwatch()
    with ExitStack() as patches:
        for name, holder, function in STAGES:
            patches.enter_context(
                patch.object(holder, function, watch.wrap(name, getattr(holder, function)))
            )
        read = watch.wrap("whole clip", clips.__getitem__)
        for number in numbers:
            read(number)
    whole = watch.seconds.pop("whole clip")
    # A crop may not have come.
    seconds = {name: watch.seconds.get(name, 0.0) for name, *_ in STAGES}
    seconds["rest: stacking, visibility"] = whole - sum(
        value for name, value in seconds.items() if name[0] != " "
    )
    frames = len(numbers) * clips.frames
    return [
        {"what": name, "ms_a_frame": 1000 * value / frames, "share": value / whole}
        for name, value in (seconds | {"whole clip": whole}).items()
    ]


def measure_loader(clips: ClipDataset, workers: int, batch: int, first: int, batches: int) -> float:
    """Frames a second of train.py's loader, over batches `first` to `first + batches`."""
    warm = WARM * max(workers, 1)
    # Endless, so that no worker runs out of work.
    sampler = StepSampler(first - warm, sys.maxsize, batch)
    with closing(
        read_ahead(clips, workers, torch.device("cpu"), batch_sampler=sampler, prefetch=PREFETCH)
    ) as loader:
        for _ in range(warm):
            next(loader)
        start = time.perf_counter()
        frames = sum(len(clip.frames) for _ in range(batches) for clip in next(loader))
        return frames / (time.perf_counter() - start)


def describe_machine() -> dict:
    """What the numbers depend on; `load` is the number of processes that ran in the last minute."""
    return {
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
    }


def measure(root: Path, options: argparse.Namespace) -> dict:
    """All numbers of the set in `root`; prints them."""
    args = parse_training_arguments(
        [
            "--recipe",
            options.recipe,
            "--train-json",
            str(root / "train.json"),
            "--seed",
            "0",
            "--train-images",
            str(root / "train/JPEGImages"),
            "--num-classes",
            str(len(CATEGORIES)),
        ]
    )
    clips, batch = open_clips(args), max(args.batch // options.processes, 1)
    machine, content = describe_machine(), describe_set(root)
    print(
        f"{machine['cores']} cores with a load of {machine['load']:.1f}, torch {machine['torch']}, "
        "torchvision "
        f"{machine['torchvision']}, Pillow {machine['pillow']}\n{content['frames']} frames of "
        f"{WIDTH}x{HEIGHT}, "
        f"{content['kilobytes_a_frame']:.0f} kB a frame; {content['instances_a_video']:.1f} "
        "instances a video, "
        f"{content['masks_a_frame']:.1f} masks a frame, {content['mask_share_of_frame']:.1%} of it "
        "each\n"
        f"{options.recipe}: clips of {args.frames} frames, batches of {batch}\n"
    )

    # Every row times the same batches.
    first = WARM * max(options.workers)
    numbers = range(first * batch, (first + options.batches) * batch)
    # Files into memory, libraries set up.
    measure_stages(clips, numbers[: len(clips.videos)])
    stages, rates = measure_stages(clips, numbers), []
    print(f"{'one process, one thread':<32}{'ms a frame':>12}{'share':>9}")
    for row in stages:
        print(f"{row['what']:<32}{row['ms_a_frame']:>12.2f}{row['share']:>9.1%}")
    print(f"\n{'workers':<10}{'frames a second':>18}{'a worker':>12}", flush=True)
    for workers in (0, *options.workers):
        measured = [
            measure_loader(clips, workers, batch, first, options.batches)
            for _ in range(options.repeats)
        ]
        rate = statistics.median(measured)
        rates.append({"workers": workers, "frames_a_second": rate, "measured": measured})
        print(f"{workers:<10}{rate:>18.1f}{rate / max(workers, 1):>12.1f}", flush=True)
    return {
        "machine": machine,
        "set": content,
        "recipe": options.recipe,
        "batch": batch,
        "stages": stages,
        "loader": rates,
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Time the loading of training clips from JPEGs of 1280x720 pixels.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--root",
        type=Path,
        help="where the set is, or is made and kept (default: a temporary folder)",
    )
    parser.add_argument("--recipe", default="grattvis/ovis/r50", help="whose clips; see train.py")
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=[1, 2],
        help="loader processes; none is measured too",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=4,
        help="of the training run, which share the recipe's batch",
    )
    parser.add_argument("--videos", type=int, default=6, help="of the set, when it is made")
    parser.add_argument("--batches", type=int, default=20, help="of one measurement")
    parser.add_argument(
        "--repeats", type=int, default=3, help="a rate is the median of so many measurements"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all numbers to this file")
    args = parser.parse_args(arguments)
    if min(args.videos, args.batches, args.repeats, args.processes, *args.workers) < 1:
        parser.error("numbers must be at least 1")
    return args


def main(options: argparse.Namespace) -> None:
    """Make the set and measure."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = options.root or Path(scratch)
        if not (root / "train.json").exists():
            print(f"making {options.videos} videos of {FRAMES} frames in {root} ...", flush=True)
            make_set(root, options.videos)
        results = measure(root, options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(parse_arguments())
