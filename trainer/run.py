"""The state of a training run, and how it is stored."""

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from checkpoint import save_checkpoint
from model import GRAttVIS
from trainer.folder import append_to_log
from trainer.tensorboard import open_writer, write_scalars


@dataclass
class Run:
    """The state of a training run: what last.pt stores, and what a step needs besides."""

    model: GRAttVIS
    config: dict  # stored in checkpoints, see checkpoint.read_config
    args: argparse.Namespace
    device: torch.device
    amp_dtype: torch.dtype
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler  # does nothing unless amp_dtype is float16
    averaged: AveragedModel | None  # with --ema
    rank: int = 0
    step: int = 0  # number of completed steps
    resumed_step: int = 0  # of the checkpoint that the run was resumed from
    best: float = -1.0  # best AP so far
    evaluation_pending: bool = False  # a signal interrupted the evaluation after this step
    not_taken_in_a_row: int = 0  # steps whose losses or gradients were not finite
    saved: int = -1  # step of the last checkpoint
    stopping: int = 0  # signal received by any process

    @property
    def output(self) -> Path:
        return Path(self.args.output)

    @property
    def last(self) -> Path:
        """The checkpoint that the run is resumed from."""
        return self.output / "last.pt"

    @property
    def learning_rate(self) -> float:
        """The rate of the next step; that of the backbone is this times --backbone-lr-factor."""
        return self.args.lr * self.schedule.lr_lambdas[0](self.step)

    @cached_property
    def writer(self):
        """Writes for TensorBoard."""
        return open_writer(self.output, self.resumed_step)

    @property
    def stateful(self) -> dict:
        """What has a state dict of its own in a checkpoint, besides the model."""
        parts = {"optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}
        return parts | ({"ema": self.averaged} if self.averaged else {})

    def restore(self, resumed: dict) -> None:
        """Continue from the contents of a checkpoint, whose weights are already in the model."""
        self.step = self.resumed_step = resumed["step"]
        self.best = resumed.get("best", -1.0)
        self.evaluation_pending = resumed.get("unevaluated", False)
        for name, part in self.stateful.items():
            part.load_state_dict(resumed[name])

    def save(self) -> None:
        """Write last.pt, in rank 0, unless this step is saved already."""
        if self.rank or self.saved == self.step:
            return
        contents = {
            "model": self.finite_weights(self.model),
            "step": self.step,
            "best": self.best,
            "unevaluated": self.evaluation_pending,
            "config": self.config,
        }
        for name, part in self.stateful.items():
            contents[name] = part.state_dict()
        save_checkpoint(self.last, contents)
        self.saved = self.step

    def finite_weights(self, model: GRAttVIS) -> dict[str, Tensor]:
        """The state dict of the model; FloatingPointError if any of it is not finite."""
        weights = model.state_dict()
        broken = [name for name, value in weights.items() if not value.isfinite().all()]
        if broken:
            names = f"{', '.join(broken[:3])} {'is' if len(broken) == 1 else 'are'}"
            raise FloatingPointError(
                f"{names} not finite at iteration {self.step}: the "
                "checkpoints were left as they were"
            )
        return weights

    def log(self, record: dict) -> None:
        """Append a line to log.jsonl, in rank 0; with --tensorboard, also for TensorBoard."""
        if self.rank:
            return
        append_to_log(self.output / "log.jsonl", record)
        if self.args.tensorboard:
            write_scalars(self.writer, record)
