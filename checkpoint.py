"""Load and save weights.

    report = load_weights(model, "grattvis_r50_ovis.pth")  # or .pkl, our .pt, or a state dict
    model, config = model_from_checkpoint("runs/toy/last.pt")

    python checkpoint.py runs/small/last.pt weights/small.pt  # only the weights, in 16 bit

reading/checkpoints.py reads the files without executing any code in them. reading/translation.py
translates official files (GRAtt-VIS, GenVIS, VITA, Mask2Former, backbones) to our names.

Our checkpoints are one .pt file. last.pt has model, optimizer, schedule, scaler, ema (the averaged
weights, with --ema), step, best (AP so far), unevaluated (a signal interrupted the evaluation after
this step) and config: preset, propagation, model_options, test_short_side, categories, args, data
(checksums of the annotation files). best.pt has model, step, best and config. No random state is
stored, because every training step seeds its generators from (seed, step, rank), see train.py.
"""

import argparse
import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from model import PRESETS, TEST_SIDES, GRAttVIS, build_model
from reading.checkpoints import read_file
from reading.configs import is_integer, read_config
from reading.downloads import find_weights
from reading.translation import translate
from runtime.errors import InputError, cli_errors
from runtime.files import atomic_write

SHIPPED_WEIGHTS = Path(__file__).with_name("weights") / "small.pt"  # trained on synthetic suites
CLASS_LAYERS = ("frame_decoder.class_embed.", "tracker.class_embed.")
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# Weights into a model


