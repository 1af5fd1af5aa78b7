"""report.html: well-formed, self-contained, complete, escaped, and small."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.scoring import read_parts, score_results
from hand_made import LEFT, RIGHT, annotation, encode, prediction, random_set, truth
from sparse_set import (
    part_of_set,
    perfect_results,
    sparse_content,
    write_json,
    write_sparse_set,
)
from viewing import charts, report
from viewing.animations import FRAMES, PANEL_SIDE
from viewing.cards import RatedVideo, Sources, choose_videos
from viewing.explanations import CAUSE_TEXTS, GROUP_TEXTS, IDENTITY_TEXTS, NUMBER_TEXTS, ORACLES

VOID = {"meta", "br", "img"}
SECTIONS = [
    "Numbers",
    "Precision and recall",
    "Classes",
    "Occluded objects",
    "Identities",
    "Causes of lost AP",
    "Linking",
    "Worst videos",
    "Median videos",
]


class Page(HTMLParser):
    """A parsed report: its tags with attributes, its text, and the rows of its tables."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.tags, self.titles, self.rows, self.text = [], [], [], [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if "h2" in self.open:
            self.titles.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def value(self, name: str) -> str:
        """The cell after the first one that says `name`."""
        return next(row[1] for row in self.rows if row[0] == name)

    def pictures(self) -> list[Image.Image]:
        """All animations."""
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        animations = [source for source in sources if "image/webp" in source]
        codes = [base64.b64decode(source.partition(",")[2]) for source in animations]
        return [Image.open(io.BytesIO(code)) for code in codes]


def make_report(folder, results, content, sources=None, other=None, boundary=False):
    """The parsed report, and metrics.json."""
    path = write_json(folder / "results.json", results)
    parts = read_parts([write_json(folder / "gt.json", content)], False)
    other = other and write_json(folder / "other.json", other)
    metrics = score_results(
        path, parts, folder, False, other, boundary=boundary, sources=sources or Sources()
    )
    page = Page(folder / "report.html")
    check_self_contained(page)
    return page, metrics


def check_self_contained(page):
    """Every link is an anchor of the page, and every picture is inside."""
    anchors = {attributes.get("id") for _, attributes in page.tags}
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:")
        if "href" in attributes:
            assert attributes["href"].removeprefix("#") in anchors
    assert not re.search(r"https?:|url\(|@import", page.source)


@pytest.fixture
def sparse(tmp_path):
    """The set of sparse_set.py in tmp_path/set, with one wrong class and one weak track."""
    write_sparse_set(tmp_path / "set")
    results = perfect_results()
    results[0]["category_id"] = 7
    results[1]["segmentations"] = results[1]["segmentations"][:1] + [None, None]
    return results


def test_sections_have_the_numbers_of_metrics_json(tmp_path, sparse):
    page, metrics = make_report(tmp_path, sparse, sparse_content())
    assert page.titles == SECTIONS
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    for name in NUMBER_TEXTS:
        assert page.value(name) == charts.percent(metrics[name])
    for name, value in metrics["per_class"].items():
        assert page.value(name) == charts.percent(value)
    for name, gain in metrics["causes"].items():
        assert page.value(name) == charts.gain(gain["AP"])
    for key, (name, _) in ORACLES.items():
        assert page.value(name) == charts.percent(metrics["oracle"][key]["AP"])
    assert GROUP_TEXTS["gap"] in page.text and GROUP_TEXTS["length"] in page.text
    for name in IDENTITY_TEXTS:
        value = metrics["tracking"]["over_detections"][name]
        assert page.value(name) == (str(value) if isinstance(value, int) else charts.number(value))
    for name, scores in metrics["groups"]["gap"].items():
        row = next(row for row in page.rows if row[0] == name)
        assert row[1:] == [
            str(scores["tracks"]),
            charts.percent(scores["AP"]),
            "",
            charts.percent(scores["AR"]),
        ]
    assert set(CAUSE_TEXTS) == set(metrics["causes"])
    assert len(page.pictures()) == 3
    assert "All videos with objects are shown above" in page.text


def test_an_interval_contains_its_number(tmp_path):
    page, metrics = make_report(tmp_path, *random_set(1, range(4)))
    low, high = next(row[2] for row in page.rows if row[0] == "AP").split(" to ")
    assert float(low) <= round(100 * metrics["AP"], 1) <= float(high)
    assert float(low) < float(high)


def test_boundaries_are_a_section_if_they_are_scored(tmp_path, sparse):
    page, metrics = make_report(tmp_path, sparse, sparse_content(), boundary=True)
    assert page.titles == SECTIONS[:2] + ["Boundaries"] + SECTIONS[2:]
    for name, values in (
        ("masks", metrics),
        ("boundaries", metrics["boundary"]["boundary_iou"]),
        ("Boundary AP", metrics["boundary"]["min_iou"]),
    ):
        row = next(row for row in page.rows if row[0] == name)
        assert row[1:4] == [charts.percent(values[key]) for key in ("AP", "AP50", "AP75")]


def test_comparison_is_the_last_section(tmp_path, sparse):
    page, metrics = make_report(tmp_path, sparse, sparse_content(), other=perfect_results())
    assert page.titles == [*SECTIONS, "Comparison"]
    difference = metrics["comparison"]["metrics"]["AP"]["difference"]
    assert difference < 0 and charts.gain(difference) in page.source


def test_occlusion_levels_are_used(tmp_path):
    objects = [annotation(LEFT) | {"occlusion": ["slight_occlusion"] * 4}]
    page, _ = make_report(tmp_path, [prediction(LEFT)], truth(*objects))
    assert GROUP_TEXTS["occlusion"] in page.text and page.value("medium") == "1"


