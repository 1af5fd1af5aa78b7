"""Errors of the command line: one sentence and the right exit status, or a traceback for a bug."""

import argparse
import errno
import signal

import numpy as np
import pytest

from runtime.errors import InputError, cli_errors, shown
from runtime.flags import at_least
from runtime.stopping import Stopped, stop_requested, stop_signals


@pytest.mark.parametrize(
    "error, status, sentence",
    [
        (InputError("a.json is empty"), 2, "error: a.json is empty"),
        (FloatingPointError("the loss is not finite"), 2, "error: the loss is not finite"),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "a.json"),
            2,
            "error: a.json: No such file",
        ),
        (OSError(errno.ENOSPC, "No space left"), 2, "error: a file: No space left"),
        (OSError(errno.EMFILE, "Too many open files"), 2, "error: too many open files"),
        (OSError(errno.ENFILE, "Too many open files in system"), 2, "error: too many open files"),
        (Stopped(signal.SIGTERM, "stopped by SIGTERM"), 143, "stopped by SIGTERM"),
    ],
)
def test_what_a_user_can_correct_is_one_sentence(capsys, error, status, sentence):
    with pytest.raises(SystemExit) as ended, cli_errors():
        raise error
    assert ended.value.code == status
    printed = capsys.readouterr().err
    assert printed.startswith(sentence) and len(printed.splitlines()) == 1


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EPIPE, "no file name")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)), cli_errors():
        raise error


def test_values_are_shown_briefly_on_one_line():
    assert shown("a\nb") == r"'a\nb'" and len(shown(list(range(10_000)))) < 100
    assert shown(np.zeros((2, 1))) == "array([[0.], [0.]])"  # of which repr has two lines


def test_a_flag_below_its_minimum():
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--workers", type=at_least(0))
    assert parser.parse_args(["--workers", "0"]).workers == 0
    with pytest.raises(argparse.ArgumentError, match="-1 is less than 0"):
        parser.parse_args(["--workers", "-1"])


def test_a_program_that_was_stopped_does_not_stop_the_next():
    """In the same process; handlers are what they were."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, cli_errors():
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143
    with stop_signals():
        assert stop_requested() == 0
    assert signal.getsignal(signal.SIGTERM) == handler
