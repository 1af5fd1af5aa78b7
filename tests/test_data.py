"""Data sets and clips: annotations are read correctly, and masks stay aligned with the pixels.

Masks of all formats are compared with arrays written by hand, sizes with detectron2's rule, frames
with Pillow. Colours identify the instances: red and green rectangles move over a background whose
blue value identifies the video.
"""

import json
from itertools import groupby

import numpy
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from scipy.ndimage import binary_dilation, binary_erosion, center_of_mass
from torch.utils.data import DataLoader
from torchvision import tv_tensors

import data
from augmentation import Augmentation
from clips import ClipDataset, StepSampler, sample_frames
from data import InputError, Video, VideoSet, read_mask
from reading.layouts import find_split
from synthetic import clips as rendered_clips
from synthetic.clips import RenderedClips

HEIGHT, WIDTH = 48, 64
# Category ids, neither contiguous nor in order: green becomes label 0, red label 1.
RED, GREEN = 7, 3
COLOURS = {RED: (255, 0, 0), GREEN: (0, 255, 0)}
CATEGORIES = [{"id": RED, "name": "red"}, {"id": GREEN, "name": "green"}]
AS_IT_IS = Augmentation(short_sides=(HEIGHT,), flip=False)
SHAKEN = Augmentation(short_sides=(40, 48, 56), crop_short_sides=(44, 56), crop_size=(32, 44))


# A data set in a few lines


def run_lengths(mask):
    """Uncompressed RLE of an (H, W) mask, by hand: lengths of runs down the columns, the first one
    of zeros.
    """
    values = mask.T.flatten().tolist()
    runs = [len(list(run)) for _, run in groupby(values)]
    return {"size": list(mask.shape), "counts": [0, *runs] if values[0] else runs}


def rectangle(top, left, height=14, width=16):
    mask = numpy.zeros((HEIGHT, WIDTH), bool)
    mask[top : top + height, left : left + width] = True
    return mask


def red_and_green(length):
    """Two instances (category, (T, H, W) masks) that move through the left and the right half."""
    return [
        (RED, numpy.stack([rectangle(4 + 3 * t, 5 + 2 * t) for t in range(length)])),
        (GREEN, numpy.stack([rectangle(28 - 3 * t, 44 - 2 * t) for t in range(length)])),
    ]


def write_set(folder, videos, crowds=()):
    """Write lists of instances as videos 1, 2, ..., and open them.

    `crowds` are the ids of annotations of crowds.
    """
    content = {"categories": CATEGORIES, "videos": [], "annotations": []}
    for number, instances in enumerate(videos, 1):
        names = [f"{number}/{t}.png" for t in range(len(instances[0][1]))]
        frames = numpy.zeros((len(names), HEIGHT, WIDTH, 3), numpy.uint8)
        frames[..., 2] = 10 * number
        for category, masks in instances:
            frames[masks] = COLOURS[category]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "video_id": number,
                    "category_id": category,
                    "iscrowd": int(len(content["annotations"]) + 1 in crowds),
                    "segmentations": [run_lengths(mask) if mask.any() else None for mask in masks],
                }
            )
        (folder / str(number)).mkdir(parents=True)
        for name, frame in zip(names, frames):
            Image.fromarray(frame).save(folder / name)
        content["videos"].append(
            {"id": number, "height": HEIGHT, "width": WIDTH, "file_names": names}
        )
    (folder / "set.json").write_text(json.dumps(content))
    return VideoSet(folder / "set.json", folder)


def is_colour(frame, category):
    """Where a (3, H, W) frame is nearer to the colour of a category than to anything else in it."""
    return ((frame > 127) == torch.tensor(COLOURS[category])[:, None, None].bool()).all(0).numpy()


def parts(clip):
    return clip.frames, clip.labels, clip.masks


def same(one, other):
    return all(torch.equal(left, right) for left, right in zip(parts(one), parts(other)))


# Masks

SHAPE = rectangle(3, 4, height=6, width=7)
POLYGON = [4, 3, 11, 3, 11, 9, 4, 9]  # x, y of the corners of SHAPE
COMPRESSED = rle.encode(numpy.asfortranarray(SHAPE.astype(numpy.uint8)))


