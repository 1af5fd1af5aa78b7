"""Writes the results of a video: overlays, masks, ids, results.json and a timeline.

    with staging_folder(output) as folder:
        write_results(folder, source, result, size, count, names, ...)
        publish(folder, output)                # only now does the folder `output` exist

demo.py describes the files.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from tqdm import tqdm

from evaluation.postprocess import EncodedVideo
from reading.sources import read_again
from reading.videos import informative_line
from runtime.errors import InputError
from runtime.files import file_name_for, save_json
from viewing.overlays import best_labels, colour_of, name_to_draw, overlays, save_pictures
from viewing.plots import plot_timeline


def check_output(output: Path) -> None:
    """InputError unless the folder does not exist and can be created. Nothing is left behind."""
    try:
        os.lstat(output)
    except (FileNotFoundError, NotADirectoryError):
        with staging_folder(output):
            return
    raise InputError(f"{output} is there already: give another --output")


@contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """A new folder, which `publish` moves to `output` when it is complete.

    It is inside a hidden folder on the same file system, which is removed when the block ends, so
    that `output` is never incomplete. Raises InputError if it cannot be created.
    """
    absolute = output.absolute()
    parent = next(parent for parent in absolute.parents if parent.exists())
    if not parent.is_dir():
        raise InputError(f"{output} cannot be made: {parent} is no folder")
    with ExitStack() as stack:
        try:
            hidden = stack.enter_context(
                tempfile.TemporaryDirectory(prefix=".demo-", dir=parent, ignore_cleanup_errors=True)
            )
            folder = Path(hidden) / absolute.relative_to(parent)  # tests the length of the path
            folder.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{output} cannot be made: {error.strerror}") from error
        yield folder


def publish(folder: Path, output: Path) -> None:
    """Move a complete folder to its place; InputError if the place is taken in the meantime."""
    if os.path.lexists(output):  # rename would replace an empty folder
        raise InputError(
            f"{output} has appeared meanwhile and is left as it is: give another --output"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(output)
    except OSError as error:
        raise InputError(f"{output} cannot be made: {error.strerror}") from error


def write_results(
    folder: Path,
    source: str,
    result: EncodedVideo,
    size: tuple[int, int],
    count: int,
    names: list[str],
    *,
    min_score: float,
    fps: int,
    plot: bool,
) -> list[str]:
    """Write the instances of a video to a folder; returns messages to print.

    Args:
        source: the same frames as those of `result`; InputError if it has changed.
        size: (height, width) of the frames.
        count: number of frames.
        names: of the classes.
        min_score: of the instances to write.
        fps: frames per second of the animation and the mp4.
        plot: whether to plot the timeline, which needs matplotlib.
    """
    tracks = []
    for index in best_labels(result, min_score):
        label = names[result.labels[index]]
        track_id = int(result.track_ids[index])
        codes = result.segmentations[index]
        write_masks(folder / "masks" / f"{track_id:03d}_{file_name_for(label)}", codes)
        tracks.append(
            {
                "track_id": track_id,
                "category": label,
                "score": float(result.scores[index]),
                "segmentations": codes,
                "gates_open": result.gates[index].tolist(),
            }
        )
    if tracks:
        write_ids(folder / "ids", tracks, size, count)
    save_json(
        folder / "results.json",
        {
            "source": source,
            "height": size[0],
            "width": size[1],
            "frames": count,
            "tracks": tracks,
        },
    )
    with closing(read_again(source, size, count)) as frames:
        frames = tqdm(frames, desc="draw", unit="frame", total=count)
        pictures = overlays(frames, result, names, min_score)
        save_pictures(folder, "overlay", pictures, count, 1000 / fps, folder / "frames")
    messages = make_mp4(folder, fps) if shutil.which("ffmpeg") else []
    if plot:
        plot_timeline(folder / "timeline.png", result, names, min_score)
    message = f"{count} frames, {len(tracks)} tracks that score {min_score} or more"
    described = [
        f"{name_to_draw(track['category'])} #{track['track_id']} {track['score']:.2f}"
        for track in tracks
    ]
    if described:
        message += ": " + "; ".join(described)
    return [*messages, message]


def write_masks(folder: Path, codes: list[dict]) -> None:
    """Write the masks of a track as one PNG per frame."""
    folder.mkdir(parents=True)
    for t, code in enumerate(codes):
        Image.fromarray(rle.decode(code) * 255).save(folder / f"{t:05d}.png")


def write_ids(folder: Path, tracks: list[dict], size: tuple[int, int], count: int) -> None:
    """Write one PNG per frame with track ids plus 1 as palette indices, 0 = background.

    tracks: best first. Where masks overlap, the better track is visible. Ids too large for a
    palette become grey values of 16 bits.
    """
    folder.mkdir()
    large = any(track["track_id"] >= 255 for track in tracks)
    palette = [0, 0, 0, *(value for track in range(255) for value in colour_of(track))]
    for t in range(count):
        ids = np.zeros(size, dtype=np.uint16 if large else np.uint8)
        for track in reversed(tracks):
            ids[rle.decode(track["segmentations"][t]).astype(bool)] = track["track_id"] + 1
        picture = Image.fromarray(ids)
        if not large:
            picture.putpalette(palette)  # mode P
        picture.save(folder / f"{t:05d}.png")


def make_mp4(folder: Path, fps: int) -> list[str]:
    """Encode the overlays in frames/ as overlay.mp4; returns a message if that fails."""
    command = [
        "ffmpeg",
        "-loglevel",
        "error",
        "-framerate",
        str(fps),
        "-i",
        "frames/%05d.png",
        "-vf",
        "pad=ceil(iw/2)*2:ceil(ih/2)*2",
        "-pix_fmt",
        "yuv420p",
        "overlay.mp4",
    ]
    # Run in the folder, because its name may contain a %.
    made = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder)
    if not made.returncode:
        return []
    (folder / "overlay.mp4").unlink(missing_ok=True)
    return [f"overlay.mp4 was not made: {informative_line(made.stderr, made.returncode)}"]
