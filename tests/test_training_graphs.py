"""What surrounds the graphs of training, with graphs that run the tracker instead of replaying it.

test_gpu.py has the real ones.
"""

import copy
import operator
from functools import partial

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from fast import training_graphs
from fast.cuda_graphs import GraphPool
from fast.detection_graphs import graph_detector
from fast.training_graphs import (
    GraphPair,
    TrainingGraphs,
    fresh_parameters,
    graph_tracker,
    run_backward,
    run_forward,
    tensors_of,
    warm_up,
    with_tensors,
)
from model import GRAttVIS
from sparse_set import SMALLEST, tiny_model
from tracker import Tracker

pytestmark = pytest.mark.usefixtures("four_convolutions")
FRAMES = 3


class Rerun:
    """A graph whose replay calls a function, and writes its results where those of before were."""

    def __init__(self, function, outputs):
        self.function, self.outputs = function, outputs

    def replay(self):
        for static, new in zip(self.outputs, self.function()):
            if static is not None:
                static.data.copy_(new)  # like a graph, unseen by autograd


class GraphsOnCPU(TrainingGraphs):
    """Captures on a CPU, with the memory of TrainingGraphs."""

    def capture_pair(self, function, module, x):
        with torch.random.fork_rng([]):
            return self.capture_on_cpu(function, module, x)

    def capture_on_cpu(self, function, module, x):
        [static] = self.hold_inputs((x.detach(),))
        parameters = list(module.parameters())
        kept = {}

        @torch.enable_grad()
        def forward():
            kept["x"] = static.clone().requires_grad_(x.requires_grad)
            kept["results"] = run_forward(function, module, kept["x"])
            return tensors_of(kept["results"])

        def backward():
            inputs = [kept["x"], *(parameters[number] for number in gradients)]
            return run_backward(tensors_of(kept["results"]), inputs, output_gradients)

        inputs = [static.clone().requires_grad_(x.requires_grad), *parameters]
        memory = self.hold_results(*warm_up(function, module, inputs), x.device)
        outputs, output_gradients, x_gradient, gradients = memory
        forward()
        return GraphPair(
            Rerun(forward, outputs),
            Rerun(backward, [x_gradient, *gradients.values()]),
            static,
            [parameters[number] for number in gradients],
            with_tensors(kept["results"], iter(outputs)),
            output_gradients,
            x_gradient,
            list(gradients.values()),
        )


def loss_of(model, frame_queries):
    return loss_of_tracker(model.tracker, frame_queries)


def loss_of_tracker(tracker, frame_queries):
    """A number that depends on every output, on each in its own way."""
    predictions, state = tracker(frame_queries)
    outputs = tensors_of((predictions, state))
    squares = torch.stack([output.square().mean() for output in outputs])
    return (torch.linspace(0.5, 1.5, len(outputs)) * squares).sum()


@pytest.fixture
def model(monkeypatch):
    """A model whose tracker takes the path of a GPU."""
    monkeypatch.setattr(training_graphs, "TrainingGraphs", GraphsOnCPU)
    monkeypatch.setattr(training_graphs, "is_capturable", lambda *given: True)
    torch.manual_seed(0)
    model = tiny_model(**SMALLEST).train()
    graph_tracker(model)
    model.tracker.training_graphs.calls_before_capture = 0
    return model


def make_queries(model, requires_grad=False):
    tracker = model.tracker
    shape = 1, 2, FRAMES, 1, len(tracker.frame_query_embed.weight), tracker.query_feat.embedding_dim
    return torch.randn(shape, requires_grad=requires_grad)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_gradients_are_those_of_the_tracker(model, requires_grad, passes):
    """Also where several backward passes add up, and where the detector is trained."""
    plain = tiny_model(**SMALLEST).train()
    plain.load_state_dict(model.state_dict())
    for _ in range(2):
        queries = [make_queries(model, requires_grad) for _ in range(passes)]
        found = {}
        for name, some_model in (("plain", plain), ("graphs", model)):
            some_model.zero_grad()
            inputs = [query.detach().clone().requires_grad_(requires_grad) for query in queries]
            torch.manual_seed(1)  # of the gates' noise
            losses = []
            for query in inputs:
                loss = loss_of(some_model, query)
                loss.backward()
                losses.append(loss.detach())
            gradients = {n: p.grad for n, p in some_model.tracker.named_parameters()}
            found[name] = losses, gradients, [query.grad for query in inputs]
        torch.testing.assert_close(found["graphs"], found["plain"])
    assert len(model.tracker.training_graphs.graphs) == 1


def test_gradients_are_those_of_the_tracker_under_ddp(model):
    """DDP's hooks fire, also if only the last of several backward passes exchanges gradients."""
    plain = tiny_model(**SMALLEST).train()
    plain.load_state_dict(model.state_dict())
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        networks = [DistributedDataParallel(each.tracker) for each in (plain, model)]
        for _ in range(2):
            queries = [make_queries(model) for _ in range(2)]
            found = []
            for network in networks:
                network.zero_grad()
                torch.manual_seed(1)  # of the gates' noise
                with network.no_sync():
                    loss_of_tracker(network, queries[0]).backward()
                loss_of_tracker(network, queries[1]).backward()
                found.append([parameter.grad.clone() for parameter in network.parameters()])
            torch.testing.assert_close(*found)
    finally:
        distributed.destroy_process_group()
    assert len(model.tracker.training_graphs.graphs) == 1


def loss_of_detector(output):
    tensors = tensors_of(output)
    squares = torch.stack([tensor.square().mean() for tensor in tensors])
    return (torch.linspace(0.5, 1.5, len(tensors)) * squares).sum()


