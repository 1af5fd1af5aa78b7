"""The settings of a training run: the command line, and the official settings by name.

    python train.py --recipe grattvis/ovis/r50 --dry-run   # print the setting, under official names
    python train.py --recipe grattvis/ovis/r50 --batch 4   # flags override the recipe

A recipe is a training stage and its differences from the stage's defaults. Paper: GRAtt-VIS (arXiv
2305.17096), implementation details, and VITA (2206.04403) for the stages before. Upstream:
configs/grattvis, configs/vita and vita/config.py.
"""
import argparse
import inspect
import os

from augmentation import LSJ_SCALES
from backbone import SwinBackbone
from batching import SIZE_DIVISOR
from detector import TRACKED_LAYERS
from losses import GATE_LOSSES, SIMILARITY_SPANS, Criterion
from model import PIXEL_MEAN, PIXEL_STD, PRESETS, TEST_SIDES, GRAttVIS
from runtime.flags import at_least
from synthetic.suites import SUITES
from tracker import GATE_MASKS, PROPAGATIONS

# What is trained: a detector on single images, VITA on videos, GenVIS, GRAtt-VIS.
STAGES = {
    "detector": dict(propagation="clip", window=0, frames=1),
    "vita": dict(propagation="clip", window=6),
    "genvis": dict(propagation="memory", window=0, freeze_detector=True),
    "grattvis": dict(propagation="gated", window=0, freeze_detector=True),
}


# ---- Official settings ----

ALL = dict(
    points=12544,
    clip_gradient=0.01,
    backbone_lr_factor=0.1,
    weight_decay=0.05,
    warmup=10,
    warmup_start=1.0,
    lr_gamma=0.1,
    save_every=5000,
    seed=-1,
    crop_size=(384, 600),
    pseudo_crop_size=(384, 600),
    rotation=15.0,
)
SIDES = (288, 320, 352, 384, 416, 448, 480, 512)
VIDEO = ALL | dict(
    batch=8,
    lr=5e-5,
    short_sides=SIDES,
    pseudo_short_sides=SIDES,
    max_long_side=768,
    crop_short_sides=(400, 500, 600),
    lsj=False,
    lsj_size=768,
)
VITA = VIDEO | dict(stage="vita", clip_length=5, gate_weight=1.0)
GRATTVIS = VIDEO | dict(stage="grattvis", frames=5, reach=6, clip_length=1, gate_weight=0.0)
COCO = ALL | dict(
    stage="detector",
    train_sets=("coco_2017_train",),
    train_ratio=(),
    test_sets=("coco_2017_val",),
    num_classes=80,
    top_k=100,
    batch=16,
    lr=1e-4,
    reach=20,
    short_sides=(800,),
    max_long_side=1333,
    pseudo_short_sides=tuple(range(480, 769, 32)),
    crop_short_sides=(),
    crop_relative=True,
    crop_size=(0.9, 0.9),
    lsj=True,
    lsj_size=1024,
    test_short_side=800,
    clip_length=5,
    gate_weight=1.0,
)
COCO_50_EPOCHS = COCO | dict(
    iterations=368750,
    lr_steps=(327778, 355092),
    backbone_weights="detectron2://ImageNetPretrained/torchvision/R-50.pkl",
)
COCO_100_EPOCHS = COCO | dict(
    iterations=737500,
    lr_steps=(655556, 710184),
    backbone_weights="swin_large_patch4_window12_384_22k.pkl",
)


def video_data(name: str, share: float, num_classes: int, top_k: int) -> dict:
    """Pseudo videos of COCO images and the videos of a data set, mixed 1 : share."""
    return dict(
        train_sets=(f"coco2{name.replace('_', '')}_train", f"{name}_train"),
        train_ratio=(1.0, share),
        test_sets=(f"{name}_val",),
        num_classes=num_classes,
        top_k=top_k,
    )


