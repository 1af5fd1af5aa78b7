"""Handles SIGINT (Ctrl-C) and SIGTERM (sent by schedulers) without loss of results.

    with stop_signals():              # every program, by runtime/errors.py
        ...                           # a signal raises Stopped here
        with deferred_stop():         # training: a signal only sets a flag
            for batch in batches:
                step(batch)
                if stop_requested():
                    raise Stopped(stop_requested(), "saved last.pt")

A second signal exits immediately. The exit status is 128 plus the signal number.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TORCHRUN_GRACE = 2.0  # seconds in which torchrun may repeat a signal of the terminal


class Stopped(BaseException):
    """A signal was received. Not an Exception, so that error handlers do not catch it."""

    def __init__(self, number: int, detail: str = ""):
        super().__init__(detail)
        self.number, self.detail = number, detail

    def __str__(self) -> str:
        sentence = f"stopped by {signal.Signals(self.number).name}"
        return f"{sentence}: {self.detail}" if self.detail else sentence


class _State:
    """State of the signal handler: first signal, its time, and whether it is deferred."""

    number, received, deferred = 0, 0.0, False


def _handle(number: int, _frame) -> None:
    """Set the flag at the first signal, and raise Stopped unless deferred."""
    if _State.number:
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        if not under_torchrun or time.monotonic() - _State.received > TORCHRUN_GRACE:
            os._exit(128 + number)
        return
    _State.number, _State.received = int(number), time.monotonic()
    if not _State.deferred:
        raise Stopped(_State.number)


@contextmanager
def stop_signals() -> Iterator[None]:
    """Handle SIGINT and SIGTERM as described above; ignored signals stay ignored."""
    _State.number, _State.deferred = 0, False
    handled = {number: signal.getsignal(number) for number in SIGNALS}
    handled = {number: handler for number, handler in handled.items() if handler != signal.SIG_IGN}
    for number in handled:
        signal.signal(number, _handle)
    try:
        yield
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)


@contextmanager
def deferred_stop() -> Iterator[None]:
    """Make signals set the flag of `stop_requested` instead of raising Stopped."""
    before, _State.deferred = _State.deferred, True
    try:
        yield
    finally:
        _State.deferred = before


def stop_requested() -> int:
    """The number of the received signal, or 0."""
    return _State.number
