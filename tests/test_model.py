"""The assembled model on the toy preset, untrained, in float64: shapes, scores, and `step` against
`segment_video`.

Where a formula is simple it is written out again here: the position encoding, the normalisation,
the mask score.
"""

import contextlib
import copy
import gc
import math
import pickle
import re
import weakref
from functools import cache, partial
from itertools import accumulate
from unittest import mock

import numpy
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as rle
from torchvision.models.resnet import BasicBlock, ResNet

import plain_model
from backbone import BACKBONES
from fast.acceleration import cast_frozen_weights, compile_parts
from fast.video_pipeline import VideoPipeline
from model import PIXEL_MEAN, PIXEL_STD, PRESETS, TEST_SIDES, GRAttVIS, build_model
from outlines import outlined
from sparse_set import FourConvolutions
from test_detector import randomised
from tracker import Tracker

CLASSES, HEIGHT, WIDTH = 3, 40, 56
STEPPING = ("gated", "plain", "memory", "gated+memory")  # the propagations that go frame by frame


@cache
def shared_model(propagation: str = "gated", **overrides) -> GRAttVIS:
    """One model for all tests that do not change it."""
    torch.manual_seed(0)
    options = {"backbone": "four_convolutions"} | overrides
    with mock.patch.dict(BACKBONES, four_convolutions=lambda norm, window: FourConvolutions()):
        return build_model("toy", CLASSES, propagation, **options).double().eval()


def make_model(propagation: str = "gated", **overrides) -> GRAttVIS:
    """A model of its own for a test that changes it; copying is faster than initialising."""
    return copy.deepcopy(shared_model(propagation, **overrides))


