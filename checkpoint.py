"""Load and save weights.

    report = load_weights(model, "grattvis_r50_ovis.pth")  # or .pkl, our .pt, or a state dict
    model, config = model_from_checkpoint("runs/toy/last.pt")

    python checkpoint.py runs/small/last.pt weights/small.pt  # only the weights, in 16 bit

Official files (GRAtt-VIS, GenVIS, VITA, Mask2Former) are translated by the table RENAMES. Backbones
of detectron2 and torchvision are supported too. reading/checkpoints.py reads the files without
executing any code in them.

Our checkpoints are one .pt file: model, optimizer, schedule, scaler, step, and the config
(arguments, categories). No random state is stored, because every training step seeds its generators
from (seed, step, rank), see train.py.
"""
import argparse
import os
import re
import sys
import unicodedata
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from model import PRESETS, TEST_SIDES, GRAttVIS, build_model, option_types
from reading.checkpoints import Placeholder, read_file
from runtime.errors import InputError, cli_errors, shown
from runtime.files import atomic_write

RENAMES = [(re.compile(pattern), replacement) for pattern, replacement in [
    # Mask2Former's first weight format
    (r"^sem_seg_head\.(?!predictor|pixel_decoder)", "sem_seg_head.pixel_decoder."),
    (r"^(sem_seg_head\.predictor\.)static_query", r"\1query_feat"),
    # ResNet, detectron2 -> torchvision
    (r"^backbone\.stem\.conv1\.norm\.", "backbone.bn1."),
    (r"^backbone\.stem\.conv1\.", "backbone.conv1."),
    (r"^backbone\.res(\d)\.(\d+)\.shortcut\.norm\.",
     lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.downsample.1."),
    (r"^backbone\.res(\d)\.(\d+)\.shortcut\.",
     lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.downsample.0."),
    (r"^backbone\.res(\d)\.(\d+)\.conv(\d)\.norm\.",
     lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.bn{m[3]}."),
    (r"^backbone\.res(\d)\.", lambda m: f"backbone.layer{int(m[1]) - 1}."),
    # Swin, detector -> torchvision
    (r"^backbone\.patch_embed\.proj\.", "backbone.features.0.0."),
    (r"^backbone\.patch_embed\.norm\.", "backbone.features.0.2."),
    (r"^backbone\.layers\.(\d)\.blocks\.", lambda m: f"backbone.features.{2 * int(m[1]) + 1}."),
    (r"^backbone\.layers\.(\d)\.downsample\.", lambda m: f"backbone.features.{2 * int(m[1]) + 2}."),
    (r"^(backbone\.features\.\d\.\d+\.mlp\.)fc1\.", r"\g<1>0."),
    (r"^(backbone\.features\.\d\.\d+\.mlp\.)fc2\.", r"\g<1>3."),
    (r"^backbone\.norm(\d)\.", r"backbone.norms.\1."),
    # pixel decoder
    (r"^sem_seg_head\.pixel_decoder\.", "pixel_decoder."),
    (r"^pixel_decoder\.transformer\.level_embed", "pixel_decoder.level_embed"),
    (r"^pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.self_attn\.",
     r"pixel_decoder.layers.\1.attention."),
    (r"^pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.norm1\.",
     r"pixel_decoder.layers.\1.norm."),
    (r"^pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.norm2\.",
     r"pixel_decoder.layers.\1.feed_forward.norm."),
    (r"^pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.linear",
     r"pixel_decoder.layers.\1.feed_forward.linear"),
    (r"^pixel_decoder\.adapter_1\.norm\.", "pixel_decoder.lateral.1."),
    (r"^pixel_decoder\.adapter_1\.", "pixel_decoder.lateral.0."),
    (r"^pixel_decoder\.layer_1\.norm\.", "pixel_decoder.output.1."),
    (r"^pixel_decoder\.layer_1\.", "pixel_decoder.output.0."),
    # frame decoder and tracker: one family of layers
    (r"^sem_seg_head\.predictor\.", "frame_decoder."),
    (r"^vita_module\.", "tracker."),
    (r"^frame_decoder\.transformer_", "frame_decoder.layers.transformer_"),
    (r"^tracker\.transformer_", "tracker.decoder.transformer_"),
    (r"\.transformer_self_attention_layers\.(\d+)\.self_attn\.", r".\1.self_attention.attention."),
    (r"\.transformer_self_attention_layers\.(\d+)\.", r".\1.self_attention."),
    (r"\.transformer_cross_attention_layers\.(\d+)\.multihead_attn\.",
     r".\1.cross_attention.attention."),
    (r"\.transformer_cross_attention_layers\.(\d+)\.", r".\1.cross_attention."),
    (r"\.transformer_ffn_layers\.(\d+)\.", r".\1.feed_forward."),
    (r"^tracker\.enc_self_attn\.(\d+)\.self_attn\.",
     r"tracker.encoder.\1.self_attention.attention."),
    (r"^tracker\.enc_self_attn\.(\d+)\.", r"tracker.encoder.\1.self_attention."),
    (r"^tracker\.enc_ffn\.(\d+)\.", r"tracker.encoder.\1.feed_forward."),
    (r"^((?:frame_decoder|tracker)\.mask_embed)\.layers\.(\d)\.",
     lambda m: f"{m[1]}.{2 * int(m[2])}."),
    (r"^tracker\.vita_mask_features\.", "tracker.mask_features."),
    (r"^tracker\.fq_pos\.", "tracker.frame_query_embed."),
    (r"^tracker\.input_proj_dec\.", "tracker.input_proj."),
    (r"^tracker\.sim_embed_frame\.", "tracker.frame_similarity."),
    (r"^tracker\.sim_embed_clip\.", "tracker.clip_similarity."),
    (r"^tracker\.prop_instance\.", "tracker.gate_proj."),
    (r"^tracker\.pre_memory_embed_k\.", "tracker.memory_key."),
    (r"^tracker\.pre_memory_embed_v\.", "tracker.memory_value."),
    (r"^tracker\.pre_query_embed_k\.", "tracker.query_key."),
    (r"^tracker\.pre_query_embed_v\.", "tracker.query_value."),
]]
# Not weights of this model: constants of the losses and the input, classifiers of ImageNet
# backbones, and bookkeeping of PyTorch.
IGNORED = re.compile(r"(criterion\.empty_weight|attn_mask|_extra_state)$|^pixel_(mean|std)$"
                     r"|^n_averaged$|^backbone\.(fc|head|norm|stem\.fc)\.")
# Keys under which training tools store the state dict.
WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "net")
# Name components added by DataParallel, torch.compile, FSDP and activation checkpointing.
WRAPPING_MODULES = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKBONE_ROOTS = ("stem.", "conv1.", "patch_embed.", "features.")  # in files of a backbone alone
MODEL_ROOTS = (
    "backbone.", "pixel_decoder.", "frame_decoder.", "tracker.", "sem_seg_head.", "vita_module.",
)
SHIPPED_WEIGHTS = Path(__file__).with_name("weights") / "small.pt"  # trained on synthetic suites
MAX_SHORT_SIDE = 10_000  # pixels
MAX_OPTION = {
    "frame_layers": sys.maxsize,
    "pixel_layers": sys.maxsize,
    "swin_window": 1000,
    "tracker_decoder_layers": sys.maxsize,
    "tracker_encoder_layers": sys.maxsize,
}
CLASS_LAYERS = ("frame_decoder.class_embed.", "tracker.class_embed.")


@dataclass
class LoadReport:
    """The outcome of load_weights, by our parameter names (`ignored`: by those of the file)."""
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)     # not in the file; unchanged in the model
    unexpected: list[str] = field(default_factory=list)  # in the file but not in the model
    ignored: list[str] = field(default_factory=list)     # constants that are no parameters
    reset: list[str] = field(default_factory=list)       # class layers of another size; unchanged

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} entries loaded"]
        for name in ("missing", "unexpected", "reset"):
            entries = getattr(self, name)
            if entries:
                shown = ", ".join(entries[:4]) + (", ..." if len(entries) > 4 else "")
                parts.append(f"{len(entries)} {name} ({shown})")
        return "; ".join(parts)


