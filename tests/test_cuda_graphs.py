"""Without a GPU no graph is captured and no stream used: functions are simply called."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch

from fast import cuda_graphs
from fast.cuda_graphs import CapturedGraph, CUDAGraphCache, graph_constant
from fast.streams import SideStream
from sparse_set import SMALLEST, tiny_model

pytestmark = pytest.mark.usefixtures("four_convolutions")


def double_and_sum(x, y):
    return 2 * x, x + y


@pytest.mark.parametrize("gradients", [True, False])
def test_a_function_is_called_every_time(gradients):
    calls = []

    def function(x, y):
        calls.append(x)
        return double_and_sum(x, y)

    graphs = CUDAGraphCache()
    with torch.set_grad_enabled(gradients):
        for value in (1.0, 3.0):
            x, y = torch.full((2,), value, requires_grad=True), torch.ones(2)
            twice, total = graphs(function, x, y)
            assert twice.tolist() == [2 * value] * 2 and total.tolist() == [value + 1] * 2
            assert twice.requires_grad == total.requires_grad == gradients
    assert len(calls) == 2 and not graphs.graphs


class FakeInput:
    """What a cache looks at, of a tensor on a GPU."""

    is_cuda, shape, dtype = True, (2,), torch.float32


def test_a_captured_graph_is_replayed_unless_hooks_must_fire():
    model, replays = tiny_model(**SMALLEST), []
    graphs = CUDAGraphCache()
    graph = SimpleNamespace(replay=lambda: replays.append("replay"))
    graphs.capture = lambda *given: CapturedGraph(graph, [], (torch.ones(1),), {})

    def call():
        replays.clear()
        with torch.no_grad():
            (output,) = graphs(lambda x: replays.append("call") or (torch.ones(1),), FakeInput())
        assert output == 1
        return replays

    graphs.check_module(model)
    assert call() == ["replay"]
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(model.tracker.decoder[0], register)(print)  # in the middle of a video
        assert call() == ["call"]
        handle.remove()
        assert call() == ["replay"]
    with graphs.disabled():
        assert call() == ["call"]
        with graphs.disabled():
            pass
        assert call() == ["call"]
    assert call() == ["replay"] and len(graphs.graphs) == 1
    graphs.clear()
    assert not graphs.graphs


def test_outputs_are_not_overwritten_by_the_next_replay():
    graphs, static = CUDAGraphCache(), torch.zeros(1)
    graph = SimpleNamespace(replay=lambda: static.add_(1))
    graphs.capture = lambda *given: CapturedGraph(graph, [], (static,), {})
    with torch.no_grad():
        outputs = [graphs(double_and_sum, FakeInput())[0] for _ in range(3)]
    assert torch.cat(outputs).tolist() == [1, 2, 3]


def test_training_releases_graphs():
    """As the weights are going to change, and the memory is needed; evaluation keeps it."""
    model = tiny_model(**SMALLEST)
    model.cuda_graphs.graphs["captured"] = None
    assert model.eval().cuda_graphs.graphs and not model.train().cuda_graphs.graphs
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.cuda_graphs, CUDAGraphCache)
        assert other.cuda_graphs is not model.cuda_graphs


def test_a_side_stream_has_no_effect_on_a_cpu():
    side = SideStream(torch.device("cpu"), priority=-1)
    side.wait()
    with side:
        x = torch.ones(3)
    side.join(x)
    assert x.sum() == 3
    with pytest.raises(ZeroDivisionError), side:  # errors are passed on
        1 / 0


def test_constants_are_computed_once_while_a_graph_is_captured(monkeypatch):
    computed = []

    def compute():
        computed.append(1)
        return torch.ones(len(computed))

    graph_constant(("ones", 3), compute)
    graph_constant(("ones", 3), compute)
    assert len(computed) == 2  # outside of a capture, at each call
    monkeypatch.setattr(cuda_graphs, "_constants", [{}])
    first = graph_constant(("ones", 3), compute)
    assert graph_constant(("ones", 3), compute) is first
    assert graph_constant(("ones", 4), compute) is not first
    assert len(computed) == 4
