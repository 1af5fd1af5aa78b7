"""Fuzzing of every loader: each damaged file ends in success or in a one-line InputError.

    python tests/faults/fuzz.py annotations 10000   # or results, pth, pkl, pictures
    python tests/faults/fuzz.py pkl 1 --first 4711  # a single input; the file stays in --folder

Input i of a loader is always the same, except for memory addresses in old checkpoints. Inputs run
in child processes limited to 2 GB of memory and five seconds per input. Any other outcome than
success or a clear error is reported with the input and its modification.
"""

import argparse
import contextlib
import datetime
import faulthandler
import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import traceback
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle

# As a program it finds its own folder alone.
sys.path.insert(0, str(Path(__file__).parents[2]))

import demo
from checkpoint import model_from_checkpoint
from data import InputError, VideoSet, read_frame, read_mask
from evaluation import scoring
from evaluation.metric import evaluate_results
from model import build_model
from reading.sources import read_frames
from reading.videos import read_ppm
from synthetic import suites as synthetic

MEMORY = 2**31  # bytes of a whole process
SECONDS = 5  # an input
FULL = 50  # one of so many checkpoints holds a whole model, which takes long to build
HEIGHT, WIDTH = 64, 96
TINY = dict(
    backbone="resnet10_thin",
    channels=32,
    heads=2,
    queries=4,
    frame_queries=4,
    feed_forward=32,
    pixel_feed_forward=32,
    pixel_layers=1,
    frame_layers=1,
    tracker_encoder_layers=1,
    tracker_decoder_layers=1,
)


# Mutations of JSON

# As text: Python's limit.
NESTED = {
    f"nested {depth}": "[" * depth + "]" * depth
    for depth in (30, 300, 800, 900, 940, 960, 980, 100_000)
}
FRAME, PIXELS = [HEIGHT, WIDTH], HEIGHT * WIDTH
EXTREMES = [
    1.0,
    2.0,
    "1.0",
    "01",
    "-1",
    "video_07",
    "v10",
    "9" * 30,
    "7f3c-00",
    "собака",
    1.5,
    "00000\\00000.jpg",
    "\ud800/x.jpg",
    "C:\\a\\00000.jpg",
    [[], []],
    [None, None],
    ["", {}],
    None,
    True,
    False,
    float("nan"),
    float("inf"),
    -float("inf"),
    -1,
    0,
    1,
    0.5,
    1e308,
    -1e308,
    2**31,
    2**32,
    2**63,
    -(2**63),
    2**64,
    10**400,
    10**4000,
    "",
    " ",
    "1",
    "nan",
    "x" * 5000,
    "two\nlines",
    "\u2028",
    "\0",
    "\ud800",
    "\x1b[2J",
    [],
    {},
    [[]],
    [None],
    [{}],
    [[1, 2, 3]],
    {"": None},
    *NESTED,
    "/etc/passwd",
    "/dev/zero",
    "../../../../etc/passwd",
    "..",
    ".",
    "a/../../x",
    "train/../../../etc/hostname",
    "link",
    "~/x",
    "JPEGImages/../../..",
    "//x",
    "./0",
    "C:\\x",
    "file:///etc/passwd",
    [[0, 0, 5, 0, 5, 5, 1]],
    [[0, 0, 5, 0]],
    [[-1e9, 0, 1e9, 0, 1e9, 1e9]],
    [[0, 0, 1e308, 0, 5, 1e308]],
    [[float("nan")] * 6],
    [[float("inf"), 0] * 3],
    [["a"] * 6],
    [[None] * 6],
    [[10**400] * 6],
    [[0, 0, 1e6, 1e6] * 500],
    [[[1, 2]] * 6],
    [[2**63] * 6],
    {"size": [10**5, 10**5], "counts": [10**10]},
    {"size": [2**32, 2**32], "counts": "0"},
    {"size": FRAME, "counts": []},
    {"size": FRAME, "counts": [-5, PIXELS + 5]},
    {"size": FRAME, "counts": [0.5, PIXELS - 0.5]},
    {"size": "x\ny", "counts": 1},
    {"size": FRAME, "counts": [2**32, PIXELS]},
    {"size": FRAME, "counts": [PIXELS, 0, 0, 0]},
    {"size": FRAME, "counts": "oooooooooooo7" * 40},
    {"size": FRAME, "counts": "ooooo7" * 40},
    {"size": FRAME, "counts": "P" * 100000},
    {"size": [HEIGHT], "counts": "0"},
    {"size": None},
    {"counts": "0"},
]


