"""Evaluate a model on a data set, or score a results file.

    python evaluate.py                       # the shipped weights, on synthetic suites
    python evaluate.py --weights runs/toy/last.pt --data-root datasets/synthetic
    python evaluate.py --weights grattvis_r50_ovis.pth --preset r50 --data-root ovis \\
        --short-side 360 --top-k 20
    torchrun --nproc-per-node 8 evaluate.py ...  # distributes the videos over 8 GPUs
    python evaluate.py --results results.json --annotations gt.json --output scores
    python evaluate.py --results results.json --annotations gt_short.json gt_long.json
    python evaluate.py --results results.json --annotations gt.json --compare other/results.json

The last but one scores both parts of YouTube-VIS 2022, and their mean.

Writes to --output: results.json, results.json.zip (for the server of a benchmark), metrics.json if
there are annotations, report.html with --report, and overlays/ and plots/ of the first --draw and
--plot videos. Each suite has a folder. After an interruption, the same command continues with the
remaining videos.

The flags are in evaluation/flags.py. inference.py runs a model over a data set, and scoring.py
scores the results, with what references.py finds to compare them with. Upstream:
vita/data/ytvis_eval.py.
"""

import argparse
import math
import os
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from batching import short_side_size
from checkpoint import SHIPPED_WEIGHTS, default_short_side, model_from_checkpoint
from data import Video, VideoSet, read_frame
from deform_attn import implementation
from evaluation.flags import parse_arguments
from evaluation.inference import segment_videos, share
from evaluation.postprocess import EncodedVideo
from evaluation.references import file_sources, find_other, ground_truth_of, model_sources
from evaluation.scoring import read_parts, score_results
from evaluation.unfinished import Unfinished
from model import GRAttVIS
from reading.annotations import AnnotationFile, one_line, unique_names
from reading.downloads import find_weights
from reading.ids import Id
from reading.layouts import find_split
from runtime.device import choose_amp
from runtime.errors import InputError, cli_errors
from runtime.files import checksum, folder_lock
from runtime.loading import choose_workers
from runtime.processes import (
    errors_of_any_process,
    gather,
    in_turn,
    require_agreement,
    start_processes,
    stop_processes,
)
from runtime.stopping import Stopped, deferred_stop
from synthetic.suites import SUITES, make_dataset
from viewing.cards import Sources
from viewing.overlays import overlays, save_pictures
from viewing.plots import plot_timeline, require_matplotlib

MIN_DRAWN_SCORE = 0.3
HELD_OUT = 24  # videos of a suite, if it has to be written
DATA_PATHS = ("data_root", "split", "json", "images", "sets")


def main(args: argparse.Namespace) -> dict | None:
    """Evaluate a model or score a file.

    Returns the metrics, or those of each suite by name. They are None without ground truth.
    """
    if args.plot is not None:
        require_matplotlib()
    if args.results:
        return score_file(args)
    if bool(args.json) != bool(args.images):
        raise InputError("--json and --images go together")
    rank, world, device = start_processes(args.device)
    options = {"gate_mask": args.gate_mask} if args.gate_mask else {}
    with errors_of_any_process():
        args.output = args.output or default_output(args.weights)
        args.weights = str(find_weights(args.weights))
        model, config = model_from_checkpoint(
            args.weights, args.preset, args.propagation, **options
        )
        args.short_side = args.short_side or default_short_side(config, args.preset)
    with errors_of_any_process():
        sets = open_sets(args, rank, world)
    with errors_of_any_process():
        for videos in sets.values():
            check_categories(model, config, videos, args.weights)
        # Errors are reported now, not after hours of inference.
        ground_truth = {name: ground_truth_of(videos, args, rank) for name, videos in sets.items()}
        others = {name: find_other(args.compare, name, ground_truth[name]) for name in sets}
    amp_dtype, reason = choose_amp(args.amp, device)
    settings = {name: describe_setting(args, videos, amp_dtype) for name, videos in sets.items()}
    require_agreement(
        {
            f"{name} {key}".strip(): value
            for name, setting in settings.items()
            for key, value in setting.items()
            if key not in DATA_PATHS
        }
    )
    model.to(device).accelerate(amp_dtype, args.compile)
    model.exclusive = args.exclusive
    if rank == 0:
        dtype = str(amp_dtype).removeprefix("torch.")
        print(
            f"{args.weights}: {model.propagation} propagation, {model.num_classes} classes, "
            f"short side {args.short_side}; {device.type} x {world}, {dtype} ({reason}); "
            f"deformable attention: {implementation(device)}"
        )
    output = Path(args.output)
    metrics = {
        name: evaluate_set(
            model,
            videos,
            ground_truth[name],
            output / name,
            args,
            amp_dtype,
            settings[name],
            rank,
            world,
            others[name],
        )
        for name, videos in sets.items()
    }
    stop_processes()
    return metrics.get("", metrics)


