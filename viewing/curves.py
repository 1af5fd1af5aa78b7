"""Training curves of one or several runs, from their log.jsonl.

    python -m viewing.curves runs/toy                          # runs/toy/curves.png
    python -m viewing.curves runs/a runs/b --output compare.png --csv compare.csv

Panels: the losses by kind, summed over decoder layers, clips and detector or tracker ("ce" is the
classification loss), the AP of periodic evaluations, the learning rate, the norm of the gradients,
and the share of time spent waiting for data. AP and this share are in percent in the picture, and 0
to 1 in the table, as in log.jsonl. Only the picture needs matplotlib.
"""

import argparse
import csv
import json
import re
from collections import defaultdict
from pathlib import Path

from reading.regular import read_regular
from runtime.errors import InputError, cli_errors
from runtime.files import MAX_JSON_SIZE, atomic_write
from viewing.plots import require_matplotlib

LOSS_NAME = re.compile(r"loss_(?:genvis_|vita_)?([a-z]+?)(?:_\d+)?(?:_clip\d+)?")
LOGGED = {"lr": "learning rate", "gradient_norm": "gradient norm", "data_share": "waiting for data"}
PERCENT = ("AP", "waiting for data")  # shares, 0 to 1 in files and in percent in the picture
COLUMNS = 3


def read_log(run: Path) -> list[dict]:
    """The lines of log.jsonl of a run, {name: value} each. InputError if there are none."""
    path = run / "log.jsonl" if run.is_dir() else run
    try:
        lines = read_regular(path, MAX_JSON_SIZE).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no log of train.py: {error}") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # a run that is being written, or was killed
                break
            raise InputError(f"{path}, line {number} is no JSON: {error}") from error
        if not is_record(record):
            raise InputError(f"{path}, line {number} is no line of a log of train.py")
        records.append(record)
    if not records:
        raise InputError(f"{path} holds no steps yet")
    return records


def is_record(record) -> bool:
    """Whether this may be a line of log.jsonl: a step, and numbers where `curves` reads them."""
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return False
    read = (
        value
        for name, value in record.items()
        if name in (*LOGGED, "loss", "AP") or LOSS_NAME.fullmatch(name)
    )
    return all(value is None or isinstance(value, (int, float)) for value in read)


def curves(records: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """{name: [(step, value), ...]} of all curves of a run, losses of a kind added up."""
    points = defaultdict(list)
    for record in records:
        sums = defaultdict(float)
        for name, value in record.items():
            kind = LOSS_NAME.fullmatch(name)
            if kind and value is not None:
                sums[f"loss {kind[1]}"] += value
            elif name in LOGGED and value is not None:
                sums[LOGGED[name]] = value
        for name in ("loss", "AP"):
            if record.get(name) is not None:
                sums[name] = record[name]
        for name, value in sums.items():
            points[name].append((record["step"], value))
    return dict(points)


def panel_names(runs: dict[str, dict]) -> list[str]:
    """Names of all curves of all runs: the total loss, its kinds, AP, then the others."""
    names = {name for curves_of_run in runs.values() for name in curves_of_run}
    losses = sorted(name for name in names if name.startswith("loss"))
    return losses + [name for name in ("AP", *LOGGED.values()) if name in names]


def plot_curves(path: Path, runs: dict[str, dict]) -> None:
    """One panel for each curve, one line for each run."""
    require_matplotlib()
    from matplotlib.figure import Figure

    names = panel_names(runs)
    rows = -(-len(names) // COLUMNS)
    figure = Figure((4 * COLUMNS, 2.6 * rows), dpi=120, layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True).flat
    for axes, name in zip(panels, names):
        for run, curves_of_run in runs.items():
            points = curves_of_run.get(name, [])
            if name in PERCENT:
                points = [(step, 100 * value) for step, value in points]
            axes.plot(
                *zip(*points) if points else ([], []),
                label=run,
                linewidth=1.2,
                marker="o" if len(points) < 12 else None,
                markersize=3,
            )
        axes.set_title(f"{name} (%)" if name in PERCENT else name, fontsize="medium")
        axes.grid(alpha=0.3)
        if name == "gradient norm":
            axes.set_yscale("log")
        if name in PERCENT:
            axes.set_ylim(bottom=0)
    for axes in list(panels):  # those left over
        axes.set_axis_off()
    for axes in figure.axes[-COLUMNS:]:
        axes.set_xlabel("step")
    if len(runs) > 1:
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(),
            loc="outside upper center",
            ncols=min(len(runs), COLUMNS),
            fontsize="small",
        )
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def save_csv(path: Path, runs: dict[str, dict]) -> None:
    """One row for each run and step, one column for each curve; empty where nothing was logged."""
    names = panel_names(runs)
    rows = [["run", "step", *names]]
    for run, curves_of_run in runs.items():
        by_step = defaultdict(dict)
        for name, points in curves_of_run.items():
            for step, value in points:
                by_step[step][name] = value
        for step, values in sorted(by_step.items()):
            rows.append([run, step, *(values.get(name, "") for name in names)])
    with (
        atomic_write(path) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        csv.writer(file).writerows(rows)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m viewing.curves",
        description="Plot the training curves of runs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of train.py --output")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PNG",
        help="picture to write; None = curves.png in the first folder",
    )
    parser.add_argument(
        "--csv", type=Path, metavar="CSV", help="also write all numbers to this file"
    )
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Read the logs and write the picture and the table."""
    runs = {str(run): curves(read_log(run)) for run in args.runs}
    if not panel_names(runs):
        raise InputError(f"{', '.join(runs)}: nothing to plot")
    if args.csv:
        save_csv(args.csv, runs)
        print(f"saved {args.csv}")
    folder = args.runs[0] if args.runs[0].is_dir() else args.runs[0].parent
    output = args.output or folder / "curves.png"
    plot_curves(output, runs)
    print(f"saved {output}")


if __name__ == "__main__":
    with cli_errors():
        main(parse_arguments())
