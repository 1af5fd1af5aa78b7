"""Pictures of results: only what is masked changes, a colour stays with its track, and the files hold every frame."""
import numpy
import pytest
import torch
from PIL import Image

import draw
from draw import best_labels, colour_of, overlay, overlays, save_pictures
from results import EncodedVideo
from run_length import encode

HEIGHT, WIDTH = 240, 320  # high enough not to be enlarged


def grey(height=HEIGHT, width=WIDTH):
    """A frame of random greys: no pixel of it has a colour."""
    values = numpy.random.default_rng(0).integers(0, 256, (height, width, 1), dtype=numpy.uint8)
    return values.repeat(3, 2)


def rectangle(top, left, height=40, width=60):
    mask = numpy.zeros((HEIGHT, WIDTH), bool)
    mask[top:top + height, left:left + width] = True
    return mask


LEFT, RIGHT = rectangle(100, 20), rectangle(100, 200)


def changed(picture, frame):
    return (numpy.asarray(picture) != frame).any(2)


def middle(picture, mask):
    """The colour cast of the inner pixels of a mask, (3,): red, green and blue less their mean, for grey frames."""
    rows, columns = mask.nonzero()
    inner = numpy.asarray(picture).astype(float)[rows.min() + 5:rows.max() - 4, columns.min() + 5:columns.max() - 4]
    cast = inner.mean((0, 1))
    return cast - cast.mean()


def cast_of(colour):
    """What half of a palette's colour adds to grey."""
    return numpy.subtract(colour, numpy.mean(colour)) / 2


def test_colours_tell_tracks_apart():
    colours = [colour_of(track) for track in range(12)]
    assert all(numpy.linalg.norm(numpy.subtract(one, other)) > 40
               for place, one in enumerate(colours) for other in colours[:place])


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
    assert numpy.array_equal(pixels[inner], ((frame[inner].astype(float) + colour_of(4)) / 2).astype(numpy.uint8))


def test_a_caption_is_written_at_its_mask_in_its_colour():
    plain, captioned = (numpy.asarray(overlay(grey(), numpy.stack([LEFT, RIGHT]), [2, 6], captions))
                        for captions in (["", ""], ["disc 0.9", "star 0.8"]))
    written = (plain != captioned).any(2)
    for columns, colour in ((slice(18, 110), 2), (slice(198, 290), 6)):
        pixels = captioned[80:104, columns][written[80:104, columns]]
        assert (pixels == colour_of(colour)).all(1).any() and (pixels == 255).all(1).any()  # white on the track's colour
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


def test_a_colour_has_nothing_to_do_with_the_place_in_the_list():
    one, other = (overlay(grey(), numpy.stack(masks), colours, ["", ""])
                  for masks, colours in (([LEFT, RIGHT], [3, 7]), ([RIGHT, LEFT], [7, 3])))
    assert numpy.array_equal(one, other)
    assert numpy.allclose(middle(one, LEFT), cast_of(colour_of(3)), atol=1)
    assert numpy.allclose(middle(one, RIGHT), cast_of(colour_of(7)), atol=1)


@pytest.mark.parametrize("height, factor", [(240, 1), (239, 2), (96, 3), (50, 5)])
def test_small_frames_are_enlarged_by_a_whole_factor(height, factor):
    frame, mask = grey(height, 70), numpy.zeros((height, 70), bool)
    mask[10:30, 10:40] = True
    picture = overlay(frame, mask[None], [0], [""])
    assert picture.size == (70 * factor, height * factor)
    expected = numpy.kron(frame, numpy.ones((factor, factor, 1), numpy.uint8))  # every pixel a block
    assert numpy.array_equal(changed(picture, expected), numpy.kron(mask, numpy.ones((factor, factor), bool)))


