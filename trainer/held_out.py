"""Evaluation during training (--evaluate-every), on held-out videos."""

import argparse

from tqdm import tqdm

from checkpoint import save_checkpoint
from data import VideoSet
from evaluation.inference import segment_videos, to_entries
from evaluation.metric import evaluate_results
from model import GRAttVIS
from reading.layouts import find_named_set, find_split
from runtime.errors import InputError
from runtime.processes import largest
from runtime.stopping import Stopped, stop_requested
from trainer.run import Run


def open_held_out(args: argparse.Namespace, categories: list[tuple[int, str]]) -> VideoSet | None:
    """The videos of periodic evaluation; None without --evaluate-every.

    Raises InputError if they have no annotations or other categories than the training clips.
    """
    if not args.evaluate_every:
        return None
    if args.valid_json:
        json_path, frames = args.valid_json, args.valid_images
    elif args.train_json:
        raise InputError("--evaluate-every with --train-json needs --valid-json and --valid-images")
    elif args.test_sets:
        json_path, frames, _ = find_named_set(args.data_root, args.test_sets[0])
    else:
        json_path, frames = find_split(args.data_root, "valid")
    videos = VideoSet(json_path, frames, args.skip_bad)
    if not videos.ground_truth["annotations"]:
        raise InputError(f"--evaluate-every: {videos.path} has no annotations")
    if [name for _, name in videos.categories] != [name for _, name in categories]:
        raise InputError(
            f"--evaluate-every: {videos.path} has other categories than the training clips"
        )
    return videos


def pause_to_evaluate(run: Run, videos: VideoSet, bar: tqdm) -> None:
    """Evaluate in rank 0 while the other processes wait.

    If a signal interrupts the evaluation, it is repeated when the run is resumed.
    """
    if run.rank == 0:
        try:
            run.evaluation_pending = True
            bar.write(evaluate(run, videos))
            run.evaluation_pending = False
        except Stopped:
            pass  # the next line informs all processes
    run.stopping = largest(stop_requested())


def evaluate(run: Run, videos: VideoSet) -> str:
    """Evaluate the model (with --ema, the averaged one).

    Writes a line of the log, and best.pt if no AP so far is higher. Returns a message.
    """
    model = run.averaged.module if run.averaged else run.model
    weights = run.finite_weights(model)
    metrics = measure(run, model, videos)
    metrics.pop("per_class")
    run.log({"step": run.step} | metrics)
    message = f"iteration {run.step}: AP {100 * metrics['AP']:.1f}"
    if metrics["AP"] < max(run.best, 0):  # -1: undefined
        return message
    run.best = metrics["AP"]
    save_checkpoint(
        run.output / "best.pt",
        {
            "model": weights,
            "step": run.step,
            "best": run.best,
            "config": run.config,
        },
    )
    return f"{message}, the best so far"


def measure(run: Run, model: GRAttVIS, videos: VideoSet) -> dict:
    """The metrics of a model, without the videos that --skip-bad skips."""
    args = run.args
    model.eval()
    segmented = segment_videos(
        model,
        videos.videos,
        run.device,
        run.amp_dtype,
        args.test_short_side,
        args.test_max_long_side,
        args.top_k,
        workers=args.workers,
        skip_bad=args.skip_bad,
    )
    results = []
    unreadable = []
    for video, result in segmented:
        if isinstance(result, InputError):
            tqdm.write(f"skipped: {result}")
            unreadable.append(video.id)
        else:
            results += to_entries(video, result, videos.categories)
    model.train()
    return evaluate_results(results, videos.file.without(unreadable).content)