def child_of(container, random):
    """A random key or index, None of an empty container or a leaf."""
    if isinstance(container, (dict, list)) and container:
        return (
            list(container)[random.integers(len(container))]
            if isinstance(container, dict)
            else int(random.integers(len(container)))
        )
    return None


def random_place(content, random) -> tuple:
    """A container and a key in it, anywhere in a tree."""
    container, key = content, child_of(content, random)
    while (below := child_of(container[key], random)) is not None and random.random() < 0.8:
        container, key = container[key], below
    return container, key


def mutate_json(content, random) -> str:
    """Do one thing somewhere in a parsed JSON, in place; returns what was done."""
    if child_of(content, random) is None:
        return "nothing"
    container, key = random_place(content, random)
    kind = ["replace", "replace", "replace", "delete", "duplicate", "swap", "rename"][
        random.integers(7)
    ]
    if kind == "replace":
        value = EXTREMES[random.integers(len(EXTREMES))]
        # A copy, as the next mutation may fall into it.
        container[key] = json.loads(json.dumps(value))
    elif kind == "delete":
        del container[key]
    elif kind == "duplicate":
        copy = json.loads(json.dumps(container[key]))
        container.append(copy) if isinstance(container, list) else container.update(
            {child_of(container, random): copy}
        )
    elif kind == "swap":
        other, place = random_place(content, random)
        container[key], other[place] = (
            json.loads(json.dumps(other[place])),
            json.loads(json.dumps(container[key])),
        )
    elif isinstance(container, dict):
        container["renamed"] = container.pop(key)
    return f"{kind} {str(key)[:30]}"


def mutate_text(content, random) -> tuple[bytes, str]:
    """A parsed JSON -> the text of a damaged one, and what was done."""
    content = json.loads(json.dumps(content))
    if random.random() < 0.2:
        return mutate_bytes(json.dumps(content).encode(), random)
    done = [mutate_json(content, random) for _ in range(random.integers(1, 4))]
    text = json.dumps(content)
    for name, brackets in NESTED.items():
        text = text.replace(f'"{name}"', brackets)
    return text.encode(), ", ".join(done)


# Mutations of bytes


def mutate_bytes(content: bytes, random) -> tuple[bytes, str]:
    """Flip, cut, insert, repeat or overwrite, once or several times.

    In half of the cases near the begin or the end.
    """
    content, done = bytearray(content), []
    for _ in range(random.integers(1, 5)):
        kind = ["flip", "cut", "insert", "delete", "repeat", "fill"][
            random.choice(6, p=[0.4, 0.08, 0.13, 0.13, 0.13, 0.13])
        ]
        within = max(1, len(content) if random.random() < 0.5 else min(len(content), 200))
        place = int(random.integers(within))
        place = place if random.random() < 0.5 else max(0, len(content) - 1 - place)
        length = int(random.integers(1, 17))
        if kind == "flip" and content:
            content[place] ^= 1 << int(random.integers(8))
        elif kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = random.bytes(length)
        elif kind == "delete":
            del content[place : place + length]
        elif kind == "repeat":
            content[place:place] = content[place : place + length] * int(random.integers(1, 50))
        elif kind == "fill":
            content[place : place + length] = (b"\xff", b"\0", b"\x7f")[random.integers(3)] * length
        done.append(f"{kind} {place}")
    return bytes(content), ", ".join(done)


# The data set


