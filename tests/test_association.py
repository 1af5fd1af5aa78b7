"""Detections are assigned to tracks one to one, by hand-made masks and with a whole model."""

import copy

import numpy
import pytest
import torch

from evaluation.association import (
    Detections,
    Links,
    find_detections,
    link_detections,
    link_frame,
    mask_ious,
)
from fast.video_pipeline import VideoPipeline
from sparse_set import tiny_model

LEFT, RIGHT = numpy.zeros((2, 4, 8), bool)
LEFT[1:3, 1:3] = True
RIGHT[1:3, 5:7] = True
BOTH, NOTHING = LEFT | RIGHT, numpy.zeros((4, 8), bool)


def at_start(queries):
    return Links(
        torch.zeros(queries, 2), numpy.zeros((queries, 4, 8), bool), numpy.zeros((queries, 3))
    )


def detected(*masks, queries=None):
    """Detections with frame queries 10, 11, ..., by default at right angles to each other."""
    queries = numpy.eye(3)[: len(masks)] if queries is None else queries
    return Detections(10 + numpy.arange(len(masks)), numpy.stack(masks), queries)


def link(masks, detections, links, probability=(0.9, 0.8, 0.1), top_k=2):
    """{track: frame query}, and the new links; the last query is not among the two best."""
    probability = torch.tensor(probability)[:, None] * torch.tensor([1.0, 0.1])
    links, pairs = link_frame(probability, numpy.stack(masks), detections, links, top_k)
    return dict(pairs), links


def test_a_mask_of_two_objects_becomes_one():
    pairs, links = link([BOTH, LEFT, LEFT], detected(LEFT, RIGHT), at_start(3))
    assert pairs == {0: 11, 1: 10}  # query 2 is no track
    assert numpy.array_equal(links.masks, [RIGHT, LEFT, NOTHING])


def test_two_tracks_of_one_object_share_no_detection():
    pairs, _ = link([LEFT, LEFT, LEFT], detected(LEFT), at_start(3))
    assert pairs == {0: 10}  # of the higher probability


def test_the_last_detection_decides_between_alike_masks():
    _, links = link([LEFT, RIGHT, NOTHING], detected(LEFT, RIGHT), at_start(3))
    # Both tracks now show both objects, and the detections come in another order.
    pairs, _ = link([BOTH, BOTH, NOTHING], detected(RIGHT, LEFT), links)
    assert pairs == {0: 11, 1: 10}


def test_an_occluded_object_is_remembered_by_its_frame_query():
    _, links = link([LEFT, RIGHT, NOTHING], detected(LEFT, RIGHT), at_start(3))
    pairs, links = link(
        [NOTHING, RIGHT, NOTHING], detected(RIGHT, queries=numpy.eye(3)[1:2]), links
    )
    assert pairs == {1: 10}
    moved = numpy.roll(LEFT, 3, 1)  # over none of the last masks' pixels
    pairs, _ = link([NOTHING, RIGHT, NOTHING], detected(moved, RIGHT), links)
    assert pairs == {0: 10, 1: 11}


def test_without_a_detection_there_are_no_links():
    none = Detections(numpy.zeros(0, int), numpy.zeros((0, 4, 8), bool), numpy.zeros((0, 3)))
    pairs, links = link([LEFT, RIGHT, BOTH], none, at_start(3))
    assert pairs == {} and not links.masks.any()


def test_detections_are_sure_and_distinct():
    probability = torch.tensor([0.9, 0.8, 0.2, 0.5, 0.9])
    masks = torch.tensor(numpy.stack([LEFT, LEFT, RIGHT, RIGHT, NOTHING]))
    queries = torch.tensor([[2.0, 0], [0, 1], [1, 1], [0, 3], [1, 0]])
    found = find_detections(probability, torch.where(masks, 4.0, -4.0), queries)
    assert found.indices.tolist() == [0, 3]  # 1: a duplicate, 2: not sure, 4: empty
    assert numpy.array_equal(found.masks, [LEFT, RIGHT])
    assert found.queries.tolist() == [[1, 0], [0, 1]]


def test_ious_are_a_loop():
    generator = numpy.random.default_rng(0)
    masks, others = (generator.random((count, 5, 6)) < 0.4 for count in (3, 4))
    masks[1], others[2] = False, False
    expected = [[(a & b).sum() / max((a | b).sum(), 1) for b in others] for a in masks]
    numpy.testing.assert_allclose(mask_ious(masks, others), expected, rtol=1e-6)


@pytest.fixture(scope="module")
def model():
    model = tiny_model(seed=3).eval()
    with torch.no_grad():  # so that some detections are sure
        model.frame_decoder.class_embed.weight.mul_(8)
    model.exclusive = True
    return model


@torch.no_grad()
def test_frames_one_by_one(model):
    """Links carry over; every mask is that of one detection, and no two tracks share one."""
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (4, 3, 32, 48), dtype=torch.uint8)
    frame_queries, features = model.detect_queries(frames)
    state = model.tracker.initial_state(streams=1)
    (logits, kernels, _), _ = model.track(frame_queries, 1, state)
    together, last = link_detections(model, frame_queries, logits, kernels, features, None, 5)
    links = None
    for t in range(4):
        parts = (x[t : t + 1] for x in (frame_queries, logits, kernels, features))
        alone, links = link_detections(model, *parts, links, 5)
        torch.testing.assert_close(alone[0], together[t])
        linked = alone[0][alone[0, :, -1] > -100]
        assert len(linked) == len(linked.unique(dim=0))
    assert numpy.array_equal(links.masks, last.masks) and links.masks.any()
    assert torch.equal(links.class_scores, last.class_scores)


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
        assert numpy.array_equal(state.links.masks, expected.links.masks)
        torch.testing.assert_close(state.links.class_scores, expected.links.class_scores)
    assert not numpy.array_equal(together[0].links.masks, together[1].links.masks)


def take_chunks(monkeypatch):
    """Let a CPU detect four frames at once, as a GPU does twelve."""
    start = VideoPipeline.__init__

    def start_with_chunks(pipeline, model):
        start(pipeline, model)
        pipeline.chunk_size = 4

    monkeypatch.setattr(VideoPipeline, "__init__", start_with_chunks)


@pytest.mark.parametrize("propagation, clip_length", [("gated", 2), ("memory", 1), ("clip", 1)])
def test_chunks_change_no_mask(propagation, clip_length, monkeypatch):
    """A chunk of a GPU holds several clips. With "clip" propagation it is the whole video."""
    model = tiny_model(propagation=propagation, seed=3, clip_length=clip_length).eval()
    with torch.no_grad():
        model.frame_decoder.class_embed.weight.mul_(8)
    model.exclusive = True
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (5, 3, 32, 48), dtype=torch.uint8)
    expected = model.segment_video(frames)
    assert expected.masks.any()
    take_chunks(monkeypatch)
    found = model.segment_video(frames)
    torch.testing.assert_close(found.scores, expected.scores)
    assert torch.equal(found.masks, expected.masks)


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

    def record(model, frame_queries, logits, kernels, features, links, top_k):
        seen.append(logits)
        return kernels, links

    monkeypatch.setattr("model.link_detections", record)
    take_chunks(monkeypatch)
    torch.manual_seed(0)
    (chunk,) = model.track_video(torch.randint(0, 256, (4, 3, 32, 48), dtype=torch.uint8))
    assert len(chunk.logits) == 2 and not torch.equal(*chunk.logits)
    assert torch.equal(seen[0], chunk.logits[[0, 0, 1, 1]])