@pytest.mark.parametrize(
    "segmentation",
    [
        [POLYGON],
        [[4, 3, 8, 3, 8, 9, 4, 9], [8, 3, 11, 3, 11, 9, 8, 9]],  # in two halves
        [POLYGON, [20, 20, 30, 30], [50, 40]],  # lines and points have no inside
        run_lengths(SHAPE),
        {"size": [HEIGHT, WIDTH], "counts": COMPRESSED["counts"]},
        {"size": [HEIGHT, WIDTH], "counts": COMPRESSED["counts"].decode()},
    ],
    ids=[
        "polygon",
        "polygons",
        "degenerate polygons",
        "uncompressed RLE",
        "compressed RLE",
        "compressed RLE as text",
    ],
)
def test_every_notation_gives_the_same_mask(segmentation):
    mask = read_mask(segmentation, HEIGHT, WIDTH, "annotation 5")
    assert mask.dtype == bool and numpy.array_equal(mask, SHAPE)


@pytest.mark.parametrize("segmentation", [None, [], [[1, 1, 20, 20]]])
def test_nothing_gives_an_empty_mask(segmentation):
    mask = read_mask(segmentation, HEIGHT, WIDTH, "annotation 5")
    assert mask.shape == (HEIGHT, WIDTH) and mask.dtype == bool and not mask.any()


@pytest.mark.parametrize(
    "segmentation",
    [
        "text",
        b"bytes",
        5,
        [["one", "two", "three", "four", "five", "six"]],
        [[POLYGON] * 6],
        {"size": [HEIGHT, WIDTH]},
        {"counts": COMPRESSED["counts"]},
        {"size": [HEIGHT, WIDTH], "counts": "no RLE"},
        {"size": [HEIGHT, WIDTH], "counts": None},
        {"size": [HEIGHT, WIDTH], "counts": ["many"]},
        {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH + 1]},
        {"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]},
        pytest.param(POLYGON),
        pytest.param({"counts": [HEIGHT * WIDTH]}),
        pytest.param({"size": [HEIGHT], "counts": [9]}),
        pytest.param({"size": [HEIGHT, WIDTH], "counts": [-1]}),
        # Whole, then a number without an end.
        pytest.param({"size": [HEIGHT, WIDTH], "counts": COMPRESSED["counts"] + b"P"}),
    ],
    ids=str,
)
def test_an_unreadable_mask_names_its_annotation(segmentation):
    with pytest.raises(InputError, match="^annotation 5, frame 2, "):
        read_mask(segmentation, HEIGHT, WIDTH, "annotation 5, frame 2,")


@pytest.mark.parametrize("counts", [[3, 4], "34"], ids=str)  # the same runs as numbers and as text
def test_a_mask_never_shows_what_was_in_memory(counts):
    ones = rle.encode(numpy.ones((HEIGHT, WIDTH), numpy.uint8, order="F"))
    for _ in range(5):
        rle.decode(ones)
        try:
            mask = read_mask(
                {"size": [HEIGHT, WIDTH], "counts": counts}, HEIGHT, WIDTH, "annotation 5"
            )
        except InputError:
            continue
        assert mask.sum() == 4


# Reading a set


def test_labels_follow_the_order_of_category_ids(tmp_path):
    videos = write_set(tmp_path, [red_and_green(2), red_and_green(3)])
    assert videos.categories == [(GREEN, "green"), (RED, "red")]
    assert [
        [annotation["label"] for annotation in video.annotations] for video in videos.videos
    ] == [[1, 0]] * 2
    assert [
        [file.relative_to(tmp_path).as_posix() for file in video.files] for video in videos.videos
    ] == [["1/0.png", "1/1.png"], ["2/0.png", "2/1.png", "2/2.png"]]


NAMES = [
    "train.json",
    "train/instances.json",
    "instances_train.json",
    "annotations_train.json",
    "annotations/train.json",
    "annotations/annotations_train.json",
    "annotations/instances_train.json",
]
FOLDERS = ["train/JPEGImages", "JPEGImages/train", "train", "JPEGImages"]