def make_base(folder: Path) -> None:
    """A small data set with masks of all notations, its results, a tiny model and pictures: what
    inputs are made of.
    """
    synthetic.make_dataset(
        folder / "set", train_videos=2, valid_videos=1, frames=2, height=HEIGHT, width=WIDTH
    )
    content = json.loads((folder / "set/train.json").read_text())
    results = [
        {
            "video_id": entry["video_id"],
            "category_id": entry["category_id"],
            "score": 0.5,
            "segmentations": json.loads(json.dumps(entry["segmentations"])),
        }
        for entry in content["annotations"]
    ]
    for number, entry in enumerate(content["annotations"]):
        for frame, code in enumerate(entry["segmentations"]):
            if code and number % 3 == 1:
                pixels = np.append(rle.decode(code).T.flatten(), 2)
                bounds = np.flatnonzero(np.diff(pixels, prepend=0))
                entry["segmentations"][frame] = {
                    "size": code["size"],
                    "counts": np.diff(bounds, prepend=0).tolist(),
                }
            elif code and number % 3 == 2:
                entry["segmentations"][frame] = [[5.5, 5, 40, 6, 41.25, 50, 6, 48]]
    (folder / "annotations.json").write_text(json.dumps(content))
    (folder / "results.json").write_text(json.dumps(results))
    images = {
        "images": [
            {
                "id": 1,
                "height": HEIGHT,
                "width": WIDTH,
                "file_name": content["videos"][0]["file_names"][0],
            }
        ],
        "categories": content["categories"],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[5, 5, 40, 6, 41, 50]]}
        ],
    }
    (folder / "coco.json").write_text(json.dumps(images))
    torch.manual_seed(0)
    torch.save(build_model("toy", 3, "gated", **TINY).state_dict(), folder / "weights.pt")
    noise = np.random.default_rng(0).integers(0, 256, (3, 30, 40, 3), dtype=np.uint8)
    frames = [Image.fromarray(picture) for picture in noise]
    for name in ("a.jpg", "b.png", "c.bmp", "d.tif"):
        frames[0].save(folder / name)
    for name in ("e.webp", "f.gif", "g.png"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:])
    (folder / "h.ppm").write_bytes(
        b"".join(b"P6\n40 30\n255\n" + frame.tobytes() for frame in frames)
    )


def annotations_input(base: Path, folder: Path, random) -> tuple[Path, str]:
    """An annotation file, of videos or of images."""
    source = "coco.json" if random.random() < 0.2 else "annotations.json"
    text, done = mutate_text(json.loads((base / source).read_text()), random)
    (folder / "input.json").write_bytes(text)
    return folder / "input.json", f"{source}: {done}"


def load_annotations(base: Path, path: Path) -> None:
    """All that train.py and evaluate.py do with an annotation file, apart from the model."""
    with contextlib.suppress(InputError):  # what is left is complete
        left = VideoSet(path, base / "set/train/JPEGImages", skip_bad=True)
        evaluate_results([], left.ground_truth)
        assert all(len(line.splitlines()) == 1 for line in left.skipped.sentences())
        assert len({video.name for video in left.videos}) == len(left)
    videos = VideoSet(path, base / "set/train/JPEGImages")
    for video in videos.videos:
        for frame, file in enumerate(video.files):
            if not file.resolve().is_relative_to((base / "set/train/JPEGImages").resolve()):
                raise AssertionError(f"{file} is outside of the data set")
            read_frame(file, video.height, video.width)
            for annotation in video.annotations:
                read_mask(
                    annotation["segmentations"][frame],
                    video.height,
                    video.width,
                    f"annotation {annotation['id']}, frame {frame},",
                )


def results_input(base: Path, folder: Path, random) -> tuple[Path, str]:
    """A results file, and in a third of the cases also a damaged ground truth."""
    results, truth = (
        json.loads((base / name).read_text()) for name in ("results.json", "annotations.json")
    )
    text, done = mutate_text(results, random)
    correct = json.dumps(truth).encode()
    if random.random() < 0.35:
        text, (correct, done) = json.dumps(results).encode(), mutate_text(truth, random)
        done = f"truth: {done}"
    (folder / "input.json").write_bytes(text)
    (folder / "truth.json").write_bytes(correct)
    return folder / "input.json", done


