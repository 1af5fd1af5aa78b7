"""Batches on their way from a loader process: all tensors in one block of shared memory.

    packed = PackedBatch(batch, shared=True, blocks=ReusedBlocks(loader=0))    # in the worker
    packed.pin_memory().unpack()                                               # the same batch

A block needs one file descriptor for a whole batch. If shared memory is full, the block is sent
through a pipe, which is slower.

Speed: blocks are reused. Freeing 150 MB of shared memory takes 30 ms, in which no other thread of
the main process runs Python code. Every training step on a GPU was disturbed by that.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, of each tensor in a block: a cache line
HEADER = ALIGNMENT  # bytes before the tensors. The first one says whether the block is in use
GROWTH = 1.25  # of a block that has become too small

# In the main process: the blocks of each loader by worker and number. Blocks stay mapped here.
kept_blocks: dict[int, dict[tuple[int, int], Tensor]] = defaultdict(dict)


class PackedBatch:
    """A batch as one block of bytes for its tensors, and a pickle of everything else."""

    def __init__(self, batch, shared: bool, blocks: ReusedBlocks | None = None):
        """batch: any picklable object. shared: store its tensors in shared memory. blocks: of this
        worker, to be filled again; requires that `pin_memory` is called for each batch.
        """
        buffers: list[pickle.PickleBuffer] = []
        stream = io.BytesIO()
        BatchPickler(stream, protocol=5, buffer_callback=buffers.append).dump(batch)
        self.head, views = stream.getvalue(), [buffer.raw() for buffer in buffers]
        self.sizes = [view.nbytes for view in views]
        self.size = HEADER + sum(map(aligned, self.sizes))
        self.owner = None
        if blocks is None:
            self.block = new_block(self.size, shared)
        else:
            self.block, self.owner = blocks.take(self.size)
        memory = self.memory()
        for start, view in zip(self.starts(), views):
            memory[start : start + view.nbytes] = view

    def starts(self) -> list[int]:
        """Offset of each tensor in bytes."""
        return np.cumsum([HEADER, *map(aligned, self.sizes)])[:-1].tolist()

    def memory(self) -> memoryview:
        """The block's bytes."""
        block = self.block.numpy() if isinstance(self.block, Tensor) else self.block
        return memoryview(block)

    def pin_memory(self) -> PackedBatch:
        """Copy the block to page-locked memory; called by DataLoader in the main process."""
        block = self.block if isinstance(self.block, Tensor) else torch.from_numpy(self.block)
        self.block = block[: self.size].pin_memory()
        if self.owner:
            loader, worker, number = self.owner
            kept_blocks[loader][worker, number] = block
            block[0] = False  # the worker may fill it again
        return self

    def unpack(self):
        """The batch; its tensors are views of the block."""
        memory = self.memory()
        tensors = [memory[start : start + size] for start, size in zip(self.starts(), self.sizes)]
        return pickle.loads(self.head, buffers=tensors)


class BatchPickler(pickle.Pickler):
    """Pickles tensors as NumPy arrays, whose data goes to the buffer callback."""

    def reducer_override(self, thing):
        """Pickle a tensor as contiguous memory and the order of its axes."""
        if not isinstance(thing, Tensor):
            return NotImplemented
        order = sorted(range(thing.ndim), key=thing.stride, reverse=True)  # the order in memory
        array = thing.detach().permute(order).contiguous().numpy()
        return restore_tensor, (array, [order.index(axis) for axis in range(thing.ndim)])


def restore_tensor(array: np.ndarray, axes: list[int]) -> Tensor:
    """Restore a tensor from an array whose axes were sorted by stride."""
    return torch.from_numpy(array).permute(axes)


def aligned(size: int) -> int:
    """A size rounded up to a multiple of ALIGNMENT."""
    return math.ceil(size / ALIGNMENT) * ALIGNMENT


# Blocks


class ReusedBlocks:
    """The blocks of a worker, which it fills again once the main process has copied them."""

    def __init__(self, loader: int):
        """loader: a number of its own, the same in all its workers."""
        self.loader = loader
        self.blocks: list[Tensor] = []

    def take(self, size: int) -> tuple[Tensor | np.ndarray, tuple[int, int, int] | None]:
        """A block of `size` bytes or more, now in use, and its owner: loader, worker and number.

        If shared memory is full, the block is an array, sent through a pipe, and has no owner.
        """
        in_use = [bool(block[0]) for block in self.blocks] + [False]
        number = in_use.index(False)  # of a free block, or the next number
        if number == len(self.blocks) or len(self.blocks[number]) < size:
            block = new_block(int(size * GROWTH), shared=True)
            if not isinstance(block, Tensor):
                return block, None
            self.blocks[number : number + 1] = [block]
        self.blocks[number][0] = True
        return self.blocks[number], (self.loader, os.getpid(), number)


def new_block(size: int, shared: bool) -> Tensor | np.ndarray:
    """uint8 memory of `size` bytes: shared if requested and available."""
    block = torch.empty(size, dtype=torch.uint8)
    if shared:
        try:
            return block.share_memory_()
        except (RuntimeError, OSError) as error:
            if not is_about_shared_memory(error) and not is_about_files(error):
                raise
    return block.numpy() if shared else block  # DataLoader sends an array's bytes through a pipe


def is_about_shared_memory(error: Exception) -> bool:
    """Whether an error is caused by full shared memory."""
    return bool(re.search(r"shared memory|\bshm|Bus error", str(error)))


def is_about_files(error: Exception) -> bool:
    """Whether an error is caused by too many open files."""
    return bool(re.search(r"Too many open files|items of ancdata", str(error)))
