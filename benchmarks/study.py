"""Ablation study of the gate: AP by occlusion, identity switches, and when gates are open.

    python train.py --stage vita --preset small --output runs/study/vita \\
        --render easy occlusion look-alike degraded ...
    python benchmarks/study.py train --init runs/study/vita/last.pt --seeds 3
    python benchmarks/study.py measure runs/study/*-*/last.pt
    python benchmarks/study.py table runs/study.json --plot runs/study/plots

`train` trains the tracker of every configuration with several seeds, starting from one VITA model
with a frozen detector (the last stage of the paper). Only the flags of CONFIGURATIONS and the seed
differ. Several runs share a GPU, because one does not saturate it. `measure` runs every checkpoint
on the held-out videos of every suite (synthetic/suites.py; missing suites are written) and writes
one record each into a JSON file. `table` prints means and standard deviations over the records with
the same name and suite.

gate_measures.py says what is measured and how, gate_tables.py makes the tables.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from gate_measures import measure_suite  # noqa: E402
from gate_tables import TITLES, format_table, plot_lines, read_groups  # noqa: E402

from checkpoint import default_short_side, model_from_checkpoint  # noqa: E402
from evaluate import check_categories, open_suite  # noqa: E402
from model import GRAttVIS  # noqa: E402
from runtime.device import choose_amp, choose_device  # noqa: E402
from runtime.errors import InputError, cli_errors  # noqa: E402
from runtime.files import checksum, save_json  # noqa: E402
from runtime.flags import at_least  # noqa: E402
from synthetic.suites import SUITES  # noqa: E402
from viewing.plots import require_matplotlib  # noqa: E402

CONFIGURATIONS = {  # name: flags of train.py
    "plain": ("--propagation", "plain"),
    # As released: closed queries attend a little more.
    "gated": ("--propagation", "gated"),
    # As in the paper.
    "gated-blocked": ("--propagation", "gated", "--gate-mask", "blocked"),
    "memory": ("--propagation", "memory"),
    "gated+memory": ("--propagation", "gated+memory"),
    "gate-loss": ("--propagation", "gated", "--gate-weight", "1"),
    # About as many frames a step.
    "long-clips": ("--propagation", "gated", "--frames", "10", "--reach", "12", "--batch", "10"),
    # Over all clips of a video, as in CTVIS.
    "contrast": ("--propagation", "gated", "--similarity-span", "video"),
    # As in DVIS.
    "query-noise": ("--propagation", "gated", "--query-noise", "0.5"),
    # An instance is occluded in half of the clips, at random.
    "occlude": ("--propagation", "gated", "--occlude", "0.5"),
    "gate-loss+contrast": (
        *("--propagation", "gated", "--gate-weight", "1", "--similarity-span", "video"),
    ),
}
COMMON = (
    "--stage",
    "grattvis",
    "--preset",
    "small",
    "--render",
    "easy",
    "occlusion",
    "look-alike",
    "degraded",
    "--frames",
    "6",
    "--reach",
    "10",
    "--batch",
    "16",
    "--short-sides",
    "128",
    "--test-short-side",
    "128",
    "--lr",
    "5e-4",
    "--warmup",
    "100",
    "--workers",
    "2",
    "--log-every",
    "100",
)
EXCLUSIVE = ", exclusive"  # part of the name of records of `measure --exclusive`
PLOTTED = ("AP by gap", "open by share", "last open by share")
Running = dict[Path, tuple[subprocess.Popen, IO]]  # folder of a run: its process and its log


# Training


def train(args: argparse.Namespace) -> None:
    """Run train.py for every configuration and seed, so many at a time, on the GPUs in turn.

    InputError if one fails.
    """
    output = Path(args.output)
    waiting = [
        (name, seed, output / f"{name}-{seed}")
        for seed in range(args.seeds)
        for name in args.configurations
    ]
    for *_, folder in waiting:
        if folder.exists():
            raise InputError(f"{folder} exists: remove it, or give another --output")
    output.mkdir(parents=True, exist_ok=True)
    total = len(waiting)
    running: Running = {}
    with tqdm(total=total, desc="train", unit="run") as bar, ending(running):
        while waiting or running:
            while waiting and len(running) < args.parallel:
                number = total - len(waiting)
                name, seed, folder = waiting.pop(0)
                running[folder] = start_run(args, name, seed, folder, number)
            time.sleep(1)
            bar.update(remove_finished(running))


def start_run(
    args: argparse.Namespace, name: str, seed: int, folder: Path, number: int
) -> tuple[subprocess.Popen, IO]:
    """Start to train one configuration: the process, and the file that it prints to."""
    command = [
        sys.executable,
        str(REPOSITORY / "train.py"),
        *COMMON,
        *CONFIGURATIONS[name],
        "--seed",
        str(seed),
        "--init",
        args.init,
        "--output",
        str(folder),
        "--iterations",
        str(args.iterations),
        "--lr-steps",
        str(args.iterations * 4 // 5),
        "--save-every",
        str(args.iterations),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    gpus = torch.cuda.device_count()
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = str(number % gpus)
    log = open(folder.with_suffix(".txt"), "w+")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log), log


def remove_finished(running: Running) -> int:
    """Remove the runs that have ended, and return their number; InputError if one has failed."""
    finished = [folder for folder, (process, _) in running.items() if process.poll() is not None]
    for folder in finished:
        process, log = running.pop(folder)
        log.close()
        if process.returncode:
            raise InputError(f"the run {folder} ended with {process.returncode}: see {log.name}")
    return len(finished)


@contextmanager
def ending(running: Running) -> Iterator[None]:
    """End the processes that still run when the block is left."""
    try:
        yield
    finally:
        for process, log in running.values():
            process.terminate()
            process.wait()
            log.close()


# Measuring


def measure(args: argparse.Namespace) -> None:
    """Write the records; after each, so that what was measured before a kill is kept."""
    if args.names and len(args.names) != len(args.weights):
        raise InputError(
            f"{len(args.names)} names for {len(args.weights)} checkpoints: give one for each"
        )
    output = Path(args.output)
    if output.exists():
        raise InputError(f"{output} exists: give another --output (`table` takes several files)")
    output.parent.mkdir(parents=True, exist_ok=True)
    sets = {suite: open_suite(suite, Path(args.sets) / suite, args.videos) for suite in args.suites}
    device = choose_device(args.device)
    amp_dtype, _ = choose_amp(args.amp, device)
    records = []
    for number, weights in enumerate(args.weights):
        model, config = model_from_checkpoint(weights)
        model.to(device).accelerate(amp_dtype)
        model.exclusive = args.exclusive
        setting = {
            "weights": weights,
            "propagation": model.propagation,
            "gate_mask": model.tracker.gate_mask,
            "short_side": default_short_side(config, None),
            "seed": config.get("args", {}).get("seed"),
            "amp": str(amp_dtype).removeprefix("torch."),
            "name": args.names[number] if args.names else name_of(model, weights, args.exclusive),
            "exclusive": args.exclusive,
        }
        for suite, videos in sets.items():
            check_categories(model, config, videos, weights)
            data = {"suite": suite, "videos": len(videos), "checksum": checksum(videos.path)}
            measured = measure_suite(
                model, videos, device, amp_dtype, setting["short_side"], SUITES[suite].difficulty
            )
            records.append(setting | data | measured)
            save_json(output, records)
            scores = measured["scores"]
            print(
                f"{weights}, {setting['name']}, {suite}: AP {100 * scores['AP']:.1f}, "
                f"{scores['switches']:.2f} identity switches a video",
                flush=True,
            )


def name_of(model: GRAttVIS, weights: str, exclusive: bool) -> str:
    """The configuration that `train` has trained, or propagation and gate mask."""
    name = Path(weights).parent.name.rpartition("-")[0]  # gated-blocked-2/last.pt
    if name not in CONFIGURATIONS:
        name = model.propagation
        if model.tracker.gated:
            name += f", {model.tracker.gate_mask}"
    return name + EXCLUSIVE * exclusive


# Tables


def table(args: argparse.Namespace) -> None:
    """Print the tables, and draw them where a folder is given."""
    if args.plot:
        require_matplotlib()
    exclusive = [name + EXCLUSIVE for name in CONFIGURATIONS]
    groups = read_groups(args.files, order=[*SUITES, *CONFIGURATIONS, *exclusive])
    if args.names:
        groups = {group: records for group, records in groups.items() if group[1] in args.names}
        missing = set(args.names) - {name for _, name in groups}
        if missing:
            raise InputError(f"no record has the name {', '.join(sorted(missing))}")
    records = [record for group in groups.values() for record in group]
    keys = [key for key in TITLES if all(key in record for record in records)]
    tables = [format_table(groups, key) for key in keys]
    print("Mean ± standard deviation over n seeds.", *tables, sep="\n\n")
    if args.plot:
        folder = Path(args.plot)
        folder.mkdir(parents=True, exist_ok=True)
        for suite in dict.fromkeys(suite for suite, _ in groups):
            for key in PLOTTED:
                plot_lines(folder / f"{key.replace(' ', '_')}_{suite}.png", groups, suite, key)


# The command line


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Study what the gate is good for.")
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = argparse.ArgumentDefaultsHelpFormatter
    add_train_flags(commands.add_parser("train", formatter_class=defaults).add_argument)
    add_measure_flags(commands.add_parser("measure", formatter_class=defaults).add_argument)
    add_table_flags(commands.add_parser("table").add_argument)
    return parser.parse_args(arguments)


def add_train_flags(add) -> None:
    """Flags of `train`; `add` is add_argument."""
    add("--init", required=True, help="checkpoint of the stage vita, preset small, to start from")
    add("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    add("--seeds", type=at_least(1), default=3)
    add("--iterations", type=at_least(1), default=2000)
    add("--parallel", type=at_least(1), default=6, help="runs at a time, over all GPUs")
    add(
        "--output",
        default="runs/study",
        help="folder for the runs: NAME-SEED, and what they print in NAME-SEED.txt",
    )


def add_measure_flags(add) -> None:
    """Flags of `measure`."""
    add("weights", nargs="+", help="checkpoints of train.py")
    add(
        "--names",
        nargs="+",
        help="one for each checkpoint, the same for those that differ in the seed alone "
        "(default: the configuration of `train`, else propagation and gate mask)",
    )
    add("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    add("--sets", default="datasets/suites", help="folder that holds a folder for each suite")
    add(
        "--videos",
        type=at_least(1),
        default=24,
        help="held-out videos of a suite that has to be written",
    )
    add("--exclusive", action="store_true", help="as evaluate.py's")
    add("--output", default="runs/study.json", help="file to write")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="see evaluate.py")


def add_table_flags(add) -> None:
    """Flags of `table`."""
    add("files", nargs="+", help="what `measure` has written")
    add("--names", nargs="+", help="leave out the others")
    add(
        "--plot",
        metavar="FOLDER",
        help="also draw AP over occlusion and open gates over visible share (needs matplotlib)",
    )


if __name__ == "__main__":
    with cli_errors():
        args = parse_arguments()
        {"train": train, "measure": measure, "table": table}[args.command](args)
