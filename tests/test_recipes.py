"""Official settings and data sets: every field, every layout on disk, one training step each."""

import inspect
import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

import train
from augmentation import Augmentation
from data import InputError, VideoSet
from losses import Criterion
from reading.configs import read_config
from reading.layouts import COCO_MAPS, find_named_set
from recipes import RECIPES
from tracker import Tracker
from trainer import datasets
from trainer.flags import parse_arguments
from trainer.folder import check_folder
from trainer.official_names import official_setting

# Of the official repository's 17 configurations.
OFFICIAL = json.loads((Path(__file__).parent / "recipes.json").read_text())
COCO_TABLES = json.loads((Path(__file__).parent / "coco_maps.json").read_text())
CLASSES = {"ovis": 25, "ytvis_2019": 40, "ytvis_2021": 40}
# 80 of 90, as in COCO.
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
HEIGHT, WIDTH, FRAMES = 40, 56, 3
SMALL = [
    "--preset",
    "toy",
    "--norm",
    "group",
    "--device",
    "cpu",
    "--workers",
    "0",
    "--points",
    "32",
    "--short-sides",
    "32",
    "48",
    "--pseudo-short-sides",
    "32",
    "--lsj-size",
    "64",
    "--crop-size",
    "24",
    "36",
    "--pseudo-crop-size",
    "24",
    "36",
    "--no-crop-relative",
    "--init",
    "",
    "--backbone-weights",
    "",
    "--iterations",
    "1",
    "--batch",
    "1",
    "--lr-steps",
    "--seed",
    "3",
]
LAYOUTS = {  # annotation file and frames folder of a split that people have on disk
    "as upstream, YouTube-VIS": ("train.json", "train/JPEGImages"),
    "as unpacked, 2021": ("train/instances.json", "train/JPEGImages"),
    "as upstream, OVIS": ("annotations/train.json", "train"),
    "as downloaded, OVIS": ("annotations/annotations_train.json", "train"),
    "flat": ("instances_train.json", "JPEGImages"),
}


# ---- Settings ------------------------------------------------------------------------------------
# -------------------


@pytest.mark.parametrize("name", RECIPES)
def test_dry_run_prints_the_official_setting(name, capsys):
    train.main(parse_arguments(["--recipe", name, "--dry-run"]))
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("recipe") == name
    assert printed.pop("stage") in ("detector", "vita", "grattvis")
    assert printed == OFFICIAL["common"] | OFFICIAL["recipes"][RECIPES[name][0]]


def test_every_official_setting_has_one_name():
    assert sorted(official for official, _ in RECIPES.values()) == sorted(OFFICIAL["recipes"])


def test_flags_override_a_recipe_and_its_stage():
    args = parse_arguments(
        [
            "--recipe",
            "grattvis/ovis/r50",
            "--lr",
            "1e-4",
            "--no-freeze-detector",
            "--no-flip",
            "--frames",
            "3",
            "--propagation",
            "memory",
            "--crop-short-sides",
        ]
    )
    setting = official_setting(args)
    changed = {
        name
        for name, value in OFFICIAL["recipes"]["grattvis/ovis/grattvis_R50_bs8"].items()
        if setting[name] != value
    }
    assert changed == {
        "lr",
        "freeze_detector",
        "flip",
        "frames",
        "use_mem",
        "gated",
        "crop",
        "meta",
    }


def test_only_a_recipe_starts_other_classes_anew():
    assert parse_arguments(["--recipe", "grattvis/ovis/r50"]).reset_classes
    assert not parse_arguments([]).reset_classes


def test_a_stage_without_a_recipe():
    args = parse_arguments(["--stage", "vita"])
    assert (args.propagation, args.window, args.preset) == ("clip", 6, "toy")
    assert parse_arguments(["--stage", "genvis"]).propagation == "memory"


