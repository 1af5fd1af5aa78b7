"""What a training run is: the command line, the stages, the official settings by name, and the data that these name.

    python train.py --recipe grattvis/ovis/r50 --dry-run        # print the setting as JSON, under the official names
    python train.py --recipe grattvis/ovis/r50 --batch 4        # every flag overrides the recipe's

A recipe is a stage and what differs from the stage's defaults. Paper: GRAtt-VIS (arXiv 2305.17096), implementation details, and
VITA (2206.04403) for the stages before. Upstream: configs/grattvis, configs/vita, vita/config.py, vita/data/datasets/builtin.py.
"""
import argparse
import inspect
import os
from pathlib import Path

from augmentation import JITTER, Augmentation
from backbone import SwinBackbone
from batching import SIZE_DIVISOR
from clips import ClipDataset, MixedClips, RenderedClips
from data import VideoSet, find_split
from detector import TRACKED_LAYERS
from losses import GATE_LOSSES, SIMILARITY_SPANS, Criterion
from model import PIXEL_MEAN, PIXEL_STD, PRESETS, TEST_SIDES, GRAttVIS
from reading.ids import id_key
from runtime.errors import InputError
from runtime.files import first_existing
from synthetic.suites import SUITES
from tracker import GATE_MASKS, PROPAGATIONS

# What a stage trains: a detector on single images, VITA on videos, GenVIS, GRAtt-VIS.
STAGES = {
    "detector": dict(propagation="clip", window=0, frames=1),
    "vita": dict(propagation="clip", window=6),
    "genvis": dict(propagation="memory", window=0, freeze_detector=True),
    "grattvis": dict(propagation="gated", window=0, freeze_detector=True),
}

# Of all recipes, and of those on videos and on images.
ALL = dict(points=12544, clip_gradient=0.01, backbone_lr_factor=0.1, weight_decay=0.05, warmup=10, warmup_start=1.0, lr_gamma=0.1,
           save_every=5000, seed=-1, crop_size=(384, 600), pseudo_crop_size=(384, 600), rotation=15.0)
SIDES = (288, 320, 352, 384, 416, 448, 480, 512)
VIDEO = ALL | dict(batch=8, lr=5e-5, short_sides=SIDES, pseudo_short_sides=SIDES, max_long_side=768,
                   crop_short_sides=(400, 500, 600), lsj=False, lsj_size=768)
COCO = ALL | dict(stage="detector", train_sets=("coco_2017_train",), train_ratio=(), test_sets=("coco_2017_val",), num_classes=80,
                  top_k=100, batch=16, lr=1e-4, reach=20, short_sides=(800,), max_long_side=1333,
                  pseudo_short_sides=tuple(range(480, 769, 32)), crop_short_sides=(), crop_relative=True, crop_size=(0.9, 0.9),
                  lsj=True, lsj_size=1024, test_short_side=800, clip_length=5, gate_weight=1.0)
VITA = VIDEO | dict(stage="vita", clip_length=5, gate_weight=1.0)
GRATTVIS = VIDEO | dict(stage="grattvis", frames=5, reach=6, clip_length=1, gate_weight=0.0)


def on(name: str, share: float, classes: int, top_k: int) -> dict:
    """The data of a recipe on videos: pseudo videos of COCO images, and real ones."""
    return dict(train_sets=(f"coco2{name.replace('_', '')}_train", f"{name}_train"), train_ratio=(1.0, share),
                test_sets=(f"{name}_val",), num_classes=classes, top_k=top_k)


OVIS, YTVIS_2019, YTVIS_2021 = (on("ovis", 0.25, 25, 20), on("ytvis_2019", 0.75, 40, 10), on("ytvis_2021", 0.75, 40, 10))
VITA_2021 = YTVIS_2021 | dict(train_ratio=(1.0, 0.8), iterations=187500, lr_steps=(100000,), frames=6, reach=8)
VITA_2019 = YTVIS_2019 | dict(iterations=140000, lr_steps=(75000,), frames=5, reach=20)
VITA_OVIS = OVIS | dict(iterations=150000, lr_steps=(50000, 125000), frames=6, reach=8)
MEMORY = dict(propagation="gated+memory")
R50, R101, SWIN_L = (dict(preset=preset, test_short_side=TEST_SIDES[preset]) for preset in ("r50", "r101", "swin_l"))
COCO_50 = COCO | dict(iterations=368750, lr_steps=(327778, 355092),
                      backbone_weights="detectron2://ImageNetPretrained/torchvision/R-50.pkl")
