"""Any video in, pictures out: segment and track a video of your own, or follow a live one.

    python demo.py                                 # three held-out synthetic scenes with hidden objects: no files needed
    python demo.py degraded:3                      # a scene of another suite: easy, occlusion, look-alike, degraded, long
    python demo.py clip.mp4 --weights grattvis_r50_ovis.pth --preset r50 --short-side 360 --categories ovis/annotations/valid.json
    python demo.py "frames/*.jpg"                  # or a folder of pictures, or an animated WebP or GIF; no ffmpeg needed
    python demo.py /dev/video0 --live              # prints the tracks of every frame as it comes (ffmpeg opens cameras)
    ffmpeg -i rtsp://... -f image2pipe -c:v ppm -pix_fmt rgb24 - | python demo.py - --live

Video files and cameras are read with ffmpeg, version 4 or newer. Writes into --output, which
appears when everything in it is finished: frames/ (overlays as PNG), overlay.webp (smaller for long
and large videos), overlay.png (a sheet), overlay.mp4 where ffmpeg is installed, masks/ (a folder of
PNGs for each track) and results.json. Scores are of the whole video; with --live, of the frames so
far.
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
from evaluation.postprocess import EncodedVideo, check_finite
from model import PRESETS, GRAttVIS
from reading.pictures import PICTURE_FORMATS, read_animation, read_picture
from reading.videos import informative_line, read_ppm, read_video
from recipes import at_least
from runtime.device import choose_amp, choose_device
from runtime.errors import InputError, cli_errors
from runtime.files import file_name_for, save_json
from synthetic.suites import HEIGHT, SUITES, WIDTH, make_video
from tracker import PROPAGATIONS
from viewing.overlays import best_labels, name_to_draw, overlays, save_pictures
from viewing.plots import plot_timeline, require_matplotlib

SCENES = ("occlusion:0", "occlusion:4", "occlusion:6")  # shown where no source is given


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; the default weights are those that come with the code."""
    parser = argparse.ArgumentParser(description="Segment and track the objects of a video, and draw them.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("source", nargs="?", help="a folder of pictures, a pattern such as 'frames/*.jpg', an animated WebP or GIF, a "
                        f"video file, a camera (/dev/video0), - for PPM pictures on standard input, or a held-out synthetic scene: one of "
                        f"{', '.join(SUITES)} with a number, as in long:0; without one, {', '.join(SCENES)} (with --live, the first)")
    parser.add_argument("--weights", default=SHIPPED_WEIGHTS, help="checkpoint, ours or official")
    parser.add_argument("--preset", choices=PRESETS, help="of an official checkpoint (ours say it themselves)")
    parser.add_argument("--propagation", choices=PROPAGATIONS, help="where the checkpoint does not tell it")
    parser.add_argument("--categories", metavar="JSON", help="a data set's annotation file: names of an official model's classes")
    parser.add_argument("--short-side", type=at_least(1), help="of the frames, pixels (default: what the model was made "
                        "for; official: 360, Swin 448)")
    parser.add_argument("--max-long-side", type=at_least(1), default=1333, help="pixels")
    parser.add_argument("--top-k", type=at_least(1), default=20, help="instances a video, before --score")
    parser.add_argument("--score", type=float, default=0.3, help="leave out instances that score less")
    parser.add_argument("--output", help="folder to write, which must not be there yet (default: demo/ and the source's name); "
                        "without a source, a folder for each scene in it")
    parser.add_argument("--fps", type=at_least(1), default=8, help="of the animation and the mp4, frames a second")
    parser.add_argument("--plot", action="store_true", help="draw when each track is seen and its gates open (needs matplotlib)")
    parser.add_argument("--live", action="store_true", help="print the tracks of every frame as it comes; nothing is written")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="auto = fp16 on a GPU, off (float32) on a CPU")
    parser.add_argument("--chunk", type=at_least(1), default=8, help="frames that are read together; no result depends on it")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Follow the source live, or segment it and write the pictures; without a source, those of some scenes."""
    if args.plot:
        require_matplotlib()
    if args.source is None:
        outputs = {source: Path(args.output or "demo") / default_name(source) for source in (SCENES[:1] if args.live else SCENES)}
    else:
        outputs = {args.source: Path(args.output or Path("demo") / default_name(args.source))}
    if not args.live:
        for source, output in outputs.items():
            check_read_twice(source)
            check_output(output)
    model, config = model_from_checkpoint(args.weights, args.preset, args.propagation)
    args.short_side = args.short_side or default_short_side(config, args.preset)
    if args.live and (model.propagation == "clip" or model.clip_length != 1):
        raise InputError(f"{args.weights} reads clips of several frames: it cannot follow a video live")
    names = class_names(args, config, model.num_classes)
    device = choose_device(args.device)
    amp, reason = choose_amp(args.amp, device)
    model.to(device).accelerate(amp)
    print(f"{args.weights}: {model.propagation} propagation, {model.num_classes} classes, short side {args.short_side}; {device.type}, "
          f"{str(amp).removeprefix('torch.')} ({reason}); deformable attention: {implementation(device)}", file=sys.stderr)
    if args.live:
        source, = outputs
        with torch.autocast(device.type, amp, enabled=amp != torch.float32):
            with closing(read_frames(source)) as pictures:
                follow(model, source, pictures, names, args)
        return
    with ExitStack() as stack:
        finished, said = {}, []
        for source, output in outputs.items():
            with torch.autocast(device.type, amp, enabled=amp != torch.float32):
                with closing(read_frames(source)) as pictures:
                    found, size, count = segment(model, source, pictures, args)
            finished[output] = stack.enter_context(staging_folder(output))
            said += write(finished[output], source, found, size, count, names, args)
            said.append(f"written to {output}")
        for output, folder in finished.items():
            publish(folder, output)
    print("\n".join(said))  # last, as standard output may be closed


def default_name(source: str) -> str:
    """Of a clip.mp4, clip; of a pattern, the folder that it looks into; of long:0, long_0."""
    path = Path(source.replace(":", "_") if is_scene(source) else source)
    return (path.parent.name if glob.escape(source) != source else path.stem) or "frames"


def check_output(output: Path) -> None:
    """InputError unless the folder is not there yet and can be made; nothing is left behind."""
    try:
        os.lstat(output)
    except (FileNotFoundError, NotADirectoryError):
        with staging_folder(output):
            return
    raise InputError(f"{output} is there already: give another --output")


@contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """A new folder for what `publish` moves to `output` when it is finished.

    It is inside of a hidden folder on the same file system, which is removed when the block ends,
    however it ends. So `output` is whole or not there at all. InputError if it cannot be made.
    """
    absolute = output.absolute()
    parent = next(parent for parent in absolute.parents if parent.exists())
    if not parent.is_dir():
        raise InputError(f"{output} cannot be made: {parent} is no folder")
    with ExitStack() as stack:
        try:
            hidden = stack.enter_context(tempfile.TemporaryDirectory(
                prefix=".demo-", dir=parent, ignore_cleanup_errors=True))
            folder = Path(hidden) / absolute.relative_to(parent)  # as long a name as it will have
            folder.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{output} cannot be made: {error.strerror}") from error
        yield folder


def publish(folder: Path, output: Path) -> None:
    """Move a finished folder to its place; InputError if something has appeared there meanwhile."""
    if os.path.lexists(output):  # a folder would replace an empty one
        raise InputError(f"{output} has appeared meanwhile and is left as it is: give another "
                         "--output")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(output)
    except OSError as error:
        raise InputError(f"{output} cannot be made: {error.strerror}") from error


def class_names(args: argparse.Namespace, config: dict, count: int) -> list[str]:
    """Of the checkpoint, or of --categories; numbers where neither tells them."""
    categories = read_categories(args.categories) if args.categories else config.get("categories", [])
    if categories and len(categories) != count:
        raise InputError(f"{args.weights} has {count} classes, {args.categories or 'its config'} has {len(categories)}")
    return [name for _, name in categories] or [f"class {label}" for label in range(count)]


# Frames from anywhere

def is_camera(path: Path) -> bool:
    """Whether it is a device such as /dev/video0."""
    return path.exists() and stat.S_ISCHR(path.stat().st_mode)


def check_read_twice(source: str) -> None:
    """InputError unless the source can be read twice: for the masks, then for the overlays."""
    if source == "-" or is_camera(Path(source)) or Path(source).is_fifo():
        name = "standard input" if source == "-" else source
        raise InputError(f"{name} can be read only once: follow it with --live")


def is_picture(path: Path) -> bool:
    """Whether Pillow reads files of that name, as a picture or an animation."""
    name = Image.registered_extensions().get(path.suffix.lower())
    return name in PICTURE_FORMATS


def is_scene(source: str) -> bool:
    """Whether it is a suite's name and a number, such as occlusion:0."""
    suite, _, number = source.partition(":")
    return suite in SUITES and number.isdecimal() and len(number) < 20  # which int() accepts


