"""Checkpoints that nobody vouches for: read without running anything of them, in little memory.

    contents = read_file("grattvis_r50_ovis.pth")    # or a .pt, a .pkl: the content decides

A file is an archive of torch.save, the older format of torch.save (five pickles, then the numbers),
or a single pickle. All three are read in the same two steps, and so hold the same things:
pickles.py reads the pickle as data, then CheckpointReader makes tensors, arrays and containers of
it. All else becomes a Placeholder, which can do nothing. Nothing is made larger than the numbers
that the file really holds. Tests: tests/test_reading_checkpoints.py, tests/faults.
"""
import io
import math
import re
import struct
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from reading.kinds import describe_kind
from reading.pickles import BadPickle, Damaged, Persistent, Record, read_pickle, refusal
from reading.regular import open_regular
from runtime.errors import InputError

MAGIC_NUMBER = 0x1950a86a20f9469cfc6c  # the first pickle of torch.save's older format
SMALL_FILE = 2 ** 26                   # bytes; read at once: pickles are read in small pieces
MOST_LEVELS = 100                      # of containers inside one another
UNFINISHED = object()                  # what stands for itself while it is made


@dataclass(frozen=True, eq=False)
class Placeholder:
    """Something in a file that is no tensor, array, container, number or text.

    Dates, paths, namespaces, configurations and optimizers are common next to weights. `name` says
    what it is, such as "pathlib.PosixPath"; nothing else of it is kept.
    """
    name: str


def arguments(record: Record, *types: type) -> tuple:
    """The first arguments of a record; Damaged unless they are of these types."""
    found = record.args[:len(types)]
    if len(found) < len(types) or not all(map(isinstance, found, types)):
        raise Damaged(f"the arguments of {record.name}")
    return found


def name_of(record: Record) -> str:
    """The full name of a record's class, which old protocols do not call by itself."""
    if record.name == "copyreg._reconstructor" and record.args and isinstance(record.args[0], type):
        return record.args[0].name
    return record.name


def hashable(key):
    try:
        hash(key)
    except TypeError as error:
        raise Damaged(str(error)) from error
    return key


def is_shape(sizes) -> bool:
    return isinstance(sizes, tuple) and len(sizes) <= 64 and all(
        type(size) is int and 0 <= size < 2 ** 63 for size in sizes)


