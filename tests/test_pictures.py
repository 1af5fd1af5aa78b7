"""Untrusted pictures: their brightness is preserved in every format, or they are rejected.

Every picture shows the same ramp from black to white. Formats of more than 8 bits are written byte
by byte from their specifications. Only regular files are opened.
"""

import io
import os
import socket
import struct
from pathlib import Path

import numpy
import pytest
from PIL import Image

from data import InputError, read_picture
from reading.pictures import check_pixels, read_animation, to_rgb
from reading.regular import open_regular, read_regular

HEIGHT, WIDTH = 3, 256
RAMP = numpy.tile(numpy.arange(WIDTH, dtype=numpy.uint16), (HEIGHT, 1))  # every 8-bit level


def tiff(content, bits, photometric=1, sample_format=1):
    """An uncompressed grey TIFF.

    photometric: 0 = white is zero. sample_format: 1 = unsigned, 2 = signed, 3 = floating-point.
    """
    tags = {
        256: WIDTH,
        257: HEIGHT,
        258: bits,
        259: 1,
        262: photometric,
        273: None,
        277: 1,
        278: HEIGHT,
        279: len(content),
        339: sample_format,
    }
    tags[273] = 8 + 2 + 12 * len(tags) + 4  # where the pixels begin
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + content


def packed_12_bit(values):
    """Twelve bits of each value, the highest first."""
    return numpy.packbits(values[..., None] >> numpy.arange(11, -1, -1) & 1, axis=None).tobytes()


def saved(array, name, **options):
    """What Pillow writes of an array."""
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, name, **options)
    return stream.getvalue()


def pixels_of(tmp_path, content):
    (tmp_path / "picture").write_bytes(content)  # the content tells the format, not the name
    picture = read_picture(tmp_path / "picture")
    assert picture.mode == "RGB"
    return numpy.asarray(picture).astype(int)


SCALED = {
    "PNG": lambda: saved(RAMP * 257, "PNG"),
    "JPEG 2000": lambda: saved(RAMP * 257, "JPEG2000"),
    "TIFF": lambda: tiff((RAMP * 257).tobytes(), 16),
    "TIFF, packed": lambda: saved(RAMP * 257, "TIFF", compression="tiff_adobe_deflate"),
    "TIFF, big-endian": lambda: saved((RAMP * 257).astype(">u2"), "TIFF"),
    "TIFF, white is zero": lambda: tiff((65535 - RAMP * 257).tobytes(), 16, photometric=0),
    "TIFF, 12 bits": lambda: tiff(packed_12_bit(RAMP * 257 >> 4), 12),
    "PGM": lambda: b"P5 256 3 65535\n" + (RAMP * 257).astype(">u2").tobytes(),
    "PGM, 10 bits": lambda: b"P5 256 3 1023\n" + (RAMP * 257 >> 6).astype(">u2").tobytes(),
    "PGM, as text": lambda: (
        b"P2 256 3 65535\n" + b" ".join(b"%d" % value for value in (RAMP * 257).flatten())
    ),
    "PPM, 12 bits": lambda: (
        b"P6 256 3 4095\n" + (RAMP * 257 >> 4).repeat(3, 1).astype(">u2").tobytes()
    ),
}


@pytest.mark.parametrize("kind", SCALED)
def test_more_than_8_bits_are_scaled_by_the_range_of_the_format(tmp_path, kind):
    pixels = pixels_of(tmp_path, SCALED[kind]())
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert numpy.abs(pixels - RAMP[..., None]).max() <= 1


def test_16_bit_grey_in_the_mode_of_older_pillow_versions():
    """Which made 32-bit integers of it when they opened a PNG; today they do so of a PGM only."""
    picture = Image.fromarray(RAMP.astype(numpy.int32) * 257)
    picture.format = "PNG"
    assert numpy.array_equal(numpy.asarray(to_rgb(picture))[..., 0], RAMP)


