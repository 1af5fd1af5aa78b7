"""Untrusted checkpoints: all containers give the same contents, and no code is executed."""

import argparse
import collections
import datetime
import enum
import io
import os
import pickle
import shutil
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path
from xml.dom import minidom

import numpy as np
import pytest
import torch

from checkpoint import SHIPPED_WEIGHTS
from reading.checkpoints import Placeholder, read_file
from runtime.errors import InputError

CONTAINERS = ["archive", "older", "pickle 2", "pickle 4"]


def write(contents, path, container):
    """As torch.save, the torch.save of before 2020, or pickle.dump write it."""
    if container.startswith("pickle"):
        path.write_bytes(pickle.dumps(contents, int(container[-1])))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=container == "archive")
    return path


def refusal(path):
    with pytest.raises(InputError) as refused:
        read_file(path)
    message = str(refused.value)
    assert str(path) in message and len(message.splitlines()) == 1
    return message.removeprefix(f"{path} ")


# What is read

GRID = torch.arange(12.0).reshape(3, 4)
TENSORS = {
    "plain": GRID,
    "transposed": GRID.T,
    "part": GRID[1:, 2:],
    "number": torch.tensor(5),
    "empty": torch.empty(0, 3),
    "parameter": torch.nn.Parameter(GRID.clone()),
    "buffer": torch.nn.Buffer(GRID.clone()),
    "half": GRID.half(),
    "bfloat16": GRID.bfloat16(),
    "double": GRID.double(),
    "int64": torch.arange(3),
    "uint16": torch.ones(2, dtype=torch.uint16),
    "float8": GRID.to(torch.float8_e4m3fn),
    "complex": GRID + 1j,
    "bool": GRID > 3,
}
ARRAYS = {
    "plain": GRID.numpy(),
    "by columns": np.asfortranarray(GRID.numpy()),
    "half": np.ones(3, np.float16),
    "bytes": np.arange(3, dtype=np.uint8),
    "bool": GRID.numpy() > 3,
    "number": np.array(2.5),
    "empty": np.zeros((0, 3)),
    "big-endian": np.arange(3, dtype=">f4"),
    "float32": np.float32(1.5),
    "int64": np.int64(3),
    "bool_": np.bool_(True),
}
CONTENTS = {
    "ordered": collections.OrderedDict(b=1, a=2),
    "default": collections.defaultdict(list, a=[1]),
    "counter": collections.Counter("aab"),
    "set": {1, 2},
    "frozen": frozenset({"a"}),
    "tuple": (1, [2, (3,)]),
    "size": torch.Size([1, 2]),
    "bytes": b"a\xff",
    "empty": b"",
    "bytearray": bytearray(b"a\xff"),
    "complex": 1 + 2j,
    "large": 10**30,
    "none": None,
    "dtype": np.dtype("f4"),
    "text": "\u4e2d",
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_tensors_are_read_bit_by_bit(tmp_path, container):
    found = read_file(write(TENSORS, tmp_path / "weights", container))
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].tolist() == tensor.tolist(), name


@pytest.mark.parametrize("container", CONTAINERS)
def test_arrays_are_read_and_can_become_tensors(tmp_path, container):
    found = read_file(write(ARRAYS, tmp_path / "weights", container))
    for name, array in ARRAYS.items():
        assert np.array_equal(found[name], array), name
        assert found[name].dtype == array.dtype.newbyteorder("="), name
        assert torch.from_numpy(np.asarray(found[name])).tolist() == array.tolist(), name


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers_and_numbers_are_read(tmp_path, container):
    assert read_file(write(CONTENTS, tmp_path / "weights", container)) == CONTENTS


@pytest.mark.parametrize("container", CONTAINERS)
def test_tensors_that_share_numbers_still_do(tmp_path, container):
    """Tied weights take their memory once."""
    shared = torch.zeros(4)
    found = read_file(write({"a": shared, "b": {"c": shared}}, tmp_path / "weights", container))
    found["a"][0] = 7
    assert found["b"]["c"][0] == 7


