"""Masks as run-length codes, the form of results.json: whole batches at once, on the device that the masks are on.

    codes = encode(masks)                       # bool (N, H, W) -> N times {"size": [H, W], "counts": "..."}
    fault = find_fault([code["counts"] for code in codes], [H * W] * N)     # None, or the first bad one and what is wrong
    kept = PackedCodes(each); kept.add(encode_counts(masks)); kept.take(some)   # many codes of which few will be asked for

A code lists the lengths of the runs of a mask read column by column, background first (0 if it starts with the object); a
run from the fourth on is written as its difference to the one before the last, five bits a character. Source of the format:
cocoapi, common/maskApi.c, whose codes these are to the last character (tests/test_run_length.py). Only codes leave a GPU, no pixels.
"""
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

ENCODED_AT_ONCE = 2 ** 28                           # pixels
SEARCHED_AT_ONCE = {np: 2 ** 21, torch: 2 ** 28}    # pixels; fewer stay in a CPU's cache
THREADS = 2                                         # more wait for one another, at the lock of the interpreter
CHECKED_AT_ONCE = 256                               # codes
LONGEST_RUN = 7                                     # characters: 2 ** 34 pixels
FOREIGN, UNFILLED = "it holds a character that no code has", "its runs do not fill the frame"
Array = Tensor | np.ndarray


def encode(masks: Tensor) -> list[dict]:
    """bool (N, H, W) on any device -> N run-length codes as results.json holds them."""
    size = list(masks.shape[1:])
    return [{"size": size, "counts": code.decode()} for code in encode_counts(masks)]


