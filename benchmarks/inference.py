"""The cost of evaluation: mask encoding, memory, frames per second, and chunk sizes.

    python benchmarks/inference.py             # all parts; --parts encoding memory speed chunks

Encoding: 28,800 masks of 360x640 (60 videos, 40 frames, 12 predictions), compared with pycocotools
mask by mask as in the official code (vita/data/ytvis_eval.py). Memory: peak memory of the GPU and
the process for several video lengths. Speed: from JPEG files of 720x1280 to results.json, by stage
and in total. Chunks: how results depend on the number of frames that the detector processes
together. The model is R-50 with random weights, which do not affect these numbers.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batching import split_video  # noqa: E402
from data import VideoSet  # noqa: E402
from deform_attn import implementation  # noqa: E402
from evaluation import postprocess  # noqa: E402
from evaluation.inference import FrameBatches, segment_videos, to_entries  # noqa: E402
from evaluation.postprocess import mask_sum_and_area, resize_masks  # noqa: E402
from evaluation.run_length import encode, encode_counts  # noqa: E402
from fast import video_pipeline  # noqa: E402
from model import build_model  # noqa: E402
from runtime.device import choose_amp  # noqa: E402
from runtime.loading import read_ahead  # noqa: E402
from transformer import mask_logits  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
AMP, _ = choose_amp("auto", DEVICE)
HEIGHT, WIDTH, OUTPUT = 360, 640, (720, 1280)


def seconds(function, repeat: int = 3) -> float:
    """The median time of a call, the GPU's work included; one call before to warm up."""
    times = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        function()
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[repeat // 2]


def make_masks(count: int, device: torch.device) -> torch.Tensor:
    """bool (count, 360, 640): ellipses with wavy outlines."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.arange(HEIGHT, device=device)[:, None], torch.arange(WIDTH, device=device)
    draws = torch.rand(count, 6, generator=generator).to(device)[:, :, None, None]
    down, right = (
        (y - 60 - 240 * draws[:, 0]) / (20 + 60 * draws[:, 2]),
        (x - 100 - 440 * draws[:, 1]) / (20 + 80 * draws[:, 3]),
    )
    angle = torch.atan2(down, right)
    return down**2 + right**2 < 1 + 0.2 * torch.sin(5 * angle + 6 * draws[:, 4]) + 0.05 * torch.sin(
        17 * angle + 6 * draws[:, 5]
    )


def encoding() -> None:
    """28,800 masks: pycocotools one by one, ours on the CPU and on the GPU.

    2,880 of them measured on the CPU.
    """
    masks = make_masks(2880, torch.device("cpu"))
    arrays = masks.numpy()

    def official() -> list[bytes]:
        return [
            rle.encode(np.array(mask[:, :, None], order="F", dtype="uint8"))[0]["counts"]
            for mask in arrays
        ]

    assert official() == encode_counts(masks)
    theirs, ours = (
        10 * seconds(official),
        10 * seconds(lambda: [encode(chunk) for chunk in masks.split(480)]),
    )
    characters = np.mean([len(code) for code in encode_counts(masks)])
    print(
        f"encoding 28,800 masks of {HEIGHT}x{WIDTH}, {characters:.0f} characters each: pycocotools "
        f"{theirs:.2f} s; "
        f"ours on the CPU with {torch.get_num_threads()} threads {ours:.2f} s ({theirs / ours:.1f} "
        "times as fast)",
        end="",
    )
    if CUDA:
        on_gpu = make_masks(480, DEVICE)
        assert encode_counts(on_gpu) == encode_counts(on_gpu.cpu())
        there = 60 * seconds(lambda: encode(on_gpu))
        print(f", on the GPU {there:.3f} s ({theirs / there:.0f} times)", end="")
    print()


def make_model() -> torch.nn.Module:
    """R-50 on the device, with random weights."""
    torch.manual_seed(0)
    return build_model("r50", 25).to(DEVICE).accelerate(AMP)


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE.type, AMP, enabled=CUDA)


def make_batches(frames: int, chunk: int):
    """Batches of a video of noise, generated on demand."""
    generator = torch.Generator().manual_seed(0)
    for first in range(0, frames, chunk):
        small = torch.randint(
            0, 256, (min(chunk, frames - first), 3, HEIGHT // 20, WIDTH // 20), generator=generator
        )
        yield small.repeat_interleave(20, 2).repeat_interleave(20, 3).to(torch.uint8)


def memory(lengths: list[int], chunk: int) -> None:
    """Peaks while a video of each length is encoded.

    The process must not grow by more than the codes of all queries a frame.
    """
    model, counted, last = make_model(), [], None

    def encode_and_count(masks: torch.Tensor) -> list[bytes]:
        codes = encode_counts(masks)
        counted.append(sum(map(len, codes)))
        return codes

    postprocess.encode_counts = encode_and_count
    for frames in [8, *lengths]:  # the first warms up
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        counted.clear()
        with autocast():
            result = model.encode_video(make_batches(frames, chunk), OUTPUT, 20)
        now, codes = (
            resident(),
            sum(len(code["counts"]) for track in result.segmentations for code in track),
        )
        peak = f"{torch.cuda.max_memory_reserved() / 1e9:.3f} GB of GPU memory, " if CUDA else ""
        growth = (
            f"{1e3 * (now - last[1]) / (frames - last[0]):.1f} kB a frame since {last[0]}"
            if last
            else "first"
        )
        print(
            f"memory at {frames} frames: {peak}the process {now:.0f} MB ({growth}); codes a frame: "
            f"{sum(counted) / frames / 1e3:.1f} kB "
            f"of all queries, {codes / frames / 1e3:.1f} of the result; "
            f"{frames / (time.perf_counter() - began):.0f} frames a second"
        )
        last = frames, now
        del result
    postprocess.encode_counts = encode_counts


def resident() -> float:
    """The memory of this process, MB."""
    return (
        int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        * resource.getpagesize()
        / 1e6
    )


def make_set(root: Path, videos: int, frames: int) -> VideoSet:
    """Videos of JPEG files of 720x1280, about 250 kB each."""
    random = np.random.default_rng(0)
    texture = Image.fromarray(random.integers(0, 256, (180, 320, 3), dtype=np.uint8)).resize(
        (1480, 920), Image.Resampling.BICUBIC
    )
    content = {
        "categories": [{"id": 1 + number, "name": f"class {number}"} for number in range(25)],
        "videos": [],
    }
    for video in range(videos):
        names = [f"{video}/{frame:05d}.jpg" for frame in range(frames)]
        (root / str(video)).mkdir(parents=True)
        for frame, name in enumerate(names):
            texture.crop((frame % 200, frame % 199, 1280 + frame % 200, 720 + frame % 199)).save(
                root / name, quality=90
            )
        content["videos"].append(
            {"id": video + 1, "height": 720, "width": 1280, "length": frames, "file_names": names}
        )
    (root / "valid.json").write_text(json.dumps(content), encoding="utf-8")
    return VideoSet(root / "valid.json", root)


def speed(videos: int, frames: int, chunk: int, workers: int) -> None:
    """Frames a second of each stage alone, and of all together."""
    model = make_model()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), autocast():
        data_set = make_set(Path(folder), videos, frames)
        size = sum(file.stat().st_size for file in data_set.videos[0].files) / frames / 1e3
        batches = FrameBatches(data_set.videos, HEIGHT, 1333, chunk)
        loader = read_ahead(batches, workers, DEVICE)
        began = time.perf_counter()
        one = [batches[number] for number in range(8)]
        alone = 8 * chunk / (time.perf_counter() - began)
        began = time.perf_counter()
        total = sum(len(batch) for batch in loader)
        decode = total / (time.perf_counter() - began)

        batch = next(split_video(one, video_pipeline.INFERENCE_CHUNK)).to(DEVICE)

        def track() -> tuple:
            state = model.tracker.initial_state(1)
            return video_pipeline.track(model, queries, 1, state, len(batch))

        queries, features = video_pipeline.detect_queries(model, batch)
        (_, kernel, _), _ = track()

        def masks() -> None:
            for kernels, feature in zip(kernel, features):
                logits = mask_logits(kernels[None], feature[None])[0]
                mask_sum_and_area(resize_masks(logits, (HEIGHT, WIDTH)))
                encode_counts(resize_masks(logits, (HEIGHT, WIDTH), OUTPUT) > 0)

        stages = {
            f"decoding ({workers} workers; {alone:.0f} a core)": 1 / decode,
            "detector": seconds(lambda: video_pipeline.detect_queries(model, batch), 9)
            / len(batch),
            "tracker, beside it": seconds(track, 9) / len(batch),
            "masks and codes of 100 queries": seconds(masks, 9) / len(batch),
        }
        print(
            f"{videos} videos of {frames} JPEG files of 720x1280, {size:.0f} kB each; "
            f"{implementation(DEVICE)}"
        )
        for name, each in stages.items():
            print(f"  {name}: {1e3 * each:.2f} ms a frame, {1 / each:.0f} frames a second")
        for _ in range(2):
            began = time.perf_counter()
            entries = [
                entry
                for video, result in segment_videos(
                    model, data_set.videos, DEVICE, AMP, HEIGHT, 1333, 20, chunk, workers
                )
                for entry in to_entries(video, result, data_set.categories)
            ]
            (Path(folder) / "results.json").write_text(json.dumps(entries), encoding="utf-8")
            print(
                "  from files to results.json: "
                f"{videos * frames / (time.perf_counter() - began):.1f} frames a second"
            )


def chunks(frames: int) -> None:
    """The same video in chunks of 1, 4 and 32, in float32 and in 16 bit."""
    torch.manual_seed(0)
    model, video = (
        build_model("r50", 25).eval().to(DEVICE),
        torch.cat(list(make_batches(frames, 8))),
    )
    for enabled in (False, True) if CUDA else (False,):
        results = {}
        for chunk in (1, 4, 32):
            with torch.autocast(DEVICE.type, AMP, enabled=enabled):
                results[chunk] = model.encode_video(video.split(chunk), OUTPUT, 20)
        for chunk in (4, 32):
            one, other = results[1], results[chunk]
            same = (
                one.track_ids.tolist() == other.track_ids.tolist()
                and one.labels.tolist() == other.labels.tolist()
            )
            different = sum(
                a != b
                for first, second in zip(one.segmentations, other.segmentations)
                for a, b in zip(first, second)
            )
            print(
                f"chunks of {chunk} against 1, {AMP if enabled else torch.float32}: same instances "
                f"{same}, scores differ by up to "
                f"{(one.scores - other.scores).abs().max():.1e}, {different} of {20 * frames} "
                "masks differ"
            )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measure inference.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["encoding", "memory", "speed", "chunks"],
        choices=("encoding", "memory", "speed", "chunks"),
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[36, 200, 2000], help="frames, of the memory part"
    )
    parser.add_argument("--videos", type=int, default=24)
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--chunk", type=int, default=video_pipeline.INFERENCE_CHUNK)
    parser.add_argument("--workers", type=int, default=15)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Run the parts selected on the command line."""
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if CUDA else 'CPU'}")
    if "encoding" in args.parts:
        encoding()
    if "memory" in args.parts:
        memory(args.lengths, args.chunk)
    if "speed" in args.parts:
        speed(args.videos, args.frames, args.chunk, args.workers)
    if "chunks" in args.parts:
        chunks(32)


if __name__ == "__main__":
    main(parse_arguments())