def test_every_page_of_16_bits_is_scaled(tmp_path):
    dark = Image.fromarray(RAMP * 50)
    Image.fromarray(RAMP * 257).save(tmp_path / "clip.tif", save_all=True, append_images=[dark])
    first, second = (
        numpy.asarray(picture)[..., 1] for picture in read_animation(tmp_path / "clip.tif")
    )
    assert numpy.array_equal(first, RAMP) and numpy.abs(second - RAMP * 50 / 257).max() <= 1


@pytest.mark.parametrize(
    "content",
    [
        tiff(RAMP.astype("<f4").tobytes(), 32, sample_format=3),
        tiff(RAMP.astype("<u4").tobytes(), 32),
        tiff(RAMP.astype("<i2").tobytes(), 16, sample_format=2),
        tiff(RAMP.astype("i1").tobytes(), 8, sample_format=2),
        b"Pf\n256 3\n-1.0\n" + RAMP.astype("<f4").tobytes(),
    ],
    ids=["float TIFF", "32-bit TIFF", "signed 16-bit TIFF", "signed 8-bit TIFF", "PFM"],
)
def test_numbers_without_a_range_are_refused(tmp_path, content):
    with pytest.raises(
        InputError,
        match="^frame .*/picture cannot be read: it holds signed, 32-bit or floating-point numbers",
    ):
        pixels_of(tmp_path, content)


@pytest.mark.parametrize(
    "mode, name, tolerance",
    [
        ("L", "PNG", 0),
        ("LA", "PNG", 0),
        ("LA", "TIFF", 0),
        ("P", "PNG", 0),
        ("P", "GIF", 0),
        ("RGBA", "PNG", 0),
        ("RGBA", "TIFF", 0),
        ("CMYK", "JPEG", 6),
        ("CMYK", "TIFF", 0),
        ("YCbCr", "TIFF", 2),
        ("L", "JPEG", 6),
        ("L", "JPEG2000", 0),
    ],
)
def test_8_bit_pictures_of_every_mode_keep_their_brightness(tmp_path, mode, name, tolerance):
    picture = Image.fromarray(RAMP.astype(numpy.uint8))
    picture = (
        picture.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr") else picture.convert(mode)
    )
    stream = io.BytesIO()
    picture.save(stream, name)
    try:
        Image.open(stream).load()
    except OSError:
        pytest.skip("this Pillow cannot read what it has written")
    assert numpy.abs(pixels_of(tmp_path, stream.getvalue()) - RAMP[..., None]).max() <= tolerance


def test_one_bit_is_black_or_white(tmp_path):
    pixels = pixels_of(tmp_path, saved(RAMP >= 128, "PNG"))
    assert numpy.array_equal(pixels[..., 0], numpy.where(RAMP >= 128, 255, 0))


def test_opacity_is_ignored(tmp_path):
    """The colour of a pixel does not depend on its alpha."""
    picture = Image.fromarray(RAMP.astype(numpy.uint8)).convert("P")
    stream = io.BytesIO()
    picture.save(stream, "PNG", transparency=9)
    assert numpy.array_equal(pixels_of(tmp_path, stream.getvalue())[..., 0], RAMP)
    transparent = numpy.stack([RAMP, RAMP, RAMP, RAMP * 0], 2).astype(numpy.uint8)
    assert numpy.array_equal(pixels_of(tmp_path, saved(transparent, "PNG"))[..., 2], RAMP)


@pytest.mark.parametrize(
    "name, mode", [("JPEG", "L"), ("PNG", "I;16"), ("WEBP", "RGB"), ("TIFF", "LA")]
)
def test_pictures_of_every_mode_are_turned_as_they_say(tmp_path, name, mode):
    orientation = Image.Exif()
    orientation[0x0112] = 6  # a quarter turn
    picture = (
        Image.fromarray(RAMP * 257)
        if mode == "I;16"
        else Image.fromarray(RAMP.astype(numpy.uint8)).convert(mode)
    )
    stream = io.BytesIO()
    picture.save(stream, name, exif=orientation)
    (tmp_path / "picture").write_bytes(stream.getvalue())
    for read in (read_picture(tmp_path / "picture"), *read_animation(tmp_path / "picture")):
        column = numpy.asarray(read)[:, 1, 0].astype(int)
        assert read.size == (HEIGHT, WIDTH) and numpy.abs(column - numpy.arange(WIDTH)).max() < 20


