"""Opens untrusted files: only regular files, with bounded memory.

    content = read_regular(Path("frame.jpg"), limit=2 ** 30)
    with open_regular(Path("weights.pth")) as file:
        file.read(512)

Opening a FIFO waits for a writer, /dev/zero never ends, and opening some devices has side effects.
Any of them can be in a folder under the name of a picture.
"""

import io
import os
import stat
from pathlib import Path

from runtime.errors import InputError

# Neither exists on every system.
OPEN_FLAGS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class BoundedReader(io.BufferedReader):
    """A file whose `read` never allocates more memory than the file has bytes."""

    def __init__(self, raw: io.FileIO, size: int):
        super().__init__(raw)
        self.size = size

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= io.DEFAULT_BUFFER_SIZE:
            left = max(0, self.size - self.tell())
            size = left if size is None or size < 0 else min(size, left)
        return super().read(size)


def open_regular(path: str | Path) -> BoundedReader:
    """Open a regular file for reading; symbolic links are followed.

    Raises InputError for a folder, a FIFO, a socket or a device, OSError if it cannot be opened.
    """
    check_regular(path, os.stat(path))  # before opening, which can have side effects
    raw = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | OPEN_FLAGS))
    try:
        status = os.fstat(raw.fileno())
        check_regular(path, status)  # it may have been replaced in the meantime
    except InputError:
        raw.close()
        raise
    return BoundedReader(raw, status.st_size)


def read_regular(path: str | Path, limit: int) -> bytes:
    """All bytes of a regular file.

    InputError if the file is missing or unreadable, is not a regular file, or has more than
    `limit` bytes.
    """
    try:
        with open_regular(path) as file:
            if file.size > limit:
                raise InputError(f"{path} has {file.size} bytes, at most {limit} are read")
            chunks = [file.read()]
            length = len(chunks[0])
            # The file may have grown, or its file system reports no size.
            while chunk := file.read(io.DEFAULT_BUFFER_SIZE):
                chunks.append(chunk)
                length += len(chunk)
                if length > limit:
                    raise InputError(f"{path} has more than {limit} bytes, which are not read")
            return b"".join(chunks)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        reason = getattr(error, "strerror", error)
        raise InputError(f"{path} cannot be read: {reason}") from error


def check_regular(path: str | Path, status: os.stat_result) -> None:
    """InputError unless the status is that of a regular file."""
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise InputError(f"{path} is {KINDS.get(kind, 'something else')}, not a regular file")