def make_frames(
    count: int, height: int = HEIGHT, width: int = WIDTH, seed: int = 0
) -> torch.Tensor:
    """Noise in large blocks, so that masks have an inside."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(
        0, 256, (count, 3, math.ceil(height / 8), math.ceil(width / 8)), generator=generator
    )
    return (
        blocks.repeat_interleave(8, 2)
        .repeat_interleave(8, 3)[:, :, :height, :width]
        .to(torch.uint8)
    )


@pytest.fixture(scope="module")
def model() -> GRAttVIS:
    return shared_model()


def assert_equal(one, other) -> None:
    """Two results of one kind, tensor by tensor."""
    for name, value in vars(one).items():
        torch.testing.assert_close(
            value, getattr(other, name), msg=lambda text, name=name: f"{name}: {text}"
        )


# Parts


def test_prepare_normalises_then_pads(model):
    """Padding is 0 after normalisation, the mean colour that is, at the right and bottom, to
    multiples of 32."""
    frames = [make_frames(1)[0], make_frames(1, 30, 70)[0]]
    images = model.prepare([frame[None] for frame in frames])
    assert images.shape == (2, 3, 64, 96)
    for image, frame in zip(images.numpy(), frames):
        height, width = frame.shape[1:]
        for channel in range(3):
            expected = (frame[channel].numpy() - PIXEL_MEAN[channel]) / PIXEL_STD[channel]
            numpy.testing.assert_allclose(
                image[channel, :height, :width], expected, rtol=1e-5, atol=1e-5
            )
        assert not image[:, height:].any() and not image[:, :, width:].any()
    assert model.prepare([make_frames(1, 32, 64)]).shape == (
        1,
        3,
        32,
        64,
    )  # a multiple stays as it is


@pytest.mark.parametrize(
    "frame",
    [
        torch.rand(3, HEIGHT, WIDTH),
        make_frames(1),
        make_frames(1)[0, :1],
        make_frames(1)[0, 0],
        make_frames(1)[0].permute(1, 2, 0),
    ],
    ids=["float", "4d", "grey", "2d", "channels last"],
)
def test_prepare_refuses_other_frames(model, frame):
    with pytest.raises(ValueError, match=r"uint8 of shape \(3, H, W\)"):
        model.prepare([frame[None]])


# A whole video


@cache
def torchvision_backbone() -> ResNet:
    return ResNet(BasicBlock, [1, 1, 1, 1]).double().eval()


@pytest.mark.parametrize(
    "propagation, options",
    [
        ("gated", {}),
        ("gated+memory", {"clip_length": 2}),
        ("clip", {"window": 2}),
        pytest.param("gated", {"clip_length": 3}, marks=pytest.mark.slow),
        pytest.param("gated", {"gate_mask": "blocked"}, marks=pytest.mark.slow),
        pytest.param("plain", {}, marks=pytest.mark.slow),
        pytest.param("memory", {}, marks=pytest.mark.slow),
        pytest.param("clip", {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_video_is_segmented_as_by_plain_loops(propagation, options):
    """From frames to masks in float64, with nothing in common but the names of the weights.

    The backbone is torchvision's.
    """
    sizes = dict(
        backbone="resnet10",
        channels=32,
        heads=2,
        queries=4,
        frame_queries=5,
        pixel_layers=1,
        pixel_feed_forward=24,
        frame_layers=3,
        tracker_encoder_layers=2,
        tracker_decoder_layers=2,
        feed_forward=24,
    )
    model = randomised(shared_model(propagation, **sizes, **options))
    frames = make_frames(1 + options.get("clip_length", 2))  # the last clip is shorter
    backbone = torchvision_backbone()
    backbone.load_state_dict(model.backbone.state_dict(), strict=False)

    def maps(image):
        x = backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(image))))
        return list(
            accumulate(
                (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4),
                lambda x, stage: stage(x),
                initial=x,
            )
        )[1:]

    torch.set_default_dtype(torch.float64)
    try:
        weights = plain_model.Weights(model.state_dict())
        clip_length = len(frames) if propagation == "clip" else options.get("clip_length", 1)
        window = options.get("window", 6 if propagation == "clip" else 0)
        expected, logits = plain_model.segment_video(
            weights,
            2,
            maps,
            frames,
            (30, 70),
            7,
            clip_length,
            window=window,
            gate_mask=options.get("gate_mask", "additive"),
        )
    finally:
        torch.set_default_dtype(torch.float32)
    found, encoded = (
        model.segment_video(frames, (30, 70), top_k=7),
        model.encode_video([frames], (30, 70), top_k=7),
    )
    torch.testing.assert_close(found.logits, logits)
    for number, (score, label, query, masks) in enumerate(expected):
        for result in (found, encoded):
            assert result.scores[number].item() == pytest.approx(score, rel=1e-6)
            assert (result.labels[number], result.track_ids[number]) == (label, query)
        assert torch.equal(found.masks[number], masks)
        assert [
            rle.decode(code).tolist() for code in encoded.segmentations[number]
        ] == masks.int().tolist()


@pytest.mark.slow
@pytest.mark.parametrize("propagation, length", [("gated", 1), ("gated+memory", 2), ("gated", 3)])
def test_several_clips_at_once(monkeypatch, propagation, length):
    """As on a GPU, six frames at once, the last chunk filled up: the same results as one by one."""
    model, frames = make_model(propagation, clip_length=length), make_frames(8)
    alone = model.encode_video([frames], top_k=6), model.segment_video(frames, top_k=6)
    create, sizes, detect = VideoPipeline.__init__, [], model.detect_queries

    def create_with_chunks(pipeline, model):
        create(pipeline, model)
        pipeline.chunk_size = 6

    monkeypatch.setattr(VideoPipeline, "__init__", create_with_chunks)
    model.detect_queries = lambda frames: sizes.append(len(frames)) or detect(frames)
    together = model.encode_video([frames], top_k=6), model.segment_video(frames, top_k=6)
    assert together[1].logits.shape[0] == math.ceil(8 / length)
    assert sizes == [6] * 4
    for one, other in zip(alone, together):
        for name in ("scores", "labels", "track_ids"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name))
    assert alone[0].segmentations == together[0].segmentations and torch.equal(
        alone[0].gates, together[0].gates
    )
    assert torch.equal(alone[1].masks, together[1].masks)


@pytest.mark.parametrize("propagation", [*STEPPING, "clip"])
def test_video_result(propagation):
    video = shared_model(propagation).segment_video(make_frames(3), top_k=15)
    assert video.scores.shape == video.labels.shape == video.track_ids.shape == (15,)
    assert video.masks.shape == (15, 3, HEIGHT, WIDTH) and video.masks.dtype == torch.bool
    assert video.masks.any() and not video.masks.all()
    assert video.labels.dtype == video.track_ids.dtype == torch.int64
    assert ((video.scores >= 0) & (video.scores <= 1)).all() and (video.scores.diff() <= 0).all()
    assert set(video.labels.tolist()) <= set(range(CLASSES)) and set(
        video.track_ids.tolist()
    ) <= set(range(20))
    assert len(set(zip(video.track_ids.tolist(), video.labels.tolist()))) == 15  # no pair twice
    assert video.logits.shape == (1 if propagation == "clip" else 3, 20, CLASSES + 1)


@pytest.mark.parametrize("infer", ["segment_video", "encode_video"])
def test_a_video_may_come_in_any_form(model, infer):
    """A tensor, frames, or batches of any lengths; and no video leaves a trace for the next."""
    frames, infer = make_frames(3), getattr(model, infer)
    expected = infer(frames)
    infer(make_frames(2, 24, 30, seed=1))
    forms = (list(frames), frames.split([2, 0, 1]), [frames], [frames[0], frames[1:]])
    for form in (*forms, (frame for frame in frames)):
        result = infer(form)
        for name, value in vars(expected).items():
            if name == "segmentations":
                assert result.segmentations == value
            else:
                torch.testing.assert_close(getattr(result, name), value)


@pytest.mark.parametrize("options", [{}, {"clip_length": 2}, {"propagation": "plain"}], ids=str)
def test_gates_of_a_video(options):
    """Those of `encode_video`, which other tests compare with the tracker's logits."""
    model, frames = shared_model(**options), make_frames(3)
    gates = model.segment_video(frames, top_k=12).gates
    assert (
        gates.shape == (12, 3, 0 if "propagation" in options else 3) and gates.dtype == torch.bool
    )
    assert torch.equal(gates, model.encode_video(frames, top_k=12).gates)


