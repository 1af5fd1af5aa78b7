"""Checkpoints that nobody vouches for: read without running anything of them, in little memory.

    contents = read_file("grattvis_r50_ovis.pth")             # or a .pkl, our .pt: nested containers of tensors, arrays, numbers, text

A .pth goes through torch.load(weights_only=True), a .pkl through an unpickler that admits arrays and containers alone. Before that,
the file is looked through for what would make Python take memory for what it claims and does not hold. Tests: tests/faults.
"""
import io
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime.errors import InputError

MOST_TUPLES = 50_000  # of a pickle: some thousands are usual, and Python's stack overflows at 200,000 inside of one another


class PickledArray(np.ndarray):
    """A numpy array of plain numbers: numpy itself believes whatever a file says about the types of what it points to."""

    def __setstate__(self, state: tuple) -> None:
        version, shape, kind, by_column, numbers = state
        super().__setstate__((version, shape, kind.numbers(), by_column, numbers))


class PickledType:
    """The numpy type of that name; what else a file says of it is not believed, apart from the order of the bytes."""

    def __init__(self, name: str, *_):
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def numbers(self) -> np.dtype:
        """Refused unless it is a type of numbers."""
        found = np.dtype(self.name)
        if found.kind not in "biufc":
            raise pickle.UnpicklingError(f"an array of {found}")
        return found.newbyteorder("=" if self.order == "|" else self.order)


def empty_array(*_) -> PickledArray:
    """What numpy makes first, to fill it afterwards."""
    return PickledArray((0,), np.uint8)


def array_of(numbers: bytes, kind: PickledType, shape: tuple, order: str) -> np.ndarray:
    """What numpy calls _frombuffer."""
    return np.frombuffer(numbers, kind.numbers()).reshape(shape, order=order)


def number_of(kind: PickledType, number: bytes | str) -> np.number:
    """What numpy calls scalar; Python 2 wrote its bytes as text."""
    return np.frombuffer(number.encode("latin1") if isinstance(number, str) else number, kind.numbers())[0]


def bytes_of(text: str, _) -> bytes:
    """How old protocols write bytes."""
    return text.encode("latin1")


class ArrayUnpickler(pickle.Unpickler):
    """Admits numpy arrays, numbers, strings and containers: all that a detectron2 .pkl holds; refuses any other class."""
    ADMITTED = {("collections", "OrderedDict"): OrderedDict, ("_codecs", "encode"): bytes_of, ("numpy", "ndarray"): object,
                ("numpy", "dtype"): PickledType} | {            # object: what is asked for is known, it makes no array by itself
        (f"numpy.{core}.{module}", name): ours for core in ("core", "_core") for module, name, ours in (
            ("multiarray", "_reconstruct", empty_array), ("multiarray", "scalar", number_of), ("numeric", "_frombuffer", array_of))}

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return self.ADMITTED[module, name]


def check_pickle(stream: io.BytesIO) -> None:
    """UnpicklingError for one that would make Python take memory that it does not fill, or overflow its stack; reads to its end."""
    tuples, most = 0, stream.getbuffer().nbytes
    for opcode, argument, _ in pickletools.genops(stream):        # which refuses what is longer than the file
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > most:
            raise pickle.UnpicklingError(f"place {argument} of the memory, in {most} bytes")
        if opcode.name == "GLOBAL" and argument.endswith(" bytearray"):
            raise pickle.UnpicklingError("GLOBAL builtins.bytearray")         # PyTorch admits it, of any length and full of zeros
        tuples += opcode.name.startswith("TUPLE")
    if tuples > MOST_TUPLES:
        raise pickle.UnpicklingError(f"{tuples} tuples")


def check_archive(path: Path) -> None:
    """UnpicklingError for an archive that unpacks to more than it has: torch.save packs nothing."""
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise pickle.UnpicklingError("packed entries")
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                check_pickle(io.BytesIO(archive.read(name)))


def find_tensors(contents) -> Iterator[Tensor]:
    """All tensors in nested containers, which may hold one another."""
    waiting, seen = [contents], set()
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, Tensor):
            yield thing
        elif isinstance(thing, (dict, list, tuple)) and id(thing) not in seen:
            seen.add(id(thing))
            waiting += thing.values() if isinstance(thing, dict) else thing


def read_file(path: str | Path) -> dict:
    """The contents of a .pt, .pth or .pkl on the CPU; InputError if it is missing, no checkpoint, or damaged."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".pkl":
            stream = io.BytesIO(path.read_bytes())
            check_pickle(stream)
            stream.seek(0)
            contents = ArrayUnpickler(stream, encoding="latin1").load()
        else:
            with open(path, "rb") as file:
                packed = file.read(2) == b"PK"
            if packed:
                check_archive(path)
            else:                                                 # of an old PyTorch: five pickles, then the numbers
                stream = io.BytesIO(path.read_bytes())
                for _ in range(5):
                    check_pickle(stream)
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                    # a damaged file makes either raise almost anything
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = (f"it asks for {asked[1]}, which is neither a tensor, an array nor a container" if asked else
                  "it is damaged, or another kind of file")
        raise InputError(f"{path} is no checkpoint that can be read safely: {reason}") from error
    if not isinstance(contents, dict):
        raise InputError(f"{path} is no checkpoint: it holds a {type(contents).__name__}, not named tensors")
    for tensor in find_tensors(contents):
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise InputError(f"{path} is no checkpoint: it holds a tensor that is not plain numbers")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(f"{path} is no checkpoint: it holds a tensor of shape {tuple(tensor.shape)}, but not so many numbers")
    return contents