def score_file(args: argparse.Namespace) -> dict | None:
    """Score --results against --annotations."""
    if not args.annotations:
        raise InputError("scoring a file needs --results and --annotations")
    path = Path(args.results)
    ground_truth = read_parts(args.annotations, args.skip_bad)
    other = find_other(args.compare, "", ground_truth)
    sources = file_sources(ground_truth, args) if args.report else None
    output = Path(args.output or path.parent)
    return score(path, ground_truth, output, args, other, sources)


def score(
    results: Path,
    ground_truth: dict[str, AnnotationFile],
    output: Path,
    args: argparse.Namespace,
    other: Path | None,
    sources: Sources | None,
) -> dict | None:
    """Score a results file with the flags of the command line."""
    return score_results(
        results,
        ground_truth,
        output,
        plot=args.plot is not None,
        other_path=other,
        track_score=args.track_score,
        boundary=args.boundary,
        sources=sources,
    )


def default_output(weights: str) -> Path:
    """evaluation/ next to the weights; in runs/ for the shipped and for downloaded ones."""
    path = Path(weights)
    is_ours = path.parent.resolve() == SHIPPED_WEIGHTS.parent or weights.startswith("https://")
    folder = Path("runs") / path.stem if is_ours else path.parent
    return folder / "evaluation"


def open_sets(args: argparse.Namespace, rank: int, world: int) -> dict[str, VideoSet]:
    """The data set of the arguments, under the name "", or the suites by name."""
    if args.json or args.data_root:
        if args.json:
            json_path, images = args.json, args.images
        else:
            json_path, images = find_split(args.data_root, args.split)
        videos = VideoSet(json_path, images, skip_bad=args.skip_bad)
        for sentence in videos.skipped.sentences() if rank == 0 else ():
            print(f"skipped: {sentence}")
        return {"": videos}
    with in_turn(rank, world):  # the first process of each machine writes missing suites
        return {name: open_suite(name, Path(args.sets) / name, HELD_OUT) for name in args.suites}


def open_suite(name: str, folder: Path, held_out: int) -> VideoSet:
    """The held-out videos of a suite, as written by `python data.py --suite`.

    If the folder does not exist, a data set with that many held-out videos is written.
    """
    if not folder.exists():
        suite = SUITES[name]
        with suppress(FileExistsError):  # another process may have written it in the meantime
            make_dataset(
                folder,
                1,
                held_out,
                suite.frames,
                objects=suite.objects,
                difficulty=suite.difficulty,
            )
    return VideoSet(*find_split(folder, "valid"))


def describe_setting(args: argparse.Namespace, videos: VideoSet, amp_dtype: torch.dtype) -> dict:
    """Everything the results depend on, with checksums of weights and annotations."""
    names = (
        "preset",
        "propagation",
        "gate_mask",
        "short_side",
        "max_long_side",
        "top_k",
        "exclusive",
        "compile",
        "skip_bad",
        *DATA_PATHS,
    )
    setting = {name: getattr(args, name) for name in names}
    setting["amp"] = str(amp_dtype)
    setting["weights"] = checksum(args.weights)
    setting["annotations"] = checksum(videos.path)
    setting["videos"] = [video.id for video in videos.videos]
    return setting


def evaluate_set(
    model: GRAttVIS,
    videos: VideoSet,
    ground_truth: dict[str, AnnotationFile],
    output: Path,
    args: argparse.Namespace,
    amp_dtype: torch.dtype,
    setting: dict,
    rank: int,
    world: int,
    other: Path | None,
) -> dict | None:
    """Segment a data set and score the results; returns the metrics in rank 0, if any.

    other: a results file to compare with.
    """
    with ExitStack() as stack:
        with errors_of_any_process():
            if rank == 0:
                output.mkdir(parents=True, exist_ok=True)
                stack.enter_context(folder_lock(output))
        with errors_of_any_process(), in_turn(rank, world):  # processes may share the folder
            unfinished = Unfinished(output / "unfinished", setting)
        skipped = segment_set(model, videos, unfinished, output, args, amp_dtype, rank, world)
        finished = [video for video in videos.videos if video.id not in skipped]
        unfinished.collect(finished)
        if rank == 0:
            unfinished.join(finished, videos.categories, output / "results.json")
            draw_videos(unfinished, finished, videos.categories, output, args)
        sources = model_sources(unfinished, finished) if args.report and rank == 0 else None
        with in_turn(rank, world):
            unfinished.remove()
        if rank:
            return None
        left_out = skipped + videos.file.left_out
        parts = {name: part.without(left_out) for name, part in ground_truth.items()}
        return score(output / "results.json", parts, output, args, other, sources)