def test_a_chunk_is_tracked_beside_the_detection_of_the_next(model, monkeypatch):
    """The side stream waits for a chunk's detection, but not for the next one, launched before the
    chunk is tracked. What is handed over is joined."""
    calls, functions = (
        [],
        {name: getattr(type(model), name) for name in ("detect_queries", "track")},
    )

    class Recorder:
        def __init__(self, device, priority):
            self.is_upload = priority == -2

        def record(self, name):
            calls.append(f"upload {name}" if self.is_upload else name)

        def wait(self):
            self.record("wait")

        def join(self, *results):
            self.record("join")

        def __enter__(self):
            self.record("enter")

        def __exit__(self, *exception):
            self.record("exit")

    for name, function in functions.items():
        monkeypatch.setattr(
            type(model),
            name,
            lambda *given, name=name, function=function: calls.append(name) or function(*given),
        )
    monkeypatch.setattr("fast.video_pipeline.SideStream", Recorder)
    for _ in model.track_video(make_frames(3)):
        calls.append("chunk")
    detect = ["upload enter", "upload exit", "upload join", "detect_queries"]
    track = ["enter", "track", "exit", "join", "chunk"]
    assert calls == [*detect, "wait", *detect, *track, "wait", *detect, *track, "wait", *track]


def test_all_pairs(model):
    """top_k larger than queries times classes: all of them, each query once under each label."""
    video = model.segment_video(make_frames(1), top_k=1000)
    pairs = sorted(zip(video.track_ids.tolist(), video.labels.tolist()))
    assert pairs == [(query, label) for query in range(20) for label in range(CLASSES)]


def test_output_size(model):
    """The logits are resized, then cut at 0: not the masks. Scores are taken before, and stay."""
    frames = make_frames(2)
    own, large = (
        model.segment_video(frames),
        model.segment_video(frames, output_size=(2 * HEIGHT, 3 * WIDTH)),
    )
    assert large.masks.shape == (10, 2, 2 * HEIGHT, 3 * WIDTH)
    assert torch.equal(large.scores, own.scores) and torch.equal(large.track_ids, own.track_ids)
    nearest = own.masks.repeat_interleave(2, 2).repeat_interleave(3, 3)
    assert 0.9 < (large.masks == nearest).double().mean() < 1
    assert_equal(model.segment_video(frames, output_size=(HEIGHT, WIDTH)), own)


