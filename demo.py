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
"""

import argparse
import glob
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from tqdm import tqdm

from batching import batch_frames
from checkpoint import SHIPPED_WEIGHTS, default_short_side, model_from_checkpoint
from data import at_test_size, read_categories
from deform_attn import implementation
from evaluation.postprocess import EncodedVideo, FrameTracks, check_finite
from model import PRESETS, GRAttVIS
from reading.pictures import PICTURE_FORMATS, read_animation, read_picture
from reading.videos import informative_line, read_ppm, read_video
from runtime.device import choose_amp, choose_device
from runtime.errors import InputError, cli_errors
from runtime.files import file_name_for, save_json
from runtime.flags import at_least
from synthetic.rendering import make_video
from synthetic.suites import HEIGHT, SUITES, WIDTH
from tracker import PROPAGATIONS
from viewing.overlays import best_labels, colour_of, name_to_draw, overlays, save_pictures
from viewing.plots import plot_timeline, require_matplotlib

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
    add("--score", type=float, default=0.3, help="minimum score of an instance")
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
            folders[output] = stack.enter_context(staging_folder(output))
            messages += write(folders[output], source, result, size, count, names, args)
            messages.append(f"written to {output}")
        for output, folder in folders.items():
            publish(folder, output)
    print("\n".join(messages))  # last, because standard output may be closed


def default_name(source: str) -> str:
    """The folder name of a source: clip.mp4 -> clip, a/b/*.jpg -> b, long:0 -> long_0."""
    path = Path(source.replace(":", "_") if is_scene(source) else source)
    is_pattern = glob.escape(source) != source
    return (path.parent.name if is_pattern else path.stem) or "frames"


def check_output(output: Path) -> None:
    """InputError unless the folder does not exist and can be created. Nothing is left behind."""
    try:
        os.lstat(output)
    except (FileNotFoundError, NotADirectoryError):
        with staging_folder(output):
            return
    raise InputError(f"{output} is there already: give another --output")


@contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """A new folder, which `publish` moves to `output` when it is complete.

    It is inside a hidden folder on the same file system, which is removed when the block ends, so
    that `output` is never incomplete. Raises InputError if it cannot be created.
    """
    absolute = output.absolute()
    parent = next(parent for parent in absolute.parents if parent.exists())
    if not parent.is_dir():
        raise InputError(f"{output} cannot be made: {parent} is no folder")
    with ExitStack() as stack:
        try:
            hidden = stack.enter_context(
                tempfile.TemporaryDirectory(prefix=".demo-", dir=parent, ignore_cleanup_errors=True)
            )
            folder = Path(hidden) / absolute.relative_to(parent)  # tests the length of the path
            folder.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{output} cannot be made: {error.strerror}") from error
        yield folder


def publish(folder: Path, output: Path) -> None:
    """Move a complete folder to its place; InputError if the place is taken in the meantime."""
    if os.path.lexists(output):  # rename would replace an empty folder
        raise InputError(
            f"{output} has appeared meanwhile and is left as it is: give another --output"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(output)
    except OSError as error:
        raise InputError(f"{output} cannot be made: {error.strerror}") from error


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


# Sources of frames


def is_camera(path: Path) -> bool:
    """Whether a path is a device such as /dev/video0."""
    return path.exists() and stat.S_ISCHR(path.stat().st_mode)


def check_read_twice(source: str) -> None:
    """InputError unless the source can be read twice: for segmentation, then for overlays."""
    if source == "-" or is_camera(Path(source)) or Path(source).is_fifo():
        name = "standard input" if source == "-" else source
        raise InputError(f"{name} can be read only once: follow it with --live")


def is_picture(path: Path) -> bool:
    """Whether the extension is that of a picture or an animation which Pillow supports."""
    name = Image.registered_extensions().get(path.suffix.lower())
    return name in PICTURE_FORMATS


def is_scene(source: str) -> bool:
    """Whether a source is the name of a suite and a number, such as occlusion:0."""
    suite, _, number = source.partition(":")
    return suite in SUITES and number.isdecimal() and len(number) < 20  # a limit for int()


def by_number(path: Path) -> list[str | int]:
    """A sort key that puts 2.png before 10.png."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def read_frames(source: str) -> Iterator[Image.Image]:
    """Yield the frames of a source, RGB; InputError naming everything tried if there are none."""
    path = Path(source)
    if source == "-":
        if sys.stdin is None:
            raise InputError("standard input is closed")
        yield from read_ppm(sys.stdin.buffer, "standard input")
    elif is_camera(path):
        yield from read_video(["-f", "v4l2", "-i", source], source)
    elif is_scene(source):
        yield from render(source)
    elif path.is_dir() or not path.exists():
        files = path.iterdir() if path.is_dir() else map(Path, glob.glob(source))
        files = sorted(filter(is_frame, files), key=by_number)
        if not files:
            raise InputError(
                f"no frames at {source}: it is no file, no camera, neither a folder "
                "nor a pattern of pictures, and no scene such as long:0 of the suites "
                f"{', '.join(SUITES)}"
            )
        for file in files:
            yield read_picture(file)
    elif is_picture(path):
        yield from read_animation(path)
    else:
        yield from read_video(["-i", f"file:{source}"], source)


def is_frame(path: Path) -> bool:
    """Whether a file in a folder is a frame.

    Hidden files are not: macOS creates ._00000.jpg next to 00000.jpg on foreign file systems.
    """
    return is_picture(path) and not path.name.startswith(".") and not path.is_dir()


def render(scene: str) -> Iterator[Image.Image]:
    """The frames of a held-out scene, without JPEG compression.

    occlusion:0 is the first video of the valid split of `data.py --suite occlusion`.
    """
    name, _, number = scene.partition(":")
    suite = SUITES[name]
    generator = np.random.default_rng((0, 1, int(number)))  # seed 0, second split, this video
    frames, _ = make_video(generator, suite.frames, HEIGHT, WIDTH, suite.objects, suite.difficulty)
    yield from map(Image.fromarray, frames)


def check_size(picture: Image.Image, size: tuple[int, int], number: int, source: str) -> None:
    """InputError unless a frame has the size (width, height) of the first one."""
    if picture.size != size:
        raise InputError(
            f"frame {number} of {source} is {picture.width}x{picture.height}, the "
            f"first {size[0]}x{size[1]}"
        )


# Live


def run_live(
    model: GRAttVIS,
    source: str,
    pictures: Iterator[Image.Image],
    names: list[str],
    args: argparse.Namespace,
) -> None:
    """Print the tracks of each frame as it arrives."""
    state, size = model.reset(), None
    for number, picture in enumerate(pictures):
        size = size or picture.size
        check_size(picture, size, number, source)
        frame = at_test_size(picture, args.short_side, args.max_long_side)
        tracks, state = model.step(frame, state, size[::-1], args.top_k)
        check_finite(tracks.scores)
        visible = [
            describe_track(tracks, index, names)
            for index in best_labels(tracks, args.score)
            if tracks.masks[index].any()
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


def write(
    folder: Path,
    source: str,
    result: EncodedVideo,
    size: tuple[int, int],
    count: int,
    names: list[str],
    args: argparse.Namespace,
) -> list[str]:
    """Write the results (see the top of this file); returns messages to print."""
    tracks = []
    for index in best_labels(result, args.score):
        label = names[result.labels[index]]
        track_id = int(result.track_ids[index])
        codes = result.segmentations[index]
        write_masks(folder / "masks" / f"{track_id:03d}_{file_name_for(label)}", codes)
        tracks.append(
            {
                "track_id": track_id,
                "category": label,
                "score": float(result.scores[index]),
                "segmentations": codes,
                "gates_open": result.gates[index].tolist(),
            }
        )
    if tracks:
        write_ids(folder / "ids", tracks, size, count)
    save_json(
        folder / "results.json",
        {
            "source": source,
            "height": size[0],
            "width": size[1],
            "frames": count,
            "tracks": tracks,
        },
    )
    with closing(read_again(source, size, count)) as frames:
        frames = tqdm(frames, desc="draw", unit="frame", total=count)
        pictures = overlays(frames, result, names, args.score)
        save_pictures(folder, "overlay", pictures, count, 1000 / args.fps, folder / "frames")
    messages = make_mp4(folder, args.fps) if shutil.which("ffmpeg") else []
    if args.plot:
        plot_timeline(folder / "timeline.png", result, names, args.score)
    message = f"{count} frames, {len(tracks)} tracks that score {args.score} or more"
    described = [
        f"{name_to_draw(track['category'])} #{track['track_id']} {track['score']:.2f}"
        for track in tracks
    ]
    if described:
        message += ": " + "; ".join(described)
    return [*messages, message]


def write_masks(folder: Path, codes: list[dict]) -> None:
    """Write the masks of a track as one PNG per frame."""
    folder.mkdir(parents=True)
    for t, code in enumerate(codes):
        Image.fromarray(rle.decode(code) * 255).save(folder / f"{t:05d}.png")


def write_ids(folder: Path, tracks: list[dict], size: tuple[int, int], count: int) -> None:
    """Write one PNG per frame with track ids plus 1 as palette indices, 0 = background.

    tracks: best first. Where masks overlap, the better track is visible. Ids too large for a
    palette become grey values of 16 bits.
    """
    folder.mkdir()
    large = any(track["track_id"] >= 255 for track in tracks)
    palette = [0, 0, 0, *(value for track in range(255) for value in colour_of(track))]
    for t in range(count):
        ids = np.zeros(size, dtype=np.uint16 if large else np.uint8)
        for track in reversed(tracks):
            ids[rle.decode(track["segmentations"][t]).astype(bool)] = track["track_id"] + 1
        picture = Image.fromarray(ids)
        if not large:
            picture.putpalette(palette)  # mode P
        picture.save(folder / f"{t:05d}.png")


def read_again(source: str, size: tuple[int, int], count: int) -> Iterator[np.ndarray]:
    """The frames that were segmented, uint8 (H, W, 3); InputError if the source has changed."""
    number = -1
    with closing(read_frames(source)) as pictures:
        for number, picture in zip(range(count), pictures):
            check_size(picture, size[::-1], number, source)
            yield np.array(picture)
        if number + 1 < count or next(pictures, None) is not None:
            raise InputError(f"{source} has changed meanwhile: it no longer has {count} frames")


def make_mp4(folder: Path, fps: int) -> list[str]:
    """Encode the overlays in frames/ as overlay.mp4; returns a message if that fails."""
    command = [
        "ffmpeg",
        "-loglevel",
        "error",
        "-framerate",
        str(fps),
        "-i",
        "frames/%05d.png",
        "-vf",
        "pad=ceil(iw/2)*2:ceil(ih/2)*2",
        "-pix_fmt",
        "yuv420p",
        "overlay.mp4",
    ]
    # Run in the folder, because its name may contain a %.
    made = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder)
    if not made.returncode:
        return []
    (folder / "overlay.mp4").unlink(missing_ok=True)
    return [f"overlay.mp4 was not made: {informative_line(made.stderr, made.returncode)}"]


if __name__ == "__main__":
    with cli_errors():
        main(parse_arguments())
