"""Frames on their way into the model: kept in order, whatever they come in, or refused."""

import numpy
import pytest
import torch

from batching import (
    batch_frames,
    check_frame,
    merge_to_multiples,
    padded_size,
    split_video,
)
from model import build_model


def frames(count, height=4, width=6):
    """uint8 (count, 3, height, width), frame t filled with t."""
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, height, width)


@pytest.mark.parametrize(
    "size, expected",
    [((1, 1), (32, 32)), ((32, 64), (32, 64)), ((33, 31), (64, 32)), ((360, 640), (384, 640))],
)
def test_sides_are_padded_to_multiples_of_32(size, expected):
    assert padded_size(*size) == expected


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("sizes", [[7], [1] * 7, [3, 4], [2, 0, 5], [6, 1]], ids=str)
def test_batches_are_split_into_chunks_in_order(sizes, count):
    found = list(split_video(frames(7).split(sizes), count))
    assert [len(batch) for batch in found] == [count] * (7 // count) + [7 % count] * (7 % count > 0)
    assert torch.equal(torch.cat(found), frames(7))


def test_batches_of_a_video_have_one_size():
    batches = [frames(3), frames(1, 4, 8)]
    with pytest.raises(ValueError, match=r"one size, not \[\(4, 6\), \(4, 8\)\]"):
        list(split_video(batches, 4))


@pytest.mark.parametrize("video", [[], frames(0), [frames(0), frames(0)]])
def test_a_video_without_frames_is_refused(video):
    with pytest.raises(ValueError, match="the video has no frames"):
        list(split_video(video, 4))


@pytest.mark.parametrize(
    "multiple, lengths",
    [
        (1, [3, 1, 5]),
        (2, [2, 2, 4, 1]),
        (4, [4, 4, 1]),
        (5, [5, 4]),
        (9, [9]),
        (10, [9]),
        (10**9, [9]),
    ],
)
def test_batches_are_merged_to_multiples(multiple, lengths):
    """All tensors of a batch alike; as early as possible; the rest comes last."""
    x = torch.arange(9)
    merged = list(merge_to_multiples(zip(x.split([3, 1, 5]), (-x).split([3, 1, 5])), multiple))
    assert [len(one) for one, _ in merged] == lengths
    assert torch.equal(torch.cat([one for one, _ in merged]), x)
    assert torch.equal(torch.cat([other for _, other in merged]), -x)


def test_a_batch_that_need_not_be_merged_is_not_copied():
    video = frames(8)
    for chunk in (*split_video(video, 4), *split_video(video.split(4), 4)):
        assert chunk.untyped_storage().data_ptr() == video.untyped_storage().data_ptr()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_frames_are_put_into_batches_in_order(count):
    found = list(batch_frames(iter(frames(7)), count))
    assert [len(batch) for batch in found] == [count] * (7 // count) + [7 % count] * (7 % count > 0)
    assert torch.equal(torch.cat(found), frames(7))
    assert list(batch_frames([], count)) == []


def test_a_batch_ends_where_the_size_changes():
    found = list(batch_frames([*frames(3), *frames(2, 6, 4), *frames(1)], 2))
    assert [tuple(batch.shape) for batch in found] == [
        (2, 3, 4, 6),
        (1, 3, 4, 6),
        (2, 3, 6, 4),
        (1, 3, 4, 6),
    ]


@pytest.mark.parametrize("count", [0, -1])
def test_a_batch_of_no_frames_is_refused(count):
    with pytest.raises(ValueError, match=f"at least one frame, not {count}"):
        next(batch_frames(frames(2), count))


NO_FRAMES = {
    "numpy": (numpy.zeros((3, 4, 6), numpy.uint8), "torch tensor, not numpy.ndarray"),
    "float": (torch.rand(3, 4, 6), "uint8 of shape .* not torch.float32"),
    "bool": (torch.zeros(3, 4, 6, dtype=torch.bool), "not torch.bool"),
    "grey": (torch.zeros(1, 4, 6, dtype=torch.uint8), r"not torch.uint8 \(1, 4, 6\)"),
    "four channels": (torch.zeros(4, 4, 6, dtype=torch.uint8), r"\(4, 4, 6\)"),
    "channels last": (torch.zeros(4, 6, 3, dtype=torch.uint8), r"\(4, 6, 3\)"),
    # a batch of such frames has the dimensions of a frame
    "no channels": (torch.zeros(4, 6, dtype=torch.uint8), r"\((1, )?4, 6\)"),
}


@pytest.fixture(scope="module")
def model(four_convolutions):
    return build_model("toy", 3, backbone="four_convolutions").eval()


@pytest.mark.parametrize("kind", NO_FRAMES)
def test_what_is_no_frame_is_refused(model, kind):
    """One by one, in batches, and by the model however it is called."""
    frame, expected = NO_FRAMES[kind]
    batch = frame[None]
    for refused in (
        lambda: check_frame(frame),
        lambda: list(batch_frames([frame], 2)),
        lambda: list(split_video([batch], 2)),
        lambda: model.segment_video([frame]),
        lambda: model.encode_video([batch]),
        lambda: model.step(frame),
    ):
        with pytest.raises(ValueError, match=expected):
            refused()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_made_faster_is_ready_for_inference(four_convolutions, monkeypatch, compiled):
    """In evaluation mode, whatever it was in; `train` brings it back."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    model = build_model("toy", 3, backbone="four_convolutions")
    assert model.training
    assert model.accelerate(compiled=compiled) is model
    assert not any(module.training for module in model.modules())
    model.segment_video(frames(1, 40, 48))
