"""What a training run says about itself: its setting, its log, and why a step was not taken."""

import math

import torch

from clips import Clip, ClipDataset, MixedClips
from deform_attn import implementation
from recipes import RECIPES
from synthetic.clips import RenderedClips
from trainer.run import Run


def print_setting(
    run: Run, clips: ClipDataset | MixedClips | RenderedClips, world: int, amp_reason: str
) -> None:
    """Print the setting of a run, and the usual learning rate for another batch size.

    world: number of processes. amp_reason: why the run has its amp_dtype.
    """
    args = run.args
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    dtype = str(run.amp_dtype).removeprefix("torch.")
    print(
        f"{args.recipe or args.preset}, {args.propagation} propagation, {trained / 1e6:.1f} M "
        f"trained parameters; {run.device.type} x {world}, {dtype} ({amp_reason}); deformable "
        f"attention: {implementation(run.device)}"
    )

    source = (
        f"{len(clips.videos)} videos"
        if not args.render
        else (f"endless scenes ({', '.join(args.render)})")
    )
    parts = f" in {args.accumulate} parts" if args.accumulate > 1 else ""
    print(
        f"{source} of {len(clips.categories)} classes; a step is {args.batch} clips of "
        f"{args.frames} frames, {args.batch // world} a process{parts}; iterations {run.step} to "
        f"{args.iterations}; {args.workers} loader processes; output {args.output}"
    )
    for sentence in clips.skipped.sentences():
        print(f"skipped: {sentence}")

    usual = RECIPES[args.recipe][1] if args.recipe else {}
    if usual.get("batch", args.batch) != args.batch and args.lr == usual["lr"]:
        print(
            f"the recipe's learning rate {args.lr:g} is for {usual['batch']} clips a step; for "
            f"{args.batch}, --lr {args.lr * args.batch / usual['batch']:g} is usual (nothing was "
            "changed)"
        )


def describe_nonfinite(
    losses: dict[str, float], grad_norm: float, step: int, rate: float, clips: list[Clip]
) -> str:
    """Describe what is not finite, when, and for which clips of this process.

    losses: averaged over all processes. rate: the learning rate.
    """
    broken = [f"{name} {value}" for name, value in losses.items() if not math.isfinite(value)]
    broken = ", ".join(broken or [f"the gradient's norm {grad_norm}"])
    sources = "; ".join(clip.source for clip in clips)
    return (
        f"not finite at iteration {step}, learning rate {rate:g}: {broken}; clips: {sources}. "
        "Look at these, lower --lr, or pass --skip-nonfinite N"
    )


def log_record(
    run: Run,
    losses: dict[str, float],
    grad_norm: float,
    rate: float,
    seconds: float,
    data_share: float,
    skipped: int,
) -> dict:
    """A line of the log. seconds: since the line before; data_share: of them, waiting for clips."""
    on_gpu = run.device.type == "cuda"
    record = {
        "step": run.step,
        "loss": sum(losses.values()),
        "lr": rate,
        # With fp16, the scaler takes no step whose norm is not finite.
        "gradient_norm": grad_norm if math.isfinite(grad_norm) else None,
        "iterations_per_second": run.args.log_every / seconds,
        "data_share": data_share,
        # Not the memory of tensors, which leaves out what CUDA graphs keep.
        "memory_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None,
        "skipped": skipped,
    }
    return record | losses
