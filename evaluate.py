"""Evaluate a model on a data set, or score a results file: AP, AP50, AP75, AR1, AR10 and AP by class.

    python evaluate.py                                                    # the weights that come with the code, on synthetic suites
    python evaluate.py --weights runs/toy/last.pt --data-root datasets/synthetic
    python evaluate.py --weights grattvis_r50_ovis.pth --preset r50 --data-root ovis --short-side 360 --top-k 20
    torchrun --nproc-per-node 8 evaluate.py ...                           # the videos shared out to 8 GPUs
    python evaluate.py --results results.json --annotations gt.json --output scores
    python evaluate.py --results results.json --annotations gt_short.json gt_long.json       # YouTube-VIS 2022: both, and the mean

Writes into --output: results.json, results.json.zip (what the benchmark's server takes), metrics.json where the annotations
are at hand, overlays/ and plots/ for the first --draw and --plot videos; for suites, a folder each. After a kill, the same command
continues with the videos that are left. The metric is evaluation/metric.py, inference over a data set evaluation/inference.py.
Upstream: vita/data/ytvis_eval.py.
"""
import argparse
import math
import os
import time
import zipfile
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from augmentation import short_side_size
from checkpoint import SHIPPED_WEIGHTS, default_short_side, model_from_checkpoint
from data import Video, VideoSet, find_split, read_frame
from deform_attn import implementation
from evaluation.inference import Unfinished, segment_videos, share
from evaluation.metric import accumulate, check_predictions, format_table, mean_metrics, summarize
from evaluation.postprocess import EncodedVideo
from model import PRESETS, GRAttVIS
from reading.annotations import AnnotationFile, Skipped, one_line, read_annotations, unique_names
from reading.ids import Id
from runtime.device import choose_amp
from runtime.errors import InputError, cli_errors, shown
from runtime.files import atomic_write, checksum, folder_lock, read_json, save_json
from runtime.flags import at_least
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
from tracker import PROPAGATIONS
from viewing.overlays import overlays, save_pictures
from viewing.plots import plot_classes, plot_precision, plot_timeline, require_matplotlib

