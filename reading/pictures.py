"""Reads untrusted image files as RGB, with bounded memory.

picture = read_picture(Path("frame.jpg"))     # a Pillow image, mode RGB
for picture in read_animation(Path("clip.webp")):
    ...
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from reading.regular import read_regular
from runtime.errors import InputError

MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # of a picture; a small file can claim any number
MAX_FILE_SIZE = 2**30  # bytes; the largest uncompressed picture of 16 bits has 0.7 GB
# Common formats of frames. Decoders of other formats are rarely tested, and PostScript files are
# programs.
Image.init()
PICTURE_FORMATS = [
    name
    for name in Image.OPEN
    if name
    in (
        "AVIF",
        "BMP",
        "DIB",
        "GIF",
        "ICO",
        "JPEG",
        "JPEG2000",
        "PCX",
        "PNG",
        "PPM",
        "QOI",
        "SGI",
        "TGA",
        "TIFF",
        "WEBP",
    )
]
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339  # tags
WHITE_IS_ZERO, UNSIGNED = 0, 1  # their values
# check_pixels raises an error instead of this warning.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def check_pixels(height: int, width: int, what: str) -> None:
    """InputError if a picture is too large; called before memory is allocated."""
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise InputError(
            f"{what} is said to be {width}x{height}: at least 1x1 and at most "
            f"{MAX_PIXELS} pixels are read"
        )


def read_picture(path: Path) -> Image.Image:
    """Read an RGB picture, rotated according to EXIF; the first frame of an animation.

    Raises InputError if it is damaged, not a regular file, or has values of an unknown range.
    """
    with open_picture(path) as file:
        check_pixels(file.height, file.width, f"frame {path}")
        picture = to_rgb(file)
        ImageOps.exif_transpose(picture, in_place=True)
        picture.load()
        return picture


def read_animation(path: Path) -> Iterator[Image.Image]:
    """Yield all frames of an animation or a picture, like `read_picture`."""
    with open_picture(path) as file:
        for frame in ImageSequence.Iterator(file):
            check_pixels(frame.height, frame.width, f"a frame of {path}")
            picture = to_rgb(frame)
            if picture is frame:  # would be overwritten by the next frame
                picture = frame.copy()
            ImageOps.exif_transpose(picture, in_place=True)
            yield picture


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """Open a picture or animation without decoding it; any failure is an InputError.

    The whole file is read first, because Pillow would allocate as much memory as the file claims.
    """
    try:
        content = read_regular(path, MAX_FILE_SIZE)
        with Image.open(io.BytesIO(content), formats=PICTURE_FORMATS) as file:
            yield file
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(
            f"frame {path} cannot be read: cannot identify image file {str(path)!r}"
        ) from error
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        reason = " ".join(str(error).split()) or repr(error)
        raise InputError(f"frame {path} cannot be read: {reason}") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture to mode RGB with 8 bits; a picture of that mode is returned unchanged.

    Grey values of more bits are scaled to 8 bits; Pillow would clip them. Raises ValueError if the
    format does not define their range.
    """
    tags = getattr(picture, "tag_v2", {})  # of a TIFF
    signed = any(value != UNSIGNED for value in tags.get(TIFF_SAMPLE_FORMAT, ()))  # or floats
    # Pillow reads 16-bit PGM files as 32-bit integers; older versions PNG files too.
    sixteen_bit = (
        picture.mode.startswith("I;16") or picture.mode == "I" and picture.format in ("PNG", "PPM")
    )
    if signed or picture.mode in ("I", "F") and not sixteen_bit:
        raise ValueError(
            "it holds signed, 32-bit or floating-point numbers, which state no range "
            "of brightness; save it with 8 or 16 unsigned bits"
        )
    if sixteen_bit:
        bits = tags.get(TIFF_BITS, (16,))[0]  # 12 of some cameras
        grey = (np.asarray(picture) >> (bits - 8)).astype(np.uint8)
        if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO:
            grey = 255 - grey
        info = {key: value for key, value in picture.info.items() if key != "transparency"}
        picture = Image.fromarray(grey)
        picture.info = info  # includes the EXIF data
    elif picture.mode == "La":  # premultiplied alpha, which Pillow converts in two steps
        picture = picture.convert("LA")
    return picture if picture.mode == "RGB" else picture.convert("RGB")