@pytest.mark.parametrize("container", ["archive", "older"])
def test_the_same_is_read_as_by_pytorch(tmp_path, container):
    contents = torch.load(SHIPPED_WEIGHTS, weights_only=True)
    found = read_file(write(contents, tmp_path / "weights.pt", container))
    assert found["config"] == contents["config"]
    assert found["model"].keys() == contents["model"].keys()
    for name, tensor in found["model"].items():
        assert torch.equal(tensor, contents["model"][name])


def test_the_content_decides_and_not_the_name(tmp_path):
    for container in CONTAINERS:
        for suffix in (".pth", ".pkl", ".pt", ""):
            path = write({"a": torch.ones(2)}, tmp_path / f"weights{suffix}", container)
            assert read_file(path)["a"].tolist() == [1, 1]


def test_an_archive_of_a_machine_with_the_other_byte_order(tmp_path):
    source, target = tmp_path / "little.pth", tmp_path / "big.pth"
    torch.save({"a": torch.tensor([1.5, -2.0])}, source)
    with zipfile.ZipFile(source) as little, zipfile.ZipFile(target, "w") as big:
        for name in little.namelist():
            content = little.read(name)
            content = b"big" if name.endswith("byteorder") else content
            content = struct.pack(">2f", 1.5, -2) if name.endswith("data/0") else content
            big.writestr(name, content)
    assert read_file(target)["a"].tolist() == [1.5, -2]


# What is ignored


class Unknown:
    """A class of another program that records what is done with it."""

    calls = []

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return Unknown, self.arguments, {"state": 1}, iter([1]), iter([("key", 2)])

    def __getattribute__(self, name):
        Unknown.calls.append(name)
        return object.__getattribute__(self, name)


class Settings(dict):
    """As EasyDict, yacs' CfgNode or mmengine's ConfigDict."""

    __getattr__ = dict.__getitem__

    def __setitem__(self, key, value):
        Unknown.calls.append(key)
        super().__setitem__(key, value)


class Color(enum.Enum):
    RED = 1


class Zone:
    """As zoneinfo.ZoneInfo: made by a method, which old protocols look up by getattr."""

    @classmethod
    def _unpickle(cls, key):
        Unknown.calls.append(key)

    def __reduce__(self):
        return Zone._unpickle, ("UTC",)


class Keywords:
    """Made with keywords, for which old protocols use functools.partial."""

    def __new__(cls, *, key):
        Unknown.calls.append(key)
        return object.__new__(cls)

    def __getnewargs_ex__(self):
        return (), {"key": 1}


NEIGHBOURS = {
    "path": Path("a/b"),
    "date": datetime.datetime(2024, 5, 6, tzinfo=datetime.timezone.utc),
    "namespace": argparse.Namespace(lr=1, output=Path("x")),
    "enum": Color.RED,
    "settings": Settings(a=Settings(b=1)),
    "unknown": Unknown(1),
    "class": Unknown,
    "zone": Zone(),
    "keywords": Keywords(key=1),
    "module": torch.nn.Linear(2, 2),
    "dtype": torch.float32,
    "device": torch.device("cpu"),
    "optimizer": torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1),
    "version": torch.torch_version.TorchVersion("2.1"),
    "random": np.random.default_rng(0),
    "objects": np.array([{}, None], dtype=object),
    "days": np.array(["2024-05-06"], "M8[D]"),
    "sparse": torch.eye(2).to_sparse(),
    "meta": torch.empty(2, device="meta"),
    "names": np.array(["a", "b"]),
    "numpy type": np.float32,
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_sits_next_to_weights_is_ignored(tmp_path, container):
    """Each becomes a placeholder, and no method of a class is called."""
    path = write({"model": {"a": GRID}} | NEIGHBOURS, tmp_path / "weights", container)
    Unknown.calls.clear()
    found = read_file(path)
    assert not Unknown.calls
    assert found["model"]["a"].tolist() == GRID.tolist()
    for name in NEIGHBOURS:
        assert isinstance(found[name], Placeholder), name
    assert found["namespace"].name == "argparse.Namespace"
    assert found["settings"].name.endswith(".Settings")


