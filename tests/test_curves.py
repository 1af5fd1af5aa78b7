"""Training curves: which numbers of a log are added up, and what is written."""

import csv
import json

import pytest
from PIL import Image

from runtime.errors import InputError
from viewing.curves import curves, main, parse_arguments, plot_curves, read_log

LINES = [
    {
        "step": 10,
        "loss": 10.0,
        "lr": 0.1,
        "gradient_norm": None,
        "data_share": 0.5,
        "skipped": 3,
        "loss_ce_0": 1.0,
        "loss_ce": 2.0,
        "loss_genvis_ce_1_clip0": 3.0,
        "loss_genvis_sim_clip2": 4.0,
    },
    {"step": 10, "AP": 0.3, "AP50": 0.5},
    {
        "step": 20,
        "loss": 5.0,
        "lr": 0.01,
        "gradient_norm": 2.0,
        "data_share": 0.25,
        "loss_vita_mask": 1.5,
        "loss_vita_mask_3": 3.5,
    },
]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    (tmp_path / "run/log.jsonl").write_text(text + '{"step": 30, "lo')  # killed while it wrote
    return tmp_path / "run"


def test_losses_of_a_kind_are_added_up(run):
    assert curves(read_log(run)) == {
        "loss": [(10, 10.0), (20, 5.0)],
        "loss ce": [(10, 6.0)],
        "loss sim": [(10, 4.0)],
        "loss mask": [(20, 5.0)],
        "AP": [(10, 0.3)],
        "learning rate": [(10, 0.1), (20, 0.01)],
        "gradient norm": [(20, 2.0)],
        "waiting for data": [(10, 0.5), (20, 0.25)],
    }


@pytest.mark.slow
def test_picture_and_table(run, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    main(parse_arguments([str(run), str(run / "log.jsonl"), "--csv", str(tmp_path / "all.csv")]))
    with Image.open(run / "curves.png") as picture:
        assert picture.size[0] > 1000
    with open(tmp_path / "all.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["step"], row["AP"], row["loss ce"]) for row in rows] == [
        (name, step, *values)
        for name in (str(run), str(run / "log.jsonl"))
        for step, *values in (("10", "0.3", "6.0"), ("20", "", ""))
    ]


def test_ap_is_in_percent_in_the_picture(tmp_path, monkeypatch):
    """As on the screen; the table has the numbers of the log."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    from matplotlib.figure import Figure

    saved = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path, **_: path.touch() or saved.append(figure)
    )
    plot_curves(
        tmp_path / "curves.png", {"run": {"AP": [(10, 0.25), (20, 0.5)], "loss": [(10, 2.0)]}}
    )
    lines = {axes.get_title(): axes.lines[0].get_ydata() for axes in saved[0].axes if axes.lines}
    assert {title: list(values) for title, values in lines.items()} == {
        "loss": [2.0],
        "AP (%)": [25.0, 50.0],
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no steps yet"),
        ('{"step": 1}\n?\n{"step": 2}\n', "line 2 is no JSON"),
        ('{"step": 1}\n[]\n', "line 2 is no line of a log of train.py"),
        ('{"step": null}\n', "line 1 is no line of a log of train.py"),
        ('{"step": 1, "AP": "high"}\n', "line 1 is no line of a log of train.py"),
        ("\udcff", "is no log of train.py: 'utf-8' codec"),
    ],
)
def test_files_that_are_no_logs(tmp_path, text, message):
    (tmp_path / "log.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=message):
        read_log(tmp_path)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_log(tmp_path / "no")