@pytest.mark.parametrize(
    "name, folder",
    [
        (name, folder)
        for name in NAMES
        for folder in FOLDERS
        # The folder of this JSON comes first.
        if (name, folder) != ("train/instances.json", "JPEGImages")
    ],
)
def test_a_split_is_found_under_every_known_name(tmp_path, name, folder):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert find_split(tmp_path, "train") == (tmp_path / name, tmp_path / folder)


def test_a_split_that_is_not_there_names_every_path_tried(tmp_path):
    with pytest.raises(InputError) as no_json:
        find_split(tmp_path, "train")
    (tmp_path / "train.json").touch()
    with pytest.raises(InputError) as no_folder:
        find_split(tmp_path, "train")
    for error, expected in ((no_json, NAMES), (no_folder, FOLDERS)):
        tried = str(error.value).split("tried ")[1].split(", ")
        assert tried == [str(tmp_path / name) for name in expected]


# Sizes and frames for testing


def detectron2_size(height, width, short_side, max_long_side):
    """ResizeShortestEdge.get_output_shape of detectron2."""
    scale = short_side / min(height, width)
    new_height, new_width = (
        (short_side, scale * width) if height < width else (scale * height, short_side)
    )
    if max(new_height, new_width) > max_long_side:
        scale = max_long_side / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return int(new_height + 0.5), int(new_width + 0.5)


@pytest.mark.parametrize(
    "size, short_side, expected",
    [
        ((720, 1280), 360, (360, 640)),
        ((1280, 720), 360, (640, 360)),
        ((96, 160), 96, (96, 160)),
        ((50, 50), 360, (360, 360)),
        ((1080, 1920), 1000, (750, 1333)),  # the long side would be 1778
        ((1000, 100), 360, (1333, 133)),
        # 2.5 is rounded up, where round() would go to the even 2.
        ((4, 5), 2, (2, 3)),
        ((5, 4), 2, (3, 2)),
        ((411, 733), 448, (448, 799)),
    ],
)
def test_sizes_follow_detectron2(size, short_side, expected):
    assert (
        data.short_side_size(*size, short_side, 1333)
        == expected
        == detectron2_size(*size, short_side, 1333)
    )