@dataclass
class LoadReport:
    """The outcome of load_weights, by our parameter names (`ignored`: by those of the file)."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # not in the file; unchanged in the model
    unexpected: list[str] = field(default_factory=list)  # in the file but not in the model
    ignored: list[str] = field(default_factory=list)  # constants that are no parameters
    reset: list[str] = field(default_factory=list)  # class layers of another size; unchanged

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} entries loaded"]
        for name in ("missing", "unexpected", "reset"):
            entries = getattr(self, name)
            if entries:
                shown = ", ".join(entries[:4]) + (", ..." if len(entries) > 4 else "")
                parts.append(f"{len(entries)} {name} ({shown})")
        return "; ".join(parts)


def load_weights(
    model: nn.Module, source: str | Path | dict, reset_classes: bool = False
) -> LoadReport:
    """Load weights into a model, in place.

    Parameters that the file lacks keep their values (report.missing): a Mask2Former file has no
    tracker, a VITA file no gate. Entries that the model lacks are not used (report.unexpected).

    Args:
        source: a file (ours, official .pth or .pkl, or a backbone alone), an https address or the
            name of an official file (`find_weights`), or a state dict.
        reset_classes: skip class layers of another number of classes (report.reset) instead of
            raising InputError.

    Raises InputError if a shape or dtype does not fit; the model is then unchanged.
    """
    label = "the state dict" if isinstance(source, dict) else str(source)
    contents = source if isinstance(source, dict) else read_file(find_weights(source))
    weights, ignored = translate(contents, label)
    report = LoadReport(ignored=ignored)
    parameters = model.state_dict()
    fitting = {}
    for name, value in weights.items():
        if name not in parameters:
            # Frozen batch norms do not count batches.
            is_counter = name.endswith("num_batches_tracked")
            (report.ignored if is_counter else report.unexpected).append(name)
        elif value.shape != parameters[name].shape:
            check_class_layer(name, value.shape, parameters[name].shape, label, reset_classes)
            report.reset.append(name)
        else:
            check_dtype(value, parameters[name], f"{label}: entry {name}")
            report.loaded.append(name)
            fitting[name] = value
    report.missing = [
        name
        for name in parameters
        if name not in fitting
        and name not in report.reset
        and not name.endswith("num_batches_tracked")
    ]
    if not report.loaded:
        raise InputError(
            f"{label}: none of its {len(report.unexpected)} entries is part of this model"
        )
    model.load_state_dict(fitting, strict=False)
    return report


def check_class_layer(
    name: str, theirs: torch.Size, ours: torch.Size, label: str, reset_classes: bool
) -> None:
    """InputError unless shapes differ only in the number of classes, and reset_classes is set."""
    theirs, ours = tuple(theirs), tuple(ours)
    if not name.startswith(CLASS_LAYERS) or theirs[1:] != ours[1:]:
        raise InputError(
            f"{label} does not fit the model: {name} is {theirs} there and {ours} here"
        )
    if not reset_classes:
        raise InputError(
            f"{label} is for {theirs[0] - 1} classes, the model for {ours[0] - 1}: build the model "
            "with that number, or reinitialise the class layers (reset_classes, --reset-classes)"
        )


def check_dtype(theirs: Tensor, ours: Tensor, label: str) -> None:
    """InputError unless the values can be loaded without loss.

    Weights must be floating-point numbers of at least 16 bits, counters and index tables integers.
    """
    dtype = str(theirs.dtype).removeprefix("torch.")
    is_float = theirs.dtype in FLOAT_DTYPES
    if ours.is_floating_point():
        if not is_float:
            raise InputError(
                f"{label} is {dtype}: weights must be float16, bfloat16, float32 or float64"
            )
    elif theirs.is_floating_point():  # after .half() of all entries, for example
        is_exact = is_float and theirs.dtype != torch.bfloat16
        if not is_exact or not torch.equal(theirs, theirs.round()):
            raise InputError(f"{label} is {dtype}: it must hold whole numbers, exactly")
    elif theirs.is_complex() or theirs.dtype == torch.bool:
        raise InputError(f"{label} is {dtype}: it must hold whole numbers")


def load_backbone(model: GRAttVIS, source: str, name: str) -> LoadReport:
    """Load the weights of a backbone; report.missing lists only those of the backbone.

    source: a file, or "imagenet" for torchvision's weights of the backbone `name`, downloaded on
        first use. The latter are those of detectron2://ImageNetPretrained/torchvision/, which is
        accepted too. (Upstream's R-101 recipe names the file of R-50 there.)
    """
    if source == "imagenet" or source.startswith("detectron2://ImageNetPretrained/torchvision/"):
        weights = download_imagenet_weights(name)
    else:
        weights = read_file(find_weights(source))
    report = load_weights(model, weights)
    report.missing = [entry for entry in report.missing if entry.startswith("backbone.")]
    if any("running_mean" in entry for entry in report.unexpected):
        raise InputError(
            f"{source} holds batch norms and the model's backbone does not: use norm "
            "'frozen' or 'batch'"
        )
    return report


def download_imagenet_weights(name: str) -> dict:
    """torchvision's ImageNet weights of a backbone."""
    from torchvision.models import get_model_weights

    try:
        return get_model_weights(name)["IMAGENET1K_V1"].get_state_dict(progress=True)
    except (ValueError, KeyError) as error:
        raise InputError(f"torchvision has no ImageNet weights for {name}") from error
    except OSError as error:
        raise InputError(
            f"torchvision's weights for {name} could not be downloaded ({error}); give a file"
        ) from error


# A model from a file


def model_from_checkpoint(
    path: str | Path, preset: str | None = None, propagation: str | None = None, **overrides
) -> tuple[GRAttVIS, dict]:
    """Build the model of a checkpoint and load its weights.

    Args:
        preset: required for official files; our files contain it.
        propagation: required if the parameter names do not imply it ("plain" or "clip").
        overrides: options of the model, see build_model.

    Returns the model in evaluation mode, and the config of the file. Raises InputError if an
    argument contradicts the file, or if the file lacks any parameter of the model.
    """
    contents = read_file(find_weights(path))
    config = read_config(contents, path)
    weights, _ = translate(contents, str(path))
    class_weight = weights.get("tracker.class_embed.weight")
    if class_weight is None or class_weight.ndim != 2 or not class_weight.numel():
        raise InputError(
            f"{path} has no tracker: it can start a training (--init), but segments no videos"
        )
    preset = agreed_value("preset", preset, config.get("preset"), path)
    if preset is None:
        raise InputError(
            f"{path} does not say its preset: give one of {', '.join(PRESETS)} (--preset)"
        )
    in_file = config.get("propagation") or find_propagation(weights)
    propagation = agreed_value("propagation", propagation, in_file, path)
    if propagation is None:
        raise InputError(
            f'{path} may be "plain" or "clip", its names cannot tell: say which (--propagation)'
        )
    options = dict(config.get("model_options", {}))
    for name, value in overrides.items():
        options[name] = agreed_value(name.replace("_", " "), value, options.get(name), path)
    build = partial(build_model, preset, len(class_weight) - 1, propagation, **options)
    check_model_size(build, options, weights, path)
    model = build().eval()
    report = load_weights(model, contents)
    if report.missing or report.unexpected:
        raise InputError(f"{path} does not fit a {preset} with {propagation} propagation: {report}")
    return model, config


def agreed_value(what: str, given: str | None, in_file: str | None, path: str | Path) -> str | None:
    """The given value, or that of the file; InputError if they contradict each other."""
    if given and in_file and given != in_file:
        raise InputError(f"{path} was made with {what} {in_file!r}, not {given!r}")
    return given or in_file


def find_propagation(names) -> str | None:
    """The propagation mode implied by (our) parameter names; None for "plain" or "clip"."""
    gated = "tracker.gate_proj.weight" in names
    memory = "tracker.memory_key.weight" in names
    if gated:
        return "gated+memory" if memory else "gated"
    return "memory" if memory else None


def check_model_size(build, options: dict, weights: dict[str, Tensor], path: str | Path) -> None:
    """InputError if the model cannot be built, or is much larger than the file."""
    refusal = f"{path} asks for a model that cannot be built: "
    if any(size > len(weights) for name, size in options.items() if name.endswith("_layers")):
        raise InputError(f"{refusal}it has more layers than the file has entries")
    try:
        with torch.device("meta"):  # allocates no memory
            outline = build()
    except ValueError as error:  # unknown names, or sizes that do not fit together
        raise InputError(f"{refusal}{error}") from error
    needed = sum(value.numel() for value in outline.state_dict().values())
    in_file = sum(value.numel() for value in weights.values())
    if needed > 2 * in_file:  # smaller differences are reported as missing parameters
        raise InputError(f"{refusal}it has {needed} numbers, the file {in_file}")


def default_short_side(config: dict, preset: str | None) -> int:
    """The test size of a model in pixels (short side), if none is given.

    The test size of its training run or, for files without it, the official size of the preset
    (96 for presets trained on synthetic videos).
    """
    return config.get("test_short_side") or TEST_SIDES[config.get("preset") or preset]


# Files of training


def read_run(path: str | Path) -> dict:
    """The contents of a checkpoint that train.py can resume; InputError for other files."""
    contents = read_file(path)
    config = read_config(contents, path)
    has_optimizer = isinstance(contents.get("optimizer"), dict)
    has_step = is_integer(contents.get("step"), 0, sys.maxsize)
    if "args" not in config or not has_optimizer or not has_step:
        raise InputError(f"{path} is no checkpoint of a training run: start from it with --init")
    return contents


def save_checkpoint(path: str | Path, contents: dict) -> None:
    """Write a checkpoint of tensors, numbers, strings and containers atomically."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(contents, file)
        except RuntimeError as error:
            # If the disk is full, PyTorch's error hides the OSError.
            raise error.__context__ if isinstance(error.__context__, OSError) else error
        file.flush()
        os.fsync(file.fileno())  # otherwise a power failure could leave an empty file


def save_weights(source: str | Path, target: str | Path) -> int:
    """Write only the weights and the config of a training checkpoint; returns the size in bytes.

    Averaged weights are preferred. Matrices are stored in float16, vectors (norms, biases) as they
    are. Raises InputError if the target exists, or if a weight does not fit into float16.
    """
    contents, target = read_file(source), Path(target)
    config = read_config(contents, source)
    if not config or not isinstance(contents.get("model"), dict):
        raise InputError(f"{source} is no checkpoint of train.py")
    if target.exists():
        raise InputError(f"{target} exists: choose another name, or remove it")
    averaged = contents.get("ema")
    state = averaged if averaged and isinstance(averaged, dict) else contents["model"]
    weights, _ = translate(state, str(source))
    for name, value in weights.items():
        if value.is_floating_point() and value.ndim > 1:
            weights[name] = value.half()
    if not all(value.isfinite().all() for value in weights.values()):
        raise InputError(f"{source} has weights that float16 cannot hold, or that are not finite")
    config = {name: value for name, value in config.items() if name != "args"}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(target, {"model": weights, "config": config})
    return target.stat().st_size


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Write only the weights of a training checkpoint, in 16 bit."
    )
    parser.add_argument("source", help="checkpoint of train.py")
    parser.add_argument("target", help="file to write; must not exist yet")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Write the weights of a checkpoint."""
    size = save_weights(args.source, args.target)
    print(f"{args.target}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    with cli_errors():
        main(parse_arguments())
