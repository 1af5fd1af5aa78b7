"""Command-line errors: one sentence and a non-zero exit status instead of a traceback.

    with cli_errors():
        main(parse_arguments())

Errors that a user can fix are raised as InputError. Anything else is a bug and keeps its traceback.
"""

import errno
import gc
import os
import reprlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from runtime.stopping import Stopped, stop_signals


class InputError(ValueError):
    """Invalid user input. The message is one sentence.

    Programs print it and exit with status 2.
    """


def shown(value) -> str:
    """Format a value for a message: short, and on one line."""
    return " ".join(reprlib.repr(value).split())


@contextmanager
def cli_errors() -> Iterator[None]:
    """Print errors that a user can fix as one sentence, and exit with status 2.

    These are InputError, FloatingPointError, and OSError with a file name. SIGINT and SIGTERM also
    print one sentence, and exit with status 130 and 143.
    """
    gc.freeze()  # Speed: otherwise, searching all modules for garbage delays exit by 0.3 to 0.8 s
    with open_streams():
        try:
            with stop_signals():
                yield
        except (InputError, FloatingPointError) as error:
            fail(2, f"error: {error}")
        except Stopped as stop:
            fail(128 + stop.number, str(stop) if os.environ.get("RANK", "0") == "0" else "")
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                fail(2, f"error: {TOO_MANY_FILES}")
            if not error.filename and error.errno != errno.ENOSPC:
                raise
            fail(2, f"error: {error.filename or 'a file'}: {error.strerror}")


TOO_MANY_FILES = (
    "too many open files: raise the limit (ulimit -n 4096), or use fewer loader "
    "processes (--workers)"
)


def fail(status: int, sentence: str) -> None:
    """Print a sentence to stderr and exit with a status."""
    if sentence:
        tqdm.write(sentence, file=sys.stderr)  # below a progress bar, if any
    sys.exit(status)


@contextmanager
def open_streams() -> Iterator[None]:
    """Ignore errors of stdout and stderr, so that they cannot lose results.

    Closed streams drop what is written. Characters that the encoding lacks are written as \\N
    escapes.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(UnbreakableStream, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class UnbreakableStream:
    """A text stream whose `write` never fails. `broken`: its reader has exited."""

    def __init__(self, stream):
        self.broken = stream is None  # Python's value for a stream closed at startup
        self.stream = open(os.devnull, "w", encoding="utf-8") if self.broken else stream
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(lambda: self.stream.flush())

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def _attempt(self, action) -> None:
        try:
            action()
        except (OSError, ValueError):  # broken pipe, full disk; closed file
            self._drop()

    def _drop(self) -> None:
        """Discard the buffer and all further output."""
        self.broken = True
        devnull = open(os.devnull, "w", encoding="utf-8")
        try:
            os.dup2(devnull.fileno(), self.stream.fileno())
        except (OSError, ValueError):  # it has no file descriptor
            self.stream = devnull
