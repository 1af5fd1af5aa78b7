"""Unusual sources of the demo: read correctly, or rejected in one sentence without output."""

import io
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import demo
from data import InputError
from reading.sources import check_read_twice, read_frames
from reading.videos import read_ppm
from synthetic import suites as synthetic
from viewing.results import check_output

needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="video files are made and read with ffmpeg"
)


def shades(source):
    """The red of the first pixel of every frame."""
    return [picture.getpixel((0, 0))[0] for picture in read_frames(str(source))]


def grey(shade, size=(8, 6)):
    return Image.new("RGB", size, (shade,) * 3)


def test_numbers_without_leading_zeros_are_in_order(tmp_path):
    for number in (10, 2, 1, 11, 20):
        grey(number).save(tmp_path / f"{number}.png")
    assert shades(tmp_path) == shades(tmp_path / "*.png") == [1, 2, 10, 11, 20]


@pytest.mark.parametrize("name", ["._1.png", ".2.png", "._3.jpg", ".DS_Store"])
def test_hidden_files_are_no_frames(tmp_path, name):
    """macOS writes one next to every file; they are not pictures, despite their names."""
    (tmp_path / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    for pattern in (tmp_path, tmp_path / "*", tmp_path / ".*", tmp_path / "._*"):
        with pytest.raises(InputError, match="^no frames at "):
            list(read_frames(str(pattern)))
    grey(5).save(tmp_path / "1.png")
    assert shades(tmp_path) == shades(tmp_path / "*") == [5]


def test_a_folder_that_is_hidden_has_frames(tmp_path):
    (tmp_path / ".frames").mkdir()
    grey(5).save(tmp_path / ".frames/1.png")
    assert shades(tmp_path / ".frames") == shades(tmp_path / ".frames/*") == [5]


def link_to_nothing(path):
    path.symlink_to("nothing")


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), link_to_nothing],
    ids=["FIFO", "device", "broken link"],
)
def test_a_frame_that_is_no_file_is_refused(tmp_path, make):
    """Rather than left out, as a folder is, or waited for."""
    grey(5).save(tmp_path / "1.png")
    make(tmp_path / "2.png")
    with pytest.raises(InputError, match=f"^{tmp_path}/2.png (is a|cannot be read: No such file)"):
        list(read_frames(str(tmp_path)))


def test_a_fifo_is_only_followed_live(tmp_path):
    os.mkfifo(tmp_path / "clip.mp4")
    with pytest.raises(InputError, match="clip.mp4 can be read only once: follow it with --live$"):
        check_read_twice(str(tmp_path / "clip.mp4"))
    for source in ("clip.mp4", str(tmp_path), "easy:0"):
        check_read_twice(source)


def test_a_photograph_is_turned_as_in_a_folder(tmp_path):
    orientation = Image.Exif()
    orientation[0x0112] = 6  # a quarter turn
    grey(7).save(tmp_path / "photo.jpg", exif=orientation)
    sizes = [
        [picture.size for picture in read_frames(str(source))]
        for source in (tmp_path, tmp_path / "photo.jpg")
    ]
    assert sizes == [[(6, 8)], [(6, 8)]]


def test_an_animation_that_is_cut_off_is_refused(tmp_path):
    frames = [Image.effect_noise((40, 30), 80) for _ in range(3)]
    frames[0].save(tmp_path / "cut.gif", save_all=True, append_images=frames[1:])
    content = (tmp_path / "cut.gif").read_bytes()
    (tmp_path / "cut.gif").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cut.gif cannot be read"):
        list(read_frames(str(tmp_path / "cut.gif")))


@pytest.mark.parametrize("size", ["a b", "-1 4", "0 0", f"{10**9} {10**9}", "9" * 60])
def test_a_size_that_no_picture_has_is_refused(size):
    with pytest.raises(InputError, match="^the pipe is no stream of PPM pictures"):
        list(read_ppm(io.BytesIO(f"P6\n{size}\n255\n".encode() + bytes(100)), "the pipe"))


@pytest.mark.parametrize("size", ["0 5", "5 0", "0 0"])
def test_a_picture_without_pixels_is_refused(size):
    with pytest.raises(InputError, match="^the pipe is no stream of PPM pictures"):
        next(read_ppm(io.BytesIO(f"P6\n{size}\n255\n".encode()), "the pipe"))


