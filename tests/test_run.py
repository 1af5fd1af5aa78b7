"""tests/run.py: what fails in any file fails the whole, and nothing else does."""

import re

import pytest

import run

pytestmark = pytest.mark.slow
FILES = {
    "test_good.py": "def test_one(): pass\ndef test_two(): pass\n",
    "test_bad.py": "def test_good(): pass\ndef test_bad(): assert 1 == 2\n",
    "test_broken.py": "import no_such_module\n",
    "test_dead.py": "import os\ndef test_dead(): os.kill(os.getpid(), 9)\n",
    "test_slow.py": "import pytest\n@pytest.mark.slow\ndef test_slow(): pass\n",
}


def write_files(tmp_path, monkeypatch, names):
    """Test files in a folder, which takes the place of tests/."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: for this test\n")
    for name in names:
        (folder / f"test_{name}.py").write_text(FILES[f"test_{name}.py"])
    monkeypatch.setattr(run, "FOLDER", folder)


@pytest.mark.parametrize(
    "names, arguments, code, lines",
    [
        (["good", "slow"], [], 0, ["3 passed"]),
        (["good", "slow"], ["-m", "slow"], 0, ["1 passed"]),  # a file without such tests is fine
        (["good"], ["-m", "slow"], 1, []),  # no test at all is not
        (
            ["good", "bad"],
            [],
            1,
            ["3 passed", "1 failed", "assert 1 == 2", "FAILED folder/test_bad.py"],
        ),
        (["good", "broken"], [], 1, ["2 passed", "no_such_module", "FAILED folder/test_broken.py"]),
        (["good", "dead"], [], 1, ["2 passed", "FAILED folder/test_dead.py"]),
    ],
    ids=str,
)
def test_exit_code_and_output(tmp_path, monkeypatch, capfd, names, arguments, code, lines):
    write_files(tmp_path, monkeypatch, names)
    assert run.main(arguments) == code
    output = capfd.readouterr().out
    assert all(line in output for line in lines), output
    assert ("FAILED" in output) == any("FAILED" in line for line in lines)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["folder/test_good.py"], "2 passed"),
        (["folder/test_good.py::test_one"], "1 passed"),
        (["folder/test_good.py::test_one", "folder/test_good.py::test_two"], "2 passed"),
        (["folder/test_bad.py::test_good", "-x", "folder/test_slow.py"], "2 passed"),
        (["folder"], "1 failed"),
        (["-k", "folder and two"], "1 passed"),
        (["-k", "good", "folder/test_bad.py"], "1 passed"),
        (["folder/test_missing.py"], "FAILED folder/test_missing.py"),
    ],
    ids=str,
)
def test_paths_select_files_and_tests(tmp_path, monkeypatch, capfd, arguments, expected):
    """Each file runs once, however many of its tests are named."""
    write_files(tmp_path, monkeypatch, ["good", "bad", "slow"])
    monkeypatch.chdir(tmp_path)
    assert run.main(arguments) == ("FAILED" in expected or "failed" in expected)
    output = capfd.readouterr().out
    assert expected in output, output
    files = re.findall(r"^(folder/\w+\.py): .* in ", output, re.MULTILINE)
    assert len(files) == len(set(files))
    if "::" in arguments[0]:
        assert expected in output.splitlines()[-1]
