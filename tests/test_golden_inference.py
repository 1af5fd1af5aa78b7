"""Inference against the official code: stage by stage, in float64 and float32 (SPEC: sections 2 to
7 of the model).

Hard decisions (mask < 0.5, gate >= 0) make the net chaotic, so the tight comparison is the one in
float64; float32 shows that nothing in the model quietly needs more.
"""

import numpy
import pytest
import torch

from conftest import fixed_threads
from golden_set import (
    PROPAGATION,
    golden_model,
    make_video,
    meta,
    read_arrays,
    relative_error,
    subsampled_error,
    unpack_masks,
)
from transformer import mask_kernel, mask_logits

VIDEOS = list(meta()["infer"]["videos"])
MODES = [(mode, video) for mode, run in meta()["modes"]["runs"].items() for video in run["videos"]]
FIRST = [
    (mode, next(iter(run["videos"]))) for mode, run in meta()["modes"]["runs"].items()
]  # one video of each mode
DTYPES = [torch.float64, torch.float32]
# the cheapest case notices most mistakes
STAGES = [
    pytest.param(
        dtype,
        name,
        marks=[pytest.mark.slow] if (dtype, name) != (torch.float32, VIDEOS[0]) else [],
        id=f"{str(dtype).removeprefix('torch.')}-{name}",
    )
    for dtype in DTYPES
    for name in VIDEOS
]
two_threads = fixed_threads(2)  # in float32 a last bit can decide


@pytest.fixture(scope="module", params=DTYPES, ids=["float64", "float32"])
def model(request):
    spec = meta()["infer"]
    propagation = PROPAGATION[spec["gated"], spec["use_mem"]]
    return golden_model(
        spec["names_shapes"], "r50", spec["num_classes"], propagation, request.param
    ).eval()


@pytest.fixture
def detections(monkeypatch):
    """Starts to record the outputs of a model's detector, so that no test has to run it twice."""

    def record(model):
        outputs, detect = [], model.detect
        monkeypatch.setattr(
            model, "detect", lambda images: outputs.append(detect(images)) or outputs[-1]
        )
        return outputs

    return record


def run_stages(model, frames):
    """Every stage of every frame, as a reader would call them one after the other."""
    state = None
    for frame in frames:
        images = model.prepare([frame[None]])
        maps = model.backbone(images)
        levels, features = model.pixel_decoder(maps)
        predictions, queries = model.frame_decoder(
            levels, features, model.pixel_decoder.mask_features
        )
        (prediction,), state = model.tracker(queries[:, None, None], state)
        stages = {f"backbone.res{i + 2}": m for i, m in enumerate(maps)}
        stages |= {f"pixdec.ms{i}": level for i, level in enumerate(levels)}
        stages |= {
            "pixdec.clip_mask_features": features,
            "pixdec.mask_features": model.pixel_decoder.mask_features(features),
            "m2f.pred_logits": predictions[-1][0],
            "m2f.pred_masks": mask_logits(predictions[-1][1], features),
            "m2f.frame_queries_last": queries[-1],
        }
        yield stages, prediction, state


def golden_kernels(model, golden):
    """The mask kernels of the official mask embeddings."""
    convolution = model.tracker.mask_features
    embed = torch.from_numpy(golden["mask_embed"]).to(convolution.weight.dtype)
    return mask_kernel(embed, convolution).detach().numpy()


