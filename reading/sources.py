"""Reads the frames of a source: a video file, pictures, a camera, a stream or a synthetic scene.

    for picture in read_frames("clip.mp4"):    # Pillow images, mode RGB
        ...

A source is the first argument of demo.py, which lists the kinds. Video files and cameras need
ffmpeg, see videos.py.
"""

import glob
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image

from reading.pictures import PICTURE_FORMATS, read_animation, read_picture
from reading.videos import read_ppm, read_video
from runtime.errors import InputError
from synthetic.rendering import make_video
from synthetic.suites import HEIGHT, SUITES, WIDTH


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


def read_again(source: str, size: tuple[int, int], count: int) -> Iterator[np.ndarray]:
    """The frames that were segmented, uint8 (H, W, 3); InputError if the source has changed."""
    number = -1
    with closing(read_frames(source)) as pictures:
        for number, picture in zip(range(count), pictures):
            check_size(picture, size[::-1], number, source)
            yield np.array(picture)
        if number + 1 < count or next(pictures, None) is not None:
            raise InputError(f"{source} has changed meanwhile: it no longer has {count} frames")
