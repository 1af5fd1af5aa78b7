"""Detections are assigned to tracks one to one, by hand-made masks and with a whole model."""

import copy

import numpy
import pytest
import torch

from evaluation.association import (
    Comparison,
    detection_quality,
    distinct_detections,
    link_frames,
    mask_ious,
)
from fast import video_pipeline
from fast.video_pipeline import VideoPipeline
from sparse_set import tiny_model

LEFT, RIGHT = torch.zeros(2, 4, 8, dtype=torch.bool)
LEFT[1:3, 1:3] = True
RIGHT[1:3, 5:7] = True
BOTH, NOTHING = LEFT | RIGHT, torch.zeros(4, 8, dtype=torch.bool)


def link(*frames, probability=(0.9, 0.8)):
    """The detection of each track by frame: [{track: detection}, ...].

    A frame has the masks of the tracks, of up to two detections, and optionally their frame
    queries, by default at right angles to each other.
    """
    masks = torch.stack([torch.stack(frame[0]) for frame in frames])
    detected = torch.stack([torch.stack((*frame[1], NOTHING, NOTHING)[:2]) for frame in frames])
    quality = numpy.array(
        [[1, 0.9][: len(frame[1])] + [0] * (2 - len(frame[1])) for frame in frames]
    )
    queries = numpy.array([frame[2] if len(frame) > 2 else numpy.eye(2) for frame in frames])
    tracks = numpy.arange(len(probability))[None].repeat(len(frames), 0)
    weighted_ious = torch.tensor(probability)[:, None] * mask_ious(masks, detected)
    gallery = torch.cat((torch.zeros(len(probability), 4, 8), detected.flatten(0, 1)))
    ious = mask_ious(gallery, detected.flatten(0, 1)).unflatten(1, (-1, 2))
    start = numpy.zeros((len(probability), 2))
    _, _, assigned = link_frames(
        tracks, weighted_ious.numpy(), quality, queries, ious.numpy(), start
    )
    return [{i: n for t, i, n in assigned if t == frame} for frame in range(len(frames))]


def test_a_mask_of_two_objects_becomes_one():
    assert link(([BOTH, LEFT], [LEFT, RIGHT])) == [{0: 1, 1: 0}]


def test_two_tracks_of_one_object_share_no_detection():
    assert link(([LEFT, LEFT], [LEFT])) == [{0: 0}]  # of the higher probability


def test_the_last_detection_decides_between_alike_masks():
    # In the second frame, both tracks show both objects, and the detections are in another order.
    frames = ([LEFT, RIGHT], [LEFT, RIGHT]), ([BOTH, BOTH], [RIGHT, LEFT])
    assert link(*frames) == [{0: 0, 1: 1}, {0: 1, 1: 0}]


def test_an_occluded_object_is_remembered_by_its_frame_query():
    moved = torch.roll(LEFT, 3, 1)  # over none of the last mask's pixels
    frames = (
        ([LEFT, RIGHT], [LEFT, RIGHT]),
        ([NOTHING, RIGHT], [RIGHT], [[0, 1], [0, 0]]),
        ([NOTHING, RIGHT], [moved, RIGHT]),
    )
    assert link(*frames) == [{0: 0, 1: 1}, {1: 0}, {0: 0, 1: 1}]


@pytest.mark.parametrize("cosine, track", [(0.7, 0), (0.6, 1)])
def test_an_object_that_returns(cosine, track):
    """Its frame query has changed, and a new track already shows it, with p / 2 = 0.4."""
    moved = torch.roll(LEFT, 3, 1)
    first = [LEFT, NOTHING], [LEFT], [[1, 0], [0, 0]]
    returned = [NOTHING, moved], [moved], [[cosine, (1 - cosine**2) ** 0.5], [0, 0]]
    assert link(first, returned) == [{0: 0}, {track: 0}]