class CheckpointReader:
    """Reads one checkpoint from a stream of `size` bytes.

    What could be made many times of the same bytes is paid for from a budget, the size of the
    file: an honest file needs no more, and a small file cannot ask for much memory.
    """

    def __init__(self, stream: BinaryIO, size: int, nested: bool = False):
        """nested: the stream is part of a checkpoint itself, and may not have parts like that."""
        self.stream, self.size, self.nested = stream, size, nested
        self.budget = size
        self.made = {}                         # id of what the pickle holds: (that, what is made)
        self.storages: dict[str, Tensor] = {}  # key: the numbers, one-dimensional
        self.places: dict[str, tuple[int, int]] = {}  # key: first byte and bytes of a storage
        self.swapped = False                   # the file was written in the other byte order

    def read(self):
        """The contents: nested dicts, lists, tuples and sets; BadPickle if they cannot be read."""
        magic = self.stream.read(4)
        self.stream.seek(0)
        if magic == b"PK\3\4":
            return self.make(self.read_archive())
        if self.size <= SMALL_FILE:
            self.stream = io.BytesIO(self.stream.read())
        records, _ = read_pickle(self.stream)
        if records == MAGIC_NUMBER:
            records = self.read_older_format()
        return self.make(records)

    # Containers of torch.save: records, and the places of storages

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
        """First byte and bytes of an archive's entry."""
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
        first, nbytes = self.find_entry(entry)
        self.stream.seek(first)
        return self.stream.read(nbytes)

    def read_older_format(self):
        """After the magic number: version, system, contents, keys of storages, their numbers."""
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

    def spend(self, nbytes: int) -> None:
        self.budget -= nbytes
        if self.budget < 0:
            raise BadPickle("it asks for more memory than it holds numbers")

    # What pickles hold

    def make(self, thing, level: int = 0):
        """What a part of a pickle stands for: containers are copied, records are made real."""
        if isinstance(thing, type):
            return Placeholder(thing.name)
        if not isinstance(thing, (dict, list, tuple, set, frozenset, Record)):
            return thing
        _, made = self.made.get(id(thing), (None, None))
        if made is UNFINISHED:
            raise BadPickle("it holds a container that holds itself")
        if made is not None:
            return made
        if level > MOST_LEVELS:
            raise BadPickle(f"it holds more than {MOST_LEVELS} containers inside one another")
        self.made[id(thing)] = thing, UNFINISHED
        if isinstance(thing, Record):
            maker = MAKERS.get(thing.name)
            made = maker(self, thing, level + 1) if maker else Placeholder(name_of(thing))
        elif isinstance(thing, dict):
            made = {key: self.make(value, level + 1) for key, value in thing.items()}
        elif isinstance(thing, (set, frozenset)):
            made = type(thing)(self.make_set(thing, level + 1))
        else:
            made = type(thing)(self.make(item, level + 1) for item in thing)
        self.made[id(thing)] = thing, made  # `thing` is kept, so that nothing else gets its id
        return made

    def make_set(self, items, level: int) -> set:
        return {hashable(self.make(item, level)) for item in items}

    def set_of(self, record: Record, level: int) -> set | frozenset:
        made = self.make_set(self.items_of(record), level)
        return frozenset(made) if record.name == "builtins.frozenset" else made

    def list_of(self, record: Record, level: int) -> list:
        return [self.make(item, level) for item in self.items_of(record)]

    def dict_of(self, record: Record, level: int) -> dict:
        """OrderedDict, defaultdict (whose factory is left out) and Counter are plain dicts here."""
        pairs = self.items_of(record)
        if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
            raise Damaged(f"the items of {record.name}")
        return {hashable(key): self.make(value, level) for key, value in pairs}

    def items_of(self, record: Record) -> list:
        """The items that a container was made with, and those that were added."""
        items = []
        for argument in record.args:
            if isinstance(argument, (dict, list, tuple, set, frozenset)):
                items += argument.items() if isinstance(argument, dict) else argument
                self.spend(len(argument))
        return items + record.items

    def first_of(self, record: Record, level: int):
        """A Parameter is its tensor; so are tensors of other devices, in terms of those here."""
        return self.make(*arguments(record, Record), level)

    def bytes_of(self, data) -> bytes:
        """Protocols 0 to 2 have no bytes: they hold text, and a call of _codecs.encode."""
        if isinstance(data, Record) and data.name == "_codecs.encode":
            data, = arguments(data, str)
        elif isinstance(data, Record) and data.name == "builtins.bytes" and not data.args:
            data = b""
        if isinstance(data, str):
            try:
                return data.encode("latin1")
            except UnicodeEncodeError as error:
                raise Damaged(str(error)) from error
        if not isinstance(data, (bytes, bytearray)):
            raise Damaged(f"{type(data).__name__} instead of bytes")
        return data

    def encoded(self, record: Record, level: int) -> bytes:
        found = self.bytes_of(record)
        self.spend(len(found))
        return found

    def bytearray_of(self, record: Record, level: int) -> bytearray:
        if not record.args:
            return bytearray()
        if isinstance(record.args[0], int):  # so many zeros
            raise refusal(record.name)
        found = bytearray(self.bytes_of(record.args[0]))
        self.spend(len(found))
        return found

    def complex_of(self, record: Record, level: int) -> complex:
        return complex(*arguments(record, float, float))

    # NumPy

    def dtype_of(self, record: Record, level: int) -> np.dtype | Placeholder:
        """A dtype of plain numbers; what else a file says of a dtype is not believed."""
        kind = record.args[0] if record.args else None
        if not isinstance(kind, str):  # a class of another package, such as ml_dtypes.bfloat16
            return Placeholder(f"numpy.dtype {getattr(kind, 'name', '')}")
        if not re.fullmatch(r"[biufc]\d{1,2}", kind):  # not of numbers
            return Placeholder(f"numpy.dtype {kind[:20]!r}")
        order = record.state[1] if isinstance(record.state, tuple) and record.state[1:] else "="
        try:
            return np.dtype(kind).newbyteorder("=" if order == "|" else order)
        except (TypeError, ValueError) as error:
            raise Damaged(str(error)) from error

    def array_of(self, record: Record, level: int) -> np.ndarray | Placeholder:
        """_reconstruct makes an empty array, and the state fills it."""
        state, record.state = record.state, None  # large, and no longer needed afterwards
        if not isinstance(state, tuple) or len(state) != 5:
            return Placeholder("numpy.ndarray without numbers")
        _, shape, dtype, by_column, numbers = state
        return self.make_array(shape, dtype, "F" if by_column else "C", numbers, level)

    def array_of_buffer(self, record: Record, level: int) -> np.ndarray | Placeholder:
        numbers, dtype, shape, order = arguments(record, object, object, tuple, str)
        record.args = ()
        return self.make_array(shape, dtype, "F" if order == "F" else "C", numbers, level)

    def make_array(self, shape, dtype, order: str, numbers, level: int) -> np.ndarray | Placeholder:
        dtype = self.make(dtype, level)
        if not isinstance(dtype, np.dtype):  # text, objects, records, NumPy's dates
            kind = dtype.name if isinstance(dtype, Placeholder) else "unknown"
            return Placeholder(f"numpy.ndarray of {kind.removeprefix('numpy.dtype ')}")
        numbers = self.bytes_of(numbers)
        if not is_shape(shape) or math.prod(shape) * dtype.itemsize != len(numbers):
            raise Damaged("the shape of an array")
        self.spend(len(numbers))
        try:
            array = np.ndarray(shape, dtype, numbers, order=order)
        except ValueError as error:  # no numbers, and too many dimensions or too large ones
            raise Damaged(str(error)) from error
        return array.astype(dtype.newbyteorder("="))  # a copy: PyTorch wants it to be writable

    def scalar_of(self, record: Record, level: int) -> np.generic | Placeholder:
        dtype, number = arguments(record, Record, object)
        array = self.make_array((), dtype, "C", number, level)
        return array if isinstance(array, Placeholder) else array[()]

    # PyTorch

    def storage_of(self, record: Record, level: int) -> Tensor | Placeholder:
        """The numbers of a storage that the pickle refers to."""
        dtype, key, count, view = parse_reference(record)
        if str(dtype).startswith("torch.q"):
            return Placeholder("quantized storage")
        numbers = reinterpret(self.read_storage(key, dtype, count), dtype)
        if count > len(numbers):
            raise Damaged(f"storage {key} of several sizes")
        if view is None:
            return numbers[:count]
        if not isinstance(view, tuple) or len(view) != 3 or not is_shape(view[1:]):
            raise Damaged("a view of a storage")
        _, first, count = view  # of the older format
        return numbers[first:first + count]

    def read_storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        """The storage of that key, read where it is asked for the first time."""
        if key in self.storages:
            return self.storages[key]
        first, nbytes = self.places.get(key, (0, -1))
        if count * dtype.itemsize > nbytes:
            raise Damaged(f"storage {key} is smaller than is said")
        self.spend(nbytes)
        self.storages[key] = numbers = torch.empty(count, dtype=dtype)
        self.stream.seek(first)
        if self.stream.readinto(numbers.view(torch.uint8).numpy()) < numbers.nbytes:
            raise Damaged(f"storage {key} is cut short")
        if self.swapped:
            numbers.untyped_storage().byteswap(dtype)
        return numbers

    def storage_of_bytes(self, record: Record, level: int):
        """A storage in a pickle, which is itself a file of torch.save."""
        numbers = self.bytes_of(*arguments(record, object))
        record.args = ()  # large, and no longer needed afterwards
        if self.nested:
            raise BadPickle("it holds files inside one another")
        self.spend(len(numbers))
        return CheckpointReader(io.BytesIO(numbers), len(numbers), nested=True).read()

    def tensor_of(self, record: Record, level: int) -> Tensor | Placeholder:
        """A view of a storage; BadPickle where that has fewer numbers."""
        storage, first, size, stride = arguments(record, Record, int, object, object)
        numbers, size, stride = (self.make(part, level) for part in (storage, size, stride))
        if isinstance(numbers, Placeholder):
            return numbers
        if not isinstance(numbers, Tensor) or numbers.ndim != 1:
            raise Damaged("a tensor without a storage")
        if record.name.endswith("_v3"):
            *_, dtype = arguments(record, *[object] * 6, type)
            if dtype.name not in DTYPES:
                raise Damaged("the dtype of a tensor")
            numbers = reinterpret(numbers, DTYPES[dtype.name])
        if not all(map(is_shape, (size, stride, (first,)))) or len(size) != len(stride):
            raise Damaged("the shape of a tensor")
        end = first + 1 + sum((extent - 1) * step for extent, step in zip(size, stride))
        count = math.prod(size)
        if count > len(numbers) or count and end > len(numbers):
            raise BadPickle(f"it holds a tensor of shape {size}, but not so many numbers")
        try:
            return numbers.as_strided(size, stride, numbers.storage_offset() + first)
        except RuntimeError as error:  # no numbers, and too large dimensions
            raise Damaged(str(error)) from error

    def tensor_of_subclass(self, record: Record, level: int):
        """A tensor with attributes or of a subclass, without these."""
        function, _, args = arguments(record, type, object, tuple)
        return self.make(function(*args), level)


