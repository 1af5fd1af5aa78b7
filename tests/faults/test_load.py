"""Hours of work use no more memory, files or shared memory than minutes.

Resources of a process and its children are sampled from outside. The full test takes two hours:
`python -m pytest -s tests/faults/test_load.py -m faults`.
"""

import os
import sys

import numpy
import pytest

from load import usage, watch

MEGABYTE = 10**6


def hold(tmp_path, *command, every):
    """Run load.py.

    What it held in the second tenth of its time (all is loaded then) and in the last one, medians.
    """
    samples = watch(
        [sys.executable, __file__.replace("test_load", "load"), *command],
        tmp_path / "said.txt",
        every,
    )
    tenth = len(samples) // 10
    early, late = (
        {name: numpy.median([sample[name] for sample in part]) for name in samples[0]}
        for part in (samples[tenth : 2 * tenth], samples[-tenth:])
    )
    print(
        f"{' '.join(command)}: {len(samples)} looks; {early['memory'] / MEGABYTE:.1f} MB, "
        f"{early['files']:.0f} files, "
        f"{early['on the way']:.0f} on the way, "
        f"then {late['memory'] / MEGABYTE:.1f} MB, {late['files']:.0f} files, "
        f"{late['on the way']:.0f} on the way"
    )
    return early, late


def assert_steady(early, late, growth):
    """Memory grows by no more than so many bytes, files and the rest not at all."""
    assert late["memory"] - early["memory"] < growth
    assert (late["files"], late["processes"], late["shared"]) == (
        early["files"],
        early["processes"],
        early["shared"],
    )
    assert late["on the way"] <= early["on the way"] + 4  # a batch's tensors


@pytest.mark.faults
def test_a_hundred_thousand_steps_of_training(tmp_path):
    """Less than a hundred bytes a step, which the allocator's own disorder may take."""
    assert_steady(*hold(tmp_path, "train", str(tmp_path), "100000", every=5), growth=100_000 * 100)


@pytest.mark.faults
def test_a_stream_of_ten_thousand_frames(tmp_path):
    """Without a memory, that is: GenVIS remembers every frame."""
    assert_steady(*hold(tmp_path, "step", "gated", "10000", every=1), growth=10_000 * 100)


@pytest.mark.faults
def test_a_video_of_ten_thousand_frames(tmp_path):
    """Codes of masks are kept until the video's scores are known: less than what results.json holds
    of them, twice at the end.
    """
    early, late = hold(tmp_path, "evaluate", str(tmp_path), "1", "10000", every=1)
    assert_steady(early, late, growth=2 * (tmp_path / "out/results.json").stat().st_size)


@pytest.mark.faults
def test_two_thousand_videos_in_a_row(tmp_path):
    """A set's Path keeps its text once it was asked for: a hundred bytes a frame, and no more than
    the set has.
    """
    assert_steady(
        *hold(tmp_path, "evaluate", str(tmp_path), "2000", "4", every=1), growth=8_000 * 200
    )


@pytest.mark.slow
def test_what_a_process_holds(tmp_path):
    """Memory and files that a child holds are seen, and that they are given back."""
    script = (
        "import subprocess, sys, time\n"
        'child = \'import time; held = bytearray(50_000_000); held[:] = b"x" * len(held); '
        "time.sleep(2)'\n"
        "subprocess.run([sys.executable, '-c', child]); time.sleep(1)"
    )
    samples = watch([sys.executable, "-c", script], tmp_path / "said.txt", every=0.1)
    with_child = [sample["memory"] for sample in samples if sample["processes"] == 2]
    alone = [sample["memory"] for sample in samples if sample["processes"] == 1]
    assert max(with_child) - alone[-1] > 50_000_000 and samples[-1]["processes"] == 1
    files = [open(tmp_path / "said.txt") for _ in range(10)]
    held = usage(os.getpid())["files"]
    for file in files:
        file.close()
    assert held - usage(os.getpid())["files"] == 10


@pytest.mark.slow
def test_a_copy_of_what_was_shared_since_a_fork_is_no_growth(tmp_path):
    """Loader processes are forked, and both sides write to what they share, sooner or later."""
    script = (
        "import os, time\nheld = bytearray(b'x') * 50_000_000\nreading, writing = os.pipe()\n"
        # It ends with the first one.
        "if not os.fork():\n    os.close(writing)\n    os.read(reading, 1)\n    os._exit(0)\n"
        "time.sleep(0.5)\nheld[::4096] = b'y' * len(held[::4096])\ntime.sleep(1)"
    )
    memory = [
        sample["memory"]
        for sample in watch([sys.executable, "-c", script], tmp_path / "said.txt", every=0.1)
        # At the ends, one of them may not be whole.
        if sample["processes"] == 2
    ][1:-1]
    assert min(memory) > 100_000_000 and max(memory) - min(memory) < 5_000_000


def test_a_command_that_fails_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="no such thing"):
        watch(
            [sys.executable, "-c", "raise SystemExit('no such thing')"],
            tmp_path / "said.txt",
            every=0.1,
        )
