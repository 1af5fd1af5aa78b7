"""The command line of train.py.

    python train.py --recipe grattvis/ovis/r50 --dry-run   # print the setting, under official names
    python train.py --recipe grattvis/ovis/r50 --batch 4   # flags override the recipe

The official settings are in recipes.py.
"""

import argparse
import os

from losses import GATE_LOSSES, SIMILARITY_SPANS
from model import PRESETS
from recipes import RECIPES, STAGES, official_defaults
from runtime.flags import at_least, probability
from synthetic.suites import SUITES
from tracker import GATE_MASKS, PROPAGATIONS

SWITCH = argparse.BooleanOptionalAction


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line of train.py.

    The defaults train the toy preset on the synthetic data set. A stage changes the defaults, a
    recipe those of its stage, and flags override both.
    """
    parser = argparse.ArgumentParser(
        description="Train on clips of videos. The defaults train a toy model on synthetic "
        "videos; --recipe selects an official setting.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
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
    defaults = stage_and_recipe(given.stage, given.recipe, given.preset)
    known = {action.dest for action in parser._actions}
    assert defaults.keys() <= known, defaults.keys() - known
    for name, value in defaults.items():
        parser.set_defaults(**{name: list(value) if isinstance(value, tuple) else value})

    args = parser.parse_args(arguments)
    args.output = args.output or f"runs/{(args.recipe or 'toy').replace('/', '_')}"
    if args.data_root is None and args.train_sets:
        args.data_root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    elif args.data_root is None:
        args.data_root = "datasets/synthetic"
    args.pseudo_short_sides = args.pseudo_short_sides or args.short_sides
    return args


def stage_and_recipe(stage: str | None, recipe: str | None, preset: str) -> dict:
    """The defaults that a stage and a recipe set; a given stage replaces that of the recipe.

    A stage without a recipe has the official settings of its preset, if there are any.
    """
    defaults = {}
    if recipe:
        defaults = RECIPES[recipe][1] | {"reset_classes": True}
    elif stage:
        defaults = official_defaults(stage, preset)
    stage = stage or defaults.get("stage")
    if stage:
        defaults = STAGES[stage] | defaults | {"stage": stage}
    return defaults


def add_setting_flags(add) -> None:
    """Flags that choose a recipe or a stage; `add` is add_argument."""
    add(
        "--recipe",
        choices=RECIPES,
        metavar="NAME",
        help="an official setting: " + ", ".join(RECIPES),
    )
    add("--stage", choices=STAGES, help="what is trained; sets propagation, window and freezing")
    add("--dry-run", action="store_true", help="print the setting as JSON and exit")


def add_model_flags(add) -> None:
    """Flags for the architecture."""
    add("--preset", default="toy", choices=PRESETS, help="model size")
    add(
        "--propagation",
        default="gated",
        choices=PROPAGATIONS,
        help="how queries are propagated from clip to clip",
    )
    add(
        "--gate-mask",
        default="additive",
        choices=GATE_MASKS,
        help="self-attention mask of gated queries: additive as in the official code, blocked as "
        "in the paper",
    )
    add(
        "--norm",
        choices=("frozen", "batch", "group"),
        help="normalisation of a ResNet; frozen for pretrained weights, group for training from "
        "scratch (default: the preset's)",
    )
    add("--window", type=at_least(0), help="frames per attention window of VITA's encoder; 0 = all")
    add("--clip-length", type=at_least(1), default=1, help="frames per clip of the tracker")


def add_weights_flags(add) -> None:
    """Flags for what training starts from, and what it leaves unchanged."""
    add(
        "--init",
        metavar="FILE",
        help="initialise from a checkpoint, ours or official: a file or an https address; "
        "missing weights are random",
    )
    add(
        "--reset-classes",
        action=SWITCH,
        default=False,
        help="with --init: reinitialise class layers if the number of classes differs (recipes do)",
    )
    add(
        "--backbone-weights",
        metavar="FILE",
        help='backbone weights: a file, or "imagenet" for those of torchvision',
    )
    add(
        "--freeze-detector",
        action=SWITCH,
        default=False,
        help="no gradients for the detector; its batch norms and drop path stay in training mode",
    )
    add(
        "--resume",
        metavar="FILE",
        help="resume from this checkpoint; auto = last.pt of --output if it exists, otherwise "
        "start a new run (for torchrun --max-restarts and job queues)",
    )


def add_data_flags(add) -> None:
    """Flags for the training data and its loading."""
    add(
        "--data-root",
        help="folder of one data set, with a train split (default: datasets/synthetic); with "
        "--train-sets, which recipes set, the folder above: it contains ovis, coco, ... (default: "
        "$DETECTRON2_DATASETS or datasets)",
    )
    add("--train-json", help="annotation file, instead of --data-root")
    add("--train-images", help="with --train-json: the folder that its file names are relative to")
    add("--valid-json", help="annotation file for --evaluate-every, instead of the held-out split")
    add("--valid-images", help="with --valid-json: the folder that its file names are relative to")
    add(
        "--train-sets",
        nargs="+",
        metavar="NAME",
        help="data sets by name, the target last, such as coco2ovis_train ovis_train",
    )
    add(
        "--train-ratio",
        type=float,
        nargs="*",
        metavar="SHARE",
        help="with several --train-sets: sampling ratios",
    )
    add("--test-sets", nargs="+", metavar="NAME", help="with --train-sets: data set to evaluate on")
    add(
        "--render",
        nargs="+",
        choices=SUITES,
        metavar="SUITE",
        help="train on synthetic scenes rendered on the fly, from these suites in turn: "
        + ", ".join(SUITES),
    )
    add(
        "--num-classes", type=at_least(1), help="stop if the data set has another number of classes"
    )
    add(
        "--skip-bad",
        action=SWITCH,
        default=False,
        help="skip, report and count unreadable data instead of stopping",
    )
    add("--frames", type=at_least(1), default=3, help="frames per training clip")
    add(
        "--reach",
        type=at_least(1),
        default=6,
        help="maximum distance of a clip's frames from a reference frame",
    )
    add(
        "--workers",
        type=at_least(0),
        help="loader processes per GPU; 0 = load in the training process (default: 2, with a "
        "recipe 4, fewer if shared memory is small)",
    )


def add_augmentation_flags(add) -> None:
    """Flags for `Augmentation`, of clips and of pseudo videos."""
    add(
        "--short-sides",
        type=at_least(1),
        nargs="+",
        default=[80, 96],
        help="short sides to sample from, in pixels",
    )
    add(
        "--pseudo-short-sides",
        type=at_least(1),
        nargs="+",
        help="--short-sides of pseudo videos (default: --short-sides)",
    )
    add("--max-long-side", type=at_least(1), default=768, help="pixels")
    add(
        "--crop-short-sides",
        type=at_least(1),
        nargs="*",
        default=[],
        help="short sides before a crop, in pixels; none = no crop",
    )
    add(
        "--crop-size",
        type=float,
        nargs=2,
        default=[384, 600],
        help="minimum and maximum side of a crop, in pixels",
    )
    add(
        "--crop-relative",
        action=SWITCH,
        default=False,
        help="--crop-size is the minimum share of height and width",
    )
    add(
        "--pseudo-crop-size",
        type=float,
        nargs=2,
        default=[384, 600],
        help="--crop-size of pseudo videos, in pixels",
    )
    add("--flip", action=SWITCH, default=True, help="flip half of the clips horizontally")
    add("--rotation", type=float, default=0.0, help="maximum rotation of pseudo videos, in degrees")
    add("--lsj", action=SWITCH, default=False, help="large-scale jitter instead of crop and resize")
    add(
        "--lsj-size",
        type=at_least(1),
        default=1024,
        help="side of the square images of --lsj, in pixels",
    )
    add(
        "--occlude",
        type=probability,
        default=0.0,
        help="probability that an instance of a clip is covered in some frames",
    )


def add_loss_flags(add) -> None:
    """Flags for `Criterion`."""
    add("--points", type=at_least(4), default=512, help="sampled points per mask (official: 12544)")
    add("--no-object-weight", type=float, default=0.1)
    add("--similarity-weight", type=float, default=0.5)
    add(
        "--similarity-span",
        default="clip",
        choices=SIMILARITY_SPANS,
        help="embeddings compared by the similarity loss: of a clip and its frames, as in VITA, or "
        "of all clips of the video, as in CTVIS",
    )
    add(
        "--query-noise",
        type=probability,
        default=0.0,
        help="share of the propagated queries mixed with another query (DVIS)",
    )
    add(
        "--gate-weight",
        type=float,
        default=0.0,
        help="0 = no gate loss, as in all official recipes of GRAtt-VIS",
    )
    add(
        "--gate-loss",
        default="logits",
        choices=GATE_LOSSES,
        help="released = with two sigmoids, as in the official code",
    )


def add_optimisation_flags(add) -> None:
    """Flags for optimizer, schedule and gradients."""
    add("--iterations", type=at_least(0), default=500)
    add("--batch", type=at_least(1), default=4, help="clips per step, on all GPUs together")
    add(
        "--accumulate",
        type=at_least(1),
        default=1,
        help="gradient accumulation: split the clips of each process into so many micro-batches, "
        "to save memory",
    )
    add("--lr", type=float, default=1e-3, help="learning rate (official: 5e-5 for 8 clips)")
    add(
        "--lr-steps",
        type=at_least(0),
        nargs="*",
        default=[420],
        help="iterations at which the learning rate is multiplied by --lr-gamma",
    )
    add("--lr-gamma", type=float, default=0.1)
    add("--warmup", type=at_least(0), default=50, help="iterations of linear warm-up; 0 = none")
    add(
        "--warmup-start",
        type=float,
        default=0.0,
        help="warm-up starts from this share S of the learning rate: iteration i, counted from 0, "
        "has S + (1 - S) * (i + 1) / WARMUP",
    )
    add(
        "--backbone-lr-factor",
        type=float,
        default=1.0,
        help="official: 0.1, for pretrained weights",
    )
    add(
        "--weight-decay",
        type=float,
        default=0.05,
        help="not applied to norms, embeddings and position tables",
    )
    add(
        "--clip-gradient",
        type=float,
        default=0.1,
        help="maximum gradient norm (official: 0.01); 0 = no clipping",
    )
    add(
        "--skip-nonfinite",
        type=at_least(0),
        default=0,
        metavar="N",
        help="do not take steps with non-finite losses or gradients, up to N in a row, instead of "
        "stopping at the first",
    )
    add(
        "--ema",
        type=float,
        default=0.0,
        help="decay of averaged weights, which are used for evaluation; 0 = none",
    )
    add(
        "--amp",
        default="auto",
        choices=("auto", "bf16", "fp16", "off"),
        help="mixed precision: auto = bf16 if the GPU supports it, otherwise fp16; off on a CPU",
    )
    add(
        "--recompute",
        default="off",
        choices=("off", "decoder", "all"),
        help="activation checkpointing of the pixel decoder, or of half of a ResNet too: less "
        "memory, more time",
    )
    add(
        "--compile",
        default="off",
        choices=("off", "tracker", "all"),
        help="torch.compile the tracker, or the detector too; recompiles for every frame size, and "
        "results differ by rounding",
    )
    add(
        "--graphs",
        action=SWITCH,
        default=True,
        help="launch the tracker and the detector as CUDA graphs instead of thousands of kernels, "
        "which is faster but needs more memory: on a GPU in 16 bit, without --compile",
    )


def add_evaluation_flags(add) -> None:
    """Flags for periodic evaluation."""
    add(
        "--evaluate-every",
        type=at_least(0),
        default=0,
        help="iterations between evaluations; 0 = never",
    )
    add("--test-short-side", type=at_least(1), default=96, help="pixels")
    add("--test-max-long-side", type=at_least(1), default=1333, help="pixels")
    add("--top-k", type=at_least(1), default=10, help="instances per video")


def add_run_flags(add) -> None:
    """Flags for output, seed, precision, memory and checkpoints."""
    add("--output", help="folder to write (default: runs/ and the recipe's name, or runs/toy)")
    add("--seed", type=at_least(-1), default=0, help="-1 = random")
    add("--device", default="auto", help="auto, cpu, cuda")
    add(
        "--deterministic",
        action=SWITCH,
        default=False,
        help="bitwise reproducible losses on a GPU (on a CPU they always are), at some cost in "
        "speed",
    )
    add("--log-every", type=at_least(1), default=20, help="iterations between lines of log.jsonl")
    add("--save-every", type=at_least(1), default=500, help="iterations between checkpoints")
    add(
        "--tensorboard",
        action=SWITCH,
        default=False,
        help="also write the curves of log.jsonl for TensorBoard, to the folder tensorboard in "
        "--output",
    )
