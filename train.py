"""Train the stages of GRAtt-VIS: a detector on images, then VITA, GenVIS or GRAtt-VIS on videos.

    python train.py                            # toy preset on synthetic videos, on 2 CPU cores
    python train.py --render easy occlusion    # scenes rendered on the fly
    torchrun --nproc-per-node 8 train.py --recipe grattvis/ovis/r50 --init vita_r50_ovis.pth
    torchrun --nproc-per-node 8 train.py --recipe grattvis/ovis/r50 --resume auto

Without --stage or --recipe, the whole model is trained at once, detector included. The flags are in
trainer/flags.py, the official settings in recipes.py. Writes last.pt (everything needed to resume,
see trainer/run.py), args.json and log.jsonl to --output, and best.pt with --evaluate-every.
Paper: GRAtt-VIS (arXiv 2305.17096), implementation details. Upstream: train_net_grattvis.py.

Every step seeds torch from (seed, step, rank), and its clips depend only on (seed, step). A run can
therefore be resumed exactly without storing any random state. SIGINT and SIGTERM finish the current
step and save last.pt. Machines need not share a file system, because only rank 0 reads and writes
--output.
"""

import argparse
import inspect
import math
from contextlib import ExitStack, closing, nullcontext
from time import perf_counter

import torch
import torch.distributed as distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.ops import FrozenBatchNorm2d
from tqdm import tqdm

from checkpoint import load_backbone, load_weights
from clips import Clip, ClipDataset, MixedClips, StepSampler
from data import VideoSet
from fast.acceleration import accelerate_training
from fast.fused_sampling import fuse_sampling
from losses import Criterion
from model import PRESETS, GRAttVIS, build_model, option_types
from reading.configs import check_options
from runtime.device import choose_amp, make_deterministic, upload
from runtime.errors import InputError, cli_errors
from runtime.files import checksum
from runtime.flags import flags_named
from runtime.loading import choose_workers, read_ahead
from runtime.processes import (
    broadcast,
    errors_of_any_process,
    largest,
    require_agreement,
    start_processes,
    started,
    stop_processes,
)
from runtime.stopping import Stopped, deferred_stop, stop_requested
from synthetic.clips import RenderedClips
from trainer.checks import check_run, choose_seed, values_to_agree_on
from trainer.datasets import clip_bytes, open_clips
from trainer.flags import parse_arguments
from trainer.folder import prepare_folder, read_resumed
from trainer.held_out import open_held_out, pause_to_evaluate
from trainer.messages import describe_nonfinite, log_record, print_setting
from trainer.official_names import print_official_setting
from trainer.run import Run

PREFETCH = 4  # batches that each loader process reads ahead


# A step


