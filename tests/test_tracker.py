"""The tracker by its extremes: a gate always open is plain propagation, a gate always closed sees
no frame.

Then the parts one by one, each against a loop or numbers written out: the masks of closed queries
in both variants, the Gumbel-sigmoid and its straight-through gradient, GenVIS' memory, VITA's
windows. Tiny random trackers in float64.
"""

import itertools
import math

import pytest
import torch

import plain_model
import tracker as tracker_module
from tracker import (
    GATE_MASKS,
    GUMBEL_TEMPERATURE,
    PROPAGATIONS,
    Tracker,
    TrackerState,
    logistic_noise,
)
from transformer import Attention, mask_kernel
from viewing.introspection import attention_weights

QUERIES, FRAME_QUERIES, CHANNELS = 5, 4, 16
OPEN, CLOSED = 100.0, -100.0  # gate biases that no logit of these tests gets across


def make_tracker(
    propagation: str = "gated",
    gate_mask: str = "additive",
    window: int = 0,
    encoder_layers: int = 1,
    gate_bias: float | None = None,
) -> Tracker:
    """A small random tracker, not training."""
    torch.manual_seed(0)
    tracker = (
        Tracker(
            3,
            CHANNELS,
            QUERIES,
            FRAME_QUERIES,
            encoder_layers,
            decoder_layers=3,
            heads=2,
            feed_forward=32,
            propagation=propagation,
            gate_mask=gate_mask,
            window=window,
        )
        .double()
        .eval()
    )
    if gate_bias is not None:
        torch.nn.init.constant_(tracker.gate_proj.bias, gate_bias)
    return tracker