COCO_100 = COCO | dict(iterations=737500, lr_steps=(655556, 710184), backbone_weights="swin_large_patch4_window12_384_22k.pkl")

RECIPES = {  # our name: the official one, and the defaults of the command line that it sets
    "detector/coco/r50": ("vita/coco/vita_R50_bs16_50ep", R50 | COCO_50),
    "detector/coco/r101": ("vita/coco/vita_R101_bs16_50ep", R101 | COCO_50),
    "detector/coco/swin_l": ("vita/coco/vita_swin_large_IN21k_384_bs16_100ep_lsj", SWIN_L | COCO_100),
    "vita/ytvis_2019/r50": ("vita/youtubevis_2019/vita_R50_bs8", VITA | VITA_2019 | R50 | dict(init="vita_r50_coco.pth")),
    "vita/ytvis_2019/r101": ("vita/youtubevis_2019/vita_R101_bs8", VITA | VITA_2019 | R101 | dict(init="vita_r101_coco.pth")),
    "vita/ytvis_2019/swin_l": ("vita/youtubevis_2019/vita_SWIN_bs8", VITA | VITA_2019 | SWIN_L | dict(init="vita_swin_coco.pth")),
    "vita/ytvis_2021/r50": ("vita/youtubevis_2021/vita_R50_bs8", VITA | VITA_2021 | R50 | dict(init="vita_r50_coco.pth")),
    "vita/ytvis_2021/r101": ("vita/youtubevis_2021/vita_R101_bs8", VITA | VITA_2021 | R101 | dict(init="vita_r101_coco.pth")),
    "vita/ytvis_2021/swin_l": ("vita/youtubevis_2021/vita_SWIN_bs8", VITA | VITA_2021 | SWIN_L | dict(init="vita_swin_coco.pth")),
    "vita/ovis/r50": ("vita/ovis/vita_R50_bs8", VITA | VITA_OVIS | R50 | dict(init="vita_r50_coco.pth")),
    "vita/ovis/swin_l": ("vita/ovis/vita_SWIN_bs8", VITA | VITA_OVIS | SWIN_L | dict(init="vita_swin_coco.pth")),
    "grattvis/ytvis_2019/r50": ("grattvis/youtubevis_2019/grattvis_R50_bs8", GRATTVIS | YTVIS_2019 | R50 | MEMORY | dict(
        iterations=15000, lr_steps=(10000,), init="vita_r50_ytvis2019.pth")),
    "grattvis/ytvis_2019/swin_l": ("grattvis/youtubevis_2019/grattvis_SWIN_bs8", GRATTVIS | YTVIS_2019 | SWIN_L | MEMORY | dict(
        iterations=20000, lr_steps=(10000, 15000), init="vita_swin_ytvis2019.pth")),
    "grattvis/ytvis_2021/r50": ("grattvis/youtubevis_2021/grattvis_R50_bs8", GRATTVIS | YTVIS_2021 | R50 | MEMORY | dict(
        iterations=90000, lr_steps=(50000,), init="vita_r50_ytvis2021.pth")),
    "grattvis/ytvis_2021/swin_l": ("grattvis/youtubevis_2021/grattvis_SWIN_bs8", GRATTVIS | YTVIS_2021 | SWIN_L | MEMORY | dict(
        iterations=90000, lr_steps=(50000,), init="vita_swin_ytvis2021.pth")),
    "grattvis/ovis/r50": ("grattvis/ovis/grattvis_R50_bs8", GRATTVIS | OVIS | R50 | dict(
        iterations=140000, lr_steps=(100000,), init="vita_r50_ovis.pth")),
    "grattvis/ovis/swin_l": ("grattvis/ovis/grattvis_SWIN_bs8", GRATTVIS | OVIS | SWIN_L | MEMORY | dict(
        iterations=140000, lr_steps=(100000,), init="vita_swin_ovis.pth")),
}

