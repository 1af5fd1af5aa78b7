"""The tracker of training as two CUDA graphs: one for forward, one for backward.

    graph_tracker(model)    # in place, before training on a GPU

The tracker goes through a clip in thousands of small kernels, forward and backward, whatever the
size of the frames. Launched one by one they take longer than they run. Results are those of the
plain tracker (tests/test_training_graphs.py, tests/test_gpu.py), except that weights which only
lead to outputs without a gradient get a gradient of zeros instead of none.

Source: torch.cuda.make_graphed_callables, which cannot be used here: its capture fails when a data
loader pins memory meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fast.cuda_graphs import CUDAGraphCache
from fast.streams import get_stream
from tracker import ClipPrediction, Tracker, TrackerState

if TYPE_CHECKING:
    from model import GRAttVIS


def graph_tracker(model: GRAttVIS) -> None:
    """Let `model.tracker` train in CUDA graphs, in place."""
    tracker = model.tracker
    tracker.training_graphs = TrainingGraphs()
    tracker.forward = MethodType(forward_in_graphs, tracker)  # a copy of the model gets its own


def forward_in_graphs(
    tracker: Tracker, frame_queries: Tensor, state: TrackerState | None = None
) -> tuple[list[ClipPrediction], TrackerState]:
    """`Tracker.forward`, as CUDA graphs in training from the start of a video."""
    if not is_capturable(tracker, frame_queries, state):
        return Tracker.forward(tracker, frame_queries, state)
    graphs = tracker.training_graphs
    graphs.check_module(tracker)
    if any(graphs.hooks):  # a graph would not call them
        return Tracker.forward(tracker, frame_queries, state)
    return graphs.track(tracker, frame_queries)


def is_capturable(tracker: Tracker, frame_queries: Tensor, state: TrackerState | None) -> bool:
    """Whether this is training on a GPU, through several clips from the start of a video."""
    # Noise of queries is drawn with randperm, which waits for the GPU.
    trains = tracker.training and torch.is_grad_enabled() and not tracker.query_noise
    return trains and frame_queries.is_cuda and state is None and frame_queries.shape[2] > 1


@dataclass
class TrackerGraphs:
    """Both graphs for one shape, with the tensors that they read and write."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    frame_queries: Tensor
    parameters: list[Tensor]
    results: list  # the predictions and the state
    outputs: list[Tensor]  # all tensors of `results`
    output_gradients: list[Tensor | None]  # None where an output has no gradient
    input_gradients: list[Tensor | None]  # of frame_queries and all parameters; None where unused
    calls: int = 0


class TrainingGraphs(CUDAGraphCache):
    """The graphs of a tracker by shape; `check_module` drops them if the tracker has changed."""

    def track(
        self, tracker: Tracker, frame_queries: Tensor
    ) -> tuple[list[ClipPrediction], TrackerState]:
        """Tracker.forward(tracker, frame_queries); captured at the first call with this shape."""
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        key = frame_queries.shape, frame_queries.dtype, frame_queries.requires_grad, autocast
        if key not in self.graphs:
            devices = [frame_queries.device] if frame_queries.is_cuda else []
            with torch.random.fork_rng(devices):  # the noise of a step does not depend on captures
                self.graphs[key] = capture(tracker, frame_queries)
        graphs = self.graphs[key]
        outputs = Replay.apply(graphs, frame_queries, *graphs.parameters)
        *predictions, state = with_tensors(graphs.results, outputs)
        return predictions, state

    def __reduce__(self) -> tuple:
        """A copied or unpickled cache is empty."""
        return TrainingGraphs, ()


class Replay(torch.autograd.Function):
    """The graphs as one operation. Its results are overwritten by the next call."""

    @staticmethod
    def forward(ctx, graphs: TrackerGraphs, frame_queries: Tensor, *parameters: Tensor) -> tuple:
        """The outputs of the tracker. `parameters` are read by the graph, and get gradients."""
        graphs.calls += 1
        ctx.graphs, ctx.call = graphs, graphs.calls
        ctx.set_materialize_grads(False)
        graphs.frame_queries.data.copy_(frame_queries)
        graphs.forward.replay()
        outputs = [output.detach() for output in graphs.outputs]
        pairs = zip(outputs, graphs.output_gradients)
        ctx.mark_non_differentiable(*(output for output, gradient in pairs if gradient is None))
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor | None) -> tuple:
        """The gradients of `forward`'s arguments; RuntimeError after another forward pass."""
        graphs = ctx.graphs
        if ctx.call != graphs.calls:
            raise RuntimeError("a later forward pass has overwritten the activations of this one")
        for static, gradient in zip(graphs.output_gradients, gradients):
            if static is not None and gradient is None:
                static.zero_()
            elif static is not None:
                static.copy_(gradient)
        # Autograd adds the results to p.grad without a copy if it is None. Then p.grad is memory of
        # the graph, which a second backward pass (--accumulate) would overwrite.
        for parameter in graphs.parameters:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()
        graphs.backward.replay()
        return None, *(g if g is None else g.detach() for g in graphs.input_gradients)


