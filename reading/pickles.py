"""Pickles read as data: nothing that a pickle names is imported, looked up or called.

    contents, references = read_pickle(stream)    # containers, numbers, text, Records of all else

A pickle is a small program. For everything but numbers, text and plain containers it says: import
this name, call it with these arguments, hand it this state. Here, a name becomes a class of its
own below Record, and an "object" of it only keeps the arguments and the state. Who knows a name,
such as that of a tensor, makes the real thing from the record (checkpoints.py).

Safety does not depend on a list of bad names. Yet a file that asks for something of Python's own
library other than a data type (os.system, eval, subprocess.Popen) is refused by name, as no honest
file has a use for it. Names of all other packages are admitted: they may sit next to weights, as a
configuration or an optimizer does.
"""
import pickle
import pickletools
import sys
from typing import BinaryIO

MOST_TUPLES = 50_000  # in a pickle; Python's stack overflows at 200,000 inside one another
MOST_NAMES = 10_000   # different ones; each becomes a class, of about a kilobyte
MOST_CHARACTERS = 300  # of a name
MEMO_OPCODES = {"PUT", "BINPUT", "LONG_BINPUT"}
TUPLE_OPCODES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}

# What Python 2 called these modules, and Python 3 still writes in protocols 0 to 2.
RENAMED_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "commands": "subprocess"}
# The data types of Python's own library. "getattr" is how Python 3.11 writes some enum members.
DATA_TYPES = {module: set(names.split()) for module, names in {
    "_codecs": "encode",
    "argparse": "Namespace",
    "array": "array _array_reconstructor",
    "builtins": "Ellipsis NotImplemented bool bytearray bytes complex dict float frozenset "
                "getattr int list long object range set slice str tuple type unicode xrange",
    "collections": "ChainMap Counter OrderedDict UserDict UserList UserString defaultdict deque",
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
}.items()}


class BadPickle(Exception):
    """Why a pickle is refused, as the end of a sentence: "it asks for os.system, ..."."""


class Damaged(BadPickle):
    """It is not what a pickle looks like: damaged, or another kind of file."""


class Record:
    """An object as the pickle describes it: the arguments, the state, the items."""
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
        """Calling what a call returned is refused, but for constructors: protocols 0 to 2 look
        these up by getattr, and may wrap them into functools.partial."""
        wrapped = self.args[:1] if self.name == "functools.partial" else (self,)
        for function in wrapped:
            if isinstance(function, Record) and function.args[1:] in (("__new__",), ("_unpickle",)):
                return self
        raise refusal(f"a call of what {self.name} returns")


def arguments(record: Record, *types: type) -> tuple:
    """The first arguments of a record; Damaged unless they are of these types."""
    found = record.args[:len(types)]
    if len(found) < len(types) or not all(map(isinstance, found, types)):
        raise Damaged(f"the arguments of {record.name}")
    return found


def refusal(what: str) -> BadPickle:
    return BadPickle(f"it asks for {what}, which is neither a tensor, an array nor other data")


class RecordUnpickler(pickle.Unpickler):
    """Makes Records of all that is not part of the pickle format itself."""

    def __init__(self, stream: BinaryIO):
        super().__init__(stream, encoding="latin1")  # as NumPy asks for, of files of Python 2
        self.classes = {}
        self.references = []

    def find_class(self, module: str, name: str) -> type[Record]:
        """The class of Records for a name; BadPickle if no honest file has a use for the name."""
        module = RENAMED_MODULES.get(module, module)
        full_name = f"{module}.{name}"
        if not full_name.isprintable() or len(full_name) > MOST_CHARACTERS:
            raise Damaged("a name that nothing has")
        standard = module.partition(".")[0] in sys.stdlib_module_names
        if standard and name not in DATA_TYPES.get(module, ()):
            raise refusal(full_name)
        if full_name not in self.classes:
            if len(self.classes) == MOST_NAMES:
                raise BadPickle(f"it asks for more than {MOST_NAMES} different names")
            fields = {"__slots__": (), "name": full_name}
            self.classes[full_name] = type("Record", (Record,), fields)
        return self.classes[full_name]

    def persistent_load(self, saved_id) -> Record:
        """What the pickle refers to and does not hold, such as the numbers of a tensor."""
        if isinstance(saved_id, tuple) and saved_id[:1] == ("module",) and len(saved_id) > 1:
            return saved_id[1]  # a class, next to which old versions of PyTorch put its source
        self.references.append(Persistent(saved_id))
        return self.references[-1]


class Persistent(Record):
    """A reference; its only argument says to what."""
    __slots__ = ()
    name = "persistent"


def check_pickle(stream: BinaryIO) -> None:
    """Refuse a pickle that would make Python take memory that it does not fill, or overflow its
    stack. Reads to the end of the pickle; `stream` must not take memory for more than it has."""
    tuples = 0
    for position, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        # memory for all places below is taken; those who write pickles number them as they come
        if opcode.name in MEMO_OPCODES and argument > position:
            raise Damaged(f"place {argument} of the memo at operation {position}")
        tuples += opcode.name in TUPLE_OPCODES
    if tuples > MOST_TUPLES:
        raise BadPickle(f"it holds {tuples} tuples, more than the {MOST_TUPLES} that can be read")


def read_pickle(stream: BinaryIO) -> tuple[object, list[Persistent]]:
    """The next pickle of a stream, as containers, numbers, text and Records, and its references.

    `stream` must be seekable, and its `read` may not take memory for more than the stream has.
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
