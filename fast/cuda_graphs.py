"""CUDA graphs: many small kernels are launched at once.

Inference of a few frames launches hundreds of small kernels. Launched one by one they leave a GPU
idle most of the time. `CUDAGraphCache` captures a function once and replays all its kernels with
one launch.

    graphs = CUDAGraphCache()
    outputs = graphs(function, *tensors)    # the same as function(*tensors)

Source: torch.cuda.CUDAGraph, see "CUDA semantics" in the PyTorch docs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import is_

import torch
from torch import Tensor, nn

from fast.streams import get_stream

_constants: list[dict] = []  # of the graph being captured; empty at other times


@dataclass
class CapturedGraph:
    """A CUDA graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]
    constants: dict[tuple, Tensor]  # see `graph_constant`


def graph_constant(key: tuple, compute: Callable[[], Tensor]) -> Tensor:
    """compute(), for a tensor that depends only on `key`: at each call, but once per CUDA graph.

    While a graph is captured, its warm-up computes the tensor and the graph reads it.
    """
    if not _constants:
        return compute()
    constants = _constants[-1]
    if key not in constants:
        constants[key] = compute()
    return constants[key]


class CUDAGraphCache:
    """Calls functions from tensors to a tuple of tensors, as CUDA graphs where possible.

    A function, which is known by its name, may read the weights of a module; it must not wait for
    the GPU. It is captured at its first call with inputs of these shapes and dtypes, under this
    autocast dtype. It is called directly on other devices, with gradients, in `disabled()`, and
    while the module last given to `check_module` has forward hooks, which a graph would not call.
    """

    max_graphs = 5  # each holds its own memory

    def __init__(self):
        self.graphs: dict[tuple, CapturedGraph] = {}  # least recently used first
        self.tensors: list[dict] = []  # of all modules: parameters and buffers by name
        self.attributes: list[dict] = []  # of all modules: other attributes by name
        self.hooks: list[dict] = []
        self.pool: tuple | None = None  # of memory; None: each graph has its own
        self.pointers, self.objects = [], []
        self.enabled = True

    def __call__(
        self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """function(*inputs); the outputs are copies that no later call overwrites."""
        capturable = inputs[0].is_cuda and not torch.is_grad_enabled()
        if not capturable or not self.enabled or any(self.hooks):
            return function(*inputs)
        key = self.key_of(function, inputs)
        captured = self.graphs.pop(key, None) or self.capture(function, inputs)
        self.graphs[key] = captured
        for static, tensor in zip(captured.inputs, inputs):
            static.copy_(tensor)
        captured.graph.replay()
        return tuple(output.clone() for output in captured.outputs)

    def key_of(self, function: Callable, inputs: tuple[Tensor, ...]) -> tuple:
        """Calls with the same key can share a graph."""
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        shapes = ((tensor.shape, tensor.dtype) for tensor in inputs)
        # By name, because functions such as `track_tensors` (video_pipeline.py) are closures, new
        # ones at each call.
        return function.__name__, autocast, torch.is_inference_mode_enabled(), *shapes

    def capture(
        self, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]
    ) -> CapturedGraph:
        """Run the function once to warm up, and once to capture it."""
        while len(self.graphs) >= self.max_graphs:
            self.graphs.pop(next(iter(self.graphs)))
        graph, inputs = torch.cuda.CUDAGraph(), self.hold_inputs(inputs)
        current = torch.cuda.current_stream(inputs[0].device)
        # Kernels of a graph keep the priority of the stream on which they were captured.
        stream = get_stream(inputs[0].device, current.priority)
        stream.wait_stream(current)
        # Autocast's cache of 16 bit weights is emptied behind the graph, so cast inside of it.
        autocast = torch.autocast(
            "cuda",
            torch.get_autocast_dtype("cuda"),
            torch.is_autocast_enabled("cuda"),
            cache_enabled=False,
        )
        constants = {}
        _constants.append(constants)
        try:
            with torch.cuda.stream(stream), autocast:
                held = self.hold_outputs(function(*inputs))
                torch.cuda.empty_cache()  # the graph allocates from another pool
                # Data loaders pin memory in other threads meanwhile.
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    outputs = function(*inputs)
                    if held:
                        torch._foreach_copy_(held, outputs)
                        outputs = tuple(held)
                finally:  # otherwise the stream would stay in capture
                    graph.capture_end()
        finally:
            _constants.pop()
        current.wait_stream(stream)
        return CapturedGraph(graph, inputs, outputs, constants)

    def hold_inputs(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Tensors with these values, which a graph is to read."""
        return [tensor.clone() for tensor in inputs]

    def hold_outputs(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Tensors like these, which a graph is to fill; none: it keeps what it allocates."""
        return []

    def check_module(self, module: nn.Module) -> None:
        """Drop all graphs if the module has changed: call this before each video.

        Changes are other weight tensors (`.to()`, `load_state_dict(assign=True)`), submodules,
        settings such as `tracker.gate_mask`, and replaced methods. New values in the same weight
        tensors are read by the graphs and need no new capture.
        """
        pointers, objects = self.read_module(module)
        if pointers != self.pointers or not is_same(objects, self.objects):
            self.graphs.clear()
            # Walking through the modules takes 20 times as long as reading what they hold.
            submodules = list(module.modules())
            self.tensors = [
                tensors
                for submodule in submodules
                for tensors in (submodule._parameters, submodule._buffers)
            ]
            self.attributes = [
                module._modules,
                *map(vars, submodules[1:]),
                *(submodule._modules for submodule in submodules[1:]),
            ]
            self.hooks = [
                hooks
                for submodule in submodules
                for hooks in (submodule._forward_hooks, submodule._forward_pre_hooks)
            ]
            self.pointers, self.objects = self.read_module(module)

    def read_module(self, module: nn.Module) -> tuple[list[int], list]:
        """Where the weights are, and all attributes of the module and its submodules."""
        pointers = [
            tensor.data_ptr()
            for tensors in self.tensors
            for tensor in tensors.values()
            if tensor is not None
        ]
        objects = list(chain.from_iterable(map(dict.values, self.attributes)))
        # The module owns the cache: holding its methods or itself would keep both alive.
        values = [value for value in vars(module).values() if value is not self]
        return pointers, objects + [getattr(value, "__func__", value) for value in values]

    def clear(self) -> None:
        """Release all graphs and their memory."""
        self.graphs.clear()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A context in which functions are called directly, kernel by kernel."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def __reduce__(self) -> tuple:
        """A copied or unpickled cache is empty."""
        return CUDAGraphCache, ()


def is_same(objects: list, others: list) -> bool:
    """Whether two lists hold the very same objects."""
    return len(objects) == len(others) and all(map(is_, objects, others))
