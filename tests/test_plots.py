"""Plots: files that open and show the data, and a timeline of visible tracks."""

from dataclasses import replace

import numpy
import pytest
import torch
from PIL import Image

from data import InputError
from evaluation.metric import accumulate
from hand_made import encode
from test_overlays import video_of
from viewing import plots
from viewing.overlays import colour_of
from viewing.plots import (
    picture_grid,
    plot_classes,
    plot_precision,
    plot_timeline,
    require_matplotlib,
)

pytest.importorskip("matplotlib", reason="plots need matplotlib")
pytestmark = pytest.mark.slow  # together

NAMES = ["disc", "square", "star"]


def pixels_of(path):
    """The pixels of a picture (H, W, 3), which must be a PNG of some size that is not of one
    colour.
    """
    with Image.open(path) as file:
        assert file.format == "PNG"
        pixels = numpy.asarray(file.convert("RGB"))
    assert pixels.shape[0] > 100 and pixels.shape[1] > 300
    assert (pixels != pixels[0, 0]).any()
    return pixels


def seen_in(*frames):
    """A track's masks (T, H, W), something or nothing in each frame."""
    masks = torch.zeros(len(frames), 6, 8, dtype=torch.bool)
    masks[:, 1:4, 2:5] = torch.tensor(frames, dtype=torch.bool)[:, None, None]
    return masks


def draw_timeline(path, found, least=0.3):
    plot_timeline(path, found, NAMES, least)
    return pixels_of(path)


def coloured(pixels, colour):
    """Which pixels have the colour, bool (H, W); a picture may round it."""
    return (numpy.abs(pixels.astype(int) - colour) <= 2).all(2)


def extent(pixels, chosen):
    """Where the columns of the chosen pixels (H, W) begin and end: 0 is the left end of the axes
    and of the video, 1 the right.
    """
    # The columns of the dark frame around the axes.
    lines = (pixels < 60).all(2).mean(0) > 0.5
    left, right = lines.nonzero()[0][[0, -1]]
    columns = chosen.any(0).nonzero()[0]
    return (columns[0] - left) / (right - left), (columns[-1] + 1 - left) / (right - left)


# Precision and classes


def test_a_plot_of_precision(tmp_path):
    square = numpy.zeros((8, 8), bool)
    square[2:6, 2:6] = True
    truth = {
        "videos": [{"id": 1, "length": 1, "height": 8, "width": 8}],
        "categories": [{"id": 1, "name": "disc"}, {"id": 2, "name": "star"}],
        "annotations": [
            {"video_id": 1, "category_id": 1, "areas": [16], "segmentations": [encode(square)]}
        ],
    }
    results = [{"video_id": 1, "category_id": 1, "score": 0.9, "segmentations": [encode(square)]}]
    perfect, nothing = (accumulate(found, truth)[0] for found in (results, []))
    drawn = []
    for name, precision in (("perfect", perfect), ("nothing", nothing)):
        plot_precision(tmp_path / f"{name}.png", precision)
        drawn.append(pixels_of(tmp_path / f"{name}.png"))
    assert drawn[0].shape == drawn[1].shape and (drawn[0] != drawn[1]).any()


def test_a_bar_for_each_class(tmp_path):
    """As long as its AP, and none for a class that the ground truth does not have."""
    pictures = []
    for number, more in enumerate(({}, {"star": -1.0}, {"star": 0.4})):
        plot_classes(tmp_path / f"{number}.png", {"disc": 0.8, **more})
        pictures.append(pixels_of(tmp_path / f"{number}.png"))
    one, undefined, two = pictures
    assert numpy.array_equal(one, undefined)
    lengths = coloured(
        two, [int(plots.BAR_COLOUR[place : place + 2], 16) for place in (1, 3, 5)]
    ).sum(1)
    assert sorted(set(lengths[lengths > 0].tolist())) == pytest.approx(
        [lengths.max() / 2, lengths.max()], abs=2
    )


@pytest.mark.parametrize(
    "name", ["n" * 300, "$x$ and $\\frac{1", "two\nlines", "\ud800", "日本", ""]
)
@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_any_class_name_is_a_label(tmp_path, name):
    """Beside bars and rows that still have half of the width, and never read as a formula."""
    plot_classes(tmp_path / "classes.png", {name: 0.8, "star": 0.4})
    bar_colour = [int(plots.BAR_COLOUR[place : place + 2], 16) for place in (1, 3, 5)]
    bars = coloured(pixels_of(tmp_path / "classes.png"), bar_colour)
    assert bars.any(0).sum() > 0.35 * bars.shape[1]
    plot_timeline(tmp_path / "tracks.png", video_of(seen_in(1, 1)[None], [7], [0.9]), [name], 0.3)
    assert coloured(pixels_of(tmp_path / "tracks.png"), colour_of(7)).any(0).mean() > 0.4