def test_a_class_that_does_not_exist_is_ignored(tmp_path):
    """Neither is its module imported: of a training tool that is not installed."""
    content = b"(dS'a'\n(imissing_tool.config\nConfig\n(dS'b'\nI1\nsbsS'c'\nI2\ns."  # protocol 0
    (tmp_path / "weights.pkl").write_bytes(content)
    found = read_file(tmp_path / "weights.pkl")
    assert found["a"].name == "missing_tool.config.Config" and found["c"] == 2


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_whole_model_is_no_state_dict(tmp_path, container):
    path = write(torch.nn.Linear(2, 2), tmp_path / "model", container)
    assert "it holds a torch.nn.modules.linear.Linear, not named tensors" in refusal(path)


# What is refused


class Call:
    """Requests a function call when unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HOSTILE = {
    "posix.system": (os.system, "touch harm"),
    "builtins.eval": (eval, "open('harm', 'w')"),
    "builtins.exec": (exec, "open('harm', 'w')"),
    f"{open.__module__}.open": (open, "harm", "w"),
    "subprocess.Popen": (subprocess.Popen, ["touch", "harm"]),
    "xml.dom.minidom.parseString": (minidom.parseString, "<a/>"),
    "shutil.copy": (shutil.copy, "/etc/hostname", "harm"),
    "builtins.__import__": (__import__, "harm"),
    "builtins.compile": (compile, "1", "", "exec"),
    "builtins.bytearray": (bytearray, 2**34),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_calls_functions_is_refused_by_name(tmp_path, monkeypatch, container, name):
    """Also where the call is far from any weight."""
    monkeypatch.chdir(tmp_path)
    contents = {"model": {"a": GRID}, "note": [Call(*HOSTILE[name])]}
    message = refusal(write(contents, tmp_path / "hostile", container))
    assert f"is no checkpoint that can be read safely: it asks for {name}, " in message
    assert [file.name for file in tmp_path.iterdir()] == ["hostile"]


def test_a_method_that_is_looked_up_is_not_called(tmp_path):
    (tmp_path / "harm").touch()
    method = pickle.dumps({"a": Call(getattr, tmp_path / "harm", "unlink")}, 2)
    (tmp_path / "hostile.pkl").write_bytes(method[: method.rindex(b"s.")] + b")Rs.")  # call it
    assert "a call of what builtins.getattr returns" in refusal(tmp_path / "hostile.pkl")
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize("container", CONTAINERS)
def test_functions_of_other_packages_are_not_called_either(tmp_path, container):
    harm = str(tmp_path / "harm.npy")
    contents = {"a": Call(torch.save, [1], harm), "b": Call(np.save, harm, [1])}
    found = read_file(write(contents, tmp_path / "hostile", container))
    assert found["b"].name == "numpy.save"
    assert [file.name for file in tmp_path.iterdir()] == ["hostile"]


@pytest.mark.parametrize(
    "call", [Call(os.system, "touch harm"), Call(torch.storage._load_from_bytes, b"x")]
)
def test_a_pickle_inside_of_a_pickle_is_no_way_around(tmp_path, monkeypatch, call):
    """The numbers of a tensor in a .pkl are a file of torch.save themselves."""
    monkeypatch.chdir(tmp_path)
    contents = {"a": Call(torch.storage._load_from_bytes, pickle.dumps(call))}
    path = write(contents, tmp_path / "hostile.pkl", "pickle 4")
    assert "is no checkpoint that can be read safely: it " in refusal(path)
    assert [file.name for file in tmp_path.iterdir()] == ["hostile.pkl"]


def storage_bytes(count):
    stream = io.BytesIO()
    numbers = torch.zeros(count).untyped_storage()
    torch.save(numbers, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


NUMBERS = bytes(10**6)
REPEATED = {
    "storage": (torch.storage._load_from_bytes, storage_bytes(250_000)),
    "array": (np.zeros(1).__reduce_ex__(5)[0], NUMBERS, np.dtype("f4"), (250_000,), "C"),
    "bytearray": (bytearray, NUMBERS),
    "set": (set, list(range(10**4))),
    "dict": (collections.OrderedDict, dict.fromkeys(range(10**4))),
}


@pytest.mark.parametrize("kind", REPEATED)
def test_the_same_bytes_cannot_be_asked_for_again_and_again(tmp_path, kind):
    """10,000 times a megabyte, or as many items: gigabytes, if they were made."""
    things = [Call(*REPEATED[kind]) for _ in range(10_000)]
    path = write({"a": things}, tmp_path / "bomb.pkl", "pickle 4")
    assert path.stat().st_size < 4 * 10**6
    assert refusal(path).endswith("it asks for more memory than it holds numbers")


def test_containers_in_themselves_and_too_deep_ones(tmp_path):
    endless, deep = [], []
    endless.append(endless)
    for _ in range(200):
        deep = [deep]
    for thing, expected in ((endless, "holds itself"), (deep, "more than 100 containers")):
        assert expected in refusal(write({"a": thing}, tmp_path / "nested.pkl", "pickle 4"))


# What is no checkpoint

TRUNCATED = pickle.dumps({"a": np.ones(100)}, 4)[:-50]
KINDS = {
    "empty": (b"", "it is empty"),
    "page": (b"\n<!DOCTYPE HTML>\n<html>Sign in</html>", "it is a web page"),
    "bucket": (
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "it is an XML document",
    ),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n",
        "it is a Git LFS pointer",
    ),
    "safetensors": (
        b'\x30\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        "it is a safetensors file",
    ),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(50), "it is an HDF5 file"),
    "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0", "it is an ONNX model"),
    "model.ckpt.index": (b"\0\0\1\2\3" * 20, "it is a TensorFlow file"),
    "page with a mark": (b"\xef\xbb\xbf<!doctype html><html>", "it is a web page"),
    "MODEL.CKPT.INDEX": (b"\0\0\1\2\3" * 20, "it is a TensorFlow file"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(20), "it is packed by gzip"),
    "text": (b"hello world\n", "it is text, beginning with 'hello world'"),
    "zeros": (bytes(5000), "it is nothing but zeros where it begins"),
    "noise": (bytes(range(130, 250)), "it is damaged, or another kind of file"),
    "cut": (TRUNCATED, "it is damaged, or cut short"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_file_is_called_what_it_is(tmp_path, kind):
    content, expected = KINDS[kind]
    (tmp_path / kind).write_bytes(content)
    message = refusal(tmp_path / kind)
    assert message.startswith(f"is no checkpoint that can be read safely: {expected}")


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_half_a_download_is_damaged(tmp_path, container, share):
    path = write({"a": torch.ones(10_000)}, tmp_path / "weights", container)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert refusal(path).endswith("it is damaged, or cut short")


def test_other_archives(tmp_path):
    np.savez(tmp_path / "arrays.npz", a=np.ones(3))
    for archive, entries in (
        ("photos.zip", ["a.txt"]),
        ("program.pt", ["net/data.pkl", "net/constants.pkl"]),
    ):
        with zipfile.ZipFile(tmp_path / archive, "w") as target:
            for entry in entries:
                target.writestr(entry, b"\x80\x02N.")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    for name, expected in (
        ("arrays.npz", "it is a ZIP archive of NumPy arrays (.npz)"),
        ("program.pt", "it is a program (torch.jit.save)"),
        ("photos.zip", "it is a ZIP archive of other files, such as 'a.txt'"),
        ("packed.pth", "it is a ZIP archive that is packed"),
    ):
        assert expected in refusal(tmp_path / name)


# What the system does not let us read


def test_what_cannot_be_opened_is_not_called_damaged(tmp_path):
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    (tmp_path / "gone.pth").symlink_to("nowhere.pth")
    (tmp_path / "file").write_text("")
    assert refusal(tmp_path) == "is a folder, not a regular file"
    assert refusal(tmp_path / "loop.pth") == "cannot be read: Too many levels of symbolic links"
    assert refusal(tmp_path / "file/a.pth") == "cannot be read: Not a directory"
    for name in ("gone.pth", "missing.pth"):
        assert refusal(tmp_path / name) == f"no checkpoint at {tmp_path / name}"


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users")
def test_no_permission(tmp_path):
    path = write({"a": 1}, tmp_path / "weights.pth", "archive")
    path.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:  # root may read everything
            os.seteuid(65534)
        assert refusal(path) == "cannot be read: Permission denied"
    finally:
        os.seteuid(user)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_a_read_that_fails():
    assert refusal(Path("/proc/self/mem")) == "cannot be read: Input/output error"


def test_no_pipe_and_no_device_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "endless.pkl").symlink_to("/dev/zero")
    assert refusal(tmp_path / "pipe.pth") == "is a FIFO, not a regular file"
    assert refusal(tmp_path / "endless.pkl") == "is a device, not a regular file"


def test_a_tar_archive_is_called_one(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    with tarfile.open(tmp_path / "weights.pth", "w") as archive:
        archive.add(tmp_path / "a", "a")
    with pytest.raises(InputError, match="it is a tar archive: unpack it first"):
        read_file(tmp_path / "weights.pth")


def test_more_tuples_than_can_be_read_are_refused(tmp_path):
    """Python's own stack could overflow at many of them inside one another."""
    many = [(number, -number) for number in range(50_001)]
    message = refusal(write({"model": {"a": GRID}, "note": many}, tmp_path / "a.pkl", "pickle 2"))
    assert "tuples, more than the 50000 that can be read" in message


