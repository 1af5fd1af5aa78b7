"""All versions of ffmpeg: supported options are used, and the cause of an error is shown.

Versions that are not installed are shell scripts that reject what such an ffmpeg rejects.
"""

import io
import subprocess
import sys

import numpy
import pytest
from PIL import Image

from data import InputError
from processes import ENVIRONMENT, fake_ffmpeg
from reading.videos import informative_line, read_ppm, read_video

REFUSES = """case "$*" in *-{option}*)
echo "Unrecognized option '{option}'." >&2
echo "Error splitting the argument list: Option not found" >&2
exit {status};; esac
"""


@pytest.mark.parametrize(
    "refused, used",
    [
        ({"fps_mode": 1}, "-vsync passthrough"),
        ({"vsync": 8}, "-fps_mode passthrough"),
        ({}, "-fps_mode passthrough"),
    ],
    ids=["ffmpeg 4", "ffmpeg 9", "ffmpeg 5 to 8"],
)
def test_every_generation_gives_every_frame_once(tmp_path, monkeypatch, refused, used):
    """None of them has a version number, as builds from git have none."""
    noise = [
        numpy.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=numpy.uint8)
        for number in range(3)
    ]
    (tmp_path / "frames.ppm").write_bytes(
        b"".join(b"P6\n8 6\n255\n" + frame.tobytes() for frame in noise)
    )
    refuses = "".join(
        REFUSES.format(option=option, status=status) for option, status in refused.items()
    )
    fake_ffmpeg(tmp_path, monkeypatch, f"{refuses}cat {tmp_path}/frames.ppm")
    found = [numpy.asarray(picture) for picture in read_video(["-i", "file:clip.mp4"], "clip.mp4")]
    assert numpy.array_equal(found, noise)
    assert f"-i file:clip.mp4 {used} -f image2pipe" in (tmp_path / "given").read_text()


NO_MOOV_IN_4 = """\
[mov,mp4,m4a,3gp,3g2,mj2 @ 0x110a6500] moov atom not found
file:a.mp4: Invalid data found when processing input
"""
NO_MOOV_IN_9 = """\
[in#0 @ 0x557c45843080] moov atom not found
[in#0 @ 0x557c45842d00] Error opening input: Invalid data found when processing input
Error opening input file file:a.mp4.
Error opening input files: Invalid data found when processing input
"""
NO_OPTION = """\
Unrecognized option 'fps_mode'.
Error splitting the argument list: Option not found
"""
NO_FILE = """\
[in#0 @ 0x564a9a68ad00] Error opening input: No such file or directory
Error opening input file file:a.mp4.
Error opening input files: No such file or directory
"""
NO_ENCODER = """\
[vost#0:0 @ 0x55dc63f7af40] Unknown encoder 'libx264'
[vost#0:0 @ 0x55dc63f7af40] Error selecting an encoder
Error opening output file o.mp4.
Error opening output files: Encoder not found
"""
NO_FRAME = """\
[vist#0:0/h264 @ 0x5f1] [dec:h264 @ 0x5f2] No frame decoded
Conversion failed!
"""
ON_WINDOWS = "[libx264 @ 000001d2c0a4] height not divisible by 2\r\nError initializing output\r\n"
LINKER_FIRST = """\
ffmpeg: /opt/lib/libtinfo.so.6: no version information available (required by ffmpeg)

a.mp4: Permission denied
"""
NO_LIBRARY = "ffmpeg: error while loading shared libraries: libavdevice.so.58: cannot open"


@pytest.mark.parametrize(
    "said, cause",
    [
        (NO_MOOV_IN_4, "moov atom not found"),
        (NO_MOOV_IN_9, "moov atom not found"),
        (NO_OPTION, "Unrecognized option 'fps_mode'."),
        (NO_FILE, "Error opening input: No such file or directory"),
        (NO_ENCODER, "Unknown encoder 'libx264'"),
        (NO_FRAME, "No frame decoded"),
        (ON_WINDOWS, "height not divisible by 2"),
        (LINKER_FIRST, "a.mp4: Permission denied"),
        (NO_LIBRARY, NO_LIBRARY),
        ("Conversion failed!\n", "Conversion failed!"),
        ("", "exit status 3"),
        ("\x1b[2J\x07\n", "?[2J?"),
    ],
)
def test_the_line_with_the_cause_is_shown(said, cause):
    assert informative_line(said.encode(), 3) == cause


def test_what_ffmpeg_says_needs_no_encoding():
    """A file name in Latin-1, in the middle of a character, and without an end."""
    assert (
        informative_line(b"caf\xe9.mp4: Invalid data\n", 1)
        == "caf\N{REPLACEMENT CHARACTER}.mp4: Invalid data"
    )
    assert informative_line("日".encode()[:2], 1) == "\N{REPLACEMENT CHARACTER}"
    assert 100 < len(informative_line(b"x" * 2**20, 1)) < 1000


def test_what_ffmpeg_says_can_be_read_in_any_locale(tmp_path, monkeypatch):
    fake_ffmpeg(tmp_path, monkeypatch, "printf 'caf\\351 日\\n' >&2; exit 1")
    program = (
        "from reading.videos import read_video; list(read_video(['-i', 'file:a.mp4'], 'a.mp4'))"
    )
    locale = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "utf-8",
    }
    path = {"PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT | locale | path, capture_output=True
    )
    assert (
        done.stderr.decode()
        .splitlines()[-1]
        .endswith("ffmpeg cannot read a.mp4: caf\N{REPLACEMENT CHARACTER} 日")
    )


def test_a_reader_that_stops_does_not_wait_for_ffmpeg(tmp_path, monkeypatch):
    """As with a camera that shows nothing more."""
    fake_ffmpeg(
        tmp_path,
        monkeypatch,
        'case "$*" in *-version*) exit;; esac\nprintf "P6\\n1 1\\n255\\nabc"; exec sleep 60',
    )
    frames = read_video(["-i", "file:clip.mp4"], "clip.mp4")
    assert next(frames).tobytes() == b"abc"
    frames.close()


def test_a_frame_that_is_too_large_is_said_to_be():
    with pytest.raises(InputError, match="^a frame of the pipe is said to be 20000x20000: "):
        next(read_ppm(io.BytesIO(b"P6\n20000 20000\n255\n" + bytes(100)), "the pipe"))


def test_a_stream_may_have_frames_of_any_size():
    frames = [Image.effect_noise(size, 50).convert("RGB") for size in ((1, 300), (300, 1), (1, 1))]
    stream = io.BytesIO()
    for frame in frames:
        frame.save(stream, "PPM")
    stream.seek(0)
    assert [found.tobytes() for found in read_ppm(stream, "the pipe")] == [
        frame.tobytes() for frame in frames
    ]