def capture(tracker: Tracker, frame_queries: Tensor) -> TrackerGraphs:
    """Run the tracker once to warm up, and once to capture it, both with its backward pass."""
    static = frame_queries.detach().clone().requires_grad_(frame_queries.requires_grad)
    parameters = [parameter for parameter in tracker.parameters() if parameter.requires_grad]
    stream, current = get_stream(static.device), torch.cuda.current_stream(static.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream), same_weights(tracker):
        leaves = [parameter for parameter in tracker.parameters() if parameter.requires_grad]
        outputs = tensors_of(run_forward(tracker, static))
        # The next forward pass overwrites the memory of graphs. Gradients, which are added up over
        # several passes, must not lie there: the graph copies them to those of the warm-up.
        gradients = run_backward(outputs, static, leaves, list(map(torch.ones_like, outputs)))
        del outputs
        torch.cuda.empty_cache()  # the graphs allocate from a pool of their own
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Data loaders pin memory in other threads meanwhile.
        forward.capture_begin(capture_error_mode="thread_local")
        try:
            results = run_forward(tracker, static)
        finally:  # otherwise the stream would stay in capture
            forward.capture_end()
        outputs = tensors_of(results)
        output_gradients = [torch.empty_like(x) if x.requires_grad else None for x in outputs]
        backward.capture_begin(pool=forward.pool(), capture_error_mode="thread_local")
        try:
            copy_all(gradients, run_backward(outputs, static, leaves, output_gradients))
        finally:
            backward.capture_end()
    current.wait_stream(stream)
    # Without the autograd graph of the capture, which would be bound to its stream.
    outputs = [output.detach() for output in outputs]
    results = with_tensors(results, outputs)
    return TrackerGraphs(
        forward,
        backward,
        static.detach(),
        parameters,
        results,
        outputs,
        output_gradients,
        gradients,
    )


def copy_all(targets: list[Tensor | None], sources: list[Tensor | None]) -> None:
    """Copy tensors in few kernels; None where there is none."""
    pairs = [pair for pair in zip(targets, sources) if pair[0] is not None]
    targets, sources = zip(*pairs)
    torch._foreach_copy_(targets, sources)


@contextmanager
def same_weights(module: nn.Module) -> Iterator[None]:
    """A context in which a module has new parameters, in the memory of its own ones.

    Backward synchronises with the stream on which a parameter was used first. That is another one
    if the module has been used before, or in DistributedDataParallel, and a capture cannot wait
    for it.
    """
    owned = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None
    ]
    for owner, name, parameter in owned:
        owner._parameters[name] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    try:
        yield
    finally:
        for owner, name, parameter in owned:
            owner._parameters[name] = parameter


def run_forward(tracker: Tracker, frame_queries: Tensor) -> list:
    """The predictions and the state of Tracker.forward."""
    # Autocast caches 16-bit weights. None may come from before the graph or be used after it.
    torch.clear_autocast_cache()
    predictions, state = Tracker.forward(tracker, frame_queries)
    torch.clear_autocast_cache()
    return [*predictions, state]


def run_backward(
    outputs: list[Tensor],
    frame_queries: Tensor,
    parameters: list[Tensor],
    output_gradients: list[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of frame_queries and all parameters."""
    pairs = [pair for pair in zip(outputs, output_gradients) if pair[0].requires_grad]
    outputs, output_gradients = zip(*pairs)
    inputs = [x for x in (frame_queries, *parameters) if x.requires_grad]
    with torch.autocast("cuda", enabled=False):  # backward runs outside of autocast
        gradients = torch.autograd.grad(outputs, inputs, output_gradients, allow_unused=True)
    return list(gradients) if frame_queries.requires_grad else [None, *gradients]


def tensors_of(results: list) -> list[Tensor]:
    """All tensors in the fields of `results`, which are tensors, lists of tensors or None."""
    fields = [value for result in results for value in vars(result).values()]
    lists = [value if isinstance(value, list) else [value] for value in fields]
    return [tensor for tensors in lists for tensor in tensors if tensor is not None]


def with_tensors(results: list, tensors: Iterable[Tensor]) -> list:
    """`results` with other tensors, in the order of `tensors_of`."""
    tensors = iter(tensors)

    def replaced(value):
        if isinstance(value, list):
            return [next(tensors) for _ in value]
        return None if value is None else next(tensors)

    return [
        type(result)(**{name: replaced(value) for name, value in vars(result).items()})
        for result in results
    ]
