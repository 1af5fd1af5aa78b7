"""Errors of the command line: one clear sentence and a non-zero exit status, never a traceback.

    with cli_errors():
        main(parse_arguments())

Every program is wrapped like this. What a user can mend is raised as an InputError anywhere in the
code and printed here. Anything else is a bug and keeps its traceback.
"""
import errno
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tqdm import tqdm


class InputError(ValueError):
    """Something a user gave cannot be used; the message is one clear sentence.

    The programs print it and exit with status 2.
    """


@contextmanager
def cli_errors() -> Iterator[None]:
    """Print what a user can mend as one sentence and exit with status 2.

    That is an InputError (also one that a loader process has wrapped), a file that the system
    refuses, a number that is not finite, and a loader process that was killed.
    """
    try:
        yield
    except (InputError, FloatingPointError) as error:
        last_line = str(error).strip().splitlines()[-1]
        sentence = re.sub(r"^([\w.]+\.)?InputError: ", "", last_line)
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # whoever reads our output has seen enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        raise  # another pipe: another program has failed
    except (ConnectionError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker (pid"):
            raise
        with suppress(RuntimeError):  # PyTorch's signal of the same death may still come
            time.sleep(0.5)
        cause = " ".join(str(error).split()) or "it says no more"
        sentence = (f"a process that reads ahead was killed ({cause}): often memory has run out, "
                    "try fewer --workers; the same command goes on, training with --resume")
    except OSError as error:
        if not error.filename and error.errno != errno.ENOSPC:
            raise
        sentence = f"{error.filename or 'a file'}: {error.strerror}"
    else:
        return
    tqdm.write(f"error: {sentence}", file=sys.stderr)  # below a progress bar, where there is one
    sys.exit(2)
