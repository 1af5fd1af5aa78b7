"""The tables and plots of the gate study: means and spreads over the records of several seeds.

`python benchmarks/study.py table runs/study.json` calls these functions on what
`python benchmarks/study.py measure` has written. docs/gate_study.md discusses the results.
"""

import statistics
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.metric import mean_defined  # noqa: E402
from runtime.errors import InputError  # noqa: E402
from runtime.files import read_json  # noqa: E402
from viewing.plots import new_figure  # noqa: E402

TITLES = {  # what a record holds, each a number for every column; -1 where it is not defined
    "scores": "Scores, percent; identity switches per video; milliseconds per frame",
    "causes": "AP gained if one cause of errors is fixed, and AP of the best linking, percent",
    "AP by gap": "AP by occlusion (longest gap, frames), percent",
    "AR10 by gap": "AR10 by occlusion (longest gap, frames), percent",
    "open by state": "Open gates by state of the object, all layers, percent",
    "last open by state": "Open gates by state of the object, last layer, percent",
    "open by share": "Open gates by visible share of the object, all layers, percent",
    "last open by share": "Open gates by visible share of the object, last layer, percent",
}
NOT_IN_PERCENT = {"switches", "ms per frame"}
OPTIONAL = {"causes"}  # not in older records

Groups = dict[tuple[str, str], list[dict]]  # the records of each suite and name


def read_groups(paths: list[str], order: list[str]) -> Groups:
    """The records of several files by suite and name.

    order: of known suites and names; others come last. Raises InputError for records that cannot be
    put together.
    """
    groups = defaultdict(list)
    checksums = {}
    for path in paths:
        for record in read_records(path):
            name, suite = record["name"], record["suite"]
            if checksums.setdefault(suite, record["checksum"]) != record["checksum"]:
                raise InputError(
                    f"{path}: {name} was measured on other videos of the suite "
                    f"{suite} than the records before"
                )
            if any(other["seed"] == record["seed"] for other in groups[suite, name]):
                raise InputError(
                    f"{path}: {name} has two records of seed {record['seed']} on the "
                    f"suite {suite}; other settings need other --names"
                )
            groups[suite, name].append(record)

    def place(group: tuple[str, str]) -> list[int]:
        return [order.index(part) if part in order else len(order) for part in group]

    return {group: groups[group] for group in sorted(groups, key=place)}


def read_records(path: str) -> list[dict]:
    """The records of a file; InputError if `study.py measure` has not written it."""
    records = read_json(path)
    if not isinstance(records, list) or not records or not all(map(is_record, records)):
        raise InputError(f"{path} is no file that `measure` has written")
    return records


def is_record(record) -> bool:
    """Whether a value has the names and the measures of a record."""
    if not isinstance(record, dict):
        return False
    names = [record.get(key) for key in ("name", "suite", "checksum")]
    required = TITLES.keys() - OPTIONAL | {"instances by gap"}
    measures = [record.get(key) for key in required | (OPTIONAL & record.keys())]
    return (
        "seed" in record
        and all(isinstance(name, str) for name in names)
        and all(isinstance(measure, dict) for measure in measures)
        and all(isinstance(x, (int, float)) for measure in measures for x in measure.values())
    )


def mean_and_spread(records: list[dict], key: str, column: str) -> tuple[float, float]:
    """The mean of a number over records, and its (sample) standard deviation, 0 of a single record.

    (-1, 0) if none defines it.
    """
    values = [record[key].get(column, -1) for record in records]
    values = [value for value in values if value >= 0]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return mean_defined(np.array(values)), spread


def format_cell(records: list[dict], key: str, column: str) -> str:
    """Mean and spread for people; "-" where it is not defined."""
    mean, spread = mean_and_spread(records, key, column)
    if mean < 0:
        return "-"
    scale, digits = (1, 2) if column in NOT_IN_PERCENT else (100, 1)
    cell = f"{scale * mean:.{digits}f}"
    if len(records) > 1:
        cell += f" ± {scale * spread:.{digits}f}"
    return cell


def format_table(groups: Groups, key: str) -> str:
    """A markdown table of one of TITLES, a row for each suite and name."""
    records = [record for group in groups.values() for record in group]
    columns = list(dict.fromkeys(column for record in records for column in record[key]))
    rows = [["suite", "name", "n", *columns], ["---"] * (3 + len(columns))]
    counted = set()
    for (suite, name), records in groups.items():
        if key.endswith("by gap") and suite not in counted:
            counted.add(suite)
            counts = [str(records[0]["instances by gap"].get(column, "-")) for column in columns]
            rows.append([suite, "*instances*", "", *counts])
        cells = [format_cell(records, key, column) for column in columns]
        rows.append([suite, name, str(len(records)), *cells])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"{TITLES[key]}\n", *lines])


def plot_lines(path: Path, groups: Groups, suite: str, key: str) -> None:
    """A picture of one suite: a line for each name over the columns of one of TITLES.

    The spread is shaded.
    """
    figure, axes = new_figure(6, 4.5)
    of_suite = {name: records for (other, name), records in groups.items() if other == suite}
    for name, records in of_suite.items():
        columns = list(records[0][key])
        points = [mean_and_spread(records, key, column) for column in columns]
        means, spreads = 100 * np.array(points).T
        places = (means >= 0).nonzero()[0]
        if not len(places):  # gates of a model that has none
            continue
        (line,) = axes.plot(places, means[places], marker="o", label=f"{name} (n = {len(records)})")
        axes.fill_between(
            places,
            (means - spreads)[places],
            (means + spreads)[places],
            color=line.get_color(),
            alpha=0.2,
            linewidth=0,
        )
    axes.set_xticks(range(len(columns)), columns)
    axes.set(title=f"{TITLES[key]}: {suite}", ylim=(0, 100))
    axes.title.set_fontsize("small")
    axes.legend(fontsize="small")
    figure.savefig(path)
