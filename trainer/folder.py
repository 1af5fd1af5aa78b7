"""The output folder of a training run: what may be written where, and the log."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoint import read_run
from runtime.errors import InputError
from runtime.files import atomic_write, folder_lock, save_json

FILES_OF_A_RUN = ("last.pt", "best.pt", "log.jsonl", "args.json")


def read_resumed(args: argparse.Namespace) -> dict | None:
    """The contents of the checkpoint to resume, or None; sets args.resume to its path."""
    output = Path(args.output)
    if args.resume == "auto":
        last = output / "last.pt"
        args.resume = str(last) if last.exists() else None
    check_folder(args.resume, output)
    return read_run(args.resume) if args.resume else None


def check_folder(resume: str | None, output: Path) -> None:
    """InputError if --output contains files of another run than the one to resume."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file, not a folder")
    existing = [name for name in FILES_OF_A_RUN if (output / name).exists()]
    if not existing:
        return
    last = output / "last.pt"
    resumed = Path(resume) if resume else None
    if last.exists():
        if not (resumed and resumed.exists() and last.samefile(resumed)):
            raise InputError(f"{last} exists: resume it (--resume), or choose another --output")
    elif not (resumed and resumed.resolve().parent == output.resolve()):
        raise InputError(
            f"{output} holds {' and '.join(existing)} of a run that has no last.pt: "
            "remove the folder, or choose another --output"
        )


@contextmanager
def prepare_folder(args: argparse.Namespace, step: int) -> Iterator[None]:
    """Create and lock the output folder, and write args.json.

    step: of the checkpoint to resume, or 0. Later lines of the log are removed.
    """
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    with folder_lock(output):
        check_folder(args.resume, output)
        save_json(output / "args.json", vars(args))
        trim_log(output / "log.jsonl", step)
        yield


def append_to_log(path: Path, record: dict) -> None:
    """Append a line to a log."""
    try:
        with open(path, "a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
    except OSError as error:
        last = path.with_name("last.pt")
        raise InputError(
            f"{path} cannot be written: {error.strerror}; --resume {last} continues"
        ) from error


def trim_log(path: Path, step: int) -> None:
    """Remove the lines after the last checkpoint, whose steps are repeated."""
    if not path.exists():
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds a line that training did not write: {error!r}") from error
    if len(kept) < len(lines):
        with atomic_write(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
