"""Positions of pixels depend on the size of a map only: a CUDA graph keeps them.

    keep_positions(model)    # in place, for inference

They take 20 small kernels each time they are computed, six times for a chunk of frames.
"""

from torch import Tensor, nn

from detector import SinePosition
from fast.cuda_graphs import graph_constant
from fast.plain_source import is_unchanged

DIGEST = "ba00b79d"  # of SinePosition: without parameters


def keep_positions(model: nn.Module) -> None:
    """Let CUDA graphs keep the positions of pixels instead of computing them, in place."""
    if not is_unchanged(SinePosition, DIGEST):  # such as learned positions
        return
    for module in model.modules():
        if type(module) is SinePosition:
            module.__class__ = KeptSinePosition


class KeptSinePosition(SinePosition):
    """The position encoding, computed once per CUDA graph."""

    def forward(self, maps: Tensor) -> Tensor:
        key = "sine_position", maps.shape[1:], maps.dtype
        return graph_constant(key, lambda: super(KeptSinePosition, self).forward(maps))
