"""Helpers to run our programs as subprocesses."""

import os
import socket
import time
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
ONE_THREAD = {
    # whatever the user's is: the cores may be busy, and sums depend on it in their last bit
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # a thread that waits leaves its core to others
    "KMP_BLOCKTIME": "0",
}  # the same, for Intel's OpenMP
ENVIRONMENT = (
    os.environ
    | ONE_THREAD
    | {
        "PYTHONPATH": os.pathsep.join(
            [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    }
)


def wait_until(condition, process):
    """Look every 2 ms, until the condition holds or the process has ended."""
    while process.poll() is None and not condition():
        time.sleep(0.002)


def free_port():
    """A port for torchrun."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def fake_ffmpeg(tmp_path, monkeypatch, script):
    """An ffmpeg that is found before any other: a shell script.

    It writes what it was given into the file `given`.
    """
    (tmp_path / "ffmpeg").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/given\n{script}\n')
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
