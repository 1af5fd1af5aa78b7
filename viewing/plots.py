"""Plots of an evaluation (`python evaluate.py --plot 4`). Only they need matplotlib.

Precision over recall for each IoU threshold, AP per class, and a timeline of tracks: where an
instance is visible, and where the gates let the frame update its query (GRAtt-VIS, arXiv
2305.17096, method section). With closed gates, a query survives frames in which its object is
occluded. `picture_grid` is for notebooks, such as demo.ipynb.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from pycocotools import mask as rle

from evaluation.metric import IOU_THRESHOLDS, RECALL_POINTS
from evaluation.postprocess import EncodedVideo
from runtime.errors import InputError
from viewing.overlays import best_labels, colour_of, name_to_draw

BAR_COLOUR = "#2f7d4f"
MAX_HEIGHT = 500  # inches; matplotlib is limited to 2 ** 16 pixels
GRID_WIDTH, GRID_DPI = 8, 80  # inches and dots per inch of `picture_grid`: small PNG files


def require_matplotlib() -> None:
    """Raise InputError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise InputError("plots need matplotlib: python -m pip install matplotlib")


def new_figure(width: float, height: float):
    """A figure and its axes, which need no display. width, height: in inches."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure((width, min(height, MAX_HEIGHT)), dpi=120, layout="constrained")
    return figure, figure.add_subplot()


def plain_text(name: str) -> str:
    """A class name as a label: short, and with dollar signs escaped, which start a formula."""
    return name_to_draw(name).replace("$", r"\$")


def plot_precision(path: Path, precision: np.ndarray) -> None:
    """Plot precision over recall for each IoU threshold, averaged over all classes.

    precision: (T, R, K, A, M), see `metric.accumulate`.
    """
    figure, axes = new_figure(6, 4.5)
    precision = precision[:, :, :, 0, -1]  # (T, R, K)
    has_ground_truth = (precision > -1).all((0, 1))
    curves = precision[:, :, has_ground_truth].mean(2)
    shades = np.linspace(0, 0.85, len(IOU_THRESHOLDS))
    for threshold, curve, shade in zip(IOU_THRESHOLDS, curves, shades):
        colour = (shade, 0.35 + 0.3 * shade, 0.75)
        label = f"{threshold:.2f}: AP {100 * curve.mean():.1f}"
        axes.plot(RECALL_POINTS, curve, color=colour, label=label)
    axes.set(
        xlabel="recall",
        ylabel="precision",
        xlim=(0, 1),
        ylim=(0, 1.02),
        title="precision over recall, all classes",
    )
    axes.legend(title="IoU threshold", fontsize="small")
    figure.savefig(path)


def plot_classes(path: Path, per_class: dict[str, float]) -> None:
    """Plot the AP of each class in the ground truth, best first."""
    defined = [(value, name) for name, value in per_class.items() if value >= 0]
    defined.sort(reverse=True)
    figure, axes = new_figure(6, 1 + 0.25 * max(4, len(defined)))
    rows = range(len(defined))
    bars = axes.barh(rows, [100 * value for value, _ in defined], color=BAR_COLOUR)
    axes.set_yticks(rows, [plain_text(name) for _, name in defined])
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel="AP", xlim=(0, 105), title="AP by class")
    figure.savefig(path)


def plot_timeline(path: Path, result: EncodedVideo, names: list[str], min_score: float) -> None:
    """Plot one row for each instance that scores at least min_score.

    The upper band shows the frames in which it is visible. The lower line is black where the gates
    of all decoder layers are open, and pale grey where all are closed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = best_labels(result, min_score)
    frames = len(result.segmentations[0])
    figure, axes = new_figure(8, 1.2 + 0.4 * max(1, len(chosen)))
    labels = []
    for row, index in enumerate(chosen):
        track = int(result.track_ids[index])
        visible = rle.area(result.segmentations[index]) > 0
        spans = [(t, 1) for t in np.flatnonzero(visible)]
        colour = tuple(value / 255 for value in colour_of(track))
        axes.broken_barh(spans, (row + 0.1, 0.5), color=colour)
        if result.gates.shape[2]:
            openness = result.gates[index].double().mean(1).numpy()  # (T,)
            axes.imshow(
                openness[None],
                extent=(0, frames, row + 0.85, row + 0.65),
                aspect="auto",
                cmap="Greys",
                vmin=-0.25,
                vmax=1,
                interpolation="nearest",
            )
        name = plain_text(names[result.labels[index]])
        labels.append(f"{name} #{track} {result.scores[index]:.2f}")
    if chosen:
        title = "seen (colour), gates open (black) or closed (pale)"
    else:
        title = f"no instance scores {min_score} or more"
    axes.set(xlabel="frame", xlim=(0, frames), ylim=(max(1, len(chosen)), 0), title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_yticks(np.arange(len(chosen)) + 0.4, labels)
    figure.savefig(path)


def picture_grid(
    rows: dict[str, list], titles: list[str], colours: dict[str, tuple[int, int, int]] | None = None
):
    """A figure of pictures of one aspect ratio: a row for each label, a column for each title.

    rows: {label: pictures}; a picture is an array (H, W, 3), uint8, or a Pillow image. colours:
    {label: RGB in 0..255} of a legend below, such as `colour_of` the tracks.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    first = np.asarray(next(iter(rows.values()))[0])
    row_height = GRID_WIDTH / len(titles) * first.shape[0] / first.shape[1]
    height = len(rows) * row_height + (0.5 if colours else 0.2)
    figure = Figure((GRID_WIDTH, height), dpi=GRID_DPI, layout="constrained")
    panels = figure.subplots(len(rows), len(titles), squeeze=False)
    for line, (label, pictures) in zip(panels, rows.items()):
        line[0].set_ylabel(plain_text(label))
        for axes, picture in zip(line, pictures, strict=True):
            axes.imshow(picture)
            axes.set(xticks=[], yticks=[])
    for axes, title in zip(panels[0], titles):
        axes.set_title(title, fontsize="medium")
    patches = [
        Patch(color=np.divide(colour, 255), label=plain_text(label))
        for label, colour in (colours or {}).items()
    ]
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))
    return figure