def test_a_scene_is_the_one_of_the_held_out_split(tmp_path):
    """To the last bit of its JPEG files."""
    suite = synthetic.SUITES["occlusion"]
    synthetic.make_dataset(
        tmp_path / "set", 1, 2, suite.frames, objects=suite.objects, difficulty=suite.difficulty
    )
    files = sorted((tmp_path / "set/valid/JPEGImages/00001").iterdir())
    for picture, file in zip(read_frames("occlusion:1"), files, strict=True):
        picture.save(tmp_path / "frame.jpg", quality=synthetic.JPEG_QUALITY)
        assert (tmp_path / "frame.jpg").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "source", ["nothing:3", "easy:", "easy:-1", "easy:x", "easy", ":1", "easy:" + "9" * 200]
)
def test_what_is_no_scene_is_refused_with_the_names_of_the_suites(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=f"^no frames at {source}: .*suites {', '.join(synthetic.SUITES)}$"
    ):
        list(read_frames(source))


def test_a_live_frame_of_another_size_is_refused(monkeypatch):
    """By a model that sees nothing."""
    monkeypatch.setattr(demo, "best_labels", lambda found, least: [])
    nothing = SimpleNamespace(scores=torch.zeros(0), masks=torch.zeros(0, 6, 8, dtype=torch.bool))
    model = SimpleNamespace(step=lambda *given: (nothing, None))
    with pytest.raises(InputError, match="^frame 1 of - is 5x5, the first 8x6$"):
        demo.run_live(
            model,
            "-",
            iter([grey(1), grey(2, (5, 5))]),
            [],
            demo.parse_arguments(["-", "--live", "--short-side", "6"]),
        )


@pytest.mark.parametrize(
    "source, name",
    [
        ("clip.mp4", "clip"),
        ("frames/*.jpg", "frames"),
        ("a/b/0[1-3]*.png", "b"),
        ("*.jpg", "frames"),
        ("a/b", "b"),
        (".", "frames"),
        ("look-alike:12", "look-alike_12"),
        ("a:1", "a:1"),
    ],
)
def test_the_folder_of_results_is_named_after_the_source(source, name):
    assert demo.default_name(source) == name


def test_an_output_that_cannot_be_made_is_refused_first(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is no folder$"):
        check_output(tmp_path / "file/out")
    with pytest.raises(InputError, match="is there already"):
        check_output(tmp_path)
    with pytest.raises(InputError, match="cannot be made: File name too long$"):
        check_output(tmp_path / "new" / ("n" * 300))
    (tmp_path / "link").symlink_to("nothing")
    with pytest.raises(InputError, match="is there already"):
        check_output(tmp_path / "link")
    (tmp_path / "link").unlink()
    check_output(tmp_path / "new/out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def make_video(path, *options):
    """A test picture that moves; its size, rate and duration are among the options."""
    subprocess.run(
        ["ffmpeg", "-loglevel", "error", "-f", "lavfi", "-i", *options, str(path)], check=True
    )


@needs_ffmpeg
@pytest.mark.parametrize(
    "name, options, frames",
    [
        ("ten bit.mp4", ("-c:v", "libx264", "-pix_fmt", "yuv420p10le"), 10),
        ("12:30.mp4", ("-c:v", "mpeg4"), 10),
        ("uneven.mkv", ("-c:v", "mpeg4", "-vf", "select=eq(n\\,0)+eq(n\\,3)+eq(n\\,9)"), 3),
    ],
)
def test_videos_of_all_kinds_give_the_frames_they_store(
    tmp_path, monkeypatch, name, options, frames
):
    """More than 8 bit, a name like a protocol's, pauses between the frames."""
    make_video(tmp_path / "made.mkv", "testsrc2=s=64x48:r=5:d=2", *options)
    (tmp_path / "made.mkv").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert len(list(read_frames(name))) == frames


@needs_ffmpeg
@pytest.mark.slow
def test_a_damaged_video_that_ffmpeg_says_much_about_comes_to_an_end(tmp_path):
    """More than a pipe holds."""
    make_video(tmp_path / "long.avi", "testsrc2=s=64x64:r=25:d=60", "-c:v", "mpeg4", "-g", "12")
    content = bytearray((tmp_path / "long.avi").read_bytes())
    for place in range(20000, len(content) - 30000, 37):
        content[place] = place * 7919 % 256
    (tmp_path / "long.avi").write_bytes(content)
    assert len(list(read_frames(str(tmp_path / "long.avi")))) > 20  # of 1500; versions differ
