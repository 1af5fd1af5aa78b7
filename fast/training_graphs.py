"""A part of a model in training as two CUDA graphs: one for forward, one for backward.

    graph_tracker(model)    # in place, before training on a GPU

The tracker goes through a clip in thousands of small kernels, forward and backward, whatever the
size of the frames. Launched one by one they take longer than they run; so do those of a trained
detector for few frames (detection_graphs.py). Results are those of the plain code
(tests/test_training_graphs.py, tests/test_gpu.py), except that weights which only lead to outputs
without a gradient get a gradient of zeros instead of none.

Source: torch.cuda.make_graphed_callables, which cannot be used here: its capture fails when a data
loader pins memory meanwhile, and each of its graphs has memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fast.cuda_graphs import GraphPool, SharedMemoryGraphs, capture_stream, capturing
from tracker import ClipPrediction, Tracker, TrackerState

if TYPE_CHECKING:
    from model import GRAttVIS


def graph_tracker(model: GRAttVIS, pool: GraphPool | None = None) -> None:
    """Let `model.tracker` train in CUDA graphs, in place; see SharedMemoryGraphs for `pool`."""
    tracker = model.tracker
    tracker.training_graphs = TrainingGraphs(pool=pool)
    tracker.forward = MethodType(forward_in_graphs, tracker)  # a copy of the model gets its own


def forward_in_graphs(
    tracker: Tracker, frame_queries: Tensor, state: TrackerState | None = None
) -> tuple[list[ClipPrediction], TrackerState]:
    """`Tracker.forward`, as CUDA graphs in training from the start of a video."""
    forward = type(tracker).forward
    if not is_capturable(tracker, frame_queries, state):
        return forward(tracker, frame_queries, state)
    return tracker.training_graphs.run(forward, tracker, frame_queries)


def is_capturable(tracker: Tracker, frame_queries: Tensor, state: TrackerState | None) -> bool:
    """Whether this is training on a GPU, through several clips from the start of a video."""
    # Noise of queries is drawn with randperm, which waits for the GPU.
    trains = tracker.training and torch.is_grad_enabled() and not tracker.query_noise
    return trains and frame_queries.is_cuda and state is None and frame_queries.shape[2] > 1


@dataclass
class GraphPair:
    """The two graphs of one input shape, and the memory that they read and write."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    x: Tensor
    parameters: list[Tensor]  # those that get a gradient
    results: Any  # of the function: the outputs in dataclasses, lists and tuples
    output_gradients: list[Tensor | None]  # None where an output has no gradient
    x_gradient: Tensor | None
    gradients: list[Tensor]  # of the parameters


class TrainingGraphs(SharedMemoryGraphs):
    """A function and its backward pass as two CUDA graphs for each input shape.

    Changing the module drops all graphs.
    """

    def __init__(self, calls_before_capture: int = 2, pool: GraphPool | None = None):
        super().__init__(calls_before_capture, pool)
        self.gradients: dict[int, Tensor] = {}  # by number of the parameter; of all graphs

    def run(self, function: Callable[[nn.Module, Tensor], Any], module: nn.Module, x: Tensor):
        """function(module, x), whose results the next call overwrites.

        function: returns tensors in dataclasses, lists and tuples; it must not wait for the GPU.
        """
        self.check_module(module)
        key = self.key_of(function, (x,)), x.requires_grad
        is_replaced = any(self.hooks) or not self.enabled  # a graph would not call hooks
        if is_replaced or self.is_rare(key):
            return function(module, x)
        if key not in self.graphs:
            self.graphs[key] = self.capture_pair(function, module, x)
        pair = self.graphs[key]
        outputs = Replay.apply(self, pair, x, *pair.parameters)
        return with_tensors(pair.results, iter(outputs))

    def capture_pair(
        self, function: Callable[[nn.Module, Tensor], Any], module: nn.Module, x: Tensor
    ) -> GraphPair:
        """Run the function once to warm up, and once to capture it, both with its backward pass."""
        [static] = self.hold_inputs((x.detach(),))
        static.requires_grad_(x.requires_grad)
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        with capture_stream(x.device), fresh_parameters(module) as copies:
            leaves = [copies[parameter] for parameter in parameters]
            outputs, gradients = warm_up(function, module, [static, *leaves])
            torch.cuda.empty_cache()  # the graphs allocate from a pool of their own
            memory = self.hold_results(outputs, gradients, x.device)
            outputs, output_gradients, x_gradient, gradients = memory
            forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with capturing(forward, self.pool):
                results = run_forward(function, module, static)
                new = tensors_of(results)
                torch._foreach_copy_(outputs, [output.detach() for output in new])
            with capturing(backward, self.pool):
                inputs = [static, *(leaves[number] for number in gradients)]
                new = run_backward(new, inputs, output_gradients)
                pairs = zip([x_gradient, *gradients.values()], new)
                targets, sources = zip(*(pair for pair in pairs if pair[0] is not None))
                torch._foreach_copy_(targets, sources)
        return GraphPair(
            forward,
            backward,
            static.detach(),
            [parameters[number] for number in gradients],
            # Without the autograd graph of the capture, which would be bound to its stream.
            with_tensors(results, iter(outputs)),
            output_gradients,
            x_gradient,
            list(gradients.values()),
        )

    def hold_results(
        self, outputs: list[Tensor], gradients: list[Tensor | None], device: torch.device
    ) -> tuple[list[Tensor], list[Tensor | None], Tensor | None, dict[int, Tensor]]:
        """Memory outside of the pool for results and gradients.

        Every replay overwrites the pool, but gradients must last until the optimizer's step.

        outputs, gradients: as of `warm_up`. Returns tensors for the outputs, their gradients, the
        gradient of x, and gradients of parameters, by number, which are the same for all graphs.
        """
        trained = [output for output in outputs if output.requires_grad]
        held = iter(self.hold("output gradients", trained, device))
        output_gradients = [next(held) if output.requires_grad else None for output in outputs]
        x_gradient, *gradients = gradients
        if x_gradient is not None:
            [x_gradient] = self.hold("x gradient", [x_gradient], device)
        outputs = self.hold_outputs(outputs, device)
        if not self.graphs:
            self.gradients = {}
        used = [number for number, gradient in enumerate(gradients) if gradient is not None]
        for number in used:
            if number not in self.gradients:
                self.gradients[number] = torch.empty_like(gradients[number], device=device)
        return outputs, output_gradients, x_gradient, {n: self.gradients[n] for n in used}


