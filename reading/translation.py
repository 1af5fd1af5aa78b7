"""Translates the entries of official checkpoints to our parameter names, by the table RENAMES.

Files of GRAtt-VIS, GenVIS, VITA and Mask2Former, and backbones of detectron2 and torchvision. Ours
stay as they are.
"""

import re
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from reading.checkpoints import Placeholder
from runtime.errors import InputError, shown

RENAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        # Mask2Former's first weight format
        (r"^sem_seg_head\.(?!predictor|pixel_decoder)", "sem_seg_head.pixel_decoder."),
        (r"^(sem_seg_head\.predictor\.)static_query", r"\1query_feat"),
        # ResNet, detectron2 -> torchvision
        (r"^backbone\.stem\.conv1\.norm\.", "backbone.bn1."),
        (r"^backbone\.stem\.conv1\.", "backbone.conv1."),
        (
            r"^backbone\.res(\d)\.(\d+)\.shortcut\.norm\.",
            lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.downsample.1.",
        ),
        (
            r"^backbone\.res(\d)\.(\d+)\.shortcut\.",
            lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.downsample.0.",
        ),
        (
            r"^backbone\.res(\d)\.(\d+)\.conv(\d)\.norm\.",
            lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.bn{m[3]}.",
        ),
        (r"^backbone\.res(\d)\.", lambda m: f"backbone.layer{int(m[1]) - 1}."),
        # Swin, detector -> torchvision
        (r"^backbone\.patch_embed\.proj\.", "backbone.features.0.0."),
        (r"^backbone\.patch_embed\.norm\.", "backbone.features.0.2."),
        (r"^backbone\.layers\.(\d)\.blocks\.", lambda m: f"backbone.features.{2 * int(m[1]) + 1}."),
        (
            r"^backbone\.layers\.(\d)\.downsample\.",
            lambda m: f"backbone.features.{2 * int(m[1]) + 2}.",
        ),
        (r"^(backbone\.features\.\d\.\d+\.mlp\.)fc1\.", r"\g<1>0."),
        (r"^(backbone\.features\.\d\.\d+\.mlp\.)fc2\.", r"\g<1>3."),
        (r"^backbone\.norm(\d)\.", r"backbone.norms.\1."),
        # pixel decoder
        (r"^sem_seg_head\.pixel_decoder\.", "pixel_decoder."),
        (r"^pixel_decoder\.transformer\.level_embed", "pixel_decoder.level_embed"),
        (
            r"^pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.self_attn\.",
            r"pixel_decoder.layers.\1.attention.",
        ),
        (
            r"^pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.norm1\.",
            r"pixel_decoder.layers.\1.norm.",
        ),
        (
            r"^pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.norm2\.",
            r"pixel_decoder.layers.\1.feed_forward.norm.",
        ),
        (
            r"^pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.linear",
            r"pixel_decoder.layers.\1.feed_forward.linear",
        ),
        (r"^pixel_decoder\.adapter_1\.norm\.", "pixel_decoder.lateral.1."),
        (r"^pixel_decoder\.adapter_1\.", "pixel_decoder.lateral.0."),
        (r"^pixel_decoder\.layer_1\.norm\.", "pixel_decoder.output.1."),
        (r"^pixel_decoder\.layer_1\.", "pixel_decoder.output.0."),
        # frame decoder and tracker: one family of layers
        (r"^sem_seg_head\.predictor\.", "frame_decoder."),
        (r"^vita_module\.", "tracker."),
        (r"^frame_decoder\.transformer_", "frame_decoder.layers.transformer_"),
        (r"^tracker\.transformer_", "tracker.decoder.transformer_"),
        (
            r"\.transformer_self_attention_layers\.(\d+)\.self_attn\.",
            r".\1.self_attention.attention.",
        ),
        (r"\.transformer_self_attention_layers\.(\d+)\.", r".\1.self_attention."),
        (
            r"\.transformer_cross_attention_layers\.(\d+)\.multihead_attn\.",
            r".\1.cross_attention.attention.",
        ),
        (r"\.transformer_cross_attention_layers\.(\d+)\.", r".\1.cross_attention."),
        (r"\.transformer_ffn_layers\.(\d+)\.", r".\1.feed_forward."),
        (
            r"^tracker\.enc_self_attn\.(\d+)\.self_attn\.",
            r"tracker.encoder.\1.self_attention.attention.",
        ),
        (r"^tracker\.enc_self_attn\.(\d+)\.", r"tracker.encoder.\1.self_attention."),
        (r"^tracker\.enc_ffn\.(\d+)\.", r"tracker.encoder.\1.feed_forward."),
        (
            r"^((?:frame_decoder|tracker)\.mask_embed)\.layers\.(\d)\.",
            lambda m: f"{m[1]}.{2 * int(m[2])}.",
        ),
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
    ]
]
# Not weights of this model: constants of the losses and the input, classifiers of ImageNet
# backbones, and bookkeeping of PyTorch.
IGNORED = re.compile(
    r"(criterion\.empty_weight|attn_mask|_extra_state)$|^pixel_(mean|std)$"
    r"|^n_averaged$|^backbone\.(fc|head|norm|stem\.fc)\."
)
# Keys under which training tools store the state dict.
WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "net")
# Name components added by DataParallel, torch.compile, FSDP and activation checkpointing.
WRAPPING_MODULES = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
BACKBONE_ROOTS = ("stem.", "conv1.", "patch_embed.", "features.")  # in files of a backbone alone
MODEL_ROOTS = (
    "backbone.",
    "pixel_decoder.",
    "frame_decoder.",
    "tracker.",
    "sem_seg_head.",
    "vita_module.",
)


def translate(
    contents: dict, source: str = "the state dict"
) -> tuple[dict[str, Tensor], list[str]]:
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
        name = our_name(name)
        if name in translated:
            raise InputError(f"{source} has several entries for {name}, one called {entry}")
        value = as_tensor(value, f"{source}: entry {entry}")
        if name.endswith("relative_position_index"):
            value = value.flatten()  # as in torchvision
        translated[name] = value
    return translated, ignored


@lru_cache(maxsize=4096)  # a model has some hundred names, and is often read several times
def our_name(name: str) -> str:
    """The name of our parameter that an entry belongs to, by RENAMES."""
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return name


def unknown_file(contents: dict, entries: list[tuple], source: str) -> InputError:
    """The error for a file without any known entry."""
    for wrapper in WRAPPERS:
        value = contents.get(wrapper)
        if isinstance(value, Placeholder):
            return InputError(f"{source} holds a whole {value.name}: save its state_dict() instead")
    example = shown(entries[0][0]) if entries else None
    return InputError(
        f"{source} is no checkpoint of this model family: none of its entries is "
        f"known, it has {len(entries)}, such as {example}"
    )


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
