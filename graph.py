"""CUDA graphs: a function of tensors that launches hundreds of small kernels, captured once and replayed as one.

Everything that happens to a few frames is such a function: launched kernel by kernel, the GPU is idle most of the time.

    replay = Replay(module)
    outputs = replay(function, *tensors)         # captures at the first call with tensors of these shapes and dtypes

Source: the CUDA graphs of PyTorch (torch.cuda.CUDAGraph).
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

KEPT = 2  # graphs, the latest ones: each holds memory of its own


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that graphs are captured on; one for all of them, since libraries keep some memory for every stream."""
    return torch.cuda.Stream(device)


@dataclass
class Captured:
    """A graph, the tensors that it reads and those that it writes."""
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]


class Replay:
    """Runs functions of tensors to a tuple of tensors, which read the weights of a module and never wait for the GPU; without a
    GPU, and where gradients are wanted, by calling them.

    What is recorded is kernels: hooks are not called again, and another value of an attribute is not seen before `forget`."""

    def __init__(self, module: nn.Module):
        self.module, self.graphs, self.weights = module, {}, None

    def __call__(self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        """The function of these inputs; the outputs are the caller's to keep."""
        if not inputs[0].is_cuda or torch.is_grad_enabled():
            return function(*inputs)
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        key = function.__name__, autocast, *((given.shape, given.dtype) for given in inputs)
        found = self.graphs.pop(key, None) or self.capture(function, inputs)
        self.graphs[key] = found                                              # last = latest
        for own, given in zip(found.inputs, inputs):
            own.copy_(given)
        found.graph.replay()
        return tuple(output.clone() for output in found.outputs)

    def check_weights(self) -> None:
        """Forget all graphs if the module's weights are no longer where they were; to be called now and then, it takes a millisecond.
        That their values change does no harm."""
        weights = [tensor.data_ptr() for tensor in (*self.module.parameters(), *self.module.buffers())]
        if weights != self.weights:
            self.forget()
            self.weights = weights

    def forget(self) -> None:
        """Give all graphs and their memory back."""
        self.graphs.clear()

    def capture(self, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> Captured:
        """Run the function once to warm up, and once to record it."""
        while len(self.graphs) >= KEPT:
            self.graphs.pop(next(iter(self.graphs)))
        graph, inputs = torch.cuda.CUDAGraph(), [given.clone() for given in inputs]
        stream, current = side_stream(inputs[0].device), torch.cuda.current_stream()
        stream.wait_stream(current)
        # weights cast to 16 bit must be cast inside the graph, not taken from autocast's cache, which is emptied behind it
        with torch.cuda.stream(stream), torch.autocast("cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"),
                                                       cache_enabled=False):
            function(*inputs)
            torch.cuda.empty_cache()                                          # the graph has memory of its own
            graph.capture_begin(capture_error_mode="thread_local")            # loaders pin memory in other threads meanwhile
            outputs = function(*inputs)
            graph.capture_end()
        current.wait_stream(stream)
        return Captured(graph, inputs, outputs)

    def __reduce__(self) -> tuple:
        """A copy of the module has no graphs yet."""
        return Replay, (self.module,)