class Replay(torch.autograd.Function):
    """A pair of graphs as one operation. Its results are overwritten by the next call."""

    @staticmethod
    def forward(
        ctx, graphs: TrainingGraphs, pair: GraphPair, x: Tensor, *parameters: Tensor
    ) -> tuple:
        """The outputs. `parameters` are read by the graph, and get gradients."""
        graphs.pool.replays += 1
        ctx.pool, ctx.pair, ctx.number = graphs.pool, pair, graphs.pool.replays
        ctx.set_materialize_grads(False)
        pair.x.copy_(x)
        pair.forward.replay()
        outputs = [output.detach() for output in tensors_of(pair.results)]
        gradients = zip(outputs, pair.output_gradients)
        ctx.mark_non_differentiable(*(output for output, gradient in gradients if gradient is None))
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *output_gradients: Tensor | None) -> tuple:
        """The gradients of `forward`'s arguments; RuntimeError after another pass."""
        pair = ctx.pair
        if ctx.number != ctx.pool.replays:
            raise RuntimeError("the activations of this forward pass have been overwritten")
        for static, gradient in zip(pair.output_gradients, output_gradients):
            if static is not None and gradient is None:
                static.zero_()
            elif static is not None:
                static.copy_(gradient)
        # Autograd adds the results to p.grad without a copy if it is None. Then p.grad is memory of
        # the graph, which a second backward pass (--accumulate) would overwrite.
        for parameter in pair.parameters:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()
        pair.backward.replay()
        ctx.pool.replays += 1  # it has overwritten activations, too
        x_gradient = None if pair.x_gradient is None else pair.x_gradient.detach()
        return None, None, x_gradient, *(gradient.detach() for gradient in pair.gradients)


def warm_up(
    function: Callable[[nn.Module, Tensor], Any], module: nn.Module, inputs: list[Tensor]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Run function(module, inputs[0]) and its backward pass.

    inputs: x and the parameters. Returns the outputs and the gradients of the inputs, None where
    there is none, without their memory: on the meta device.
    """
    outputs = tensors_of(run_forward(function, module, inputs[0]))
    ones = [torch.ones_like(output) if output.requires_grad else None for output in outputs]
    gradients = run_backward(outputs, inputs, ones)
    return (
        [torch.empty_like(x, device="meta", requires_grad=x.requires_grad) for x in outputs],
        [None if x is None else torch.empty_like(x, device="meta") for x in gradients],
    )


@contextmanager
def fresh_parameters(module: nn.Module) -> Iterator[dict[Tensor, Tensor]]:
    """A context in which a module has new parameters, in the memory of its own ones.

    Backward synchronises with the stream on which a parameter was used first. That is another one
    if the module has been used before, or in DistributedDataParallel, and a capture cannot wait
    for it. Yields the new parameter of each.
    """
    owned = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None
    ]
    copies = {
        parameter: nn.Parameter(parameter.detach(), parameter.requires_grad)
        for *_, parameter in owned
    }
    for owner, name, parameter in owned:
        owner._parameters[name] = copies[parameter]
    try:
        yield copies
    finally:
        for owner, name, parameter in owned:
            owner._parameters[name] = parameter


def run_forward(function: Callable[[nn.Module, Tensor], Any], module: nn.Module, x: Tensor) -> Any:
    """function(module, x)."""
    # Autocast caches 16-bit weights. None may come from before the graph or be used after it.
    torch.clear_autocast_cache()
    results = function(module, x)
    torch.clear_autocast_cache()
    return results


def run_backward(
    outputs: list[Tensor], inputs: list[Tensor], output_gradients: list[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of the inputs; None where there is none."""
    pairs = [pair for pair in zip(outputs, output_gradients) if pair[1] is not None]
    outputs, output_gradients = zip(*pairs)
    with_gradient = [x for x in inputs if x.requires_grad]
    with torch.autocast("cuda", enabled=False):  # backward runs outside of autocast
        found = iter(
            torch.autograd.grad(outputs, with_gradient, output_gradients, allow_unused=True)
        )
        torch.clear_autocast_cache()  # of what backward has computed again
    return [next(found) if x.requires_grad else None for x in inputs]


# Tensors in dataclasses, lists and tuples


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in `value`."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        value = vars(value).values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for part in value for tensor in tensors_of(part)]


def with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """`value` with other tensors, in the order of `tensors_of`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if is_dataclass(value):
        parts = {name: with_tensors(part, tensors) for name, part in vars(value).items()}
        return type(value)(**parts)
    if isinstance(value, (list, tuple)):
        return type(value)(with_tensors(part, tensors) for part in value)
    return value
