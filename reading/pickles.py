"""Reads pickles as data: nothing that a pickle names is imported or called.

    contents, references = read_pickle(stream)  # containers, numbers, text, and Records

A pickle is a small program. For everything except numbers, text and plain containers, it contains
instructions to import a name, call it with arguments, and set its state. Here, each name becomes a
subclass of Record, whose instances only store the arguments and the state. checkpoints.py converts
the records of known names, such as tensors.

Safety does not depend on a list of forbidden names. Nevertheless, files that name anything in
Python's standard library except data types (os.system, eval, subprocess.Popen) are rejected.
Names of other packages are allowed, because configurations and optimizers are stored with weights.
"""

import pickle
import pickletools
import sys
from typing import BinaryIO

MAX_TUPLES = 50_000  # Python's stack overflows at 200,000 nested tuples
MAX_NAMES = 10_000  # distinct names; each becomes a class of about a kilobyte
MAX_NAME_CHARACTERS = 300
MEMO_OPCODES = {"PUT", "BINPUT", "LONG_BINPUT"}
TUPLE_OPCODES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}

# Python 2 names of modules, which Python 3 still writes in protocols 0 to 2.
RENAMED_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "commands": "subprocess"}
# Data types of the standard library. Python 3.11 writes some enum members with "getattr".
DATA_TYPES = {
    module: set(names.split())
    for module, names in {
        "_codecs": "encode",
        "argparse": "Namespace",
        "array": "array _array_reconstructor",
        "builtins": "Ellipsis NotImplemented bool bytearray bytes complex dict float frozenset "
        "getattr int list long object range set slice str tuple type unicode xrange",
        "collections": "ChainMap Counter OrderedDict UserDict UserList UserString defaultdict "
        "deque",
        "copyreg": "_reconstructor",
        "datetime": "date datetime time timedelta timezone",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "functools": "partial",
        "ipaddress": "IPv4Address IPv6Address",
        "logging": "Logger getLogger",
        "_operator": "getitem",
        "numbers": "Number",
        "operator": "attrgetter itemgetter",
        "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
        "pathlib._local": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
        "random": "Random",
        "re": "_compile",
        "time": "struct_time",
        "types": "GenericAlias MappingProxyType NoneType SimpleNamespace",
        "typing": "Any Callable Dict List Literal Optional Sequence Set Tuple Union",
        "uuid": "SafeUUID UUID",
        "zoneinfo": "ZoneInfo ZoneInfo._unpickle",
    }.items()
}


class BadPickle(Exception):
    """Why a pickle is rejected, as the end of a sentence: "it asks for os.system, ..."."""


class Damaged(BadPickle):
    """The pickle is damaged, or the file is of another kind."""


class Record:
    """An object as described by a pickle: arguments, state and items."""

    __slots__ = ("args", "items", "state")
    name = ""  # "module.name", in the subclass made for it

    def __new__(cls, *args, **_):
        record = object.__new__(cls)
        record.args, record.state, record.items = args, None, []
        return record

    def __setstate__(self, state) -> None:
        self.state = state

    def __setitem__(self, key, value) -> None:
        self.items.append((key, value))

    def append(self, item) -> None:
        self.items.append(item)

    add = append

    def __call__(self, *_) -> "Record":
        """Reject calls of returned objects, except for constructors.

        Protocols 0 to 2 look these up with getattr and may wrap them into functools.partial.
        """
        wrapped = self.args[:1] if self.name == "functools.partial" else (self,)
        for function in wrapped:
            if isinstance(function, Record) and function.args[1:] in (("__new__",), ("_unpickle",)):
                return self
        raise refusal(f"a call of what {self.name} returns")


def arguments(record: Record, *types: type) -> tuple:
    """The first arguments of a record; Damaged unless they are of these types."""
    first = record.args[: len(types)]
    if len(first) < len(types) or not all(map(isinstance, first, types)):
        raise Damaged(f"the arguments of {record.name}")
    return first


def refusal(what: str) -> BadPickle:
    return BadPickle(f"it asks for {what}, which is neither a tensor, an array nor other data")


class RecordUnpickler(pickle.Unpickler):
    """Creates Records for everything that is not part of the pickle format itself."""

    def __init__(self, stream: BinaryIO):
        super().__init__(stream, encoding="latin1")  # required by NumPy for files of Python 2
        self.classes = {}
        self.references = []

    def find_class(self, module: str, name: str) -> type[Record]:
        """The Record class of a name; BadPickle if the name is not allowed."""
        module = RENAMED_MODULES.get(module, module)
        full_name = f"{module}.{name}"
        if not full_name.isprintable() or len(full_name) > MAX_NAME_CHARACTERS:
            raise Damaged("a name that nothing has")
        standard = module.partition(".")[0] in sys.stdlib_module_names
        if standard and name not in DATA_TYPES.get(module, ()):
            raise refusal(full_name)
        if full_name not in self.classes:
            if len(self.classes) == MAX_NAMES:
                raise BadPickle(f"it asks for more than {MAX_NAMES} different names")
            fields = {"__slots__": (), "name": full_name}
            self.classes[full_name] = type("Record", (Record,), fields)
        return self.classes[full_name]

    def persistent_load(self, saved_id) -> Record:
        """A reference to data outside the pickle, such as the numbers of a tensor."""
        if isinstance(saved_id, tuple) and saved_id[:1] == ("module",) and len(saved_id) > 1:
            return saved_id[1]  # a class; old versions of PyTorch also store its source
        self.references.append(Persistent(saved_id))
        return self.references[-1]


class Persistent(Record):
    """A reference to data outside the pickle, identified by its only argument."""

    __slots__ = ()
    name = "persistent"


def check_pickle(stream: BinaryIO) -> None:
    """Reject pickles that would make Python allocate too much memory or overflow its stack.

    Reads to the end of the pickle. `stream` must not allocate more memory than it has data.
    """
    tuples = 0
    for position, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        # Python allocates memory for all smaller indices. Valid pickles number them in order.
        if opcode.name in MEMO_OPCODES and argument > position:
            raise Damaged(f"place {argument} of the memo at operation {position}")
        tuples += opcode.name in TUPLE_OPCODES
    if tuples > MAX_TUPLES:
        raise BadPickle(f"it holds {tuples} tuples, more than the {MAX_TUPLES} that can be read")


def read_pickle(stream: BinaryIO) -> tuple[object, list[Persistent]]:
    """Read the next pickle of a stream: containers, numbers, text and Records; and its references.

    `stream` must be seekable, and its `read` must not allocate more memory than it has data.
    Raises BadPickle if the pickle cannot be read.
    """
    start = stream.tell()
    try:
        check_pickle(stream)
        stream.seek(start)
        unpickler = RecordUnpickler(stream)
        return unpickler.load(), unpickler.references
    except (BadPickle, OSError):
        raise
    except Exception as error:  # Python's unpickler raises almost anything on a damaged pickle
        raise Damaged(str(error)) from error