# From the category ids of COCO to those of a data set of videos; other categories of COCO are left out.
COCO_MAPS = {
    "ovis": {1: 1, 2: 21, 3: 25, 4: 22, 5: 23, 6: 25, 8: 25, 9: 24, 17: 3, 18: 4, 19: 5, 20: 6, 21: 7, 22: 8, 23: 9, 24: 10, 25: 11},
    "ytvis2019": {1: 1, 2: 21, 3: 6, 4: 21, 5: 28, 7: 17, 8: 29, 9: 34, 17: 14, 18: 8, 19: 18, 21: 15, 22: 32, 23: 20, 24: 30,
                  25: 22, 35: 33, 36: 33, 41: 5, 42: 27, 43: 40},
    "ytvis2021": {1: 26, 2: 23, 3: 5, 4: 23, 5: 1, 7: 36, 8: 37, 9: 4, 16: 3, 17: 6, 18: 9, 19: 19, 21: 7, 22: 12, 23: 2, 24: 40,
                  25: 18, 34: 14, 35: 31, 36: 31, 41: 29, 42: 33, 43: 34},
}


def find_named_set(root: str | Path, name: str) -> tuple[Path, Path, dict[int, int] | None]:
    """Annotation file, folder of frames and category map (COCO as pseudo videos) of a set such as ovis_train, ytvis_2021_val,
    coco_2017_train, coco2ovis_train, in the layout of detectron2's datasets folder. InputError names every path tried."""
    folder, _, split = name.rpartition("_")
    target = folder.removeprefix("coco2") if folder.startswith("coco2") else ""
    if folder == "coco_2017" or target in COCO_MAPS:
        coco, category_map = Path(root) / "coco", COCO_MAPS.get(target)
        jsons = [coco / "annotations" / f"instances_{split}2017.json", coco / f"instances_{split}2017.json"]
        if category_map:                                           # converted by upstream's script: the same, some annotations less
            jsons.append(coco / "annotations" / f"{name}.json")
        return (first_existing("annotation file", jsons),
                first_existing("folder of images", [coco / f"{split}2017", coco / "images" / f"{split}2017"]), category_map)
    if folder not in ("ovis", "ytvis_2019", "ytvis_2021", "ytvis_2022"):
        raise InputError(f"no data set is called {name}: ovis, ytvis_2019, ytvis_2021, ytvis_2022 and coco_2017 with _train or _val "
                         f"are, and {', '.join(f'coco2{target}_train' for target in COCO_MAPS)}")
    return *find_split(Path(root) / folder, split), None


