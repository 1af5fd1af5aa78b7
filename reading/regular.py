"""Files of strangers: regular ones only, and no more memory than they have bytes.

    content = read_regular(Path("frame.jpg"), limit=2 ** 30)
    with open_regular(Path("weights.pth")) as file:
        file.read(512)

A FIFO makes whoever opens it wait for a writer, /dev/zero never ends, and some devices act when
they are opened. All of them can stand in a folder under the name of a picture.
"""
import io
import os
import stat
from pathlib import Path

from runtime.errors import InputError

# Neither exists on every system.
OPEN_FLAGS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
         stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


class BoundedReader(io.BufferedReader):
    """A file that takes no memory to read more than it has."""

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

    OSError where the system refuses; InputError if it is a folder, a FIFO, a socket or a device.
    """
    check_regular(path, os.stat(path))  # before it is opened, which can have effects
    raw = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | OPEN_FLAGS))
    try:
        status = os.fstat(raw.fileno())
        check_regular(path, status)  # another file can have taken its place
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
            parts = [file.read()]
            length = len(parts[0])
            # It may have grown, or its file system states no size.
            while part := file.read(io.DEFAULT_BUFFER_SIZE):
                parts.append(part)
                length += len(part)
                if length > limit:
                    raise InputError(f"{path} has more than {limit} bytes, which are not read")
            return b"".join(parts)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        reason = getattr(error, "strerror", error)
        raise InputError(f"{path} cannot be read: {reason}") from error


def check_regular(path: str | Path, status: os.stat_result) -> None:
    """InputError unless it is the status of a regular file."""
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise InputError(f"{path} is {KINDS.get(kind, 'something else')}, not a regular file")
