"""CUDA graphs: many small kernels are launched at once.

Inference of a few frames launches hundreds of small kernels. Launched one by one they leave a GPU
idle most of the time. `CUDAGraphCache` captures a function once and replays all its kernels with
one launch.

    graphs = CUDAGraphCache()
    outputs = graphs(function, *tensors)    # the same as function(*tensors)

`SharedMemoryGraphs` does this for many shapes, as they come in training.

Source: torch.cuda.CUDAGraph, see "CUDA semantics" in the PyTorch docs.
"""

import gc
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import is_
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fast.streams import SideStream

ALIGNMENT = 512  # bytes, as in PyTorch's allocator
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
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


class GraphPool:
    """Memory that graphs share, since none runs while the activations of another are needed."""

    def __init__(self):
        self.graphs = WeakSet()
        self.handle: tuple | None = None
        self.replays = 0  # of any of the graphs

    def handle_for(self, graph: torch.cuda.CUDAGraph) -> tuple:
        """The handle to capture one more graph with."""
        if not self.graphs:  # CUDA has freed the memory with the last graph
            self.handle = torch.cuda.graph_pool_handle()
        self.graphs.add(graph)
        return self.handle


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: GraphPool | None) -> Iterator[None]:
    """A context whose kernels are captured, on the current stream.

    pool: of the graph's memory; None: the graph has its own.
    """
    handle = pool.handle_for(graph) if pool else None
    # Garbage may contain other graphs, which must not be destroyed during a capture.
    with garbage_collection_paused():
        # Data loaders pin memory in other threads meanwhile.
        graph.capture_begin(pool=handle, capture_error_mode="thread_local")
        try:
            yield
        finally:  # otherwise the stream would stay in capture
            graph.capture_end()


@contextmanager
def capture_stream(device: torch.device) -> Iterator[None]:
    """A context for warm-up and capture, on a side stream. It leaves the random state as it was."""
    # Kernels of a graph keep the priority of the stream on which they were captured.
    side = SideStream(device, torch.cuda.current_stream(device).priority)
    side.wait()
    with torch.random.fork_rng([device]), side:
        yield
    side.join()


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """A context in which Python does not look for cycles of unused objects."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class CUDAGraphCache:
    """Calls functions from tensors to a tuple of tensors, as CUDA graphs where possible.

    A function, which is known by its name, may read the weights of a module; it must not wait for
    the GPU. It is captured at its first call with inputs of these shapes and dtypes, under this
    autocast dtype. It is called directly on other devices, with gradients, in `disabled()`, and
    while the module last given to `check_module` has hooks, which a graph would not call.
    """

    max_graphs = 5  # each holds its own memory

    def __init__(self):
        self.graphs: dict[tuple, CapturedGraph] = {}  # least recently used first
        self.tensors: list[dict] = []  # of all modules: parameters and buffers by name
        self.attributes: list[dict] = []  # of all modules: other attributes by name
        self.hooks: list[dict] = []
        self.pool: GraphPool | None = None
        self.weights, self.objects = [], []
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
            with capture_stream(inputs[0].device), autocast:
                held = self.hold_outputs(function(*inputs), inputs[0].device)
                torch.cuda.empty_cache()  # the graph allocates from another pool
                with capturing(graph, self.pool):
                    outputs = function(*inputs)
                    if held:
                        torch._foreach_copy_(held, outputs)
                        outputs = tuple(held)
        finally:
            _constants.pop()
        return CapturedGraph(graph, inputs, outputs, constants)

    def hold_inputs(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Tensors with these values, which a graph is to read."""
        return [tensor.clone() for tensor in inputs]

    def hold_outputs(self, outputs: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """Tensors like these, which a graph is to fill; none: it keeps what it allocates."""
        return []

    def check_module(self, module: nn.Module) -> None:
        """Drop all graphs if the module has changed: call this before each video.

        Changes are other weight tensors (`.to()`, `load_state_dict(assign=True)`), other trained
        weights (`requires_grad_()`), submodules, settings such as `tracker.gate_mask`, and replaced
        methods. New values in the same weight tensors are read by the graphs and need no new
        capture.
        """
        weights, objects = self.read_module(module)
        if weights != self.weights or not is_same(objects, self.objects):
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
                *(submodule._parameters for submodule in submodules),
            ]
            self.hooks = [getattr(submodule, name) for submodule in submodules for name in HOOKS]
            self.weights, self.objects = self.read_module(module)

    def read_module(self, module: nn.Module) -> tuple[list[tuple[int, bool]], list]:
        """Where the weights are and which are trained; all attributes of all submodules."""
        weights = [
            (tensor.data_ptr(), tensor.requires_grad)
            for tensors in self.tensors
            for tensor in tensors.values()
            if tensor is not None
        ]
        objects = list(chain.from_iterable(map(dict.values, self.attributes)))
        # The module owns the cache: holding its methods or itself would keep both alive.
        values = [value for value in vars(module).values() if value is not self]
        return weights, objects + [getattr(value, "__func__", value) for value in values]

    def clear(self) -> None:
        """Release all graphs."""
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
        return type(self), ()


class SharedMemoryGraphs(CUDAGraphCache):
    """Graphs for many shapes, of which only frequent ones are captured.

    One graph is used at a time, so all read and write the same memory.

    calls_before_capture: how often a shape runs without a graph first.
    pool: of other graphs, whose results are not needed at the same time; None makes a new one.
    """

    max_graphs = 64

    def __init__(self, calls_before_capture: int = 2, pool: GraphPool | None = None):
        super().__init__()
        self.pool = pool or GraphPool()
        self.calls_before_capture = calls_before_capture
        self.calls = Counter()
        self.buffers: dict[str, Tensor] = {}

    def __call__(
        self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """function(*inputs); the outputs are copies that no later call overwrites."""
        if self.is_rare(self.key_of(function, inputs)):
            return function(*inputs)
        self.pool.replays += 1
        return super().__call__(function, *inputs)

    def is_rare(self, key: tuple) -> bool:
        """Count a call with this key; whether it has no graph and should not get one."""
        self.calls[key] += 1
        is_new = self.calls[key] <= self.calls_before_capture
        return key not in self.graphs and (is_new or len(self.graphs) == self.max_graphs)

    def hold_inputs(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Tensors with these values, in memory that all graphs share."""
        held = self.hold("inputs", inputs, inputs[0].device)
        torch._foreach_copy_(held, inputs)
        return held

    def hold_outputs(self, outputs: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """Tensors like these, in memory that all graphs share."""
        return self.hold("outputs", outputs, device)

    def hold(self, name: str, tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """Tensors like these in a buffer. If it is too small, there is a new one for new graphs."""
        sizes = [ALIGNMENT * math.ceil(tensor.nbytes / ALIGNMENT) for tensor in tensors]
        buffer = self.buffers.get(name)
        fits = buffer is not None and buffer.device == device and len(buffer) >= sum(sizes)
        if not fits:
            self.graphs.clear()
            buffer = self.buffers[name] = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        held = []
        for tensor, part in zip(tensors, buffer[: sum(sizes)].split(sizes)):
            strides = torch.empty_like(tensor, device="meta").stride()  # without gaps
            held.append(part.view(tensor.dtype).as_strided(tensor.shape, strides))
        return held

    def __reduce__(self) -> tuple:
        """A copied cache is empty, and has its own pool."""
        return type(self), (self.calls_before_capture,)


def is_same(objects: list, others: list) -> bool:
    """Whether two lists hold the very same objects."""
    return len(objects) == len(others) and all(map(is_, objects, others))