def load_results(base: Path, path: Path) -> None:
    """evaluate.py --results."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = scoring.read_parts([path.with_name("truth.json")], skip_bad=False)
        scoring.score_results(path, truth, path.parent / "scores", False)


# Checkpoints


class Call:
    """Requests a function call when unpickled."""

    def __init__(self, function: Callable, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


CONFIGS = (
    [
        None,
        [],
        "x",
        {},
        5,
        torch.zeros(3),
        {"preset": ["toy"]},
        {"preset": "toy\n", "propagation": "gated"},
        {"preset": torch.ones(3)},
        {"preset": "r50", "propagation": "gated"},
        {"preset": "toy", "propagation": "no"},
        {"preset": "toy", "model_options": []},
    ]
    + [
        {"preset": "toy", "propagation": "gated", "model_options": TINY | options}
        for options in (
            {"channels": 10**6},
            {"channels": -1},
            {"channels": "x"},
            {"channels": 0},
            {"heads": 0},
            {"heads": 7},
            {"frame_layers": 10**9},
            {"pixel_layers": 10**9},
            {"queries": 10**12},
            {"tracker_decoder_layers": -1},
            {"backbone": "swin_l"},
            {"backbone": None},
            {"backbone": ["x"]},
            {"norm": "x"},
            {"swin_window": 10**6, "backbone": "swin_t"},
            {"unknown": 1},
            {3: 4},
            {"clip_length": 0},
            {"window": -1},
            {"propagation": "plain"},
            {"num_classes": 3},
            {"feed_forward": 10**9},
            {"feed_forward": torch.ones(2)},
        )
    ]
    + [
        {"preset": "toy", "propagation": "gated", "model_options": TINY, "categories": categories}
        for categories in (
            5,
            [1],
            [[1, 2]],
            [[1, "a", 2]],
            None,
            {"a": 1},
            [[1, "a"], [2, "b\n"], [3, "c"]],
        )
    ]
)


class Settings(dict):
    """A configuration as other tools keep it next to weights: a class that is not known here."""


NEIGHBOURS = [  # what sits next to weights
    datetime.datetime(2024, 5, 6),
    datetime.timedelta(3),
    Path("a/b"),
    range(3),
    1j,
    b"bytes\xff",
    argparse.Namespace(lr=1e-4, out=Path("x")),
    Settings(a={"b": 1}),
    bytearray(b"x\xff"),
    np.float32(3),
    np.int64(3),
    np.dtype("f4"),
    np.float32,
    np.array(["a", "b"]),
    np.array([{}, None], dtype=object),
    np.zeros((0, 3)),
    {1, 2},
    frozenset({"a"}),
    Counter("aab"),
    OrderedDict(a=1),
    torch.Size([1]),
    torch.device("cpu"),
    torch.float32,
    torch.nn.Linear(1, 1),
    torch.nn.Parameter(torch.ones(2)),
    torch.ones(2, dtype=torch.bfloat16),
    torch.ones(4)[1:3],
    torch.ones(2).to(torch.float8_e4m3fn),
    torch.ones(2, 3).T,
]
PREFIXES = ["module.", "model.", "_orig_mod.", "module.model._orig_mod."]


@cache
def tiny_weights(base: Path) -> dict:
    """Of the tiny model, read once: PyTorch refuses the file after one whose sparse tensors are
    damaged, whatever it holds.
    """
    return torch.load(base / "weights.pt", weights_only=True)


def checkpoint_contents(base: Path, number: int, random) -> dict:
    """A checkpoint of ours, whole or of a few weights, sometimes with an odd config or an odd
    entry.
    """
    weights = dict(tiny_weights(base))
    if number % FULL:
        weights = {
            f"tracker.{name}.weight": weights[f"tracker.{name}.weight"]
            for name in ("class_embed", "gate_proj", "query_feat")
        }
    config = {
        "preset": "toy",
        "propagation": "gated",
        "model_options": TINY,
        "categories": [[1, "a"], [2, "b"], [3, "c"]],
    }
    if random.random() < 0.3:
        config = CONFIGS[random.integers(len(CONFIGS))]
    if random.random() < 0.3:
        odd = [
            torch.zeros(1).expand(10**12),
            torch.empty(10**12, device="meta"),
            torch.eye(3).to_sparse(),
            torch.tensor(5.0),
            torch.zeros(0, 10**12),
            torch.zeros(4, dtype=torch.complex64),
            torch.quantize_per_tensor(torch.ones(3), 1, 0, torch.qint8),
            None,
            "text",
            5,
            [1],
            {"a": 1},
            torch.full((4, 32), torch.nan),
        ][random.integers(13)]
        name = [
            "tracker.class_embed.weight",
            "backbone.relative_position_index",
            "tracker.two\nlines",
            "tracker." + "x" * 10000,
            "backbone.layer9.1.bn1.weight",
            "",
        ][random.integers(6)]
        weights[name] = odd
    if random.random() < 0.3:
        prefix = PREFIXES[random.integers(len(PREFIXES))]
        weights = {prefix + name: value for name, value in weights.items()}
    if random.random() < 0.5:
        neighbour = NEIGHBOURS[random.integers(len(NEIGHBOURS))]
        if random.random() < 0.3:
            weights["epoch"] = neighbour
        return {"model": weights, "config": config, "date": neighbour}
    return {"model": weights, "config": config} if random.random() < 0.9 else weights


def save_zip(path: Path, entries: dict[str, bytes]) -> None:
    """A zip archive as PyTorch writes it: nothing in it is packed."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def save_bomb(path: Path, entries: dict[str, bytes]) -> None:
    """A zip archive of few megabytes, whose first tensor unpacks to a gigabyte."""
    large = next(name for name in entries if "/data/" in name)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in entries.items():
            with archive.open(name, "w") as entry:
                for part in [bytes(2**24)] * 64 if name == large else [content]:
                    entry.write(part)


