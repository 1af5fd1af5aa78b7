"""Where the files of data sets lie on disk, and what official data sets are called.

    find_split("datasets/ovis", "train")              # annotation file, folder of frames
    find_named_set("datasets", "coco2ovis_train")     # and the category map of pseudo videos

The category maps are those of upstream's convert_coco2ytvis.py.
"""

from pathlib import Path

from runtime.errors import InputError
from runtime.files import first_existing

JSON_PATHS = (
    "{}.json",
    "{}/instances.json",
    "instances_{}.json",
    "annotations_{}.json",
    "annotations/{}.json",
    "annotations/annotations_{}.json",
    "annotations/instances_{}.json",
)
FRAMES_PATHS = ("{}/JPEGImages", "JPEGImages/{}", "{}")


def find_split(root: str | Path, split: str) -> tuple[Path, Path]:
    """The annotation file and the folder of frames of a split, in any common directory layout.

    Raises InputError naming every path tried.
    """
    root = Path(root)
    names = ("valid", "val") if split in ("valid", "val") else (split,)
    jsons = [root / path.format(name) for name in names for path in JSON_PATHS]
    folders = [root / path.format(name) for name in names for path in FRAMES_PATHS]
    folders.append(root / "JPEGImages")
    return first_existing("annotation file", jsons), first_existing("folder of frames", folders)


# Category ids of COCO -> category ids of a data set of videos. Other COCO categories are dropped.
# fmt: off
COCO_MAPS = {
    "ovis": {
        1: 1, 2: 21, 3: 25, 4: 22, 5: 23, 6: 25, 8: 25, 9: 24, 17: 3, 18: 4, 19: 5, 20: 6,
        21: 7, 22: 8, 23: 9, 24: 10, 25: 11,
    },
    "ytvis2019": {
        1: 1, 2: 21, 3: 6, 4: 21, 5: 28, 7: 17, 8: 29, 9: 34, 17: 14, 18: 8, 19: 18, 21: 15,
        22: 32, 23: 20, 24: 30, 25: 22, 35: 33, 36: 33, 41: 5, 42: 27, 43: 40,
    },
    "ytvis2021": {
        1: 26, 2: 23, 3: 5, 4: 23, 5: 1, 7: 36, 8: 37, 9: 4, 16: 3, 17: 6, 18: 9, 19: 19,
        21: 7, 22: 12, 23: 2, 24: 40, 25: 18, 34: 14, 35: 31, 36: 31, 41: 29, 42: 33, 43:
        34,
    },
}
# fmt: on
VIDEO_SETS = ("ovis", "ytvis_2019", "ytvis_2021", "ytvis_2022")


def find_named_set(root: str | Path, name: str) -> tuple[Path, Path, dict[int, int] | None]:
    """A data set by its official name, in the layout of detectron2's datasets folder.

    Names are ovis_train, ytvis_2021_val, coco_2017_train, and coco2ovis_train for pseudo videos.
    Returns the annotation file, the folder of frames, and the category map of pseudo videos.
    Raises InputError naming every path tried.
    """
    data_set, _, split = name.rpartition("_")
    if data_set in VIDEO_SETS:
        return *find_split(Path(root) / data_set, split), None
    target = data_set.removeprefix("coco2") if data_set.startswith("coco2") else ""
    if data_set != "coco_2017" and target not in COCO_MAPS:
        pseudo = ", ".join(f"coco2{target}_train" for target in COCO_MAPS)
        raise InputError(
            f"no data set is called {name}: {', '.join(VIDEO_SETS)} and coco_2017 "
            f"with _train or _val are, and {pseudo}"
        )
    coco = Path(root) / "coco"
    jsons = [
        coco / "annotations" / f"instances_{split}2017.json",
        coco / f"instances_{split}2017.json",
    ]
    if target:  # the output of upstream's conversion script, which lacks some annotations
        jsons.append(coco / "annotations" / f"{name}.json")
    folders = [coco / f"{split}2017", coco / "images" / f"{split}2017"]
    return (
        first_existing("annotation file", jsons),
        first_existing("folder of images", folders),
        COCO_MAPS.get(target),
    )