def test_names_are_escaped(tmp_path):
    hostile = '<script>alert("1")</script>'
    content = truth(annotation(LEFT))
    content["categories"][0]["name"] = hostile
    content["videos"][0] |= {"id": "<b>&\ud800", "file_names": ["<i>x/0.png"] * 4}
    content["annotations"][0]["video_id"] = content["videos"][0]["id"]
    page, _ = make_report(tmp_path, [prediction(LEFT, video="<b>&\ud800")], content)
    assert not {"script", "b", "i"} & {tag for tag, _ in page.tags}
    assert charts.name_to_draw(hostile) in page.text
    assert "<b>&? (<i>x)" in page.text


def test_animations_are_small(tmp_path):
    """Frames are chosen and shrunk, whatever the size and length of a video."""
    for size, frames in (((400, 30), 40), ((30, 400), 1), ((8, 8), 4)):
        mask = np.ones(size, bool)
        code = encode(mask)
        content = truth(annotation([code] * frames), frames=frames, size=size)
        (picture,) = make_report(tmp_path, [prediction([code] * frames)], content)[0].pictures()
        assert getattr(picture, "n_frames", 1) <= FRAMES
        assert max(picture.height, (picture.width - 4) // 2) == PANEL_SIDE


def test_frames_are_drawn_where_they_exist(tmp_path, sparse):
    files = {5: [tmp_path / f"set/JPEGImages/5/{t}.png" for t in range(3)]}
    files[3] = [tmp_path / "missing.png"] * 3
    plain, _ = make_report(tmp_path, sparse, sparse_content())
    drawn, _ = make_report(tmp_path, sparse, sparse_content(), Sources(files))
    assert "Frames are not available" in plain.text
    assert "Frames are not available" not in drawn.text
    changed = [
        picture.convert("RGB").tobytes() != other.convert("RGB").tobytes()
        for picture, other in zip(plain.pictures(), drawn.pictures())
    ]
    assert sum(changed) == 1  # only video 5 has frames


def test_gates_are_strips_in_the_tables(tmp_path, sparse):
    gates = {5: np.ones((1, 3, 2), bool)}
    page, _ = make_report(tmp_path, sparse, sparse_content(), Sources(gates=gates))
    assert sum(attributes.get("class") == "gates" for _, attributes in page.tags) == 1
    assert "dark where its gate is open" in page.text


@pytest.mark.slow
def test_the_file_has_a_limit(tmp_path, monkeypatch):
    """Animations that do not fit are left out."""
    results, content = random_set(0, range(24))
    monkeypatch.setattr(report, "MAX_BYTES", 100_000)
    page, _ = make_report(tmp_path, results, content)
    assert (tmp_path / "report.html").stat().st_size <= 100_000
    assert not page.pictures() and "too large for this file" in page.text


def test_many_classes_are_cut():
    html = report.class_section({f"class{number}": number / 2000 for number in range(1500)})
    assert html.count("<tr>") == 101 and "100 of 1500 classes" in html


def test_one_video_a_class_without_objects_and_no_predictions(tmp_path):
    content = truth(annotation(LEFT), annotation(RIGHT, 2), categories=(1, 2))
    page, metrics = make_report(tmp_path, [], content)
    assert metrics["AP"] == 0 and page.value("AP") == "0.0"
    assert "1 of 2 classes have no objects" in page.text
    assert "There are no predictions" in page.text and len(page.pictures()) == 1
    perfect, _ = make_report(tmp_path, [prediction(LEFT), prediction(RIGHT)], content)
    assert perfect.value("AP") == "100.0" and perfect.value("loose mask") == "+0.0"


def test_only_crowds(tmp_path):
    page, metrics = make_report(tmp_path, [prediction(LEFT)], truth(annotation(LEFT, crowd=1)))
    assert metrics["AP"] == -1 and page.value("AP") == charts.UNDEFINED
    assert page.text.count("There are no objects that count") == 2 and not page.pictures()


@pytest.mark.parametrize("count, median", [(1, []), (12, [10, 11]), (24, range(10, 20))])
def test_worst_and_median_videos(count, median):
    rated = [RatedVideo("gt", {"id": number}, number / count) for number in range(count)]
    worst, around = choose_videos(rated)
    assert worst == rated[:10] and [video.video["id"] for video in around] == list(median)


def test_median_videos_are_around_the_median():
    rated = [RatedVideo("gt", {"id": number}, number / 100) for number in range(100)]
    assert [video.video["id"] for video in choose_videos(rated)[1]] == list(range(45, 55))


def test_bars_stay_inside():
    assert 'width="100.00"' in charts.bar(1.5) and 'width="0.00"' in charts.bar(-1.0)
    assert "interval" in charts.bar(0.5, 0.4, 0.6) and "interval" not in charts.bar(0.5)


def test_numbers_are_formatted():
    assert charts.percent(-1.0) == charts.percent(float("nan")) == charts.UNDEFINED
    assert charts.percent(0.1234) == "12.3" and charts.gain(-0.1) == f"{charts.MINUS}10.0"
    assert charts.gain(-1e-9) == "+0.0" and charts.span(float("nan"), 1) == ""


def test_parts_are_told_apart(tmp_path, sparse):
    """Numbers are means; curves and groups are those of each part."""
    path = write_json(tmp_path / "results.json", sparse)
    paths = [
        write_json(tmp_path / f"part{number}.json", part_of_set(number)) for number in (3, 5, 17)
    ]
    parts = read_parts(paths, False)
    metrics = score_results(path, parts, tmp_path, False, sources=Sources())
    page = Page(tmp_path / "report.html")
    check_self_contained(page)
    assert page.value("AP") == charts.percent(metrics["AP"])
    assert all(page.text.count(f"\npart{number}\n") == 2 for number in (3, 5, 17))
    assert len(page.pictures()) == 3
