"""Weights in and out: our own checkpoints, the official detectron2 files, torchvision and detector backbones.

    report = load_weights(model, "grattvis_r50_ovis.pth")    # or a .pkl, our .pt, or a state dict; report.missing, ...
    model, config = model_from_checkpoint("runs/toy/last.pt")

    python checkpoint.py runs/small/last.pt weights/small.pt  # the weights alone, in 16 bit, to hand on

Official files (GRAtt-VIS, GenVIS, VITA, Mask2Former; upstream names as in their state dicts) are translated by the table
RENAMES. Files are read by reading/checkpoints.py, which executes nothing.

A checkpoint of ours is one .pt: model, optimizer, schedule, scaler, step, and the config (arguments, categories). It needs
no random states: every training step seeds its generators from (seed, step, rank), see train.py.
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
    # files of Mask2Former's first weight format
    (r"^sem_seg_head\.(?!predictor|pixel_decoder)", "sem_seg_head.pixel_decoder."),
    (r"^(sem_seg_head\.predictor\.)static_query", r"\1query_feat"),
    # ResNet, detectron2 -> torchvision
    (r"^backbone\.stem\.conv1\.norm\.", "backbone.bn1."),
    (r"^backbone\.stem\.conv1\.", "backbone.conv1."),
    (r"^backbone\.res(\d)\.(\d+)\.shortcut\.norm\.", lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.downsample.1."),
    (r"^backbone\.res(\d)\.(\d+)\.shortcut\.", lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.downsample.0."),
    (r"^backbone\.res(\d)\.(\d+)\.conv(\d)\.norm\.", lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.bn{m[3]}."),
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
    (r"^pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.self_attn\.", r"pixel_decoder.layers.\1.attention."),
    (r"^pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.norm1\.", r"pixel_decoder.layers.\1.norm."),
    (r"^pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.norm2\.", r"pixel_decoder.layers.\1.feed_forward.norm."),
    (r"^pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.linear", r"pixel_decoder.layers.\1.feed_forward.linear"),
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
    (r"\.transformer_cross_attention_layers\.(\d+)\.multihead_attn\.", r".\1.cross_attention.attention."),
    (r"\.transformer_cross_attention_layers\.(\d+)\.", r".\1.cross_attention."),
    (r"\.transformer_ffn_layers\.(\d+)\.", r".\1.feed_forward."),
    (r"^tracker\.enc_self_attn\.(\d+)\.self_attn\.", r"tracker.encoder.\1.self_attention.attention."),
    (r"^tracker\.enc_self_attn\.(\d+)\.", r"tracker.encoder.\1.self_attention."),
    (r"^tracker\.enc_ffn\.(\d+)\.", r"tracker.encoder.\1.feed_forward."),
    (r"^((?:frame_decoder|tracker)\.mask_embed)\.layers\.(\d)\.", lambda m: f"{m[1]}.{2 * int(m[2])}."),
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
# Not weights of this model: constants of the losses and of the input, classifiers of ImageNet
# backbones, what PyTorch keeps beside an average or a module.
IGNORED = re.compile(r"(criterion\.empty_weight|attn_mask|_extra_state)$|^pixel_(mean|std)$"
                     r"|^n_averaged$|^backbone\.(fc|head|norm|stem\.fc)\.")
# Under these names training tools keep the state dict, between other things.
WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "net")
# What DataParallel, torch.compile, FSDP and activation checkpointing put into names, anywhere.
WRAPPING_MODULES = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKBONE_ROOTS = ("stem.", "conv1.", "patch_embed.", "features.")  # a backbone alone, without "backbone." in front
MODEL_ROOTS = ("backbone.", "pixel_decoder.", "frame_decoder.", "tracker.", "sem_seg_head.", "vita_module.")
SHIPPED_WEIGHTS = Path(__file__).with_name("weights") / "small.pt"  # trained on synthetic suites; found from any folder
MOST_PIXELS = 10_000  # of a frame's short side
MOST_OPTION = {"frame_layers": sys.maxsize, "pixel_layers": sys.maxsize, "swin_window": 1000,
               "tracker_decoder_layers": sys.maxsize, "tracker_encoder_layers": sys.maxsize}
CLASS_LAYERS = ("frame_decoder.class_embed.", "tracker.class_embed.")


@dataclass
class LoadReport:
    """What load_weights did, by our parameter names (`ignored`: by the file's)."""
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)      # in the model, not in the file: left as they were
    unexpected: list[str] = field(default_factory=list)   # in the file, not in the model: not used
    ignored: list[str] = field(default_factory=list)      # constants that no model holds
    reset: list[str] = field(default_factory=list)        # class layers of another class count, left as they were

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} entries loaded"]
        for name in ("missing", "unexpected", "reset"):
            entries = getattr(self, name)
            if entries:
                shown = ", ".join(entries[:4]) + (", ..." if len(entries) > 4 else "")
                parts.append(f"{len(entries)} {name} ({shown})")
        return "; ".join(parts)


