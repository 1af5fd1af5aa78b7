"""README.md and docs/: length, tables, links, references to code, and arguments of commands."""

import re
import shlex
import sys
from pathlib import Path

import pytest

import data
import demo
import evaluate
import train

REPOSITORY = Path(__file__).parent.parent
# At the end: some of its files have names of ours.
sys.path.append(str(REPOSITORY / "benchmarks"))
import study  # noqa: E402

PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8")
    for path in [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/*.md"))]
}
README = PAGES["README.md"]
PROGRAMS = {
    "data.py": data,
    "demo.py": demo,
    "evaluate.py": evaluate,
    "train.py": train,
    "benchmarks/study.py": study,
}


def find_all(pattern):
    """[(page, match), ...] of a regular expression in all pages."""
    return [
        (page, match)
        for page, text in PAGES.items()
        for match in re.findall(pattern, text, re.MULTILINE | re.DOTALL)
    ]


def links():
    """[(page, target), ...] of all links and pictures that are in the repository."""
    for page, text in PAGES.items():
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\((?!https?:)([^)]*)\)", prose):
            yield page, target


def commands():
    """[(page, command), ...] of PROGRAMS, in blocks without a language and in `code`."""
    blocks = find_all(r"^```(\w*)\n(.*?)^```")
    lines = [
        (page, line)
        for page, (language, block) in blocks
        if not language
        for line in re.split(r"\n|&&", block.replace("\\\n", " "))
    ]
    for page, line in lines + find_all(r"`(python [^`]*)`"):
        words = shlex.split(line, comments=True)
        programs = [number for number, word in enumerate(words) if word in PROGRAMS]
        if programs:
            yield page, tuple(words[programs[0] :])


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


@pytest.mark.parametrize("page, command", list(dict.fromkeys(commands())))
def test_commands_have_valid_arguments(page, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", list(command))
    try:
        PROGRAMS[command[0]].parse_arguments()
    except SystemExit as end:
        assert not end.code  # 0 after --help


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