class Storage:
    """Pickled as a reference to a part of a storage, as PyTorch wrote it until 2017."""


class ViewPickler(pickle.Pickler):
    def persistent_id(self, thing):
        if isinstance(thing, Storage):
            return "storage", torch.FloatStorage, "7", "cpu", 10, ("8", 2, 6)
        return None


class View:
    """A tensor of the second to sixth of those six numbers."""

    def __reduce__(self):
        return torch._utils._rebuild_tensor, (Storage(), 1, (5,), (1,))


def test_a_view_of_a_storage_begins_where_it_says(tmp_path):
    stream = io.BytesIO()
    for contents in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(contents, stream, 2)
    ViewPickler(stream, 2).dump({"model": {"a": View()}})
    pickle.dump(["7"], stream, 2)
    stream.write(struct.pack("<q", 10) + np.arange(10, dtype="<f4").tobytes())
    (tmp_path / "old.pth").write_bytes(stream.getvalue())
    assert read_file(tmp_path / "old.pth")["model"]["a"].tolist() == [3, 4, 5, 6, 7]


class Saved:
    """Pickled as torch pickles storages: as a file of torch.save inside the pickle."""

    def __init__(self, contents):
        self.contents = contents

    def __reduce__(self):
        stream = io.BytesIO()
        torch.save(self.contents, stream, _use_new_zipfile_serialization=False)
        return torch.storage._load_from_bytes, (stream.getvalue(),)


def test_files_inside_one_another_are_refused(tmp_path):
    """One level is what torch writes; more could be as deep as they like."""
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"a": Saved({"b": Saved({"c": 1})})}))
    assert "it holds files inside one another" in refusal(path)
