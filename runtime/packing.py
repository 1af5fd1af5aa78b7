"""Batches on their way from a loader process: all tensors in one block of shared memory.

    packed = PackedBatch(batch, shared=True, blocks=ReusedBlocks())    # in the worker
    packed.pin_memory().unpack()                                       # in the main process

A block needs one file descriptor for a whole batch. If shared memory is full, the block is sent
through a pipe, which is slower.

Speed: blocks are reused. Unmapping 150 MB of shared memory takes 30 ms and holds the interpreter
lock, which delayed the training steps of a GPU. A worker sets the first byte of a block before
filling it; the main process clears it after copying the block to pinned memory.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, of each tensor in a block: a cache line
HEADER = ALIGNMENT  # bytes before the tensors; the first one is 1 while the block is in use
GROWTH = 1.25  # a reused block is larger than its first batch by this factor

# Blocks that the main process keeps mapped: process id of the worker -> block number -> block.
kept_blocks: dict[int, dict[int, Tensor]] = defaultdict(dict)


class PackedBatch:
    """A batch as one block of bytes for its tensors, and a pickle of everything else."""

    def __init__(self, batch, shared: bool, blocks: ReusedBlocks | None = None):
        """
        Args:
            batch: any picklable object.
            shared: store its tensors in shared memory.
            blocks: the worker's reusable blocks, which are shared. `pin_memory` must then be called
                for every batch, or blocks accumulate.
        """
        stream = io.BytesIO()
        pickler = BatchPickler(stream)
        pickler.dump(batch)
        self.head = stream.getvalue()
        self.places: list[Place] = []
        self.size = HEADER  # of the block, in bytes
        for tensor in pickler.tensors:
            self.places.append(Place.of(tensor, self.size))
            self.size += math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT
        self.owner = None
        if blocks:
            self.block, self.owner = blocks.take(self.size)
        else:
            self.block = new_block(self.size, shared)
        block = self.block_tensor()
        for tensor, place in zip(pickler.tensors, self.places):
            place.view(block).copy_(tensor)

    def block_tensor(self) -> Tensor:
        """The block, also if it is an array."""
        return self.block if isinstance(self.block, Tensor) else torch.from_numpy(self.block)

    def pin_memory(self) -> PackedBatch:
        """Copy the block to page-locked memory, and release it to its worker.

        Called by DataLoader in the main process.
        """
        block = self.block_tensor()
        self.block = block[: self.size].pin_memory()
        if self.owner:
            worker, number = self.owner
            kept_blocks[worker][number] = block
            block[0] = 0
        return self

    def unpack(self):
        """The batch. Its tensors are views of the block: memory that is pinned stays reserved until
        copies of all of them to a GPU have ended.
        """
        block = self.block_tensor()
        tensors = [place.view(block) for place in self.places]
        return BatchUnpickler(io.BytesIO(self.head), tensors).load()


@dataclass
class Place:
    """Where a tensor is in a block, and what it is like."""

    start: int  # bytes
    dtype: torch.dtype
    shape: list[int]  # with the axes in the order in which they lie in memory
    axes: list[int]  # restores their order

    @classmethod
    def of(cls, tensor: Tensor, start: int) -> Place:
        """The place of a tensor in a block, in its own memory order."""
        order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
        axes = [order.index(axis) for axis in range(tensor.ndim)]
        return cls(start, tensor.dtype, [tensor.shape[axis] for axis in order], axes)

    def view(self, block: Tensor) -> Tensor:
        """The tensor in a block."""
        end = self.start + math.prod(self.shape) * self.dtype.itemsize
        return block[self.start : end].view(self.dtype).view(self.shape).permute(self.axes)


class BatchPickler(pickle.Pickler):
    """Pickles everything but tensors, which are collected."""

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, protocol=5)
        self.tensors: list[Tensor] = []

    def persistent_id(self, thing) -> int | None:
        """The number of a tensor; None for other things."""
        if not isinstance(thing, Tensor):
            return None
        self.tensors.append(thing.detach())
        return len(self.tensors) - 1


class BatchUnpickler(pickle.Unpickler):
    """The reverse of BatchPickler."""

    def __init__(self, stream: io.BytesIO, tensors: list[Tensor]):
        super().__init__(stream)
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]


# Blocks


class ReusedBlocks:
    """The blocks of a worker, which it fills again once the main process has copied them."""

    def __init__(self):
        self.blocks: list[Tensor] = []

    def take(self, size: int) -> tuple[Tensor | np.ndarray, tuple[int, int] | None]:
        """A free block of at least `size` bytes, now in use, and its owner.

        The owner is (process id of this worker, block number). If shared memory is full, the block
        is an array without an owner, which is sent through a pipe.
        """
        free = [number for number, block in enumerate(self.blocks) if not block[0]]
        fitting = [number for number in free if len(self.blocks[number]) >= size]
        if fitting:
            number = fitting[0]
        else:
            block = new_block(int(size * GROWTH), shared=True)
            if not isinstance(block, Tensor):
                return block[:size], None
            number = free[0] if free else len(self.blocks)
            self.blocks[number : number + 1] = [block]  # replaces one that is too small
        self.blocks[number][0] = 1
        return self.blocks[number], (os.getpid(), number)


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