@cache
def repeating_pickles() -> list[bytes]:
    """Of the same bytes or items, which a pickle holds once, something is to be made 5000 times."""
    file, items = io.BytesIO(), list(range(10**5))
    storage = torch.zeros(10**5).untyped_storage()
    torch.save(storage, file, _use_new_zipfile_serialization=False)
    from_buffer, numbers = np.zeros(1).__reduce_ex__(5)[0], bytes(4 * 10**5)
    calls = [
        (torch.storage._load_from_bytes, file.getvalue()),
        (bytearray, numbers),
        (set, items),
        (from_buffer, numbers, np.dtype("f4"), (10**5,), "C"),
        (OrderedDict, dict.fromkeys(items)),
    ]
    things = [[Call(*call) for _ in range(5000)] for call in calls]
    return [pickle.dumps({"model": {"tracker.query_feat.weight": each}}, 4) for each in things]


def hostile_pickles(folder: Path) -> list[bytes]:
    """Pickles that run code, overflow the stack, or claim memory."""
    harm = str(folder / "executed")
    opening = f"open({harm!r}, 'w')"
    calls = [
        Call(os.system, f"touch {harm}"),
        Call(eval, opening),
        Call(exec, opening),
        Call(open, harm, "w"),
        Call(__import__, "this"),
        Call(np.ndarray, (10**12,)),
        Call(np.dtype, "V1000000000000"),
        Call(np.load, harm, None, True),
        Call(bytearray, 10**12),
        Call(getattr, Path, "unlink"),
        Call(OrderedDict, [("a", 1)]),
        np.array([print, {}], dtype=object),
        np.zeros(3, dtype="S5"),
        np.zeros(2, dtype=[("a", "O")]),
        Call(np.frombuffer, b"x" * 8, "O"),
        np.lib.stride_tricks.as_strided(np.zeros(1), (3,), (0,)),
        np.zeros(3, ">f4"),
        np.float64(2),
    ]
    inside = pickle.dumps(Call(os.system, f"touch {harm}"))
    calls += [
        Call(torch.storage._load_from_bytes, inside),
        Call(torch.load, harm),
        Call(set, [[]]),
        Call(subprocess.Popen, ["touch", harm]),
        Call(OrderedDict, {1: 2}, [1]),
    ]
    whole = [
        pickle.dumps({"model": {"backbone.bn1.weight": call}}, protocol)
        for call in calls
        for protocol in (2, 4, 5)
    ]
    array = pickle.dumps({"model": {"tracker.query_feat.weight": np.zeros((2, 3), np.float32)}}, 2)
    whole += [
        array.replace(
            b"K\x02K\x03\x86", b"\x8a\x06" + (10**12).to_bytes(6, "little") + b"K\x03\x86"
        ),
        array.replace(b"K\x02K\x03\x86", b"J\xff\xff\xff\xffK\x03\x86"),
        array.replace(b"f4", b"O8"),
        array.replace(b"f4", b"V4"),
    ]
    whole += repeating_pickles()
    return [
        *whole,
        b"\x80\x02}(K\x01" + b"\x85" * 300_000 + b"K\x01u.",
        b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
        b"\x80\x02}r" + struct.pack("<I", 2**31 - 1) + b".",
        b"\x80\x02}p" + b"9" * 12 + b"\n.",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**34) + b"x.",
        b"\x80\x02T" + struct.pack("<i", 2**31 - 1) + b"x.",
        b"\x80\x02T" + struct.pack("<i", -5) + b"x.",
        b"\x80\x04\x95" + struct.pack("<Q", 2**50) + b"}.",
        b"\x80\x02\x8b" + b"\xff\xff\xff\x7f.",
        b"I" + b"9" * 100_000 + b"\n.",
        b"cos\nsystem\n(S'touch " + harm.encode() + b"'\ntR.",
        b"(S'touch " + harm.encode() + b"'\nios\nsystem\n.",
    ]


