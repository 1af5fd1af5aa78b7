"""Charts and tables of a report as HTML and SVG text, without matplotlib or JavaScript.

    bar(0.4, low=0.3, high=0.5)                # a bar of 40 % with an interval
    curves([(recall, precision), ...], "precision over recall")
    table(["class", "AP"], [[text("cat"), percent(0.4)]])

Colours and strokes are classes of report.css, so they follow dark mode and print. Arguments called
`html` are markup and are inserted as they are; everything else must pass through `text`.
"""

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from viewing.overlays import name_to_draw

WIDTH, HEIGHT = 420, 300  # of curves, in units of the drawing
LEFT, RIGHT, TOP, BOTTOM = 40, 410, 10, 260  # of the axes
TICKS = (0, 0.25, 0.5, 0.75, 1)
MINUS, UNDEFINED = "\N{MINUS SIGN}", "\N{EN DASH}"


def text(value) -> str:
    """Text of a file, such as a class name: short, printable, and escaped."""
    return escape(name_to_draw(str(value)))


def percent(value: float) -> str:
    """A share in percent with one decimal; a dash if it is not defined (NaN or negative)."""
    return number(value) if value >= 0 else UNDEFINED


def number(value: float, form: str = ".1f") -> str:
    """100 times a value that may be negative."""
    rounded = round(100 * float(value), 1) + 0.0  # no -0.0
    return f"{rounded:{form}}".replace("-", MINUS)


def gain(value: float) -> str:
    """A difference of shares in percent, with its sign."""
    return number(value, "+.1f")


def span(low: float, high: float, form=percent) -> str:
    """An interval in percent; empty if it is not defined."""
    return "" if np.isnan([low, high]).any() else f"{form(low)} to {form(high)}"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls if it is too wide. Cells are html; the first of a row is its heading."""
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'
        for first, *cells in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def bar(value: float, low: float = np.nan, high: float = np.nan) -> str:
    """A horizontal bar of a share from 0 to 1, with a line from low to high if they are defined.

    A negative value is drawn as none.
    """
    length = 100 * float(np.clip(value, 0, 1))
    parts = [
        '<rect class="track" width="100" height="10"/>',
        f'<rect class="bar" width="{length:.2f}" height="10"/>',
    ]
    if not np.isnan([low, high]).any():
        ends = 100 * np.clip([low, high], 0, 1)
        parts.append(
            f'<path class="interval" d="M{ends[0]:.2f} 5H{ends[1]:.2f}'
            f'M{ends[0]:.2f} 2V8M{ends[1]:.2f} 2V8"/>'
        )
    drawing = "".join(parts)
    return (
        '<svg class="bar-cell" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f"{drawing}</svg>"
    )


def curves(lines: Sequence[tuple[np.ndarray, np.ndarray]], title: str) -> str:
    """Curves (x, y) over the unit square, with the classes c0, c1, ... of report.css.

    Each is labelled by `swatch` in a table beside the chart.
    """
    parts = []
    for tick in TICKS:
        x, y = to_axes(tick, tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}M{x:.1f} {TOP}V{BOTTOM}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    middle_x, middle_y = to_axes(0.5, 0.5)
    parts.append(f'<text x="{middle_x}" y="{HEIGHT - 6}" text-anchor="middle">recall</text>')
    parts.append(
        f'<text transform="translate(11 {middle_y}) rotate(-90)" text-anchor="middle">'
        "precision</text>"
    )
    for k, (x, y) in enumerate(lines):
        points = " ".join(f"{px:.1f},{py:.1f}" for px, py in zip(*to_axes(x, y)))
        parts.append(f'<polyline class="curve c{k}" points="{points}"/>')
    drawing = "\n".join(parts)
    return (
        f'<svg class="curves" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">\n{drawing}</svg>\n'
    )


def to_axes(x, y):
    """Positions in the drawing of values from 0 to 1."""
    return LEFT + np.asarray(x) * (RIGHT - LEFT), BOTTOM - np.asarray(y) * (BOTTOM - TOP)


def swatch(k: int) -> str:
    """The line style of curve k, for a table."""
    return (
        '<svg class="swatch" viewBox="0 0 28 10" aria-hidden="true">'
        f'<path class="curve c{k}" d="M0 5H28"/></svg>'
    )