def find_state_dict(contents: dict, levels: int = 3) -> dict:
    """The state dict in the contents of a file, which may be nested under WRAPPERS."""
    nested = [
        find_state_dict(contents[wrapper], levels - 1)
        for wrapper in WRAPPERS
        if levels and isinstance(contents.get(wrapper), dict)
    ]
    for candidate in (*nested, contents):
        if any(isinstance(value, (Tensor, np.ndarray)) for value in candidate.values()):
            return candidate
    return nested[0] if nested else contents


def strip_prefixes(name: str) -> str:
    """Remove what training tools add to names: "module.model._orig_mod.a.b" -> "a.b"."""
    return re.sub(r"^(model\.)+", "", WRAPPING_MODULES.sub("", name))


def translate(contents: dict,
              source: str = "the state dict") -> tuple[dict[str, Tensor], list[str]]:
    """Translate the contents of a file to our parameter names.

    Returns {our name: tensor} and the names that are ignored: constants, and entries that are not
    tensors, such as the epoch. Raises InputError if no entry belongs to this model family, or if
    an entry with the name of a weight is not a tensor.
    """
    entries = [
        (strip_prefixes(name), value)
        for name, value in find_state_dict(contents).items()
        if isinstance(name, str)
    ]
    prefix = "backbone." if any(name.startswith(BACKBONE_ROOTS) for name, _ in entries) else ""
    if not any((prefix + name).startswith(MODEL_ROOTS) for name, _ in entries):
        raise unknown_file(contents, entries, source)
    translated, ignored = {}, []
    for entry, value in entries:
        if not entry.isprintable():
            raise InputError(f"{source} has an entry called {shown(entry)}, which is no name")
        name = prefix + entry
        is_weight = isinstance(value, (Tensor, np.ndarray, np.generic))
        has_weight_name = "." in entry and name.startswith(MODEL_ROOTS)
        if IGNORED.search(name) or not (is_weight or has_weight_name):
            ignored.append(name)
            continue
        for pattern, replacement in RENAMES:
            name = pattern.sub(replacement, name)
        if name in translated:
            raise InputError(f"{source} has several entries for {name}, one called {entry}")
        value = as_tensor(value, f"{source}: entry {entry}")
        if name.endswith("relative_position_index"):
            value = value.flatten()  # as in torchvision
        translated[name] = value
    return translated, ignored


