"""README.md and other pages: length, tables, links, and references to code."""

import hashlib
import re

import pytest

from checkpoint import SHIPPED_WEIGHTS, model_from_checkpoint
from pages import PAGES, find_all, prose
from processes import REPOSITORY

README = PAGES["README.md"]


def links():
    """[(page, target), ...] of all links and pictures that are in the repository."""
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)]*)\)", prose(page)):
            yield page, target


def test_the_readme_has_at_most_1500_words():
    assert len(README.split()) <= 1500


@pytest.mark.parametrize("page, reference", find_all(r"`(?:\w+\.)*(\w+)`,\s+([\w/]+\.py)"))
def test_references_name_a_symbol_that_exists(page, reference):
    name, file = reference
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    assert re.search(rf"^ *(def|class) {name}\b", text, re.MULTILINE)


@pytest.mark.parametrize("page, link", list(links()))
def test_links_lead_to_a_file_and_a_heading(page, link):
    path, _, anchor = link.partition("#")
    file = (REPOSITORY / page).parent / path
    assert file.exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in [
            re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings
        ]


def test_every_module_is_in_the_table_of_files():
    table = set(re.findall(r"^\| `(\w+\.py)`", README, re.MULTILINE))
    assert table == {path.name for path in REPOSITORY.glob("*.py")}
    assert len(table) <= 18  # the paper and the programs; what supports them has folders


def test_every_folder_is_in_the_table_of_folders():
    table = set(re.findall(r"^\| `(\w+)/`", README, re.MULTILINE))
    packages = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")}
    assert table == packages | {"benchmarks", "docs", "tests"}
    for folder, contents in re.findall(r"^\| `(\w+)/` \|(.*)\|", README, re.MULTILINE):
        for file in re.findall(r"`(\w+\.py)`", contents):
            assert (REPOSITORY / folder / file).exists()


def test_the_first_two_blocks_hold_one_line_each():
    blocks = re.findall(r"^```\w*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert all(len(block.splitlines()) == 1 for block in blocks[:2])
    assert "train.py" in blocks[0] and "tests/run.py" in blocks[1]


def test_the_model_card_describes_the_file():
    card, contents = PAGES["weights/README.md"], SHIPPED_WEIGHTS.read_bytes()
    assert f"| {len(contents):,} bytes;" in card
    assert f"`{hashlib.sha256(contents).hexdigest()}`" in card
    model, config = model_from_checkpoint(SHIPPED_WEIGHTS)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert f"`{config['propagation']}` propagation), thin ResNet, {size / 1e6:.2f} M" in card
    assert f"| {', '.join(name for _, name in config['categories'])} |" in card
    assert f"resized to {config['test_short_side']} pixels" in card
    row = re.compile(r"^\| `(?:weights/)?small.pt` \|([ \d.|]*)$", re.MULTILINE)
    assert row.search(card)[1] == row.search(README)[1]