@pytest.mark.parametrize("preset", ["r50", "r101", "swin_l"])
def test_a_stage_has_the_official_settings_of_its_preset(preset):
    """Those of the recipe for COCO or OVIS, but for the data set and the initial weights."""
    for stage in ("detector", "vita", "grattvis"):
        data = "coco" if stage == "detector" else "ovis"
        known = f"{stage}/{data}/{preset}"
        recipe = parse_arguments(["--recipe", known if known in RECIPES else f"{stage}/ovis/r50"])
        args = parse_arguments(["--stage", stage, "--preset", preset])
        differing = {name for name, value in vars(recipe).items() if vars(args)[name] != value}
        allowed = {"recipe", "train_sets", "test_sets", "train_ratio", "num_classes", "top_k"}
        allowed |= {"init", "reset_classes", "output", "data_root"}
        if known not in RECIPES:
            allowed.add("preset")
        assert differing <= allowed, differing - allowed
        assert args.init is None and args.lr == (1e-4 if stage == "detector" else 5e-5)
    assert parse_arguments(["--stage", "genvis", "--preset", preset]).propagation == "memory"
    toy = parse_arguments(["--stage", "grattvis", "--preset", "toy"])
    assert (toy.lr, toy.iterations) == (1e-3, 500)


@pytest.mark.parametrize("flags", [["--stage", "grattvis"], ["--freeze-detector"]], ids=str)
def test_a_frozen_detector_needs_weights(tmp_path, flags):
    make_videos(tmp_path, ("train.json", "train/JPEGImages"), 3)
    arguments = ["--data-root", str(tmp_path), "--output", str(tmp_path / "run"), "--device", "cpu"]
    with pytest.raises(InputError, match="--freeze-detector .* give --init, or --no-freeze"):
        train.main(parse_arguments([*arguments, *flags]))
    assert not (tmp_path / "run").exists()


def test_random_weights_under_frozen_norms_are_told(capsys):
    args = parse_arguments(["--norm", "frozen"])
    train.make_model(args, [(1, "cell")], None, print)
    assert "norms are frozen" in capsys.readouterr().out
    train.make_model(parse_arguments([]), [(1, "cell")], None, print)
    assert "norms are frozen" not in capsys.readouterr().out


# ---- Data on disk --------------------------------------------------------------------------------
# -------------------


def draw_frame(path, generator):
    """A noisy picture with a bright rectangle; returns the rectangle: left, top, right, bottom."""
    picture = generator.integers(0, 90, (HEIGHT, WIDTH, 3), dtype=numpy.uint8)
    left, top = generator.integers(2, 20, 2)
    picture[top : top + 18, left : left + 22] += 150
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, quality=95)
    return left, top, left + 22, top + 18


def filled(left, top, right, bottom):
    mask = numpy.zeros((HEIGHT, WIDTH), numpy.uint8, order="F")
    mask[top:bottom, left:right] = 1
    return rle.encode(mask) | {"counts": rle.encode(mask)["counts"].decode()}


def make_videos(root, layout, classes, videos=3):
    """A set in the YouTube-VIS format: each video one rectangle, of category 1, 2, ..."""
    json_name, frames_name = layout
    generator, content = (
        numpy.random.default_rng(0),
        {
            "videos": [],
            "annotations": [],
            "categories": [{"id": i, "name": f"class {i}"} for i in range(1, classes + 1)],
        },
    )
    for video in range(1, videos + 1):
        files = [f"video{video}/{t:05d}.jpg" for t in range(FRAMES)]
        boxes = [draw_frame(root / frames_name / file, generator) for file in files]
        content["videos"].append(
            {"id": video, "height": HEIGHT, "width": WIDTH, "length": FRAMES, "file_names": files}
        )
        content["annotations"].append(
            {
                "id": video,
                "video_id": video,
                "category_id": video,
                "iscrowd": 0,
                "areas": [18 * 22] * FRAMES,
                "segmentations": [filled(*box) for box in boxes],
            }
        )
    (root / json_name).parent.mkdir(parents=True, exist_ok=True)
    (root / json_name).write_text(json.dumps(content))
    return content


