"""docs/extending.md: its changes apply to the code as it is, and do what the page says.

All changes are applied to one copy of the repository, and the examples below them run there.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from processes import ENVIRONMENT, REPOSITORY

PAGE = (REPOSITORY / "docs/extending.md").read_text(encoding="utf-8")
CHANGES = re.findall(r"^```diff\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def hunks(change: str):
    """(file, text before, text after) of each hunk of a diff without line numbers."""
    for file_part in re.split(r"^--- ", change, flags=re.MULTILINE)[1:]:
        name, *parts = re.split(r"^@@.*\n", file_part, flags=re.MULTILINE)
        for part in parts:
            lines = part.splitlines(keepends=True)
            before = "".join(line[1:] or "\n" for line in lines if not line.startswith("+"))
            after = "".join(line[1:] or "\n" for line in lines if not line.startswith("-"))
            yield name.split()[0], before, after


def apply(change: str, folder: Path) -> None:
    for name, before, after in hunks(change):
        text = (folder / name).read_text(encoding="utf-8")
        message = f"docs/extending.md quotes {name}, which has changed here: update the page"
        assert text.count(before) == 1, f"{message}\n{before}"
        (folder / name).write_text(text.replace(before, after), encoding="utf-8")


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the repository with all changes."""
    folder = tmp_path_factory.mktemp("extended") / "repository"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "tests", "datasets", "runs", "demo")
    shutil.copytree(REPOSITORY, folder, ignore=left_out)
    for change in CHANGES:
        apply(change, folder)
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_small(change):
    """At most 15 lines in one file; 30 for a backbone or a data set."""
    files = {name for name, _, _ in hunks(change)}
    lines = re.findall(r"^[+-](?!-- ).*\S", change, re.MULTILINE)
    assert len(files) == 1 and 0 < len(lines) <= 30


@pytest.mark.slow
def test_the_examples_run_with_the_changes(changed, tmp_path):
    script = tmp_path / "examples.py"
    script.write_text("\n\n".join(EXAMPLES), encoding="utf-8")
    environment = ENVIRONMENT | {"PYTHONPATH": str(changed)}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