def test_scores_by_hand(model):
    """Class score.

    The largest of both frames. Mask score: the mean probability inside the masks of both frames.
    """
    frames = make_frames(2)
    video = model.segment_video(frames, top_k=1000)
    class_scores = numpy.exp(video.logits.numpy())
    class_scores = (class_scores / class_scores.sum(-1, keepdims=True))[..., :-1].max(0)  # (Q, K)

    state, inside = None, [[] for _ in range(20)]
    for t, frame in enumerate(frames):
        with torch.no_grad():
            images = model.prepare([frame[None]])
            output = model.detect(images)
            (prediction,), state = model.tracker(output.queries[:, None, None], state)
            torch.testing.assert_close(prediction.logits[-1][0, 0], video.logits[t])
            features = model.tracker.mask_features(output.features)[0]  # as the paper has it
            embed = model.tracker.mask_embed(model.tracker.decoder_norm(state.query))
            logits = (embed @ features.flatten(1)).view(1, 20, 16, 16)
            logits = F.interpolate(logits, images.shape[-2:], mode="bilinear")[
                0, :, :HEIGHT, :WIDTH
            ].numpy()
        for query in range(20):
            inside[query] += [
                1 / (1 + math.exp(-logit)) for logit in logits[query].flatten() if logit > 0
            ]
        for mask, query in zip(video.masks[:, t].numpy(), video.track_ids):
            assert (mask == (logits[query] > 0)).all()
    assert any(inside) and len({len(pixels) for pixels in inside}) > 10
    for score, label, query in zip(video.scores.tolist(), video.labels, video.track_ids):
        expected = class_scores[query, label] * sum(inside[query]) / (len(inside[query]) + 1e-6)
        assert score == pytest.approx(expected, rel=1e-8)  # pixels + 1e-6 is a float32


def test_clips_of_several_frames():
    """Five frames in clips of three.

    Two clips, the last one short, each with one set of queries for its frames.
    """
    model = shared_model(clip_length=3)
    frames = make_frames(5)
    video = model.segment_video(frames)
    assert video.logits.shape[0] == 2 and video.masks.shape[1] == 5
    first = model.segment_video(frames[:3])  # the future changes nothing
    torch.testing.assert_close(video.logits[:1], first.logits)
    output = model([frames])
    assert [clip.frame_embed.shape[2] for clip in output.clips] == [3, 2]


def test_what_is_no_video(model):
    with pytest.raises(ValueError, match="the video has no frames"):
        model.segment_video([])
    with pytest.raises(ValueError, match="the video has no frames"):
        model.segment_video(make_frames(2)[:0])
    with pytest.raises(
        ValueError, match=r"must have one size.*\(40, 50\).*\(40, 56\)"
    ):  # though padded to one size
        model.segment_video([make_frames(1)[0], make_frames(1, 40, 50)[0]])


@pytest.mark.slow
def test_activations_that_float16_cannot_hold_are_told():
    """Not for the first frame, so that no frame is overlooked.

    Bfloat16 has the range of float32.
    """
    model, frames = build_model("toy", CLASSES, norm="group").eval(), make_frames(3)
    model.backbone.conv1.weight.data *= 1e5
    frames[:2] = 123  # what the mean leaves of them is nearly zero
    for dtype, outcome in (
        (torch.float16, pytest.raises(FloatingPointError, match="float16: 65504")),
        (torch.bfloat16, contextlib.nullcontext()),
    ):
        with torch.autocast("cpu", dtype):
            assert model.encode_video([frames[:2]]).scores.isfinite().all()
            with outcome:
                model.encode_video([frames])


def test_inference_needs_eval():
    model, frames = make_model().train(), make_frames(1)
    for inference in (lambda: model.segment_video(frames), lambda: model.step(frames[0])):
        with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
            inference()


# Step by step


