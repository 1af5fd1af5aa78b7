"""Reads videos and cameras with ffmpeg, as a stream of PPM pictures.

    for picture in read_video(["-i", "file:clip.mp4"], "clip.mp4"):   # Pillow images, mode RGB
        ...

Works with ffmpeg 4 and newer; renamed options are detected by running ffmpeg.
"""

import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

from PIL import Image

from reading.pictures import MAX_PIXELS, check_pixels
from runtime.errors import InputError

MAX_OUTPUT = 2**16  # bytes of ffmpeg's messages; the cause comes first
MAX_LINE = 300  # characters
# Before a line: "[mov,mp4,m4a,3gp,3g2,mj2 @ 0x5581c8b0]".
COMPONENT = re.compile(r"(\[[^\]]* @ (0x)?[0-9a-fA-F]+\] ?)+")
# Lines of ffmpeg that only follow from an earlier line, and one of the dynamic linker.
UNINFORMATIVE = re.compile(
    r"Error |Conversion failed|Nothing was written|"
    r".*no version information available"
)


def read_video(opened: list[str], name: str) -> Iterator[Image.Image]:
    """Yield every frame of a video file or camera once.

    opened: ffmpeg arguments for the input. Raises InputError with the cause reported by ffmpeg.
    """
    if not shutil.which("ffmpeg"):
        raise InputError(
            f"{name} is read with ffmpeg, which is not on PATH: install it, or give "
            "a folder of pictures"
        )
    command = [
        "ffmpeg",
        "-nostdin",
        "-loglevel",
        "error",
        *opened,
        *every_frame_once(),
        "-f",
        "image2pipe",
        "-c:v",
        "ppm",
        "-pix_fmt",
        "rgb24",
        "-",
    ]
    with tempfile.TemporaryFile() as said:  # a pipe could fill up: damaged files cause many errors
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said) as process:
            try:
                yield from read_ppm(process.stdout, name)
            except BaseException:  # leaving the block would wait for ffmpeg
                process.kill()
                raise
        if process.returncode:
            said.seek(0)
            reason = informative_line(said.read(MAX_OUTPUT), process.returncode)
            raise InputError(f"ffmpeg cannot read {name}: {reason}")


def every_frame_once() -> list[str]:
    """The option that neither drops nor repeats frames to keep a frame rate.

    It is -fps_mode since ffmpeg 5.1, and was -vsync before, which ffmpeg 9 lacks. Builds from git
    have no version number, so the newer option is tested.
    """
    tried = subprocess.run(
        ["ffmpeg", "-loglevel", "quiet", "-fps_mode", "passthrough", "-version"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return ["-vsync" if tried.returncode else "-fps_mode", "passthrough"]


def informative_line(said: bytes, status: int) -> str:
    """The line of ffmpeg's error output that contains the cause.

    It is the first one; later lines are consequences. (The last one is often "Error opening input
    files: Invalid data found when processing input".)
    """
    lines = [
        COMPONENT.sub("", line).strip() for line in said.decode("utf-8", "replace").splitlines()
    ]
    lines = [line for line in lines if line]
    informative = [line for line in lines if not UNINFORMATIVE.match(line)]
    first = (informative or lines or [f"exit status {status}"])[0]
    return "".join(letter if letter.isprintable() else "?" for letter in first[:MAX_LINE])


def read_ppm(stream: BinaryIO, name: str) -> Iterator[Image.Image]:
    """Yield concatenated binary PPM pictures until the stream ends."""
    while header := stream.readline(8):
        size, depth = stream.readline(32).split(), stream.readline(8).strip()
        sides = [int(side) for side in size if side.isdigit() and 0 < int(side) <= MAX_PIXELS]
        well_formed = (
            header.strip() == b"P6" and len(size) == 2 and len(sides) == 2 and depth == b"255"
        )
        if not well_formed:
            raise InputError(
                f"{name} is no stream of PPM pictures: make one with ffmpeg -i ... "
                "-f image2pipe -c:v ppm -pix_fmt rgb24 -"
            )
        check_pixels(sides[1], sides[0], f"a frame of {name}")
        pixels = stream.read(3 * math.prod(sides))
        if len(pixels) < 3 * math.prod(sides):
            raise InputError(f"{name} ends in the middle of a picture")
        yield Image.frombytes("RGB", sides, pixels)