def unknown_file(contents: dict, entries: list[tuple], source: str) -> InputError:
    """The error for a file without any known entry."""
    for wrapper in WRAPPERS:
        value = contents.get(wrapper)
        if isinstance(value, Placeholder):
            return InputError(f"{source} holds a whole {value.name}: save its state_dict() instead")
    example = shown(entries[0][0]) if entries else None
    return InputError(f"{source} is no checkpoint of this model family: none of its entries is "
                      f"known, it has {len(entries)}, such as {example}")


def as_tensor(value, label: str) -> Tensor:
    """Convert a NumPy array or scalar to a tensor; InputError for anything else."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        try:
            return torch.from_numpy(np.asarray(value, order="C"))  # no negative strides
        except TypeError as error:
            raise InputError(f"{label} is {value.dtype}, which PyTorch does not have") from error
    kind = value.name if isinstance(value, Placeholder) else type(value).__name__
    raise InputError(f"{label} is a {kind}" + ", not a tensor" * (not kind.startswith("tensor")))


def load_weights(model: nn.Module, source: str | Path | dict, reset_classes: bool = False
                 ) -> LoadReport:
    """Load weights into a model, in place.

    Parameters that the file lacks keep their values (report.missing): a Mask2Former file has no
    tracker, a VITA file no gate. Entries that the model lacks are not used (report.unexpected).

    Args:
        source: a file (ours, official .pth or .pkl, or a backbone alone) or a state dict.
        reset_classes: skip class layers of another number of classes (report.reset) instead of
            raising InputError.

    Raises InputError if a shape or dtype does not fit; the model is then unchanged.
    """
    label = "the state dict" if isinstance(source, dict) else str(source)
    weights, ignored = translate(source if isinstance(source, dict) else read_file(source), label)
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
        name for name in parameters
        if name not in fitting
        and name not in report.reset
        and not name.endswith("num_batches_tracked")
    ]
    if not report.loaded:
        raise InputError(f"{label}: none of its {len(report.unexpected)} entries is part of this "
                         "model")
    model.load_state_dict(fitting, strict=False)
    return report


def check_class_layer(name: str, theirs: torch.Size, ours: torch.Size, label: str,
                      reset_classes: bool) -> None:
    """InputError unless shapes differ only in the number of classes, and reset_classes is set."""
    theirs, ours = tuple(theirs), tuple(ours)
    if not name.startswith(CLASS_LAYERS) or theirs[1:] != ours[1:]:
        raise InputError(f"{label} does not fit the model: {name} is {theirs} there and {ours} "
                         "here")
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
            raise InputError(f"{label} is {dtype}: weights must be float16, bfloat16, float32 or "
                             "float64")
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
        weights = read_file(source)
    report = load_weights(model, weights)
    report.missing = [entry for entry in report.missing if entry.startswith("backbone.")]
    if any("running_mean" in entry for entry in report.unexpected):
        raise InputError(f"{source} holds batch norms and the model's backbone does not: use norm "
                         "'frozen' or 'batch'")
    return report


def download_imagenet_weights(name: str) -> dict:
    """torchvision's ImageNet weights of a backbone."""
    from torchvision.models import get_model_weights
    try:
        return get_model_weights(name)["IMAGENET1K_V1"].get_state_dict(progress=True)
    except (ValueError, KeyError) as error:
        raise InputError(f"torchvision has no ImageNet weights for {name}") from error
    except OSError as error:
        raise InputError(f"torchvision's weights for {name} could not be downloaded ({error}); "
                         "give a file") from error