@pytest.mark.parametrize("short_side", [30, 48, 75])
def test_test_frames_are_pillows_bilinear_ones(tmp_path, short_side):
    video = write_set(tmp_path, [red_and_green(2)]).videos[0]
    noise = numpy.random.default_rng(0).integers(0, 256, (2, HEIGHT, WIDTH, 3), dtype=numpy.uint8)
    for file, picture in zip(video.files, noise):
        Image.fromarray(picture).save(file)
    frames = list(data.frames_at_test_size(video, short_side))
    for frame, picture in zip(frames, noise, strict=True):
        size = (short_side * 4 // 3, short_side)
        expected = numpy.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
        assert frame.dtype == torch.uint8
        assert numpy.array_equal(frame.permute(1, 2, 0).numpy(), expected)


# Which frames and which clips


@pytest.mark.parametrize(
    "length, count, reach", [(20, 3, 6), (20, 5, 1), (4, 8, 2), (2, 2, 9), (9, 1, 3), (1, 4, 3)]
)
def test_frames_are_sorted_and_within_reach_of_one_of_them(length, count, reach):
    choices = [
        sample_frames(length, count, reach, numpy.random.default_rng(seed)) for seed in range(300)
    ]
    for chosen in choices:
        assert len(chosen) == count
        assert chosen == sorted(chosen)
        assert 0 <= chosen[0]
        assert chosen[-1] < length
        centres = [t for t in chosen if all(abs(t - other) <= reach for other in chosen)]
        # The first choice is not chosen again, unless there is no other.
        assert centres and (length == 1 or any(chosen.count(t) == 1 for t in centres))
    assert {t for chosen in choices for t in chosen} == set(range(length))


@pytest.mark.parametrize("length, reach", [(20, 6), (5, 9)])
def test_every_distance_within_reach_occurs(length, reach):
    choices = [
        sample_frames(length, 2, reach, numpy.random.default_rng(seed)) for seed in range(300)
    ]
    assert {later - earlier for earlier, later in choices} == set(
        range(1, min(reach, length - 1) + 1)
    )


def test_a_video_of_one_frame_repeats_it():
    assert sample_frames(1, 4, 3, numpy.random.default_rng(0)) == [0, 0, 0, 0]


@pytest.fixture(scope="module")
def five_videos(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("five"), [red_and_green(4)] * 5)


def test_a_clip_is_a_function_of_seed_and_number(five_videos):
    first, again, other = (ClipDataset(five_videos, 3, 2, SHAKEN, seed) for seed in (1, 1, 2))
    clips = [first[index] for index in range(10)]
    # What was read before makes no difference.
    backwards = [again[index] for index in reversed(range(10))][::-1]
    assert all(same(clip, repeated) for clip, repeated in zip(clips, backwards, strict=True))
    assert not any(same(clips[i], clips[j]) for i in range(10) for j in range(i))
    assert not any(same(clip, other[index]) for index, clip in enumerate(clips))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_make_no_difference(five_videos, workers):
    clips = ClipDataset(five_videos, 3, 2, SHAKEN, seed=1)
    loader = DataLoader(
        clips, batch_sampler=StepSampler(0, 3, 2), num_workers=workers, collate_fn=list
    )
    loaded = [clip for batch in loader for clip in batch]
    assert len(loaded) == 6 and all(same(clip, clips[index]) for index, clip in enumerate(loaded))


def test_two_processes_share_the_batch_of_one():
    alone = list(StepSampler(0, 5, 4))
    first, second = (list(StepSampler(0, 5, 2, rank=rank, world=2)) for rank in range(2))
    assert [one + two for one, two in zip(first, second, strict=True)] == alone
    assert sum(alone, []) == list(range(20))


def test_a_resumed_run_goes_on_with_the_same_clips():
    for rank in range(2):
        whole, rest = (StepSampler(start, 9, 3, rank=rank, world=2) for start in (0, 4))
        assert list(rest) == list(whole)[4:] and len(rest) == 5


def test_an_epoch_shows_every_annotated_video_once(tmp_path):
    one = red_and_green(2)
    # Videos 2 and 5 have a crowd alone: annotation 2 and the last one. Video 3 keeps its second
    # annotation.
    videos = write_set(tmp_path, [one[:1], one[1:], one, one[:1], one[:1]], crowds=(2, 3, 6))
    clips = ClipDataset(videos, 2, 2, AS_IT_IS, seed=0)
    # The blue of the background.
    numbers = [int(clips[index].frames[0, 2, 0, 0]) // 10 for index in range(8 * 3)]
    epochs = [tuple(numbers[start : start + 3]) for start in range(0, 24, 3)]
    assert all(sorted(epoch) == [1, 3, 4] for epoch in epochs)
    assert len(set(epochs)) > 1


def test_crowds_are_left_out(tmp_path):
    clips = ClipDataset(write_set(tmp_path, [red_and_green(2)], crowds=(1,)), 2, 2, AS_IT_IS)
    assert clips[0].labels.tolist() == [0]  # green


def test_a_set_of_crowds_cannot_be_trained_on(tmp_path):
    with pytest.raises(InputError, match="no annotated video"):
        ClipDataset(write_set(tmp_path, [red_and_green(2)], crowds=(1, 2)), 2, 2, AS_IT_IS)


def test_labels_are_those_of_the_masks_and_of_nobody_else(tmp_path):
    red, green = (masks for _, masks in red_and_green(6))
    red[3:], green[1:] = False, False
    clips = ClipDataset(write_set(tmp_path, [[(RED, red), (GREEN, green)]]), 2, 2, SHAKEN, seed=3)
    seen = set()
    for index in range(60):
        clip = clips[index]
        assert clip.masks.dtype == torch.bool and clip.labels.dtype == torch.int64
        hidden = ~clip.masks.flatten(2).any(2)
        assert not hidden.all(1).any()  # who is never seen is left out
        for label, masks in zip(clip.labels.tolist(), clip.masks):
            coloured = clip.frames[:, 1 - label] > 127  # label 1 is red, 0 is green
            assert coloured[masks].float().mean() > 0.5 > coloured[~masks].float().mean()
        seen.add((tuple(clip.labels.tolist()), tuple(map(tuple, hidden.tolist()))))
    assert {labels for labels, _ in seen} == {(), (0,), (1,), (1, 0)}
    assert ((1,), ((False, True),)) in seen  # red leaves within the clip


# Clips of scenes that are drawn when asked for


@pytest.fixture(scope="module")
def rendered():
    """Clips of two suites, and the first eight."""
    clips = RenderedClips(["easy", "occlusion"], 2, 6, SHAKEN, seed=1)
    return clips, [clips[index] for index in range(8)]


def test_a_rendered_clip_is_a_function_of_seed_and_number(rendered):
    clips, first = rendered
    loader = DataLoader(clips, batch_sampler=StepSampler(1, 3, 2), num_workers=2, collate_fn=list)
    # Numbers 2 to 5, from two processes.
    loaded = [clip for batch in loader for clip in batch]
    assert all(same(clip, again) for clip, again in zip(loaded, first[2:6], strict=True))
    assert same(clips[0], first[0])
    assert not same(RenderedClips(["easy"], 2, 6, SHAKEN, seed=2)[0], first[0])
    # In turn: an odd number's suite.
    assert same(RenderedClips(["look-alike", "occlusion"], 2, 6, SHAKEN, seed=1)[7], first[7])


def test_rendered_clips_show_somebody(rendered):
    for clip in rendered[1]:
        assert clip.frames.shape[:2] == (2, 3)
        assert clip.frames.dtype == torch.uint8
        assert clip.masks.dtype == torch.bool
        assert len(clip.labels) == len(clip.masks) > 0
        assert set(clip.labels.tolist()) <= set(range(6))
        assert clip.masks.flatten(1).any(1).all()
    with pytest.raises(InputError, match="show no instance"):
        RenderedClips(["easy"], 1, 1, lambda frames, masks, generator: (frames, masks & False))[0]


def test_no_rendered_scene_is_that_of_a_file(monkeypatch):
    """The random state of a scene in a file begins with the seed and 0 or 1."""
    drawn, make_video = [], rendered_clips.make_video
    monkeypatch.setattr(
        rendered_clips,
        "make_video",
        lambda rng, *setting, **only: drawn.append(rng) or make_video(rng, *setting, **only),
    )
    clips = RenderedClips(["easy"], 1, 1, AS_IT_IS, seed=0)
    assert [clips[index] for index in range(3)]
    assert {rng.bit_generator.seed_seq.entropy[:2] for rng in drawn} == {(0, 3)}


# Augmentation


def painted_clip(length=3):
    """frames (T, 3, H, W) and masks (I, T, H, W) of the red and the green rectangle on black."""
    instances = red_and_green(length)
    frames = numpy.zeros((length, HEIGHT, WIDTH, 3), numpy.uint8)
    for category, masks in instances:
        frames[masks] = COLOURS[category]
    return (
        tv_tensors.Video(torch.from_numpy(frames).permute(0, 3, 1, 2)),
        tv_tensors.Mask(torch.from_numpy(numpy.stack([masks for _, masks in instances]))),
    )


@pytest.fixture(scope="module")
def augmented():
    """The painted clip, augmented with many generators."""
    return [SHAKEN(*painted_clip(), numpy.random.default_rng(seed)) for seed in range(80)]


def test_masks_stay_on_their_pixels(augmented):
    checked = 0
    for frames, masks in augmented:
        for category, instance in zip((RED, GREEN), masks):
            for frame, mask in zip(frames, instance.numpy(), strict=True):
                coloured = is_colour(frame, category)
                # The border of a crop is no outline.
                inner = binary_erosion(mask, iterations=2, border_value=1)
                assert coloured[inner].all()
                assert binary_dilation(mask, iterations=2)[coloured].all()
                checked += inner.sum()
    assert checked > 10_000


def test_masks_are_not_shifted_by_a_fraction_of_a_pixel():
    shifts = []
    for short_side in range(30, 80, 3):
        resizing = Augmentation(short_sides=(short_side,), flip=False)
        frames, masks = resizing(*painted_clip(), numpy.random.default_rng(0))
        for colour, instance in ((frames[:, 0], masks[0]), (frames[:, 1], masks[1])):  # red, green
            shifts += [
                numpy.subtract(center_of_mass(mask.numpy()), center_of_mass(painted.numpy()))
                for mask, painted in zip(instance, colour)
            ]
    # Pixels, between the centres of a mask and of its colour; "nearest" alone would shift by 0.45
    # on average.
    assert numpy.abs(shifts).max() < 0.6
    assert numpy.abs(numpy.mean(shifts, 0)).max() < 0.15


def test_all_frames_of_a_clip_share_one_size_among_those_asked_for(augmented):
    assert all(
        frames.shape == (3, 3, *masks.shape[2:]) and masks.shape[:2] == (2, 3)
        for frames, masks in augmented
    )
    assert {min(frames.shape[-2:]) for frames, _ in augmented} == {40, 48, 56}
    ratios = [frames.shape[-1] / frames.shape[-2] for frames, _ in augmented]
    whole = numpy.isclose(ratios, WIDTH / HEIGHT, atol=0.02).mean()
    assert 0.3 < whole < 0.7  # the others are crops


def test_a_crop_drifts_along_a_line():
    ramp = torch.arange(200, dtype=torch.uint8).expand(9, 3, 150, 200).clone()  # red: the column
    ramp[:, 1] = torch.arange(150, dtype=torch.uint8)[:, None]  # green: the row
    cropping = Augmentation(short_sides=(), crop_size=(30, 60))
    drifts = []
    for seed in range(20):
        frames, masks = cropping.crop(
            tv_tensors.Video(ramp),
            tv_tensors.Mask(ramp[None, :, 0] % 2 == 0),
            numpy.random.default_rng(seed),
        )
        assert 30 <= min(frames.shape[-2:]) and max(frames.shape[-2:]) <= 60
        assert torch.equal(masks[0], frames[:, 0] % 2 == 0)
        corners = frames[:, :2, 0, 0].int().numpy()  # column and row of the top left pixel
        travelled = corners - corners[0]
        end = travelled[numpy.abs(travelled).sum(1).argmax()]
        assert (numpy.diff(corners, axis=0) * numpy.sign(end) >= 0).all()  # never back
        off_the_line = travelled[:, 0] * end[1] - travelled[:, 1] * end[0]
        # But for rounding to whole pixels.
        assert (numpy.abs(off_the_line) <= 2 * numpy.hypot(*end) + 1e-9).all()
        drifts.append(end.tolist())
    assert min(drift[0] for drift in drifts) < 0 < max(drift[0] for drift in drifts)


def test_a_flip_is_shared_by_all_frames():
    flips = []
    for seed in range(60):
        frames, _ = Augmentation(short_sides=(HEIGHT,))(
            *painted_clip(), numpy.random.default_rng(seed)
        )
        red_is_left = [
            bool(frame[0].nonzero()[:, 1].max() < frame[1].nonzero()[:, 1].min())
            for frame in frames
        ]
        assert len(set(red_is_left)) == 1
        flips.append(not red_is_left[0])
    assert 15 < sum(flips) < 45
    never = Augmentation(short_sides=(HEIGHT,), flip=False)
    original, _ = painted_clip()
    assert all(
        torch.equal(never(*painted_clip(), numpy.random.default_rng(seed))[0], original)
        for seed in range(8)
    )


def test_a_mask_of_a_turned_frame_is_refused():
    with pytest.raises(InputError, match=r"its size is \[6, 4\]"):
        read_mask({"size": [6, 4], "counts": [24]}, 4, 6, "a mask")


@pytest.mark.parametrize("split", ["valid", "val"])
def test_valid_and_val_are_one_split(tmp_path, split):
    (tmp_path / "valid.json").touch()
    (tmp_path / "val").mkdir()
    assert find_split(tmp_path, split) == (tmp_path / "valid.json", tmp_path / "val")


def test_names_of_videos_are_unique():
    """Also on file systems that ignore case, and for negative numbers."""
    ids = [1, -1, 10**30, "a/b", "A/b", "a b"]
    names = [Video(id_, 1, 1, [], []).name.lower() for id_ in ids]
    assert len(set(names)) == len(ids) and all("/" not in name for name in names)
