"""Models as outlines: their modules, and the shapes and names of their weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch


def same(values: torch.Tensor, *arguments, **options) -> torch.Tensor:
    return values


@contextmanager
def outlined() -> Iterator[None]:
    """Models made here are on the meta device, where nothing is allocated.

    Nothing is drawn either, since PyTorch takes longer for that than for all else.
    """
    drawing = mock.patch.multiple(torch.Tensor, normal_=same, uniform_=same)
    with torch.device("meta"), drawing:
        yield