@pytest.mark.parametrize("propagation", STEPPING)
def test_last_step_is_the_whole_video(propagation):
    """Causal scores and labels of the last frame are those of the video.

    So are its masks, resized or not.
    """
    model, frames, state = shared_model(propagation), make_frames(3), None
    for count, frame in enumerate(frames, 1):
        tracks, state = model.step(frame, state, output_size=(50, 70), top_k=12)
        video = model.segment_video(
            frames[:count], output_size=(50, 70), top_k=12
        )  # the video up to here
        assert tracks.masks.shape == (12, 50, 70) and tracks.masks.dtype == torch.bool
        for name in ("scores", "labels", "track_ids"):
            torch.testing.assert_close(getattr(tracks, name), getattr(video, name))
        torch.testing.assert_close(tracks.logits, video.logits[-1])
        assert torch.equal(tracks.masks, video.masks[:, -1])


@pytest.mark.parametrize("propagation", STEPPING)
def test_state_over_steps(propagation):
    """It stays as large as it was unless there is a memory.

    And going on from a state leaves it as it is.
    """
    model, state, sizes = shared_model(propagation), None, []
    for frame in make_frames(5):
        tracks, following = model.step(frame, state)
        if len(sizes) == 2:
            assert_equal(model.step(frame, state)[0], tracks)
        state = following
        tensors = [*vars(state.tracker).values(), *vars(state.scores).values()]
        sizes.append(sum(tensor.numel() for tensor in tensors if tensor is not None))
    memory = 2 * 20 * 64 if "memory" in propagation else 0  # key and value of 20 queries
    assert [size - sizes[0] for size in sizes] == [memory * count for count in range(5)]


@pytest.mark.parametrize("propagation", STEPPING)
def test_streams_are_what_each_is_alone(propagation):
    """Three videos of which one starts later, in changing order."""
    model = shared_model(propagation)
    videos = [make_frames(3) for _ in range(3)]
    alone, together = [None] * 3, [None] * 3
    for t, streams in enumerate(((0, 2), (2, 1, 0), (0, 1, 2))):
        frames = torch.stack([videos[stream][t] for stream in streams])
        found, states = model.step_streams(
            frames, [together[stream] for stream in streams], (50, 70), 5
        )
        for stream, tracks, state in zip(streams, found, states, strict=True):
            together[stream] = state
            expected, alone[stream] = model.step(videos[stream][t], alone[stream], (50, 70), 5)
            torch.testing.assert_close(vars(tracks), vars(expected), rtol=1e-4, atol=1e-4)


def test_every_stream_has_a_state():
    for frames in (2, 0):
        with pytest.raises(
            ValueError, match=f"a frame and a state of each video, not {frames} and 1"
        ):
            shared_model("gated").step_streams(make_frames(2)[:frames], [None])


@pytest.mark.parametrize("propagation, options", [("clip", {}), ("gated", {"clip_length": 2})])
def test_step_needs_a_model_that_goes_frame_by_frame(propagation, options):
    with pytest.raises(ValueError, match="frame by frame"):
        shared_model(propagation, **options).step(make_frames(1)[0])


# Training


def test_training_forward():
    """Two videos of different sizes.

    Padded to one, three detector layers as streams, a clip for each of two frames.
    """
    model = make_model().train()
    output = model([make_frames(2), make_frames(2, 24, 90)])
    assert output.padded_size == (64, 96)
    assert len(output.frames.predictions) == 4  # before and after 3 layers
    for logits, kernel in output.frames.predictions:
        assert logits.shape == (4, 20, CLASSES + 1) and kernel.shape == (4, 20, 64 + 1)
    assert output.frames.features.shape == (4, 64, 16, 24)
    assert output.frames.queries.shape == (3, 4, 20, 64)
    assert len(output.clips) == 2
    for clip in output.clips:
        assert [logits.shape for logits in clip.logits] == [(3, 2, 20, CLASSES + 1)] * 3
        assert clip.frame_embed.shape == (3, 2, 1, 20, 64)
        assert (
            all(((soft > 0) & (soft < 1)).all() for soft in clip.gate_soft)
            and len(clip.gate_soft) == 3
        )
    with pytest.raises(ValueError, match=r"same number of frames, not \[2, 3\]"):
        model([make_frames(2), make_frames(3)])


