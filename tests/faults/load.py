"""Long-running jobs of small models, and their resource usage; see tests/faults/test_load.py.

python tests/faults/load.py train FOLDER 100000      # steps, with a checkpoint every 1,000
python tests/faults/load.py step gated 10000         # frames of a live stream
python tests/faults/load.py evaluate FOLDER 1 10000  # videos, frames of each
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
TINY = dict(
    backbone="resnet10_thin",
    norm="batch",
    channels=32,
    heads=2,
    queries=4,
    frame_queries=4,
    pixel_layers=1,
    pixel_feed_forward=16,
    frame_layers=1,
    tracker_encoder_layers=1,
    tracker_decoder_layers=1,
    feed_forward=16,
)
SIDE = 64  # of frames, pixels; half as much in training


def family(pid: int) -> list[int]:
    """The process and its running descendants."""
    found = [pid]
    for parent in found:
        try:
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        except OSError:
            pass
    return found


def end(process: subprocess.Popen) -> None:
    """Kill what is left of a process and of all that come from it, the youngest first."""
    for member in family(process.pid)[::-1] if process.poll() is None else ():
        with suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    process.wait()


def usage(pid: int) -> dict[str, int]:
    """What a process and its children hold: bytes of memory that is no file's, open files, tensors
    on their way from a loader (files of shared memory without a name, more or fewer by a batch from
    look to look), bytes of shared memory that has a name.

    What they share since a fork counts for each: when one writes to it and gets a copy, nothing has
    grown but the copy's cost, which is bounded."""
    held = {"memory": 0, "files": 0, "on the way": 0, "processes": 0, "shared": 0}
    for path in Path("/dev/shm").glob("torch_*"):
        with suppress(FileNotFoundError):  # moved
            held["shared"] += path.stat().st_size
    for member in family(pid):
        try:
            rollup = Path(f"/proc/{member}/smaps_rollup").read_text()
            files = []
            for file in Path(f"/proc/{member}/fd").iterdir():
                with suppress(FileNotFoundError):  # closed
                    files.append(os.readlink(file))
        except OSError:  # it has just ended
            continue
        held["memory"] += 1024 * sum(
            int(line.split()[1])
            for line in rollup.splitlines()
            if line.startswith(("Anonymous:", "Swap:"))
        )
        on_the_way = sum(file.startswith("/dev/shm/torch_") for file in files)
        held["files"] += len(files) - on_the_way
        held["on the way"] += on_the_way
        held["processes"] += 1
    return held


def watch(command: list, log: Path, every: float = 2.0) -> list[dict[str, int]]:
    """Run a command and sample its resources periodically; RuntimeError if it fails."""
    samples = []
    with open(log, "w") as said:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=said,
            stderr=said,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            while process.poll() is None:
                samples.append(usage(process.pid))
                time.sleep(every)
        finally:
            end(process)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}: {log.read_text()[-2000:]}")
    # In the last one it may have been ending.
    return samples[:-1]


def train(folder: str, iterations: str) -> None:
    """A training run on a small set that is written to the folder, the detector frozen, one loader
    process.
    """
    import train as program

    make_dataset(
        Path(folder) / "set",
        train_videos=40,
        valid_videos=1,
        frames=4,
        height=SIDE // 2,
        width=SIDE // 2,
        objects=(1, 2),
    )
    program.main(
        program.parse_arguments(
            [
                "--data-root",
                f"{folder}/set",
                "--output",
                f"{folder}/run",
                "--device",
                "cpu",
                "--freeze-detector",
                "--init",
                "",
                "--frames",
                "2",
                "--reach",
                "3",
                "--batch",
                "1",
                "--points",
                "16",
                "--short-sides",
                str(SIDE // 2),
                "--workers",
                "1",
                "--lr",
                "1e-5",
                "--iterations",
                iterations,
                "--log-every",
                "100",
                "--save-every",
                "1000",
            ]
        )
    )


def step(propagation: str, frames: str) -> None:
    """A live stream through `step`."""
    network, state = model.build_model("toy", 3, propagation).eval(), None
    for _ in range(int(frames)):
        _, state = network.step(
            torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8), state, top_k=4
        )


def evaluate(folder: str, videos: str, frames: str) -> None:
    """Results of many or long videos, whose frames are a few files over and over."""
    import evaluate as program

    make_dataset(
        Path(folder) / "set",
        train_videos=1,
        valid_videos=1,
        frames=20,
        height=SIDE,
        width=SIDE,
        objects=(1, 2),
    )
    path = Path(folder) / "set/valid.json"
    content = json.loads(path.read_text())
    video, content["annotations"] = content["videos"][0], []
    names = (video["file_names"] * (int(frames) // 20 + 1))[: int(frames)]
    content["videos"] = [
        video | {"id": number, "file_names": names, "length": len(names)}
        for number in range(1, int(videos) + 1)
    ]
    path.write_text(json.dumps(content))
    network = model.build_model("toy", 6)
    config = {"preset": "toy", "propagation": "gated", "model_options": {}, "test_short_side": SIDE}
    torch.save({"model": network.state_dict(), "config": config}, Path(folder) / "model.pt")
    program.main(
        program.parse_arguments(
            [
                "--weights",
                f"{folder}/model.pt",
                "--data-root",
                f"{folder}/set",
                "--output",
                f"{folder}/out",
                "--device",
                "cpu",
                "--workers",
                "0",
                "--top-k",
                "4",
            ]
        )
    )


if __name__ == "__main__":
    import model
    from synthetic.suites import make_dataset

    model.PRESETS["toy"] = TINY
    {"train": train, "step": step, "evaluate": evaluate}[sys.argv[1]](*sys.argv[2:])