def open_clips(args: argparse.Namespace) -> ClipDataset | MixedClips | RenderedClips:
    """The training clips that the arguments describe: of one data set, of several by name, the last of which says the classes, or
    of scenes drawn on the fly."""
    def augmentation(pseudo: bool) -> Augmentation:
        return Augmentation(
            tuple(args.pseudo_short_sides if pseudo else args.short_sides), args.max_long_side, tuple(args.crop_short_sides),
            tuple(args.pseudo_crop_size if pseudo else args.crop_size), args.crop_relative and not pseudo, args.flip,
            args.rotation if pseudo else 0.0, args.lsj_size if args.lsj else 0)

    def clips(videos: VideoSet, pseudo: bool) -> ClipDataset:
        return ClipDataset(videos, args.frames, args.reach, augmentation(pseudo), args.seed, args.skip_bad)

    if args.render:
        rendered = RenderedClips(args.render, args.frames, args.reach, augmentation(pseudo=False), args.seed)
        if args.num_classes not in (None, len(rendered.categories)):
            raise InputError(f"the scenes of --render have {len(rendered.categories)} categories, not {args.num_classes}")
        return rendered
    if args.train_json or not args.train_sets:
        target = VideoSet(*((args.train_json, args.train_images) if args.train_json else find_split(args.data_root, "train")),
                          skip_bad=args.skip_bad)
        sources = []
    else:
        *others, own = [find_named_set(args.data_root, name) for name in args.train_sets]
        if own[2]:
            raise InputError(f"--train-sets {' '.join(args.train_sets)}: the last must be the data set whose classes are trained")
        target = VideoSet(*own[:2], skip_bad=args.skip_bad)
        known = {id_key(category_id) for category_id, _ in target.categories}
        for _, _, category_map in others:
            if category_map and not known >= set(category_map.values()):
                raise InputError(f"{target.path} lacks categories that COCO's are mapped to: "
                                 f"{sorted(set(category_map.values()) - known)}")
        sources = [VideoSet(json_path, frames, args.skip_bad, category_map, target.categories if category_map else None)
                   for json_path, frames, category_map in others]
    if args.num_classes not in (None, len(target.categories)):
        raise InputError(f"{target.path} has {len(target.categories)} categories, not {args.num_classes}")
    if not sources:
        return clips(target, pseudo=False)
    if len(args.train_ratio or []) != len(args.train_sets):
        raise InputError(f"--train-ratio must give one share for each of the {len(args.train_sets)} sets")
    return MixedClips([*(clips(videos, pseudo=videos.category_map is not None) for videos in sources), clips(target, pseudo=False)],
                      args.train_ratio, args.seed)


def open_held_out(args: argparse.Namespace, categories: list[tuple[int, str]]) -> VideoSet | None:
    """The videos of periodic evaluation, which must have annotations of these categories; None without --evaluate-every."""
    if not args.evaluate_every:
        return None
    if args.train_json:
        raise InputError("--evaluate-every needs --data-root or --test-sets")
    found = find_named_set(args.data_root, args.test_sets[0])[:2] if args.test_sets else find_split(args.data_root, "valid")
    videos = VideoSet(*found, skip_bad=args.skip_bad)
    if not videos.ground_truth["annotations"]:
        raise InputError(f"--evaluate-every: {videos.path} has no annotations")
    if [name for _, name in videos.categories] != [name for _, name in categories]:
        raise InputError(f"--evaluate-every: {videos.path} has other categories than the training clips")
    return videos


