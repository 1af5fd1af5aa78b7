"""The README: its first commands are one line each, and the symbols it mentions exist."""
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
REFERENCES = re.findall(r"`(\w+)`, ([\w/]+\.py)", README)


@pytest.mark.parametrize("name, file", REFERENCES)
def test_references_name_a_symbol_that_exists(name, file):
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    assert re.search(rf"^ *(def|class) {name}\b", text, re.MULTILINE)


def test_every_module_is_in_the_table_of_files():
    table = set(re.findall(r"^\| `(\w+\.py)`", README, re.MULTILINE))
    assert table == {path.name for path in REPOSITORY.glob("*.py")} and REFERENCES
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
