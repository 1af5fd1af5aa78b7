"""The style of the code: what ruff says, in the version of requirements-dev.txt.

Also, that programs start without slow packages that they may not need.
"""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest

from processes import REPOSITORY


def installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


PINNED = re.search(r"^ruff==(.*)$", (REPOSITORY / "requirements-dev.txt").read_text(), re.MULTILINE)


@pytest.mark.skipif(installed("ruff") != PINNED[1], reason=f"needs ruff {PINNED[1]}")
@pytest.mark.parametrize("command", ["check .", "format --check ."])
def test_ruff_finds_nothing(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command.split(), "--no-cache"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "program, package", [("data", "torchvision"), ("evaluate", "scipy"), ("demo", "scipy")]
)
def test_programs_start_without_slow_packages(program, package):
    script = f"import sys, {program}; sys.exit({package!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY).returncode == 0