def video_of(masks, tracks, scores=None):
    """Masks bool (I, T, H, W), a track each -> what the model finds in a video."""
    count = len(tracks)
    scores = torch.linspace(0.9, 0.5, count) if scores is None else torch.tensor(scores)
    return EncodedVideo(scores, torch.arange(count), torch.tensor(tracks, dtype=torch.int64), [encode(track) for track in masks],
                        torch.zeros(count, masks.shape[1], 3, dtype=torch.bool))


def moving(length):
    """Frames and masks (2, T, H, W) of two instances that go down, one on the left and one on the right."""
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
    pictures = overlays(frames, video_of(masks, [5, 8]), ["left", "right"], 0.3)
    save_pictures(tmp_path / "new/folder", "00007", pictures, length)
    assert sorted(path.name for path in (tmp_path / "new/folder").iterdir()) == ["00007.png", "00007.webp"]
    pictures = read_animation(tmp_path / "new/folder/00007.webp")
    assert len(pictures) == length and pictures[0].shape == (HEIGHT, WIDTH, 3)
    with Image.open(tmp_path / "new/folder/00007.png") as sheet:
        assert sheet.format == "PNG" and sheet.size == (columns * WIDTH, rows * HEIGHT)
        first = overlay(frames[0], masks[:, 0].numpy(), [5, 8], ["left 0.90", "right 0.50"])
        assert numpy.array_equal(numpy.asarray(sheet)[:HEIGHT, :WIDTH], first)


def test_a_track_is_shown_once_under_its_best_label_if_its_score_is_high_enough():
    _, masks = moving(1)
    found = video_of(masks[[0, 0, 1, 1]], [5, 5, 8, 9], [0.9, 0.8, 0.4, 0.2])
    assert best_labels(found, 0.3) == [0, 2] and best_labels(found, 0.0) == [0, 2, 3] and best_labels(found, 0.95) == []


def test_a_track_keeps_its_colour_over_the_video(tmp_path):
    frames, masks = moving(4)
    save_pictures(tmp_path, "video", overlays(frames, video_of(masks, [5, 8]), ["", ""], 0.0), 4)
    casts = [[middle(picture, mask.numpy()) for mask in masks[:, t]]
             for t, picture in enumerate(read_animation(tmp_path / "video.webp"))]
    left, right = numpy.swapaxes(casts, 0, 1)
    for cast in left[1:]:  # 4 grey levels: WebP is lossy; and a caption lies on the first row of the others
        assert numpy.allclose(cast, left[0], atol=4)
    for cast in right:
        assert numpy.allclose(cast, right[0], atol=4) and numpy.linalg.norm(cast - left[0]) > 40


def test_no_instances_leave_the_frames_as_they_are(tmp_path):
    frames, masks = moving(1)
    save_pictures(tmp_path, "empty", overlays(frames, video_of(masks, [5, 8]), ["", ""], 0.99), 1)
    with Image.open(tmp_path / "empty.png") as sheet:
        assert numpy.array_equal(numpy.asarray(sheet), frames[0])
    assert len(read_animation(tmp_path / "empty.webp")) == 1


def test_long_videos_are_shown_from_the_first_to_the_last_frame(tmp_path, monkeypatch):
    """The sheet has frames of all parts; an animation that would be too long has every second, third... frame."""
    monkeypatch.setattr(draw, "ANIMATED_FRAMES", 10)
    pictures = (Image.new("RGB", (8, HEIGHT), (10 * t, 10 * t, 10 * t)) for t in range(21))
    save_pictures(tmp_path, "long", pictures, 21)
    with Image.open(tmp_path / "long.png") as sheet:
        pixels = numpy.asarray(sheet)[::HEIGHT, ::8, 0]
    assert pixels.shape == (2, 3) and draw.SHEET_FRAMES == 6
    assert pixels.flatten().tolist() == [0, 40, 80, 120, 160, 200]
    assert [int(picture[0, 0, 0]) for picture in read_animation(tmp_path / "long.webp")] == pytest.approx(range(0, 201, 30), abs=3)