OVIS = video_data("ovis", share=0.25, num_classes=25, top_k=20)
YTVIS_2019 = video_data("ytvis_2019", share=0.75, num_classes=40, top_k=10)
YTVIS_2021 = video_data("ytvis_2021", share=0.75, num_classes=40, top_k=10)
VITA_OVIS = VITA | OVIS | dict(iterations=150000, lr_steps=(50000, 125000), frames=6, reach=8)
VITA_2019 = VITA | YTVIS_2019 | dict(iterations=140000, lr_steps=(75000,), frames=5, reach=20)
VITA_2021 = VITA | YTVIS_2021 | dict(
    train_ratio=(1.0, 0.8), iterations=187500, lr_steps=(100000,), frames=6, reach=8)
GRATTVIS_OVIS = GRATTVIS | OVIS | dict(iterations=140000, lr_steps=(100000,))
GRATTVIS_2019 = GRATTVIS | YTVIS_2019 | dict(propagation="gated+memory")
GRATTVIS_2021 = GRATTVIS | YTVIS_2021 | dict(
    propagation="gated+memory", iterations=90000, lr_steps=(50000,))
R50, R101, SWIN_L = (
    dict(preset=preset, test_short_side=TEST_SIDES[preset])
    for preset in ("r50", "r101", "swin_l")
)

# Our name: the official name, and the values of the flags.
RECIPES = {
    "detector/coco/r50": ("vita/coco/vita_R50_bs16_50ep", R50 | COCO_50_EPOCHS),
    "detector/coco/r101": ("vita/coco/vita_R101_bs16_50ep", R101 | COCO_50_EPOCHS),
    "detector/coco/swin_l": (
        "vita/coco/vita_swin_large_IN21k_384_bs16_100ep_lsj", SWIN_L | COCO_100_EPOCHS),
    "vita/ytvis_2019/r50": (
        "vita/youtubevis_2019/vita_R50_bs8",
        VITA_2019 | R50 | dict(init="vita_r50_coco.pth"),
    ),
    "vita/ytvis_2019/r101": (
        "vita/youtubevis_2019/vita_R101_bs8",
        VITA_2019 | R101 | dict(init="vita_r101_coco.pth"),
    ),
    "vita/ytvis_2019/swin_l": (
        "vita/youtubevis_2019/vita_SWIN_bs8",
        VITA_2019 | SWIN_L | dict(init="vita_swin_coco.pth"),
    ),
    "vita/ytvis_2021/r50": (
        "vita/youtubevis_2021/vita_R50_bs8",
        VITA_2021 | R50 | dict(init="vita_r50_coco.pth"),
    ),
    "vita/ytvis_2021/r101": (
        "vita/youtubevis_2021/vita_R101_bs8",
        VITA_2021 | R101 | dict(init="vita_r101_coco.pth"),
    ),
    "vita/ytvis_2021/swin_l": (
        "vita/youtubevis_2021/vita_SWIN_bs8",
        VITA_2021 | SWIN_L | dict(init="vita_swin_coco.pth"),
    ),
    "vita/ovis/r50": (
        "vita/ovis/vita_R50_bs8",
        VITA_OVIS | R50 | dict(init="vita_r50_coco.pth"),
    ),
    "vita/ovis/swin_l": (
        "vita/ovis/vita_SWIN_bs8",
        VITA_OVIS | SWIN_L | dict(init="vita_swin_coco.pth"),
    ),
    "grattvis/ytvis_2019/r50": (
        "grattvis/youtubevis_2019/grattvis_R50_bs8",
        GRATTVIS_2019 | R50 | dict(
            iterations=15000, lr_steps=(10000,), init="vita_r50_ytvis2019.pth"),
    ),
    "grattvis/ytvis_2019/swin_l": (
        "grattvis/youtubevis_2019/grattvis_SWIN_bs8",
        GRATTVIS_2019 | SWIN_L | dict(
            iterations=20000, lr_steps=(10000, 15000), init="vita_swin_ytvis2019.pth"),
    ),
    "grattvis/ytvis_2021/r50": (
        "grattvis/youtubevis_2021/grattvis_R50_bs8",
        GRATTVIS_2021 | R50 | dict(init="vita_r50_ytvis2021.pth"),
    ),
    "grattvis/ytvis_2021/swin_l": (
        "grattvis/youtubevis_2021/grattvis_SWIN_bs8",
        GRATTVIS_2021 | SWIN_L | dict(init="vita_swin_ytvis2021.pth"),
    ),
    "grattvis/ovis/r50": (
        "grattvis/ovis/grattvis_R50_bs8",
        GRATTVIS_OVIS | R50 | dict(init="vita_r50_ovis.pth"),
    ),
    "grattvis/ovis/swin_l": (
        "grattvis/ovis/grattvis_SWIN_bs8",
        GRATTVIS_OVIS | SWIN_L | dict(propagation="gated+memory", init="vita_swin_ovis.pth"),
    ),
}