def segment_set(
    model: GRAttVIS,
    videos: VideoSet,
    unfinished: Unfinished,
    output: Path,
    args: argparse.Namespace,
    amp_dtype: torch.dtype,
    rank: int,
    world: int,
) -> list[Id]:
    """Segment this process's share of the remaining videos.

    Returns the ids of the videos that any process skipped because they are unreadable.
    """
    device = model.pixel_mean.device
    remaining = unfinished.remaining(videos.videos)
    assigned = share(remaining, rank, world)
    workers = args.workers
    if workers is None:
        workers = choose_workers(min(16, os.cpu_count() or 1), batch_bytes(args, videos))
    if rank == 0:
        frames = sum(len(video.files) for video in videos.videos)
        done = len(videos) - len(remaining)
        before = f", {done} of them done before" if done else ""
        print(
            f"{len(videos)} videos of {videos.path}, {frames} frames{before}; {workers} loader "
            f"processes; output {output}"
        )
    began = time.perf_counter()
    segmented = segment_videos(
        model,
        assigned,
        device,
        amp_dtype,
        args.short_side,
        args.max_long_side,
        args.top_k,
        args.chunk,
        workers,
        args.skip_bad,
    )
    skipped = []
    try:
        with deferred_stop(), closing(segmented):  # signals take effect between chunks
            for video, result in segmented:
                if isinstance(result, InputError):
                    tqdm.write(f"skipped: {result}")
                    skipped.append(video.id)
                else:
                    unfinished.save(video, result)
    except Stopped as stop:
        done = sum(unfinished.path(video).exists() for video in videos.videos)
        raise Stopped(
            stop.number,
            f"{done} of {len(videos)} videos are done and kept in "
            f"{unfinished.folder}; the same command continues",
        ) from None
    print_speed(assigned, time.perf_counter() - began, device)
    return [video_id for ids in gather(skipped) for video_id in ids]


def print_speed(videos: list[Video], seconds: float, device: torch.device) -> None:
    """Print the speed of this process over its videos, and the GPU memory that it reserved."""
    frames = sum(len(video.files) for video in videos)
    peak = ""
    if device.type == "cuda":
        # Not the memory of tensors, which leaves out what CUDA graphs keep.
        gibibytes = torch.cuda.max_memory_reserved() / 2**30
        peak = f", {gibibytes:.2f} GiB of GPU memory"
    print(
        f"{frames} frames in {seconds:.1f} s, {frames / seconds:.1f} a second with reading and "
        f"encoding{peak}"
    )


def batch_bytes(args: argparse.Namespace, videos: VideoSet) -> int:
    """Size of the largest chunk of frames that a loader process reads."""
    sizes = {(video.height, video.width) for video in videos.videos}
    pixels = max(
        math.prod(short_side_size(height, width, args.short_side, args.max_long_side))
        for height, width in sizes
    )
    return 3 * args.chunk * pixels


def draw_videos(
    unfinished: Unfinished,
    videos: list[Video],
    categories: list[tuple[Id, str]],
    output: Path,
    args: argparse.Namespace,
) -> None:
    """Draw overlays and timelines of the first --draw and --plot videos."""
    names = [name for _, name in categories]
    for video in videos[: args.draw]:
        draw_video(output / "overlays", video, unfinished.load(video), names)
    for video in videos[: args.plot or 0]:
        path = output / "plots" / f"{video.name}.png"
        plot_timeline(path, unfinished.load(video), names, MIN_DRAWN_SCORE)


def draw_video(folder: Path, video: Video, result: EncodedVideo, names: list[str]) -> None:
    """Draw the instances of a video that score at least MIN_DRAWN_SCORE."""
    frames = (np.array(read_frame(file, video.height, video.width)) for file in video.files)
    pictures = overlays(frames, result, names, MIN_DRAWN_SCORE)
    save_pictures(folder, video.name, pictures, len(video.files))


def check_categories(model: GRAttVIS, config: dict, videos: VideoSet, weights: str) -> None:
    """InputError unless the classes of the checkpoint are those of the data set."""
    if model.num_classes != len(videos.categories):
        raise InputError(
            f"{weights} has {model.num_classes} classes, {videos.path} has {len(videos.categories)}"
        )
    trained = unique_names(
        [(category_id, one_line(name)) for category_id, name in config.get("categories", [])]
    )
    if trained and trained != [name for _, name in videos.categories]:
        raise InputError(
            f"{weights} was trained on other classes than {videos.path} has: {', '.join(trained)}"
        )


if __name__ == "__main__":
    with cli_errors():
        main(parse_arguments())
