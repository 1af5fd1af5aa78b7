"""Overlays: only masked pixels change, tracks keep their colours, and files contain every frame.

Cells of the gate strip are located by comparing two strips that differ only in that cell.
"""

from dataclasses import replace

import numpy
import pytest
import torch
from PIL import Image

from evaluation.postprocess import EncodedVideo
from evaluation.run_length import encode
from viewing import overlays as draw
from viewing.overlays import (
    best_labels,
    colour_of,
    gate_strip,
    name_to_draw,
    overlay,
    overlays,
    save_pictures,
)

HEIGHT, WIDTH = 240, 320  # high enough not to be enlarged


def grey(height=HEIGHT, width=WIDTH):
    """A frame of random greys: no pixel of it has a colour."""
    values = numpy.random.default_rng(0).integers(0, 256, (height, width, 1), dtype=numpy.uint8)
    return values.repeat(3, 2)


def rectangle(top, left, height=40, width=60):
    mask = numpy.zeros((HEIGHT, WIDTH), bool)
    mask[top : top + height, left : left + width] = True
    return mask


LEFT, RIGHT = rectangle(100, 20), rectangle(100, 200)


def changed(picture, frame):
    return (numpy.asarray(picture) != frame).any(2)


def middle(picture, mask):
    """The colour cast of the inner pixels of a mask, (3,): red, green and blue less their mean, for
    grey frames.
    """
    rows, columns = mask.nonzero()
    inner = numpy.asarray(picture).astype(float)[
        rows.min() + 5 : rows.max() - 4, columns.min() + 5 : columns.max() - 4
    ]
    cast = inner.mean((0, 1))
    return cast - cast.mean()


def cast_of(colour):
    """What half of a palette's colour adds to grey."""
    return numpy.subtract(colour, numpy.mean(colour)) / 2


def lab_of(colour):
    """CIELAB coordinates (D65) of an RGB colour."""
    share = numpy.array(colour) / 255
    linear = numpy.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = numpy.cbrt(numpy.array(to_xyz) @ linear / (0.9505, 1, 1.089))  # none is near black
    return numpy.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_colours_tell_tracks_apart():
    """As far apart as an eye sees it; 2 is the smallest difference that is seen side by side."""
    colours = [lab_of(colour_of(track)) for track in range(16)]
    distances = [
        [numpy.linalg.norm(one - other) for other in colours[:place]]
        for place, one in enumerate(colours)
    ]
    assert min(sum(distances[:12], [])) > 35 and min(sum(distances, [])) > 30
    assert len({colour_of(track) for track in range(255)}) == 255


def test_an_overlay_changes_the_masked_pixels_and_no_others():
    frame = grey()
    picture = overlay(frame, numpy.stack([LEFT, RIGHT]), [0, 1], ["", ""])
    assert numpy.array_equal(changed(picture, frame), LEFT | RIGHT)
    assert numpy.array_equal(frame, grey())  # the frame itself stays as it was


def test_half_of_the_frame_shows_through_and_the_outline_is_solid():
    frame = grey()
    pixels = numpy.asarray(overlay(frame, LEFT[None], [4], [""]))
    inner = rectangle(102, 22, 36, 56)  # two pixels less on each side
    assert (pixels[LEFT & ~inner] == colour_of(4)).all()
    assert numpy.array_equal(
        pixels[inner], ((frame[inner].astype(float) + colour_of(4)) / 2).astype(numpy.uint8)
    )


def test_a_caption_is_written_at_its_mask_in_its_colour():
    plain, captioned = (
        numpy.asarray(overlay(grey(), numpy.stack([LEFT, RIGHT]), [2, 6], captions))
        for captions in (["", ""], ["disc 0.9", "star 0.8"])
    )
    written = (plain != captioned).any(2)
    for columns, colour, letters in ((slice(18, 110), 2, 0), (slice(198, 290), 6, 255)):
        pixels = captioned[80:104, columns][written[80:104, columns]]
        # Black on pale green, white on blue.
        assert (pixels == colour_of(colour)).all(1).any() and (pixels == letters).all(1).any()
        written[80:104, columns] = False
    assert not written.any()  # and nothing is written elsewhere


def test_an_instance_that_is_not_in_the_frame_leaves_no_caption():
    frame = grey()
    picture = overlay(frame, numpy.zeros((1, HEIGHT, WIDTH), bool), [0], ["square 0.87"])
    assert not changed(picture, frame).any()