def clip_bytes(args: argparse.Namespace, world: int) -> int:
    """About how many bytes a process's clips of one step take: frames, and masks of 10 instances."""
    short_side = max(args.short_sides + args.pseudo_short_sides)
    long_side = min(args.max_long_side, short_side * 16 // 9)
    pixels = args.lsj_size ** 2 if args.lsj else short_side * long_side
    return args.batch // world * args.frames * pixels * (3 + 10)


def at_least(minimum: int):
    """An argparse type: a whole number that is not smaller."""
    def whole_number(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return int(text)
    return whole_number


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line: its own defaults train the toy preset on the synthetic set; a stage and a recipe set others."""
    parser = argparse.ArgumentParser(description="Train on clips of videos. The defaults are the toy job; --recipe sets an official one.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch = argparse.BooleanOptionalAction
    setting = parser.add_argument_group("setting")
    setting.add_argument("--recipe", choices=RECIPES, metavar="NAME", help="an official setting: " + ", ".join(RECIPES))
    setting.add_argument("--stage", choices=STAGES, help="what is trained; sets propagation, window, freezing")
    setting.add_argument("--dry-run", action="store_true", help="print the setting as JSON and stop")
    model = parser.add_argument_group("model")
    model.add_argument("--preset", default="toy", choices=PRESETS, help="model size")
    model.add_argument("--propagation", default="gated", choices=PROPAGATIONS, help="what is carried from clip to clip")
    model.add_argument("--gate-mask", default="additive", choices=GATE_MASKS, help="as released, or as in the paper")
    model.add_argument("--norm", choices=("frozen", "batch", "group"),
                       help="of a ResNet; frozen suits pretrained weights, group training from scratch (default: the preset's)")
    model.add_argument("--window", type=at_least(0), help="frames that VITA's encoder reads together; 0 = all")
    model.add_argument("--clip-length", type=at_least(1), default=1, help="frames the tracker reads at once")
    weights = parser.add_argument_group("weights")
    weights.add_argument("--init", metavar="FILE", help="start from a checkpoint, ours or official; what it lacks starts anew")
    weights.add_argument("--reset-classes", action=switch, default=False,
                         help="with --init: class layers of another class count start anew (a recipe does)")
    weights.add_argument("--backbone-weights", metavar="FILE", help='local file, or "imagenet" for torchvision\'s own')
    weights.add_argument("--freeze-detector", action=switch, default=False, help="train the tracker alone")
    weights.add_argument("--resume", metavar="FILE", help="go on with this checkpoint of an interrupted run; auto = last.pt of "
                         "--output where there is one, else start: for torchrun --max-restarts and queues that start a job again")
    data = parser.add_argument_group("data")
    data.add_argument("--data-root", help="data set with a train split (default: datasets/synthetic); with --train-sets: the folder "
                      "that holds ovis, coco and so on (default: $DETECTRON2_DATASETS, else datasets)")
    data.add_argument("--train-json", help="instead of --data-root: the annotation file")
    data.add_argument("--train-images", help="with --train-json: the folder that its file names are relative to")
    data.add_argument("--train-sets", nargs="+", metavar="NAME", help="sets by name, the target last, such as coco2ovis_train ovis_train")
    data.add_argument("--train-ratio", type=float, nargs="*", metavar="SHARE", help="with several --train-sets: how often each is drawn")
    data.add_argument("--test-sets", nargs="+", metavar="NAME", help="with --train-sets: to evaluate on")
    data.add_argument("--render", nargs="+", choices=SUITES, metavar="SUITE", help="train on scenes drawn on the fly, of these suites "
                      f"in turn, instead of a data set's: {', '.join(SUITES)}")
    data.add_argument("--num-classes", type=at_least(1), help="refuse a data set of another number")
    data.add_argument("--skip-bad", action=switch, default=False, help="leave out what cannot be read, say and count it")
    data.add_argument("--frames", type=at_least(1), default=3, help="frames a clip")
    data.add_argument("--reach", type=at_least(1), default=6, help="largest distance of a clip's frames from its first choice, in frames")
    data.add_argument("--workers", type=at_least(0), help="loader processes per GPU; 0 = load in "
                      "the training process (default: 2, for a recipe 4, fewer where shared memory "
                      "is small)")
    change = parser.add_argument_group("augmentation")
    change.add_argument("--short-sides", type=at_least(1), nargs="+", default=[80, 96], help="of a clip, drawn from these, pixels")
    change.add_argument("--pseudo-short-sides", type=at_least(1), nargs="+", help="the same of a pseudo video (default: --short-sides)")
    change.add_argument("--max-long-side", type=at_least(1), default=768, help="pixels")
    change.add_argument("--crop-short-sides", type=at_least(1), nargs="*", default=[], help="before a crop, pixels; none = no crop")
    change.add_argument("--crop-size", type=float, nargs=2, default=[384, 600], help="smallest and largest side of a crop, pixels")
    change.add_argument("--crop-relative", action=switch, default=False, help="--crop-size is the smallest share of height, width")
    change.add_argument("--pseudo-crop-size", type=float, nargs=2, default=[384, 600], help="--crop-size of a pseudo video, pixels")
    change.add_argument("--flip", action=switch, default=True, help="mirror half of the clips")
    change.add_argument("--rotation", type=float, default=0.0, help="of a pseudo video: largest angle, which drifts, degrees")
    change.add_argument("--lsj", action=switch, default=False, help="large-scale jitter instead of crop and resize")
    change.add_argument("--lsj-size", type=at_least(1), default=1024, help="side of its square, pixels")
    loss = parser.add_argument_group("loss")
    loss.add_argument("--points", type=at_least(4), default=512, help="points a mask (official: 12544)")
    loss.add_argument("--no-object-weight", type=float, default=0.1)
    loss.add_argument("--similarity-weight", type=float, default=0.5)
    loss.add_argument("--similarity-span", default="clip", choices=SIMILARITY_SPANS, help="what the similarity loss compares: queries of "
                      "a clip and its frames, as in VITA, or of all clips of the video, as the contrast of CTVIS does")
    loss.add_argument("--query-noise", type=float, default=0.0, help="share of the carried queries that are mixed with another one (DVIS)")
    loss.add_argument("--gate-weight", type=float, default=0.0, help="0 = no gate loss, as in all official recipes of GRAtt-VIS")
    loss.add_argument("--gate-loss", default="logits", choices=GATE_LOSSES, help="released = the official double sigmoid")
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--iterations", type=at_least(0), default=500)
    optimisation.add_argument("--batch", type=at_least(1), default=4, help="clips a step, over all GPUs together")
    optimisation.add_argument("--accumulate", type=at_least(1), default=1,
                              help="parts that a process's share of a step is computed in, one after another, to save memory")
    optimisation.add_argument("--lr", type=float, default=1e-3, help="learning rate (official: 5e-5 for 8 clips)")
    optimisation.add_argument("--lr-steps", type=at_least(0), nargs="*", default=[420],
                              help="iterations at which it is multiplied by --lr-gamma")
    optimisation.add_argument("--lr-gamma", type=float, default=0.1)
    optimisation.add_argument("--warmup", type=at_least(0), default=50, help="iterations of linear warm-up; 0 = none")
    optimisation.add_argument("--warmup-start", type=float, default=0.0, help="share of the rate that it starts from")
    optimisation.add_argument("--backbone-lr-factor", type=float, default=1.0, help="official: 0.1, from pretrained weights")
    optimisation.add_argument("--weight-decay", type=float, default=0.05, help="not of norms, embeddings and position tables")
    optimisation.add_argument("--clip-gradient", type=float, default=0.1, help="global norm (official: 0.01); 0 = no clipping")
    optimisation.add_argument("--skip-nonfinite", type=at_least(0), default=0, metavar="N", help="leave out up to N steps in a row whose "
                              "losses or gradients are not finite, instead of stopping at the first")
    optimisation.add_argument("--ema", type=float, default=0.0, help="decay of averaged weights, which are then evaluated; 0 = none")
    optimisation.add_argument("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"),
                              help="auto = bf16 on a GPU that has it, fp16 on another, off on a CPU")
    optimisation.add_argument("--recompute", default="off", choices=("off", "decoder", "all"), help="make again in backward what the pixel "
                              "decoder, or half of a ResNet too, would keep for it: less memory, more time")
    optimisation.add_argument("--compile", default="off", choices=("off", "tracker", "all"), help="compile the tracker, or the detector "
                              "too: anew for every size of frames, so for data of few sizes; results differ by rounding")
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--evaluate-every", type=at_least(0), default=0, help="iterations between evaluations; 0 = never")
    evaluation.add_argument("--test-short-side", type=at_least(1), default=96, help="pixels")
    evaluation.add_argument("--test-max-long-side", type=at_least(1), default=1333, help="pixels")
    evaluation.add_argument("--top-k", type=at_least(1), default=10, help="instances a video")
    run = parser.add_argument_group("run")
    run.add_argument("--output", help="folder of the run (default: runs/ and the recipe's name, or runs/toy)")
    run.add_argument("--seed", type=at_least(-1), default=0, help="-1 = any, drawn when the run starts")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda")
    run.add_argument("--deterministic", action=switch, default=False, help="the same losses to the last bit in every run, on a GPU too "
                     "(a CPU's always are): slower")
    run.add_argument("--log-every", type=at_least(1), default=20, help="iterations between lines of log.jsonl")
    run.add_argument("--save-every", type=at_least(1), default=500, help="iterations between checkpoints")

    first, _ = parser.parse_known_args(arguments)
    recipe = dict(RECIPES[first.recipe][1]) if first.recipe else {}
    stage = first.stage or recipe.get("stage")
    known = {action.dest for action in parser._actions}
    defaults = (STAGES[stage] if stage else {}) | recipe | ({"reset_classes": True} if first.recipe else {})
    assert defaults.keys() <= known, defaults.keys() - known
    parser.set_defaults(**{name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()})
    args = parser.parse_args(arguments)
    args.stage = stage
    args.output = args.output or f"runs/{(args.recipe or 'toy').replace('/', '_')}"
    if args.data_root is None:
        args.data_root = os.environ.get("DETECTRON2_DATASETS", "datasets") if args.train_sets else "datasets/synthetic"
    args.pseudo_short_sides = args.pseudo_short_sides or args.short_sides
    return args


def official_setting(args: argparse.Namespace) -> dict:
    """What a run will do, under the names of the official configuration's fields: a recipe's own values for a recipe."""
    def default(function, name: str):
        return inspect.signature(function).parameters[name].default

    sizes = {name: PRESETS[args.preset].get(name, default(GRAttVIS, name))
             for name in ("queries", "frame_queries", "tracker_encoder_layers", "tracker_decoder_layers")}
    by_clip = args.frames > 1                                      # of one frame, there is nothing to share
    return {
        "iterations": args.iterations, "lr_steps": args.lr_steps, "lr": args.lr, "batch_videos": args.batch,
        "train_sets": args.train_sets or [], "train_ratio": args.train_ratio or [], "test_sets": args.test_sets or [],
        "frames": args.frames, "frame_range": args.reach, "short_sides": args.short_sides,
        "short_side_sampling": "choice_by_clip" if by_clip else "choice", "max_long_side": args.max_long_side,
        "crop": bool(args.crop_short_sides), "crop_type": "relative_range" if args.crop_relative else "absolute_range",
        "crop_size": args.crop_size, "pseudo_short_sides": args.pseudo_short_sides,
        "flip": ("flip_by_clip" if by_clip else "horizontal") if args.flip else "none",
        "lsj": args.lsj, "lsj_image_size": args.lsj_size, "test_short_side": args.test_short_side, "top_k": args.top_k,
        "num_classes": args.num_classes, "frame_queries": sizes["frame_queries"], "gate_weight": args.gate_weight,
        "freeze_detector": args.freeze_detector, "enc_window": args.window, "clip_len": args.clip_length,
        "use_mem": "memory" in args.propagation, "gated": "gated" in args.propagation, "init": args.init or args.backbone_weights,
        "meta": "Vita" if args.propagation == "clip" else "Grattvis" if "gated" in args.propagation else "Genvis",
        "gamma": args.lr_gamma, "warmup_iters": args.warmup, "warmup_factor": args.warmup_start, "weight_decay": args.weight_decay,
        "weight_decay_norm": 0.0, "weight_decay_embed": 0.0, "backbone_lr_multiplier": args.backbone_lr_factor,
        "clip_grad_norm": args.clip_gradient, "amp": args.amp != "off", "scheduler": "WarmupMultiStepLR", "shuffle": False,
        "augmentations": [], "pseudo_augmentations": ["rotation"] if args.rotation else [],
        "pseudo_crop_size": args.pseudo_crop_size, "lsj_scale": JITTER[0], "test_max_long_side": args.test_max_long_side,
        "clip_queries": sizes["queries"], "no_object_weight": args.no_object_weight, "vita_no_object_weight": args.no_object_weight,
        "class_weight": default(Criterion, "class_weight"), "mask_weight": default(Criterion, "mask_weight"),
        "dice_weight": default(Criterion, "dice_weight"), "sim_weight": args.similarity_weight, "num_points": args.points,
        "oversample": default(Criterion, "oversample"), "importance": default(Criterion, "importance"),
        "enc_layers": sizes["tracker_encoder_layers"], "dec_layers": sizes["tracker_decoder_layers"],
        "frame_layers_used": TRACKED_LAYERS, "drop_path": default(SwinBackbone, "drop_path"),
        "checkpoint_period": args.save_every, "filter_empty": True, "seed": args.seed, "size_divisibility": SIZE_DIVISOR,
        "mean": list(PIXEL_MEAN), "std": list(PIXEL_STD),
    }
