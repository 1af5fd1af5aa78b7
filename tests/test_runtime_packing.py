"""Batches in one block of shared memory, and blocks that are filled again."""

from functools import partial

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


@pytest.fixture
def without_pinning(monkeypatch):
    """Memory is copied, but not page-locked, which needs a GPU."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    yield
    kept_blocks.clear()


def test_a_block_is_filled_again_once_it_has_been_copied(without_pinning):
    blocks = ReusedBlocks(loader=0)
    first, second = (PackedBatch([torch.arange(n)], True, blocks) for n in (5, 6))
    addresses = [packed.block.data_ptr() for packed in (first, second)]
    assert addresses[0] != addresses[1]
    first.pin_memory()
    third = PackedBatch([torch.arange(3)], True, blocks)
    assert third.block.data_ptr() == addresses[0]
    for packed, count in ((first, 5), (second.pin_memory(), 6), (third.pin_memory(), 3)):
        assert packed.unpack()[0].tolist() == list(range(count))


def test_a_block_that_is_too_small_is_replaced(without_pinning):
    blocks = ReusedBlocks(loader=0)
    for count in (10, 1000, 1100, 20):  # 1100 fit into a block that has grown for 1000
        PackedBatch([torch.arange(count)], True, blocks).pin_memory()
    assert len(blocks.blocks) == len(kept_blocks[0]) == 1
    assert 8 * 1100 <= len(blocks.blocks[0]) < 1.5 * 8 * 1000


def test_workers_fill_their_blocks_again(without_pinning):
    """In other processes; the main process keeps the blocks mapped."""
    dataset, order = Items(), [[3, 1], [0], [6, 5, 4], [2]] * 10
    collate = partial(PackedBatch, shared=True, blocks=ReusedBlocks(loader=7))
    loader = DataLoader(dataset, batch_sampler=order, num_workers=2, collate_fn=collate)
    for packed, indices in zip(loader, order):
        for item, index in zip(packed.pin_memory().unpack(), indices):
            assert_equal_items(item, dataset[index])
    mapped = kept_blocks[7]
    assert len({worker for worker, _ in mapped}) == 2 and len(mapped) < 10
    assert len({block.data_ptr() for block in mapped.values()}) == len(mapped)


def test_without_shared_memory_a_block_goes_through_a_pipe(without_pinning, monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    packed = PackedBatch([torch.arange(4)], True, ReusedBlocks(loader=0)).pin_memory()
    assert packed.unpack()[0].tolist() == [0, 1, 2, 3] and not kept_blocks
