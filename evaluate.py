"""Evaluate a model on a data set, or score a results file: AP, AP50, AP75, AR1, AR10 and AP by class.

    python evaluate.py                                                    # runs/toy/last.pt on the held-out synthetic videos
    python evaluate.py --weights grattvis_r50_ovis.pth --preset r50 --data-root ovis --short-side 360 --top-k 20
    python evaluate.py --results results.json --annotations gt.json --output scores

Writes into --output: results.json (the file that the YouTube-VIS and OVIS servers take, zipped), metrics.json where the
annotations are at hand, and overlays/ for the first --draw videos. Upstream: vita/data/ytvis_eval.py; the metric is metric.py.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor
from tqdm import tqdm

from checkpoint import model_from_checkpoint, save_json
from data import InputError, Video, VideoSet, exit_with_sentence, find_split, read_frame, read_json, test_frames
from deform_attn import implementation
from device import choose_amp, start_processes
from draw import save_pictures
from metric import check_ground_truth, evaluate_results, format_table
from model import PRESETS, GRAttVIS, VideoResult
from recipes import at_least
from tracker import PROPAGATIONS

DRAWN_SCORE = 0.3  # instances below it are left out of the pictures


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults evaluate the toy run."""
    parser = argparse.ArgumentParser(description="Evaluate a model on videos in the YouTube-VIS format, or score a results file.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--weights", default="runs/toy/last.pt", help="checkpoint, ours or official")
    model.add_argument("--preset", choices=PRESETS, help="of an official checkpoint (ours say it themselves)")
    model.add_argument("--propagation", choices=PROPAGATIONS, help="where the checkpoint does not tell it")
    model.add_argument("--gate-mask", choices=("additive", "blocked"), help="of an official checkpoint (default: additive)")
    data = parser.add_argument_group("data")
    data.add_argument("--data-root", default="datasets/synthetic", help="data set")
    data.add_argument("--split", default="valid", help="its split")
    data.add_argument("--json", help="instead of --data-root: the annotation file")
    data.add_argument("--images", help="with --json: the folder that its file names are relative to")
    data.add_argument("--short-side", type=at_least(1), default=96, help="short side of the frames, pixels (official: 360, Swin-L 448)")
    data.add_argument("--max-long-side", type=at_least(1), default=1333, help="pixels")
    result = parser.add_argument_group("result")
    result.add_argument("--top-k", type=at_least(1), default=10, help="instances a video (official: 10, OVIS 20)")
    result.add_argument("--output", help="folder to write (default: evaluation/ beside the weights)")
    result.add_argument("--draw", type=at_least(0), default=0, metavar="N", help="draw overlays of the first N videos")
    result.add_argument("--results", help="score this file instead of running a model")
    result.add_argument("--annotations", help="with --results: the ground truth")
    run = parser.add_argument_group("run")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda")
    run.add_argument("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="see train.py; off = float32")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> dict | None:
    """Evaluate or score as asked; returns the metrics, None where there is no ground truth."""
    if args.results or args.annotations:
        if not (args.results and args.annotations and args.output):
            raise InputError("scoring a file needs --results, --annotations and --output")
        return score(read_json(args.results), read_json(args.annotations), Path(args.output))

    if bool(args.json) != bool(args.images):
        raise InputError("--json and --images go together")
    videos = VideoSet(*((args.json, args.images) if args.json else find_split(args.data_root, args.split)))
    if videos.ground_truth.get("annotations"):
        check_ground_truth(videos.ground_truth)
    options = {"gate_mask": args.gate_mask} if args.gate_mask else {}
    model, config = model_from_checkpoint(args.weights, args.preset, args.propagation, **options)
    check_categories(model, config, videos, args.weights)
    _, _, device = start_processes(args.device)
    amp, reason = choose_amp(args.amp, device)
    output = Path(args.output) if args.output else Path(args.weights).parent / "evaluation"
    print(f"{args.weights}: {model.propagation} propagation, {model.num_classes} classes; {device.type}, "
          f"{str(amp).removeprefix('torch.')} ({reason}); deformable attention: {implementation(device)}\n"
          f"{len(videos)} videos of {videos.path}, {sum(len(video.files) for video in videos.videos)} frames; output {output}")
    model.to(device)

    began = time.perf_counter()
    results, frames = segment_set(model, videos, device, amp, args.short_side, args.max_long_side, args.top_k,
                                  output / "overlays", args.draw)
    seconds = time.perf_counter() - began
    peak = f", {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB of GPU memory" if device.type == "cuda" else ""
    print(f"{frames} frames in {seconds:.1f} s, {frames / seconds:.1f} a second with reading and encoding{peak}")

    output.mkdir(parents=True, exist_ok=True)
    save_json(output / "results.json", results, indent=None)
    if not videos.ground_truth.get("annotations"):
        print(f"{videos.path} has no annotations: zip {output / 'results.json'} and submit it to the benchmark's server")
        return None
    return score(results, videos.ground_truth, output)


def segment_set(model: GRAttVIS, videos: VideoSet, device: torch.device, amp: torch.dtype, short_side: int, max_long_side: int,
                top_k: int, folder: Path | None = None, drawn: int = 0) -> tuple[list[dict], int]:
    """The entries of results.json for all videos, and the number of frames; draws the first `drawn` videos into the folder."""
    results, frames = [], 0
    for number, video in enumerate(tqdm(videos.videos, desc="evaluate", mininterval=1)):
        with torch.autocast(device.type, amp, enabled=amp != torch.float32):
            found = model.segment_video(test_frames(video, short_side, max_long_side), (video.height, video.width), top_k)
        results += encode_results(video, found, videos.categories)
        frames += len(video.files)
        if number < drawn:
            draw_video(folder, video, found, videos.categories)
    return results, frames


def score(results: list[dict], ground_truth: dict, output: Path) -> dict:
    """Print the table and write output/metrics.json."""
    metrics = evaluate_results(results, ground_truth)
    print(format_table(metrics))
    output.mkdir(parents=True, exist_ok=True)
    save_json(output / "metrics.json", metrics)
    return metrics


def check_categories(model: GRAttVIS, config: dict, videos: VideoSet, weights: str) -> None:
    """InputError unless the checkpoint's classes are those of the data set."""
    if model.num_classes != len(videos.categories):
        raise InputError(f"{weights} has {model.num_classes} classes, {videos.path} has {len(videos.categories)}")
    trained = [name for _, name in config.get("categories", [])]
    if trained and trained != [name for _, name in videos.categories]:
        raise InputError(f"{weights} was trained on other classes than {videos.path} has: {', '.join(trained)}")


def encode_masks(masks: Tensor) -> list[dict]:
    """bool (I, H, W) -> I compressed RLEs with text counts."""
    columns = np.asfortranarray(masks.permute(1, 2, 0).cpu().numpy().astype(np.uint8))
    return [encoded | {"counts": encoded["counts"].decode()} for encoded in rle.encode(columns)]


def encode_results(video: Video, found: VideoResult, categories: list[tuple[int, str]]) -> list[dict]:
    """The entries of results.json for one video: one an instance, with a mask for every frame."""
    frames = [encode_masks(found.masks[:, t]) for t in range(found.masks.shape[1])]
    return [{"video_id": video.id, "score": score, "category_id": categories[label][0],
             "segmentations": [frame[instance] for frame in frames]}
            for instance, (score, label) in enumerate(zip(found.scores.tolist(), found.labels.tolist()))]


def draw_video(folder: Path, video: Video, found: VideoResult, categories: list[tuple[int, str]]) -> None:
    """Overlays of the instances that score at least DRAWN_SCORE, of each query under its best label only."""
    tracks, first = found.track_ids.tolist(), {}
    for index, track in enumerate(tracks):
        if found.scores[index] >= DRAWN_SCORE:
            first.setdefault(track, index)
    chosen = list(first.values())
    captions = [f"{categories[found.labels[index]][1]} {found.scores[index]:.2f}" for index in chosen]
    frames = [np.array(read_frame(file, video.height, video.width)) for file in video.files]
    save_pictures(folder, f"{video.id:05d}", frames, found.masks[chosen].cpu(), [tracks[index] for index in chosen], captions)


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except InputError as error:
        exit_with_sentence(error)
