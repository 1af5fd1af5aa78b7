"""Shared fixtures, the number of threads, and the default marker "fast"."""

import os
from unittest import mock

import processes

os.environ |= processes.ONE_THREAD  # before torch is imported, which reads it once

import pytest  # noqa: E402
import torch  # noqa: E402

import golden_set  # noqa: E402

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    """A test is golden by its name, and fast unless it is marked otherwise."""
    for item in items:
        if "golden" in item.name:
            item.add_marker("golden")
        if not item.get_closest_marker("slow") and not item.get_closest_marker("faults"):
            item.add_marker("fast")


def fixed_threads(count: int):
    """A fixture for all tests of a module: sums depend on the number of threads in their last bit,
    here it is the same everywhere."""

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


@pytest.fixture(scope="module")
def four_convolutions():
    """A backbone of that name, the smallest: see sparse_set.py."""
    from backbone import BACKBONES  # here, since few tests need them
    from sparse_set import FourConvolutions

    with mock.patch.dict(BACKBONES, four_convolutions=lambda norm, window: FourConvolutions()):
        yield