def test_the_best_is_drawn_on_top():
    both = overlay(grey(), numpy.stack([LEFT, rectangle(100, 50)]), [0, 1], ["", ""])
    alone = overlay(grey(), LEFT[None], [0], [""])
    outline = LEFT & ~rectangle(102, 22, 36, 56)
    assert (numpy.asarray(both)[outline] == numpy.asarray(alone)[outline]).all()


def test_the_best_caption_is_on_top():
    both = overlay(grey(), numpy.stack([LEFT, LEFT]), [2, 6], ["disc 0.9", "star 0.8"])
    assert not (numpy.asarray(both) == colour_of(6)).all(2).any()


def test_a_colour_has_nothing_to_do_with_the_place_in_the_list():
    one, other = (
        overlay(grey(), numpy.stack(masks), colours, ["", ""])
        for masks, colours in (([LEFT, RIGHT], [3, 7]), ([RIGHT, LEFT], [7, 3]))
    )
    assert numpy.array_equal(one, other)
    assert numpy.allclose(middle(one, LEFT), cast_of(colour_of(3)), atol=1)
    assert numpy.allclose(middle(one, RIGHT), cast_of(colour_of(7)), atol=1)


@pytest.mark.parametrize("height, factor", [(240, 1), (239, 2), (96, 3), (50, 5)])
def test_small_frames_are_enlarged_by_a_whole_factor(height, factor):
    frame, mask = grey(height, 70), numpy.zeros((height, 70), bool)
    mask[10:30, 10:40] = True
    picture = overlay(frame, mask[None], [0], [""])
    assert picture.size == (70 * factor, height * factor)
    # Every pixel a block.
    expected = numpy.kron(frame, numpy.ones((factor, factor, 1), numpy.uint8))
    assert numpy.array_equal(
        changed(picture, expected), numpy.kron(mask, numpy.ones((factor, factor), bool))
    )


@pytest.mark.parametrize(
    "height, width, size",
    [
        (1, 4000, (4000, 1)),
        (16, 1300, (3900, 48)),
        (1, 1, (240, 240)),
        (4000, 1, (1, 4000)),
        (3, 2, (160, 240)),
        (100, 5000, (5000, 100)),
    ],
)
def test_frames_of_any_shape_are_enlarged_to_a_size_that_can_be_shown(height, width, size):
    mask = numpy.ones((1, height, width), bool)
    frame = numpy.zeros((height, width, 3), numpy.uint8)
    assert overlay(frame, mask, [3], ["disc 0.90"]).size == size


# Names

NAMES = [
    "n" * 300,
    "two\nlines",
    "\ud800",
    "nul\0",
    "日本語",
    "\N{RIGHT-TO-LEFT OVERRIDE}a",
    "\t",
    "😀" * 100,
    "e" + "\N{COMBINING ACUTE ACCENT}" * 1000,
]


@pytest.mark.parametrize("name", NAMES)
def test_any_class_name_can_be_drawn(name):
    """On one line above the mask; what the font does not have is a box."""
    frames, masks = moving(1)
    found = video_of(masks, [5, 8])
    (plain,) = overlays(frames, found, ["", ""], 0.3)
    (named,) = overlays(frames, found, [name, name], 0.3)
    assert plain.size == named.size
    rows = changed(named, numpy.asarray(plain))[:HEIGHT].any(1).nonzero()[0]
    assert rows.min() >= 0 and rows.max() < 40


def test_names_that_are_drawn_are_short_and_stay_apart():
    assert name_to_draw("giant panda") == "giant panda"
    names = {name_to_draw("class " * 50 + number) for number in ("one", "two", "three")}
    assert len(names) == 3 and all(len(name) <= draw.MAX_NAME_LENGTH for name in names)


def video_of(masks, tracks, scores=None, layers=3):
    """Masks bool (I, T, H, W), a track each -> what the model finds in a video.

    All gates of so many layers are closed.
    """
    count = len(tracks)
    scores = torch.linspace(0.9, 0.5, count) if scores is None else torch.tensor(scores)
    return EncodedVideo(
        scores,
        torch.arange(count),
        torch.tensor(tracks, dtype=torch.int64),
        [encode(track) for track in masks],
        torch.zeros(count, masks.shape[1], layers, dtype=torch.bool),
    )


