"""Training losses, matches and gradients against the official code: GRAtt-VIS, GenVIS and VITA,
every run of the set.

The randomness is replaced as the set's README says: points from the R2 sequence, no Gumbel noise.
"""

import re

import numpy
import pytest
import torch

import losses as losses_module
import matcher
import tracker
from clips import Clip
from conftest import fixed_threads
from golden_set import PROPAGATION, golden_model, make_video, meta, read_json
from reading.translation import translate

SECTIONS = [
    section
    for section in ("train", "train_genvis", "train_vita", "train_vita_coco")
    if section in meta()
]
TOLD_APART = (
    "freeze_detector",
    "gate_weight",
)  # runs that differ in these alone have one output, losses and matches


def runs_by_output() -> list[tuple[str, list[str]]]:
    """The runs of each section whose model and data are the same."""
    groups = {}
    for section in SECTIONS:
        for name, run in meta()[section]["runs"].items():
            key = (
                section,
                *sorted(
                    (field, repr(value)) for field, value in run.items() if field not in TOLD_APART
                ),
            )
            groups.setdefault(key, []).append(name)
    return [(section, names) for (section, *_), names in groups.items()]


RUNS = runs_by_output()
pytestmark = pytest.mark.slow
two_threads = fixed_threads(2)


def r2_points(count: int, g: float) -> torch.Tensor:
    """The first `count` points (count, 2) of the R2 sequence, in float64.

    The float64 runs did not round them.
    """
    k = numpy.arange(1, count + 1, dtype=numpy.float64)
    return torch.from_numpy(numpy.stack(((0.5 + k / g) % 1, (0.5 + k / g**2) % 1), 1))


@pytest.fixture(autouse=True)
def no_randomness(monkeypatch):
    g = meta()["train"]["points"]["g"]
    monkeypatch.setattr(
        matcher,
        "random_points",
        lambda rows, count, like: r2_points(count, g).to(like).expand(rows, -1, -1),
    )
    monkeypatch.setattr(tracker, "logistic_noise", torch.zeros_like)


def make_clip(video: dict, length: int) -> Clip:
    """Frames by the set's formula.

    Every instance a rectangle that moves, clipped to the frame, in the frames listed.
    """
    height, width, instances = video["H"], video["W"], video["instances"]
    masks = torch.zeros(len(instances), length, height, width, dtype=torch.bool)
    for mask, instance in zip(masks, instances):
        for t in (t for t in instance["frames"] if t < length):
            top, left = instance["y0"] + instance["vy"] * t, instance["x0"] + instance["vx"] * t
            mask[
                t,
                max(top, 0) : max(top + instance["h"], 0),
                max(left, 0) : max(left + instance["w"], 0),
            ] = True
    return Clip(
        make_video(length, height, width, video["salt"]),
        torch.tensor([i["class"] for i in instances]),
        masks,
    )


def section_model(section: str, run: dict, dtype: torch.dtype):
    spec = meta()[section]
    classes, length = run.get("num_classes", spec.get("num_classes")), run.get("T", spec.get("T"))
    if section.startswith("train_vita"):
        propagation, options = "clip", {"window": run["enc_window_size"]}
    elif section == "train_genvis":
        propagation, options = "memory", {}
    else:
        propagation, options = PROPAGATION[run["gated"], run["use_mem"]], {}
    model = golden_model(run["names_shapes"], "r50", classes, propagation, dtype, **options).train()
    return model, classes, [make_clip(video, length) for video in spec["videos"]]