def test_the_last_clip_of_a_training_step_may_be_shorter():
    """Three frames in clips of two: the second clip is tracked from the state after the first."""
    torch.manual_seed(0)
    model = make_model("plain", clip_length=2).train()
    with torch.no_grad():
        output = model([make_frames(3)])
        queries = output.frames.queries[:, None]  # (L, B, T, F, C)
        (first,), state = model.tracker(queries[:, :, None, :2])
        (last,), _ = model.tracker(queries[:, :, None, 2:], state)
        (forgetful,), _ = model.tracker(queries[:, :, None, 2:])
    for prediction, expected in zip(output.clips, (first, last), strict=True):
        torch.testing.assert_close(prediction.logits[-1], expected.logits[-1])
    assert not torch.allclose(output.clips[1].logits[-1], forgetful.logits[-1])


@pytest.mark.parametrize("propagation", [*STEPPING, "clip"])
@torch.no_grad()
def test_forward_is_segment_video(propagation):
    """Not training, the batched way of two videos goes through the same states as each video frame
    by frame."""
    model, videos = shared_model(propagation), [make_frames(2), make_frames(2, seed=1)]
    output = model(videos)
    for index, frames in enumerate(videos):
        logits = torch.stack([clip.logits[-1][-1, index] for clip in output.clips])
        torch.testing.assert_close(logits, model.segment_video(frames).logits)


# Construction


@pytest.mark.parametrize(
    "preset, channels",
    [
        ("r50", [256, 512, 1024, 2048]),
        ("r101", [256, 512, 1024, 2048]),
        ("swin_t", [96, 192, 384, 768]),
        ("swin_s", [96, 192, 384, 768]),
        ("swin_b", [128, 256, 512, 1024]),
        ("swin_l", [192, 384, 768, 1536]),
        ("toy", [64, 128, 256, 512]),
        ("small", [64, 128, 256, 256]),
    ],
)
def test_presets(preset, channels):
    """Outlines take no memory."""
    with outlined():
        model = build_model(preset, 25)
    assert model.backbone.channels == channels
    assert [block[0].in_channels for block in model.pixel_decoder.input_proj] == channels[
        :0:-1
    ]  # res5, res4, res3
    assert model.tracker.class_embed.out_features == 26 and model.training
    assert len(model.frame_decoder.query_feat.weight) == {
        "swin_l": 200,
        "toy": 20,
        "small": 20,
    }.get(preset, 100)


def test_presets_are_all_tested():
    tested = test_presets.pytestmark[0].args[1]
    names = [preset for preset, _ in tested]
    assert names == list(PRESETS), "each preset needs an entry in test_presets"


def test_defaults_of_the_tracker():
    """VITA reads windows of six frames, the others whole clips.

    The masks of closed queries are the released ones.
    """
    with outlined():
        windows = {
            propagation: build_model("toy", CLASSES, propagation).tracker.window
            for propagation in (*STEPPING, "clip")
        }
        assert windows == {"gated": 0, "plain": 0, "memory": 0, "gated+memory": 0, "clip": 6}
        assert build_model("toy", CLASSES, "clip", window=0).tracker.window == 0
        assert build_model("toy", CLASSES).tracker.gate_mask == "additive"


def test_sides_of_test_frames():
    """The official ones: 360 for a ResNet, 448 for a Swin; those of the synthetic set."""
    assert TEST_SIDES.keys() == PRESETS.keys()
    for name in ("r50", "r101"):
        assert TEST_SIDES[name] == 360
    for name in ("swin_t", "swin_s", "swin_b", "swin_l"):
        assert TEST_SIDES[name] == 448
    for name in ("toy", "small"):
        assert TEST_SIDES[name] == 96


def test_options_of_the_tracker_are_passed_on(monkeypatch):
    """So a new one is declared in Tracker alone."""

    def __init__(self, *arguments, new_option: int = 1, **options):
        create(self, *arguments, **options)
        self.new_option = new_option

    create = Tracker.__init__
    monkeypatch.setattr(Tracker, "__init__", __init__)
    with outlined():
        assert build_model("toy", CLASSES).tracker.new_option == 1
        assert build_model("toy", CLASSES, new_option=2).tracker.new_option == 2