def make_coco(root):
    """Four images with a polygon each, of COCO's categories 1 (person), 3, 8 and 90 (toothbrush, in
    no map).
    """
    generator, content = (
        numpy.random.default_rng(1),
        {
            "images": [],
            "annotations": [],
            "categories": [{"id": i, "name": f"coco {i}"} for i in COCO_IDS],
        },
    )
    for image, category in enumerate((1, 3, 8, 90), 1):
        left, top, right, bottom = draw_frame(root / "train2017" / f"{image:012d}.jpg", generator)
        content["images"].append(
            {"id": image, "height": HEIGHT, "width": WIDTH, "file_name": f"{image:012d}.jpg"}
        )
        content["annotations"].append(
            {
                "id": image,
                "image_id": image,
                "category_id": category,
                "iscrowd": 0,
                "segmentation": [
                    [int(x) for x in (left, top, right, top, right, bottom, left, bottom)]
                ],
            }
        )
    (root / "annotations").mkdir()
    (root / "annotations/instances_train2017.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory):
    """A folder as $DETECTRON2_DATASETS is, in miniature."""
    root = tmp_path_factory.mktemp("datasets")
    make_videos(root / "ovis", LAYOUTS["as downloaded, OVIS"], 25)
    make_videos(root / "ytvis_2019", LAYOUTS["as upstream, YouTube-VIS"], 40)
    make_videos(root / "ytvis_2021", LAYOUTS["as unpacked, 2021"], 40)
    make_coco(root / "coco")
    return root


SIZES = ("preset", "test_short_side", "iterations", "lr_steps", "init", "backbone_weights")
DIFFERENT = {
    repr({key: value for key, value in setting.items() if key not in SIZES}): name
    # The same data, augmentation, stage: one of them.
    for name, (_, setting) in RECIPES.items()
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENT.values())
def test_every_recipe_trains_a_step(name, data_sets, tmp_path, monkeypatch, capsys):
    """From the sets on disk through its own augmentation, at a toy's size.

    One of those that differ in their size alone.
    """
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data_sets))
    train.main(
        parse_arguments(["--recipe", name, "--output", str(tmp_path), "--log-every", "1", *SMALL])
    )
    record = json.loads((tmp_path / "log.jsonl").read_text())
    frozen = "grattvis" in name
    assert ("loss_ce" in record) != frozen
    assert any(key.startswith("loss_genvis" if frozen else "loss_vita") for key in record)
    config = torch.load(tmp_path / "last.pt", weights_only=True)["config"]
    assert len(config["categories"]) == (80 if "coco" in name else 25 if "ovis" in name else 40)
    batch, rate = RECIPES[name][1]["batch"], RECIPES[name][1]["lr"]
    assert (
        f"is for {batch} clips a step; for 1, --lr {rate / batch:g} is usual"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CLASSES)
def test_every_layout_is_found(name, layout, tmp_path):
    make_videos(tmp_path / name, LAYOUTS[layout], CLASSES[name], videos=1)
    json_path, frames, category_map = find_named_set(tmp_path, f"{name}_train")
    assert category_map is None and len(VideoSet(json_path, frames).videos[0].files) == FRAMES


def test_a_set_that_is_not_there_or_not_known(tmp_path):
    with pytest.raises(InputError, match="no data set is called ovys_train"):
        find_named_set(tmp_path, "ovys_train")
    with pytest.raises(
        InputError, match="tried .*coco/annotations/instances_train2017.json.*coco2ovis_train.json"
    ):
        find_named_set(tmp_path, "coco2ovis_train")


def open_clips(root, *more):
    return datasets.open_clips(
        parse_arguments(["--recipe", "grattvis/ovis/r50", "--data-root", str(root), *SMALL, *more])
    )


def test_images_become_pseudo_videos_of_the_targets_classes(data_sets):
    """Categories are mapped, what is in no map is left out, and the picture is the same in all
    frames but for its drift.
    """
    pseudo, real = open_clips(
        data_sets, "--short-sides", "40", "--pseudo-short-sides", "40", "--crop-short-sides"
    ).sources
    assert [video.annotations[0]["label"] + 1 for video in pseudo.videos] == [
        COCO_MAPS["ovis"][i] for i in (1, 3, 8)
    ]
    for index in range(6):
        clip = pseudo[index]
        assert clip.frames.shape == (5, 3, 40, 56)
        assert clip.masks.shape == (1, 5, 40, 56)
        assert clip.masks.flatten(2).any(2).all()
        inside = clip.frames.float().mean(1)[clip.masks[0]]
        # Masks turn with the picture.
        assert inside.mean() > 150 > clip.frames.float().mean(1)[~clip.masks[0]].mean()
    turned = [
        not torch.equal(clip.frames[0], clip.frames[-1])
        for clip in (pseudo[index] for index in range(6))
    ]
    assert all(turned) and len(real.videos) == 3