def pkl_input(base: Path, folder: Path, number: int, random) -> tuple[Path, str]:
    """A .pkl of arrays, as detectron2 writes it, and of tensors, as Mask2Former's tools do."""
    path = folder / "input.pkl"
    hostile = hostile_pickles(folder)
    if random.random() < 0.3:
        place = int(random.integers(len(hostile)))
        content, done = hostile[place], f"hostile {place}"
        if random.random() < 0.5:
            content, more = mutate_bytes(content, random)
            done = f"{done}, {more}"
    else:
        contents = checkpoint_contents(base, number, random)
        named = contents.get("model", contents)
        for name, value in list(named.items()):
            if isinstance(value, torch.Tensor) and random.random() < 0.5:
                keep = (
                    value.layout == torch.strided
                    and value.device.type == "cpu"
                    and not value.is_quantized
                    and value.numel() < 10**6
                )
                named[name] = value.detach().float().numpy() if keep else 0
        content = pickle.dumps(contents, [2, 4, 5][random.integers(3)])
        content, done = (
            mutate_bytes(content, random)
            if number % FULL and random.random() < 0.6
            else (content, "as it is")
        )
    path.write_bytes(content)
    return path, done


def pth_input(base: Path, folder: Path, number: int, random) -> tuple[Path, str]:
    """A .pth: an archive as PyTorch writes it today, or the format of old versions, damaged inside
    or outside.
    """
    path, kind = (
        folder / "input.pth",
        ["zip", "inside", "old", "hostile", "as it is"][
            random.choice(5, p=[0.2, 0.3, 0.2, 0.1, 0.2])
        ],
    )
    torch.save(
        checkpoint_contents(base, number, random),
        path,
        _use_new_zipfile_serialization=kind != "old",
    )
    if number % FULL == 0 or kind == "as it is":
        return path, "as it is"
    if kind in ("zip", "old"):
        content, done = mutate_bytes(path.read_bytes(), random)
        path.write_bytes(content)
        return path, f"{kind}: {done}"
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    if kind == "inside":
        name = (
            next(name for name in entries if name.endswith("data.pkl"))
            if random.random() < 0.8
            else child_of(entries, random)
        )
        entries[name], done = mutate_bytes(entries[name], random)
        save_zip(path, entries)
        return path, f"inside {name}: {done}"
    hostile = hostile_pickles(folder)
    choice = int(random.integers(5))
    place = int(random.integers(len(hostile)))
    data = next(name for name in entries if name.endswith("data.pkl"))
    if choice == 0:
        if not (base / "bomb.zip").exists():
            save_bomb(base / "bomb.zip", entries)
        shutil.copy(base / "bomb.zip", path)
    elif choice == 1:  # one that claims four gigabytes
        content = bytearray(path.read_bytes())
        central = content.find(b"PK\1\2")
        content[central + 20 : central + 28] = b"\xfe" * 8
        path.write_bytes(content)
    elif choice == 2:
        path.write_bytes(hostile[place])
    # A tensor of many numbers, with few in the archive.
    elif choice == 3:
        save_zip(path, entries | {data: entries[data].replace(b"K\x80", b"J\0\0\0\x40")})
    else:
        save_zip(path, entries | {data: hostile[place]})
    return path, f"hostile {choice} {place}"


