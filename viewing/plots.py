"""Plots of an evaluation, where matplotlib is installed (`python evaluate.py --plot 4`); nothing else needs it.

Precision over recall for each overlap, AP by class, and the timeline of a video's tracks: when an instance is there, and when the
gate lets the frame change its query (GRAtt-VIS, arXiv 2305.17096, method section). A closed gate is how a query survives
frames in which its object is hidden.
"""
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from pycocotools import mask as rle

from evaluation.metric import IOU_THRESHOLDS, RECALL_POINTS
from evaluation.postprocess import EncodedVideo
from runtime.errors import InputError
from viewing.overlays import best_labels, colour_of, name_to_draw

BAR = "#2f7d4f"
LARGEST_HEIGHT = 500  # inches; matplotlib draws less than 2 ** 16 pixels


def require_matplotlib() -> None:
    """InputError where it is not installed."""
    if find_spec("matplotlib") is None:
        raise InputError("plots need matplotlib: python -m pip install matplotlib")


def new_figure(width: float, height: float):
    """A figure of so many inches that no display is needed for, and its axes."""
    require_matplotlib()
    from matplotlib.figure import Figure
    figure = Figure((width, min(height, LARGEST_HEIGHT)), dpi=120, layout="constrained")
    return figure, figure.add_subplot()


def plain_text(name: str) -> str:
    """A class name as a label: short, and not parsed as a formula between dollar signs."""
    return name_to_draw(name).replace("$", r"\$")


def plot_precision(path: Path, precision: np.ndarray) -> None:
    """precision (T, R, K, A, M) as `metric.accumulate` gives it: a curve for each overlap, the mean over all classes."""
    figure, axes = new_figure(6, 4.5)
    curves = precision[:, :, :, 0, -1]
    defined = (curves > -1).all((0, 1))                       # classes that the ground truth has
    for number, (overlap, curve) in enumerate(zip(IOU_THRESHOLDS, curves[:, :, defined].mean(2))):
        shade = 0.85 * number / (len(IOU_THRESHOLDS) - 1)
        axes.plot(RECALL_POINTS, curve, color=(shade, 0.35 + 0.3 * shade, 0.75), label=f"{overlap:.2f}: AP {100 * curve.mean():.1f}")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="precision over recall, all classes")
    axes.legend(title="least overlap", fontsize="small")
    figure.savefig(path)


def plot_classes(path: Path, per_class: dict[str, float]) -> None:
    """AP of each class that the ground truth has, best first."""
    defined = sorted(((value, name) for name, value in per_class.items() if value >= 0), reverse=True)
    figure, axes = new_figure(6, 1 + 0.25 * max(4, len(defined)))
    bars = axes.barh(range(len(defined)), [100 * value for value, _ in defined], color=BAR)
    axes.set_yticks(range(len(defined)), [plain_text(name) for _, name in defined])
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel="AP", xlim=(0, 105), title="AP by class")
    figure.savefig(path)


def plot_timeline(path: Path, found: EncodedVideo, names: list[str], least: float) -> None:
    """A row for each instance that scores at least so much: the frames it is seen in, and below, how open its gates are.

    The lower line is black where all decoder layers' gates are open, pale grey where all are closed; it is missing without a gate.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = best_labels(found, least)
    frames = len(found.segmentations[0])
    figure, axes = new_figure(8, 1.2 + 0.4 * max(1, len(chosen)))
    for row, index in enumerate(chosen):
        seen = rle.area(found.segmentations[index]) > 0
        colour = tuple(part / 255 for part in colour_of(int(found.track_ids[index])))
        axes.broken_barh([(t, 1) for t in np.flatnonzero(seen)], (row + 0.1, 0.5), color=colour)
        if found.gates.shape[2]:
            openness = found.gates[index].double().mean(1).numpy()                       # (T,)
            axes.imshow(openness[None], extent=(0, frames, row + 0.85, row + 0.65), aspect="auto", cmap="Greys", vmin=-0.25, vmax=1,
                        interpolation="nearest")
    axes.set(xlabel="frame", xlim=(0, frames), ylim=(max(1, len(chosen)), 0),
             title="seen (colour), gates open (black) or closed (pale)" if chosen else f"no instance scores {least} or more")
    axes.xaxis.get_major_locator().set_params(integer=True)
    labels = [f"{plain_text(names[found.labels[index]])} #{found.track_ids[index]} "
              f"{found.scores[index]:.2f}" for index in chosen]
    axes.set_yticks(np.arange(len(chosen)) + 0.4, labels)
    figure.savefig(path)
