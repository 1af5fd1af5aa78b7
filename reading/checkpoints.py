"""Reads untrusted checkpoints, without executing code and with bounded memory.

    contents = read_file("grattvis_r50_ovis.pth")  # or .pt, .pkl: detected by content

containers.py locates the pickle and the tensor data of a file, pickles.py reads the pickle as data,
and CheckpointReader converts it to tensors, arrays and containers. Everything else becomes an inert
Placeholder. Memory is bounded by the amount of data in the file. Tests:
tests/test_reading_checkpoints.py, tests/faults.
"""

import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from reading.containers import Container, is_shape, parse_reference
from reading.kinds import describe_kind
from reading.pickles import BadPickle, Damaged, Persistent, Record, arguments, refusal
from reading.regular import open_regular
from runtime.errors import InputError

MAX_DEPTH = 100  # of nested containers
IN_PROGRESS = object()  # marks a container that is being converted


@dataclass(frozen=True, eq=False)
class Placeholder:
    """Something in a file that is not a tensor, array, container, number or text.

    Dates, paths, namespaces, configurations and optimizers are often stored with weights. `name` is
    their type, such as "pathlib.PosixPath"; nothing else is kept.
    """

    name: str


def name_of(record: Record) -> str:
    """The full name of a record's class, also in old protocols."""
    if record.name == "copyreg._reconstructor" and record.args and isinstance(record.args[0], type):
        return record.args[0].name
    return record.name


def hashable(key):
    """The key; Damaged if it cannot be in a dict or set."""
    try:
        hash(key)
    except TypeError as error:
        raise Damaged(str(error)) from error
    return key


