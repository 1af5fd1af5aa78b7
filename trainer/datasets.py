"""The training clips that the command line asks for.

One data set, several named ones in given ratios, or scenes that are rendered on the fly. Upstream:
vita/data/combined_loader.py for the ratios.
"""

import argparse

from augmentation import Augmentation
from clips import ClipDataset, MixedClips
from data import VideoSet
from reading.ids import id_key
from reading.layouts import find_named_set, find_split
from runtime.errors import InputError
from runtime.flags import flags_named
from synthetic.clips import RenderedClips


def open_clips(args: argparse.Namespace) -> ClipDataset | MixedClips | RenderedClips:
    """The training clips: of one data set, of several named data sets, or of rendered scenes."""
    if args.render:
        clips = RenderedClips(
            args.render, args.frames, args.reach, make_augmentation(args, pseudo=False), args.seed
        )
        check_num_classes(args, "--render", clips.categories)
        return clips
    if args.train_json:
        target = VideoSet(args.train_json, args.train_images, args.skip_bad)
    elif args.train_sets:
        return open_named_sets(args)
    else:
        target = VideoSet(*find_split(args.data_root, "train"), args.skip_bad)
    check_num_classes(args, target.path, target.categories)
    return make_clips(args, target)


def open_named_sets(args: argparse.Namespace) -> ClipDataset | MixedClips:
    """The clips of --train-sets. The classes are those of the last one, the target."""
    *others, last = [find_named_set(args.data_root, name) for name in args.train_sets]
    json_path, frames, category_map = last
    if category_map:
        raise InputError(
            f"--train-sets {' '.join(args.train_sets)}: the last must be the data set "
            "whose classes are trained"
        )
    target = VideoSet(json_path, frames, args.skip_bad)
    known = {id_key(category_id) for category_id, _ in target.categories}
    for _, _, category_map in others:
        unknown = set((category_map or {}).values()) - known
        if unknown:
            raise InputError(
                f"{target.path} lacks categories that COCO's are mapped to: {sorted(unknown)}"
            )
    sources = [
        VideoSet(
            json_path,
            frames,
            args.skip_bad,
            category_map,
            target.categories if category_map else None,
        )
        for json_path, frames, category_map in others
    ]
    check_num_classes(args, target.path, target.categories)
    if not sources:
        return make_clips(args, target)
    if len(args.train_ratio or []) != len(args.train_sets):
        raise InputError(
            f"--train-ratio must give one share for each of the {len(args.train_sets)} sets"
        )
    clips = [make_clips(args, videos) for videos in [*sources, target]]
    return MixedClips(clips, args.train_ratio, args.seed)


def make_clips(args: argparse.Namespace, videos: VideoSet) -> ClipDataset:
    """The clips of one data set; pseudo videos have an augmentation of their own."""
    augmentation = make_augmentation(args, pseudo=videos.category_map is not None)
    return ClipDataset(videos, args.frames, args.reach, augmentation, args.seed, args.skip_bad)


def make_augmentation(args: argparse.Namespace, pseudo: bool) -> Augmentation:
    """The augmentation of videos, or of pseudo videos.

    Flags with the name of a field of Augmentation are its values, with these exceptions: pseudo
    videos have short sides and crops of their own, videos are not rotated, and only --lsj turns
    large-scale jitter on.
    """
    options = flags_named(Augmentation.__annotations__, args)
    if pseudo:
        options["short_sides"] = tuple(args.pseudo_short_sides)
        options["crop_size"] = tuple(args.pseudo_crop_size)
        options["crop_relative"] = False
    else:
        options["rotation"] = 0.0
    if not args.lsj:
        options["lsj_size"] = 0
    return Augmentation(**options)


def check_num_classes(args: argparse.Namespace, source, categories: list) -> None:
    """InputError if --num-classes is given and differs."""
    if args.num_classes not in (None, len(categories)):
        raise InputError(
            f"{source} has {len(categories)} categories, not {args.num_classes}: give "
            f"--num-classes {len(categories)} (recipes set the number of their data set)"
        )


def clip_bytes(args: argparse.Namespace, world: int) -> int:
    """Approximate size of one process's clips of a step: frames and masks of 10 instances."""
    short_side = max(args.short_sides + args.pseudo_short_sides)
    long_side = min(args.max_long_side, short_side * 16 // 9)
    pixels = args.lsj_size**2 if args.lsj else short_side * long_side
    return args.batch // world * args.frames * pixels * (3 + 10)
