"""Segment and track the objects of any video, and draw them.

    python demo.py                  # three held-out synthetic scenes with occlusions
    python demo.py degraded:3       # or easy, occlusion, look-alike, long: a scene of a suite
    python demo.py clip.mp4 --weights grattvis_r50_ovis.pth --preset r50 --short-side 360 \\
        --categories ovis/annotations/valid.json
    python demo.py "frames/*.jpg"   # or a folder of pictures, or an animated WebP or GIF
    python demo.py /dev/video0 --live  # prints the tracks of each frame of a camera
    ffmpeg -i rtsp://... -f image2pipe -c:v ppm -pix_fmt rgb24 - | python demo.py - --live

Video files and cameras need ffmpeg, version 4 or newer. The folder --output is created when all
results are complete: frames/ (overlays as PNG), overlay.webp (shrunk for long and large videos),
overlay.png (a sheet), overlay.mp4 (with ffmpeg), masks/ (a folder of PNGs per track), ids/ (one
PNG per frame, whose palette indices are track ids plus 1, as `data.py --from-masks` reads them) and
results.json. Scores are those of the whole video; with --live, of the frames so far.

Duplicates are left out: tracks whose IoU with a better track is above 0.9, or above 0.75 if they
score much lower (evaluation/duplicates.py). With --live, the IoU is that of each frame's masks.

This file has the command line, the model and the loop over frames; reading/sources.py reads the
frames, and viewing/results.py writes the results.
"""

import argparse
import glob
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from batching import batch_frames
from checkpoint import SHIPPED_WEIGHTS, default_short_side, model_from_checkpoint
from data import at_test_size, read_categories
from deform_attn import implementation
from evaluation.duplicates import distinct_in_frame, drop_duplicates
from evaluation.flags import add_exclusive_flag
from evaluation.postprocess import EncodedVideo, FrameTracks, check_finite
from model import PRESETS, GRAttVIS
from reading.sources import check_read_twice, check_size, is_scene, read_frames
from runtime.device import choose_amp, choose_device
from runtime.errors import InputError, cli_errors
from runtime.flags import at_least, finite
from synthetic.suites import SUITES
from tracker import PROPAGATIONS
from viewing.overlays import best_labels, name_to_draw
from viewing.plots import require_matplotlib
from viewing.results import check_output, publish, staging_folder, write_results

SCENES = ("occlusion:0", "occlusion:4", "occlusion:6")  # the default sources


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; the default weights are the shipped ones."""
    parser = argparse.ArgumentParser(
        description="Segment and track the objects of a video, and draw them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "source",
        nargs="?",
        help="a folder of pictures, a pattern such as 'frames/*.jpg', an animated WebP or GIF, a "
        "video file, a camera (/dev/video0), - for PPM pictures on standard input, or a held-out "
        f"synthetic scene: one of {', '.join(SUITES)} with a number, such as long:0 (default: "
        f"{', '.join(SCENES)}; with --live, the first)",
    )
    add(
        "--weights",
        default=SHIPPED_WEIGHTS,
        help="checkpoint, ours or official: a file or an https address",
    )
    add("--preset", choices=PRESETS, help="of an official checkpoint (ours contain it)")
    add("--propagation", choices=PROPAGATIONS, help="if the checkpoint does not imply it")
    add(
        "--categories",
        metavar="JSON",
        help="annotation file of a data set, for the class names of an official model",
    )
    add(
        "--short-side",
        type=at_least(1),
        help="of the frames, in pixels (default: the test size of the model; official: 360, Swin "
        "448)",
    )
    add("--max-long-side", type=at_least(1), default=1333, help="pixels")
    add("--top-k", type=at_least(1), default=20, help="instances per video, before --score")
    add("--score", type=finite, default=0.3, help="minimum score of an instance")
    add(
        "--keep-duplicates",
        action="store_true",
        help="also show tracks of an object that a better track follows already",
    )
    add(
        "--output",
        help="folder to write, which must not exist yet (default: demo/ and the name of the "
        "source); without a source, it contains a folder for each scene",
    )
    add("--fps", type=at_least(1), default=8, help="frames per second of the animation and the mp4")
    add(
        "--plot",
        action="store_true",
        help="plot when each track is visible and its gates are open (needs matplotlib)",
    )
    add(
        "--live",
        action="store_true",
        help="print the tracks of each frame as it arrives; writes nothing",
    )
    add_exclusive_flag(add)
    add("--device", default="auto", help="auto, cpu, cuda")
    add(
        "--amp",
        default="auto",
        choices=("auto", "bf16", "fp16", "off"),
        help="mixed precision: auto = fp16 on a GPU, off (float32) on a CPU",
    )
    add(
        "--chunk",
        type=at_least(1),
        default=8,
        help="frames loaded together; does not change the results",
    )
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Segment the sources and write the results, or track one live."""
    if args.plot:
        require_matplotlib()
    outputs = output_folders(args)
    if not args.live:
        for source, output in outputs.items():
            check_read_twice(source)
            check_output(output)
    model, config = model_from_checkpoint(args.weights, args.preset, args.propagation)
    args.short_side = args.short_side or default_short_side(config, args.preset)
    if args.live and model.frames_per_clip != 1:
        raise InputError(
            f"{args.weights} reads clips of several frames: it cannot follow a video live"
        )
    names = class_names(args, config, model.num_classes)
    device = choose_device(args.device)
    amp_dtype, reason = choose_amp(args.amp, device)
    model.to(device).accelerate(amp_dtype)
    model.exclusive = args.exclusive
    dtype = str(amp_dtype).removeprefix("torch.")
    print(
        f"{args.weights}: {model.propagation} propagation, {model.num_classes} classes, "
        f"short side {args.short_side}; {device.type}, {dtype} ({reason}); deformable attention: "
        f"{implementation(device)}",
        file=sys.stderr,
    )
    with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
        if args.live:
            (source,) = outputs
            with closing(read_frames(source)) as pictures:
                run_live(model, source, pictures, names, args)
        else:
            segment_sources(model, outputs, names, args)