class CheckpointReader:
    """Reads a checkpoint from a stream of `size` bytes.

    Objects that could be created repeatedly from the same bytes are charged to a budget, the size
    of the file. Valid files never exceed it, and small files cannot allocate much memory.
    """

    def __init__(self, stream: BinaryIO, size: int, nested: bool = False):
        """nested: the stream is inside another checkpoint, and may not contain further ones."""
        self.container, self.nested = Container(stream, size), nested
        self.budget = size
        self.made = {}  # id of a pickled object: (object, converted)
        self.storages: dict[str, Tensor] = {}  # one-dimensional, by key

    def read(self):
        """The contents: nested dicts, lists, tuples and sets; BadPickle if invalid."""
        return self.make(self.container.records)

    def spend(self, nbytes: int) -> None:
        """Charge memory to the budget; BadPickle if it is exceeded."""
        self.budget -= nbytes
        if self.budget < 0:
            raise BadPickle("it asks for more memory than it holds numbers")

    # Containers

    def make(self, thing, level: int = 0):
        """Convert a pickled object: containers are copied, records are replaced."""
        if isinstance(thing, type):
            return Placeholder(thing.name)
        if not isinstance(thing, (dict, list, tuple, set, frozenset, Record)):
            return thing
        _, made = self.made.get(id(thing), (None, None))
        if made is IN_PROGRESS:
            raise BadPickle("it holds a container that holds itself")
        if made is not None:
            return made
        if level > MAX_DEPTH:
            raise BadPickle(f"it holds more than {MAX_DEPTH} containers inside one another")
        self.made[id(thing)] = thing, IN_PROGRESS
        if isinstance(thing, Record):
            maker = MAKERS.get(thing.name)
            made = maker(self, thing, level + 1) if maker else Placeholder(name_of(thing))
        elif isinstance(thing, dict):
            made = {key: self.make(value, level + 1) for key, value in thing.items()}
        elif isinstance(thing, (set, frozenset)):
            made = type(thing)(self.make_set(thing, level + 1))
        else:
            made = type(thing)(self.make(item, level + 1) for item in thing)
        self.made[id(thing)] = thing, made  # keeping `thing` keeps its id unique
        return made

    def make_set(self, items, level: int) -> set:
        """The set of the converted items."""
        return {hashable(self.make(item, level)) for item in items}

    def set_of(self, record: Record, level: int) -> set | frozenset:
        """A set or frozenset."""
        made = self.make_set(self.items_of(record), level)
        return frozenset(made) if record.name == "builtins.frozenset" else made

    def list_of(self, record: Record, level: int) -> list:
        """Convert a deque to a list."""
        return [self.make(item, level) for item in self.items_of(record)]

    def dict_of(self, record: Record, level: int) -> dict:
        """Convert OrderedDict, defaultdict (without its factory) and Counter to dict."""
        pairs = self.items_of(record)
        if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
            raise Damaged(f"the items of {record.name}")
        return {hashable(key): self.make(value, level) for key, value in pairs}

    def items_of(self, record: Record) -> list:
        """The items of a container: those of its constructor, and those added."""
        items = []
        for argument in record.args:
            if isinstance(argument, (dict, list, tuple, set, frozenset)):
                items += argument.items() if isinstance(argument, dict) else argument
                self.spend(len(argument))
        return items + record.items

    def first_of(self, record: Record, level: int):
        """The tensor of a Parameter, or of a tensor of another device."""
        return self.make(*arguments(record, Record), level)

    def bytes_of(self, data) -> bytes:
        """Bytes; protocols 0 to 2 store them as text with a call of _codecs.encode."""
        if isinstance(data, Record) and data.name == "_codecs.encode":
            (data,) = arguments(data, str)
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
        """Bytes, charged to the budget."""
        data = self.bytes_of(record)
        self.spend(len(data))
        return data

    def bytearray_of(self, record: Record, level: int) -> bytearray:
        """A bytearray with contents; one of a given length is rejected."""
        if not record.args:
            return bytearray()
        if isinstance(record.args[0], int):  # so many zeros
            raise refusal(record.name)
        data = bytearray(self.bytes_of(record.args[0]))
        self.spend(len(data))
        return data

    def complex_of(self, record: Record, level: int) -> complex:
        """A complex number."""
        return complex(*arguments(record, float, float))

    # NumPy

    def dtype_of(self, record: Record, level: int) -> np.dtype | Placeholder:
        """A numeric dtype; other properties of a pickled dtype are ignored."""
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
        """An array: _reconstruct creates an empty one, and the state fills it."""
        state, record.state = record.state, None  # releases the memory
        if not isinstance(state, tuple) or len(state) != 5:
            return Placeholder("numpy.ndarray without numbers")
        _, shape, dtype, by_column, numbers = state
        return self.make_array(shape, dtype, "F" if by_column else "C", numbers, level)

    def array_of_buffer(self, record: Record, level: int) -> np.ndarray | Placeholder:
        """An array of protocol 5."""
        numbers, dtype, shape, order = arguments(record, object, object, tuple, str)
        record.args = ()
        return self.make_array(shape, dtype, "F" if order == "F" else "C", numbers, level)

    def make_array(self, shape, dtype, order: str, numbers, level: int) -> np.ndarray | Placeholder:
        """An array from bytes; a Placeholder if the dtype is not numeric."""
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
        # A copy, because PyTorch requires writable arrays.
        return array.astype(dtype.newbyteorder("="))

    def scalar_of(self, record: Record, level: int) -> np.generic | Placeholder:
        """A NumPy scalar."""
        dtype, number = arguments(record, Record, object)
        array = self.make_array((), dtype, "C", number, level)
        return array if isinstance(array, Placeholder) else array[()]

    # PyTorch

    def storage_of(self, record: Record, level: int) -> Tensor | Placeholder:
        """The data of a storage reference."""
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
        return numbers[first : first + count]

    def read_storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        """The storage of a key, read on first use."""
        if key not in self.storages:
            first, nbytes = self.container.find_storage(key, dtype, count)
            self.spend(nbytes)
            self.storages[key] = self.container.read_storage(first, dtype, count)
        return self.storages[key]

    def storage_of_bytes(self, record: Record, level: int):
        """A storage inside a pickle, which is itself a file of torch.save."""
        numbers = self.bytes_of(*arguments(record, object))
        record.args = ()  # releases the memory
        if self.nested:
            raise BadPickle("it holds files inside one another")
        self.spend(len(numbers))
        return CheckpointReader(io.BytesIO(numbers), len(numbers), nested=True).read()

    def tensor_of(self, record: Record, level: int) -> Tensor | Placeholder:
        """A view of a storage; BadPickle if it exceeds the storage."""
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
        """A tensor of a subclass or with attributes, as a plain tensor."""
        function, _, args = arguments(record, type, object, tuple)
        return self.make(function(*args), level)


def reinterpret(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """View the same bytes as another dtype; remaining bytes are dropped."""
    if numbers.dtype == dtype:
        return numbers
    numbers = numbers.view(torch.uint8)
    return numbers[: len(numbers) // dtype.itemsize * dtype.itemsize].view(dtype)


DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


def odd_tensor(kind: str):
    """A function that creates a Placeholder for a tensor that is not strided and numeric."""
    return lambda *_: Placeholder(f"tensor that is not plain numbers ({kind})")


MAKERS = {  # converters of records by name
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
    MAKERS |= {
        f"numpy.{core}.multiarray._reconstruct": CheckpointReader.array_of,
        f"numpy.{core}.multiarray.scalar": CheckpointReader.scalar_of,
        f"numpy.{core}.numeric._frombuffer": CheckpointReader.array_of_buffer,
    }


def read_file(path: str | Path) -> dict:
    """Read the contents of a checkpoint on the CPU.

    Returns nested dicts, lists, tuples and sets of tensors, arrays, numbers, text and Placeholders.
    Raises InputError if the file cannot be opened, is damaged or of another kind, requests function
    calls, or contains no dict.
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