def test_build_model_refuses():
    with pytest.raises(ValueError, match="'r18'.*r50, r101"):
        build_model("r18", CLASSES)
    with pytest.raises(ValueError, match="query_count"):
        build_model("toy", CLASSES, query_count=5)
    with pytest.raises(ValueError, match="'gate'.*gated, plain"):
        build_model("toy", CLASSES, propagation="gate")
    with pytest.raises(ValueError, match="'mask'.*additive, blocked"):
        build_model("toy", CLASSES, gate_mask="mask")
    with pytest.raises(ValueError, match="at least 1, not 0"):
        build_model("toy", CLASSES, clip_length=0)


def test_requests_that_make_no_sense_are_refused():
    """One clear sentence each, instead of an error from deep inside."""
    model, frames = shared_model(), torch.zeros(2, 3, 40, 56, dtype=torch.uint8)
    with pytest.raises(ValueError, match="torch tensor, not numpy"):
        model.segment_video(frames.numpy())
    with pytest.raises(ValueError, match="top_k"):
        model.segment_video(frames, top_k=0)
    for size in ((0, 5), (5,), (3, 4, 5), (4.0, 5), ("4", "5"), (True, 5), (), 5):
        with pytest.raises(ValueError, match="output_size must be .height, width., two ints"):
            model.segment_video(frames, output_size=size)
    for count in (0, -3, 2.5, None, True):
        with pytest.raises(ValueError, match="top_k must be an int of at least 1"):
            model.step(frames[0], top_k=count)
    for videos in ([], [frames[:0]], [frames, frames[:0]]):
        with pytest.raises(ValueError, match="no frames"):
            model.prepare(videos)
    with pytest.raises(ValueError, match="no frames"):
        model.prepare([])
    with pytest.raises(ValueError, match="num_classes"):
        build_model("toy", 0)
    _, state = model.step(frames[0])
    with pytest.raises(ValueError, match="one size"):
        model.step(frames[0, :, :32], state)


# Faster, and the same


@pytest.mark.parametrize("frozen", [True, False])
@torch.no_grad()
def test_weights_cast_once_are_those_of_autocast(frozen):
    """In 16 bit for good.

    The same results as autocast's, which casts at every use; what is frozen is still saved as it
    was.
    """
    torch.manual_seed(0)
    model = build_model("toy", CLASSES, backbone="resnet10_thin", norm="group")
    frames = make_frames(2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or name.startswith("tracker."))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return model.eval().segment_video(frames).logits, model.train()([frames]).frames.queries

    expected = run()
    if frozen:
        cast_frozen_weights(model, torch.bfloat16)
    else:
        assert not model.train().accelerate(torch.bfloat16).training  # it is for inference alone
    assert model.backbone.conv1.weight.dtype == torch.bfloat16
    assert all(map(torch.equal, run(), expected))
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()) == frozen
    assert model.tracker.class_embed.weight.dtype == (torch.float32 if frozen else torch.bfloat16)


@pytest.mark.parametrize("norm, parts", [("group", 2), ("batch", 1)])
def test_a_frozen_detector_looks_in_parts(monkeypatch, norm, parts):
    """Four frames, two at a time, are what they are at once.

    The tracker's own map of them is still trained.
    """
    torch.manual_seed(0)
    model = build_model("toy", CLASSES, backbone="resnet10_thin", norm=norm).double()
    videos = [make_frames(2), make_frames(2)]
    monkeypatch.setattr("tracker.logistic_noise", torch.zeros_like)
    whole, seen, detect = model(videos), [], model.detect
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("tracker."))
    monkeypatch.setattr("fast.acceleration.FROZEN_CHUNK", 2)
    model.detect = lambda images: seen.append(len(images)) or detect(images)
    output = model(videos)
    assert len(seen) == parts
    torch.testing.assert_close(output.clips[-1].logits[-1], whole.clips[-1].logits[-1])
    torch.testing.assert_close(output.frames.features, whole.frames.features)
    for found, expected in zip(output.frames.predictions, whole.frames.predictions, strict=True):
        torch.testing.assert_close(found, expected)
    output.clips[0].mask_kernel[0].sum().backward()
    assert model.tracker.mask_features.weight.grad.abs().sum() > 0