def parse_reference(record: Record) -> tuple[torch.dtype, str, int, object]:
    """What torch.save says of a storage: dtype, key, count of numbers, which part of them it is."""
    saved_id, = arguments(record, tuple)
    word, kind, key, _, count, view = (*saved_id, *[None] * 6)[:6]
    if word != "storage" or not isinstance(kind, type) or not isinstance(key, str):
        raise Damaged("a reference to what is no storage")
    name = kind.name.rpartition(".")[2]
    if name not in STORAGE_DTYPES or not is_shape((count,)):
        raise Damaged(f"storage {key}")
    return STORAGE_DTYPES[name], key, count, view


def reinterpret(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bytes as numbers of another dtype; what is left at the end is left out."""
    if numbers.dtype == dtype:
        return numbers
    numbers = numbers.view(torch.uint8)
    return numbers[:len(numbers) // dtype.itemsize * dtype.itemsize].view(dtype)


DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
STORAGE_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.qint8, "QUInt8Storage": torch.quint8, "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2, "QUInt2x4Storage": torch.quint2x4,
}


def odd_tensor(kind: str):
    return lambda *_: Placeholder(f"tensor that is not plain numbers ({kind})")


MAKERS = {  # what a record of that name stands for
    Persistent.name: CheckpointReader.storage_of,
    "_codecs.encode": CheckpointReader.encoded,
    "builtins.bytes": CheckpointReader.encoded,
    "builtins.bytearray": CheckpointReader.bytearray_of,
    "builtins.complex": CheckpointReader.complex_of,
    "builtins.frozenset": CheckpointReader.set_of,
    "builtins.set": CheckpointReader.set_of,
    "collections.Counter": CheckpointReader.dict_of,
    "collections.OrderedDict": CheckpointReader.dict_of,
    "collections.defaultdict": CheckpointReader.dict_of,
    "collections.deque": CheckpointReader.list_of,
    "numpy.dtype": CheckpointReader.dtype_of,
    "torch.Size": lambda reader, record, level: tuple(reader.list_of(record, level)),
    "torch.nn.parameter.Parameter": CheckpointReader.first_of,
    "torch.storage._load_from_bytes": CheckpointReader.storage_of_bytes,
    "torch._tensor._rebuild_from_type_v2": CheckpointReader.tensor_of_subclass,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": CheckpointReader.first_of,
    "torch._utils._rebuild_device_tensor_from_numpy": CheckpointReader.first_of,
    "torch._utils._rebuild_meta_tensor_no_storage": odd_tensor("meta"),
    "torch._utils._rebuild_nested_tensor": odd_tensor("nested"),
    "torch._utils._rebuild_parameter": CheckpointReader.first_of,
    "torch._utils._rebuild_parameter_with_state": CheckpointReader.first_of,
    "torch._utils._rebuild_qtensor": odd_tensor("quantized"),
    "torch._utils._rebuild_sparse_tensor": odd_tensor("sparse"),
    "torch._utils._rebuild_tensor": CheckpointReader.tensor_of,
    "torch._utils._rebuild_tensor_v2": CheckpointReader.tensor_of,
    "torch._utils._rebuild_tensor_v3": CheckpointReader.tensor_of,
}
for core in ("core", "_core"):  # NumPy 1 and 2
    MAKERS |= {f"numpy.{core}.multiarray._reconstruct": CheckpointReader.array_of,
               f"numpy.{core}.multiarray.scalar": CheckpointReader.scalar_of,
               f"numpy.{core}.numeric._frombuffer": CheckpointReader.array_of_buffer}


def read_file(path: str | Path) -> dict:
    """The contents of a checkpoint, on the CPU: nested dicts, lists, tuples and sets of tensors,
    arrays, numbers, text and Placeholders.

    InputError saying why, if it cannot be opened, is damaged, is another kind of file, asks for
    functions to be called, or holds no dict.
    """
    path = Path(path)
    head = b""
    try:
        with open_regular(path) as file:
            head = file.read(512)
            file.seek(0)
            contents = CheckpointReader(file, file.size).read()
    except FileNotFoundError as error:
        raise InputError(f"no checkpoint at {path}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except BadPickle as error:
        reason = str(error)
        if isinstance(error, Damaged):
            reason = f"it is {describe_kind(path, head)}"
        raise InputError(f"{path} is no checkpoint that can be read safely: {reason}") from error
    if not isinstance(contents, dict):
        kind = contents.name if isinstance(contents, Placeholder) else type(contents).__name__
        raise InputError(f"{path} is no checkpoint: it holds a {kind}, not named tensors")
    return contents
