"""Without a GPU nothing is recorded and nothing runs beside: a function is simply called."""
import copy
import pickle

import pytest
import torch
from sparse_set import tiny_model

from fast.cuda_graphs import Beside, Replay


def double_and_sum(x, y):
    return 2 * x, x + y


@pytest.mark.parametrize("gradients", [True, False])
def test_a_function_is_called_every_time(gradients):
    calls = []

    def function(x, y):
        calls.append(x)
        return double_and_sum(x, y)

    replay = Replay()
    with torch.set_grad_enabled(gradients):
        for value in (1.0, 3.0):
            x, y = torch.full((2,), value, requires_grad=True), torch.ones(2)
            twice, total = replay(function, x, y)
            assert twice.tolist() == [2 * value] * 2 and total.tolist() == [value + 1] * 2
            assert twice.requires_grad == total.requires_grad == gradients
    assert len(calls) == 2 and not replay.graphs


def test_training_gives_back_what_was_recorded():
    """As the weights are going to change, and the memory is needed; evaluation keeps it."""
    model = tiny_model()
    model.replay.graphs["recorded"] = None
    assert model.eval().replay.graphs and not model.train().replay.graphs
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.replay, Replay) and other.replay is not model.replay


@pytest.mark.parametrize("waits", [True, False])
def test_nothing_runs_beside_on_a_cpu(waits):
    beside = Beside(torch.device("cpu"), waits)
    with beside:
        x = torch.ones(3)
    beside.join(x)
    assert x.sum() == 3
    with pytest.raises(ZeroDivisionError), beside:            # an error is no secret
        1 / 0
