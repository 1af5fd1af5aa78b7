"""Damaged and hostile files: every loader succeeds or raises a one-line error.

It never crashes, hangs, executes code or allocates 2 GB.
"""

import pytest

from fuzz import LOADERS, fuzz

FEW = {"annotations": 100, "results": 100, "pth": 20, "pkl": 30, "pictures": 100}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the inputs are made, from one small data set and model."""
    return tmp_path_factory.mktemp("faults")


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
def test_a_few_inputs(folder, loader):
    outcomes, findings = fuzz(loader, FEW[loader], folder)
    assert not findings, "\n\n".join(findings)
    assert outcomes.total() == FEW[loader] and outcomes["refused"]


@pytest.mark.faults
@pytest.mark.parametrize("loader", LOADERS)
def test_ten_thousand_inputs(folder, loader):
    outcomes, findings = fuzz(loader, 10_000, folder)
    assert not findings, "\n\n".join(findings)
    assert outcomes.total() == 10_000 and outcomes["refused"] and outcomes["success"]