def find_state_dict(contents: dict, levels: int = 3) -> dict:
    """The named tensors in a file's contents, which may be under one of WRAPPERS or several."""
    inside = [find_state_dict(contents[wrapper], levels - 1) for wrapper in WRAPPERS
              if levels and isinstance(contents.get(wrapper), dict)]
    for candidate in (*inside, contents):
        if any(isinstance(value, (Tensor, np.ndarray)) for value in candidate.values()):
            return candidate
    return inside[0] if inside else contents


def strip_prefixes(name: str) -> str:
    """A name without what training tools add to it: "module.model._orig_mod.a.b" -> "a.b"."""
    return re.sub(r"^(model\.)+", "", WRAPPING_MODULES.sub("", name))


def translate(contents: dict,
              source: str = "the state dict") -> tuple[dict[str, Tensor], list[str]]:
    """A file's contents -> ({our name: tensor}, ignored names).

    Ignored are constants, and what is no tensor, such as the number of an epoch. InputError if no
    entry belongs to this model family, or if what has the name of a weight is no tensor.
    """
    entries = [(strip_prefixes(name), value)
               for name, value in find_state_dict(contents).items() if isinstance(name, str)]
    prefix = "backbone." if any(name.startswith(BACKBONE_ROOTS) for name, _ in entries) else ""
    if not any((prefix + name).startswith(MODEL_ROOTS) for name, _ in entries):
        whole = [part.name for part in map(contents.get, WRAPPERS) if isinstance(part, Placeholder)]
        if whole:
            raise InputError(f"{source} holds a whole {whole[0]}: save its state_dict() instead")
        example = shown(entries[0][0]) if entries else None
        raise InputError(f"{source} is no checkpoint of this model family: none of its entries is "
                         f"known, it has {len(entries)}, such as {example}")
    translated, ignored = {}, []
    for entry, value in entries:
        if not entry.isprintable():
            raise InputError(f"{source} has an entry called {shown(entry)}, which is no name")
        name = prefix + entry
        weight = isinstance(value, (Tensor, np.ndarray, np.generic))
        named_like_one = "." in entry and name.startswith(MODEL_ROOTS)
        if IGNORED.search(name) or not (weight or named_like_one):
            ignored.append(name)
            continue
        for pattern, replacement in RENAMES:
            name = pattern.sub(replacement, name)
        if name in translated:
            raise InputError(f"{source} has several entries for {name}, one called {entry}")
        value = as_tensor(value, f"{source}: entry {entry}")
        # torchvision keeps this table flat
        translated[name] = value.flatten() if name.endswith("relative_position_index") else value
    return translated, ignored