def random_frames(layers: int = 1, batch: int = 1, frames: int = 1, seed: int = 1) -> torch.Tensor:
    """Frame queries of one clip."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(
        layers, batch, frames, FRAME_QUERIES, CHANNELS, dtype=torch.float64, generator=generator
    )


def track_clip(tracker: Tracker, frame_queries: torch.Tensor, state: TrackerState | None = None):
    """The prediction for one clip, frame queries (L, B, U, F, C), and the next state."""
    (prediction,), state = tracker(frame_queries[:, :, None], state)
    return prediction, state


def random_queries(rows: int = 1, queries: int = QUERIES, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, queries, CHANNELS, dtype=torch.float64, generator=generator)


@pytest.fixture
def no_noise(monkeypatch):
    monkeypatch.setattr(tracker_module, "logistic_noise", torch.zeros_like)


# The whole of it


# tests/test_model.py compares what is predicted at inference.
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "propagation, gate_mask, window",
    [
        ("gated", "additive", 0),
        ("gated", "blocked", 0),
        ("gated", "additive", 2),
        ("plain", "additive", 0),
        ("memory", "additive", 0),
        ("gated+memory", "additive", 0),
        ("gated+memory", "blocked", 0),
        ("clip", "additive", 2),
        ("clip", "additive", 0),
    ],
)
def test_every_mode_is_a_plain_loop(propagation, gate_mask, window, training, no_noise):
    """Two videos of three clips of three frames, two detector layers: all that the tracker says,
    and its gradients.
    """
    layers, batch, clips, frames = 2, 2, 3, 3
    tracker = make_tracker(propagation, gate_mask, window, encoder_layers=3).train(training)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        # Norms and biases, too.
        for parameter in tracker.parameters():
            parameter += 0.2 * torch.randn(
                parameter.shape, dtype=torch.float64, generator=generator
            )
        if tracker.gated:
            # Some gates are open, some are closed.
            tracker.gate_proj.bias.fill_(-0.8)
    queries = torch.randn(
        layers,
        batch,
        clips,
        frames,
        FRAME_QUERIES,
        CHANNELS,
        dtype=torch.float64,
        generator=generator,
    )
    parameters = dict(tracker.named_parameters())
    torch.set_default_dtype(torch.float64)
    try:
        expected = [
            plain_model.track_clips(
                plain_model.Weights(parameters),
                2,
                list(video.transpose(0, 1)),
                gate_mask,
                window,
                training,
            )
            for video in queries.transpose(0, 1)
        ]
    finally:
        torch.set_default_dtype(torch.float32)

    state, pairs, gates = None, [], []
    for clip in range(clips):
        prediction, state = track_clip(tracker, queries[:, :, clip], state)
        carried = state.query.unflatten(0, (layers, batch))
        gates += prediction.gate_logits
        for layer, video in itertools.product(range(layers), range(batch)):
            own = {name: values[layer] for name, values in expected[video][clip].items()}
            # At inference by the last layer alone.
            predicted = slice(None) if training else slice(-1, None)
            for name, values in (
                ("logits", own["logits"][predicted]),
                ("gate_logits", own["gate_logits"]),
                ("gate_soft", own["gate_soft"] if training else []),
            ):
                pairs += zip(
                    [value[layer, video] for value in getattr(prediction, name)],
                    values,
                    strict=True,
                )
            for embed, kernel in zip(own["embed"][predicted], prediction.mask_kernel, strict=True):
                pairs.append((kernel[layer, video], mask_kernel(embed, tracker.mask_features)))
            pairs += [
                (carried[layer, video], own["query"]),
                (prediction.clip_embed[layer, video], own["clip_embed"]),
                (prediction.frame_embed[layer, video], own["frame_embed"]),
            ]
    for found, value in pairs:
        torch.testing.assert_close(found, value)
    if tracker.gated:
        assert 0.2 < (torch.stack(gates) >= 0).double().mean() < 0.8
    ours, theirs = (
        torch.autograd.grad(sum(value.square().sum() for value in values), parameters.values())
        for values in zip(*pairs)
    )
    for name, found, value in zip(parameters, ours, theirs):
        torch.testing.assert_close(found, value, msg=lambda text, name=name: f"{name}: {text}")


def test_the_masks_of_closed_queries_are_the_released_ones_unless_asked():
    assert Tracker(3, 16, heads=2, feed_forward=8).gate_mask == "additive"


# The gate, forced


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gate_mask", GATE_MASKS)
def test_open_gate_is_plain_propagation(gate_mask, training):
    gated = make_tracker("gated", gate_mask, gate_bias=OPEN).train(training)
    plain = make_tracker("plain").train(training)
    missing, unexpected = plain.load_state_dict(gated.state_dict(), strict=False)
    assert not missing and unexpected == ["gate_proj.weight", "gate_proj.bias"]
    state = plain_state = None
    for seed in range(3):
        prediction, state = track_clip(gated, random_frames(seed=seed), state)
        plain_prediction, plain_state = track_clip(plain, random_frames(seed=seed), plain_state)
        torch.testing.assert_close(state.query, plain_state.query)
        torch.testing.assert_close(prediction.logits, plain_prediction.logits)
    assert not plain_prediction.gate_logits and len(prediction.gate_logits) == 3


@pytest.mark.parametrize("gate_mask", GATE_MASKS)
@torch.no_grad()
def test_closed_gate_sees_no_frame(gate_mask):
    """What a clip shows does not reach a closed query, whichever the mask.

    It reaches an open one.
    """
    carried = TrackerState(random_queries())
    for bias, sees in ((CLOSED, False), (OPEN, True)):
        tracker = make_tracker("gated", gate_mask, gate_bias=bias)
        (one, one_state), (other, other_state) = (
            track_clip(tracker, random_frames(seed=seed), carried) for seed in (3, 4)
        )
        assert torch.equal(one_state.query, other_state.query) != sees
        assert torch.equal(one.logits[0], other.logits[0]) != sees


@pytest.mark.parametrize("gate_mask", GATE_MASKS)
@torch.no_grad()
def test_closed_queries_depend_on_each_other_with_the_additive_mask_alone(gate_mask):
    """All gates closed: a query's next state is a function of itself ("blocked") or of all queries
    ("additive").
    """
    tracker, carried = make_tracker("gated", gate_mask, gate_bias=CLOSED), random_queries()
    changed = carried.clone()
    changed[:, 0] += 1
    before, after = (
        track_clip(tracker, random_frames(), TrackerState(query))[1].query
        for query in (carried, changed)
    )
    moved = (before != after).any(-1)[0].tolist()
    assert moved == [True] + [gate_mask == "additive"] * (QUERIES - 1)


@pytest.mark.parametrize("propagation", ["gated", "gated+memory"])
@torch.no_grad()
def test_what_enters_self_attention(propagation):
    """In every layer: the carried query, its memory read, where the gate is closed.

    Else what cross-attention made.
    """
    tracker, state, read, entered = (
        make_tracker(propagation),
        TrackerState(random_queries()),
        [],
        [],
    )
    carried = tracker.read_memory(state) if "memory" in propagation else state.query
    for layer in tracker.decoder:
        layer.cross_attention.register_forward_hook(
            lambda module, inputs, output: read.append(output)
        )
        layer.self_attention.register_forward_pre_hook(
            lambda module, inputs: entered.append(inputs[0])
        )
    prediction, _ = track_clip(tracker, random_frames(), state)
    gates = torch.stack(prediction.gate_logits)[:, 0] >= 0  # (D, B, Q)
    assert gates.any() and not gates.all()
    for layer in range(3):
        for query in range(QUERIES):
            source = read[layer] if gates[layer, 0, query] else carried
            assert torch.equal(entered[layer][0, query], source[0, query]), (layer, query)


@torch.no_grad()
def test_the_gated_residual_interpolates():
    """x = g x + (1 - g) q, also for a gate that is neither open nor closed."""
    tracker, query, crossed, entered = make_tracker(), random_queries(), [], []
    gate = torch.tensor([0.0, 1.0, 0.25, 0.5, 0.75], dtype=torch.float64)[None, :, None]
    tracker.gate = lambda x, detector_layers: (gate, gate[..., 0], None)
    for layer in tracker.decoder:
        layer.cross_attention.register_forward_hook(
            lambda module, inputs, output: crossed.append(output)
        )
        layer.self_attention.register_forward_pre_hook(
            lambda module, inputs: entered.append(inputs[0])
        )
    track_clip(tracker, random_frames(), TrackerState(query))
    for x, found in zip(crossed, entered, strict=True):
        for number, share in enumerate(gate.flatten().tolist()):
            torch.testing.assert_close(
                found[0, number], share * x[0, number] + (1 - share) * query[0, number]
            )


# The masks of closed queries


def test_attention_mask_by_hand():
    """Queries 1 and 3 are closed: their rows are marked, not their columns, and the diagonal stays
    free.
    """
    gate = torch.tensor([1.0, 0.0, 1.0, 0.0])[None, :, None]
    rows = [[0, 0, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]]
    mask = make_tracker(gate_mask="additive").attention_mask(gate)
    # +1, as released.
    assert mask.is_floating_point() and mask.tolist() == [[rows]]
    mask = make_tracker(gate_mask="blocked").attention_mask(gate)
    # True = must not attend.
    assert mask.dtype == torch.bool and mask.tolist() == [[rows]]


@torch.no_grad()
def test_attention_weights_of_a_closed_query():
    """All logits 0 but for the mask.

    Open: a quarter for each. Closed: itself alone, or the others e times more.
    """
    attention = Attention(4, 1)
    # Query, key: 0; value: as it is.
    attention.in_proj_weight.zero_()[8:] = torch.eye(4)
    attention.out_proj.weight.copy_(torch.eye(4))
    # So the output is the weights.
    x = torch.eye(4)[None]
    gate = torch.tensor([1.0, 0.0, 1.0, 1.0])[None, :, None]
    one = torch.tensor([0.25] * 4)
    for gate_mask, closed in (("blocked", [0, 1, 0, 0]), ("additive", [math.e, 1, math.e, math.e])):
        mask = make_tracker(gate_mask=gate_mask).attention_mask(gate)
        closed = torch.tensor(closed, dtype=torch.float32)
        expected = torch.stack((one, closed / closed.sum(), one, one))
        torch.testing.assert_close(attention(x, x, x, mask)[0], expected)
        torch.testing.assert_close(attention_weights(attention, x, x, mask)[0, 0], expected)


@torch.no_grad()
def test_a_blocked_closed_query_does_not_see_the_others():
    tracker, x = make_tracker(gate_mask="blocked"), random_queries()
    gate = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)[None, :, None]
    changed = x.clone()
    # An open and a closed query.
    changed[:, [0, 3]] += 1
    before, after = (
        tracker.decoder[0].self_attention(y, mask=tracker.attention_mask(gate))
        for y in (x, changed)
    )
    assert (before != after).any(-1)[0].tolist() == [True, False, True, True, True]


# The gate while training


def test_the_last_streams_hard_gate_serves_all():
    """L = 2 detector layers of B = 2 videos: streams (layer 0: a, b; layer 1: a, b)."""
    tracker = make_tracker().train()
    gate, logits, soft = tracker.gate(random_queries(rows=4), detector_layers=2)
    assert gate.shape == (4, QUERIES, 1) and logits.shape == soft.shape == (4, QUERIES)
    decided = soft >= 0.5
    # The layers do not agree.
    assert not torch.equal(decided[:2], decided[2:])
    assert torch.equal(gate.detach()[..., 0] > 0.5, decided[[2, 3, 2, 3]])
    closed = gate.detach()[..., 0][~decided[[2, 3, 2, 3]]]
    opened = gate.detach()[..., 0][decided[[2, 3, 2, 3]]]
    assert len(closed) and len(opened)
    assert (closed == 0).all() and ((opened - 1).abs() <= torch.finfo(gate.dtype).eps).all()


def test_inference_gate_opens_at_zero():
    tracker = make_tracker()
    torch.nn.init.zeros_(tracker.gate_proj.weight)
    for bias, expected in ((-1e-9, 0), (0.0, 1), (1e-9, 1)):
        torch.nn.init.constant_(tracker.gate_proj.bias, bias)
        gate, _, soft = tracker.gate(random_queries(), detector_layers=1)
        assert (gate == expected).all() and soft is None


def test_straight_through_gradient(no_noise):
    """Hard gates forward, the soft gates' gradient backward, through closed gates as through open
    ones.
    """
    tracker, x = make_tracker().train(), random_queries(rows=4)
    weight = random_queries(rows=4, seed=5)[..., :1]
    parameters = list(tracker.gate_proj.parameters())
    gate, logits, _ = tracker.gate(x, detector_layers=2)
    assert 0 < gate.sum() < gate.numel()
    got = torch.autograd.grad((gate * weight).sum(), parameters)
    soft = torch.sigmoid(tracker.gate_proj(tracker.decoder_norm(x)) / GUMBEL_TEMPERATURE)
    expected = torch.autograd.grad((soft[[2, 3, 2, 3]] * weight).sum(), parameters)
    torch.testing.assert_close(got, expected)

    # All closed, then all open.
    for bias in (-3.0, 3.0):
        torch.nn.init.constant_(tracker.gate_proj.bias, bias)
        prediction, state = track_clip(tracker, random_frames(), TrackerState(random_queries()))
        assert all(((logits > 0) == (bias > 0)).all() for logits in prediction.gate_logits)
        assert (
            torch.autograd.grad(prediction.logits[-1].square().sum(), tracker.gate_proj.weight)[0]
            .abs()
            .min()
            > 0
        )


def test_noise_decides_a_gate():
    """In training a gate whose logit is zero is open half of the time, at inference always."""
    tracker = make_tracker(gate_bias=0.0).train()
    torch.nn.init.zeros_(tracker.gate_proj.weight)
    torch.manual_seed(0)
    frames = random_frames().expand(1, 200, -1, -1, -1)
    soft = torch.cat(track_clip(tracker, frames)[0].gate_soft)
    assert (soft >= 0.5).double().mean().item() == pytest.approx(0.5, abs=0.05)
    logits = torch.logit(soft) * GUMBEL_TEMPERATURE
    assert logits.var().item() == pytest.approx(math.pi**2 / 3, rel=0.1)


def test_gate_noise_is_logistic():
    """Mean 0, variance pi^2 / 3 and the logistic distribution function, which is the sigmoid."""
    torch.manual_seed(0)
    noise = logistic_noise(torch.zeros(200_000, dtype=torch.float64))
    # Five standard errors.
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 3, rel=0.02)
    for at in (-3.0, -1.0, 0.0, 1.0, 3.0):
        assert (noise <= at).double().mean().item() == pytest.approx(
            1 / (1 + math.exp(-at)), abs=0.006
        )


# Memory and state


@torch.no_grad()
def test_memory_is_a_loop_over_past_clips():
    tracker, past, query = make_tracker("memory"), 3, random_queries(rows=2)
    keys, values = (
        torch.stack([random_queries(2, seed=seed + clip) for clip in range(past)], 1)
        for seed in (10, 20)
    )
    read = tracker.read_memory(TrackerState(query, keys, values))
    for stream in range(2):
        for index in range(QUERIES):
            own = query[stream, index]
            weights = [
                math.exp(float(tracker.query_key(own) @ keys[stream, clip, index]))
                for clip in range(past)
            ]
            expected = own + tracker.query_value(own)
            for clip in range(past):
                expected = expected + weights[clip] / sum(weights) * values[stream, clip, index]
            torch.testing.assert_close(read[stream, index], expected)
    # Nothing past.
    assert torch.equal(tracker.read_memory(TrackerState(query)), query + tracker.query_value(query))


@torch.no_grad()
def test_a_query_reads_its_own_past_alone():
    tracker, query = make_tracker("memory"), random_queries()
    # (1, two past clips, Q, C).
    key, value = (random_queries(rows=2, seed=seed)[None] for seed in (3, 4))
    before = tracker.read_memory(TrackerState(query, key, value))
    # Query 1 in the first clip.
    key[:, 0, 1] += 1
    value[:, 0, 1] += 1
    after = tracker.read_memory(TrackerState(query, key, value))
    assert (before != after).any(-1)[0].tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("propagation", PROPAGATIONS)
@torch.no_grad()
def test_state_size(propagation):
    """One memory entry a clip where there is a memory.

    Otherwise the queries alone, however long the video.
    """
    tracker, state = make_tracker(propagation), None
    for clip in range(1, 5):
        before = state
        _, state = track_clip(tracker, random_frames(layers=2, seed=clip), state)
        assert state.query.shape == (2, QUERIES, CHANNELS)
        if "memory" not in propagation:
            assert state.past_keys is None and state.past_values is None
            continue
        assert state.past_keys.shape == state.past_values.shape == (2, clip, QUERIES, CHANNELS)
        # The past is not rewritten.
        if before:
            assert torch.equal(state.past_keys[:, :-1], before.past_keys)
        normed = tracker.decoder_norm(state.query)
        torch.testing.assert_close(state.past_values[:, -1], tracker.memory_value(normed))


def test_what_is_carried():
    """The learned queries at first, then the raw output of the last layer.

    Decoder_norm stands before the heads.
    """
    tracker, raw = make_tracker(), []
    tracker.decoder[-1].feed_forward.register_forward_hook(
        lambda module, inputs, output: raw.append(output)
    )
    prediction, state = track_clip(tracker, random_frames())
    _, given = track_clip(tracker, random_frames(), TrackerState(tracker.query_feat.weight[None]))
    assert torch.equal(state.query, raw[0]) and torch.equal(state.query, given.query)
    torch.testing.assert_close(
        prediction.logits[0][0], tracker.class_embed(tracker.decoder_norm(state.query))
    )


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_a_later_clip_teaches_an_earlier_one(propagation):
    """Nothing is detached: the gradient of the third clip's logits reaches the first clip's frame
    queries.
    """
    tracker, clips, state = (
        make_tracker(propagation).train(),
        [random_frames(seed=seed) for seed in range(3)],
        None,
    )
    clips[0].requires_grad_()
    for clip in clips:
        prediction, state = track_clip(tracker, clip, state)
    assert torch.autograd.grad(prediction.logits[-1].square().sum(), clips[0])[0].abs().sum() > 0


@torch.no_grad()
def test_a_clip_is_a_set_of_frames():
    """A frame query's position says which query it is, not of which frame: the order in a clip
    changes nothing.
    """
    tracker, clip = make_tracker(), random_frames(frames=3)
    _, state = track_clip(tracker, clip)
    _, other_frames = track_clip(tracker, clip[:, :, [2, 0, 1]])
    _, other_queries = track_clip(tracker, clip[:, :, :, [1, 0, 2, 3]])
    torch.testing.assert_close(other_frames.query, state.query)
    assert not torch.allclose(other_queries.query, state.query)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("propagation", PROPAGATIONS)
@torch.no_grad()
def test_videos_of_a_batch_do_not_meet(propagation, training, no_noise):
    """Two detector layers of two videos together equal each video alone, over two clips of two
    frames.
    """
    tracker, state = make_tracker(propagation).train(training), None
    clips, alone = [random_frames(2, 2, 2, seed) for seed in (1, 2)], []
    for video in range(2):
        own = None
        for clip in clips:
            prediction, own = track_clip(tracker, clip[:, video : video + 1], own)
        alone.append((prediction, own))
    for clip in clips:
        together, state = track_clip(tracker, clip, state)
    for video, (prediction, own) in enumerate(alone):
        assert len(together.logits) == len(prediction.logits) == (3 if training else 1)
        for name in ("logits", "mask_kernel", "gate_logits", "gate_soft"):
            for ours, theirs in zip(
                getattr(together, name), getattr(prediction, name), strict=True
            ):
                torch.testing.assert_close(ours[:, video], theirs[:, 0])
        torch.testing.assert_close(together.clip_embed[:, video], prediction.clip_embed[:, 0])
        torch.testing.assert_close(together.frame_embed[:, video], prediction.frame_embed[:, 0])
        # Streams are layer-major.
        torch.testing.assert_close(state.query[video::2], own.query)


# The encoder and its windows


@torch.no_grad()
def test_windows_in_training_are_encoded_alone():
    tracker, x = make_tracker(window=2, encoder_layers=2).train(), random_frames(frames=6)[0]
    together = tracker.encode(x)
    for first in (0, 2, 4):
        torch.testing.assert_close(
            together[:, first : first + 2], tracker.encode(x[:, first : first + 2])
        )
    # All frames see all others.
    tracker.window = 0
    assert not torch.allclose(together, tracker.encode(x))


def group_of(frame: int, frames: int, window: int, shifted: bool) -> tuple:
    """Frames of equal groups see each other. Shifted windows start half a window earlier; the roll
    brings the frames of the video's end before the first frame, into its window, but into another
    group."""
    if not shifted:
        return (frame // window,)
    padded_frames = math.ceil(frames / window) * window
    place = frame + math.ceil(window / 2)
    return place % padded_frames // window, place >= padded_frames


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("frames, window", [(4, 3), (5, 3), (6, 3), (7, 3), (5, 2), (3, 6), (3, 1)])
@torch.no_grad()
def test_windows_are_a_mask(frames, window, training):
    """Each layer is attention over all frames under a mask written as a loop, which knows of no
    padding frames.
    """
    tracker = make_tracker(window=window, encoder_layers=3).train(training)
    frame_queries = random_frames(batch=2, frames=frames)[0]
    x = tracker.input_proj(frame_queries).flatten(1, 2)
    for index, layer in enumerate(tracker.encoder):
        shifted = index == 1 and not training
        bias = torch.zeros(frames * FRAME_QUERIES, frames * FRAME_QUERIES, dtype=torch.float64)
        for row in range(len(bias)):
            for column in range(len(bias)):
                groups = (
                    group_of(token // FRAME_QUERIES, frames, window, shifted)
                    for token in (row, column)
                )
                bias[row, column] = 0 if next(groups) == next(groups) else -math.inf
        x = layer(x, bias)
    torch.testing.assert_close(tracker.encode(frame_queries).flatten(1, 2), x)


def test_shifted_mask_by_hand():
    """Windows of 2: after a roll by 1 the order is 3 0 | 1 2, and frame 3 comes from afar.

    Read inside windows only.
    """
    tracker = make_tracker(window=2)
    assert tracker.shifted_mask(torch.tensor([False] * 4), 1).int().tolist() == [
        [0, 1, 1, 1],
        [1, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 0, 0, 0],
    ]
    # of windows of 3, with 4 frames and 2 padded: p p 0 | 1 2 3
    padded = torch.tensor([False] * 4 + [True] * 2)
    assert tracker.shifted_mask(padded, 2).int().tolist() == [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
    ]


# Errors


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="'gate'.*gated, plain, memory"):
        make_tracker("gate")
    with pytest.raises(ValueError, match="'mask'.*additive, blocked"):
        make_tracker(gate_mask="mask")


def test_gate_noise_keeps_full_precision_under_autocast():
    """In bfloat16 a uniform variable has a few hundred values and its logarithm the wrong mean:
    gates would lean to closed.
    """
    torch.manual_seed(0)
    tracker = Tracker(
        3,
        channels=16,
        queries=5,
        frame_queries=4,
        encoder_layers=1,
        decoder_layers=1,
        heads=2,
        feed_forward=32,
    ).train()
    with torch.autocast("cpu", torch.bfloat16):
        prediction, _ = track_clip(tracker, torch.randn(3, 1, 1, 4, 16))
    assert prediction.gate_soft[0].dtype == torch.float32
    assert prediction.logits[0].dtype == torch.bfloat16


def test_noisy_queries_are_mixed_with_others_of_their_stream():
    """About the asked share of them, each at most halfway.

    From the second clip on, in training alone.
    """
    torch.manual_seed(0)
    tracker = Tracker(
        3,
        channels=8,
        queries=400,
        frame_queries=4,
        encoder_layers=1,
        heads=2,
        feed_forward=16,
        query_noise=0.3,
    ).train()
    # A number a query.
    query = torch.arange(2 * 400.0)[:, None].expand(-1, 8).reshape(2, 400, 8)
    noisy = tracker.add_query_noise(query)
    moved = (noisy != query).any(2)
    # Five standard errors.
    assert moved.double().mean().item() == pytest.approx(0.3, abs=0.08)
    assert ((noisy - query).abs().amax(2) <= 399 / 2).all()
    assert (noisy[0] < 400).all()
    assert (noisy[1] >= 400).all()

    calls = []
    tracker.add_query_noise = lambda query: calls.append(len(calls)) or query
    _, state = tracker(torch.randn(1, 1, 3, 1, 4, 8))
    assert len(calls) == 2
    # The first clip of a second call is not the first of the video.
    tracker(torch.randn(1, 1, 3, 1, 4, 8), state)
    assert len(calls) == 5
    tracker.eval()(torch.randn(1, 1, 3, 1, 4, 8), state)
    assert len(calls) == 5