@pytest.mark.parametrize("target", [name for name in COCO_TABLES if name != "source"])
def test_every_category_of_coco_becomes_the_official_one(target, tmp_path):
    """One image of each category, which its file is named after.

    Those of no category of the target are left out.
    """
    coco, name = tmp_path / "coco", target.replace("ytvis", "ytvis_")
    make_videos(tmp_path / name, LAYOUTS["as upstream, YouTube-VIS"], CLASSES[name], videos=1)
    (coco / "train2017").mkdir(parents=True)
    content = {
        "categories": [{"id": i, "name": f"coco {i}"} for i in COCO_IDS],
        "images": [],
        "annotations": [],
    }
    for category in COCO_IDS:
        Image.new("RGB", (WIDTH, HEIGHT)).save(coco / f"train2017/{category}.jpg")
        content["images"].append(
            {"id": category, "height": HEIGHT, "width": WIDTH, "file_name": f"{category}.jpg"}
        )
        content["annotations"].append(
            {
                "id": category,
                "image_id": category,
                "category_id": category,
                "iscrowd": 0,
                "segmentation": [[4, 4, 30, 4, 30, 30, 4, 30]],
            }
        )
    (coco / "annotations").mkdir()
    (coco / "annotations/instances_train2017.json").write_text(json.dumps(content))
    images, _ = open_clips(
        tmp_path,
        "--train-sets",
        f"coco2{target}_train",
        f"{name}_train",
        "--num-classes",
        str(CLASSES[name]),
        "--crop-short-sides",
    ).sources
    clips = [images[index] for index in range(len(images.videos))]
    found = {Path(clip.source.split(", ")[0]).stem: clip.labels.item() + 1 for clip in clips}
    assert found == COCO_TABLES[target]


@pytest.mark.parametrize("name", DIFFERENT.values())
def test_every_source_of_a_recipe_is_augmented_as_officially(name, data_sets):
    official = OFFICIAL["common"] | OFFICIAL["recipes"][RECIPES[name][0]]
    clips = datasets.open_clips(parse_arguments(["--recipe", name, "--data-root", str(data_sets)]))
    *images, videos = getattr(clips, "sources", [clips])
    common = dict(
        max_long_side=official["max_long_side"],
        crop_short_sides=(400, 500, 600) if official["crop"] else (),
        flip=True,
        lsj_size=official["lsj_image_size"] if official["lsj"] else 0,
    )
    assert videos.augmentation == Augmentation(
        tuple(official["short_sides"]),
        crop_size=tuple(official["crop_size"]),
        rotation=0.0,
        crop_relative=official["crop_type"] == "relative_range",
        **common,
    )
    for source in images:
        assert source.augmentation == Augmentation(
            tuple(official["pseudo_short_sides"]),
            crop_size=tuple(official["pseudo_crop_size"]),
            rotation=15.0,
            **common,
        )
    assert len(images) == len(official["train_sets"]) - 1
    for source in (*images, videos):
        assert (source.frames, source.reach) == (official["frames"], official["frame_range"])


def test_sources_are_mixed_by_ratio(data_sets):
    """1 : 0.25, as the recipe says; a clip's source depends on its number alone."""
    mixed = open_clips(data_sets)
    assert mixed.shares.tolist() == [0.8, 0.2]
    drawn = [
        numpy.random.default_rng((mixed.seed, 2, index)).choice(2, p=mixed.shares)
        for index in range(2000)
    ]
    assert abs(numpy.mean(drawn) - 0.2) < 0.03
    for index in (drawn.index(0), drawn.index(1)):
        assert torch.equal(mixed[index].frames, mixed.sources[drawn[index]][index].frames)
    with pytest.raises(InputError, match="one share for each of the 2 sets"):
        open_clips(data_sets, "--train-ratio", "1")


@pytest.mark.slow
def test_another_seed_mixes_otherwise(data_sets):
    def drawn(seed):
        clips = open_clips(data_sets, "--seed", str(seed), "--train-ratio", "1", "1")
        return [
            Path(clips[index].source.split(", ")[0]).is_relative_to(data_sets / "coco")
            for index in range(40)
        ]

    assert drawn(3) == drawn(3) != drawn(4)


