"""Results on their way into one file: an interrupted evaluation continues where it stopped.

The results of a video are written to a file as soon as the video is done, and joined into one
results.json at the end, in the order of the video ids. The file is therefore the same for any
number of processes and interruptions. (It is bitwise the same if sums are computed in the same
order: on GPUs of one kind, or on a CPU with the same number of threads per process.)
"""

import hashlib
import json
import shutil
from pathlib import Path

import torch

from data import Video
from evaluation.inference import to_entries
from evaluation.postprocess import EncodedVideo
from runtime.errors import InputError
from runtime.files import atomic_write, read_json, save_json
from runtime.processes import broadcast, gather, gather_to_first


class Unfinished:
    """The results so far, in a folder with one file per video.

    The folder is removed once the results are joined into one file.

    setting: everything the results depend on, as JSON. Raises InputError if the folder holds
        results of another setting.
    """

    def __init__(self, folder: Path, setting: dict):
        self.folder = folder
        path = folder / "setting.json"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            save_json(path, setting)
            return
        before = read_json(path)
        if not isinstance(before, dict):
            raise InputError(f"{path} does not hold a setting: remove {folder}")
        differing = [name for name in setting | before if setting.get(name) != before.get(name)]
        if differing:
            raise InputError(
                f"{folder} holds unfinished results of another setting "
                f"({', '.join(differing)} differ): finish that run, remove the folder, or give "
                "another --output"
            )

    def path(self, video: Video) -> Path:
        return self.folder / f"{video.name}.json"

    def remaining(self, videos: list[Video]) -> list[Video]:
        """The videos without results in any process."""
        here = {video.id for video in videos if self.path(video).exists()}
        done = set().union(*gather(here))
        return [video for video in videos if video.id not in done]

    def save(self, video: Video, result: EncodedVideo) -> None:
        """Write the results of a video atomically."""
        contents = {
            "scores": result.scores.tolist(),
            "labels": result.labels.tolist(),
            "track_ids": result.track_ids.tolist(),
            "segmentations": result.segmentations,
            "gates": result.gates.tolist(),
            "gates_shape": list(result.gates.shape),
        }
        saved = {"digest": digest_of(contents), "contents": contents}
        save_json(self.path(video), saved, indent=None)

    def load(self, video: Video) -> EncodedVideo:
        """The results of a video, with exactly the numbers that were saved.

        Raises InputError if the file is not as `save` wrote it.
        """
        saved = read_json(self.path(video))
        contents = saved.get("contents") if isinstance(saved, dict) else None
        if contents is None or saved.get("digest") != digest_of(contents):
            raise InputError(
                f"{self.path(video)} is not as it was written: remove it, and the same command "
                "segments that video again"
            )
        gates = torch.tensor(contents["gates"], dtype=torch.bool)
        return EncodedVideo(
            scores=torch.tensor(contents["scores"], dtype=torch.float64),
            labels=torch.tensor(contents["labels"]),
            track_ids=torch.tensor(contents["track_ids"]),
            segmentations=contents["segmentations"],
            gates=gates.view(contents["gates_shape"]),
        )

    def collect(self, videos: list[Video]) -> None:
        """Copy the results that other machines wrote to folders of their own to rank 0."""
        missing = broadcast({video.id for video in videos if not self.path(video).exists()})
        here = [video for video in videos if video.id in missing and self.path(video).exists()]
        received = gather_to_first({video.id: read_json(self.path(video)) for video in here})
        for results in received:
            for video in videos:
                if video.id in results:
                    save_json(self.path(video), results[video.id], indent=None)

    def join(self, videos: list[Video], categories: list[tuple], path: Path) -> None:
        """Write the results of all videos into one file, one video at a time."""
        with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            start = "["
            for video in videos:
                for entry in to_entries(video, self.load(video), categories):
                    file.write(start + json.dumps(entry))
                    start = ",\n"
            file.write("[]\n" if start == "[" else "]\n")

    def remove(self) -> None:
        """Remove the folder.

        It is renamed first: if removal is interrupted, the rest must not look like unfinished
        results.
        """
        done = self.folder.with_name(self.folder.name + ".done")
        if done.exists():
            shutil.rmtree(done)
        if self.folder.exists():
            self.folder.rename(done)
            shutil.rmtree(done)


def digest_of(contents: dict) -> str:
    """A digest of the results of a video; JSON keeps every number exactly."""
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()
