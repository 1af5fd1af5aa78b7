"""A model over the videos of a data set: frames decoded ahead, any length, shared out to processes, resumed after a kill.

    for video, found in segment_videos(model, videos.videos, device, amp, short_side=360, max_long_side=1333, top_k=20):
        ...                                               # found: EncodedVideo, see postprocess.py

The results of a video go to a file of their own as soon as it is done (`Unfinished`), and all of them into one results.json at the
end, in the order of the videos' ids: so it is the same file for any number of processes, and however often the run was killed.
(To the last bit where sums are made in the same order: on GPUs of one kind, on a CPU with as many threads a process.)
Upstream: vita/data/ytvis_eval.py. Shape letters as in model.py.
"""
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from data import Video, test_frames
from evaluation.postprocess import EncodedVideo
from model import GRAttVIS
from reading.ids import id_order
from runtime.errors import InputError
from runtime.files import atomic_write, read_json, save_json
from runtime.loading import read_ahead
from runtime.processes import broadcast, gather, gather_to_first


class FrameBatches(Dataset):
    """The frames of some videos at test size, `chunk` at a time; no batch holds frames of two videos."""

    def __init__(self, videos: list[Video], short_side: int, max_long_side: int, chunk: int,
                 skip_bad: bool = False):
        """skip_bad: a batch that cannot be read is an InputError that is returned, not raised:
        a loader goes on after it."""
        self.short_side, self.max_long_side, self.chunk = short_side, max_long_side, chunk
        self.skip_bad = skip_bad
        self.parts = [(video, first) for video in videos for first in range(0, len(video.files), chunk)]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Tensor | InputError:
        """uint8 (N, 3, H, W)."""
        video, first = self.parts[index]
        files = slice(first, first + self.chunk)
        try:
            return torch.stack(list(test_frames(video, self.short_side, self.max_long_side, files)))
        except InputError as error:
            if not self.skip_bad:
                raise
            return error


def segment_videos(model: GRAttVIS, videos: list[Video], device: torch.device, amp: torch.dtype, short_side: int,
                   max_long_side: int, top_k: int, chunk: int = 8, workers: int = 0,
                   skip_bad: bool = False) -> Iterator[tuple[Video, EncodedVideo | InputError]]:
    """Every video with its instances, one after the other, with a progress bar.

    skip_bad: a video with a frame that cannot be read comes with the InputError that says so,
        instead of its instances.
    chunk: frames that are read and handed over together; no result depends on it. workers: processes that decode ahead, 0 = none.
    Memory does not grow with the length of a video but for its masks' codes.
    """
    batches = FrameBatches(videos, short_side, max_long_side, chunk, skip_bad)
    total = sum(len(video.files) for video in videos)
    with (tqdm(total=total, desc="segment", unit="frame", mininterval=1) as bar,
          closing(read_ahead(batches, workers, device, stoppable=True)) as loaded):
        loaded = timed(loaded, bar)
        for video in videos:
            parts = islice(loaded, math.ceil(len(video.files) / chunk))
            size = video.height, video.width
            try:
                with torch.autocast(device.type, amp, enabled=amp != torch.float32):
                    found = model.encode_video(readable(parts), size, top_k)
            except InputError as error:
                if not skip_bad:
                    raise
                found = error.with_traceback(None)  # it would keep all that belongs to the video
                for _ in parts:  # the rest of the video
                    pass
            except FloatingPointError as error:
                raise FloatingPointError(f"{video.files[0].parent}: {error}") from error
            yield video, found


def readable(batches: Iterator[Tensor | InputError]) -> Iterator[Tensor]:
    """The batches of a video up to one that could not be read, which is raised."""
    for batch in batches:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def timed(batches: Iterator[Tensor | InputError], bar: tqdm) -> Iterator[Tensor | InputError]:
    """The batches; the bar counts their frames and tells the share of time spent waiting."""
    began = mark = time.perf_counter()
    waited = 0.0
    for batch in batches:
        now = time.perf_counter()
        waited += now - mark
        bar.set_postfix(waiting=f"{waited / (now - began):.0%}", refresh=False)
        if isinstance(batch, Tensor):
            bar.update(len(batch))              # now: nobody comes back here after the last
        yield batch
        mark = time.perf_counter()