def test_images_as_the_target_are_refused(data_sets):
    for names in (["ovis_train", "coco2ovis_train"], ["coco2ovis_train"]):
        with pytest.raises(
            InputError, match="the last must be the data set whose classes are trained"
        ):
            open_clips(data_sets, "--train-sets", *names)


def test_a_target_without_the_mapped_classes_is_refused(tmp_path):
    make_videos(tmp_path / "ovis", LAYOUTS["flat"], 23)
    (tmp_path / "coco").mkdir()
    make_coco(tmp_path / "coco")
    with pytest.raises(InputError, match=r"lacks categories that COCO's are mapped to: \[24, 25\]"):
        open_clips(tmp_path, "--num-classes", "23")


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("annotations", [], "has no annotations"),
        (
            "categories",
            [{"id": number, "name": f"other {number}"} for number in (1, 2, 3)],
            "has other categories than the training clips",
        ),
    ],
)
def test_a_held_out_set_that_cannot_be_scored_is_refused(tmp_path, key, value, expected):
    """Before the first step, not at the first evaluation."""
    make_videos(tmp_path, ("train.json", "train/JPEGImages"), 3)
    content = make_videos(tmp_path, ("valid.json", "valid/JPEGImages"), 3)
    (tmp_path / "valid.json").write_text(json.dumps(content | {key: value}))
    arguments = ["--data-root", str(tmp_path), "--output", str(tmp_path / "run"), *SMALL]
    with pytest.raises(InputError, match=f"--evaluate-every: .*valid.json {expected}"):
        train.main(parse_arguments([*arguments, "--evaluate-every", "9"]))
    assert not (tmp_path / "run").exists()


def test_evaluation_of_a_single_annotation_file_is_refused(tmp_path):
    make_videos(tmp_path, ("train.json", "train/JPEGImages"), 3)
    with pytest.raises(InputError, match="--evaluate-every with --train-json needs --valid-json"):
        train.main(
            parse_arguments(
                [
                    "--train-json",
                    str(tmp_path / "train.json"),
                    "--train-images",
                    str(tmp_path / "train/JPEGImages"),
                    "--output",
                    str(tmp_path / "run"),
                    *SMALL,
                    "--evaluate-every",
                    "1",
                ]
            )
        )


def test_other_classes_than_expected_are_refused(data_sets):
    with pytest.raises(InputError, match="25 categories, not 40"):
        open_clips(data_sets, "--num-classes", "40")


# ---- Broken data ---------------------------------------------------------------------------------
# -------------------


@pytest.fixture
def broken(tmp_path):
    """Seven videos: one without a folder, one corrupt frame, one annotation too short, one of an
    unknown category.
    """
    content = make_videos(tmp_path, ("train.json", "train/JPEGImages"), 7, videos=7)
    shutil.rmtree(tmp_path / "train/JPEGImages/video1")
    for frame in (tmp_path / "train/JPEGImages/video2").iterdir():
        frame.write_bytes(frame.read_bytes()[:200])
    content["annotations"][2]["segmentations"].pop()
    content["annotations"][3]["category_id"] = 77
    (tmp_path / "train.json").write_text(json.dumps(content))
    return tmp_path, content


def test_broken_data_is_told_by_name(broken):
    root, content = broken
    told = [
        "frame .*video1/00000.jpg of video 1 is missing",
        "annotation 3 .* has 2 segmentations, its video has 3 frames",
    ]
    for sentence in told:
        with pytest.raises(InputError, match=sentence):
            VideoSet(root / "train.json", root / "train/JPEGImages")
        for key in ("videos", "annotations"):  # fixed: the next error is reported
            wrong = 1 if "video1" in sentence else 3
            content[key] = [entry for entry in content[key] if entry["id"] != wrong]
        (root / "train.json").write_text(json.dumps(content))
    clips = datasets.open_clips(parse_arguments(["--data-root", str(root), *SMALL]))
    assert clips.skipped.sentences() == [
        "annotations of categories that do not exist: 1; the first: annotation 4 of "
        f"{root / 'train.json'}, of category 77"
    ]
    with pytest.raises(InputError, match="video2/.* cannot be read"):
        [clips[index] for index in range(8)]


