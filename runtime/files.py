"""Reads and writes result files: atomically, and as UTF-8 regardless of the locale.

save_json(path, contents)                 # atomic: a temporary name, then a rename
with atomic_write(path) as temporary:     # for other formats
    temporary.write_bytes(...)
with folder_lock(folder):                 # excludes other processes
    ...
"""

import errno
import hashlib
import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from reading.regular import read_regular
from runtime.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


MAX_JSON_SIZE = 2**33  # bytes


def first_existing(what: str, candidates: list[Path]) -> Path:
    """The first candidate that exists; InputError naming all of them if none does."""
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise InputError(f"no {what} found; tried {', '.join(map(str, candidates))}")


def read_json(path: str | Path):
    """Parse a JSON file in UTF-8, with or without BOM; InputError if missing or malformed."""
    path = first_existing("file", [Path(path)])
    content = read_regular(path, MAX_JSON_SIZE)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a JSON file: {error}") from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to, which is renamed to `path` if the block succeeds.

    Otherwise `path` is unchanged and the temporary file is removed. OSError, such as that of a full
    disk, becomes InputError.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # removing may be forbidden too
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or error
        raise InputError(f"{path} cannot be written: {reason}; it is as it was before") from error


def save_json(path: str | Path, contents, indent: int | None = 1) -> None:
    """Write JSON atomically; indent None = all on one line."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=indent) + "\n", encoding="utf-8")


def checksum(path: str | Path) -> str:
    """The first twelve digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Lock an existing folder against other processes.

    Raises InputError naming the process that holds the lock. The kernel releases the lock when a
    process dies. File systems without locks (some network ones) and operating systems without flock
    are not locked.
    """
    if fcntl is None:
        yield
        return
    path = folder / ".lock"
    file = open_locked(path)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        file.close()


def open_locked(path: Path) -> IO:
    """Open and lock a file; InputError if another process holds the lock."""
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise InputError(
                    f"{path.parent} is in use by {holder}: wait for it, or give another --output"
                ) from error
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # its previous holder has just removed it


RESERVED_NAMES = {
    "CON",
    "PRN",
    "AUX",
    "NUL",
    *(f"{port}{number}" for port in ("COM", "LPT") for number in range(10)),
}  # on Windows
MAX_FILE_NAME = 80  # bytes; most file systems allow 255, callers add a suffix


def file_name_for(text: str) -> str:
    """Convert text to a file name that is valid on all systems.

    Letters, digits, spaces and `_.-` are kept. If anything is replaced or truncated, a digest is
    appended, so that different texts have different names.
    """
    encoding = sys.getfilesystemencoding()
    encodable = text.encode(encoding, "replace").decode(encoding)
    name = re.sub(r"[^\w. -]+", "_", encodable)
    name = name.encode(encoding)[:MAX_FILE_NAME].decode(encoding, "ignore")
    name = name.strip(" ").rstrip(". ")
    if not name or name.startswith(".") or name.split(".")[0].upper() in RESERVED_NAMES:
        name = f"_{name}"
    if name == text and not re.search(r"-[0-9a-f]{8}$", name):  # looks like a digest
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    room = MAX_FILE_NAME - len(f"-{digest}")
    return f"{name.encode(encoding)[:room].decode(encoding, 'ignore')}-{digest}"