# Regular files


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


SPECIAL = {
    "a FIFO": os.mkfifo,
    "a socket": make_socket,
    "a folder": os.mkdir,
    "a device": lambda path: os.symlink("/dev/zero", path),
}


@pytest.mark.parametrize("linked", [False, True], ids=["itself", "through a link"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path, monkeypatch, kind, linked):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    SPECIAL[kind]("frame.jpg")
    os.symlink("frame.jpg", "link.jpg")
    path = tmp_path / ("link.jpg" if linked else "frame.jpg")
    for read in (
        lambda: read_regular(path, 1000),
        lambda: read_picture(path),
        lambda: next(read_animation(path)),
    ):
        with pytest.raises(InputError, match=f"{path} is {kind}, not a regular file$"):
            read()


@pytest.mark.parametrize("size", [1001, 2**40], ids=["one byte", "a terabyte"])
def test_a_file_of_more_bytes_than_the_limit_is_refused(tmp_path, size):
    """Before any of them is read: the larger one has no blocks on the disk."""
    with open(tmp_path / "large", "wb") as file:
        file.truncate(size)
    with pytest.raises(InputError, match=f"large has {size} bytes, at most 1000 are read$"):
        read_regular(tmp_path / "large", 1000)


def test_a_file_as_large_as_the_limit_is_read(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(200)) * 5)
    assert read_regular(tmp_path / "file", 1000) == bytes(range(200)) * 5
    (tmp_path / "empty").touch()
    assert read_regular(tmp_path / "empty", 0) == b""


@pytest.mark.skipif(
    not os.path.exists("/proc/self/maps"), reason="needs a file that does not state its size"
)
def test_a_file_that_does_not_state_its_size_is_read_up_to_the_limit():
    assert b"r-xp" in read_regular("/proc/self/maps", 2**24)
    with pytest.raises(InputError, match="maps has more than 100 bytes"):
        read_regular("/proc/self/maps", 100)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("missing", "No such file or directory"),
        ("n" * 300, "File name too long"),
        ("loop", "Too many levels of symbolic links"),
        ("a\0b", "embedded null byte"),
    ],
)
def test_a_file_that_cannot_be_opened_is_named(tmp_path, name, reason):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match=f"{name} cannot be read: .*{reason}"):
        read_regular(tmp_path / name, 1000)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    (tmp_path / "secret").touch(mode=0)
    with pytest.raises(InputError, match="secret cannot be read: Permission denied$"):
        read_regular(tmp_path / "secret", 1000)


def test_frames_of_an_animation_do_not_overwrite_one_another(tmp_path):
    frames = [numpy.full((8, 9, 3), level, numpy.uint8) for level in (10, 120, 250)]
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(tmp_path / "a.webp", save_all=True, append_images=pictures[1:], lossless=True)
    found = list(read_animation(tmp_path / "a.webp"))
    assert [numpy.asarray(picture).tolist() for picture in found] == [f.tolist() for f in frames]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_a_file_that_states_no_size_is_read_whole_or_refused():
    content = read_regular(Path("/proc/self/maps"), 2**26)
    assert len(content) > 20_000 and content.startswith(Path("/proc/self/maps").read_bytes()[:12])
    with pytest.raises(InputError, match="has more than 20000 bytes"):
        read_regular(Path("/proc/self/maps"), 20_000)


def test_reading_more_than_there_is_takes_no_memory(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    with open_regular(tmp_path / "a") as file:
        assert file.read(3) == b"012" and file.read(2**50) == b"3456789"


def test_a_size_is_told_as_width_by_height():
    with pytest.raises(InputError, match="a.png is said to be 3x100000000: at least 1x1"):
        check_pixels(height=100_000_000, width=3, what="a.png")
    for height, width in ((10_000, 10_000), (0, 5), (5, 0)):
        with pytest.raises(InputError):
            check_pixels(height, width, "a.png")
    check_pixels(1, 1, "a.png")
