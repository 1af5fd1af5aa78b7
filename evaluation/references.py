"""What results are scored, compared and drawn with: ground truth, other results, and frames.

Sources of evaluate.py, beside the data set itself. They are checked before a model runs.
"""

import argparse
from contextlib import suppress
from pathlib import Path

from data import Video, VideoSet, find_frames
from evaluation.scoring import read_parts, read_results
from evaluation.unfinished import Unfinished
from reading.annotations import AnnotationFile
from reading.ids import EntryName, id_key
from reading.layouts import find_ground_truth, find_split
from runtime.errors import InputError
from viewing.cards import Sources


def ground_truth_of(
    videos: VideoSet, args: argparse.Namespace, rank: int
) -> dict[str, AnnotationFile]:
    """The parts of the ground truth of a data set, by name.

    They are --annotations, or the annotation file of the data set. If that has no annotations,
    they are in the files that find_ground_truth (reading/layouts.py) finds, if any.
    """
    if args.annotations:
        return read_parts(args.annotations, args.skip_bad)
    if not videos.ground_truth["annotations"]:
        for paths in find_ground_truth(videos.path, args.data_root, args.split):
            names = " and ".join(map(str, paths))
            try:
                parts = read_parts(paths, args.skip_bad)
                message = f"not of these videos: {names}"
            except InputError as error:
                parts, message = {}, f"not used as ground truth: {error}"
            fits = is_ground_truth(parts, videos)
            if rank == 0:
                print(f"ground truth: {names}" if fits else message)
            if fits:
                return parts
    return {videos.path.stem: videos.file}


def is_ground_truth(parts: dict[str, AnnotationFile], videos: VideoSet) -> bool:
    """Whether files have annotations, the classes of a data set, and all of its videos."""
    contents = [part.content for part in parts.values()]
    ids = {id_key(video["id"]) for content in contents for video in content["videos"]}
    left_out = {id_key(video) for part in parts.values() for video in part.left_out}
    return (
        any(content["annotations"] for content in contents)
        and all(part.categories == videos.file.categories for part in parts.values())
        and {id_key(video.id) for video in videos.videos} <= ids | left_out
    )


def find_other(path: str | None, name: str, ground_truth: dict[str, AnnotationFile]) -> Path | None:
    """The results file of --compare for a data set: a file, or in an output folder of evaluate.py.

    name: of the suite, or "". Raises InputError unless it can be compared.
    """
    if path is None:
        return None
    other = Path(path)
    if other.is_dir():
        other = other / name / "results.json"
    elif name:
        raise InputError(
            f"--compare {path} is no folder: for suites, give the --output of another evaluation"
        )
    if not any(part.content["annotations"] for part in ground_truth.values()):
        raise InputError("--compare needs annotations: pass them with --annotations")
    try:
        read_results(other, ground_truth)
    except InputError as error:
        raise InputError(f"{other} cannot be compared: {error}") from error
    return other


def file_sources(ground_truth: dict[str, AnnotationFile], args: argparse.Namespace) -> Sources:
    """The frames in --images or --data-root for the pictures of a report, as far as they exist."""
    images = args.images
    if args.data_root and not images:
        _, images = find_split(args.data_root, args.split)
    files = {}
    for part in ground_truth.values() if images else ():
        for index, video in enumerate(part.content["videos"]):
            with suppress(InputError):
                where = EntryName("video", index, video, part.name)
                files[video["id"]] = find_frames(Path(images), video, where)
    return Sources(files)


def model_sources(unfinished: Unfinished, videos: list[Video]) -> Sources:
    """The frames and gates of a data set for the pictures of a report."""
    gates = {video.id: unfinished.load(video).gates.numpy() for video in videos}
    return Sources(
        {video.id: video.files for video in videos},
        {video: gate for video, gate in gates.items() if gate.size},
    )
