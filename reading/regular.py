"""Files of strangers: regular ones only, and no more bytes than the reader has room for.

    content = read_regular(Path("frame.jpg"), limit=2 ** 30)

A FIFO makes whoever opens it wait for a writer, /dev/zero never ends, and some devices act when
they are opened. All of them can stand in a folder under the name of a picture.
"""
import os
import stat
from pathlib import Path

from runtime.errors import InputError

BLOCK = 2 ** 20  # bytes
# Neither exists on every system.
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
         stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def read_regular(path: Path, limit: int) -> bytes:
    """All bytes of a regular file; symbolic links are followed.

    Raises InputError if the file is missing or unreadable, is not a regular file, or has more than
    `limit` bytes.
    """
    try:
        check_regular(path, os.stat(path))  # before it is opened, which can have effects
        with open(os.open(path, OPEN_FLAGS), "rb") as file:
            status = os.fstat(file.fileno())
            check_regular(path, status)  # another file can have taken its place
            if status.st_size > limit:
                raise InputError(f"{path} has {status.st_size} bytes, at most {limit} are read")
            parts = [file.read(status.st_size)]
            length = len(parts[0])
            while part := file.read(BLOCK):  # it grows, or its file system states no size
                parts.append(part)
                length += len(part)
                if length > limit:
                    raise InputError(f"{path} has more than {limit} bytes, which are not read")
            return b"".join(parts)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from error


def check_regular(path: Path, status: os.stat_result) -> None:
    """InputError unless it is the status of a regular file."""
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise InputError(f"{path} is {KINDS.get(kind, 'something else')}, not a regular file")
