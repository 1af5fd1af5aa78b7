"""Fixtures shared by the tests."""
import pytest
import torch

import golden_set


def fixed_threads(count: int):
    """A fixture for all tests of a module: sums depend on the number of threads in their last bit, here it is the same everywhere."""
    @pytest.fixture(scope="module", autouse=True)
    def threads():
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        yield
        torch.set_num_threads(before)
    return threads


@pytest.fixture(scope="session")
def golden_dir():
    """The folder of golden numbers (GOLDEN_DIR, or tests/golden)."""
    return golden_set.GOLDEN_DIR
