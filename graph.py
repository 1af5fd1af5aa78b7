"""CUDA graphs: a function of tensors that launches hundreds of small kernels, captured once and replayed as one.

The tracker is such a function: launched kernel by kernel, a frame takes it 5 ms on an H200, most of which the GPU is idle.

    replay = Replay(function)
    outputs = replay(*tensors)                   # captures at the first call; all calls need the same shapes and dtypes

Source: the CUDA graphs of PyTorch (torch.cuda.CUDAGraph), here without the emptying of caches that torch.cuda.graph brings along.
"""
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that graphs are captured on; one for all of them, since libraries keep some memory for every stream."""
    return torch.cuda.Stream(device)


class Replay:
    """A function of tensors to a tuple of tensors, on a GPU, without a wait for it inside. Meant to live as long as the tensors that
    the function reads besides its arguments, such as weights."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]):
        self.function, self.graph = function, None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The function of these inputs; the outputs are the caller's to keep."""
        if self.graph is None:
            self.capture(inputs)
        for own, given in zip(self.inputs, inputs):
            own.copy_(given)
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)

    def capture(self, inputs: tuple[Tensor, ...]) -> None:
        """Run the function once to warm up, and once to record it."""
        self.inputs, self.graph = [given.clone() for given in inputs], torch.cuda.CUDAGraph()
        stream, current = side_stream(inputs[0].device), torch.cuda.current_stream()
        stream.wait_stream(current)
        # weights cast to 16 bit must be cast inside the graph, not taken from autocast's cache, which is emptied behind it
        with torch.cuda.stream(stream), torch.autocast("cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"),
                                                       cache_enabled=False):
            self.function(*self.inputs)
            self.graph.capture_begin(capture_error_mode="thread_local")   # loaders pin memory in other threads meanwhile
            self.outputs = self.function(*self.inputs)
            self.graph.capture_end()
        current.wait_stream(stream)
