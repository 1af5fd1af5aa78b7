"""Checks before the first step: the arguments, the run to resume, and the other processes."""

import argparse
import random
from pathlib import Path

from runtime.errors import InputError
from runtime.files import checksum
from trainer.flags import parse_arguments
from trainer.tensorboard import require_tensorboard


def choose_seed(given: int, resumed: dict | None) -> int:
    """--seed; for -1, the seed of the resumed checkpoint, or a random one."""
    if given >= 0:
        return given
    if resumed:
        return ((resumed.get("config") or {}).get("args") or {}).get("seed", -1)
    return random.SystemRandom().randrange(2**31)


def check_run(args: argparse.Namespace, resumed: dict | None, world: int) -> None:
    """InputError for arguments that contradict each other, or the checkpoint to resume."""
    if resumed:
        check_resumed(args, resumed)
    if args.tensorboard:
        require_tensorboard()
    if args.batch % (world * args.accumulate):
        parts = f" in {args.accumulate} parts" if args.accumulate > 1 else ""
        raise InputError(f"--batch {args.batch} cannot be shared by {world} processes{parts}")
    if args.deterministic and args.compile != "off":
        raise InputError(
            "--deterministic and --compile do not go together: the order of compiled "
            "sums is not fixed"
        )
    for split in ("train", "valid"):
        if bool(vars(args)[f"{split}_json"]) != bool(vars(args)[f"{split}_images"]):
            raise InputError(f"--{split}-json and --{split}-images go together")
    if args.freeze_detector and args.init is None and not resumed:
        raise InputError(
            "--freeze-detector (set by the stages genvis and grattvis) trains only the tracker, so "
            "the detector needs trained weights: give --init, or --no-freeze-detector"
        )
    if args.render and (args.train_json or args.train_sets):
        raise InputError(
            "--render draws the training clips: --train-json and --train-sets (which "
            "a recipe sets) do not go with it"
        )
    if args.propagation != "clip" and args.frames % args.clip_length:
        raise InputError(
            f"--frames {args.frames} is no multiple of --clip-length {args.clip_length}"
        )


# Names of arguments.
MAY_CHANGE_ON_RESUME = {
    "recipe",
    "dry_run",
    "iterations",
    "output",
    "resume",
    "init",
    "backbone_weights",
    "reset_classes",
    "workers",
    "device",
    "recompute",
    "graphs",
    "skip_nonfinite",
    "log_every",
    "save_every",
    "tensorboard",
    "skip_bad",
    "data_root",
    "train_json",
    "train_images",
    "valid_json",
    "valid_images",
    "test_sets",
    "evaluate_every",
    "test_short_side",
    "test_max_long_side",
    "top_k",
}


def check_resumed(args: argparse.Namespace, resumed: dict) -> None:
    """InputError naming the arguments that differ from those of the interrupted run."""
    # Arguments added since then had their default values.
    before = vars(parse_arguments([])) | resumed["config"]["args"]
    changed = [
        f"{flag(name)} {before[name]} (now {value})"
        for name, value in vars(args).items()
        if name not in MAY_CHANGE_ON_RESUME and before[name] != value
    ]
    if changed:
        raise InputError(f"{args.resume} was trained with {', '.join(changed)}")
    if resumed["step"] > args.iterations:
        raise InputError(
            f"{args.resume} is already at iteration {resumed['step']}, past "
            f"--iterations {args.iterations}"
        )


# Names of arguments; of files, the contents are compared instead.
MAY_DIFFER_BETWEEN_MACHINES = {
    "output",
    "resume",
    "init",
    "backbone_weights",
    "data_root",
    "train_json",
    "train_images",
    "valid_json",
    "valid_images",
    "device",
    "workers",
}


def values_to_agree_on(args: argparse.Namespace, config: dict) -> dict[str, object]:
    """Values that must be the same in all processes."""
    values: dict[str, object] = {
        flag(name): value
        for name, value in vars(args).items()
        if name not in MAY_DIFFER_BETWEEN_MACHINES
    }
    for name in ("init", "backbone_weights"):
        path = getattr(args, name)
        if path and Path(path).is_file() and not args.resume:
            values[f"the contents of {flag(name)}"] = checksum(path)
    values["the contents of the annotation files"] = config["data"]
    return values


def flag(name: str) -> str:
    """The flag of an argument: "lr_steps" -> "--lr-steps"."""
    return f"--{name.replace('_', '-')}"
