"""Run-length codes equal those of pycocotools; invalid codes are detected."""

import numpy
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as rle

from evaluation import run_length
from evaluation.run_length import (
    PackedCodes,
    compress,
    decode_runs,
    encode,
    encode_chunk,
    encode_counts,
    find_fault,
    find_runs,
)

SIZES = [
    (1, 1, 1),
    (3, 1, 9),
    (3, 9, 1),
    (4, 6, 7),
    (3, 7, 10),
    (2, 5, 12),
    (2, 13, 8),
    (3, 4, 16),
    (2, 24, 54),
    (5, 2, 25),
]


def noise(*shape, density=0.5):
    """Masks of random pixels, the same in every run."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < density


def blobs(count, height, width):
    """Masks with smooth outlines: coarse noise, enlarged and cut."""
    coarse = torch.randn(1, count, 5, 6, generator=torch.Generator().manual_seed(count))
    return F.interpolate(coarse, (height, width), mode="bicubic")[0] > 0.2


def official(masks):
    """The codes of pycocotools."""
    codes = rle.encode(numpy.asfortranarray(masks.permute(1, 2, 0).numpy(), dtype=numpy.uint8))
    return [{"size": code["size"], "counts": code["counts"].decode()} for code in codes]


def characters_of_runs(code):
    """How many characters each run of a code takes."""
    lengths = [0]
    for character in code.encode():
        lengths[-1] += 1
        if not character - 48 & 32:
            lengths.append(0)
    return lengths[:-1]


def runs_by_pixel(mask):
    """The runs of one mask (H, W), background first, counted pixel by pixel down the columns."""
    runs, current = [0], False
    for pixel in mask.T.flatten().tolist():
        if pixel != current:
            runs.append(0)
        runs[-1] += 1
        current = pixel
    return runs


# Encoding


@pytest.mark.parametrize("density", [0, 0.02, 0.5, 1])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_codes_are_those_of_pycocotools(shape, density):
    masks = noise(*shape, density=density)
    assert encode(masks) == official(masks)


@pytest.mark.parametrize("height, width", [(40, 56), (61, 90), (33, 47)])
def test_smooth_masks(height, width):
    masks = blobs(7, height, width)
    assert 0.1 < masks.double().mean() < 0.9
    assert encode(masks) == official(masks)


@pytest.mark.parametrize("density", [0, 2e-5, 5e-5, 1])
def test_long_runs_take_several_characters(density):
    """A character holds five bits, so that runs of this frame take up to four, and so do their
    differences.
    """
    masks = noise(2, 300, 400, density=density)
    codes = encode(masks)
    assert codes == official(masks)
    lengths = {length for code in codes for length in characters_of_runs(code["counts"])}
    assert lengths >= ({3, 4} if 0 < density < 1 else {4})


def test_a_whole_frame_in_one_run():
    masks = torch.zeros(1, 720, 1280, dtype=torch.bool)
    (code,) = encode(masks)
    assert [code] == official(masks) and len(code["counts"]) == 5


def test_masks_that_touch_or_miss_the_first_pixel():
    """Background comes first, with a run of no pixels where there is none."""
    masks = torch.zeros(4, 3, 4, dtype=torch.bool)
    # In masks[2], a run continues in the next column.
    masks[0, 0, 0] = masks[1, 2, 3] = masks[2, 2, 0] = masks[2, 0, 1] = True
    masks[3] = True
    assert encode(masks) == official(masks)
    runs, runs_each = find_runs(masks.numpy())
    assert [part.tolist() for part in numpy.split(runs, runs_each.cumsum()[:-1])] == [
        [0, 1, 11],
        [11, 1],
        [2, 2, 8],
        [0, 12],
    ]


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 5, 0)], ids=str)
def test_no_masks_and_no_pixels(shape):
    masks = torch.zeros(shape, dtype=torch.bool)
    assert encode(masks) == official(masks) and len(encode(masks)) == shape[0]


@pytest.mark.parametrize(
    "view",
    [
        lambda masks: masks.transpose(1, 2),
        lambda masks: masks.permute(2, 0, 1),
        lambda masks: masks[:, 1:-2, 3:],
        lambda masks: masks[::2, ::3, ::2],
        lambda masks: masks[1:, :, 5:6],
        lambda masks: masks[:1].expand(4, -1, -1),
        lambda masks: masks.flip(2),
    ],
    ids=["transposed", "permuted", "cropped", "strided", "column", "expanded", "flipped"],
)
def test_views_of_other_tensors(view):
    masks = view(noise(5, 24, 16))
    assert encode(masks) == official(masks.contiguous())


def test_parts_and_threads_change_nothing(monkeypatch):
    """However few pixels are searched at once, and however many threads share the masks."""
    masks = torch.cat((noise(6, 9, 12), blobs(5, 9, 12)))
    expected = official(masks)
    monkeypatch.setattr(run_length, "THREADS", 4)
    for pixels in (1, 9 * 12, 3 * 9 * 12):
        monkeypatch.setitem(run_length.MAX_SEARCHED_PIXELS, numpy, pixels)
        monkeypatch.setitem(run_length.MAX_SEARCHED_PIXELS, torch, pixels)
        assert encode(masks) == expected and encode(masks[:1]) == expected[:1]
        assert [code.decode() for code in encode_chunk(masks)] == [
            code["counts"] for code in expected
        ]


@pytest.mark.parametrize(
    "masks",
    [
        torch.zeros(2, 3, 4, dtype=torch.uint8),
        torch.zeros(2, 3, 4),
        torch.zeros(3, 4, dtype=torch.bool),
        torch.zeros(1, 2, 3, 4, dtype=torch.bool),
    ],
    ids=["uint8", "float", "2d", "4d"],
)
def test_what_is_no_stack_of_masks_is_refused(masks):
    with pytest.raises(ValueError, match=r"bool of shape \(N, H, W\)"):
        encode(masks)


# The same text for tensors


@pytest.mark.parametrize("shape", [*SIZES, (2, 300, 400)], ids=str)
def test_tensors_give_the_codes_of_arrays(shape):
    """What a GPU does, here on the CPU; `encode` itself goes through NumPy there."""
    for masks in (noise(*shape), noise(*shape, density=0.01), blobs(*shape)):
        found, expected = compress(*find_runs(masks)), compress(*find_runs(masks.numpy()))
        for ours, array in zip(found, expected, strict=True):
            assert isinstance(ours, torch.Tensor) and numpy.array_equal(ours.numpy(), array)
        assert encode_chunk(masks) == encode_counts(masks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch sees")
def test_a_gpu_gives_the_codes_of_the_cpu(monkeypatch):
    sets = [noise(*shape) for shape in SIZES]
    sets += [blobs(30, 61, 90), noise(3, 300, 400, density=1e-4), noise(5, 24, 16).transpose(1, 2)]
    # All masks at once, and a few at a time.
    for pixels in (run_length.MAX_ENCODED_PIXELS, 1000):
        monkeypatch.setattr(run_length, "MAX_ENCODED_PIXELS", pixels)
        for masks in sets:
            assert encode(masks.cuda()) == encode(masks)
    assert encode(torch.zeros(0, 4, 5, dtype=torch.bool, device="cuda")) == []


# Decoding


@pytest.mark.parametrize("shape", [*SIZES, (3, 90, 120)], ids=str)
def test_decoded_runs_are_those_counted_pixel_by_pixel(shape):
    for density in (0, 0.002, 0.5, 1):
        masks = noise(*shape, density=density)
        expected = [runs_by_pixel(mask) for mask in masks]
        for found in (decode_runs(encode_counts(masks)), find_runs(masks.numpy())):
            runs, runs_each = found
            assert runs_each.tolist() == [len(each) for each in expected]
            assert runs.tolist() == [run for each in expected for run in each]


# Checking

SMALL, LARGE = blobs(4, 20, 30), noise(4, 9, 12)
PIXELS = [20 * 30] * 4 + [9 * 12] * 4
GOOD = [code["counts"] for code in encode(SMALL) + encode(LARGE)]
BAD = {
    "no end": (GOOD[0] + "P", "its last run has no end"),
    "cut": ("a0P", "its last run has no end"),
    "empty": ("", "its last run has no end"),
    "too high": ("p" + GOOD[0], "it holds a character that no code has"),
    "too low": ("/" + GOOD[0], "it holds a character that no code has"),
    "accent": ("\u00e9" + GOOD[0], "it holds a character that no code has"),
    "too few": ("1", "its runs do not fill the frame"),
    "too many": (GOOD[0] + "1", "its runs do not fill the frame"),
    "negative": (
        "3O" + encode(torch.zeros(1, 1, 20 * 30 - 2, dtype=torch.bool))[0]["counts"],
        "its runs do not fill the frame",
    ),
    "missing": (None, "its counts are a NoneType"),
    "number": (600, "its counts are a int"),
    "list": ([600], "its counts are a list"),
}


def test_good_codes_have_no_fault():
    texts, binary = GOOD, [code.encode() for code in GOOD]
    assert find_fault(texts, PIXELS) is None and find_fault(binary, PIXELS) is None
    assert find_fault([*texts[:4], *binary[4:]], PIXELS) is None
    assert find_fault([], []) is None
    # Nothing but background, and no pixels.
    assert find_fault(["6", "0"], [6, 0]) is None


def test_a_good_code_of_another_size_is_a_fault():
    assert find_fault(GOOD[:1], [20 * 30 + 1]) == (0, "its runs do not fill the frame")


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("place", [0, 2, 3])
def test_a_bad_code_is_found_at_its_place(kind, place):
    code, sentence = BAD[kind]
    codes = GOOD[:place] + [code] + GOOD[place + 1 :]
    assert find_fault(codes, PIXELS) == (place, sentence)
    if isinstance(code, str):
        codes = [code.encode() for code in codes]
        assert find_fault(codes, PIXELS) == (place, sentence)


@pytest.mark.parametrize("kind", ["no end", "accent", "too few", "number"])
@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_a_bad_code_is_found_in_a_later_part(monkeypatch, kind, at_once):
    """Its index is that in the whole list; the first of several is reported."""
    monkeypatch.setattr(run_length, "MAX_CHECKED_CODES", at_once)
    code, sentence = BAD[kind]
    codes, pixels = GOOD * 3, PIXELS * 3
    assert find_fault(codes, pixels) is None
    codes[17] = codes[19] = code
    assert find_fault(codes, pixels) == (17, sentence)


@pytest.mark.parametrize(
    "code", ["ZPPPPPPPPPPPP2", "oooooooooooo7oooooooooooo7<", "\ud800", "\u0660"]
)
def test_a_code_of_endless_runs_or_foreign_letters_is_a_fault(code):
    """64 bits would not hold such a run, and wrap round to any sum."""
    assert find_fault(["\x40", code], [16, 10])[0] == 1


def test_runs_whose_sum_wraps_round_are_a_fault():
    """None is negative, and in 64 bits they add up to the very number of pixels."""
    # Of a length that each run is longer than the one before the last.
    steps = numpy.arange(97_000) // 2 + 1
    length = 2**64 // int(steps.sum())
    runs = numpy.concatenate(([2**64 - length * int(steps.sum()) + 20 * 30], steps * length))
    code = compress(runs, numpy.array([len(runs)]))[0].tobytes()
    assert (decode_runs([code])[0] == runs).all() and runs.min() > 0 and runs.sum() == 20 * 30
    assert find_fault([GOOD[0], code], [20 * 30] * 2) == (1, "its runs do not fill the frame")


@pytest.mark.parametrize("lengths", [(1, 2, 3, 4, 5, 6), (7, 1, 1, 900, 3, 64), (4, 4, 4, 4, 4, 4)])
def test_packed_codes_come_out_as_they_went_in(lengths):
    """Every character that a code may have, codes of any lengths.

    In three quarters of their bytes, and of three things in turn.
    """
    random = numpy.random.default_rng(0)
    codes = [random.integers(48, 112, length, dtype=numpy.uint8).tobytes() for length in lengths]
    kept = PackedCodes(3)
    for first in (0, 3, 0):
        kept.add(codes[first:] + codes[:first])
    assert sum(three.nbytes for three, _ in kept.packed) <= 3 * (0.75 * sum(lengths) + 3)
    text = [code.decode() for code in codes]
    orders = [[place, place + 3, (place + 3) % 6, place, place, place + 3] for place in range(3)]
    assert kept.take([2, 0, 2]) == [
        [text[number] for number in orders[thing]] for thing in (2, 0, 2)
    ]
    assert not kept.packed


def test_packed_codes_stay_in_the_order_of_the_frames():
    """Of three instances, four frames that were added one by one and two together."""
    frames = [
        [f"{thing}{frame}".encode() * (thing + 1) for thing in range(3)] for frame in range(6)
    ]
    kept = PackedCodes(3)
    for codes in (*frames[:4], frames[4] + frames[5]):
        kept.add(codes)
    assert kept.take([1, 0]) == [[frame[thing].decode() for frame in frames] for thing in (1, 0)]
