"""Run a model over the videos of a data set.

    for video, result in segment_videos(model, videos, device, amp_dtype, short_side=360,
                                        max_long_side=1333, top_k=20):
        ...  # result: EncodedVideo, see postprocess.py

Worker processes decode frames ahead, and memory does not depend on the length of the videos.
Several processes can share the videos (`share`). unfinished.py keeps the results.

Upstream: vita/data/ytvis_eval.py. Shape letters are declared in model.py.
"""

import math
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from data import Video, frames_at_test_size
from evaluation.postprocess import EncodedVideo
from fast.video_pipeline import INFERENCE_CHUNK
from model import GRAttVIS
from reading.ids import id_order
from runtime.errors import InputError
from runtime.loading import read_ahead


class FrameBatches(Dataset):
    """Frames of videos at test size, in batches that never span two videos.

    chunk_size: frames per batch; the last batch of a video may hold fewer.
    skip_bad: return the InputError of a batch that cannot be read instead of raising it, so that
        a data loader continues after it.
    """

    def __init__(
        self,
        videos: list[Video],
        short_side: int,
        max_long_side: int,
        chunk_size: int,
        skip_bad: bool = False,
    ):
        self.short_side = short_side
        self.max_long_side = max_long_side
        self.chunk_size = chunk_size
        self.skip_bad = skip_bad
        self.batches = [
            (video, first) for video in videos for first in range(0, len(video.files), chunk_size)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Tensor | InputError:
        """The frames of a batch, uint8 (N, 3, H, W)."""
        video, first = self.batches[index]
        chunk = slice(first, first + self.chunk_size)
        frames = frames_at_test_size(video, self.short_side, self.max_long_side, chunk)
        try:
            return torch.stack(list(frames))
        except InputError as error:
            if not self.skip_bad:
                raise
            return error


def segment_videos(
    model: GRAttVIS,
    videos: list[Video],
    device: torch.device,
    amp_dtype: torch.dtype,
    short_side: int,
    max_long_side: int,
    top_k: int,
    chunk_size: int = INFERENCE_CHUNK,
    workers: int = 0,
    skip_bad: bool = False,
) -> Iterator[tuple[Video, EncodedVideo | InputError]]:
    """Yield each video with its instances, and show a progress bar.

    Memory grows with the length of a video only by the run-length codes of its masks.

    Args:
        short_side, max_long_side: test size in pixels.
        top_k: instances per video.
        chunk_size: frames that are loaded together; the results do not depend on it.
        workers: processes that decode frames ahead; 0 decodes in this process.
        skip_bad: yield the InputError of a video with an unreadable frame instead of raising it.

    Raises FloatingPointError, naming the video, if outputs are not finite.
    """
    batches = FrameBatches(videos, short_side, max_long_side, chunk_size, skip_bad)
    total = sum(len(video.files) for video in videos)
    with (
        tqdm(total=total, desc="segment", unit="frame", mininterval=1) as bar,
        closing(read_ahead(batches, workers, device, stoppable=True)) as loaded,
    ):
        loaded = with_progress(loaded, bar)
        for video in videos:
            of_video = islice(loaded, math.ceil(len(video.files) / chunk_size))
            size = video.height, video.width
            try:
                with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
                    result = model.encode_video(raise_errors(of_video), size, top_k)
            except InputError as error:
                if not skip_bad:
                    raise
                # The traceback would keep the tensors of the video alive.
                result = error.with_traceback(None)
                for _ in of_video:  # skip the rest of the video
                    pass
            except FloatingPointError as error:
                raise FloatingPointError(f"{video.files[0].parent}: {error}") from error
            yield video, result


def raise_errors(batches: Iterator[Tensor | InputError]) -> Iterator[Tensor]:
    """Yield the batches, and raise the first one that is an error."""
    for batch in batches:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def with_progress(
    batches: Iterator[Tensor | InputError], bar: tqdm
) -> Iterator[Tensor | InputError]:
    """Yield the batches; the bar counts frames and shows the share of time spent waiting."""
    began = mark = time.perf_counter()
    waited = 0.0
    for batch in batches:
        now = time.perf_counter()
        waited += now - mark
        bar.set_postfix(waiting=f"{waited / (now - began):.0%}", refresh=False)
        if isinstance(batch, Tensor):
            bar.update(len(batch))  # before yielding: the generator is not resumed after the last
        yield batch
        mark = time.perf_counter()


def share(videos: list[Video], rank: int, world: int) -> list[Video]:
    """The videos of one of `world` processes.

    The longest videos come first, each assigned to the process with the fewest frames so far.
    """
    frames = [0] * world
    shares = [[] for _ in range(world)]
    for video in sorted(videos, key=lambda video: (-len(video.files), id_order(video.id))):
        least = frames.index(min(frames))
        frames[least] += len(video.files)
        shares[least].append(video)
    return shares[rank]


def to_entries(video: Video, result: EncodedVideo, categories: list[tuple[int, str]]) -> list[dict]:
    """The entries of results.json for one video, with the ids of the annotation file.

    Each instance is one entry, with one RLE per frame.
    """
    scores = result.scores.tolist()
    labels = result.labels.tolist()
    return [
        {
            "video_id": video.id,
            "score": score,
            "category_id": categories[label][0],
            "segmentations": codes,
        }
        for score, label, codes in zip(scores, labels, result.segmentations, strict=True)
    ]