def test_a_row_for_each_of_thousands_is_no_larger_than_matplotlib_draws():
    figure, _ = plots.new_figure(6, 1 + 0.25 * 10_000)
    assert (figure.get_size_inches() * figure.dpi < 2**16).all()


# The timeline of a video


@pytest.mark.parametrize(
    "side, frames", [(0, (1, 1, 1, 1, 0, 0, 0, 0, 0, 0)), (1, (0, 0, 0, 0, 0, 0, 1, 1, 1, 1))]
)
def test_a_track_is_coloured_in_the_half_it_is_seen_in(tmp_path, side, frames):
    pixels = draw_timeline(
        tmp_path / "new/folder/00001.png", video_of(seen_in(*frames)[None], [7], [0.9])
    )
    halves = numpy.array_split(coloured(pixels, colour_of(7)), 2, axis=1)
    assert halves[side].any() and not halves[1 - side].any()


def test_frames_lie_side_by_side(tmp_path):
    """A track in the second and third of five frames, one that is there all the time, and one in
    the last frame.
    """
    masks = torch.stack([seen_in(0, 1, 1, 0, 0), seen_in(1, 1, 1, 1, 1), seen_in(0, 0, 0, 0, 1)])
    pixels = draw_timeline(tmp_path / "tracks.png", video_of(masks, [3, 4, 9], [0.9, 0.8, 0.7]))
    for track, expected in ((3, (0.2, 0.6)), (4, (0, 1)), (9, (0.8, 1))):
        assert extent(pixels, coloured(pixels, colour_of(track))) == pytest.approx(
            expected, abs=0.01
        )


def test_a_gap_in_a_track_stays_empty(tmp_path):
    found = video_of(seen_in(1, 0, 0, 1)[None], [5], [0.9])
    columns = coloured(draw_timeline(tmp_path / "gap.png", found), colour_of(5)).any(0).nonzero()[0]
    assert len(columns) / (columns[-1] + 1 - columns[0]) == pytest.approx(0.5, abs=0.02)


def test_a_gate_is_dark_where_it_is_open(tmp_path):
    """Three layers' gates, all open in the first half and all closed in the second.

    Without a gate there is no line.
    """
    closed = video_of(seen_in(1, 1, 1, 1)[None], [5], [0.9])
    half = torch.tensor([True, True, False, False])[None, :, None].expand(1, 4, 3)
    without = torch.zeros(1, 4, 0, dtype=torch.bool)
    found = {
        "closed": closed,
        "half": replace(closed, gates=half),
        "without": replace(closed, gates=without),
    }
    pixels = {name: draw_timeline(tmp_path / f"{name}.png", video) for name, video in found.items()}
    # Where it is grey instead of white.
    line = (pixels["closed"] != pixels["without"]).any(2)
    assert (pixels["without"][line] > 200).all() and (180 < pixels["closed"][line]).all()
    assert extent(pixels["half"], line) == pytest.approx((0, 1), abs=0.01)
    dark = (pixels["half"] < 30).all(2) & line
    assert extent(pixels["half"], dark) == pytest.approx((0, 0.5), abs=0.01)


def test_nothing_over_the_threshold_still_makes_a_picture(tmp_path):
    found = video_of(seen_in(1, 1, 1)[None], [7], [0.2])
    assert not coloured(draw_timeline(tmp_path / "high.png", found), colour_of(7)).any()
    assert coloured(draw_timeline(tmp_path / "low.png", found, 0.1), colour_of(7)).any()


# A grid of pictures


def test_a_grid_has_each_picture_in_its_row_and_column():
    frames = numpy.random.default_rng(0).integers(0, 256, (2, 6, 10, 3), dtype=numpy.uint8)
    drawn = [Image.fromarray(frame[:, ::-1]) for frame in frames]
    colours = {"star $1": colour_of(1), "disc #4": colour_of(4)}
    figure = picture_grid({"input": frames, "masks": drawn}, ["frame 3", "frame 5"], colours)
    assert [axes.get_ylabel() for axes in figure.axes] == ["input", "", "masks", ""]
    assert [axes.get_title() for axes in figure.axes] == ["frame 3", "frame 5", "", ""]
    for axes, expected in zip(figure.axes, [*frames, *drawn]):
        assert numpy.array_equal(axes.images[0].get_array(), numpy.asarray(expected))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [r"star \$1", "disc #4"]
    for patch, colour in zip(legend.get_patches(), colours.values()):
        assert numpy.allclose(patch.get_facecolor()[:3], numpy.divide(colour, 255))