def moving(length):
    """Frames and masks (2, T, H, W) of two instances that go down, one on the left and one on the
    right.
    """
    masks = [[rectangle(20 + 15 * t, left) for t in range(length)] for left in (20, 200)]
    return [grey() for _ in range(length)], torch.from_numpy(numpy.array(masks))


def read_animation(path):
    with Image.open(path) as file:
        pictures = []
        for number in range(getattr(file, "n_frames", 1)):
            file.seek(number)
            pictures.append(numpy.asarray(file.convert("RGB")))
        return pictures


@pytest.mark.parametrize("length, columns, rows", [(1, 1, 1), (2, 2, 1), (4, 3, 2), (9, 3, 2)])
def test_a_sheet_and_an_animation_of_every_frame_are_written(tmp_path, length, columns, rows):
    frames, masks = moving(length)
    pictures = overlays(frames, video_of(masks, [5, 8], layers=0), ["left", "right"], 0.3)
    save_pictures(tmp_path / "new/folder", "00007", pictures, length)
    assert sorted(path.name for path in (tmp_path / "new/folder").iterdir()) == [
        "00007.png",
        "00007.webp",
    ]
    pictures = read_animation(tmp_path / "new/folder/00007.webp")
    assert len(pictures) == length and pictures[0].shape == (HEIGHT, WIDTH, 3)
    with Image.open(tmp_path / "new/folder/00007.png") as sheet:
        assert sheet.format == "PNG" and sheet.size == (columns * WIDTH, rows * HEIGHT)
        first = overlay(frames[0], masks[:, 0].numpy(), [5, 8], ["left 0.90", "right 0.50"])
        assert numpy.array_equal(numpy.asarray(sheet)[:HEIGHT, :WIDTH], first)


def test_a_track_is_shown_once_under_its_best_label_if_its_score_is_high_enough():
    _, masks = moving(1)
    found = video_of(masks[[0, 0, 1, 1]], [5, 5, 8, 9], [0.9, 0.8, 0.4, 0.2])
    assert best_labels(found, 0.3) == [0, 2]
    assert best_labels(found, 0.0) == [0, 2, 3]
    assert best_labels(found, 0.95) == []


def test_a_track_keeps_its_colour_over_the_video(tmp_path):
    frames, masks = moving(4)
    save_pictures(tmp_path, "video", overlays(frames, video_of(masks, [5, 8]), ["", ""], 0.0), 4)
    casts = [
        [middle(picture, mask.numpy()) for mask in masks[:, t]]
        for t, picture in enumerate(read_animation(tmp_path / "video.webp"))
    ]
    left, right = numpy.swapaxes(casts, 0, 1)
    # 4 grey levels: WebP is lossy; and a caption lies on the first row of the others.
    for cast in left[1:]:
        assert numpy.allclose(cast, left[0], atol=4)
    for cast in right:
        assert numpy.allclose(cast, right[0], atol=4) and numpy.linalg.norm(cast - left[0]) > 30


def test_no_instances_leave_the_frames_as_they_are(tmp_path):
    frames, masks = moving(1)
    save_pictures(tmp_path, "empty", overlays(frames, video_of(masks, [5, 8]), ["", ""], 0.99), 1)
    with Image.open(tmp_path / "empty.png") as sheet:
        assert numpy.array_equal(numpy.asarray(sheet), frames[0])
    assert len(read_animation(tmp_path / "empty.webp")) == 1


def test_long_videos_are_shown_from_the_first_to_the_last_frame(tmp_path, monkeypatch):
    """The sheet has frames of all parts.

    An animation that would be too long has every second, third... frame.
    """
    monkeypatch.setattr(draw, "MAX_ANIMATION_FRAMES", 10)
    pictures = (Image.new("RGB", (8, HEIGHT), (10 * t, 10 * t, 10 * t)) for t in range(21))
    save_pictures(tmp_path, "long", pictures, 21)
    with Image.open(tmp_path / "long.png") as sheet:
        pixels = numpy.asarray(sheet)[::HEIGHT, ::8, 0]
    assert pixels.shape == (2, 3) and draw.SHEET_FRAMES == 6
    assert pixels.flatten().tolist() == [0, 40, 80, 120, 160, 200]
    assert [
        int(picture[0, 0, 0]) for picture in read_animation(tmp_path / "long.webp")
    ] == pytest.approx(range(0, 201, 30), abs=3)


