"""Errors of the command line: one clear sentence and a non-zero exit status, never a traceback.

    with cli_errors():
        main(parse_arguments())

Every program is wrapped like this. What a user can mend is raised as an InputError anywhere in the
code and printed here. Anything else is a bug and keeps its traceback.
"""
import errno
import os
import reprlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from runtime.stopping import Stopped, stop_signals


class InputError(ValueError):
    """Something a user gave cannot be used; the message is one clear sentence.

    The programs print it and exit with status 2.
    """


def shown(value) -> str:
    """Any value for a message: short, and on one line."""
    return " ".join(reprlib.repr(value).split())


@contextmanager
def cli_errors() -> Iterator[None]:
    """Print what a user can mend as one sentence and exit with status 2.

    That is an InputError, a number that is not finite, and a file that the system refuses. SIGINT
    and SIGTERM end the program in one sentence, too, with status 130 and 143.
    """
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


TOO_MANY_FILES = ("too many open files: raise the limit (ulimit -n 4096), or use fewer loader "
                  "processes (--workers)")


def fail(status: int, sentence: str) -> None:
    """Exit with that status, after a sentence on stderr."""
    if sentence:
        tqdm.write(sentence, file=sys.stderr)  # below a progress bar, where there is one
    sys.exit(status)


@contextmanager
def open_streams() -> Iterator[None]:
    """Let nothing that is wrong with stdout or stderr cost any results.

    A stream that is closed, or whose reader has gone, drops what is written; characters that its
    encoding lacks are written as \\N escapes.
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
    """A text stream to which writing never fails; `broken` says that nobody reads it any more."""

    def __init__(self, stream):
        self.broken = stream is None  # so Python tells of one that is closed from the start
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
        except (OSError, ValueError):  # a pipe without a reader, a full disk; a closed file
            self._drop()

    def _drop(self) -> None:
        """Send what is buffered, and all that follows, to nowhere."""
        self.broken = True
        nowhere = open(os.devnull, "w", encoding="utf-8")
        try:
            os.dup2(nowhere.fileno(), self.stream.fileno())
        except (OSError, ValueError):  # it has no descriptor
            self.stream = nowhere
