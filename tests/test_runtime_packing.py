"""Batches in one block of shared memory, and blocks that are filled again."""

import os
from functools import partial

import numpy
import pytest
import torch
from torch.utils.data import DataLoader

from runtime.packing import PackedBatch, ReusedBlocks, kept_blocks
from test_runtime_loading import Items, assert_equal_items


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4).t(),
        torch.randn(2, 6, 4)[:, ::2],
        torch.zeros(0, 5),
        torch.tensor(2.5),
        torch.tensor([True, False]),
        torch.arange(6.0).half(),
        torch.ones(3, 1).expand(3, 4),
    ],
)
def test_a_packed_tensor_keeps_values_dtype_and_shape(tensor):
    found = PackedBatch([tensor], shared=False).unpack()[0]
    assert torch.equal(found, tensor) and found.dtype == tensor.dtype


def test_a_batch_needs_one_block_of_memory():
    """So a batch costs one file descriptor, however many tensors it has."""
    batch = PackedBatch([Items()[index] for index in range(7)], shared=True)
    assert batch.block.is_shared()
    assert batch.block.numel() >= sum(item.frames.numel() for item in batch.unpack())


def test_tensors_share_the_storage_of_their_block():
    """So PyTorch knows until when copies to a GPU read pinned memory."""
    packed = PackedBatch([Items()[3], Items()[5]], shared=False)
    storage = packed.block.untyped_storage().data_ptr()
    for item in packed.unpack():
        assert item.frames.untyped_storage().data_ptr() == storage
        assert item.ids.untyped_storage().data_ptr() == storage


@pytest.fixture
def without_pinning(monkeypatch):
    """Memory is copied, but not page-locked, which needs a GPU."""

    def copied(block):
        assert block[0] == 1 or not block.is_shared()  # not released before it has been copied
        return block.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", copied)
    yield
    kept_blocks.clear()


def test_a_block_is_filled_again_once_it_has_been_copied(without_pinning):
    blocks = ReusedBlocks()
    first, second = (PackedBatch([torch.arange(n)], True, blocks) for n in (5, 6))
    addresses = [packed.block.data_ptr() for packed in (first, second)]
    assert addresses[0] != addresses[1]
    first.pin_memory()
    third = PackedBatch([torch.arange(3)], True, blocks)
    assert third.block.data_ptr() == addresses[0]
    for packed, count in ((first, 5), (second.pin_memory(), 6), (third.pin_memory(), 3)):
        assert packed.unpack()[0].tolist() == list(range(count))


def test_a_block_that_is_too_small_is_replaced(without_pinning):
    blocks = ReusedBlocks()
    for count in (10, 1000, 1100, 20):  # a block for 1000 has room for 1100
        PackedBatch([torch.arange(count)], True, blocks).pin_memory()
        if count == 1000:
            address = blocks.blocks[0].data_ptr()
    assert [block.data_ptr() for block in blocks.blocks] == [address]
    assert [block.data_ptr() for block in kept_blocks[os.getpid()].values()] == [address]


def test_a_block_that_fits_is_preferred(without_pinning):
    blocks = ReusedBlocks()
    for packed in [PackedBatch([torch.arange(count)], True, blocks) for count in (10, 1000)]:
        packed.pin_memory()
    assert PackedBatch([torch.arange(900)], True, blocks).owner == (os.getpid(), 1)
    assert len(blocks.blocks) == 2


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_fill_their_blocks_again(without_pinning, method):
    """In other processes; the main process keeps the blocks mapped."""
    dataset, order = Items(), [[3, 1], [0], [6, 5, 4], [2]] * 10
    loader = DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=2,
        collate_fn=partial(PackedBatch, shared=True, blocks=ReusedBlocks()),
        multiprocessing_context=method,
    )
    for packed, indices in zip(loader, order):
        for item, index in zip(packed.pin_memory().unpack(), indices):
            assert_equal_items(item, dataset[index])
    mapped = [block.data_ptr() for blocks in kept_blocks.values() for block in blocks.values()]
    assert len(kept_blocks) == 2 and len(mapped) == len(set(mapped)) < 10


def test_without_shared_memory_a_batch_has_no_reused_block(without_pinning, monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    packed = PackedBatch([torch.arange(100)], True, ReusedBlocks())
    assert isinstance(packed.block, numpy.ndarray) and packed.block.nbytes == packed.size
    assert packed.pin_memory().unpack()[0].tolist() == list(range(100)) and not kept_blocks