def test_a_grid_needs_a_picture_for_each_title():
    frames = numpy.zeros((2, 6, 10, 3), numpy.uint8)
    assert not picture_grid({"input": frames}, ["frame 0", "frame 1"]).legends
    with pytest.raises(ValueError):
        picture_grid({"input": frames}, ["frame 0"])


# Without matplotlib


def test_a_sentence_where_matplotlib_is_missing(tmp_path, monkeypatch):
    require_matplotlib()
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    for wanted in (
        require_matplotlib,
        lambda: plot_classes(tmp_path / "classes.png", {"disc": 0.5}),
        lambda: picture_grid({"input": [numpy.zeros((2, 3, 3), numpy.uint8)]}, ["frame 0"]),
    ):
        with pytest.raises(InputError, match="matplotlib"):
            wanted()
    assert not list(tmp_path.iterdir())


# What is drawn, as matplotlib has it


@pytest.fixture
def figure(monkeypatch):
    """The axes of the last figure that was saved, when it is called."""
    from matplotlib.figure import Figure

    saved, savefig = [], Figure.savefig

    def save(figure, path, **options):
        saved.append(figure)
        savefig(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", save)
    return lambda: saved[-1].axes[0]


def test_the_curves_of_precision_are_means_over_the_classes_that_are_there(tmp_path, figure):
    """Of all sizes, with 100 predictions a video; the legend names each overlap and its AP."""
    precision = numpy.random.default_rng(0).random((10, 101, 3, 4, 3))
    precision[:, :, 1] = -1  # a class that the ground truth has not
    plot_precision(tmp_path / "precision.png", precision)
    expected = precision[:, :, [0, 2], 0, 2].mean(2)
    lines, legend = figure().lines, [text.get_text() for text in figure().get_legend().get_texts()]
    assert len(lines) == 10
    for number, (line, curve) in enumerate(zip(lines, expected)):
        assert numpy.allclose(line.get_xdata(), numpy.linspace(0, 1, 101))
        assert numpy.allclose(line.get_ydata(), curve)
        assert legend[number] == f"{0.5 + 0.05 * number:.2f}: AP {100 * curve.mean():.1f}"


def test_the_bars_of_classes_are_percent_and_the_best_is_on_top(tmp_path, figure):
    plot_classes(tmp_path / "classes.png", {"ant": 0.2, "bee": -1.0, "cat": 0.75, "dog": 0.0})
    axes = figure()
    assert [bar.get_width() for bar in axes.patches] == [75, 20, 0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["cat", "ant", "dog"]
    assert axes.yaxis_inverted()


def test_the_rows_of_a_timeline_are_those_of_the_instances_shown(tmp_path, figure):
    """The second instance scores too little, the fourth is the first track under another label."""
    masks = torch.stack([seen_in(1, 1, 0), seen_in(1, 0, 1), seen_in(0, 1, 1), seen_in(1, 1, 1)])
    found = video_of(masks, [5, 6, 8, 5], [0.9, 0.1, 0.6, 0.5])
    gates = torch.from_numpy(numpy.random.default_rng(0).random((4, 3, 3)) < 0.5)
    found = replace(found, gates=gates, labels=torch.tensor([2, 0, 1, 0]))
    plot_timeline(tmp_path / "video.png", found, NAMES, 0.3)
    axes = figure()
    captions = [text.get_text() for text in axes.get_yticklabels()]
    assert captions == ["star #5 0.90", "square #8 0.60"]
    assert axes.get_xlim() == (0, 3) and axes.get_ylim() == (2, 0)
    bars = [
        sorted(path.vertices[:, 0].min() for path in bar.get_paths()) for bar in axes.collections
    ]
    assert bars == [[0, 1], [1, 2]]  # where the parts of a bar begin
    colours = [
        tuple(numpy.round(255 * bar.get_facecolor()[0, :3]).astype(int)) for bar in axes.collections
    ]
    assert colours == [colour_of(5), colour_of(8)]
    for image, index in zip(axes.images, (0, 2), strict=True):
        assert numpy.allclose(image.get_array(), gates[index].double().mean(1)[None])
        assert image.get_clim() == (-0.25, 1) and image.get_extent()[:2] == [0, 3]
