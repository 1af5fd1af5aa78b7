"""The setting of a run under the field names of the official configuration files (--dry-run).

    python train.py --recipe grattvis/ovis/r50 --dry-run

The names are short forms of the fields of detectron2, Mask2Former, VITA and GRAtt-VIS. Upstream:
vita/config.py and the files under configs/grattvis and configs/vita. Fields that have
no flag here are constants of the code, which this file reads where they are defined.
"""

import argparse
import inspect
import json

from augmentation import LSJ_SCALES
from backbone import SwinBackbone
from batching import SIZE_DIVISOR
from detector import TRACKED_LAYERS
from losses import Criterion
from model import PIXEL_MEAN, PIXEL_STD, PRESETS, GRAttVIS


def print_official_setting(args: argparse.Namespace) -> None:
    """Print the setting of a run as JSON."""
    setting = {"recipe": args.recipe, "stage": args.stage} | official_setting(args)
    print(json.dumps(setting, indent=1))


def official_setting(args: argparse.Namespace) -> dict:
    """The setting of a run, under the field names of the official configuration files.

    For a recipe, the values are those of its official configuration (tests/test_recipes.py).
    """
    return official_data(args) | official_model(args) | official_optimisation(args)


def default_of(function, name: str):
    """The default value of a parameter."""
    return inspect.signature(function).parameters[name].default


def official_data(args: argparse.Namespace) -> dict:
    """Fields of the data and the augmentation: INPUT, DATASETS and TEST upstream."""
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
    """Fields of the model and the losses: MODEL upstream."""
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
    """Fields of the optimizer and the run: SOLVER and SEED upstream."""
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