def as_tensor(value, label: str) -> Tensor:
    """An array or a number of NumPy as a tensor; InputError for what is no tensor."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        try:
            return torch.from_numpy(np.asarray(value, order="C"))  # which has no negative strides
        except TypeError as error:
            raise InputError(f"{label} is {value.dtype}, which PyTorch does not have") from error
    kind = value.name if isinstance(value, Placeholder) else type(value).__name__
    raise InputError(f"{label} is a {kind}" + ", not a tensor" * (not kind.startswith("tensor")))


def load_weights(model: nn.Module, source: str | Path | dict, reset_classes: bool = False) -> LoadReport:
    """Load a file (ours, official .pth or .pkl, a backbone alone) or a state dict into `model`, in place.

    What the file lacks keeps its value and is listed in report.missing (a Mask2Former file has no tracker, a VITA file no
    gate); what the model lacks is listed in report.unexpected. A shape that does not fit is an InputError and changes
    nothing, except that reset_classes=True leaves class layers of another class count as they were (report.reset).
    """
    label = "the state dict" if isinstance(source, dict) else str(source)
    weights, ignored = translate(source if isinstance(source, dict) else read_file(source), label)
    report = LoadReport(ignored=ignored)
    own = model.state_dict()
    for name in list(weights):
        if name not in own:  # frozen norms count no batches
            (report.ignored if name.endswith("num_batches_tracked") else report.unexpected).append(name)
        elif weights[name].shape != own[name].shape:
            theirs, ours = tuple(weights[name].shape), tuple(own[name].shape)
            if name.startswith(CLASS_LAYERS) and theirs[1:] == ours[1:]:
                if not reset_classes:
                    raise InputError(f"{label} is for {theirs[0] - 1} classes, the model for {ours[0] - 1}: build the model "
                                     f"with that number, or start the class layers anew (reset_classes, --reset-classes)")
                report.reset.append(name)
            else:
                raise InputError(f"{label} does not fit the model: {name} is {theirs} there and {ours} here")
        else:
            check_dtype(weights[name], own[name], f"{label}: entry {name}")
            report.loaded.append(name)
            continue
        del weights[name]
    report.missing = [name for name in own if name not in weights and name not in report.reset
                      and not name.endswith("num_batches_tracked")]
    if not report.loaded:
        raise InputError(f"{label}: none of its {len(report.unexpected)} entries is part of this model")
    model.load_state_dict(weights, strict=False)
    return report


def check_dtype(theirs: Tensor, ours: Tensor, label: str) -> None:
    """InputError unless the values can be taken as they are: for weights, real numbers of 16 bit or
    more, for counters and tables of indices, whole numbers."""
    dtype = str(theirs.dtype).removeprefix("torch.")
    real = theirs.dtype in FLOAT_DTYPES
    if ours.is_floating_point():
        if not real:
            raise InputError(f"{label} is {dtype}: weights must be float16, bfloat16, float32 or "
                             "float64")
    elif theirs.is_floating_point():  # as .half() of all entries makes them
        if not real or theirs.dtype == torch.bfloat16 or not torch.equal(theirs, theirs.round()):
            raise InputError(f"{label} is {dtype}: it must hold whole numbers, exactly")
    elif theirs.is_complex() or theirs.dtype == torch.bool:
        raise InputError(f"{label} is {dtype}: it must hold whole numbers")


def load_backbone(model: GRAttVIS, source: str, name: str) -> LoadReport:
    """`source`: a local file, or "imagenet" for torchvision's own weights of backbone `name` (downloaded on first use), which
    are those of detectron2://ImageNetPretrained/torchvision/; upstream's R-101 recipe names the file of R-50 there."""
    if source == "imagenet" or source.startswith("detectron2://ImageNetPretrained/torchvision/"):
        from torchvision.models import get_model_weights
        try:
            weights = get_model_weights(name)["IMAGENET1K_V1"].get_state_dict(progress=True)
        except (ValueError, KeyError) as error:
            raise InputError(f"torchvision has no ImageNet weights for {name}") from error
        except OSError as error:
            raise InputError(f"torchvision's weights for {name} could not be downloaded ({error}); give a file") from error
    else:
        weights = read_file(source)
    report = load_weights(model, weights)
    report.missing = [entry for entry in report.missing if entry.startswith("backbone.")]
    if any("running_mean" in entry for entry in report.unexpected):
        raise InputError(f"{source} holds batch norms and the model's backbone does not: use norm 'frozen' or 'batch'")
    return report


def read_propagation(names) -> str | None:
    """The propagation mode that (our) parameter names imply; None where they cannot tell "plain" from "clip"."""
    gated = "tracker.gate_proj.weight" in names
    memory = "tracker.memory_key.weight" in names
    return {(True, True): "gated+memory", (True, False): "gated", (False, True): "memory"}.get((gated, memory))


def model_from_checkpoint(path: str | Path, preset: str | None = None, propagation: str | None = None,
                          **overrides) -> tuple[GRAttVIS, dict]:
    """Build the model that a file was made by and load it; returns the model (evaluation mode) and the file's config.

    Our files say all of it; official ones need the preset, and the propagation where the names cannot tell ("plain" or
    "clip"). InputError where an argument contradicts the file, or where anything of the model is missing.
    """
    contents = read_file(path)
    config = read_config(contents, path)
    weights, _ = translate(contents, str(path))
    classes = weights.get("tracker.class_embed.weight")
    if classes is None or classes.ndim != 2 or not classes.numel():
        raise InputError(f"{path} has no tracker: it can start a training (--init), but segments "
                         "no videos")
    preset = stated("preset", preset, config.get("preset"), path)
    if preset is None:
        raise InputError(f"{path} does not say its preset: give one of {', '.join(PRESETS)} "
                         "(--preset)")
    found = config.get("propagation") or read_propagation(weights)
    propagation = stated("propagation", propagation, found, path)
    if propagation is None:
        raise InputError(f'{path} may be "plain" or "clip", its names cannot tell: say which '
                         "(--propagation)")
    options = config.get("model_options", {})
    for name, value in overrides.items():
        value = stated(name.replace("_", " "), value, options.get(name), path)
        options = options | {name: value}
    refusal = f"{path} asks for a model that cannot be built: "
    if any(size > len(weights) for name, size in options.items() if name.endswith("_layers")):
        raise InputError(f"{refusal}it has more layers than the file has entries")
    build = partial(build_model, preset, len(classes) - 1, propagation, **options)
    try:
        with torch.device("meta"):  # takes no memory
            outline = build()
    except ValueError as error:     # names that nothing has, sizes that do not go together
        raise InputError(f"{refusal}{error}") from error
    needed = sum(value.numel() for value in outline.state_dict().values())
    held = sum(value.numel() for value in weights.values())
    if needed > 2 * held:           # a little less gets a report of what is missing
        raise InputError(f"{refusal}it has {needed} numbers, the file {held}")
    model = build().eval()
    report = load_weights(model, contents)
    if report.missing or report.unexpected:
        raise InputError(f"{path} does not fit a {preset} with {propagation} propagation: {report}")
    return model, config