def train_step(
    network: nn.Module,
    criterion: Criterion,
    clips: list[Clip],
    args: argparse.Namespace,
    device: torch.device,
    amp_dtype: torch.dtype,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> tuple[dict[str, float], float]:
    """Compute the clipped gradients of this process's clips, in --accumulate micro-batches.

    Each micro-batch is normalised by its own instances, as if it were a process; the gradient is
    their mean. Returns the losses, averaged over micro-batches and processes, and the gradient norm
    before clipping. Both are the same in all processes, even if not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    size = len(clips) // args.accumulate  # of a micro-batch
    mean_losses = 0
    for first in range(0, len(clips), size):
        micro_batch = clips[first : first + size]
        is_last = first + size == len(clips)
        with nullcontext() if is_last else no_sync(network):
            # Autocast covers the network; the criterion computes in float32.
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
                output = network([upload(clip.frames, device) for clip in micro_batch])
            losses, _ = criterion(output, micro_batch, whole_video=args.propagation == "clip")
            values = torch.stack(list(losses.values())) / args.accumulate
            scaler.scale(values.sum()).backward()
        mean_losses = mean_losses + values.detach()
    scaler.unscale_(optimizer)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(trained, args.clip_gradient or math.inf)
    if started():
        distributed.all_reduce(mean_losses)
        mean_losses = mean_losses / distributed.get_world_size()
    # Speed: one copy to the CPU, so that it waits for the GPU once.
    *values, grad_norm = torch.cat((mean_losses, grad_norm[None].to(mean_losses))).tolist()
    return dict(zip(losses, values)), grad_norm


def no_sync(network: nn.Module):
    """A context in which DDP accumulates gradients without synchronising them."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


# The model and its losses


def make_model(
    args: argparse.Namespace, categories: list[tuple[int, str]], resumed: dict | None, say
) -> tuple[GRAttVIS, dict]:
    """The model with its initial weights, and the config to store in checkpoints.

    say: prints what was loaded.
    """
    # Every flag named like an argument of the model, such as --window. Checkpoints store them.
    options = flags_named(option_types().keys() - {"num_classes", "propagation"}, args)
    check_options(options, "the command line")
    model = build_model(args.preset, len(categories), args.propagation, **options)
    config = {
        "preset": args.preset,
        "propagation": args.propagation,
        "model_options": options,
        "test_short_side": args.test_short_side,
        "categories": [list(category) for category in categories],
        "args": vars(args),
    }
    if resumed:
        if resumed["config"].get("categories") != config["categories"]:
            raise InputError(f"{args.resume} was trained on other classes than the data set has")
        report = load_weights(model, resumed)
        if report.missing or report.unexpected:
            raise InputError(f"{args.resume} does not fit the model: {report}")
    else:
        if args.init:
            say(f"init: {load_weights(model, args.init, args.reset_classes)}")
        if not args.init and not args.backbone_weights and has_frozen_norms(model.backbone):
            say(
                "warning: the backbone is random and its norms are frozen, so it trains badly: "
                "give --backbone-weights imagenet, or --norm group"
            )
        if args.backbone_weights:
            backbone = PRESETS[args.preset]["backbone"]
            say(f"backbone: {load_backbone(model, args.backbone_weights, backbone)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not args.freeze_detector or name.startswith("tracker."))
    return model, config


def has_frozen_norms(module: nn.Module) -> bool:
    return any(isinstance(part, FrozenBatchNorm2d) for part in module.modules())


def set_up(
    model: GRAttVIS, args: argparse.Namespace, device: torch.device, amp_dtype: torch.dtype
) -> None:
    """Move the model to its device and prepare it for training."""
    # Speed: channels last, for convolutions on a GPU.
    on_gpu = device.type == "cuda"
    memory_format = torch.channels_last if on_gpu else torch.contiguous_format
    model.to(device, memory_format=memory_format).train()
    model.pixel_decoder.recompute = args.recompute != "off"
    model.backbone.recompute = args.recompute == "all"
    accelerate_training(model, amp_dtype, args.compile, args.graphs)


def make_network(
    model: GRAttVIS, args: argparse.Namespace, device: torch.device, world: int
) -> nn.Module:
    """The model, wrapped so that the processes average their gradients."""
    if world == 1:
        return model
    # With a single clip the memory is written but never read, so DDP must expect weights without
    # gradients.
    unread_memory = model.tracker.use_memory and args.frames <= args.clip_length
    devices = [device] if device.type == "cuda" else None
    network = DistributedDataParallel(model, devices, find_unused_parameters=unread_memory)
    if has_frozen_norms(model.backbone):  # whose buffers are constants
        network.broadcast_buffers = False
    return network


def make_criterion(args: argparse.Namespace, num_classes: int) -> Criterion:
    """The losses, with every flag that is named like an argument of Criterion, such as --points."""
    names = inspect.signature(Criterion).parameters.keys() - {"num_classes"}
    return fuse_sampling(Criterion(num_classes, **flags_named(names, args)))


# Optimizer and schedule


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, backbone_factor: float
) -> list[dict]:
    """AdamW parameter groups, as upstream.

    No weight decay for norms, nn.Embedding, relative position tables and vectors other than biases,
    such as layer scales. Biases do decay, and so does the gate's weight (1, C).
    """
    norms = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
    groups: dict[tuple[float, float], list] = {}
    for module_name, module in model.named_modules():
        rate = lr * (backbone_factor if module_name.startswith("backbone") else 1.0)
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            is_vector = all(size == 1 for size in parameter.shape[1:])  # (C,) or (C, 1, 1)
            exempt = (
                isinstance(module, (*norms, nn.Embedding))
                or name == "relative_position_bias_table"
                or (is_vector and not name.endswith("bias"))
            )
            groups.setdefault((rate, 0.0 if exempt else weight_decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def learning_rate_factor(
    step: int, warmup: int, milestones: list[int], start: float = 0.0, gamma: float = 0.1
) -> float:
    """Linear warm-up from `start` to 1, multiplied by gamma at every milestone."""
    warm = min(1.0, (step + 1) / max(warmup, 1))
    passed = sum(step >= milestone for milestone in milestones)
    return (start + (1 - start) * warm) * gamma**passed


def make_run(
    model: GRAttVIS,
    config: dict,
    args: argparse.Namespace,
    device: torch.device,
    amp_dtype: torch.dtype,
    rank: int,
    resumed: dict | None,
) -> Run:
    """The run, with optimizer and schedule.

    resumed: the contents of a checkpoint whose weights are already in the model.
    """

    def factor(step: int) -> float:
        return learning_rate_factor(
            step, args.warmup, args.lr_steps, args.warmup_start, args.lr_gamma
        )

    groups = parameter_groups(model, args.lr, args.weight_decay, args.backbone_lr_factor)
    optimizer = torch.optim.AdamW(groups, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    averaged = None
    if args.ema:
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    run = Run(model, config, args, device, amp_dtype, optimizer, schedule, scaler, averaged, rank)
    if resumed:
        run.restore(resumed)
    return run


# The run


def advance(
    run: Run, network: nn.Module, criterion: Criterion, clips: list[Clip]
) -> tuple[dict[str, float], float, str]:
    """Train one step on this process's clips.

    Returns losses, gradient norm, and the reason if the step was not taken.
    """
    buffers = list(run.model.buffers()) if run.args.skip_nonfinite else []
    buffers_before = [buffer.clone() for buffer in buffers]
    losses, grad_norm = train_step(
        network, criterion, clips, run.args, run.device, run.amp_dtype, run.optimizer, run.scaler
    )
    reason = reason_to_skip(run, losses, grad_norm, clips)
    if reason:
        for buffer, before in zip(buffers, buffers_before):
            buffer.copy_(before)
    # An enabled scaler must be called even where it takes no step; a disabled one always takes it.
    if run.scaler.is_enabled() or not reason:
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.schedule.step()
    if run.averaged:
        run.averaged.update_parameters(run.model)
    run.step += 1
    return losses, grad_norm, reason


def reason_to_skip(run: Run, losses: dict[str, float], grad_norm: float, clips: list[Clip]) -> str:
    """Why the step must not be taken: something is not finite. Empty if it can be taken.

    Raises FloatingPointError if that is so in more than --skip-nonfinite consecutive steps.
    """
    total = sum(losses.values())
    # With fp16, gradients may overflow: the scaler then takes no step and lowers its scale.
    handled_by_scaler = run.scaler.is_enabled() and math.isfinite(total)
    if math.isfinite(grad_norm + total) or handled_by_scaler:
        run.not_taken_in_a_row = 0
        return ""
    run.not_taken_in_a_row += 1
    reason = describe_nonfinite(losses, grad_norm, run.step, run.learning_rate, clips)
    if run.not_taken_in_a_row > run.args.skip_nonfinite:
        raise FloatingPointError(reason)
    return reason


def train(
    run: Run,
    network: nn.Module,
    criterion: Criterion,
    bar: tqdm,
    held_out: VideoSet | None,
    skipped: int,
) -> None:
    """Train until the last step or a signal, with logs, evaluations and checkpoints.

    bar: iterates over lists of Clips, one per step. skipped: number of bad entries so far.
    """
    args = run.args
    if held_out and run.evaluation_pending:
        pause_to_evaluate(run, held_out, bar)
    began = step_ended = perf_counter()
    waited = 0.0  # for clips, since the last line of the log
    batches = () if run.stopping else bar  # a signal may have come during the evaluation
    for clips in batches:
        waited += perf_counter() - step_ended
        for message in [message for clip in clips for message in clip.skipped]:
            skipped += 1
            bar.write(f"skipped: {message}")
        torch.manual_seed(hash((args.seed, run.step, run.rank)) % 2**63)
        rate = run.learning_rate
        losses, grad_norm, reason = advance(run, network, criterion, clips)
        if reason:
            bar.write(f"step not taken: {reason}")
        if run.step % args.log_every == 0:
            seconds, began = perf_counter() - began, perf_counter()
            share = waited / seconds
            run.log(log_record(run, losses, grad_norm, rate, seconds, share, skipped))
            total = sum(losses.values())
            bar.set_postfix(loss=f"{total:.2f}", data=f"{share:.0%}", refresh=False)
            waited = 0.0
        if held_out and run.step % args.evaluate_every == 0:
            paused = perf_counter()
            pause_to_evaluate(run, held_out, bar)
            began += perf_counter() - paused  # evaluation does not count as training time
        if run.step % args.save_every == 0:
            run.save()
        run.stopping = run.stopping or largest(stop_requested())
        if run.stopping:
            break
        step_ended = perf_counter()
    run.save()
    bad = f"; skipped {skipped} bad videos, annotations and clips" if skipped else ""
    if run.rank == 0 and not run.stopping:
        bar.close()
        print(f"saved {run.last}{bad}")


def start(
    run: Run,
    clips: ClipDataset | MixedClips | RenderedClips,
    held_out: VideoSet | None,
    world: int,
    amp_reason: str,
) -> None:
    """Lock the output folder, start the loader processes, and train."""
    args = run.args
    with ExitStack() as stack:
        with errors_of_any_process():
            if run.rank == 0:
                stack.enter_context(prepare_folder(args, run.step))
                print_setting(run, clips, world, amp_reason)
                if not args.resume:
                    run.save()  # a run has a checkpoint as soon as it has a folder
        sampler = StepSampler(run.step, args.iterations, args.batch // world, run.rank, world)
        network = make_network(run.model, args, run.device, world)
        criterion = make_criterion(args, len(clips.categories))
        batches = read_ahead(
            clips, args.workers, run.device, batch_sampler=sampler, prefetch=PREFETCH
        )
        with (
            deferred_stop(),
            closing(batches),
            tqdm(
                batches,
                initial=run.step,
                total=args.iterations,
                desc="train",
                disable=run.rank > 0,
                mininterval=1,
            ) as bar,
        ):
            train(run, network, criterion, bar, held_out, clips.skipped.total)


def main(args: argparse.Namespace) -> None:
    """Run training in this process; torchrun starts one process per GPU."""
    if args.dry_run:
        print_official_setting(args)
        return
    rank, world, device = start_processes(args.device)
    if args.deterministic:
        make_deterministic()
    amp_dtype, amp_reason = choose_amp(args.amp, device, training=True)
    say = print if rank == 0 else lambda *_: None

    # An error in one process ends all of them before anything is written.
    with errors_of_any_process():
        resumed = read_resumed(args) if rank == 0 else None
    args.resume, resumed = broadcast((args.resume, resumed))
    args.seed = broadcast(choose_seed(args.seed, resumed))
    with errors_of_any_process():
        check_run(args, resumed, world)
        clips = open_clips(args)
        held_out = open_held_out(args, clips.categories)
        for message in held_out.skipped.sentences() if held_out else ():
            say(f"skipped: {message}")
        torch.manual_seed(args.seed)
        model, config = make_model(args, clips.categories, resumed, say)
        config["data"] = [checksum(path) for path in clips.paths]
    require_agreement(values_to_agree_on(args, config))
    if resumed and resumed["config"].get("data", config["data"]) != config["data"]:
        say(
            f"the annotations are not those that {args.resume} was trained on: from here on this "
            "is another run"
        )
    if args.workers is None:
        args.workers = choose_workers(4 if args.recipe else 2, clip_bytes(args, world), PREFETCH)
    set_up(model, args, device, amp_dtype)
    run = make_run(model, config, args, device, amp_dtype, rank, resumed)

    start(run, clips, held_out, world, amp_reason)
    stop_processes()
    if run.stopping:
        raise Stopped(
            run.stopping,
            f"{run.last} holds iteration {run.step} of {args.iterations}, "
            f"--resume {run.last} continues",
        )


if __name__ == "__main__":
    with cli_errors():
        main(parse_arguments())
