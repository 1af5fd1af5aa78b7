"""SIGINT (Ctrl-C) and SIGTERM (schedulers) end a program in one sentence and lose nothing.

    with stop_signals():              # every program, by runtime/errors.py
        ...                           # a signal raises Stopped here
        with deferred_stop():         # training: a signal only sets a flag
            for batch in batches:
                step(batch)
                if stop_requested():
                    raise Stopped(stop_requested(), "saved last.pt")

A second signal exits at once. The exit status is 128 plus the signal's number, as shells expect.
"""
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TORCHRUN_GRACE = 2.0  # seconds in which torchrun may repeat the signal that the terminal has sent


class Stopped(BaseException):
    """The program was asked to stop; not an Exception, so that no handler of errors swallows it."""

    def __init__(self, number: int, detail: str = ""):
        super().__init__(detail)
        self.number, self.detail = number, detail

    def __str__(self) -> str:
        sentence = f"stopped by {signal.Signals(self.number).name}"
        return f"{sentence}: {self.detail}" if self.detail else sentence


class _State:
    """What the signal handler knows: the first signal, when it came, and whether to wait."""
    number, received, deferred = 0, 0.0, False


def _handle(number: int, _frame) -> None:
    """The first signal sets the flag, and raises Stopped unless that is deferred."""
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
    """Handle SIGINT and SIGTERM as described above; a signal that is ignored stays ignored."""
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
    """Signals set the flag of `stop_requested` instead of raising Stopped."""
    before, _State.deferred = _State.deferred, True
    try:
        yield
    finally:
        _State.deferred = before


def stop_requested() -> int:
    """The number of the signal that has come, 0 if none has."""
    return _State.number