@pytest.mark.parametrize(
    "section, names", RUNS, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_golden_losses_and_gradients(section, names):
    """A frozen detector has the gradients of one that is not, in the tracker: frame losses do not
    reach that. Where all runs
    are frozen, the detector is."""
    spec, runs = meta()[section], {name: meta()[section]["runs"][name] for name in names}
    golden = {name: read_json(spec["file"])[name + spec["float64_suffix"]] for name in names}
    model, classes, clips = section_model(section, runs[names[0]], torch.float64)
    whole_video = section.startswith("train_vita")
    if all(run["freeze_detector"] for run in runs.values()):
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name.startswith("tracker."))
    points = spec["points"]
    options = dict(
        points=points["match"],
        oversample=points["candidates"] / points["match"],
        importance=1 - points["random_quarter"] / points["match"],
    )
    output = model([clip.frames for clip in clips])

    # every loss, the gate's in its released form; a frozen detector's are compared too, though they
    # train nothing
    criterion = losses_module.Criterion(classes, gate_weight=1.0, gate_loss="released", **options)
    losses, (frame_matches, track_matches) = criterion(output, clips, whole_video)
    weights = {name: weight for name, (_, weight) in criterion.clip_losses.items()}
    for name in names:
        assert set(losses) == set(golden[name]["raw"])
        for key, value in golden[name]["raw"].items():
            weight = weights[re.search("ce|mask|dice|sim|gate", key)[0]]
            assert losses[key].item() / weight == pytest.approx(value, rel=1e-6), key
        check_frame_matches(frame_matches.query_of, golden[name]["frame_indices"])
        check_clip_matches(track_matches.query_of, golden[name]["clips"])

    # what training sums up, and its gradients: first without the loss of the gates, which most runs
    # leave out
    of_gates = sum(loss for key, loss in losses.items() if "gate" in key)
    by_weight = sorted(names, key=lambda name: runs[name].get("gate_weight", 0.0))
    added = 0.0  # weight of the gate loss in the gradients so far
    others = sum(loss for key, loss in losses.items() if "gate" not in key)
    others.backward(retain_graph=runs[by_weight[-1]].get("gate_weight", 0.0) > 0)
    for name in by_weight:
        gate_weight = runs[name].get("gate_weight", 0.0)
        if gate_weight > added:
            (of_gates * (gate_weight - added)).backward(retain_graph=True)
            added = gate_weight
        weighted = {
            key: losses[key] * (gate_weight if "gate" in key else 1.0)
            for key in golden[name]["losses"]
        }
        for key, value in golden[name]["losses"].items():
            assert weighted[key].item() == pytest.approx(value, rel=1e-6), key
        assert sum(weighted.values()).item() == pytest.approx(golden[name]["total"], rel=1e-6)
        check_gradients(model, golden[name], "tracker." if runs[name]["freeze_detector"] else "")


def check_frame_matches(query_of, golden):
    """The same query for every visible instance of a frame, in the last layers of the detector.

    query_of (T, R, B, I), -1 = none; golden [layer][b * T + t] -> queries, and their instances
    among the visible ones.
    """
    length, _, batch, _ = query_of.shape
    for layer, frames in enumerate(golden, start=-len(golden)):
        for index, (queries, instances) in enumerate(frames):
            matched = query_of[index % length, layer, index // length]
            matched = matched[matched >= 0].tolist()
            assert matched == [queries[instances.index(i)] for i in range(len(matched))]
        assert len(frames) == batch * length


def check_clip_matches(query_of, golden):
    """The same query for every instance seen so far, in every decoder layer and stream.

    query_of (G, D * L, B, I); golden [clip] -> the last decoder layer and those before it, each of
    them [l * B + b] -> queries, and their instances.
    """
    for matched, clip in zip(query_of, golden, strict=True):
        official_layers = [*clip["aux"], clip["main"]]
        layers = matched.unflatten(0, (len(official_layers), -1)).flatten(1, 2)  # (D, L * B, I)
        for layer, official in zip(layers, official_layers, strict=True):
            for stream, (queries, instances) in zip(layer.tolist(), official, strict=True):
                for instance, query in enumerate(stream):
                    # -1: not seen so far; upstream lists instances of later clips, too
                    assert query < 0 or query == queries[instances.index(instance)]
        assert (matched >= 0).any()


def check_gradients(model, golden, prefix):
    """Gradient norms by the official names, of what is trained.

    Our names follow from translating them.
    """
    ours = {
        name: parameter.grad.norm().item()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and name.startswith(prefix)
    }
    renamed, _ = translate(
        {
            name: torch.tensor(value, dtype=torch.float64)
            for name, value in golden["grad_norm"].items()
        }
    )
    assert set(renamed) == set(ours)
    for name, value in renamed.items():
        # a zero in theory (the softmax over the memory does not see its keys' common shift):
        # rounding noise in both
        noise = 1e-9 * golden["total_grad_norm"]
        assert ours[name] == pytest.approx(value.item(), rel=1e-4, abs=noise), name