def test_a_weak_similarity_is_not_enough():
    moved = torch.roll(LEFT, 3, 1)
    first = [LEFT, NOTHING], [LEFT], [[1, 0], [0, 0]]
    other = [NOTHING, NOTHING], [moved], [[0.3, 0.95], [0, 0]]
    assert link(first, other) == [{0: 0}, {}]


def test_without_a_detection_there_are_no_links():
    assert link(([LEFT, RIGHT], [])) == [{}]


def test_detections_are_sure_and_distinct():
    probability = torch.tensor([[0.9, 0.8, 0.2, 0.5, 0.9]])
    wide = LEFT | torch.roll(LEFT, 1, 1)  # of IoU 2 / 3 with LEFT
    masks = torch.stack([LEFT, wide, RIGHT, RIGHT, NOTHING])
    quality = detection_quality(probability, torch.where(masks, 4.0, -4.0)[None])[0]
    kept = distinct_detections(quality.numpy(), mask_ious(masks, masks).numpy())
    assert kept == [0, 3]  # 1: a duplicate, 2: not sure, 4: empty


def test_ious_are_a_loop():
    """Exact, also under autocast: 16 bit cannot count these pixels."""
    generator = torch.Generator().manual_seed(0)
    masks, others = (torch.rand(count, 90, 70, generator=generator) < 0.9 for count in (3, 4))
    masks[1], others[2] = False, False
    expected = [[(a & b).sum() / max((a | b).sum(), 1) for b in others] for a in masks]
    with torch.autocast("cpu", torch.bfloat16):
        found = mask_ious(masks, others)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.fixture
def many_detections(monkeypatch):
    """Random weights have few masks that are sure and distinct."""
    monkeypatch.setattr("evaluation.association.MIN_PROBABILITY", 0)
    monkeypatch.setattr("evaluation.association.DUPLICATE_IOU", 0.9)


@pytest.fixture
def model(many_detections):
    model = tiny_model(seed=3).eval()
    model.exclusive = True
    return model


@torch.no_grad()
def test_frames_one_by_one(model):
    """Links carry over; every mask is that of one detection, and no two tracks share one."""
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (4, 3, 32, 48), dtype=torch.uint8)
    frame_queries, features = model.detect_queries(frames)
    state = model.tracker.initial_state(streams=1)
    (logits, kernels, _), _ = video_pipeline.track(model, frame_queries, 1, state)
    inputs = frame_queries, logits, kernels, features
    together, last = Comparison(model, *inputs, None, 5).assign()
    links = None
    for t in range(4):
        alone, links = Comparison(model, *(x[t : t + 1] for x in inputs), links, 5).assign()
        torch.testing.assert_close(alone[0], together[t])
        linked = alone[0][alone[0, :, -1] > -100]
        assert len(linked) == len(linked.unique(dim=0))
    assert torch.equal(links.masks, last.masks) and links.masks.any()
    assert torch.equal(links.class_scores, last.class_scores)


@pytest.mark.parametrize(
    "part", ["frame_decoder.class_embed", "frame_decoder.mask_embed", "pixel_decoder.mask_features"]
)
def test_detections_that_are_not_finite(model, part):
    with torch.no_grad():
        list(model.get_submodule(part).parameters())[-1][0] = torch.nan
    with pytest.raises(FloatingPointError, match="the scores are not finite"):
        model.segment_video(torch.zeros(2, 3, 32, 48, dtype=torch.uint8))


def test_tracks_and_detections_are_limited(model, monkeypatch):
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)

    def assigned(top_k):  # largest number of a frame
        kernels = torch.cat([chunk.mask_kernel for chunk in model.track_video(frames, top_k)])
        return (kernels[..., -1] > -100).sum(1).max()

    assert assigned(top_k=10) > 1 and assigned(top_k=1) == 1
    monkeypatch.setattr("evaluation.association.MAX_DETECTIONS", 1)
    assert assigned(top_k=10) == 1


