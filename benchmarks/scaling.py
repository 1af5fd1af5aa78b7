"""Training on several GPUs of one machine, from JPEG files: clips per second, loading included.

    python benchmarks/scaling.py --gpus 1 2 4                # frame sizes of the official recipe
    python benchmarks/scaling.py --gpus 1 4 --one-size       # short side 480, no crops
    python benchmarks/scaling.py --gpus 1 2 --flags --no-graphs

Runs train.py with torchrun: R-50, 8 clips of 5 frames per GPU, the recipe grattvis/ovis/r50 with a
frozen detector, random weights, and the frames of benchmarks/loading.py. Each run has a row, with
the rate in each third of its iterations: at first, loaders fill their queues and new frame sizes
come, each of which costs time once (docs/performance.md); in the last third, the loaders finish
before the training. The ratio is that of the second thirds.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from loading import make_scene  # noqa: E402

from checkpoint import save_checkpoint  # noqa: E402
from model import build_model  # noqa: E402
from synthetic.scenes import CATEGORIES  # noqa: E402
from synthetic.suites import write_split  # noqa: E402

CLIPS = 8  # of a GPU and step
LOG_EVERY = 10  # iterations
RECIPE = "grattvis/ovis/r50"
ONE_SIZE = ["--short-sides", "480", "--crop-short-sides"]


def make_inputs(root: Path, videos: int) -> None:
    """Write the data set, rendered on all cores, and the initial weights."""
    with multiprocessing.Pool() as pool:
        write_split(root, "train", pool.imap(make_scene, range(videos)))
    torch.manual_seed(0)
    save_checkpoint(root / "init.pt", {"model": build_model("r50", len(CATEGORIES)).state_dict()})


def train(root: Path, gpus: int, args: argparse.Namespace) -> list[dict]:
    """The log of a run."""
    output = root / f"run{gpus}"
    flags = {
        "--recipe": RECIPE,
        "--train-json": root / "train.json",
        "--train-images": root / "train/JPEGImages",
        "--init": root / "init.pt",
        "--num-classes": len(CATEGORIES),
        "--output": output,
        "--batch": CLIPS * gpus,
        "--iterations": args.iterations,
        "--workers": args.workers,
        "--log-every": LOG_EVERY,
        "--save-every": args.iterations + 1,
        "--seed": 0,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", gpus, "train.py"]
    command += [part for flag in flags.items() for part in flag]
    command += ONE_SIZE * args.one_size + args.flags
    if subprocess.run(list(map(str, command)), cwd=REPOSITORY).returncode:
        sys.exit(1)  # train.py has said why
    lines = (output / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def report(gpus: int, log: list[dict], rate_of_first: float | None) -> float:
    """Print the row of a run; returns the rate of its second third."""
    third = len(log) // 3
    thirds = log[:third], log[third : len(log) - third], log[len(log) - third :]
    rates = []
    for rows in thirds:
        iteration = sum(1 / row["iterations_per_second"] for row in rows) / len(rows)  # seconds
        rates.append(CLIPS * gpus / iteration)
    waiting = sum(row["data_share"] for row in log) / len(log)
    ratio = rates[1] / (rate_of_first or rates[1])
    print(
        f"{gpus} GPUs: {rates[0]:.1f}, {rates[1]:.1f} and {rates[2]:.1f} clips/s by third, "
        f"{ratio:.2f} x; waiting for data {waiting:.1%}; loss {log[-1]['loss']:.2f}",
        flush=True,
    )
    return rates[1]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measure training on several GPUs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2], help="a run for each number")
    parser.add_argument("--iterations", type=int, default=300, help="of each run")
    parser.add_argument("--workers", type=int, default=14, help="loader processes of a GPU")
    parser.add_argument("--videos", type=int, default=48, help="of the data set")
    parser.add_argument("--one-size", action="store_true", help="train on frames of one size")
    parser.add_argument(
        "--flags", nargs=argparse.REMAINDER, default=[], help="the rest goes to train.py"
    )
    args = parser.parse_args(arguments)
    if args.iterations < 3 * LOG_EVERY or min(args.gpus) < 1:
        parser.error(f"--iterations must be at least {3 * LOG_EVERY}, and --gpus positive")
    return args


def main(args: argparse.Namespace) -> None:
    """Make the inputs, and run training with each number of GPUs."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"torch {torch.__version__}, {torch.cuda.device_count()} x {name}, {CLIPS} clips per GPU")
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), args.videos)
        first = None
        for gpus in args.gpus:
            rate = report(gpus, train(Path(folder), gpus, args), first)
            first = first or rate


if __name__ == "__main__":
    main(parse_arguments())
