"""Files of our own: written whole or not at all, read as UTF-8 whatever the locale says.

    save_json(path, contents)                 # atomic: a temporary name, then a rename
    with atomic_write(path) as temporary:     # the same for any other writer
        temporary.write_bytes(...)
"""
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.errors import InputError


def first_existing(what: str, candidates: list[Path]) -> Path:
    """The first of the candidates that exists; InputError naming all of them otherwise."""
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise InputError(f"no {what} found; tried {', '.join(map(str, candidates))}")


def read_json(path: str | Path):
    """Parsed JSON in UTF-8, with or without BOM; InputError if it is missing or malformed."""
    path = first_existing("file", [Path(path)])
    try:
        return json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not a JSON file: {error}") from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary name to write to, renamed to `path` when the block ends well.

    InputError where the disk is full or may not be written to: `path` is then as it was before,
    and nothing new is left.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):  # nobody may remove it either
            temporary.unlink()
        reason = error.strerror or error
        raise InputError(f"{path} cannot be written: {reason}; it is as it was before") from error


def save_json(path: str | Path, contents, indent: int | None = 1) -> None:
    """Write JSON atomically; indent None = all on one line."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=indent) + "\n", encoding="utf-8")


def checksum(path: str | Path) -> str:
    """The first twelve digits of a file's SHA-256: equal annotations, equal task."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


RESERVED_NAMES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT")
                                                for number in range(10))}  # on Windows
LONGEST_FILE_NAME = 80  # bytes, so that a caller can add to it: most file systems allow 255


def file_name_for(text: str) -> str:
    """A file name that says what the text says, and is valid wherever files are written.

    Letters, digits and `_.-` stay. Where anything had to be replaced or cut off, a digest is
    appended, so that different texts have different names.
    """
    encoding = sys.getfilesystemencoding()
    encodable = text.encode(encoding, "replace").decode(encoding)
    name = re.sub(r"[^\w.-]+", "_", encodable)
    name = name.encode(encoding)[:LONGEST_FILE_NAME].decode(encoding, "ignore").rstrip(".")
    if not name or name.startswith(".") or name.split(".")[0].upper() in RESERVED_NAMES:
        name = f"_{name}"
    if name == text and not re.search(r"-[0-9a-f]{8}$", name):  # which looks like a digest
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    room = LONGEST_FILE_NAME - len(f"-{digest}")
    return f"{name.encode(encoding)[:room].decode(encoding, 'ignore')}-{digest}"
