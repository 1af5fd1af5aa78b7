"""Fixtures shared by the tests."""
import pytest

import golden_set


@pytest.fixture(scope="session")
def golden_dir():
    """The folder of golden numbers (GOLDEN_DIR, or tests/golden)."""
    return golden_set.GOLDEN_DIR
