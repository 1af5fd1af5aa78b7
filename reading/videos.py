"""Videos of strangers: ffmpeg decodes files and cameras, and hands over PPM pictures.

    for picture in read_video(["-i", "file:clip.mp4"], "clip.mp4"):   # Pillow images, mode RGB
        ...

Works with ffmpeg 4 and newer: where an option was renamed, ffmpeg itself is asked.
"""
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

from PIL import Image

from reading.pictures import LARGEST_PICTURE, check_pixels
from runtime.errors import InputError

MOST_SAID = 2 ** 16  # bytes of what ffmpeg says; the cause comes first
LONGEST_LINE = 300  # characters
# Before a line: "[mov,mp4,m4a,3gp,3g2,mj2 @ 0x5581c8b0]".
COMPONENT = re.compile(r"(\[[^\]]* @ (0x)?[0-9a-fA-F]+\] ?)+")
# Lines that ffmpeg adds to a line before them, and one of the dynamic linker.
UNINFORMATIVE = re.compile(r"Error |Conversion failed|Nothing was written|"
                           r".*no version information available")


def read_video(opened: list[str], name: str) -> Iterator[Image.Image]:
    """The frames of a video file or camera, each of them once.

    `opened`: the arguments that name it. Raises InputError with the cause that ffmpeg states.
    """
    if not shutil.which("ffmpeg"):
        raise InputError(f"{name} is read with ffmpeg, which is not on PATH: install it, or give "
                         "a folder of pictures")
    command = ["ffmpeg", "-nostdin", "-loglevel", "error", *opened, *every_frame_once(),
               "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
    with tempfile.TemporaryFile() as said:  # a pipe would be full: damaged files have many errors
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said) as process:
            try:
                yield from read_ppm(process.stdout, name)
            except BaseException:  # leaving the block waits for ffmpeg, which waits for a camera
                process.kill()
                raise
        if process.returncode:
            said.seek(0)
            reason = informative_line(said.read(MOST_SAID), process.returncode)
            raise InputError(f"ffmpeg cannot read {name}: {reason}")


def every_frame_once() -> list[str]:
    """The option that neither drops nor repeats frames to keep a rate.

    It is -fps_mode since ffmpeg 5.1, and was -vsync before, which ffmpeg 9 no longer has. Builds
    from git have no version number, so whether the newer option exists is tried.
    """
    tried = subprocess.run(["ffmpeg", "-loglevel", "quiet", "-fps_mode", "passthrough", "-version"],
                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
    return ["-vsync" if tried.returncode else "-fps_mode", "passthrough"]


def informative_line(said: bytes, status: int) -> str:
    """The line that states the cause, among all that ffmpeg wrote to standard error.

    That is the first one: those after it tell what could not be done because of it. (The last one
    is "Error opening input files: Invalid data found when processing input" of many causes.)
    """
    lines = [COMPONENT.sub("", line).strip()
             for line in said.decode("utf-8", "replace").splitlines()]
    lines = [line for line in lines if line]
    informative = [line for line in lines if not UNINFORMATIVE.match(line)]
    first = (informative or lines or [f"exit status {status}"])[0]
    return "".join(letter if letter.isprintable() else "?" for letter in first[:LONGEST_LINE])


def read_ppm(stream: BinaryIO, name: str) -> Iterator[Image.Image]:
    """Binary PPM pictures, one behind the other, until the stream ends."""
    while header := stream.readline(8):
        size, depth = stream.readline(32).split(), stream.readline(8).strip()
        sides = [int(side) for side in size if side.isdigit() and 0 < int(side) <= LARGEST_PICTURE]
        well_formed = (header.strip() == b"P6" and len(size) == 2 and len(sides) == 2
                       and depth == b"255")
        if not well_formed:
            raise InputError(f"{name} is no stream of PPM pictures: make one with ffmpeg -i ... "
                             "-f image2pipe -c:v ppm -pix_fmt rgb24 -")
        check_pixels(sides[1], sides[0], f"a frame of {name}")
        pixels = stream.read(3 * math.prod(sides))
        if len(pixels) < 3 * math.prod(sides):
            raise InputError(f"{name} ends in the middle of a picture")
        yield Image.frombytes("RGB", sides, pixels)
