"""The layout of checkpoint files: the pickle, and the data of the tensors.

    container = Container(stream, size)
    container.records                                  # the pickle, read as data by pickles.py
    first, nbytes = container.find_storage("0", torch.float32, 25)
    container.read_storage(first, torch.float32, 25)   # a one-dimensional tensor

A file is an archive of torch.save, the older format of torch.save (five pickles, then the numbers),
or a single pickle. Offsets are validated against the size of the file.
"""

import io
import re
import struct
import sys
import zipfile
from typing import BinaryIO

import torch
from torch import Tensor

from reading.pickles import BadPickle, Damaged, Record, arguments, read_pickle

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # the first pickle of torch.save's older format
SMALL_FILE = 2**26  # bytes; read at once, for speed
STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
}


class Container:
    """The layout of a checkpoint in a stream of `size` bytes.

    places: {key: (first byte, size in bytes)} of every storage. swapped: whether the file has the
    other byte order. Raises BadPickle if the file cannot be read.
    """

    def __init__(self, stream: BinaryIO, size: int):
        self.stream, self.size = stream, size
        self.places: dict[str, tuple[int, int]] = {}
        self.swapped = False
        self.records = self.read_records()

    def read_records(self):
        """The pickle of the contents."""
        magic = self.stream.read(4)
        self.stream.seek(0)
        if magic == b"PK\3\4":
            return self.read_archive()
        if self.size <= SMALL_FILE:
            self.stream = io.BytesIO(self.stream.read())
        records, _ = read_pickle(self.stream)
        return self.read_older_format() if records == MAGIC_NUMBER else records

    def read_archive(self):
        """A ZIP archive: name/data.pkl, and the numbers of a storage in each name/data/key."""
        try:
            with zipfile.ZipFile(self.stream) as archive:
                entries = archive.NameToInfo
        except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError) as error:
            raise Damaged(str(error)) from error
        root = next((name for name in entries if re.fullmatch(r"[^/]*/data\.pkl", name)), None)
        if root is None:
            kind = f"other files, such as {next(iter(entries), None)!r:.60}"
            if all(name.endswith(".npy") for name in entries):
                kind = "NumPy arrays (.npz)"
            raise BadPickle(f"it is a ZIP archive of {kind}")
        root = root.removesuffix("data.pkl")
        if f"{root}constants.pkl" in entries:
            raise BadPickle("it is a program (torch.jit.save): save the state_dict of the model")
        for name, entry in entries.items():
            if name.startswith(f"{root}data/"):
                self.places[name.removeprefix(f"{root}data/")] = self.find_entry(entry)
        if f"{root}byteorder" in entries:
            self.swapped = self.read_entry(entries[f"{root}byteorder"]) != sys.byteorder.encode()
        records, _ = read_pickle(io.BytesIO(self.read_entry(entries[f"{root}data.pkl"])))
        return records

    def find_entry(self, entry: zipfile.ZipInfo) -> tuple[int, int]:
        """First byte and size of an archive's entry."""
        if entry.compress_type != zipfile.ZIP_STORED:
            raise BadPickle("it is a ZIP archive that is packed, which torch.save never writes")
        if entry.header_offset < 0:
            raise Damaged(f"entry {entry.filename} begins before the file")
        self.stream.seek(entry.header_offset)
        header = self.stream.read(30)
        if len(header) < 30 or not header.startswith(b"PK\3\4"):
            raise Damaged(f"entry {entry.filename} has no header")
        first = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))  # name and extras
        if first + entry.file_size > self.size:
            raise Damaged(f"entry {entry.filename} ends outside of the file")
        return first, entry.file_size

    def read_entry(self, entry: zipfile.ZipInfo) -> bytes:
        """The bytes of an archive's entry."""
        first, nbytes = self.find_entry(entry)
        self.stream.seek(first)
        return self.stream.read(nbytes)

    def read_older_format(self):
        """Read what follows the magic number: version, system, contents, storage keys, data."""
        read_pickle(self.stream)
        read_pickle(self.stream)
        records, references = read_pickle(self.stream)
        dtypes = {key: dtype for dtype, key, *_ in map(parse_reference, references)}
        keys, _ = read_pickle(self.stream)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise Damaged("the keys of storages")
        for key in keys:
            if key not in dtypes:
                raise Damaged(f"storage {key} is not referred to")
            nbytes = int.from_bytes(self.stream.read(8), "little") * dtypes[key].itemsize
            first = self.stream.tell()
            if first + nbytes > self.size:
                raise Damaged(f"storage {key} ends outside of the file")
            self.places[key] = first, nbytes
            self.stream.seek(first + nbytes)
        return records

    def find_storage(self, key: str, dtype: torch.dtype, count: int) -> tuple[int, int]:
        """First byte and size of a storage; Damaged if it has fewer than `count` numbers."""
        first, nbytes = self.places.get(key, (0, -1))
        if count * dtype.itemsize > nbytes:
            raise Damaged(f"storage {key} is smaller than is said")
        return first, nbytes

    def read_storage(self, first: int, dtype: torch.dtype, count: int) -> Tensor:
        """Read `count` numbers, one-dimensional, starting at a byte."""
        numbers = torch.empty(count, dtype=dtype)
        self.stream.seek(first)
        if self.stream.readinto(numbers.view(torch.uint8).numpy()) < numbers.nbytes:
            raise Damaged(f"the numbers at byte {first} are cut short")
        if self.swapped:
            numbers.untyped_storage().byteswap(dtype)
        return numbers


def parse_reference(record: Record) -> tuple[torch.dtype, str, int, object]:
    """The fields of a storage reference of torch.save: dtype, key, count, and view."""
    (saved_id,) = arguments(record, tuple)
    word, kind, key, _, count, view = (*saved_id, *[None] * 6)[:6]
    if word != "storage" or not isinstance(kind, type) or not isinstance(key, str):
        raise Damaged("a reference to what is no storage")
    name = kind.name.rpartition(".")[2]
    if name not in STORAGE_DTYPES or not is_shape((count,)):
        raise Damaged(f"storage {key}")
    return STORAGE_DTYPES[name], key, count, view


def is_shape(sizes) -> bool:
    """Whether a value is a valid tensor shape."""
    return (
        isinstance(sizes, tuple)
        and len(sizes) <= 64
        and all(type(size) is int and 0 <= size < 2**63 for size in sizes)
    )
