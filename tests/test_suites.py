"""Synthetic videos: reproducible, consistent with their masks, and sufficiently hard."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

import data
from data import VideoSet
from synthetic import rendering, scenes
from synthetic import suites as synthetic

# Its decoder has yet to learn an argument that NumPy 2 passes to __array__; the masks are right all
# the same.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SMALL = dict(train_videos=3, valid_videos=1, frames=5, height=48, width=80)


@pytest.fixture(scope="module")
def scene_set(tmp_path_factory):
    """The folder of a set long enough for objects to leave and come back."""
    root = tmp_path_factory.mktemp("synthetic") / "set"
    synthetic.make_dataset(root, train_videos=8, valid_videos=2, frames=20, height=64, width=96)
    return root


def read_json(root, split="train"):
    return json.loads((root / f"{split}.json").read_text())


def read_files(root):
    """All files of a set, {path inside it: bytes}."""
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def decode(annotation):
    """The (T, H, W) bool masks of an annotation, empty where it says null."""
    empty = np.zeros((annotation["height"], annotation["width"]), dtype=bool)
    return np.stack(
        [
            empty if code is None else rle.decode(code).astype(bool)
            for code in annotation["segmentations"]
        ]
    )


def masks_by_video(content):
    """{video id: (instances, T, H, W) bool}."""
    masks = {video["id"]: [] for video in content["videos"]}
    for annotation in content["annotations"]:
        masks[annotation["video_id"]].append(decode(annotation))
    return {video_id: np.stack(instances) for video_id, instances in masks.items()}


def test_same_seed_gives_the_same_files_and_another_seed_does_not(tmp_path):
    for name, seed in (("first", 3), ("second", 3), ("other", 4)):
        synthetic.make_dataset(tmp_path / name, seed=seed, **SMALL)
    first, second, other = (read_files(tmp_path / name) for name in ("first", "second", "other"))
    assert first == second
    assert first["train.json"] != other["train.json"]
    assert first["train/JPEGImages/00000/00000.jpg"] != other["train/JPEGImages/00000/00000.jpg"]


def test_splits_share_no_scene(scene_set):
    train, valid = (
        scene_set / split / "JPEGImages/00000/00000.jpg" for split in ("train", "valid")
    )
    assert train.read_bytes() != valid.read_bytes()


def test_more_videos_begin_with_the_fewer(tmp_path):
    synthetic.make_dataset(tmp_path / "few", **SMALL)
    synthetic.make_dataset(tmp_path / "many", **{**SMALL, "train_videos": 5, "valid_videos": 2})
    few, many = read_json(tmp_path / "few"), read_json(tmp_path / "many")
    assert many["videos"][:3] == few["videos"]
    assert many["annotations"][: len(few["annotations"])] == few["annotations"]
    assert all(
        annotation["video_id"] > 3 for annotation in many["annotations"][len(few["annotations"]) :]
    )
    images_of_many = read_files(tmp_path / "many")
    for name, content in read_files(tmp_path / "few").items():
        assert name.endswith(".json") or images_of_many[name] == content


@pytest.mark.parametrize("split", ["train", "valid"])
def test_files_follow_the_youtube_vis_format(scene_set, split):
    content = read_json(scene_set, split)
    assert [category["id"] for category in content["categories"]] == [1, 2, 3, 4, 5, 6]
    assert tuple(category["name"] for category in content["categories"]) == scenes.CATEGORIES
    for video in content["videos"]:
        assert len(video["file_names"]) == video["length"] == 20
        for file_name in video["file_names"]:
            with Image.open(scene_set / split / "JPEGImages" / file_name) as image:
                assert image.size == (video["width"], video["height"]) == (96, 64)
    annotations = content["annotations"]
    assert [annotation["id"] for annotation in annotations] == list(range(1, len(annotations) + 1))
    videos_with_instances = {annotation["video_id"] for annotation in annotations}
    assert videos_with_instances == {video["id"] for video in content["videos"]}
    assert all(annotation["category_id"] in range(1, 7) for annotation in annotations)


def test_boxes_and_areas_agree_with_the_masks(scene_set):
    for annotation in read_json(scene_set)["annotations"]:
        masks = decode(annotation)
        assert masks.shape == (annotation["length"], annotation["height"], annotation["width"])
        assert masks.any()
        for mask, code, box, area in zip(
            masks,
            annotation["segmentations"],
            annotation["bboxes"],
            annotation["areas"],
            strict=True,
        ):
            if code is None:
                assert box is None and area is None
                continue
            rows, columns = np.nonzero(mask)
            assert area == len(rows) >= rendering.MIN_VISIBLE_PIXELS
            assert box == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]


def test_masks_of_a_frame_never_overlap(scene_set):
    for masks in masks_by_video(read_json(scene_set)).values():
        assert masks.sum(axis=0).max() == 1


def test_some_instance_has_a_gap(scene_set):
    visible = [
        decode(annotation).any(axis=(1, 2)) for annotation in read_json(scene_set)["annotations"]
    ]
    spans = [frames[frames.argmax() : len(frames) - frames[::-1].argmax()] for frames in visible]
    assert any(not span.all() for span in spans)


def test_some_instance_hides_another(scene_set):
    touching = 0
    for masks in masks_by_video(read_json(scene_set)).values():
        # Only where one hides another do two visible parts share a border: they are side by side
        # there.
        owner = (masks * np.arange(1, len(masks) + 1)[:, None, None, None]).sum(axis=0)
        left, right = owner[..., :-1], owner[..., 1:]
        touching += ((left > 0) & (right > 0) & (left != right)).sum()
    assert touching > 20


def test_make_video_returns_what_it_promises():
    rng = np.random.default_rng(0)
    images, instances = rendering.make_video(rng, frames=4, height=40, width=72, objects=(2, 3))
    assert images.shape == (4, 40, 72, 3) and images.dtype == np.uint8
    assert 1 <= len(instances) <= 3
    for category_id, masks in instances:
        assert 1 <= category_id <= len(scenes.CATEGORIES)
        assert masks.shape == (4, 40, 72) and masks.dtype == bool and masks.any()


def test_an_object_is_painted_where_its_mask_is():
    rng = np.random.default_rng(0)
    background = np.full((64, 96, 3), 128, dtype=np.float32)
    for _ in range(30):
        thing = scenes.make_object(rng, 1, 64, 96, background[0, 0])
        # Chance may put it outside the frame.
        thing = replace(thing, centres=np.array([[47.7, 31.2]]))
        image = background.copy()
        mask = rendering.draw_object(image, thing, 0)
        painted = np.abs(image - background).max(axis=2) > 0
        assert painted[mask].mean() > 0.95
        rim = np.argwhere(painted & ~mask)
        distances = np.linalg.norm(rim[:, None] - np.argwhere(mask), axis=2).min(axis=1)
        assert distances.max() < 3  # pixels: the blended edge, which reaches farthest at sharp tips
        assert np.median(distances) <= 1


def test_an_existing_set_is_left_alone(tmp_path):
    (tmp_path / "set").mkdir()
    synthetic.make_dataset(tmp_path / "set", **SMALL)  # an empty folder is no loss
    before = read_files(tmp_path / "set")
    with pytest.raises(FileExistsError, match="set"):
        synthetic.make_dataset(tmp_path / "set", seed=1, **SMALL)
    assert read_files(tmp_path / "set") == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "describe_instance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        synthetic.make_dataset(tmp_path / "set", **SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        dict(frames=0),
        dict(height=31),
        dict(width=8),
        dict(train_videos=0),
        dict(objects=(0, 2)),
        dict(objects=(3, 2)),
        dict(objects=(1,)),
    ],
)
def test_impossible_arguments_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="[.]$"):
        synthetic.make_dataset(tmp_path / "set", **{**SMALL, **wrong})
    assert not list(tmp_path.iterdir())


# Chosen frames


@pytest.mark.parametrize("name", synthetic.SUITES)
def test_chosen_frames_are_those_of_the_whole_video(name):
    suite, chosen = synthetic.SUITES[name], [17, 2, 9, 9, 13]
    for video in range(2):
        setting = (suite.frames, 48, 80, suite.objects, suite.difficulty)
        whole, instances = rendering.make_video(np.random.default_rng(video), *setting)
        images, found = rendering.make_video(np.random.default_rng(video), *setting, only=chosen)
        assert np.array_equal(images, whole[chosen])
        expected = [
            (category, masks[chosen]) for category, masks in instances if masks[chosen].any()
        ]
        assert all(
            one[0] == other[0] and np.array_equal(one[1], other[1])
            for one, other in zip(found, expected, strict=True)
        )


@pytest.mark.parametrize("only", [[], [20], [3, -1]])
def test_frames_that_a_video_does_not_have_are_refused(only):
    with pytest.raises(ValueError, match="from 0 to 19, not"):
        rendering.make_video(np.random.default_rng(0), 20, 48, 80, (1, 4), only=only)


def test_a_view_is_what_pillow_cuts_out():
    background = rendering.make_background(np.random.default_rng(0), 20, 48, 80)
    views = [background.view(time) for time in range(20)]
    for view, (x, y) in zip(views, background.corners):
        cut = Image.fromarray(background.picture).transform(
            (80, 48), Image.Transform.AFFINE, (1, 0, x, 0, 1, y), Image.Resampling.BILINEAR
        )
        assert np.array_equal(view, cut)
    mean = np.stack(views).astype(np.float32).mean((0, 1, 2))
    assert np.array_equal(rendering.mean_colour(views), mean)
    assert abs(background.estimate_colour() - mean).max() < 0.05


# Difficulties


def make_pair(difficulty, video=0, frames=20, objects=(1, 4)):
    """The same scene without and with a difficulty."""
    return [
        rendering.make_video(np.random.default_rng((0, 1, video)), frames, 64, 96, objects, setting)
        for setting in (scenes.Difficulty(), difficulty)
    ]


@pytest.mark.parametrize(
    "length", [4, *(pytest.param(length, marks=pytest.mark.slow) for length in (1, 7))]
)
def test_a_cover_hides_its_object_for_so_many_frames(length):
    """Whole, while the object would be seen; before and after, it is seen as often as it can be."""
    hidden = 0
    for video in range(12):
        (_, plain), (_, covered) = make_pair(
            scenes.Difficulty(occluded=1.0, occluded_frames=(length, length)), video, objects=(1, 1)
        )
        before = plain[0][1].any((1, 2))
        after = covered[0][1].any((1, 2)) if covered else np.zeros_like(before)
        assert not (after & ~before).any()
        lost = (before & ~after).sum()
        hidden += lost >= length
    # The others are outside or cut by the border for most of the time.
    assert hidden >= 8


def test_covers_belong_to_no_instance():
    (_, plain), (_, covered) = make_pair(scenes.Difficulty(occluded=1.0), objects=(3, 3))
    assert len(covered) <= len(plain)
    assert {category for category, _ in covered} <= {category for category, _ in plain}


def test_look_alikes_differ_by_their_paths_alone():
    rng = np.random.default_rng(0)
    things = [scenes.make_object(rng, 8, 64, 96, np.zeros(3)) for _ in range(4)]
    alike, covers = scenes.make_harder(rng, things, 64, 96, scenes.Difficulty(look_alike=1.0))
    assert not covers
    for thing, original in zip(alike, things):
        assert thing.category_id == things[0].category_id and thing.texture == things[0].texture
        assert np.array_equal(thing.colours, things[0].colours)
        assert np.array_equal(thing.radii, things[0].radii)
        assert np.array_equal(thing.centres, original.centres)


@pytest.mark.parametrize(
    "name, value", [("blur", 1.0), ("light", 1.0), ("texture", 1.0), ("noisy", 0.3)]
)
def test_pictures_change_and_masks_do_not(name, value):
    (images, plain), (harder, found) = make_pair(scenes.Difficulty(**{name: value}))
    assert all((one[1] == other[1]).all() for one, other in zip(plain, found, strict=True))
    changed = (images != harder).any((1, 2, 3))
    assert changed.any()
    if name == "noisy":
        assert changed.sum() == 6  # 0.3 of 20


def test_light_changes_once():
    (images, _), (harder, _) = make_pair(scenes.Difficulty(light=1.0), video=1)
    ratio = harder.mean((1, 2, 3)) / images.mean((1, 2, 3))
    first = int(np.argmax(abs(ratio - 1) > 0.02))
    assert np.allclose(ratio[:first], 1)
    assert np.allclose(ratio[first:], ratio[first], rtol=0.1)
    assert abs(ratio[first] - 1) > 0.1


def test_speed_stretches_the_path():
    slow, fast = (
        scenes.crossing_path(np.random.default_rng(3), 6, 64, 96, factor) for factor in (1.0, 2.0)
    )
    # Along y it may swing.
    assert (fast[-1, 0] - fast[0, 0]) / (slow[-1, 0] - slow[0, 0]) == pytest.approx(2)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(occluded=1.5),
        dict(blur=-0.1),
        dict(occluded_frames=(3, 2)),
        dict(occluded_frames=(0, 2)),
        dict(speed=0),
        dict(noise=-1),
        dict(light=2),
        dict(texture=2),
        dict(noisy=2),
    ],
)
def test_impossible_difficulties_are_refused(wrong):
    with pytest.raises(ValueError, match="not"):
        scenes.Difficulty(**wrong).check()


@pytest.mark.parametrize("name", synthetic.SUITES)
def test_suites(tmp_path, name):
    """Every suite makes a set that the rest of the code can read.

    All but the easy one say what makes them hard.
    """
    suite = synthetic.SUITES[name]
    synthetic.make_dataset(
        tmp_path / "set",
        1,
        1,
        min(suite.frames, 12),
        64,
        96,
        suite.objects,
        difficulty=suite.difficulty,
    )
    assert ("difficulty" in read_json(tmp_path / "set")["info"]) == (name != "easy")
    assert (
        len(VideoSet(tmp_path / "set" / "train.json", tmp_path / "set" / "train" / "JPEGImages"))
        == 1
    )


def test_flags_of_the_program_count_more_than_the_suite(tmp_path, monkeypatch):
    """--frames and --objects replace the suite's own; without them these are used."""
    command = [
        "data.py",
        "--videos",
        "1",
        "--valid-videos",
        "1",
        "--height",
        "48",
        "--width",
        "64",
        "--suite",
        "look-alike",
        "--root",
    ]
    suite = synthetic.SUITES["look-alike"]
    for flags, frames, objects in (
        ([], suite.frames, suite.objects),
        (["--frames", "2", "--objects", "1", "1"], 2, (1, 1)),
    ):
        root = tmp_path / str(frames)
        monkeypatch.setattr("sys.argv", [*command, str(root), *flags])
        data.main()
        content = read_json(root)
        assert [video["length"] for video in content["videos"]] == [frames]
        assert objects[0] <= len(content["annotations"]) <= objects[1]
    assert suite.objects == (2, 4)
    again = tmp_path / "again"
    monkeypatch.setattr(
        "sys.argv", [*command, str(again), "--frames", "2", "--objects", "1", "1", "--seed", "5"]
    )
    data.main()
    assert read_json(again)["annotations"] != read_json(tmp_path / "2")["annotations"]
