"""Pictures of strangers: read as RGB, refused in one sentence, never more memory than they hold.

    picture = read_picture(Path("frame.jpg"))     # a Pillow image, mode RGB
"""
import io
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from runtime.errors import InputError

LARGEST_PICTURE = Image.MAX_IMAGE_PIXELS  # pixels; a small file can claim any number
# Formats that people store frames in. Others have decoders that are seldom tried, and PostScript
# is a program that another program runs.
Image.init()
PICTURE_FORMATS = [name for name in Image.OPEN if name in (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI",
    "TGA", "TIFF", "WEBP")]
# What Pillow warns about is refused by check_pixels.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def check_pixels(height: int, width: int, what: str) -> None:
    """InputError unless a picture may be this large; called before memory is allocated for it."""
    if min(height, width) < 1 or height * width > LARGEST_PICTURE:
        raise InputError(f"{what} is said to be {width}x{height}: at least 1x1 and at most "
                         f"{LARGEST_PICTURE} pixels are read")


def open_picture(path: Path) -> Image.Image:
    """A picture or animation whose pixels are not decoded yet.

    The whole file is read first: from a file, Pillow would read as many bytes as it claims.
    """
    try:
        return Image.open(io.BytesIO(path.read_bytes()), formats=PICTURE_FORMATS)
    except UnidentifiedImageError as error:
        raise InputError(f"frame {path} cannot be read: cannot identify image file "
                         f"{str(path)!r}") from error


def read_picture(path: Path) -> Image.Image:
    """An RGB picture, rotated as its EXIF data says; InputError if it is damaged."""
    try:
        with open_picture(path) as file:
            check_pixels(file.height, file.width, f"frame {path}")
            ImageOps.exif_transpose(file, in_place=True)
            picture = file if file.mode == "RGB" else file.convert("RGB")
            picture.load()
            return picture
    except InputError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise InputError(f"frame {path} cannot be read: {str(error) or repr(error)}") from error