def encode_counts(masks: Tensor) -> list[bytes]:
    """bool (N, H, W) on any device -> the counts of N run-length codes."""
    if masks.ndim != 3 or masks.dtype != torch.bool:
        raise ValueError(f"masks must be bool of shape (N, H, W), not {masks.dtype} {tuple(masks.shape)}")
    if not masks.numel():
        return [b"0"] * len(masks)
    if masks.is_cuda:
        masks = masks.contiguous() if masks.storage_offset() % 8 == 0 else masks.clone(memory_format=torch.contiguous_format)
        with masks.device:                                    # aligned, to be read as words
            return [code for part in masks.split(-(-ENCODED_AT_ONCE // masks[0].numel())) for code in encode_part(part)]
    parts = masks.chunk(THREADS)                              # NumPy is twice as fast as PyTorch on a CPU, but with one thread
    with ThreadPoolExecutor(len(parts)) as pool:
        return [code for codes in pool.map(encode_part, map(np.ascontiguousarray, parts)) for code in codes]


def encode_part(masks: Array) -> list[bytes]:
    """The counts of so many masks as fit into memory several times."""
    characters, ends = compress(*find_runs(masks))
    blob, ends = np.asarray(characters.cpu() if isinstance(characters, Tensor) else characters).tobytes(), ends.tolist()
    return [blob[start:end] for start, end in zip([0, *ends], ends)]


# Where NumPy and PyTorch have one name for a thing, one text serves both; these are the others.

def library(array: Array):
    """torch or numpy."""
    return torch if isinstance(array, Tensor) else np


def nonzero(found: Array) -> Array:
    """The places of True in the flattened array."""
    return found.reshape(-1).nonzero().squeeze(1) if isinstance(found, Tensor) else np.flatnonzero(found)


def sort(array: Array) -> Array:
    """The values in ascending order."""
    return torch.msort(array) if isinstance(array, Tensor) else np.sort(array)


def repeat(array: Array, times: Array, total: int) -> Array:
    """Every value so many times; `total` is the sum of the times."""
    return torch.repeat_interleave(array, times, output_size=total) if isinstance(array, Tensor) else np.repeat(array, times)


def differences(array: Array) -> Array:
    """Every value less the one before it, the first as it is."""
    result = array - library(array).roll(array, 1)
    result[:1] = array[:1]
    return result


def find_runs(masks: Array) -> tuple[Array, Array]:
    """bool (N, H, W) -> the runs of all masks (R,) int64, and how many each mask has (N,) int64."""
    xp = library(masks)
    count, height, width = masks.shape
    bounds = sort(find_changes(masks))
    ends = xp.arange(1, count + 1) * (height * width)
    before = xp.searchsorted(bounds, ends)                    # changes of this mask and the ones before it
    last = before + xp.arange(count)                          # every mask ends with a bound, which is where the next one begins
    every = xp.empty(len(bounds) + count, dtype=xp.int64)
    inner = xp.ones(len(every), dtype=xp.bool)
    inner[last] = False
    every[inner], every[last] = bounds, ends
    return differences(every), differences(last + 1)


def find_changes(masks: Array) -> Array:
    """bool (N, H, W) -> the pixels that differ from the one before, counted down the columns, through all masks; in any order.

    Rows are compared in words of up to eight pixels, few of which differ.
    """
    xp = library(masks)
    count, height, width = masks.shape
    wide = math.gcd(width, 8)
    words, line = masks.view({1: xp.uint8, 2: xp.int16, 4: xp.int32, 8: xp.int64}[wide]), width // wide  # (N, H, line)
    flat, part, found = words.reshape(-1), max(1, SEARCHED_AT_ONCE[xp] // (height * width)), []
    differs = xp.empty_like(words[:part, 1:], dtype=xp.bool)
    for begin in range(0, count, part):
        some = words[begin:begin + part]
        place = nonzero(xp.not_equal(some[:, 1:], some[:, :-1], out=differs[:len(some)]))
        if len(place):
            word = begin * height * line + place + (place // ((height - 1) * line) + 1) * line   # the lower of the two
            byte = nonzero((flat[word] ^ flat[word - line]).view(xp.bool))
            found.append(word[byte // wide] * wide + byte % wide)
    inner = xp.concatenate(found) if found else xp.empty(0, dtype=xp.int64)
    row, column = inner // width, inner % width               # row: of all masks
    before = xp.concatenate((xp.zeros_like(masks[:, -1, :1]), masks[:, -1, :-1]), 1)     # before the first pixel lies background
    top = nonzero(masks[:, 0] ^ before)                       # mask * width + column
    return xp.concatenate(((row // height * width + column) * height + row % height, top * height))


def compress(runs: Array, runs_each: Array) -> tuple[Array, Array]:
    """Runs (R,) of N masks that have runs_each (N,) -> characters (uint8) of all codes, and where each code ends (N,)."""
    xp = library(runs)
    ends = xp.cumsum(runs_each, 0)
    number = xp.arange(len(runs))
    first = repeat(ends - runs_each, runs_each, len(runs))
    values = xp.where(number - first > 2, runs - xp.roll(runs, 2), runs)      # the first three are written as they are
    magnitude = xp.where(values < 0, ~values, values)
    length, bits, most = xp.ones_like(values), 4, int(magnitude.max())        # characters: four bits and the sign, then five each
    while most >> bits:
        length += magnitude >> bits > 0
        bits += 5
    stop = xp.cumsum(length, 0)
    total = int(stop[-1])
    owner = repeat(number, length, total)
    left = stop[owner] - xp.arange(1, total + 1)              # characters of the run that follow
    characters = xp.empty(total, dtype=xp.uint8)
    characters[:] = (values[owner] >> 5 * (length[owner] - 1 - left) & 31) + 48 + 32 * (left > 0)
    return characters, stop[ends - 1]


class PackedCodes:
    """Many codes in three quarters of their memory: a character has six bits, so the bits of every fourth lie on top of three others.

    each: codes come in turn, one for each of so many things; those of some of them are what is asked for in the end."""

    def __init__(self, each: int):
        self.each, self.parts = each, []

    def add(self, codes: list[bytes]) -> None:
        """The next codes of all things, once or several times in turn."""
        ends = np.cumsum([len(code) for code in codes]).astype(np.uint32)
        characters = np.frombuffer(b"".join(codes).ljust(-(-int(ends[-1]) // 4) * 4, b"0"), np.uint8) - np.uint8(48)
        *three, fourth = characters.reshape(4, -1)
        self.parts.append((np.stack([low | fourth << 2 * place & 192 for place, low in enumerate(three, 1)]), ends))

    def take(self, chosen: list[int]) -> list[list[str]]:
        """All codes of each chosen thing; the store is empty afterwards, and gives its memory back on the way."""
        found = {thing: [] for thing in chosen}
        self.parts.reverse()
        while self.parts:
            three, ends = self.parts.pop()
            fourth = sum((high & 192) >> 2 * place for place, high in enumerate(three, 1))
            text, ends = str((np.vstack((three & 63, fourth)) + 48).tobytes(), "ascii"), [0, *ends.tolist()]
            for thing, codes in found.items():
                codes += [text[ends[place]:ends[place + 1]] for place in range(thing, len(ends) - 1, self.each)]
        return [found[thing] for thing in chosen]


def decode_runs(codes: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The counts of N codes, each with an end -> the runs of all (R,) int64, and how many each has (N,) int64."""
    characters = np.frombuffer(b"".join(codes), np.uint8).astype(np.int64) - 48
    final = characters & 32 == 0                              # the last character of a run
    start = np.flatnonzero(np.concatenate(([True], final[:-1])))
    length = np.diff(np.append(start, len(characters)))
    shift = 5 * (np.arange(len(characters)) - np.repeat(start, length))
    values = np.add.reduceat((characters & 31) << shift, start)
    values -= np.where(characters[final] & 16, 1 << 5 * length, 0)

    code_ends = np.cumsum([len(code) for code in codes])
    runs_each = np.diff(np.searchsorted(start, code_ends), prepend=0)
    first = np.cumsum(runs_each) - runs_each
    place = np.arange(len(values)) - np.repeat(first, runs_each)
    runs = values.copy()
    for parity in (0, 1):                                     # every other run adds up, from the second and the third on
        chain = (place % 2 == parity) & (place > 0)
        total = np.cumsum(np.where(chain, values, 0))
        before = np.concatenate(([0], total))[first]
        runs[chain] = (total - np.repeat(before, runs_each))[chain]
    return runs, runs_each


def find_fault(codes: list[str | bytes], pixels: list[int]) -> tuple[int, str] | None:
    """One of N codes that is not that of a mask of so many pixels, and what is wrong; None if all are right.

    pycocotools reads on past the end of a wrong code, into memory that is not its own or for ever.
    """
    for begin in range(0, len(codes), CHECKED_AT_ONCE):
        some = codes[begin:begin + CHECKED_AT_ONCE]
        some = [code.encode() if isinstance(code, str) and code.isascii() else code for code in some]
        for index, code in enumerate(some):
            if not isinstance(code, (bytes, str)):
                return begin + index, f"its counts are a {type(code).__name__}"
            if isinstance(code, str):
                return begin + index, FOREIGN
            if not code or code[-1] - 48 & 32:
                return begin + index, "its last run has no end"
        characters, code_ends = np.frombuffer(b"".join(some), np.uint8), np.cumsum([len(code) for code in some])
        last = np.flatnonzero(characters - np.uint8(48) & 32 == 0)                  # of each run
        for wrong, fault in ((np.flatnonzero((characters < 48) | (characters > 111)), FOREIGN),
                             (last[np.diff(last, prepend=-1) > LONGEST_RUN], UNFILLED)):
            if len(wrong):
                return begin + int(np.searchsorted(code_ends, wrong[0], side="right")), fault
        runs, runs_each = decode_runs(some)
        first = np.cumsum(runs_each) - runs_each
        expected = np.array(pixels[begin:begin + CHECKED_AT_ONCE])
        # None longer than the frame, or the sum of many could wrap round to any number.
        wrong = (np.minimum.reduceat(runs, first) < 0) | (np.maximum.reduceat(runs, first) > expected)
        wrong |= np.add.reduceat(runs, first) != expected
        if wrong.any():
            return begin + int(wrong.argmax()), UNFILLED
    return None
