"""Result files, locks and streams: accidents lose nothing."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest

from processes import ENVIRONMENT
from runtime.errors import InputError, UnbreakableStream
from runtime.files import atomic_write, checksum, folder_lock, read_json, save_json


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    save_json(tmp_path / "a.json", [1])
    with pytest.raises(error), atomic_write(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise error
    assert read_json(tmp_path / "a.json") == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_is_unicode_whatever_the_locale_says(tmp_path, encoding):
    (tmp_path / "a.json").write_bytes('{"name": "犬 собака"}'.encode(encoding))
    script = (
        "from runtime.files import read_json; "
        f"print(ascii(read_json({str(tmp_path / 'a.json')!r})['name']))"
    )
    other = ENVIRONMENT | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=other, capture_output=True, text=True)
    assert done.stdout.strip() == ascii("犬 собака"), done.stderr


def test_the_checksum_is_that_of_sha256sum(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(256)) * 5000)
    expected = subprocess.run(["sha256sum", tmp_path / "a"], capture_output=True, text=True).stdout
    assert checksum(tmp_path / "a") == expected[:12]


# Locks

HOLDER = """
import sys, time
from pathlib import Path
from runtime.files import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_has_one_holder_which_is_named(tmp_path, holder):
    for _ in range(2):  # a failed attempt does not release the lock
        with pytest.raises(InputError, match=f"is in use by process {holder.pid} on "):
            with folder_lock(tmp_path):
                pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_holder_blocks_nobody(tmp_path, holder, number):
    holder.send_signal(number)
    holder.wait()
    with folder_lock(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_left_by_another_version_blocks_nobody(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on another machine")
    with folder_lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_folders_are_held_one_by_one(tmp_path):
    (tmp_path / "a").mkdir()
    with folder_lock(tmp_path), folder_lock(tmp_path / "a"):
        pass


# Streams

TALKING = """
import sys
from runtime.errors import cli_errors
from runtime.files import save_json
with cli_errors():
    print("\\u0441\\u043e\\u0431\\u0430\\u043a\\u0430 \\ud800", flush=True)
    for line in range(10_000):
        print("a long table, line", line)
    print("and a warning", file=sys.stderr)
    save_json(sys.argv[1], "done")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        '"$@" | head -1',
        '"$@" >&-',
        '"$@" 2>&-',
        '"$@" >&- 2>&-',
        '"$@" >/dev/full',
        '"$@" >/dev/full 2>/dev/full',
        'PYTHONIOENCODING=ascii "$@"',
        'LC_ALL=C PYTHONUTF8=0 "$@"',
        'PYTHONIOENCODING=latin1:strict "$@"',
    ],
)
def test_what_nobody_can_read_costs_no_results(tmp_path, how):
    command = [
        "bash",
        "-o",
        "pipefail",
        "-c",
        how,
        "-",
        sys.executable,
        "-c",
        TALKING,
        str(tmp_path / "result.json"),
    ]
    done = subprocess.run(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "result.json").read_text()) == "done"
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_a_stream_says_that_it_is_broken():
    """So a program that does nothing but print can stop."""
    stream = io.StringIO()
    wrapped = UnbreakableStream(stream)
    wrapped.write("text")
    assert stream.getvalue() == "text" and not wrapped.broken
    stream.close()
    wrapped.write("more")
    wrapped.write("and more")
    assert wrapped.broken


def test_json_is_written_on_one_line_or_several(tmp_path):
    save_json(tmp_path / "a.json", {"a": [1, 2]}, indent=None)
    assert (tmp_path / "a.json").read_text() == '{"a": [1, 2]}\n'
    save_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "a.json").read_text() == '{\n "a": 1\n}\n'
