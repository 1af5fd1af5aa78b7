"""The detector in training as CUDA graphs, for each size of images.

    graph_detector(model)    # in place, before training on a GPU

A frozen detector needs no gradients, so it is one graph, as in inference. A trained one is two, for
forward and backward (training_graphs.py), as long as the images are small and few. Images of
training vary in size. A size is captured when it comes for the third time, and all graphs share
their memory, which they keep while the model is evaluated.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from detector import FrameOutput
from fast.cuda_graphs import GraphPool, SharedMemoryGraphs
from fast.training_graphs import TrainingGraphs

if TYPE_CHECKING:
    from model import GRAttVIS

# A trained detector runs as graphs up to this many pixels of all images together. The more there
# are, the less time graphs save, since kernels take longer, and the more memory they need. On an
# H200, 3.7 million pixels trained in 52 % of the time without graphs, 7.4 million in 72 %.
MAX_PIXELS = 8_000_000


def graph_detector(model: GRAttVIS, pool: GraphPool | None = None) -> None:
    """Let `model.detect` run as CUDA graphs in training, in place.

    Not for batch norms: a capture would change their running statistics.

    pool: memory of the tracker's graphs. A frozen detector can use it, since it has finished before
        the tracker starts; the activations of a trained one are needed after the tracker.
    """
    is_trained = detector_is_trained(model)
    model.detection_graphs = TrainingGraphs() if is_trained else SharedMemoryGraphs(pool=pool)
    model.detect = MethodType(detect_in_graphs, model)  # a copy of the model gets its own


def detector_is_trained(model: GRAttVIS) -> bool:
    """Whether a part of the model other than the tracker is trained."""
    return any(
        parameter.requires_grad
        for name, parameter in model.named_parameters()
        if not name.startswith("tracker.")
    )


def detect_in_graphs(model: GRAttVIS, images: Tensor) -> FrameOutput:
    """`GRAttVIS.detect`, as CUDA graphs in training."""
    detect = type(model).detect
    graphs = model.detection_graphs
    is_trained = isinstance(graphs, TrainingGraphs)
    if not model.training or not images.is_cuda or torch.is_grad_enabled() != is_trained:
        return detect(model, images)
    if is_trained:
        is_small = images[:, 0].numel() <= MAX_PIXELS
        return graphs.run(detect, model, images) if is_small else detect(model, images)

    def detect_tensors(images: Tensor) -> tuple[Tensor, ...]:
        output = detect(model, images)
        predictions = [tensor for layer in output.predictions for tensor in layer]
        return *predictions, output.queries, output.features

    graphs.check_module(model)
    *predictions, queries, features = graphs(detect_tensors, images)
    layers = list(zip(predictions[::2], predictions[1::2]))  # (logits, kernels)
    return FrameOutput(layers, queries, features)
