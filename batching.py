"""Videos on their way into the model: any form of input becomes chunks of frames of one length.

A video is one tensor (T, 3, H, W), an iterable of frames (3, H, W), or an iterable of batches
(N, 3, H, W) of any lengths; frames are uint8, RGB, all of one size. Padding to multiples of 32 is
upstream's (grattvis/grattvis_model.py). Shape letters are declared in model.py.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

SIZE_DIVISOR = 32  # padded frames have sides that are multiples of the coarsest stride


def padded_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) rounded up to multiples of 32."""
    return tuple(math.ceil(side / SIZE_DIVISOR) * SIZE_DIVISOR for side in (height, width))


def short_side_size(
    height: int, width: int, short_side: int, max_long_side: int
) -> tuple[int, int]:
    """(height, width) with the given short side, or smaller to respect max_long_side.

    Both are at least one pixel.
    """
    scale = short_side / min(height, width)
    if max(height, width) * scale > max_long_side:
        scale = max_long_side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def check_frame(frame: Tensor) -> None:
    """Raise ValueError unless the frame is a uint8 tensor (3, H, W)."""
    if not isinstance(frame, Tensor):
        kind = f"{type(frame).__module__}.{type(frame).__name__}"
        raise ValueError(f"a frame must be a torch tensor, not {kind}")
    if frame.dtype != torch.uint8 or frame.ndim != 3 or len(frame) != 3:
        raise ValueError(
            f"a frame must be uint8 of shape (3, H, W), not {frame.dtype} {tuple(frame.shape)}"
        )


def split_video(video: Tensor | Iterable[Tensor], chunk_size: int) -> Iterator[Tensor]:
    """Yield a video in chunks (chunk_size, 3, H, W); the last one may be shorter.

    Raises ValueError if the video has no frames, if their sizes differ, or if they are not uint8.
    """
    batches = ((batch,) for batch in iter_batches(video))
    for (frames,) in merge_to_multiples(batches, chunk_size):
        yield from frames.split(chunk_size)


def iter_batches(video: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield a video of any form in batches (N, 3, H, W) of any lengths, checked."""
    size = None
    for item in [video] if isinstance(video, Tensor) else video:
        is_batch = hasattr(item, "ndim") and (item.ndim == 4 or item is video)
        if is_batch and not len(item):
            continue
        check_frame(item[0] if is_batch else item)
        batch = item if is_batch else item[None]
        if size is not None and batch.shape[2:] != size:
            sizes = sorted({tuple(size), tuple(batch.shape[2:])})
            raise ValueError(f"all frames of a video must have one size, not {sizes}")
        size = batch.shape[2:]
        yield batch
    if size is None:
        raise ValueError("the video has no frames")


def merge_to_multiples(
    batches: Iterable[tuple[Tensor, ...]], multiple: int
) -> Iterator[tuple[Tensor, ...]]:
    """Concatenate batches until their lengths are multiples of a number; the last one is the rest.

    A batch is a tuple of tensors of one length, concatenated along the first dimension.
    """
    held, count = [], 0  # batches not yet yielded, and their total length
    for batch in batches:
        held.append(batch)
        count += len(batch[0])
        rest = count % multiple
        if count == rest:
            continue
        merged = concatenate(held)
        whole = count - rest
        held = [tuple(tensor[whole:] for tensor in merged)] if rest else []
        yield tuple(tensor[:whole] for tensor in merged)
        count = rest
    if held:
        merged = concatenate(held)
        held.clear()  # Memory: the parts can be large
        yield merged


def concatenate(batches: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Concatenate tuples of tensors; a single one is returned without a copy."""
    return batches[0] if len(batches) == 1 else tuple(map(torch.cat, zip(*batches)))


def batch_frames(frames: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Stack frames (3, H, W) to batches of up to batch_size frames of one size."""
    if batch_size < 1:
        raise ValueError(f"a batch needs at least one frame, not {batch_size}")
    batch = []
    for frame in frames:
        check_frame(frame)
        if batch and (len(batch) == batch_size or frame.shape != batch[0].shape):
            yield torch.stack(batch)
            batch = []
        batch.append(frame)
    if batch:
        yield torch.stack(batch)