@pytest.mark.slow
def test_skip_bad_goes_on_and_counts(broken, tmp_path_factory, capsys):
    root, _ = broken
    output = tmp_path_factory.mktemp("run")
    train.main(
        parse_arguments(
            [
                "--data-root",
                str(root),
                "--output",
                str(output),
                "--skip-bad",
                *SMALL,
                "--iterations",
                "4",
                "--log-every",
                "4",
            ]
        )
    )
    counted = json.loads((output / "log.jsonl").read_text().splitlines()[-1])["skipped"]
    printed = capsys.readouterr().out
    # Three when opened; 4 clips of 4 videos, each seen once.
    assert printed.count("skipped: ") == counted >= 3 + 1
    for reason in (
        "videos that cannot be used: 1; the first: frame ",
        "annotations that cannot be used: 1; the first: annotation 3 ",
        "annotations of categories that do not exist: 1; the first: annotation 4 ",
    ):
        assert f"skipped: {reason}" in printed
    assert "video2/" in printed and f"skipped {counted} bad" in printed


def test_a_stage_counts_more_than_that_of_the_recipe():
    assert parse_arguments(["--recipe", "grattvis/ovis/r50", "--stage", "genvis"]).stage == "genvis"


def test_rendered_clips_have_the_seed_and_the_suites_in_turn():
    arguments = ["--render", "easy", "occlusion", "--frames", "2", "--short-sides", "48"]
    first, second = (
        datasets.open_clips(parse_arguments([*arguments, "--seed", seed])) for seed in ("5", "6")
    )
    assert not torch.equal(first[0].frames, second[0].frames)
    assert [first[number].source.split()[-1] for number in range(4)] == ["easy", "occlusion"] * 2


def test_a_new_option_is_one_argument_and_one_flag(monkeypatch):
    """Of the model, the losses or the augmentation: float, bool and int; checkpoints accept it."""

    def with_option(component, **option):
        create = component.__init__

        def __init__(self, *arguments, **options):
            self.option = {name: options.pop(name, value) for name, value in option.items()}
            create(self, *arguments, **options)

        signature = inspect.signature(create)
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value)
            for name, value in option.items()
        ]
        __init__.__signature__ = signature.replace(
            parameters=[*signature.parameters.values(), *added]
        )
        types = {name: type(value) for name, value in option.items()}
        __init__.__annotations__ = create.__annotations__ | types
        monkeypatch.setattr(component, "__init__", __init__)

    with_option(Tracker, momentum=0.9, second_gate=False, extra_layers=2)
    with_option(Criterion, consistency_weight=0.0)
    args = train.parse_arguments([])
    args.momentum, args.second_gate, args.extra_layers, args.consistency_weight = 0.5, True, 3, 2.0
    model, config = train.make_model(args, [(1, "cell")], None, print)
    given = {"momentum": 0.5, "second_gate": True, "extra_layers": 3}
    assert model.tracker.option == given and given.items() <= config["model_options"].items()
    assert read_config({"config": config}, "last.pt") == config
    assert train.make_criterion(args, 1).option == {"consistency_weight": 2.0}
    args.momentum = float("nan")  # refused before training, not after
    with pytest.raises(InputError, match="momentum is nan, not a finite number"):
        train.make_model(args, [(1, "cell")], None, print)


@pytest.mark.parametrize("amp, expected", [("auto", True), ("bf16", True), ("off", False)])
def test_the_official_name_of_mixed_precision(amp, expected):
    assert official_setting(parse_arguments(["--amp", amp]))["amp"] is expected


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "log.jsonl", "args.json"])
def test_a_folder_with_any_file_of_a_run_is_refused(tmp_path, name):
    check_folder(None, tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(InputError, match="choose another --output"):
        check_folder(None, tmp_path)


def test_the_smallest_values_of_flags():
    """A window of 0 frames is the whole clip, a seed of -1 a random one."""
    args = parse_arguments(["--window", "0", "--seed", "-1", "--workers", "0", "--iterations", "0"])
    assert (args.window, args.seed, args.workers, args.iterations) == (0, -1, 0, 0)
