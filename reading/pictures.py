"""Pictures of strangers: read as RGB, refused in one sentence, never more memory than they hold.

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

LARGEST_PICTURE = Image.MAX_IMAGE_PIXELS  # pixels; a small file can claim any number
LARGEST_FILE = 2 ** 30  # bytes; the largest picture, uncompressed with 16 bits, has 0.7 GB
# Formats that people store frames in. Others have decoders that are seldom tried, and PostScript
# is a program that another program runs.
Image.init()
PICTURE_FORMATS = [name for name in Image.OPEN if name in (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI",
    "TGA", "TIFF", "WEBP")]
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339  # tags
WHITE_IS_ZERO, UNSIGNED = 0, 1  # their values
# What Pillow warns about is refused by check_pixels.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def check_pixels(height: int, width: int, what: str) -> None:
    """InputError unless a picture may be this large; called before memory is allocated for it."""
    if min(height, width) < 1 or height * width > LARGEST_PICTURE:
        raise InputError(f"{what} is said to be {width}x{height}: at least 1x1 and at most "
                         f"{LARGEST_PICTURE} pixels are read")


def read_picture(path: Path) -> Image.Image:
    """An RGB picture, rotated as its EXIF data says; of an animation, the first frame.

    Raises InputError if it is damaged, not a regular file, or holds numbers of an unknown range.
    """
    with open_picture(path) as file:
        check_pixels(file.height, file.width, f"frame {path}")
        picture = to_rgb(file)
        ImageOps.exif_transpose(picture, in_place=True)
        picture.load()
        return picture


def read_animation(path: Path) -> Iterator[Image.Image]:
    """All frames of an animation, each as `read_picture` returns the first; of a picture, one."""
    with open_picture(path) as file:
        for frame in ImageSequence.Iterator(file):
            check_pixels(frame.height, frame.width, f"a frame of {path}")
            picture = to_rgb(frame)
            if picture is frame:  # which the next frame will overwrite
                picture = frame.copy()
            ImageOps.exif_transpose(picture, in_place=True)
            yield picture


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """A picture or animation whose pixels are not decoded yet; whatever fails is an InputError.

    The whole file is read first: from a file, Pillow would read as many bytes as it claims.
    """
    try:
        content = read_regular(path, LARGEST_FILE)
        with Image.open(io.BytesIO(content), formats=PICTURE_FORMATS) as file:
            yield file
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"frame {path} cannot be read: cannot identify image file "
                         f"{str(path)!r}") from error
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        reason = " ".join(str(error).split()) or repr(error)
        raise InputError(f"frame {path} cannot be read: {reason}") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture as it was opened -> mode RGB, 8 bits; a picture of mode RGB is returned itself.

    Grey of more bits is scaled by the range of its format. Pillow would clip it, so that everything
    above 255 became white. Raises ValueError where the format states no range.
    """
    tags = getattr(picture, "tag_v2", {})  # of a TIFF
    signed = any(value != UNSIGNED for value in tags.get(TIFF_SAMPLE_FORMAT, ()))  # or floats
    # Of 16-bit grey, Pillow makes 32-bit integers in PGM files, and older versions in PNG files.
    sixteen_bit = (picture.mode.startswith("I;16")
                   or picture.mode == "I" and picture.format in ("PNG", "PPM"))
    if signed or picture.mode in ("I", "F") and not sixteen_bit:
        raise ValueError("it holds signed, 32-bit or floating-point numbers, which state no range "
                         "of brightness; save it with 8 or 16 unsigned bits")
    if sixteen_bit:
        bits = tags.get(TIFF_BITS, (16,))[0]  # 12 of some cameras
        grey = (np.asarray(picture) >> (bits - 8)).astype(np.uint8)
        if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO:
            grey = 255 - grey
        info = {key: value for key, value in picture.info.items() if key != "transparency"}
        picture = Image.fromarray(grey)
        picture.info = info  # which has the EXIF data
    elif picture.mode == "La":  # grey multiplied by its opacity, which Pillow converts in two steps
        picture = picture.convert("LA")
    return picture if picture.mode == "RGB" else picture.convert("RGB")
