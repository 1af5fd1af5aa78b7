"""Frames on their way into the model: checked, put together as they come, and the size that they are padded to.

A video comes as one tensor, as an iterable of frames, or in batches of any length (data.py, demo.py); the model looks at as many
frames at once as suits its device. Padding to multiples of 32 is upstream's (grattvis/grattvis_model.py); taking frames as they come
is not. Shape letters are declared in model.py.
"""
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

SIZE_DIVISOR = 32  # of padded frames, pixels: the coarsest stride


def padded(height: int, width: int) -> tuple[int, int]:
    """A size rounded up to multiples of 32."""
    return math.ceil(height / SIZE_DIVISOR) * SIZE_DIVISOR, math.ceil(width / SIZE_DIVISOR) * SIZE_DIVISOR


def check_frame(frame: Tensor) -> None:
    """ValueError unless it is uint8 (3, H, W)."""
    if not isinstance(frame, Tensor):
        raise ValueError(f"a frame must be a torch tensor, not {type(frame).__module__}.{type(frame).__name__}")
    if frame.dtype != torch.uint8 or frame.ndim != 3 or len(frame) != 3:
        raise ValueError(f"a frame must be uint8 of shape (3, H, W), not {frame.dtype} {tuple(frame.shape)}")


def regrouped(batches: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """Batches of frames, however many each holds -> batches of `count`, but for the last. ValueError if their sizes differ."""
    rest = None
    for batch in batches:
        if not len(batch):
            continue
        check_frame(batch[0])
        if rest is not None and batch.shape[1:] != rest.shape[1:]:
            raise ValueError(f"all frames of a video must have one size, not {sorted({(*rest.shape[2:],), (*batch.shape[2:],)})}")
        rest = batch if rest is None or not len(rest) else torch.cat((rest, batch))
        whole = len(rest) - len(rest) % count
        yield from rest[:whole].split(count) if whole else ()
        rest = rest[whole:]
    if rest is not None and len(rest):
        yield rest


def in_batches(frames: Tensor | Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """Frames (3, H, W) -> batches of up to `count` of one size."""
    if count < 1:
        raise ValueError(f"a batch needs at least one frame, not {count}")
    batch = []
    for frame in frames:
        check_frame(frame)
        if batch and (len(batch) == count or frame.shape != batch[0].shape):
            yield torch.stack(batch)
            batch = []
        batch.append(frame)
    if batch:
        yield torch.stack(batch)