def by_number(path: Path) -> list[str | int]:
    """Sorts 2.png before 10.png."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def read_frames(source: str) -> Iterator[Image.Image]:
    """The frames of a source one after the other, RGB; InputError naming what was tried if there are none."""
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
            raise InputError(f"no frames at {source}: it is no file, no camera, neither a folder nor a pattern of pictures, and no "
                             f"scene such as long:0 of the suites {', '.join(SUITES)}")
        for file in files:
            yield read_picture(file)
    elif is_picture(path):
        yield from read_animation(path)
    else:
        yield from read_video(["-i", f"file:{source}"], source)


def is_frame(path: Path) -> bool:
    """Whether a file of a folder is one of its frames.

    Hidden files are none: macOS puts a ._00000.jpg beside 00000.jpg on disks of other systems.
    """
    return is_picture(path) and not path.name.startswith(".") and not path.is_dir()


def render(scene: str) -> Iterator[Image.Image]:
    """The frames of a held-out scene, before JPEG: occlusion:0 is the first of the valid split of `data.py --suite occlusion`."""
    name, _, number = scene.partition(":")
    suite = SUITES[name]
    generator = np.random.default_rng((0, 1, int(number)))                # of seed 0, the second split, that video
    frames, _ = make_video(generator, suite.frames, HEIGHT, WIDTH, suite.objects, suite.difficulty)
    yield from map(Image.fromarray, frames)


def check_size(picture: Image.Image, size: tuple[int, int], number: int, source: str) -> None:
    """InputError unless a frame has the size (width, height) of the first one."""
    if picture.size != size:
        raise InputError(f"frame {number} of {source} is {picture.width}x{picture.height}, the first {size[0]}x{size[1]}")


# Live

def follow(model: GRAttVIS, source: str, pictures: Iterator[Image.Image], names: list[str], args: argparse.Namespace) -> None:
    """Print the tracks of every frame as it comes: class, track, score so far, and the box that holds the mask."""
    state, size = model.reset(), None
    for number, picture in enumerate(pictures):
        size = size or picture.size
        check_size(picture, size, number, source)
        frame = at_test_size(picture, args.short_side, args.max_long_side)
        tracks, state = model.step(frame, state, size[::-1], args.top_k)
        check_finite(tracks.scores)
        shown = []
        for index in best_labels(tracks, args.score):
            if tracks.masks[index].any():
                rows, columns = (tracks.masks[index].any(axis).nonzero().flatten().tolist() for axis in (1, 0))
                name = name_to_draw(names[tracks.labels[index]])
                shown.append(f"{name} #{tracks.track_ids[index]} {tracks.scores[index]:.2f} at "
                             f"{columns[0]},{rows[0]} to {columns[-1]},{rows[-1]}")
        print(f"frame {number}: {'; '.join(shown) or 'nothing'}", flush=True)
        if getattr(sys.stdout, "broken", False):  # whoever read it has gone
            return


# A whole video

def segment(model: GRAttVIS, source: str, pictures: Iterator[Image.Image],
            args: argparse.Namespace) -> tuple[EncodedVideo, tuple[int, int], int]:
    """What is in the video, the size of its frames (height, width), and how many they are."""
    first = next(pictures, None)
    if first is None:
        raise InputError(f"{source} has no frames")
    size, count = first.size[::-1], 0

    def frames() -> Iterator[torch.Tensor]:
        nonlocal count
        yield at_test_size(first, args.short_side, args.max_long_side)
        for count, picture in enumerate(tqdm(pictures, desc="segment", unit="frame", initial=1), 1):
            check_size(picture, first.size, count, source)
            yield at_test_size(picture, args.short_side, args.max_long_side)

    return model.encode_video(batch_frames(frames(), args.chunk), size, args.top_k), size, count + 1


def write(folder: Path, source: str, found: EncodedVideo, size: tuple[int, int], count: int,
          names: list[str], args: argparse.Namespace) -> list[str]:
    """Fill the folder of results (see the top of this file); returns what is to be printed."""
    tracks = []
    for index in best_labels(found, args.score):
        label, track = names[found.labels[index]], int(found.track_ids[index])
        masks = folder / "masks" / f"{track:03d}_{file_name_for(label)}"
        masks.mkdir(parents=True)
        for t, code in enumerate(found.segmentations[index]):
            Image.fromarray(rle.decode(code) * 255).save(masks / f"{t:05d}.png")
        tracks.append({"track_id": track, "category": label, "score": float(found.scores[index]),
                       "segmentations": found.segmentations[index],
                       "gates_open": found.gates[index].tolist()})
    save_json(folder / "results.json", {"source": source, "height": size[0], "width": size[1],
                                        "frames": count, "tracks": tracks})
    with closing(read_again(source, size, count)) as frames:
        drawn = overlays(tqdm(frames, desc="draw", unit="frame", total=count), found, names,
                         args.score)
        save_pictures(folder, "overlay", drawn, count, 1000 / args.fps, folder / "frames")
    said = make_mp4(folder, args.fps) if shutil.which("ffmpeg") else []
    if args.plot:
        plot_timeline(folder / "timeline.png", found, names, args.score)
    best = "; ".join(f"{name_to_draw(track['category'])} #{track['track_id']} {track['score']:.2f}"
                     for track in tracks)
    return [*said, f"{count} frames, {len(tracks)} tracks that score {args.score} or more"
                   f"{': ' if best else ''}{best}"]


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
    """Make overlay.mp4 of the overlays in frames/; returns what is to be printed if that fails."""
    command = ["ffmpeg", "-loglevel", "error", "-framerate", str(fps), "-i", "frames/%05d.png",
               "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p", "overlay.mp4"]
    # from inside of the folder, whose name may have a %
    made = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder)
    if not made.returncode:
        return []
    (folder / "overlay.mp4").unlink(missing_ok=True)
    return [f"overlay.mp4 was not made: {informative_line(made.stderr, made.returncode)}"]


if __name__ == "__main__":
    with cli_errors():
        main(parse_arguments())