def share(videos: list[Video], rank: int, world: int) -> list[Video]:
    """The videos of one process: the longest first, each to the process that has the fewest frames so far."""
    frames, shares = [0] * world, [[] for _ in range(world)]
    for video in sorted(videos, key=lambda video: (-len(video.files), id_order(video.id))):
        least = frames.index(min(frames))
        frames[least] += len(video.files)
        shares[least].append(video)
    return shares[rank]


def to_entries(video: Video, found: EncodedVideo, categories: list[tuple[int, str]]) -> list[dict]:
    """The entries of results.json for one video: one an instance, with a mask for every frame.

    Ids are those of the annotation file.
    """
    return [{"video_id": video.id, "score": score, "category_id": categories[label][0], "segmentations": codes}
            for score, label, codes in zip(found.scores.tolist(), found.labels.tolist(), found.segmentations)]


class Unfinished:
    """The results so far, one file per video, in a folder that is removed once they are joined."""

    def __init__(self, folder: Path, setting: dict):
        """setting: all that the results depend on. InputError if the folder has those of another.
        """
        self.folder = folder
        path = folder / "setting.json"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            save_json(path, setting)
            return
        found = read_json(path)
        differing = [name for name in setting | found if setting.get(name) != found.get(name)]
        if differing:
            raise InputError(f"{folder} holds unfinished results of another setting "
                             f"({', '.join(differing)} differ): finish that run, remove the "
                             "folder, or give another --output")

    def path(self, video: Video) -> Path:
        return self.folder / f"{video.name}.json"

    def remaining(self, videos: list[Video]) -> list[Video]:
        """The videos that no process has results of."""
        done = set().union(*gather({video.id for video in videos if self.path(video).exists()}))
        return [video for video in videos if video.id not in done]

    def save(self, video: Video, found: EncodedVideo) -> None:
        """Write a video's results, whole or not at all."""
        contents = {"scores": found.scores.tolist(), "labels": found.labels.tolist(),
                    "track_ids": found.track_ids.tolist(), "segmentations": found.segmentations,
                    "gates": found.gates.tolist(), "gates_shape": list(found.gates.shape)}
        save_json(self.path(video), contents, indent=None)

    def load(self, video: Video) -> EncodedVideo:
        """A video's results; numbers are exactly those that were saved."""
        contents = read_json(self.path(video))
        gates = torch.tensor(contents["gates"], dtype=torch.bool).view(contents["gates_shape"])
        return EncodedVideo(torch.tensor(contents["scores"], dtype=torch.float64),
                            torch.tensor(contents["labels"]), torch.tensor(contents["track_ids"]),
                            contents["segmentations"], gates)

    def collect(self, videos: list[Video]) -> None:
        """Copy to rank 0 what other machines have in folders of their own."""
        missing = broadcast({video.id for video in videos if not self.path(video).exists()})
        here = [video for video in videos if video.id in missing and self.path(video).exists()]
        received = gather_to_first({video.id: read_json(self.path(video)) for video in here})
        for results in received:
            for video in videos:
                if video.id in results:
                    save_json(self.path(video), results[video.id], indent=None)

    def join(self, videos: list[Video], categories: list[tuple], path: Path) -> None:
        """Write the results of all videos into one file, a video at a time."""
        with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            start = "["
            for video in videos:
                for entry in to_entries(video, self.load(video), categories):
                    file.write(start + json.dumps(entry))
                    start = ",\n"
            file.write("[]\n" if start == "[" else "]\n")

    def remove(self) -> None:
        """Remove the folder; half removed, it would be taken for unfinished, so rename it first."""
        done = self.folder.with_name(self.folder.name + ".done")
        if done.exists():
            shutil.rmtree(done)
        if self.folder.exists():
            self.folder.rename(done)
            shutil.rmtree(done)