def find_propagation(names) -> str | None:
    """The propagation mode implied by (our) parameter names; None for "plain" or "clip"."""
    gated = "tracker.gate_proj.weight" in names
    memory = "tracker.memory_key.weight" in names
    if gated:
        return "gated+memory" if memory else "gated"
    return "memory" if memory else None


def model_from_checkpoint(path: str | Path, preset: str | None = None,
                          propagation: str | None = None, **overrides) -> tuple[GRAttVIS, dict]:
    """Build the model of a checkpoint and load its weights.

    Args:
        preset: required for official files; our files contain it.
        propagation: required if the parameter names do not imply it ("plain" or "clip").
        overrides: options of the model, see build_model.

    Returns the model in evaluation mode, and the config of the file. Raises InputError if an
    argument contradicts the file, or if the file lacks any parameter of the model.
    """
    contents = read_file(path)
    config = read_config(contents, path)
    weights, _ = translate(contents, str(path))
    class_weight = weights.get("tracker.class_embed.weight")
    if class_weight is None or class_weight.ndim != 2 or not class_weight.numel():
        raise InputError(f"{path} has no tracker: it can start a training (--init), but segments "
                         "no videos")
    preset = agreed_value("preset", preset, config.get("preset"), path)
    if preset is None:
        raise InputError(f"{path} does not say its preset: give one of {', '.join(PRESETS)} "
                         "(--preset)")
    in_file = config.get("propagation") or find_propagation(weights)
    propagation = agreed_value("propagation", propagation, in_file, path)
    if propagation is None:
        raise InputError(f'{path} may be "plain" or "clip", its names cannot tell: say which '
                         "(--propagation)")
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
            raise InputError(f"{path} holds a config that training did not write: {name} is "
                             f"{shown(config[name])}")
    check_options(options, path)
    return config


def read_run(path: str | Path) -> dict:
    """The contents of a checkpoint that train.py can resume; InputError for other files."""
    contents = read_file(path)
    config = read_config(contents, path)
    has_optimizer = isinstance(contents.get("optimizer"), dict)
    has_step = is_integer(contents.get("step"), 0, sys.maxsize)
    if "args" not in config or not has_optimizer or not has_step:
        raise InputError(f"{path} is no checkpoint of a training run: start from it with --init")
    return contents


def is_name(value) -> bool:
    """Whether a value is text on one line. (Some scripts use invisible joiners inside words.)"""
    return isinstance(value, str) and not any(
        unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in value)


def is_integer(value, minimum: int, maximum: int) -> bool:
    return type(value) is int and minimum <= value <= maximum


def are_categories(value) -> bool:
    """Whether a value is a list of pairs (id, name)."""
    return isinstance(value, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and is_name(pair[1]) for pair in value)


def check_options(options: dict, path: str | Path) -> None:
    """InputError unless all are options of the model, of the right type and in range."""
    types = option_types()
    for name, value in options.items():
        if name not in types or name in ("num_classes", "propagation", "return"):
            raise InputError(f"{path} asks for a model that cannot be built: GRAttVIS has no "
                             f"option {name}")
        minimum = 0 if name in ("window", "pixel_layers", "tracker_encoder_layers") else 1
        maximum = MAX_OPTION.get(name, 10 ** 6)
        accepts_int = isinstance(minimum, types[name])
        if type(value) is int:  # excludes bool
            valid = accepts_int and minimum <= value <= maximum
        else:
            valid = isinstance(value, (str, type(None))) and isinstance(value, types[name])
        if not valid:
            expected = f"a whole number from {minimum} to {maximum}" if accepts_int else "a name"
            raise InputError(f"{path} asks for a model that cannot be built: {name} is "
                             f"{shown(value)}, not {expected}")


def default_short_side(config: dict, preset: str | None) -> int:
    """The test size of a model in pixels (short side), if none is given.

    The test size of its training run or, for files without it, the official size of the preset
    (96 for presets trained on synthetic videos).
    """
    return config.get("test_short_side") or TEST_SIDES[config.get("preset") or preset]


def agreed_value(what: str, given: str | None, in_file: str | None, path: str | Path
                 ) -> str | None:
    """The given value, or that of the file; InputError if they contradict each other."""
    if given and in_file and given != in_file:
        raise InputError(f"{path} was made with {what} {in_file!r}, not {given!r}")
    return given or in_file


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


def main() -> None:
    """Write the weights of a checkpoint as the command line says."""
    parser = argparse.ArgumentParser(
        description="Write only the weights of a training checkpoint, in 16 bit.")
    parser.add_argument("source", help="checkpoint of train.py")
    parser.add_argument("target", help="file to write; must not exist yet")
    args = parser.parse_args()
    with cli_errors():
        size = save_weights(args.source, args.target)
        print(f"{args.target}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