@pytest.mark.slow
@pytest.mark.parametrize("model, name", STAGES, indirect=["model"])
@torch.no_grad()
def test_golden_stages(model, name):
    spec = meta()["infer"]
    golden, frames = read_arrays(spec["files"][name]), make_video(**spec["videos"][name])
    double = next(model.parameters()).dtype == torch.float64
    logits, kernels, gates, carried = [], [], [], []
    for index, (stages, prediction, state) in enumerate(run_stages(model, frames)):
        for stage, tensor in stages.items():
            key = f"f{index}.{stage}"
            if key in golden:
                assert subsampled_error(tensor, golden, key) < 1e-3, key
        if index == 0 and double:
            ours = stages["m2f.frame_queries_last"].flatten()
            stride = int(golden["f0.m2f.frame_queries_last__stride"])
            key = next(key for key in golden if key.startswith("f64.frame_query_last_frame0"))
            assert relative_error(ours[::stride], golden[key]) < 1e-8
        logits.append(prediction.logits[-1][0, 0])
        kernels.append(prediction.mask_kernel[-1][0, 0])
        carried.append(state.query[0])
        if prediction.gate_logits:
            gates.append(torch.stack(prediction.gate_logits)[:, 0, 0])
    logits, kernels, carried = torch.stack(logits), torch.stack(kernels), torch.stack(carried)
    assert relative_error(logits, golden["logits"]) < 1e-3
    assert relative_error(kernels, golden_kernels(model, golden)) < 1e-3
    assert relative_error(carried, golden["prop_query"]) < 1e-3
    if gates:
        gates = torch.stack(gates)
        assert ((gates >= 0).numpy() == golden["gate_open"]).all()
        assert relative_error(gates, golden["gate_logits"]) < 1e-3
    if double:
        assert relative_error(logits, golden["f64.logits"]) < 1e-8
        assert relative_error(carried[-1], golden["f64.prop_query_last"]) < 1e-8
        assert not len(gates) or relative_error(gates, golden["f64.gate_logits"]) < 1e-8