def test_recomputed_gradients_are_the_same():
    torch.manual_seed(0)
    model, gradients = make_model(backbone="resnet10_thin").train(), []
    for recompute in (False, True):
        torch.manual_seed(0)
        model.backbone.recompute = model.pixel_decoder.recompute = recompute
        model.zero_grad()
        output = model([make_frames(1)])
        sum(logits.sum() for logits in output.clips[0].logits).backward()
        gradients.append(
            [
                parameter.grad
                for parameter in (
                    *model.backbone.parameters(),
                    *model.pixel_decoder.layers.parameters(),
                )
            ]
        )
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_the_compiled_parts_have_no_breaks(monkeypatch):
    """Traced as a whole, in inference and in training, and then run as they are.

    The same results.
    """
    monkeypatch.setattr("tracker.logistic_noise", torch.zeros_like)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, frames = (
        build_model(
            "toy", CLASSES, "gated+memory", norm="group", frame_layers=2, tracker_decoder_layers=2
        ),
        make_frames(3),
    )
    expected = (
        model.double().train()([frames]).clips[-1].logits[-1],
        model.eval().segment_video(frames).logits,
    )
    compile_parts(model)
    other = copy.deepcopy(model)
    assert other.decode.__self__ is other and other.tracker.decode_clip.__self__ is other.tracker
    torch.testing.assert_close(model.segment_video(frames).logits, expected[1])
    torch.testing.assert_close(model.train()([frames]).clips[-1].logits[-1], expected[0])


def test_a_copy_has_no_graphs_of_the_model():
    model = make_model()
    model.cuda_graphs.graphs["key"] = None
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.cuda_graphs is not model.cuda_graphs and not other.cuda_graphs.graphs


def test_graphs_are_dropped_when_the_model_changes():
    """New values in the same weight tensors are no change: a graph reads them where they are."""
    model = make_model()
    tracker = model.tracker
    changes = [
        (lambda: torch.nn.init.normal_(tracker.class_embed.weight), True),
        (lambda: model.load_state_dict(model.state_dict()), True),
        (lambda: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True), False),
        (lambda: model.eval(), True),
        (lambda: model.train().eval(), False),
        (model.float, False),
        (
            lambda: setattr(
                tracker.class_embed, "weight", torch.nn.Parameter(torch.zeros(CLASSES + 1, 64))
            ),
            False,
        ),
        (lambda: setattr(tracker, "class_embed", torch.nn.Linear(64, CLASSES + 1)), False),
        (lambda: setattr(tracker, "gate_mask", "blocked"), False),
        (lambda: setattr(tracker, "propagate", lambda gate, x, carried: x), False),
        (lambda: torch.nn.init.zeros_(tracker.class_embed.weight), True),
        (model.half, False),
    ]
    for number, (change, kept) in enumerate(changes):
        model.cuda_graphs.check_module(model)
        model.cuda_graphs.graphs["key"] = None
        change()
        model.cuda_graphs.check_module(model)
        assert bool(model.cuda_graphs.graphs) == kept, number


def test_every_video_checks_the_graphs():
    model, frames = make_model(), make_frames(2)
    for infer in (model.segment_video, model.encode_video, lambda frames: model.step(frames[0])):
        model.cuda_graphs.graphs["key"] = None
        model.tracker.to(torch.float32).to(torch.float64)
        infer(frames)
        assert not model.cuda_graphs.graphs


def test_a_model_is_gone_with_its_last_name():
    """And its memory with it.

    Nothing in it refers back to the whole, so no garbage collection is waited for.
    """
    model = make_model()
    model.segment_video(make_frames(2))
    alive = weakref.ref(model)
    gc.disable()
    del model
    gone = alive() is None
    gc.enable()
    assert gone


@pytest.mark.parametrize(
    "part", ["backbone.stages.1", "pixel_decoder", "tracker", "tracker.decoder"]
)
def test_a_part_in_training_mode_is_refused_and_named(part):
    """It would draw gates at random, or use the statistics of a batch."""
    model = make_model("gated")
    model.get_submodule(part).train()
    frames = make_frames(2)
    for infer in (model.segment_video, model.encode_video, lambda frames: model.step(frames[0])):
        with pytest.raises(RuntimeError, match=rf"^{re.escape(part)}\S* is in training mode"):
            infer(frames)