def test_gradients_are_those_of_a_detector():
    """Sizes in any order share their memory; only frequent ones are captured."""
    torch.manual_seed(0)
    model = tiny_model(**SMALLEST).train()
    graphs = GraphsOnCPU()
    sizes = [(32, 40)] * 4 + [(48, 40), (32, 32)] * 4 + [(32, 40)] * 4 + [(64, 64)]
    captured = []
    for size in sizes:
        images = torch.randn(2, 3, *size)
        found = []
        for detect in (GRAttVIS.detect, partial(graphs.run, GRAttVIS.detect)):
            model.zero_grad()
            output = detect(model, images)
            loss_of_detector(output).backward()
            gradients = {
                n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
            }
            found.append(([tensor.detach().clone() for tensor in tensors_of(output)], gradients))
        torch.testing.assert_close(*found)
        captured.append(len(graphs.graphs))
    # The third call with a size is captured. For a larger one, graphs with less memory are dropped.
    assert captured == [0, 0, 1, 1] + [1, 1, 1, 1, 1, 2, 2, 2] + [3, 3, 3, 3] + [3]


def test_a_pass_must_be_over_before_the_next_one(model):
    first, _ = (loss_of(model, make_queries(model)) for _ in range(2))
    with pytest.raises(RuntimeError, match="have been overwritten"):
        first.backward()


def test_a_second_backward_pass_is_an_error(model):
    loss = loss_of(model, make_queries(model))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="have been overwritten"):
        loss.backward()


def test_outputs_without_a_gradient_count_as_zero(model):
    plain = tiny_model(**SMALLEST).train()
    plain.load_state_dict(model.state_dict())
    queries = make_queries(model)
    loss_of(model, queries).backward()  # fills the memory of output gradients
    for some_model in (plain, model):
        some_model.zero_grad()
        torch.manual_seed(1)
        predictions, _ = some_model.tracker(queries)
        predictions[-1].clip_embed.square().sum().backward()
    for name, parameter in plain.tracker.named_parameters():
        found = model.tracker.get_parameter(name).grad
        expected = torch.zeros_like(found) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, expected)


def test_parameters_return_after_an_error(model):
    before = list(model.parameters())
    with pytest.raises(ZeroDivisionError), fresh_parameters(model) as copies:
        for parameter, original in zip(model.parameters(), before, strict=True):
            assert parameter is copies[original] is not original
            assert parameter.data_ptr() == original.data_ptr()
        1 / 0
    assert all(map(operator.is_, model.parameters(), before))


@pytest.mark.parametrize("trained", ["detector", "tracker", "backbone"])
def test_only_a_frozen_detector_shares_memory_with_the_tracker(trained):
    model, pool = tiny_model(**SMALLEST), GraphPool()
    prefixes = {
        "detector": ("backbone.", "pixel_decoder.", "frame_decoder."),
        "tracker": "tracker.",
        "backbone": "backbone.",
    }
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes[trained]))
    graph_detector(model, pool)
    assert (model.detection_graphs.pool is pool) == (trained == "tracker")
    assert copy.deepcopy(model).detect.__self__ is not model


def test_a_detector_in_the_same_memory_overwrites_activations(model):
    loss = loss_of(model, make_queries(model))
    model.tracker.training_graphs.pool.replays += 1  # as by SharedMemoryGraphs
    with pytest.raises(RuntimeError, match="have been overwritten"):
        loss.backward()


@pytest.mark.parametrize("change", ["trained weights", "a weight in the same memory", "a hook"])
def test_a_change_of_the_tracker_drops_graphs(model, change):
    loss_of(model, make_queries(model)).backward()
    graphs = model.tracker.training_graphs.graphs
    key, before = next(iter(graphs.items()))
    attention = model.tracker.decoder[0].self_attention
    weight = model.tracker.query_feat.weight
    if change == "trained weights":
        weight.requires_grad_(False)
    elif change == "a weight in the same memory":
        model.tracker.query_feat.weight = torch.nn.Parameter(weight.data)
    else:
        attention.register_full_backward_hook(lambda *given: None)
    model.zero_grad()
    loss_of(model, make_queries(model)).backward()
    assert graphs.get(key) is not before
    assert (model.tracker.query_feat.weight.grad is None) == (change == "trained weights")


def test_graphs_belong_to_one_model_as_it_is(model):
    loss_of(model, make_queries(model))
    graphs = model.tracker.training_graphs.graphs
    assert len(graphs) == 1
    assert copy.deepcopy(model).tracker.training_graphs.graphs == {}
    model.tracker.gate_mask = "blocked"
    key, before = next(iter(graphs.items()))
    loss_of(model, make_queries(model))
    assert model.tracker.training_graphs.graphs[key] is not before


def test_a_subclass_keeps_its_forward():
    class Other(Tracker):
        def forward(self, frame_queries, state=None):
            return "its own", state

    model = tiny_model(**SMALLEST).train()
    model.tracker.__class__ = Other
    graph_tracker(model)
    assert model.tracker(make_queries(model)) == ("its own", None)


def test_hooks_fire(model):
    calls = []
    model.tracker.decoder[0].self_attention.register_forward_hook(lambda *given: calls.append(1))
    loss_of(model, make_queries(model))
    assert len(calls) == FRAMES and not model.tracker.training_graphs.graphs


def test_without_a_gpu_the_tracker_runs_as_it_is():
    model = tiny_model(**SMALLEST).train()
    graph_tracker(model)
    loss_of(model, make_queries(model)).backward()
    assert model.tracker.training_graphs.graphs == {}
    assert isinstance(model.tracker.training_graphs, TrainingGraphs)