def shades(count, size):
    """Pictures of one shade of grey each."""
    return (Image.new("RGB", size, (10 * t,) * 3) for t in range(count))


@pytest.mark.parametrize("size", [(16384, 3), (2, 20000)])
def test_what_webp_cannot_hold_is_written_as_png_with_a_note(tmp_path, capsys, size):
    save_pictures(tmp_path, "00007", shades(2, size), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00007", "00007.png"]
    names = sorted(path.name for path in (tmp_path / "00007").iterdir())
    assert names == ["00000.png", "00001.png"]
    with Image.open(tmp_path / "00007/00001.png") as file:
        assert file.size == size and file.getpixel((1, 1)) == (10, 10, 10)
    (note,) = capsys.readouterr().err.splitlines()
    assert "00007.webp was not made" in note and f"{size[0]}x{size[1]}" in note and "00007/" in note


def test_the_largest_pictures_of_webp_are_animated(tmp_path, capsys):
    save_pictures(tmp_path, "wide", shades(2, (16383, 2)), 2)
    shapes = [picture.shape for picture in read_animation(tmp_path / "wide.webp")]
    assert shapes == [(2, 16383, 3)] * 2
    assert not capsys.readouterr().err


def test_every_picture_is_a_png_where_a_folder_for_them_is_given(tmp_path):
    save_pictures(tmp_path, "clip", shades(3, (30, 20)), 3, frames=tmp_path / "new/frames")
    names = sorted(path.name for path in (tmp_path / "new/frames").iterdir())
    assert names == ["00000.png", "00001.png", "00002.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.png", "clip.webp", "new"]


@pytest.mark.parametrize(
    "count, expected", [(2, (200, 100)), (4, (141, 70)), (8, (100, 50)), (20, (63, 31))]
)
def test_an_animation_keeps_to_its_memory(tmp_path, monkeypatch, count, expected):
    """Its pictures are smaller, the longer it is; those of the sheet are not."""
    monkeypatch.setattr(draw, "MAX_ANIMATION_BYTES", 2 * 200 * 100 * 4)  # of two pictures
    save_pictures(tmp_path, "clip", shades(count, (200, 100)), count)
    pictures = read_animation(tmp_path / "clip.webp")
    assert {picture.shape[1::-1] for picture in pictures} == {expected}
    assert len(pictures) == count
    found = [int(picture[9, 9, 0]) for picture in pictures[:4]]
    assert found == pytest.approx([0, 10, 20, 30][:count], abs=3)
    with Image.open(tmp_path / "clip.png") as sheet:
        assert sheet.size == (min(count, 3) * 200, (1 if count < 4 else 2) * 100)


def test_a_sheet_of_huge_pictures_is_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "MAX_SHEET_PIXELS", 6 * 50 * 20)
    save_pictures(tmp_path, "huge", shades(9, (500, 200)), 9)
    with Image.open(tmp_path / "huge.png") as sheet:
        assert sheet.size == (3 * 50, 2 * 20)
        assert [sheet.getpixel((25 + 50 * place, 10))[0] for place in range(3)] == [0, 20, 30]


# The strip of gates

# Of two tracks, eight frames, three layers.
CELLS = numpy.random.default_rng(1).random((2, 8, 3)) < 0.5


def strip(gates, now=7, seen=None, width=WIDTH, captions=("disc 0.90", "star 0.80")):
    seen = numpy.ones(gates.shape[:2], bool) if seen is None else seen
    return numpy.asarray(gate_strip(width, now, seen, gates, [3, 7], list(captions)))


def runs(flags):
    """Where stretches of True begin, and how long they are."""
    steps = numpy.diff(numpy.concatenate(([0], flags.astype(int), [0])))
    begins, ends = (steps == 1).nonzero()[0], (steps == -1).nonzero()[0]
    return begins, ends - begins


