"""The command line of evaluate.py."""

import argparse

from checkpoint import SHIPPED_WEIGHTS
from fast.video_pipeline import INFERENCE_CHUNK
from model import PRESETS
from runtime.flags import at_least, finite
from synthetic.suites import SUITES
from tracker import PROPAGATIONS


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults evaluate the shipped weights."""
    parser = argparse.ArgumentParser(
        description="Evaluate a model on videos in the YouTube-VIS format, or score a results "
        "file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_flags(parser.add_argument_group("model").add_argument)
    add_data_flags(parser.add_argument_group("data").add_argument)
    add_result_flags(parser.add_argument_group("result").add_argument)
    add_run_flags(parser.add_argument_group("run").add_argument)
    return parser.parse_args(arguments)


def add_model_flags(add) -> None:
    """Flags for the model and its weights; `add` is add_argument."""
    add(
        "--weights",
        default=str(SHIPPED_WEIGHTS),
        help="checkpoint, ours or official: a file or an https address",
    )
    add("--preset", choices=PRESETS, help="of an official checkpoint (ours contain it)")
    add("--propagation", choices=PROPAGATIONS, help="if the checkpoint does not imply it")
    add(
        "--gate-mask",
        choices=("additive", "blocked"),
        help="of an official checkpoint (default: additive)",
    )


def add_data_flags(add) -> None:
    """Flags for the videos, and the size at which they are tested."""
    add(
        "--data-root",
        help="folder of one data set, such as datasets/ovis (train.py with a recipe takes the "
        "folder above)",
    )
    add("--split", default="valid", help="split of the data set")
    add("--json", help="annotation file, instead of --data-root")
    add(
        "--images",
        help="with --json, or with --results and --report: the folder of the frames, which file "
        "names are relative to",
    )
    add(
        "--suites",
        nargs="+",
        choices=SUITES,
        default=["easy", "occlusion"],
        metavar="SUITE",
        help="without a data set: the held-out videos of synthetic suites, which are written if "
        f"they do not exist: {', '.join(SUITES)}",
    )
    add("--sets", default="datasets/suites", help="folder with a folder for each suite")
    add(
        "--skip-bad",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="leave out, report and count unreadable videos and annotations, also in the metric",
    )
    add(
        "--short-side",
        type=at_least(1),
        help="of the frames, in pixels (default: the test size of the model; official: 360, Swin "
        "448)",
    )
    add("--max-long-side", type=at_least(1), default=1333, help="pixels")


def add_exclusive_flag(add) -> None:
    """--exclusive, also of demo.py."""
    add(
        "--exclusive",
        action="store_true",
        help="give each detection of a frame to one track, whose mask it becomes: fewer identity "
        "switches; not in the paper",
    )


def add_result_flags(add) -> None:
    """Flags for results, pictures and metrics."""
    add("--top-k", type=at_least(1), default=10, help="instances per video (official: 10, OVIS 20)")
    add_exclusive_flag(add)
    add(
        "--output",
        help="folder to write (default: evaluation/ next to the weights; for the shipped weights, "
        "a folder in runs/)",
    )
    add(
        "--draw",
        type=at_least(0),
        default=0,
        metavar="N",
        help="draw overlays of the first N videos",
    )
    add(
        "--plot",
        type=at_least(0),
        metavar="N",
        help="plot precision over recall, AP by class, and the tracks and gates of the first N "
        "videos over time (needs matplotlib)",
    )
    add(
        "--report",
        action="store_true",
        help="write report.html, which explains the metrics; with --results, its pictures show the "
        "frames of --images or --data-root",
    )
    add("--results", help="score this file instead of running a model")
    add(
        "--annotations",
        nargs="+",
        metavar="JSON",
        help="ground truth, or several parts of it, which are scored separately and averaged "
        "(default: that of the data set, or valid_gt.json, validGT.json, gt.json, or gt_short.json "
        "and gt_long.json next to it)",
    )
    add(
        "--compare",
        metavar="RESULTS",
        help="results file of the same videos, or the --output of another evaluation: print the "
        "differences with bootstrap intervals",
    )
    add(
        "--track-score",
        type=finite,
        default=0.3,
        help="minimum score of the predictions that HOTA, MOTA and IDF1 are computed from",
    )
    add(
        "--boundary",
        action="store_true",
        help="also compute AP by the boundaries of masks (0.4 ms per mask of 360x640)",
    )


def add_run_flags(add) -> None:
    """Flags for device, precision and loading."""
    add("--device", default="auto", help="auto, cpu, cuda")
    add(
        "--amp",
        default="auto",
        choices=("auto", "bf16", "fp16", "off"),
        help="mixed precision: auto = fp16 on a GPU, off (float32) on a CPU",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile the model on a GPU: takes half a minute per frame size, results differ "
        "by rounding",
    )
    add(
        "--chunk",
        type=at_least(1),
        default=INFERENCE_CHUNK,  # the number that a GPU detects at once
        help="frames loaded together; does not change the results",
    )
    add(
        "--workers",
        type=at_least(0),
        help="loader processes per GPU; 0 = none (default: one per CPU core, at most 16, fewer if "
        "shared memory is small)",
    )