def output_folders(args: argparse.Namespace) -> dict[str, Path]:
    """{source: folder to write}."""
    if args.source is not None:
        return {args.source: Path(args.output or Path("demo") / default_name(args.source))}
    folder = Path(args.output or "demo")
    scenes = SCENES[:1] if args.live else SCENES
    return {scene: folder / default_name(scene) for scene in scenes}


def segment_sources(
    model: GRAttVIS, outputs: dict[str, Path], names: list[str], args: argparse.Namespace
) -> None:
    """Segment all sources, then move the results to their folders."""
    with ExitStack() as stack:
        folders, messages = {}, []
        for source, output in outputs.items():
            with closing(read_frames(source)) as pictures:
                result, size, count = segment(model, source, pictures, args)
            if not args.keep_duplicates:
                result = drop_duplicates(result)
            folders[output] = stack.enter_context(staging_folder(output))
            messages += write_results(
                folders[output],
                source,
                result,
                size,
                count,
                names,
                min_score=args.score,
                fps=args.fps,
                plot=args.plot,
            )
            messages.append(f"written to {output}")
        for output, folder in folders.items():
            publish(folder, output)
    print("\n".join(messages))  # last, because standard output may be closed


def default_name(source: str) -> str:
    """The folder name of a source: clip.mp4 -> clip, a/b/*.jpg -> b, long:0 -> long_0."""
    path = Path(source.replace(":", "_") if is_scene(source) else source)
    is_pattern = glob.escape(source) != source
    return (path.parent.name if is_pattern else path.stem) or "frames"


def class_names(args: argparse.Namespace, config: dict, count: int) -> list[str]:
    """Class names of --categories or of the checkpoint; numbers if there are none."""
    if args.categories:
        categories = read_categories(args.categories)
    else:
        categories = config.get("categories", [])
    if categories and len(categories) != count:
        source = args.categories or "its config"
        raise InputError(f"{args.weights} has {count} classes, {source} has {len(categories)}")
    return [name for _, name in categories] or [f"class {label}" for label in range(count)]


# Live


def run_live(
    model: GRAttVIS,
    source: str,
    pictures: Iterator[Image.Image],
    names: list[str],
    args: argparse.Namespace,
) -> None:
    """Print the tracks of each frame as it arrives."""
    state, size = None, None
    for number, picture in enumerate(pictures):
        size = size or picture.size
        check_size(picture, size, number, source)
        frame = at_test_size(picture, args.short_side, args.max_long_side)
        tracks, state = model.step(frame, state, size[::-1], args.top_k)
        check_finite(tracks.scores)
        chosen = best_labels(tracks, args.score)
        if not args.keep_duplicates:
            chosen = distinct_in_frame(tracks, chosen)
        visible = [
            describe_track(tracks, index, names) for index in chosen if tracks.masks[index].any()
        ]
        print(f"frame {number}: {'; '.join(visible) or 'nothing'}", flush=True)
        if getattr(sys.stdout, "broken", False):  # its reader has exited
            return


def describe_track(tracks: FrameTracks, index: int, names: list[str]) -> str:
    """Class, track id, score so far, and bounding box of an instance."""
    mask = tracks.masks[index]
    rows = mask.any(1).nonzero().flatten().tolist()
    columns = mask.any(0).nonzero().flatten().tolist()
    name = name_to_draw(names[tracks.labels[index]])
    return (
        f"{name} #{tracks.track_ids[index]} {tracks.scores[index]:.2f} at "
        f"{columns[0]},{rows[0]} to {columns[-1]},{rows[-1]}"
    )


# A whole video


def segment(
    model: GRAttVIS, source: str, pictures: Iterator[Image.Image], args: argparse.Namespace
) -> tuple[EncodedVideo, tuple[int, int], int]:
    """The instances of a video, the size of its frames (height, width), and their number."""
    first = next(pictures, None)
    if first is None:
        raise InputError(f"{source} has no frames")
    size = first.size[::-1]
    count = 1

    def frames() -> Iterator[torch.Tensor]:
        nonlocal count
        yield at_test_size(first, args.short_side, args.max_long_side)
        for picture in tqdm(pictures, desc="segment", unit="frame", initial=1):
            check_size(picture, first.size, count, source)
            count += 1
            yield at_test_size(picture, args.short_side, args.max_long_side)

    result = model.encode_video(batch_frames(frames(), args.chunk), size, args.top_k)
    return result, size, count


if __name__ == "__main__":
    with cli_errors():
        main(parse_arguments())