def cells_of(picture, places, frames):
    """The pixel in the middle of every cell, (rows, T, 3).

    Places bool (H, W): where the rows are.
    """
    (begin,), (length,) = runs(places.any(0))
    tops, heights = runs(places.any(1))
    columns = (begin + (numpy.arange(frames) + 0.5) * length / frames).astype(int)
    return picture[tops + heights // 2][:, columns]


def test_a_gate_is_dark_where_it_is_open_and_pale_where_it_is_closed():
    opened, closed = strip(numpy.ones_like(CELLS)), strip(numpy.zeros_like(CELLS))
    lines = (opened != closed).any(2)
    # Three layers of two tracks.
    assert runs(lines.any(1))[1].tolist() == [draw.LINE_HEIGHT] * 6
    cells = cells_of(strip(CELLS), lines, 8)
    expected = CELLS.transpose(0, 2, 1).reshape(6, 8)
    assert numpy.array_equal(cells.max(2) < 110, expected)
    assert numpy.array_equal(cells.min(2) > 150, ~expected)


def test_a_band_has_the_tracks_colour_where_it_is_seen():
    seen = CELLS[:, :, 0]
    bands = (strip(CELLS) != strip(CELLS, seen=numpy.zeros_like(seen))).any(2)
    assert runs(bands.any(1))[1].tolist() == [draw.BAND_HEIGHT] * 2
    cells = cells_of(strip(CELLS, seen=seen), bands, 8)
    for row, track in enumerate((3, 7)):
        assert numpy.array_equal((cells[row] == colour_of(track)).all(1), seen[row])
        assert (cells[row][~seen[row]] == draw.LIGHT_GREY).all()


def test_nothing_is_drawn_after_the_cursor():
    lines = (strip(numpy.ones_like(CELLS)) != strip(numpy.zeros_like(CELLS))).any(2)
    drawn = strip(CELLS, now=3)
    assert (cells_of(drawn, lines, 8)[:, 4:] == draw.LIGHT_GREY).all()
    assert numpy.array_equal(
        cells_of(drawn, lines, 8)[:, :4], cells_of(strip(CELLS), lines, 8)[:, :4]
    )
    # The frame from which gates and masks are others.
    for first, same in ((4, True), (3, False)):
        later = numpy.arange(8) >= first
        other = strip(CELLS ^ later[:, None], now=3, seen=numpy.stack([~later, ~later]))
        assert numpy.array_equal(drawn, other) == same
    ends = [
        (strip(CELLS, now=now)[2] == draw.DARK_GREY).all(1).nonzero()[0].tolist()
        for now in range(8)
    ]
    # One cursor, which goes to the right.
    assert all(len(end) == 1 for end in ends) and ends == sorted(ends)


def test_a_strip_is_as_wide_as_its_picture_for_any_number_of_frames():
    """A caption that is too long is cut off, of frames that are too many some are shown, and what
    is too narrow has no cells.
    """
    many = numpy.zeros((2, 1000, 3), bool)
    for width in (1, 2, 5, 60):
        picture = strip(
            many, 999, width=width, captions=("a caption that is longer than that", "star 0.80")
        )
        assert picture.shape[1] == width
    opened = strip(
        ~many, 999, width=60, captions=("a caption that is longer than that", "star 0.80")
    )
    assert [value.tolist() for value in runs((opened != picture).any((0, 2)))] == [[30], [26]]


@pytest.mark.parametrize(
    "height, width, size",
    [(1, 1, (240, 240)), (300, 1, (1, 300)), (1, 300, (3900, 13)), (2, 3, (360, 240))],
)
def test_frames_of_any_shape_have_a_strip(height, width, size):
    masks = torch.ones(2, 3, height, width, dtype=torch.bool)
    frames = numpy.zeros((3, height, width, 3), numpy.uint8)
    pictures = list(overlays(frames, video_of(masks, [3, 7]), ["n" * 300, "b"], 0.3))
    assert len({picture.size for picture in pictures}) == 1
    assert pictures[0].width == size[0] and size[1] < pictures[0].height < size[1] + 200


@pytest.mark.parametrize("layers", [0, 1, 6])
def test_the_strip_is_below_the_overlay_where_there_are_gates(layers):
    frames, masks = moving(2)
    masks[1, 1] = False
    captions = ["left 0.90", "right 0.50"]
    pictures = list(
        overlays(frames, video_of(masks, [3, 7], layers=layers), ["left", "right"], 0.3)
    )
    for t, picture in enumerate(map(numpy.asarray, pictures)):
        assert numpy.array_equal(
            picture[:HEIGHT], overlay(frames[t], masks[:, t].numpy(), [3, 7], captions)
        )
        expected = strip(
            numpy.zeros((2, 2, layers), bool),
            t,
            numpy.array([[1, 1], [1, 0]], bool),
            captions=captions,
        )
        assert numpy.array_equal(picture[HEIGHT:], expected[: None if layers else 0])


# Instances that are chosen among others


def three_tracks():
    """Frames, masks (4, T, H, W), and what was found.

    The second instance scores little, and the third is the first track under another label.
    """
    frames, masks = moving(3)
    masks = torch.stack([masks[0], torch.zeros_like(masks[0]), masks[0].flip(2), masks[1]])
    masks[1, :, 200:230], masks[3, 1] = True, False
    gates = torch.from_numpy(numpy.random.default_rng(2).random((4, 3, 3)) < 0.5)
    found = video_of(masks, [3, 5, 3, 7], [0.9, 0.2, 0.6, 0.5])
    return frames, masks, replace(found, gates=gates, labels=torch.tensor([2, 0, 1, 1]))


@pytest.mark.parametrize("layers", [0, 3])
def test_who_is_left_out_in_the_middle_lends_nothing_to_the_others(layers):
    """Masks, gates, captions and colours are those of the instances that are shown."""
    frames, masks, found = three_tracks()
    found = replace(found, gates=found.gates[..., :layers])
    shown, captions = [0, 3], ["star 0.90", "square 0.50"]
    pictures = list(overlays(frames, found, ["disc", "square", "star"], 0.3))
    assert len(pictures) == 3
    for t, picture in enumerate(map(numpy.asarray, pictures)):
        expected = overlay(frames[t], masks[shown, t].numpy(), [3, 7], captions)
        assert numpy.array_equal(picture[:HEIGHT], expected)
        if layers:
            seen = masks[shown].flatten(2).any(2).numpy()
            strip = gate_strip(WIDTH, t, seen, found.gates[shown].numpy(), [3, 7], captions)
            assert numpy.array_equal(picture[HEIGHT:], strip)
        else:
            assert len(picture) == HEIGHT


def test_who_scores_as_much_as_is_asked_for_is_shown():
    _, _, found = three_tracks()
    found = replace(found, scores=torch.tensor([0.75, 0.5, 0.5, 0.25], dtype=torch.float64))
    assert best_labels(found, 0.5) == [0, 1] and best_labels(found, 0.25) == [0, 1, 3]
    assert best_labels(found, 0.75) == [0] and best_labels(found, 0.7500001) == []


@pytest.mark.parametrize(
    "milliseconds, count, limit, duration, shown",
    [(125, 4, 240, 125, 4), (50, 6, 3, 100, 3), (40, 7, 3, 120, 3)],
)
def test_an_animation_takes_as_long_as_its_video(
    tmp_path, monkeypatch, milliseconds, count, limit, duration, shown
):
    """If frames are dropped, the others last longer; the animation loops forever."""
    monkeypatch.setattr(draw, "MAX_ANIMATION_FRAMES", limit)
    pictures = (Image.fromarray(numpy.full((16, 24, 3), 30 * t, numpy.uint8)) for t in range(count))
    save_pictures(tmp_path, "short", pictures, count, milliseconds)
    with Image.open(tmp_path / "short.webp") as animation:
        animation.load()
        assert animation.n_frames == shown
        assert animation.info["loop"] == 0
        assert animation.info["duration"] == duration


def test_a_caption_stays_inside_of_the_picture():
    """Above its mask, or at the top; shifted to the left where it would be cut off."""
    for mask in (rectangle(0, 0), rectangle(0, WIDTH - 60), rectangle(HEIGHT - 40, WIDTH - 60)):
        frame = grey()
        plain, captioned = (
            numpy.asarray(overlay(frame, mask[None], [4], [caption]))
            for caption in ("", "a long caption 0.87")
        )
        rows, columns = (plain != captioned).any(2).nonzero()
        assert numpy.ptp(columns) > 100  # all of it, though the mask is 60 pixels wide
        top = mask.any(1).argmax()
        assert rows.max() <= max(top, 20) + 3 and rows.min() >= top - 16


def test_a_colour_is_that_of_its_hue():
    """The first is a bright red, the second a dark blue, the third a pale green."""
    assert [colour_of(track) for track in range(3)] == [
        (255, 25, 25),
        (0, 45, 153),
        (202, 255, 128),
    ]