# ---- The command line of train.py ----

SWITCH = argparse.BooleanOptionalAction


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line of train.py.

    The defaults train the toy preset on the synthetic data set. A stage changes the defaults, a
    recipe those of its stage, and flags override both.
    """
    parser = argparse.ArgumentParser(
        description="Train on clips of videos. The defaults train a toy model on synthetic "
        "videos; --recipe selects an official setting.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_setting_flags(parser.add_argument_group("setting").add_argument)
    add_model_flags(parser.add_argument_group("model").add_argument)
    add_weights_flags(parser.add_argument_group("weights").add_argument)
    add_data_flags(parser.add_argument_group("data").add_argument)
    add_augmentation_flags(parser.add_argument_group("augmentation").add_argument)
    add_loss_flags(parser.add_argument_group("loss").add_argument)
    add_optimisation_flags(parser.add_argument_group("optimisation").add_argument)
    add_evaluation_flags(parser.add_argument_group("evaluation").add_argument)
    add_run_flags(parser.add_argument_group("run").add_argument)

    given, _ = parser.parse_known_args(arguments)
    recipe = RECIPES[given.recipe][1] | {"reset_classes": True} if given.recipe else {}
    stage = given.stage or recipe.get("stage")
    defaults = (STAGES[stage] if stage else {}) | recipe
    known = {action.dest for action in parser._actions}
    assert defaults.keys() <= known, defaults.keys() - known
    for name, value in defaults.items():
        parser.set_defaults(**{name: list(value) if isinstance(value, tuple) else value})

    args = parser.parse_args(arguments)
    args.stage = stage
    args.output = args.output or f"runs/{(args.recipe or 'toy').replace('/', '_')}"
    if args.data_root is None and args.train_sets:
        args.data_root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    elif args.data_root is None:
        args.data_root = "datasets/synthetic"
    args.pseudo_short_sides = args.pseudo_short_sides or args.short_sides
    return args


def add_setting_flags(add) -> None:
    """Flags that choose a recipe or a stage; `add` is add_argument."""
    add("--recipe", choices=RECIPES, metavar="NAME",
        help="an official setting: " + ", ".join(RECIPES))
    add("--stage", choices=STAGES, help="what is trained; sets propagation, window and freezing")
    add("--dry-run", action="store_true", help="print the setting as JSON and exit")


def add_model_flags(add) -> None:
    """Flags for the architecture."""
    add("--preset", default="toy", choices=PRESETS, help="model size")
    add("--propagation", default="gated", choices=PROPAGATIONS,
        help="how queries are propagated from clip to clip")
    add("--gate-mask", default="additive", choices=GATE_MASKS,
        help="self-attention mask of gated queries: additive as in the official code, blocked as "
        "in the paper")
    add("--norm", choices=("frozen", "batch", "group"),
        help="normalisation of a ResNet; frozen for pretrained weights, group for training from "
        "scratch (default: the preset's)")
    add("--window", type=at_least(0),
        help="frames per attention window of VITA's encoder; 0 = all")
    add("--clip-length", type=at_least(1), default=1, help="frames per clip of the tracker")


def add_weights_flags(add) -> None:
    """Flags for what training starts from, and what it leaves unchanged."""
    add("--init", metavar="FILE",
        help="initialise from a checkpoint, ours or official; missing weights are random")
    add("--reset-classes", action=SWITCH, default=False,
        help="with --init: reinitialise class layers if the number of classes differs (recipes "
        "do)")
    add("--backbone-weights", metavar="FILE",
        help='backbone weights: a file, or "imagenet" for those of torchvision')
    add("--freeze-detector", action=SWITCH, default=False, help="train only the tracker")
    add("--resume", metavar="FILE",
        help="resume from this checkpoint; auto = last.pt of --output if it exists, otherwise "
        "start a new run (for torchrun --max-restarts and job queues)")


def add_data_flags(add) -> None:
    """Flags for the training data and its loading."""
    add("--data-root",
        help="data set with a train split (default: datasets/synthetic); with --train-sets: the "
        "folder that contains ovis, coco, ... (default: $DETECTRON2_DATASETS or datasets)")
    add("--train-json", help="annotation file, instead of --data-root")
    add("--train-images", help="with --train-json: the folder that its file names are relative to")
    add("--train-sets", nargs="+", metavar="NAME",
        help="data sets by name, the target last, such as coco2ovis_train ovis_train")
    add("--train-ratio", type=float, nargs="*", metavar="SHARE",
        help="with several --train-sets: sampling ratios")
    add("--test-sets", nargs="+", metavar="NAME", help="with --train-sets: data set to evaluate on")
    add("--render", nargs="+", choices=SUITES, metavar="SUITE",
        help="train on synthetic scenes rendered on the fly, from these suites in turn: "
        + ", ".join(SUITES))
    add("--num-classes", type=at_least(1),
        help="stop if the data set has another number of classes")
    add("--skip-bad", action=SWITCH, default=False,
        help="skip, report and count unreadable data instead of stopping")
    add("--frames", type=at_least(1), default=3, help="frames per training clip")
    add("--reach", type=at_least(1), default=6,
        help="maximum distance of a clip's frames from a reference frame")
    add("--workers", type=at_least(0),
        help="loader processes per GPU; 0 = load in the training process (default: 2, with a "
        "recipe 4, fewer if shared memory is small)")


def add_augmentation_flags(add) -> None:
    """Flags for `Augmentation`, of clips and of pseudo videos."""
    add("--short-sides", type=at_least(1), nargs="+", default=[80, 96],
        help="short sides to sample from, in pixels")
    add("--pseudo-short-sides", type=at_least(1), nargs="+",
        help="--short-sides of pseudo videos (default: --short-sides)")
    add("--max-long-side", type=at_least(1), default=768, help="pixels")
    add("--crop-short-sides", type=at_least(1), nargs="*", default=[],
        help="short sides before a crop, in pixels; none = no crop")
    add("--crop-size", type=float, nargs=2, default=[384, 600],
        help="minimum and maximum side of a crop, in pixels")
    add("--crop-relative", action=SWITCH, default=False,
        help="--crop-size is the minimum share of height and width")
    add("--pseudo-crop-size", type=float, nargs=2, default=[384, 600],
        help="--crop-size of pseudo videos, in pixels")
    add("--flip", action=SWITCH, default=True, help="flip half of the clips horizontally")
    add("--rotation", type=float, default=0.0,
        help="maximum rotation of pseudo videos, in degrees")
    add("--lsj", action=SWITCH, default=False, help="large-scale jitter instead of crop and resize")
    add("--lsj-size", type=at_least(1), default=1024,
        help="side of the square images of --lsj, in pixels")


def add_loss_flags(add) -> None:
    """Flags for `Criterion`."""
    add("--points", type=at_least(4), default=512, help="sampled points per mask (official: 12544)")
    add("--no-object-weight", type=float, default=0.1)
    add("--similarity-weight", type=float, default=0.5)
    add("--similarity-span", default="clip", choices=SIMILARITY_SPANS,
        help="embeddings compared by the similarity loss: of a clip and its frames, as in VITA, or "
        "of all clips of the video, as in CTVIS")
    add("--query-noise", type=float, default=0.0,
        help="share of the propagated queries mixed with another query (DVIS)")
    add("--gate-weight", type=float, default=0.0,
        help="0 = no gate loss, as in all official recipes of GRAtt-VIS")
    add("--gate-loss", default="logits", choices=GATE_LOSSES,
        help="released = with two sigmoids, as in the official code")


def add_optimisation_flags(add) -> None:
    """Flags for optimizer, schedule and gradients."""
    add("--iterations", type=at_least(0), default=500)
    add("--batch", type=at_least(1), default=4, help="clips per step, on all GPUs together")
    add("--accumulate", type=at_least(1), default=1,
        help="gradient accumulation: split the clips of each process into so many micro-batches, "
        "to save memory")
    add("--lr", type=float, default=1e-3, help="learning rate (official: 5e-5 for 8 clips)")
    add("--lr-steps", type=at_least(0), nargs="*", default=[420],
        help="iterations at which the learning rate is multiplied by --lr-gamma")
    add("--lr-gamma", type=float, default=0.1)
    add("--warmup", type=at_least(0), default=50, help="iterations of linear warm-up; 0 = none")
    add("--warmup-start", type=float, default=0.0,
        help="share of the learning rate at the first iteration")
    add("--backbone-lr-factor", type=float, default=1.0,
        help="official: 0.1, for pretrained weights")
    add("--weight-decay", type=float, default=0.05,
        help="not applied to norms, embeddings and position tables")
    add("--clip-gradient", type=float, default=0.1,
        help="maximum gradient norm (official: 0.01); 0 = no clipping")
    add("--skip-nonfinite", type=at_least(0), default=0, metavar="N",
        help="skip up to N consecutive steps with non-finite losses or gradients instead of "
        "stopping at the first")
    add("--ema", type=float, default=0.0,
        help="decay of averaged weights, which are used for evaluation; 0 = none")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"),
        help="mixed precision: auto = bf16 if the GPU supports it, otherwise fp16; off on a CPU")
    add("--recompute", default="off", choices=("off", "decoder", "all"),
        help="activation checkpointing of the pixel decoder, or of half of a ResNet too: less "
        "memory, more time")
    add("--compile", default="off", choices=("off", "tracker", "all"),
        help="torch.compile the tracker, or the detector too; recompiles for every frame size, and "
        "results differ by rounding")


def add_evaluation_flags(add) -> None:
    """Flags for periodic evaluation."""
    add("--evaluate-every", type=at_least(0), default=0,
        help="iterations between evaluations; 0 = never")
    add("--test-short-side", type=at_least(1), default=96, help="pixels")
    add("--test-max-long-side", type=at_least(1), default=1333, help="pixels")
    add("--top-k", type=at_least(1), default=10, help="instances per video")


def add_run_flags(add) -> None:
    """Flags for output, seed, precision, memory and checkpoints."""
    add("--output", help="folder to write (default: runs/ and the recipe's name, or runs/toy)")
    add("--seed", type=at_least(-1), default=0, help="-1 = random")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--deterministic", action=SWITCH, default=False,
        help="bitwise reproducible losses on a GPU (on a CPU they always are), at some cost in "
        "speed")
    add("--log-every", type=at_least(1), default=20, help="iterations between lines of log.jsonl")
    add("--save-every", type=at_least(1), default=500, help="iterations between checkpoints")


# ---- Official field names ----

def official_setting(args: argparse.Namespace) -> dict:
    """The setting of a run, under the field names of the official configuration files.

    For a recipe, the values are those of its official configuration (tests/test_recipes.py).
    """
    return official_data(args) | official_model(args) | official_optimisation(args)


def default_of(function, name: str):
    """The default value of a parameter."""
    return inspect.signature(function).parameters[name].default


def official_data(args: argparse.Namespace) -> dict:
    """Fields of the data and the augmentation."""
    by_clip = args.frames > 1
    return {
        "train_sets": args.train_sets or [],
        "train_ratio": args.train_ratio or [],
        "test_sets": args.test_sets or [],
        "filter_empty": True,
        "num_classes": args.num_classes,
        "frames": args.frames,
        "frame_range": args.reach,
        "shuffle": False,
        "short_sides": args.short_sides,
        "short_side_sampling": "choice_by_clip" if by_clip else "choice",
        "max_long_side": args.max_long_side,
        "crop": bool(args.crop_short_sides),
        "crop_type": "relative_range" if args.crop_relative else "absolute_range",
        "crop_size": args.crop_size,
        "flip": ("flip_by_clip" if by_clip else "horizontal") if args.flip else "none",
        "augmentations": [],
        "pseudo_short_sides": args.pseudo_short_sides,
        "pseudo_crop_size": args.pseudo_crop_size,
        "pseudo_augmentations": ["rotation"] if args.rotation else [],
        "lsj": args.lsj,
        "lsj_image_size": args.lsj_size,
        "lsj_scale": LSJ_SCALES[0],
        "size_divisibility": SIZE_DIVISOR,
        "mean": list(PIXEL_MEAN),
        "std": list(PIXEL_STD),
        "test_short_side": args.test_short_side,
        "test_max_long_side": args.test_max_long_side,
        "top_k": args.top_k,
    }


def official_model(args: argparse.Namespace) -> dict:
    """Fields of the model and the losses."""
    if args.propagation == "clip":
        meta_architecture = "Vita"
    else:
        meta_architecture = "Grattvis" if "gated" in args.propagation else "Genvis"

    def size(name: str) -> int:
        return PRESETS[args.preset].get(name, default_of(GRAttVIS, name))

    return {
        "meta": meta_architecture,
        "init": args.init or args.backbone_weights,
        "freeze_detector": args.freeze_detector,
        "use_mem": "memory" in args.propagation,
        "gated": "gated" in args.propagation,
        "enc_window": args.window,
        "clip_len": args.clip_length,
        "frame_queries": size("frame_queries"),
        "clip_queries": size("queries"),
        "enc_layers": size("tracker_encoder_layers"),
        "dec_layers": size("tracker_decoder_layers"),
        "frame_layers_used": TRACKED_LAYERS,
        "drop_path": default_of(SwinBackbone, "drop_path"),
        "class_weight": default_of(Criterion, "class_weight"),
        "mask_weight": default_of(Criterion, "mask_weight"),
        "dice_weight": default_of(Criterion, "dice_weight"),
        "sim_weight": args.similarity_weight,
        "gate_weight": args.gate_weight,
        "no_object_weight": args.no_object_weight,
        "vita_no_object_weight": args.no_object_weight,
        "num_points": args.points,
        "oversample": default_of(Criterion, "oversample"),
        "importance": default_of(Criterion, "importance"),
    }


def official_optimisation(args: argparse.Namespace) -> dict:
    """Fields of the optimizer and the run."""
    return {
        "iterations": args.iterations,
        "batch_videos": args.batch,
        "lr": args.lr,
        "backbone_lr_multiplier": args.backbone_lr_factor,
        "scheduler": "WarmupMultiStepLR",
        "lr_steps": args.lr_steps,
        "gamma": args.lr_gamma,
        "warmup_iters": args.warmup,
        "warmup_factor": args.warmup_start,
        "weight_decay": args.weight_decay,
        "weight_decay_norm": 0.0,
        "weight_decay_embed": 0.0,
        "clip_grad_norm": args.clip_gradient,
        "amp": args.amp != "off",
        "checkpoint_period": args.save_every,
        "seed": args.seed,
    }