def compare_detections(video, golden, prefix, packed=True, tolerance=1e-4, pixels=4):
    """Scores, labels and masks, matched by score: the official order is that of an unsorted top-k.

    Masks: IoU 0.999 over the video, or so many wrong pixels a frame; four are about the official
    code's own difference between float32 and float64.
    """
    pixels *= video.masks.shape[1]
    scores = golden[f"{prefix}scores"]
    order = numpy.argsort(-scores, kind="stable")
    assert abs(video.scores.double().numpy() - scores[order]).max() < tolerance
    assert (video.labels.numpy() == golden[f"{prefix}labels"][order]).all()
    if packed:
        masks, ours = unpack_masks(golden, prefix)[order], video.masks.numpy()
        assert ours.shape == masks.shape
        wrong, union = (masks ^ ours).sum((1, 2, 3)), (masks | ours).sum((1, 2, 3))
        assert (wrong <= numpy.maximum(0.001 * union, pixels)).all()
    else:
        areas = golden[f"{prefix}masks_area"][order]
        wrong = abs(video.masks.sum((2, 3)).numpy() - areas).sum(1)
        assert (wrong <= numpy.maximum(0.001 * areas.sum(1), pixels)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", VIDEOS)
def test_golden_detections(model, name, monkeypatch):
    """Masks at output size and at that of the frames, from one run of the model."""
    spec = meta()["infer"]
    double = next(model.parameters()).dtype == torch.float64
    golden, video_spec = read_arrays(spec["files"][name]), spec["videos"][name]
    frames = make_video(**video_spec)
    chunks = list(model.track_video(frames))
    monkeypatch.setattr(model, "track_video", lambda video, top_k: iter(chunks))
    video = model.segment_video(
        frames, (video_spec["out_height"], video_spec["out_width"]), spec["topk"]
    )
    compare_detections(video, golden, "out_")
    compare_detections(model.segment_video(frames, None, spec["topk"]), golden, "same_")
    if double:
        compare_detections(video, golden, "f64.", packed=False, tolerance=1e-6, pixels=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", VIDEOS)
def test_golden_step_equals_segment_video(model, name):
    """Frame by frame gives the same logits, and at the last frame the same detections."""
    spec = meta()["infer"]
    frames, state, logits = make_video(**spec["videos"][name]), None, []
    for frame in frames:
        tracks, state = model.step(frame, state, top_k=spec["topk"])
        logits.append(tracks.logits)
    video = model.segment_video(frames, top_k=spec["topk"])
    tolerance = 1e-12 if video.scores.dtype == torch.float64 else 1e-6
    assert relative_error(torch.stack(logits), video.logits) < tolerance
    assert abs(tracks.scores - video.scores).max() < tolerance
    assert torch.equal(tracks.track_ids, video.track_ids) and torch.equal(
        tracks.labels, video.labels
    )
    assert torch.equal(tracks.masks, video.masks[:, -1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, name, dtype",
    [(*case, torch.float64) for case in MODES] + [(*case, torch.float32) for case in FIRST],
)
def test_golden_propagation_modes(mode, name, dtype, detections):
    spec = meta()["modes"]
    run, golden = spec["runs"][mode], read_arrays(spec["file"])
    golden = {
        key.removeprefix(f"{mode}.{name}."): value
        for key, value in golden.items()
        if key.startswith(f"{mode}.{name}.")
    }
    double = dtype == torch.float64
    model = golden_model(
        run["names_shapes"],
        "r50",
        meta()["infer"]["num_classes"],
        PROPAGATION[run["gated"], run["use_mem"]],
        dtype,
    ).eval()
    video_spec = run["videos"][name]
    size = (video_spec["out_height"], video_spec["out_width"])
    detected, state = detections(model), None
    video = model.segment_video(make_video(**video_spec), size, meta()["infer"]["topk"])
    assert relative_error(video.logits, golden["logits"]) < 1e-3
    compare_detections(video, golden, "", packed=False)
    if double:
        assert relative_error(video.logits, golden["f64.logits"]) < 1e-8
        assert abs(video.scores.numpy() - numpy.sort(golden["f64.scores"])[::-1]).max() < 1e-6
    with torch.no_grad():
        for output in detected:
            (prediction,), state = model.tracker(output.queries[:, None, None], state)
    assert len(detected) == len(video.logits)
    assert subsampled_error(state.query[0], golden, "prop_query_last") < 1e-3
    if "gate_open" in golden:
        assert (torch.stack(prediction.gate_logits)[:, 0, 0].numpy() >= 0).tolist() == golden[
            "gate_open"
        ][-1].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("name", list(meta()["vita"]["videos"]))
def test_golden_vita(name, dtype, detections):
    """ "clip" propagation.

    Windows of frames, plain and shifted in turn, and a video length that fills no window.
    """
    spec = meta()["vita"]
    golden, double, video_spec = (
        read_arrays(spec["file"]),
        dtype == torch.float64,
        spec["videos"][name],
    )
    golden = {
        key.removeprefix(f"{name}."): value
        for key, value in golden.items()
        if key.startswith(f"{name}.")
    }
    model = golden_model(
        spec["names_shapes"],
        "r50",
        golden["logits"].shape[-1] - 1,
        "clip",
        dtype,
        window=spec["enc_window_size"],
    ).eval()
    frames = make_video(**video_spec)
    size = video_spec["out_height"] and (video_spec["out_height"], video_spec["out_width"])
    detected = detections(model)
    video = model.segment_video(frames, size, spec["topk"])
    assert relative_error(video.logits[0], golden["logits"]) < 1e-3
    compare_detections(video, golden, "")
    if double:
        assert relative_error(video.logits[0], golden["f64.logits"]) < 1e-8
    with torch.no_grad():
        queries = torch.stack([output.queries for output in detected], 2)
        (prediction,), _ = model.tracker(queries[:, :, None])
    assert subsampled_error(queries[-1, 0], golden, "frame_queries_last_layer") < 1e-3
    kernels = prediction.mask_kernel[-1][0, 0]
    assert relative_error(kernels, golden_kernels(model, golden)) < 1e-3
    assert subsampled_error(prediction.frame_embed, golden, "fq_embed") < 1e-3
    assert subsampled_error(prediction.clip_embed, golden, "cq_embed") < 1e-3
