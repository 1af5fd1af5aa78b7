"""Where the files of data sets lie on disk, and what official data sets are called.

    find_split("datasets/ovis", "train")              # annotation file, folder of frames
    find_ground_truth("datasets/ovis/valid.json")     # files with the annotations of that split
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
# Annotations of a split whose own file has none, as validation sets are published.
GROUND_TRUTH_NAMES = ("{}_gt.json", "{}GT.json", "gt.json")
SHORT_AND_LONG = ("gt_short.json", "gt_long.json")  # of YouTube-VIS 2022
GROUND_TRUTH_HELP = (
    "to score it here, pass annotations with --annotations, or put them beside the annotation file "
    f"of the split, as {', '.join(GROUND_TRUTH_NAMES[:2]).format('valid', 'valid')} or gt.json"
)


def find_split(root: str | Path, split: str) -> tuple[Path, Path]:
    """The annotation file and the folder of frames of a split, in any common directory layout.

    Raises InputError naming every path tried.
    """
    root = Path(root)
    names = split_names(split)
    jsons = [root / path.format(name) for name in names for path in JSON_PATHS]
    folders = [root / path.format(name) for name in names for path in FRAMES_PATHS]
    folders.append(root / "JPEGImages")
    return first_existing("annotation file", jsons), first_existing("folder of frames", folders)


def split_names(split: str) -> tuple[str, ...]:
    """The names of a split on disk."""
    return ("valid", "val") if split in ("valid", "val") else (split,)


def find_ground_truth(
    annotations: Path, root: str | Path | None = None, split: str = "valid"
) -> list[list[Path]]:
    """Files that may hold the annotations of a split whose own file has none.

    They are searched beside that file and, with --data-root, in the root and the folder of the
    split. The two parts of YouTube-VIS 2022 count if both exist.

    Returns existing files, each alternative a list of parts, the likeliest first.
    """
    folders = [annotations.parent]
    names = [annotations.stem]
    if root is not None:
        folders += [Path(root), *(Path(root) / name for name in split_names(split))]
        names += split_names(split)
    alternatives = [[folder / name for name in SHORT_AND_LONG] for folder in folders]
    for folder in folders:
        files = [folder / path.format(name) for path in GROUND_TRUTH_NAMES for name in names]
        alternatives += [[file] for file in files]
    unique = {tuple(parts): parts for parts in alternatives}
    return [parts for parts in unique.values() if all(part.is_file() for part in parts)]


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
