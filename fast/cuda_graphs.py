"""Keeping a GPU busy with small kernels: launched together, and beside large ones.

Everything that happens to a few frames is a function of tensors that launches hundreds of small kernels; launched one by one, the
GPU is idle most of the time. `Replay` captures it once and replays it as one. `Beside` runs what needs little of the GPU, the
tracker, while it works on something large, the detector's next frames.

    replay, beside = Replay(), Beside(device)
    outputs = replay(function, *tensors)         # captures at the first call with tensors of these shapes and dtypes
    with beside:
        ...                                      # launched after all before it; what is launched after it does not wait
    beside.join()                                # but from here on

Source: the CUDA graphs and streams of PyTorch (torch.cuda.CUDAGraph, torch.cuda.Stream).
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

KEPT = 3  # graphs, the latest ones: each holds memory of its own


@cache
def side_stream(device: torch.device, priority: int = 0) -> torch.cuda.Stream:
    """A stream beside the current one, always the same of a priority (-1: before others), since libraries keep memory for each."""
    return torch.cuda.Stream(device, priority=priority)


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

    def __init__(self):
        self.graphs, self.places, self.weights = {}, [], None
        self.enabled = True

    def __call__(self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        """The function of these inputs; the outputs are the caller's to keep."""
        if not self.enabled or not inputs[0].is_cuda or torch.is_grad_enabled():
            return function(*inputs)
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        key = function.__name__, autocast, *((given.shape, given.dtype) for given in inputs)
        found = self.graphs.pop(key, None) or self.capture(function, inputs)
        self.graphs[key] = found                                              # last = latest
        for own, given in zip(found.inputs, inputs):
            own.copy_(given)
        found.graph.replay()
        return tuple(output.clone() for output in found.outputs)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Call functions instead of replaying graphs, so that forward hooks are called."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def check_weights(self, module: nn.Module) -> None:
        """Forget all graphs if weights of the module, always the same one, are no longer where they were, or a part of it is another
        one; to be called now and then. That their values change does no harm."""
        if self.look_up() != self.weights:
            self.graphs.clear()
            # where modules keep what they have: walking there takes longer than looking it up
            self.places = [place for part in module.modules() for place in (part._parameters, part._buffers, part._modules)]
            self.weights = self.look_up()

    def look_up(self) -> list[int | nn.Module]:
        """Where weights are, and which modules there are."""
        return [value.data_ptr() if isinstance(value, Tensor) else value for place in self.places for value in place.values()]

    def forget(self) -> None:
        """Give all graphs and their memory back."""
        self.graphs.clear()
        self.weights = None

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
        return Replay, ()


class Beside:
    """A context: what is launched in it runs beside what is launched after it, until `join`. Without a GPU it changes nothing.

    What is read in it must be kept until `join`, and what is made in it used after that only. waits: for what was launched before
    it, too; what reads nothing of that, a copy from the CPU, need not."""

    def __init__(self, device: torch.device, waits: bool = True):
        self.waits = waits
        # small kernels need not queue behind large ones, and no copy behind those
        self.stream = side_stream(device, -1 if waits else -2) if device.type == "cuda" else None

    def __enter__(self) -> None:
        if self.stream:
            if self.waits:
                self.stream.wait_stream(torch.cuda.current_stream())
            self.context = torch.cuda.stream(self.stream)
            self.context.__enter__()

    def __exit__(self, *failure) -> None:
        if self.stream:
            self.context.__exit__(*failure)

    def join(self, *made: Tensor) -> None:
        """What is launched from here on waits for it, and what was made in it is the current stream's."""
        if self.stream:
            current = torch.cuda.current_stream()
            current.wait_stream(self.stream)
            for tensor in made:
                tensor.record_stream(current)             # its memory is not given to the next copy before it is read
