"""What surrounds the graphs of the detector; test_gpu.py has the real ones."""

import copy

import pytest
import torch

from fast.cuda_graphs import CapturedGraph, GraphPool, SharedMemoryGraphs
from fast.detection_graphs import graph_detector
from sparse_set import tiny_model


class OnGPU(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


class CPUGraph:
    """In the place of a torch.cuda.CUDAGraph."""


class Rerun:
    """A graph whose replay calls the function again."""

    def __init__(self, function, inputs, outputs):
        self.function, self.inputs, self.outputs = function, inputs, outputs

    def replay(self):
        for static, new in zip(self.outputs, self.function(*self.inputs)):
            static.copy_(new)


class GraphsOnCPU(SharedMemoryGraphs):
    """Captures on a CPU, with the memory of SharedMemoryGraphs."""

    captured = 0

    def capture(self, function, inputs):
        self.captured += 1
        inputs = self.hold_inputs(inputs)
        outputs = self.hold_outputs(function(*inputs), inputs[0].device)
        return CapturedGraph(Rerun(function, inputs, outputs), inputs, outputs, {})


def triple_and_negate(x):
    return 3 * x, -x.double()


@torch.no_grad()
def call(graphs, *shape):
    x = torch.randn(shape).as_subclass(OnGPU)
    outputs = graphs(triple_and_negate, x)
    plain = x.as_subclass(torch.Tensor)
    for output, expected in zip(outputs, triple_and_negate(plain)):
        assert torch.equal(output.as_subclass(torch.Tensor), expected)
    return outputs


def test_frequent_shapes_are_captured():
    graphs = GraphsOnCPU()
    for number in range(5):
        call(graphs, 2, 3)
        assert graphs.captured == (number >= 2)
    for _ in range(3):
        call(graphs, 3, 1)  # smaller, in the memory of the first
    assert graphs.captured == len(graphs.graphs) == 2
    graphs.max_graphs = 2
    for _ in range(4):
        call(graphs, 1, 1)
    assert graphs.captured == 2


def test_outputs_are_not_overwritten():
    graphs = GraphsOnCPU()
    first = [call(graphs, 2, 3)[0] for _ in range(3)][-1]
    before = first.clone()
    call(graphs, 2, 3)
    assert torch.equal(first, before)


def test_larger_images_get_new_memory():
    """Graphs of the smaller memory are dropped, and captured again in the larger one."""
    graphs = GraphsOnCPU()
    for _ in range(3):
        call(graphs, 2, 3)
    for _ in range(3):
        call(graphs, 40, 50)
    assert graphs.captured == 2 and len(graphs.graphs) == 1
    call(graphs, 2, 3)
    assert graphs.captured == 3 and len(graphs.graphs) == 2


def test_replays_are_counted():
    """A backward pass must not follow the replay of another graph in its pool."""
    graphs = GraphsOnCPU()
    for _ in range(5):
        call(graphs, 2, 3)
    assert graphs.pool.replays == 3


def test_held_tensors_do_not_overlap():
    graphs = SharedMemoryGraphs()
    maps = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tensors = [maps, torch.randn(7).double(), torch.ones(3, dtype=torch.bool)]
    held = graphs.hold("inputs", tensors, torch.device("cpu"))
    for static, tensor in zip(held, tensors):
        static.copy_(tensor)
    for static, tensor in zip(held, tensors):
        assert torch.equal(static, tensor) and static.stride() == tensor.stride()
    (elsewhere,) = graphs.hold("inputs", [maps], torch.device("meta"))
    assert elsewhere.device.type == "meta"


def test_a_pool_lasts_as_long_as_a_graph(monkeypatch):
    """CUDA frees the memory of a pool with its last graph."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    pool = GraphPool()
    tracker, detector = SharedMemoryGraphs(pool=pool), SharedMemoryGraphs(pool=pool)
    tracker.graphs[0], detector.graphs[0] = (CPUGraph() for _ in range(2))
    first, second = (pool.handle_for(graphs.graphs[0]) for graphs in (tracker, detector))
    assert first is second
    detector.graphs.clear()
    detector.graphs[0] = CPUGraph()
    assert pool.handle_for(detector.graphs[0]) is first
    tracker.graphs.clear()
    detector.graphs.clear()
    assert pool.handle_for(CPUGraph()) is not first
    assert copy.deepcopy(tracker).pool is not pool


@pytest.mark.parametrize("is_trained", [True, False])
def test_without_a_gpu_the_detector_runs_as_it_is(is_trained):
    model = tiny_model().train().requires_grad_(is_trained)
    images = model.prepare([torch.randint(0, 256, (2, 3, 40, 48), dtype=torch.uint8)])
    expected = model.detect(images)
    graph_detector(model)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            found = [model.detect(images) for _ in range(4)][-1]
        assert torch.equal(found.features, expected.features)
        assert torch.equal(found.queries, expected.queries)
        for ours, theirs in zip(found.predictions, expected.predictions, strict=True):
            assert all(map(torch.equal, ours, theirs))
    assert not model.detection_graphs.graphs
    assert not copy.deepcopy(model).detection_graphs.calls