def test_steps_are_those_of_the_video(model):
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
    video, state = model.segment_video(frames, top_k=4), None
    for frame in frames:
        tracks, state = model.step(frame, state, top_k=4)
    assert torch.equal(tracks.track_ids, video.track_ids)
    assert torch.equal(tracks.masks, video.masks[:, -1])
    assert video.masks.any()
    torch.testing.assert_close(model.encode_video(frames, top_k=4).scores, video.scores)


def test_streams_have_links_of_their_own(model):
    torch.manual_seed(0)
    videos = torch.randint(0, 256, (2, 4, 3, 32, 48), dtype=torch.uint8)
    together, alone = [None, None], [None, None]
    for frames in videos.unbind(1):
        _, together = model.step_streams(frames, together)
        for number, frame in enumerate(frames):
            _, alone[number] = model.step(frame, alone[number])
    for state, expected in zip(together, alone):
        assert torch.equal(state.links.masks, expected.links.masks)
        torch.testing.assert_close(state.links.class_scores, expected.links.class_scores)
    assert not torch.equal(together[0].links.masks, together[1].links.masks)


def take_chunks(monkeypatch):
    """Let a CPU detect four frames at once, as a GPU does twelve."""
    start = VideoPipeline.__init__

    def start_with_chunks(pipeline, model):
        start(pipeline, model)
        pipeline.chunk_size = 4

    monkeypatch.setattr(VideoPipeline, "__init__", start_with_chunks)


@pytest.mark.parametrize("propagation, clip_length", [("gated", 2), ("memory", 1), ("clip", 1)])
def test_chunks_change_no_mask(propagation, clip_length, many_detections, monkeypatch):
    """A chunk of a GPU holds several clips. With "clip" propagation it is the whole video."""
    model = tiny_model(propagation=propagation, seed=3, clip_length=clip_length).eval()
    model.exclusive = True
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (5, 3, 32, 48), dtype=torch.uint8)
    expected = model.segment_video(frames)
    assert expected.masks.any()
    take_chunks(monkeypatch)
    found = model.segment_video(frames)
    torch.testing.assert_close(found.scores, expected.scores)
    assert torch.equal(found.masks, expected.masks)


def test_a_whole_video_is_linked_a_few_frames_at_a_time(many_detections, monkeypatch):
    """With "clip" propagation, `track` takes the whole video. Memory must not grow with it."""
    model = tiny_model(propagation="clip", seed=3).eval()
    model.exclusive = True
    frames = torch.randint(0, 256, (5, 3, 32, 48), dtype=torch.uint8)
    expected, lengths = model.segment_video(frames), []

    def record(model, frame_queries, *others):
        lengths.append(len(frame_queries))
        return Comparison(model, frame_queries, *others)

    monkeypatch.setattr("evaluation.association.INFERENCE_CHUNK", 2)
    monkeypatch.setattr("evaluation.association.Comparison", record)
    assert torch.equal(model.segment_video(frames).masks, expected.masks)
    assert lengths == [2, 2, 1]


def test_weights_that_are_not_finite_are_reported(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.tracker.class_embed.weight[0, 0] = torch.nan
    frames = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    with pytest.raises(FloatingPointError):
        model.encode_video(frames)


def test_a_frame_has_the_logits_of_its_clip(monkeypatch):
    """Two clips of two frames in a chunk."""
    model = tiny_model(seed=3, clip_length=2).eval()
    model.exclusive = True
    seen = []

    def record(model, frame_queries, logits, *others):
        seen.append(logits)
        return Comparison(model, frame_queries, logits, *others)

    monkeypatch.setattr("evaluation.association.Comparison", record)
    take_chunks(monkeypatch)
    torch.manual_seed(0)
    (chunk,) = model.track_video(torch.randint(0, 256, (4, 3, 32, 48), dtype=torch.uint8))
    assert len(chunk.logits) == 2 and not torch.equal(*chunk.logits)
    assert torch.equal(seen[0], chunk.logits[[0, 0, 1, 1]])
