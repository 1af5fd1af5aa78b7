"""The curves of a run for TensorBoard (--tensorboard), in the folder `tensorboard` of --output.

    python -m pip install tensorboard
    python train.py --tensorboard
    tensorboard --logdir runs

The numbers are those of viewing/curves.py: losses by kind, AP, learning rate, gradient norm, and
the share of time spent waiting for data.
"""

from importlib.util import find_spec
from pathlib import Path

from runtime.errors import InputError
from viewing.curves import curves


def require_tensorboard() -> None:
    """Raise InputError if tensorboard is not installed."""
    if find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs tensorboard: python -m pip install tensorboard")


def open_writer(output: Path, step: int):
    """A SummaryWriter. What an interrupted run wrote after `step`, its checkpoint, is hidden."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(output / "tensorboard", purge_step=step + 1)


def write_scalars(writer, record: dict) -> None:
    """Write the curves of a line of log.jsonl, so that they are on disk."""
    for name, [(step, value)] in curves([record]).items():
        writer.add_scalar(name.replace("loss ", "loss/"), value, step)
    writer.flush()