DRAWN_SCORE = 0.3  # instances below it are left out of the pictures
HELD_OUT = 24      # videos of a suite that has to be written
SERVERS = {        # a class that no other set has, in small letters: the benchmark, and where its results are submitted
    "vehical": "OVIS: https://codalab.lisn.upsaclay.fr/competitions/4763",
    "ape": "YouTube-VIS 2019: https://codalab.lisn.upsaclay.fr/competitions/6064",
    "flying_disc": "YouTube-VIS 2021: https://codalab.lisn.upsaclay.fr/competitions/7680, "
                   "2022: https://codalab.lisn.upsaclay.fr/competitions/3410",
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults evaluate the weights that come with the code."""
    parser = argparse.ArgumentParser(description="Evaluate a model on videos in the YouTube-VIS format, or score a results file.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--weights", default=str(SHIPPED_WEIGHTS), help="checkpoint, ours or official")
    model.add_argument("--preset", choices=PRESETS, help="of an official checkpoint (ours say it themselves)")
    model.add_argument("--propagation", choices=PROPAGATIONS, help="where the checkpoint does not tell it")
    model.add_argument("--gate-mask", choices=("additive", "blocked"), help="of an official checkpoint (default: additive)")
    data = parser.add_argument_group("data")
    data.add_argument("--data-root", help="data set")
    data.add_argument("--split", default="valid", help="its split")
    data.add_argument("--json", help="instead of --data-root: the annotation file")
    data.add_argument("--images", help="with --json: the folder that its file names are relative to")
    data.add_argument("--suites", nargs="+", choices=SUITES, default=["easy", "occlusion"], metavar="SUITE", help="where no data set is "
                      f"given: the held-out videos of synthetic suites, written if they are not there: {', '.join(SUITES)}")
    data.add_argument("--sets", default="datasets/suites", help="the folder that holds a folder for each suite")
    data.add_argument("--skip-bad", action=argparse.BooleanOptionalAction, default=False,
                      help="leave out videos and annotations that cannot be read, of the metric "
                      "too; say and count it")
    data.add_argument("--short-side", type=at_least(1), help="of the frames, pixels (default: what the model was made "
                        "for; official: 360, Swin 448)")
    data.add_argument("--max-long-side", type=at_least(1), default=1333, help="pixels")
    result = parser.add_argument_group("result")
    result.add_argument("--top-k", type=at_least(1), default=10, help="instances a video (official: 10, OVIS 20)")
    result.add_argument("--output", help="folder to write (default: evaluation/ beside the weights, or in runs/ and their name for "
                        "those that come with the code)")
    result.add_argument("--draw", type=at_least(0), default=0, metavar="N", help="draw overlays of the first N videos")
    result.add_argument("--plot", type=at_least(0), metavar="N", help="plot precision over recall, AP by class, and the tracks and gates "
                        "of the first N videos over time (needs matplotlib)")
    result.add_argument("--results", help="score this file instead of running a model")
    result.add_argument("--annotations", nargs="+", metavar="JSON", help="the ground truth, or several parts of it: each is scored, "
                        "and the mean of all (default: the data set's own, or gt_short.json and gt_long.json beside it)")
    run = parser.add_argument_group("run")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda")
    run.add_argument("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="auto = fp16 on a GPU, off (float32) on a CPU")
    run.add_argument("--compile", action="store_true", help="compile the model on a GPU: half a minute for each size of frames, then "
                     "faster; results differ by rounding")
    run.add_argument("--chunk", type=at_least(1), default=8, help="frames that are read together; no result depends on it")
    run.add_argument("--workers", type=at_least(0), help="processes that read frames ahead, for "
                     "each GPU; 0 = none (default: one for each CPU core, at most 16, fewer where "
                     "shared memory is small)")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> dict | None:
    """Evaluate or score as asked; returns the metrics, None where there is no ground truth."""
    if args.plot is not None:
        require_matplotlib()
    if args.results:
        if not args.annotations:
            raise InputError("scoring a file needs --results and --annotations")
        truth = read_parts(args.annotations, args.skip_bad)
        output = Path(args.output or Path(args.results).parent)
        return finish(Path(args.results), truth, output, args.plot is not None)

    if bool(args.json) != bool(args.images):
        raise InputError("--json and --images go together")
    rank, world, device = start_processes(args.device)
    options = {"gate_mask": args.gate_mask} if args.gate_mask else {}
    with errors_of_any_process():
        model, config = model_from_checkpoint(args.weights, args.preset, args.propagation,
                                              **options)
        args.short_side = args.short_side or default_short_side(config, args.preset)
    with errors_of_any_process():
        sets = open_sets(args, rank, world)
    with errors_of_any_process():
        for videos in sets.values():
            check_categories(model, config, videos, args.weights)
        if args.annotations:
            read_parts(args.annotations, args.skip_bad)  # refused before hours of inference
    amp, reason = choose_amp(args.amp, device)
    settings = {name: describe_setting(args, videos, amp) for name, videos in sets.items()}
    require_agreement({f"{name} {key}".strip(): value for name, setting in settings.items()
                       for key, value in setting.items() if key not in PATHS_OF_DATA})
    model.to(device).accelerate(amp, args.compile)
    if rank == 0:
        print(f"{args.weights}: {model.propagation} propagation, {model.num_classes} classes, "
              f"short side {args.short_side}; {device.type} x {world}, "
              f"{str(amp).removeprefix('torch.')} ({reason}); deformable attention: "
              f"{implementation(device)}")
    weights = Path(args.weights)
    shipped = weights.parent.resolve() == SHIPPED_WEIGHTS.parent
    beside = Path("runs") / weights.stem if shipped else weights.parent
    outputs = {name: Path(args.output or beside / "evaluation") / name for name in sets}
    metrics = {name: evaluate_set(model, videos, outputs[name], args, amp, settings[name], rank,
                                  world)
               for name, videos in sets.items()}
    stop_processes()
    return metrics.get("", metrics)


def open_sets(args: argparse.Namespace, rank: int, world: int) -> dict[str, VideoSet]:
    """The one set that the arguments name, under "", or suites by name, written if need be."""
    if args.json or args.data_root:
        found = (args.json, args.images) if args.json else find_split(args.data_root, args.split)
        videos = VideoSet(*found, skip_bad=args.skip_bad)
        for sentence in videos.skipped.sentences() if rank == 0 else ():
            print(f"skipped: {sentence}")
        return {"": videos}
    with in_turn(rank, world):  # the first process of each machine finds a suite missing
        return {name: open_suite(name, Path(args.sets) / name, HELD_OUT) for name in args.suites}


def open_suite(name: str, folder: Path, held_out: int) -> VideoSet:
    """The held-out videos of a suite, as `python data.py --suite` writes them.

    That many are written if the folder is not there.
    """
    if not folder.exists():
        suite = SUITES[name]
        with suppress(FileExistsError):  # another evaluation has just written the same
            make_dataset(folder, 1, held_out, suite.frames, objects=suite.objects,
                         difficulty=suite.difficulty)
    return VideoSet(*find_split(folder, "valid"))


PATHS_OF_DATA = ("data_root", "split", "json", "images", "sets")


def describe_setting(args: argparse.Namespace, videos: VideoSet, amp: torch.dtype) -> dict:
    """All that the results depend on; of weights and annotations, the contents."""
    names = ("preset", "propagation", "gate_mask", "short_side", "max_long_side", "top_k",
             "compile", "skip_bad", *PATHS_OF_DATA)
    return {name: getattr(args, name) for name in names} | {
        "amp": str(amp), "weights": checksum(args.weights), "annotations": checksum(videos.path),
        "videos": [video.id for video in videos.videos]}


def evaluate_set(model: GRAttVIS, videos: VideoSet, output: Path, args: argparse.Namespace,
                 amp: torch.dtype, setting: dict, rank: int, world: int) -> dict | None:
    """Results and metrics of one set; the metrics in the first process, where it has masks."""
    device = model.pixel_mean.device
    with ExitStack() as folder:
        with errors_of_any_process():
            if rank == 0:
                output.mkdir(parents=True, exist_ok=True)
                folder.enter_context(folder_lock(output))
        with errors_of_any_process(), in_turn(rank, world):  # they may share the folder
            unfinished = Unfinished(output / "unfinished", setting)
        remaining = unfinished.remaining(videos.videos)
        mine, done = share(remaining, rank, world), len(videos) - len(remaining)
        workers = args.workers
        if workers is None:
            workers = choose_workers(min(16, os.cpu_count() or 1), batch_bytes(args, videos))
        if rank == 0:
            frames = sum(len(video.files) for video in videos.videos)
            before = f", {done} of them done before" if done else ""
            print(f"{len(videos)} videos of {videos.path}, {frames} frames{before}; {workers} "
                  f"loader processes; output {output}")
        began = time.perf_counter()
        segmented = segment_videos(model, mine, device, amp, args.short_side, args.max_long_side,
                                   args.top_k, args.chunk, workers, args.skip_bad)
        left_out = []
        try:
            with deferred_stop(), closing(segmented):  # a signal counts between two chunks
                for video, found in segmented:
                    if isinstance(found, InputError):
                        tqdm.write(f"skipped: {found}")
                        left_out.append(video.id)
                    else:
                        unfinished.save(video, found)
        except Stopped as stop:
            done = sum(unfinished.path(video).exists() for video in videos.videos)
            raise Stopped(stop.number, f"{done} of {len(videos)} videos are done and kept in "
                          f"{unfinished.folder}; the same command continues") from None
        frames, seconds = sum(len(video.files) for video in mine), time.perf_counter() - began
        peak = ""
        if device.type == "cuda":
            peak = f", {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB of GPU memory"
        print(f"{frames} frames in {seconds:.1f} s, {frames / seconds:.1f} a second with reading "
              f"and encoding{peak}")
        left_out = [video_id for part in gather(left_out) for video_id in part]
        finished = [video for video in videos.videos if video.id not in left_out]
        unfinished.collect(finished)
        if rank == 0:
            unfinished.join(finished, videos.categories, output / "results.json")
            draw_videos(unfinished, finished, videos.categories, output, args)
        with in_turn(rank, world):
            unfinished.remove()
        if rank:
            return None
        truth = annotations_of(videos, args.annotations, left_out, args.skip_bad)
        return finish(output / "results.json", truth, output, args.plot is not None)


def batch_bytes(args: argparse.Namespace, videos: VideoSet) -> int:
    """The bytes of the largest chunk of frames that a loader process reads."""
    sizes = {(video.height, video.width) for video in videos.videos}
    pixels = max(math.prod(short_side_size(*size, args.short_side, args.max_long_side))
                 for size in sizes)
    return 3 * args.chunk * pixels


def draw_videos(unfinished: Unfinished, videos: list[Video], categories: list[tuple[Id, str]],
                output: Path, args: argparse.Namespace) -> None:
    """Overlays and timelines of the first --draw and --plot videos."""
    names = [name for _, name in categories]
    for video in videos[:args.draw]:
        draw_video(output / "overlays", video, unfinished.load(video), names)
    for video in videos[:args.plot or 0]:
        path = output / "plots" / f"{video.name}.png"
        plot_timeline(path, unfinished.load(video), names, DRAWN_SCORE)


def annotations_of(videos: VideoSet, given: list[str] | None, left_out: list[Id],
                   skip_bad: bool) -> dict[str, AnnotationFile]:
    """The ground truth of a data set by name, less the videos that were left out.

    given: annotation files, instead of its own one, or of the short and the long videos of
        YouTube-VIS 2022 where they lie beside it.
    """
    beside = [videos.path.with_name(name) for name in ("gt_short.json", "gt_long.json")]
    if not given and not videos.ground_truth["annotations"] and all(map(Path.exists, beside)):
        given = beside
    parts = read_parts(given, skip_bad) if given else {videos.path.stem: videos.file}
    left_out = left_out + videos.file.left_out
    return {name: part.without(left_out) for name, part in parts.items()}


def read_parts(paths: list[str | Path], skip_bad: bool) -> dict[str, AnnotationFile]:
    """Annotation files by name: several are parts of one set, and have the same categories."""
    parts = [read_annotations(path, skip_bad) for path in paths]
    for part in parts:
        if part.categories != parts[0].categories:
            raise InputError(f"{part.name} has other categories than {parts[0].name}: "
                             "they are not parts of one set")
    names = [Path(path).stem for path in paths]
    return dict(zip(names if len(set(names)) == len(names) else map(str, paths), parts))


def finish(results_path: Path, parts: dict[str, AnnotationFile], output: Path,
           plot: bool) -> dict | None:
    """Check a results file, zip it for the server, and score it where there are annotations.

    parts: of the ground truth, by name; each is scored, and the mean is what metrics.json starts
        with. All files are written before anything is printed: no terminal can lose them.
    Returns what metrics.json holds, None without annotations.
    """
    whole = {key: [entry for part in parts.values() for entry in part.content[key]]
             for key in ("videos", "annotations")}
    first, *_ = parts.values()
    whole["categories"] = first.content["categories"]
    left_out = [video for part in parts.values() for video in part.left_out]
    results = check_predictions(read_json(results_path), whole, left_out)
    output.mkdir(parents=True, exist_ok=True)
    zip_results(results_path, output / "results.json.zip")
    lines = [f"skipped: {sentence}"
             for sentence in Skipped(part.skipped for part in parts.values()).sentences()]
    if left_out:
        lines.append(f"{len(left_out)} of {len(left_out) + len(whole['videos'])} videos are left "
                     f"out of the metric, the first: {shown(left_out[0])}")
    if not whole["annotations"]:
        print(*lines, f"{first.name} has no annotations: submit {output / 'results.json.zip'} to "
              f"{server_of(whole['categories'])}", sep="\n")
        return None

    scored, curves = {}, {}
    for name, part in parts.items():
        inside = {video["id"] for video in part.content["videos"]}
        own = [entry for entry in results if entry["video_id"] in inside]
        curves[name], recall, _ = accumulate(own, part.content)
        scored[name] = summarize(curves[name], recall, part.content)
        title = [f"{name}, {len(inside)} videos"] if len(parts) > 1 else []
        lines += [*title, format_table(scored[name])]
    metrics = scored[name]
    if len(parts) > 1:
        metrics = mean_metrics(list(scored.values())) | {"parts": scored}
        lines += ["mean", format_table(metrics)]
    save_json(output / "metrics.json", metrics)
    for name in parts if plot else ():
        (output / "plots").mkdir(exist_ok=True)
        file_name = name.replace(os.sep, "-") + ".png"
        plot_precision(output / "plots" / f"precision_{file_name}", curves[name])
        plot_classes(output / "plots" / f"classes_{file_name}", scored[name]["per_class"])
    print(*lines, sep="\n")
    return metrics


def server_of(categories: list[dict]) -> str:
    """Where results of these classes are submitted."""
    classes = {category["name"].lower() for category in categories}
    return next((server for name, server in SERVERS.items() if name in classes),
                "the benchmark's server")


def zip_results(path: Path, target: Path) -> None:
    """The file as results.json in an archive, which is written whole or not at all."""
    with atomic_write(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path, "results.json")


def check_categories(model: GRAttVIS, config: dict, videos: VideoSet, weights: str) -> None:
    """InputError unless the checkpoint's classes are those of the data set."""
    if model.num_classes != len(videos.categories):
        raise InputError(f"{weights} has {model.num_classes} classes, {videos.path} has {len(videos.categories)}")
    trained = unique_names([(category_id, one_line(name))
                            for category_id, name in config.get("categories", [])])
    if trained and trained != [name for _, name in videos.categories]:
        raise InputError(f"{weights} was trained on other classes than {videos.path} has: {', '.join(trained)}")


def draw_video(folder: Path, video: Video, found: EncodedVideo, names: list[str]) -> None:
    """Overlays of the instances that score at least DRAWN_SCORE."""
    frames = (np.array(read_frame(file, video.height, video.width)) for file in video.files)
    pictures = overlays(frames, found, names, DRAWN_SCORE)
    save_pictures(folder, video.name, pictures, len(video.files))


if __name__ == "__main__":
    with cli_errors():
        main(parse_arguments())
