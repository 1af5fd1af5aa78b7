"""Run-length encoding of masks (COCO RLE), batched, on the device of the masks.

    rles = encode(masks)             # bool (N, H, W) -> N times {"size": [H, W], "counts": "..."}
    fault = find_fault([rle["counts"] for rle in rles], [H * W] * N)  # None, or the first error
    packed = PackedCodes(each)       # compact storage for many codes of which few are needed
    packed.add(encode_counts(masks))
    codes = packed.take(chosen)

A code ("counts") lists the lengths of the runs of a mask in column-major order, background first
(0 if the first pixel is foreground). From the fourth run on, a run is stored as the difference to
the run before the last. Each number takes five bits per character. Source: cocoapi,
common/maskApi.c; codes are identical to the last character (tests/test_run_length.py). On a GPU,
only the codes are copied to the CPU, never the pixels.

Letters: N masks of H x W pixels, R runs of all masks together.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

MAX_ENCODED_PIXELS = 2**28  # per call of encode_chunk on a GPU
MAX_SEARCHED_PIXELS = {np: 2**21, torch: 2**28}  # per step; 2 ** 21 fit into a CPU's cache
MAX_CHECKED_CODES = 256  # per step of find_fault
MAX_RUN_CHARACTERS = 7  # enough for 2 ** 34 pixels
THREADS = 2  # more threads wait for the interpreter lock
FOREIGN = "it holds a character that no code has"
UNFILLED = "its runs do not fill the frame"
Array = Tensor | np.ndarray


def encode(masks: Tensor) -> list[dict]:
    """bool (N, H, W) on any device -> N RLE dicts in the format of results.json."""
    size = list(masks.shape[1:])
    return [{"size": size, "counts": code.decode()} for code in encode_counts(masks)]


def encode_counts(masks: Tensor) -> list[bytes]:
    """bool (N, H, W) on any device -> the "counts" of N RLEs.

    Raises ValueError for any other shape or dtype.
    """
    if masks.ndim != 3 or masks.dtype != torch.bool:
        shape = tuple(masks.shape)
        raise ValueError(f"masks must be bool of shape (N, H, W), not {masks.dtype} {shape}")
    if not masks.numel():
        return [b"0"] * len(masks)
    if masks.is_cuda:
        return encode_cuda(masks)
    # On a CPU, NumPy is twice as fast as PyTorch, but uses one thread only.
    chunks = [np.ascontiguousarray(chunk) for chunk in masks.chunk(THREADS)]
    with ThreadPoolExecutor(len(chunks)) as pool:
        return [code for codes in pool.map(encode_chunk, chunks) for code in codes]


def encode_cuda(masks: Tensor) -> list[bytes]:
    """encode_counts for masks on a GPU, in chunks that fit into memory."""
    # Contiguous and aligned, because rows are viewed as 64-bit words.
    if masks.storage_offset() % 8 == 0:
        masks = masks.contiguous()
    else:
        masks = masks.clone(memory_format=torch.contiguous_format)
    chunk_size = math.ceil(MAX_ENCODED_PIXELS / masks[0].numel())
    with masks.device:
        return [code for chunk in masks.split(chunk_size) for code in encode_chunk(chunk)]


def encode_chunk(masks: Array) -> list[bytes]:
    """bool (N, H, W) -> N codes; temporary memory is several times that of the masks."""
    characters, ends = compress(*find_runs(masks))
    if isinstance(characters, Tensor):
        characters = characters.cpu().numpy()
    text = characters.tobytes()
    ends = ends.tolist()
    return [text[start:end] for start, end in zip([0, *ends], ends)]


# The code below runs on NumPy arrays and on tensors. These functions cover what differs.


def array_namespace(array: Array):
    """The module torch or numpy, called `xp` below."""
    return torch if isinstance(array, Tensor) else np


def nonzero(array: Array) -> Array:
    """Indices of the nonzero elements of the flattened array."""
    if isinstance(array, Tensor):
        return array.reshape(-1).nonzero().squeeze(1)
    return np.flatnonzero(array)


def sort(array: Array) -> Array:
    """The values in ascending order."""
    return torch.msort(array) if isinstance(array, Tensor) else np.sort(array)


def repeat(array: Array, times: Array, total: int) -> Array:
    """Repeat each value `times` times; total = times.sum()."""
    if isinstance(array, Tensor):
        return torch.repeat_interleave(array, times, output_size=total)
    return np.repeat(array, times)


def differences(array: Array) -> Array:
    """Each value minus the one before it; the first value is unchanged."""
    result = array - array_namespace(array).roll(array, 1)
    result[:1] = array[:1]
    return result


def find_runs(masks: Array) -> tuple[Array, Array]:
    """bool (N, H, W) -> the runs of all masks (R,) int64, and the runs per mask (N,) int64."""
    xp = array_namespace(masks)
    count, height, width = masks.shape
    changes = sort(find_changes(masks))
    mask_ends = xp.arange(1, count + 1) * (height * width)
    # A run ends at every change inside a mask and at the end of every mask.
    changes_before = xp.searchsorted(changes, mask_ends)  # up to the end of each mask
    last = changes_before + xp.arange(count)  # index of the last run of each mask
    run_ends = xp.empty(len(changes) + count, dtype=xp.int64)
    is_inner = xp.ones(len(run_ends), dtype=xp.bool)
    is_inner[last] = False
    run_ends[is_inner] = changes
    run_ends[last] = mask_ends
    return differences(run_ends), differences(last + 1)


def find_changes(masks: Array) -> Array:
    """Pixels that differ from the pixel before them, in column-major order through all masks.

    masks: bool (N, H, W). The pixel before the first one of a mask counts as background.
    Returns indices mask * H * W + column * H + row, int64, unsorted.
    """
    xp = array_namespace(masks)
    height, width = masks.shape[1:]
    lower = vertical_changes(masks)
    row = lower // width  # counted through all masks
    column = lower % width
    inside = (row // height * width + column) * height + row % height

    # The first pixel of a column follows the last pixel of the column to the left.
    bottom = masks[:, -1]
    background = xp.zeros_like(bottom[:, :1])
    before_top = xp.concatenate((background, bottom[:, :-1]), 1)
    top = nonzero(masks[:, 0] ^ before_top)  # mask * W + column
    return xp.concatenate((inside, top * height))


def vertical_changes(masks: Array) -> Array:
    """Pixels that differ from the pixel above: indices of the flattened masks, int64.

    Rows are compared in words of up to eight pixels, because few words differ.
    """
    xp = array_namespace(masks)
    count, height, width = masks.shape
    word_size = math.gcd(width, 8)
    word_type = {1: xp.uint8, 2: xp.int16, 4: xp.int32, 8: xp.int64}[word_size]
    words = masks.view(word_type)  # (N, H, words_per_row)
    words_per_row = width // word_size
    flat = words.reshape(-1)
    chunk_size = max(1, MAX_SEARCHED_PIXELS[xp] // (height * width))
    differs = xp.empty_like(words[:chunk_size, 1:], dtype=xp.bool)
    changes = []
    for begin in range(0, count, chunk_size):
        chunk = words[begin : begin + chunk_size]
        place = nonzero(xp.not_equal(chunk[:, 1:], chunk[:, :-1], out=differs[: len(chunk)]))
        if not len(place):
            continue
        # `place` counts without the first row of each mask; `word` is the lower of the two.
        skipped_rows = place // ((height - 1) * words_per_row) + 1
        word = begin * height * words_per_row + place + skipped_rows * words_per_row
        pixel = nonzero((flat[word] ^ flat[word - words_per_row]).view(xp.bool))
        changes.append(word[pixel // word_size] * word_size + pixel % word_size)
    return xp.concatenate(changes) if changes else xp.empty(0, dtype=xp.int64)


def compress(runs: Array, runs_each: Array) -> tuple[Array, Array]:
    """Encode the runs of N masks.

    runs: (R,) int64. runs_each: (N,) int64, the number of runs of each mask.
    Returns the characters of all codes (uint8), and the end of each code (N,).
    """
    xp = array_namespace(runs)
    code_ends = xp.cumsum(runs_each, 0)
    number = xp.arange(len(runs))
    first = repeat(code_ends - runs_each, runs_each, len(runs))
    # The first three runs of a mask are stored as they are.
    values = xp.where(number - first > 2, runs - xp.roll(runs, 2), runs)

    # The last character holds four bits and the sign, each of the others five bits.
    magnitude = xp.where(values < 0, ~values, values)
    largest = int(magnitude.max())
    length = xp.ones_like(values)
    bits = 4
    while largest >> bits:
        length += magnitude >> bits > 0
        bits += 5

    ends = xp.cumsum(length, 0)
    total = int(ends[-1])
    run = repeat(number, length, total)  # the run of each character
    remaining = ends[run] - xp.arange(1, total + 1)  # characters of the run that follow
    shift = 5 * (length[run] - 1 - remaining)
    five_bits = values[run] >> shift & 31
    more = remaining > 0
    characters = xp.empty(total, dtype=xp.uint8)
    characters[:] = five_bits + 32 * more + 48
    return characters, ends[code_ends - 1]


class PackedCodes:
    """Stores many codes in three quarters of their size.

    A character has six significant bits, so the bits of every fourth character fit into the two
    unused bits of three others.

    each: codes are added in turn, one for each of `each` instances. `take` returns the codes of
        some of the instances.
    """

    def __init__(self, each: int):
        self.each = each
        self.packed = []  # (three of four characters with the bits of the fourth, code ends)

    def add(self, codes: list[bytes]) -> None:
        """Add the next codes of all instances, for one or several frames."""
        ends = np.cumsum([len(code) for code in codes]).astype(np.uint32)
        padded = math.ceil(int(ends[-1]) / 4) * 4
        text = b"".join(codes).ljust(padded, b"0")
        characters = np.frombuffer(text, np.uint8) - np.uint8(48)
        *three, fourth = characters.reshape(4, -1)
        three = [low | fourth << 2 * place & 192 for place, low in enumerate(three, 1)]
        self.packed.append((np.stack(three), ends))

    def take(self, chosen: list[int]) -> list[list[str]]:
        """All codes of each chosen instance.

        The storage is emptied, and its memory is freed on the way.
        """
        codes = {instance: [] for instance in chosen}
        self.packed.reverse()
        while self.packed:
            three, ends = self.packed.pop()
            fourth = sum((high & 192) >> 2 * place for place, high in enumerate(three, 1))
            characters = np.vstack((three & 63, fourth)) + 48
            text = str(characters.tobytes(), "ascii")
            ends = [0, *ends.tolist()]
            for instance in codes:
                for index in range(instance, len(ends) - 1, self.each):
                    codes[instance].append(text[ends[index] : ends[index + 1]])
        return [codes[instance] for instance in chosen]


def decode_runs(codes: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """N complete codes -> the runs of all (R,) int64, and the runs per code (N,) int64."""
    characters = np.frombuffer(b"".join(codes), np.uint8).astype(np.int64) - 48
    is_last = characters & 32 == 0  # the last character of a run
    start = np.flatnonzero(np.concatenate(([True], is_last[:-1])))
    length = np.diff(np.append(start, len(characters)))
    shift = 5 * (np.arange(len(characters)) - np.repeat(start, length))
    values = np.add.reduceat((characters & 31) << shift, start)
    is_negative = characters[is_last] & 16
    values -= np.where(is_negative, 1 << 5 * length, 0)

    code_ends = np.cumsum([len(code) for code in codes])
    runs_each = np.diff(np.searchsorted(start, code_ends), prepend=0)
    first = np.cumsum(runs_each) - runs_each
    place = np.arange(len(values)) - np.repeat(first, runs_each)
    runs = values.copy()
    # Undo the differences to the run before the last: a sum over every other run of a code,
    # starting with the second and with the third one.
    for parity in (0, 1):
        chain = (place % 2 == parity) & (place > 0)
        total = np.cumsum(np.where(chain, values, 0))
        before = np.concatenate(([0], total))[first]
        runs[chain] = (total - np.repeat(before, runs_each))[chain]
    return runs, runs_each


def find_fault(codes: list[str | bytes], pixels: list[int]) -> tuple[int, str] | None:
    """Find the first of N codes that does not encode a mask of the given number of pixels.

    pycocotools must not see such a code: it would read beyond the end of the buffer.

    Returns its index and what is wrong, or None if all codes are valid.
    """
    for begin in range(0, len(codes), MAX_CHECKED_CODES):
        chunk = [to_bytes(code) for code in codes[begin : begin + MAX_CHECKED_CODES]]
        expected = np.array(pixels[begin : begin + MAX_CHECKED_CODES])
        fault = (
            find_incomplete(chunk)
            or find_wrong_characters(chunk)
            or find_wrong_sum(chunk, expected)
        )
        if fault:
            index, reason = fault
            return begin + index, reason
    return None


def to_bytes(code):
    """ASCII text as bytes; anything else is returned unchanged."""
    return code.encode() if isinstance(code, str) and code.isascii() else code


def find_incomplete(codes: list) -> tuple[int, str] | None:
    """The first code that is not bytes or ends inside a run."""
    for index, code in enumerate(codes):
        if isinstance(code, str):
            return index, FOREIGN
        if not isinstance(code, bytes):
            return index, f"its counts are a {type(code).__name__}"
        if not code or code[-1] - 48 & 32:
            return index, "its last run has no end"
    return None


def find_wrong_characters(codes: list[bytes]) -> tuple[int, str] | None:
    """The first code with an invalid character or with a run of too many characters."""
    characters = np.frombuffer(b"".join(codes), np.uint8)
    code_ends = np.cumsum([len(code) for code in codes])
    run_ends = np.flatnonzero(characters - np.uint8(48) & 32 == 0)
    foreign = np.flatnonzero((characters < 48) | (characters > 111))
    too_long = run_ends[np.diff(run_ends, prepend=-1) > MAX_RUN_CHARACTERS]
    for wrong, reason in ((foreign, FOREIGN), (too_long, UNFILLED)):
        if len(wrong):
            return int(np.searchsorted(code_ends, wrong[0], side="right")), reason
    return None


def find_wrong_sum(codes: list[bytes], pixels: np.ndarray) -> tuple[int, str] | None:
    """The first code whose runs do not add up to its number of pixels (N,)."""
    runs, runs_each = decode_runs(codes)
    first = np.cumsum(runs_each) - runs_each
    # Runs longer than the frame are excluded, because their sum could overflow to any number.
    too_short = np.minimum.reduceat(runs, first) < 0
    too_long = np.maximum.reduceat(runs, first) > pixels
    wrong = too_short | too_long | (np.add.reduceat(runs, first) != pixels)
    return (int(wrong.argmax()), UNFILLED) if wrong.any() else None