def read_config(contents: dict, path: str | Path) -> dict:
    """The config of a file of ours; {} of another, whose config names no preset.

    InputError if it is not as train.py writes it: every value has the type and the range that the
    programs rely on.
    """
    config = contents.get("config")
    if not isinstance(config, dict) or config.get("preset") is None:
        return {}
    options, categories = config.get("model_options", {}), config.get("categories", [])
    valid = {
        "preset": is_name(config["preset"]),
        "propagation": is_name(config.get("propagation", "")),
        "test_short_side": is_whole(config.get("test_short_side", 1), 1, MOST_PIXELS),
        "categories": isinstance(categories, (list, tuple)) and all(
            isinstance(category, (list, tuple)) and len(category) == 2 and is_name(category[1])
            for category in categories),
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
    """The contents of a checkpoint that train.py can go on from; InputError if it is none."""
    contents = read_file(path)
    config = read_config(contents, path)
    if "args" not in config or not isinstance(contents.get("optimizer"), dict) or \
            not is_whole(contents.get("step"), 0, sys.maxsize):
        raise InputError(f"{path} is no checkpoint of a training run: start from it with --init")
    return contents


def is_name(value) -> bool:
    """Whether it is text of one line; invisible joiners are part of words in some scripts."""
    return isinstance(value, str) and not any(
        unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in value)


def is_whole(value, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def check_options(options: dict, path: str | Path) -> None:
    """InputError unless all are options of the model, of the type that it states and in range."""
    types = option_types()
    for name, value in options.items():
        if name not in types or name in ("num_classes", "propagation", "return"):
            raise InputError(f"{path} asks for a model that cannot be built: GRAttVIS has no "
                             f"option {name}")
        least = 0 if name in ("window", "pixel_layers", "tracker_encoder_layers") else 1
        most = MOST_OPTION.get(name, 10 ** 6)
        takes_numbers = isinstance(least, types[name])
        if type(value) is int:
            valid = takes_numbers and least <= value <= most
        else:  # neither a float nor a bool is a number here
            valid = isinstance(value, (str, type(None))) and isinstance(value, types[name])
        if not valid:
            expected = f"a whole number from {least} to {most}" if takes_numbers else "a name"
            raise InputError(f"{path} asks for a model that cannot be built: {name} is "
                             f"{shown(value)}, not {expected}")


def default_short_side(config: dict, preset: str | None) -> int:
    """Short side of the frames, pixels, that a model reads where nobody asks for another: what its run was to be tested at, or of a file
    that does not say it the official side of the preset (96 for those on synthetic videos)."""
    return config.get("test_short_side") or TEST_SIDES[config.get("preset") or preset]


def stated(what: str, asked: str | None, found: str | None, path: str | Path) -> str | None:
    """The value that was asked for or found in the file; a contradiction between the two is an InputError."""
    if asked and found and asked != found:
        raise InputError(f"{path} was made with {what} {found!r}, not {asked!r}")
    return asked or found


def save_checkpoint(path: str | Path, contents: dict) -> None:
    """Write `contents` (tensors, numbers, strings, containers) under a temporary name, then rename: never half a file."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(contents, file)
        except RuntimeError as error:                              # PyTorch's, as it closes what a full disk has not taken
            raise error.__context__ if isinstance(error.__context__, OSError) else error
        file.flush()
        os.fsync(file.fileno())                                    # or a power cut could keep the name and lose the bytes


def save_weights(source: str | Path, target: str | Path) -> int:
    """Write what another program needs of a training checkpoint, and no more; returns the bytes.

    The averaged weights where there are some; tables and matrices in float16, norms and biases as
    they are. InputError if the target exists, or a weight is too large for float16.
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
    weights = {name: value.half() if value.is_floating_point() and value.ndim > 1 else value
               for name, value in weights.items()}
    if not all(value.isfinite().all() for value in weights.values()):
        raise InputError(f"{source} has weights that float16 cannot hold, or that are not finite")
    target.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(target, {"model": weights, "config": {name: value for name, value in config.items() if name != "args"}})
    return target.stat().st_size


def main() -> None:
    """Write the weights of a checkpoint as the command line says."""
    parser = argparse.ArgumentParser(description="Write the weights of a training checkpoint alone, in 16 bit.")
    parser.add_argument("source", help="checkpoint of train.py")
    parser.add_argument("target", help="file to write; must not exist yet")
    args = parser.parse_args()
    with cli_errors():
        print(f"{args.target}: {save_weights(args.source, args.target) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
