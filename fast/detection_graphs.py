"""A frozen detector in training as CUDA graphs, one for each size of images.

    graph_frozen_detector(model)    # in place, before training on a GPU

A frozen detector needs no gradients, so all its kernels can be launched at once, as in inference.
Images of training vary in size. A size is captured when it comes for the third time, and all graphs
share their memory, which they keep while the model is evaluated.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from detector import FrameOutput
from fast.cuda_graphs import CUDAGraphCache

if TYPE_CHECKING:
    from model import GRAttVIS

CALLS_BEFORE_CAPTURE = 2
ALIGNMENT = 512  # bytes, as in PyTorch's allocator


def graph_frozen_detector(model: GRAttVIS) -> None:
    """Let `model.detect` run as CUDA graphs in training without gradients, in place."""
    model.detection_graphs = DetectionGraphs()
    model.detect = MethodType(detect_in_graphs, model)  # a copy of the model gets its own


def detect_in_graphs(model: GRAttVIS, images: Tensor) -> FrameOutput:
    """`GRAttVIS.detect`, as a CUDA graph in training without gradients."""
    detect = type(model).detect
    if not model.training or torch.is_grad_enabled():
        return detect(model, images)

    def detect_tensors(images: Tensor) -> tuple[Tensor, ...]:
        output = detect(model, images)
        predictions = [tensor for layer in output.predictions for tensor in layer]
        return *predictions, output.queries, output.features

    model.detection_graphs.check_module(model)
    *predictions, queries, features = model.detection_graphs(detect_tensors, images)
    layers = list(zip(predictions[::2], predictions[1::2]))  # (logits, kernels)
    return FrameOutput(layers, queries, features)


class DetectionGraphs(CUDAGraphCache):
    """Graphs of a function for many shapes; only frequent shapes are captured.

    One graph is used at a time, so all read and write the same memory.
    """

    max_graphs = 64

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.buffers: dict[str, Tensor] = {}

    def __call__(
        self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """function(*inputs); the outputs are copies that no later call overwrites."""
        key = self.key_of(function, inputs)
        self.calls[key] += 1
        is_rare = self.calls[key] <= CALLS_BEFORE_CAPTURE
        if key not in self.graphs and (is_rare or len(self.graphs) == self.max_graphs):
            return function(*inputs)
        return super().__call__(function, *inputs)

    def hold_inputs(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Tensors with these values, in memory that all graphs share."""
        held = self.hold("inputs", inputs)
        torch._foreach_copy_(held, inputs)
        return held

    def hold_outputs(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Tensors like these, in memory that all graphs share."""
        held = self.hold("outputs", outputs)
        if not self.graphs:  # the pool of graphs that are gone must not be used again
            self.pool = torch.cuda.graph_pool_handle()
        return held

    def hold(self, name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors like these in a buffer. If it is too small, there is a new one for new graphs."""
        sizes = [ALIGNMENT * math.ceil(tensor.nbytes / ALIGNMENT) for tensor in tensors]
        buffer = self.buffers.get(name)
        if buffer is None or len(buffer) < sum(sizes):
            self.graphs.clear()
            device = tensors[0].device
            buffer = self.buffers[name] = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        held = []
        for tensor, part in zip(tensors, buffer[: sum(sizes)].split(sizes)):
            strides = torch.empty_like(tensor, device="meta").stride()  # without gaps
            held.append(part.view(tensor.dtype).as_strided(tensor.shape, strides))
        return held

    def __reduce__(self) -> tuple:
        """A copied cache is empty."""
        return DetectionGraphs, ()
