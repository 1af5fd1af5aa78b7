"""Making a model faster from outside: 16-bit weights, fused layers, CUDA graphs, torch.compile.

    accelerate(model, torch.float16, compiled=True)      # before inference: model.accelerate(...)
    accelerate_training(model, torch.bfloat16)           # before training

The functions change a model in place. Results are those of the plain model under autocast to
`dtype`, except that fused and compiled code rounds differently.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from backbone import ResNetBackbone
from detector import FrameOutput
from evaluation.postprocess import mask_sum_and_area
from fast.cuda_graphs import GraphPool
from fast.detection_graphs import detector_is_trained, graph_detector
from fast.folded_resnet import FusedResNet, fold_frozen_resnet, fold_resnet
from fast.fused_masks import MASK_SCORES_DIGEST, fused_mask_sum_and_area
from fast.fused_modules import fuse_modules
from fast.half_precision import cast_weights
from fast.kept_positions import keep_positions
from fast.plain_source import is_unchanged
from fast.trained_resnet import fuse_trained_resnet
from fast.training_graphs import graph_tracker

if TYPE_CHECKING:
    from model import GRAttVIS

FROZEN_CHUNK = 20  # frames that a frozen detector takes at once in training


def accelerate(
    model: GRAttVIS, dtype: torch.dtype = torch.float32, compiled: bool = False
) -> GRAttVIS:
    """Prepare a model for inference only, in place, and return it in evaluation mode.

    dtype: the autocast dtype the model will run under. Weights of linear layers, convolutions and
        attention are cast once, as autocast would do at every use, so results are the same. On a
        GPU the convolutions of a ResNet are fused with their norms, and other norms with what is
        around them.
    compiled: use torch.compile. It takes half a minute for each frame size, then about half the
        time per frame. On a CPU, too, the batch norms of a ResNet are folded into its convolutions.
    """
    on_gpu = model.device.type == "cuda"
    fused = on_gpu and dtype != torch.float32
    if (compiled or fused) and isinstance(model.backbone, ResNetBackbone):
        fold_resnet(model.backbone, dtype)
    if dtype != torch.float32:
        cast_weights(model.modules(), dtype)
    if on_gpu:
        model.to(memory_format=torch.channels_last)
    if compiled:
        compile_parts(model)
    elif on_gpu:
        keep_positions(model)
        if fused:
            fuse_modules(model)
    if on_gpu and is_unchanged(mask_sum_and_area, MASK_SCORES_DIGEST):
        model.mask_sum_and_area = fused_mask_sum_and_area
    return model.eval()


def accelerate_training(
    model: GRAttVIS, dtype: torch.dtype, compiled: str = "off", graphs: bool = False
) -> None:
    """Prepare a model for training under autocast to `dtype`, in place, on its device.

    Trained weights stay in float32. Frozen ones are cast once, instead of in every step.

    compiled: "off", "tracker" or "all", as train.py's --compile.
    graphs: run the tracker and the detector as CUDA graphs, as train.py's --graphs.
    """
    in_16_bit_on_gpu = dtype != torch.float32 and model.device.type == "cuda"
    fused = in_16_bit_on_gpu and compiled == "off"
    if in_16_bit_on_gpu:
        # Masks of costs and losses are products of 16-bit numbers, which TF32 multiplies exactly.
        # Features and targets sampled between pixels, for the costs, are rounded to 11 bits.
        torch.set_float32_matmul_precision("high")
    if fused:
        fold_frozen_resnet(model.backbone, dtype)  # before its weights are rounded
        fuse_trained_resnet(model.backbone, dtype)
        fuse_modules(model)
    if dtype != torch.float32:
        cast_frozen_weights(model, dtype)
    if fused and graphs:
        pool = GraphPool()
        graph_tracker(model, pool)
        if not has_batch_norm(model.backbone):
            graph_detector(model, pool)
    if compiled != "off":
        compile_parts(model, detector=compiled == "all")


def compile_parts(model: GRAttVIS, detector: bool = True) -> None:
    """torch.compile the parts that take the time, for training or inference.

    The tracker does not depend on the frame size; the detector is compiled for each size. Parts
    that are recomputed in backward are compiled one by one: a larger graph would keep their
    activations.
    """
    parts = [(model.tracker, "encode"), (model.tracker, "decode_clip")]
    if detector:
        # The blocks of a fused ResNet are single cuDNN kernels: nothing is left to compile.
        fused = isinstance(model.backbone, FusedResNet)
        parts += [(model, "normalise"), (model.backbone, "stem" if fused else "forward")]
    if detector and model.pixel_decoder.recompute:
        parts += [(layer, "forward") for layer in model.pixel_decoder.layers]
        parts += [(model.pixel_decoder, "fpn_step"), (model.frame_decoder, "forward")]
    elif detector:
        parts.append((model, "decode"))
    # Rows of padded length would be copied before a convolution.
    options = {"comprehensive_padding": False}
    for owner, name in parts:
        function = torch.compile(getattr(type(owner), name), dynamic=False, options=options)
        setattr(owner, name, MethodType(function, owner))  # a copy of the model gets its own
    model.mask_sum_and_area = torch.compile(mask_sum_and_area)


def cast_frozen_weights(model: GRAttVIS, dtype: torch.dtype) -> None:
    """Cast the weights of modules without trained parameters once, as autocast would do each time.

    In place. `state_dict` still returns the original values.
    """
    frozen_modules = [
        module
        for module in model.modules()
        if not any(parameter.requires_grad for parameter in module.parameters())
    ]
    originals = {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }
    cast_weights(frozen_modules, dtype)

    def restore(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict) -> None:
        state.update(
            (prefix + name, value) for name, value in originals.items() if prefix + name in state
        )

    model.register_state_dict_post_hook(restore)


def detect_in_chunks(model: GRAttVIS, images: Tensor) -> FrameOutput:
    """`model.detect(images)` in training. A frozen detector takes FROZEN_CHUNK images at a time.

    This needs less memory. A frozen detector runs without gradients here. Batch norms that use
    batch statistics would give other results for chunks: with them, and with a trained detector,
    all images are taken at once.
    """
    if detector_is_trained(model) or has_batch_norm(model.backbone):
        return model.detect(images)
    with torch.no_grad():
        chunks = [model.detect(chunk) for chunk in images.split(FROZEN_CHUNK)]
    predictions = []
    for layer in zip(*(chunk.predictions for chunk in chunks)):  # (logits, kernels) of each chunk
        logits, kernels = zip(*layer)
        predictions.append((torch.cat(logits), torch.cat(kernels)))
    queries = torch.cat([chunk.queries for chunk in chunks], 1)
    features = torch.cat([chunk.features for chunk in chunks])
    return FrameOutput(predictions, queries, features)


def has_batch_norm(module: nn.Module) -> bool:
    """Whether norms depend on the batch."""
    return any(isinstance(part, nn.BatchNorm2d) for part in module.modules())


def zero_images(shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
    """Zeros (N, C, H, W); channels last on a GPU, where convolutions are faster in that format."""
    layout = torch.channels_last if like.is_cuda else torch.contiguous_format
    images = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)
    return images.zero_()


def cast_for_autocast(x: Tensor) -> Tensor:
    """Cast a tensor once to the dtype of autocast, if that is enabled.

    For a tensor that many layers read: autocast would cast it for each of them.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
