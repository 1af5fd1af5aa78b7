"""Validates the config that train.py stores in a checkpoint."""

import math
import sys
import unicodedata
from pathlib import Path
from typing import get_args

from model import option_types
from runtime.errors import InputError, shown

MAX_SHORT_SIDE = 10_000  # pixels
MAX_OPTION = {
    "frame_layers": sys.maxsize,
    "pixel_layers": sys.maxsize,
    "swin_window": 1000,
    "tracker_decoder_layers": sys.maxsize,
    "tracker_encoder_layers": sys.maxsize,
}
EXPECTED = {bool: "true or false", float: "a finite number", str: "a name"}  # besides int


def read_config(contents: dict, path: str | Path) -> dict:
    """The config of one of our files; {} for other files, whose config has no preset.

    Raises InputError unless every value has the type and range that train.py writes.
    """
    config = contents.get("config")
    if not isinstance(config, dict) or config.get("preset") is None:
        return {}
    options = config.get("model_options", {})
    valid = {
        "preset": is_name(config["preset"]),
        "propagation": is_name(config.get("propagation", "")),
        "test_short_side": is_integer(config.get("test_short_side", 1), 1, MAX_SHORT_SIDE),
        "categories": are_categories(config.get("categories", [])),
        "model_options": isinstance(options, dict) and all(map(is_name, options)),
        "args": isinstance(config.get("args", {}), dict),
    }
    for name in valid:
        if not valid[name]:
            raise InputError(
                f"{path} holds a config that training did not write: {name} is "
                f"{shown(config[name])}"
            )
    check_options(options, path)
    return config


def check_options(options: dict, path: str | Path) -> None:
    """InputError unless all are options of the model, of the right type and in range."""
    types = option_types()
    for name, value in options.items():
        if name not in types or name in ("num_classes", "propagation", "return"):
            raise InputError(
                f"{path} asks for a model that cannot be built: GRAttVIS has no option {name}"
            )
        minimum = 0 if name in ("window", "pixel_layers", "tracker_encoder_layers") else 1
        maximum = MAX_OPTION.get(name, 10**6)
        kinds = set(get_args(types[name]) or [types[name]])  # of int | None: int and NoneType
        if type(value) is int and int in kinds:
            valid = minimum <= value <= maximum
        elif type(value) in (int, float) and float in kinds:
            valid = math.isfinite(value)
        else:
            valid = type(value) in kinds & {bool, str, type(None)}
        if not valid:
            expected = f"a whole number from {minimum} to {maximum}"
            if int not in kinds:
                expected = next(EXPECTED[kind] for kind in EXPECTED if kind in kinds)
            raise InputError(
                f"{path} asks for a model that cannot be built: {name} is "
                f"{shown(value)}, not {expected}"
            )


def is_name(value) -> bool:
    """Whether a value is text on one line. (Some scripts use invisible joiners inside words.)"""
    return isinstance(value, str) and not any(
        unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in value
    )


def is_integer(value, minimum: int, maximum: int) -> bool:
    return type(value) is int and minimum <= value <= maximum


def are_categories(value) -> bool:
    """Whether a value is a list of pairs (id, name)."""
    return isinstance(value, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and is_name(pair[1]) for pair in value
    )
