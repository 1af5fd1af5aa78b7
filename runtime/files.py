"""Files of our own: written whole or not at all, read as UTF-8 whatever the locale says.

    save_json(path, contents)                 # atomic: a temporary name, then a rename
    with atomic_write(path) as temporary:     # the same for any other writer
        temporary.write_bytes(...)
"""
import hashlib
import json
import os
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