def load_checkpoint(base: Path, path: Path) -> None:
    """What evaluate.py and demo.py do first, and what they do with the config."""
    model, config = model_from_checkpoint(path)
    demo.class_names(argparse.Namespace(categories=None, weights=path), config, model.num_classes)


# Pictures


def png_chunk(name: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def png(width: int, height: int, *chunks: bytes, mode: int = 2) -> bytes:
    """A PNG whose header states a size that its pixels have not."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(chunks)
        + png_chunk(b"IDAT", zlib.compress(bytes(10**5)))
        + png_chunk(b"IEND", b"")
    )


BOMB = b"x\0\0" + zlib.compress(bytes(10**8))  # once: it takes a third of a second
PICTURES = [
    ("png", png(10**5, 10**5)),
    ("png", png(2**31 - 1, 2**31 - 1)),
    ("png", png(9459, 9459)),
    ("png", png(9460, 9460)),
    ("png", png(13000, 13000)),
    ("png", png(0, 0)),
    ("png", png(8000, 8000, mode=0)),
    ("png", png(8000, 8000, mode=6)),
    ("png", png(8, 8, png_chunk(b"iCCP", BOMB))),
    ("png", png(8, 8, png_chunk(b"zTXt", BOMB))),
    ("png", png(8, 8, png_chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)))),
    ("gif", b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x08\0;"),
    ("gif", b"GIF89a\x08\0\x08\0\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x08\0;"),
    (
        "webp",
        b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0\xff\x3f\0\xff\x3f\0ANIM\x06\0\0\0\0\0\0\0\0\0",
    ),
    (
        "bmp",
        b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 10**5, 10**5, 1, 24, 0, 0, 0, 0, 0, 0),
    ),
    (
        "jpg",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(executed) (w) file\n"
        b"%%EOF\n",
    ),
    ("ppm", b"P6 100000 100000 255\n"),
    ("ppm", b"P6\n30000 30000\n255\n"),
    ("ppm", b"P6\n9000 9000\n255\n"),
    ("ppm", b"P6\n" + b"9" * 5000 + b" 1\n255\n"),
    ("ppm", b"P5 " + b"9" * 30 + b" 1 255\n"),
    ("png", b""),
    ("jpg", b"\xff\xd8\xff"),
    ("tif", b"II*\0\x08\0\0\0\xff\xff"),
]


def pictures_input(base: Path, folder: Path, random) -> tuple[Path, str]:
    """A picture, an animation, or a stream of PPM pictures."""
    sources = sorted(path for path in base.iterdir() if path.stem in tuple("abcdefgh"))
    place = int(random.integers(len(sources) + 3))
    if place < len(sources):
        kind, content = sources[place].suffix[1:], sources[place].read_bytes()
    else:
        place = int(random.integers(len(PICTURES)))
        kind, content = PICTURES[place]
    done = ""
    if place < len(sources) or random.random() < 0.3:
        content, done = mutate_bytes(content, random)
    path = folder / f"input.{kind}"
    path.write_bytes(content)
    return path, f"{kind} {place}: {done}"


def load_picture(base: Path, path: Path) -> None:
    """demo.py with a picture or animation, or with a stream on standard input."""
    for _ in read_frames(str(path)):
        pass
    if path.suffix == ".ppm":
        with open(path, "rb") as stream:
            for _ in read_ppm(stream, "standard input"):
                pass


def without_number(make: Callable) -> Callable:
    return lambda base, folder, number, random: make(base, folder, random)


LOADERS = {
    "annotations": (without_number(annotations_input), load_annotations),
    "results": (without_number(results_input), load_results),
    "pth": (pth_input, load_checkpoint),
    "pkl": (pkl_input, load_checkpoint),
    "pictures": (without_number(pictures_input), load_picture),
}


# Running


def outcome_of(load: Callable, base: Path, path: Path) -> tuple[str, str]:
    """ "success", "refused" or "finding", and the message."""
    try:
        load(base, path)
    except InputError as error:
        if isinstance(error.__cause__, MemoryError):
            return "finding", f"memory: {error}"
        return ("refused" if len(str(error).splitlines()) == 1 else "finding"), str(error)
    except BaseException as error:
        return "finding", "".join(traceback.format_exception(error))
    return "success", ""


def run_inputs(loader: str, numbers: range, base: Path, folder: Path) -> None:
    """In a child: make and try the inputs one by one, and write into the log what begins and how it
    ended.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pages, used, *_ = (
        int(number) * resource.getpagesize()
        for number in Path("/proc/self/statm").read_text().split()
    )
    # Mapped is more than used: libraries.
    resource.setrlimit(resource.RLIMIT_AS, (pages + MEMORY - used,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    make, load = LOADERS[loader]
    with open(folder / "log", "a") as log, open(os.devnull, "w") as nothing:
        for number in numbers:
            random = np.random.default_rng((sorted(LOADERS).index(loader), number))
            print(json.dumps([number, "begun", "being made", ""]), file=log, flush=True)
            path, done = make(base, folder, number, random)
            print(json.dumps([number, "begun", done, ""]), file=log, flush=True)
            faulthandler.dump_traceback_later(SECONDS, exit=True, file=nothing)
            outcome, said = outcome_of(load, base, path)
            faulthandler.cancel_dump_traceback_later()
            if (folder / "executed").exists():
                outcome, said = "finding", "code was run"
                (folder / "executed").unlink()
            print(json.dumps([number, outcome, done, said]), file=log, flush=True)


def fuzz(loader: str, count: int, folder: Path, first: int = 0) -> tuple[Counter, list[str]]:
    """How often each outcome came, and the findings as text."""
    base, work, outcomes, findings = folder / "base", folder / loader, Counter(), []
    if not base.exists():
        make_base(base)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    number = first
    while number < first + count:
        (work / "log").unlink(missing_ok=True)
        child = multiprocessing.get_context("fork").Process(
            target=run_inputs, args=(loader, range(number, first + count), base, work)
        )
        child.start()
        child.join()
        lines = [json.loads(line) for line in (work / "log").read_text().splitlines()]
        if lines[-1][1] == "begun":  # and the child ended within
            lines.append(
                [
                    lines[-1][0],
                    "finding",
                    lines[-1][2],
                    f"the process ended: {child.exitcode} (1: more than {SECONDS} s)",
                ]
            )
        for number, outcome, done, said in lines:
            if outcome != "begun":
                outcomes[outcome] += 1
            if outcome == "finding":
                findings.append(f"{loader} {number} ({done}): {said.strip()}")
        number += 1
    return outcomes, findings


def main() -> None:
    parser = argparse.ArgumentParser(description="Try damaged and hostile files on a loader.")
    parser.add_argument("loader", choices=LOADERS)
    parser.add_argument("count", type=int)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "faults",
        help="where inputs are written",
    )
    args = parser.parse_args()
    outcomes, findings = fuzz(args.loader, args.count, args.folder, args.first)
    print("\n\n".join(findings))
    print(f"{args.loader}: {args.count} inputs, {dict(outcomes)}")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
