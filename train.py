"""Train GRAtt-VIS, and the stages it starts from: a detector on images, VITA and GenVIS on videos.

    python train.py                                             # toy preset on the synthetic set, 2 CPU cores, minutes
    python train.py --render easy occlusion                     # on endless scenes that are drawn on the fly
    torchrun --nproc-per-node 8 train.py --recipe grattvis/ovis/r50 --init vita_r50_ovis.pth     # an official setting
    torchrun --nproc-per-node 8 train.py --recipe grattvis/ovis/r50 --resume runs/grattvis_ovis_r50/last.pt    # go on exactly

Settings are in recipes.py. Writes last.pt (model, optimizer, schedule, scaler, step, config), args.json and log.jsonl into
--output, and best.pt with --evaluate-every. Paper: GRAtt-VIS (arXiv 2305.17096), implementation details; upstream
train_net_grattvis.py.

Every step seeds torch from (seed, step, rank) and its clips are a function of (seed, step), so that a run resumes exactly
and no random state has to be stored.
"""
import argparse
import json
import math
import random
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as distributed
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoint import load_backbone, load_weights, read_run, save_checkpoint
from clips import StepSampler
from data import VideoSet
from deform_attn import implementation
from inference import segment_videos, to_entries
from losses import Criterion
from matcher import upload
from metric import evaluate_results
from model import PRESETS, GRAttVIS, build_model
from recipes import RECIPES, official_setting, open_clips, open_held_out, parse_arguments
from runtime.device import choose_amp, make_deterministic, start_processes
from runtime.errors import InputError, cli_errors
from runtime.files import atomic_write, checksum, save_json

MAY_CHANGE = {"recipe", "dry_run", "iterations", "output", "resume", "init", "backbone_weights", "reset_classes", "workers",
              "device", "recompute", "skip_nonfinite", "log_every", "save_every", "skip_bad", "data_root", "train_json", "train_images",
              "test_sets", "evaluate_every", "test_short_side", "test_max_long_side", "top_k"}       # between a run and its resumption


def main(args: argparse.Namespace) -> None:
    """One training run, in this process (torchrun starts one a GPU)."""
    if args.dry_run:
        print(json.dumps({"recipe": args.recipe, "stage": args.stage} | official_setting(args), indent=1))
        return
    rank, world, device = start_processes(args.device)
    say = print if rank == 0 else lambda *_: None
    if args.deterministic:
        make_deterministic()
    amp, reason = choose_amp(args.amp, device, training=True)
    output, last = Path(args.output), Path(args.output) / "last.pt"
    if args.resume == "auto":
        args.resume = str(last) if last.exists() else None
    resumed = read_run(args.resume) if args.resume else None
    choose_seed(args, resumed, world)
    check_run(args, resumed, world, last)
    clips = open_clips(args)
    held_out = open_held_out(args, clips.categories)
    torch.manual_seed(args.seed)
    model, config = make_model(args, clips.categories, resumed, say)
    config["data"] = [checksum(path) for path in clips.paths]
    if resumed and resumed["config"].get("data", config["data"]) != config["data"]:
        say(f"the annotations are not those that {args.resume} was trained on: from here on this is another run")
    set_up(model, args, device, amp)
    run = Run(model, config, args, device, amp, resumed)
    network = model
    if world > 1:
        unread_memory = model.tracker.remembers and args.frames <= args.clip_length  # one clip: written, never read
        network = nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None,
                                                      find_unused_parameters=unread_memory)
    criterion = Criterion(len(clips.categories), points=args.points, no_object_weight=args.no_object_weight,
                          similarity_weight=args.similarity_weight, gate_weight=args.gate_weight, gate_loss=args.gate_loss,
                          freeze_detector=args.freeze_detector, similarity_span=args.similarity_span)
    loader = DataLoader(clips, batch_sampler=StepSampler(run.step, args.iterations, args.batch // world, rank, world),
                        num_workers=args.workers, collate_fn=list, pin_memory=device.type == "cuda",
                        prefetch_factor=4 if args.workers else None)
    if rank == 0:
        describe(args, model, clips, world, device, f"{str(amp).removeprefix('torch.')} ({reason})", run.step)
        output.mkdir(parents=True, exist_ok=True)
        save_json(output / "args.json", vars(args))
        trim_log(output / "log.jsonl", run.step)

    bar = tqdm(loader, initial=run.step, total=args.iterations, desc="train", disable=rank > 0, mininterval=1)
    waited, skipped = 0.0, len(clips.skipped)
    began = mark = time.perf_counter()
    for batch in bar:
        waited += time.perf_counter() - mark
        for sentence in (sentence for clip in batch for sentence in clip.skipped):
            skipped += 1
            bar.write(f"skipped: {sentence}")
        torch.manual_seed(hash((args.seed, run.step, rank)) % 2 ** 63)
        losses, gradient, left_out = run.advance(network, criterion, batch)
        if left_out:
            bar.write(f"left out: {left_out}")
        if rank == 0 and run.step % args.log_every == 0:
            seconds, began = time.perf_counter() - began, time.perf_counter()
            total = sum(losses.values())
            log_line(output, {"step": run.step, "loss": total, "lr": run.schedule.get_last_lr()[0],
                              "gradient_norm": gradient if math.isfinite(gradient) else None,  # fp16 skips such a step
                              "iterations_per_second": args.log_every / seconds, "data_share": waited / seconds,
                              "memory_gib": torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else None,
                              "skipped": skipped} | losses)
            bar.set_postfix(loss=f"{total:.2f}", data=f"{waited / seconds:.0%}", refresh=False)
            waited = 0.0
        if held_out and run.step % args.evaluate_every == 0:
            paused = time.perf_counter()
            if rank == 0:
                bar.write(run.evaluate(held_out, output))
            if world > 1:
                distributed.barrier()
            began += time.perf_counter() - paused                  # the log tells the speed of training
        if rank == 0 and run.step % args.save_every == 0:
            run.save(last)
        mark = time.perf_counter()
    if rank == 0:
        run.save(last)
        say(f"saved {last}" + (f"; left out {skipped} bad videos, annotations and clips" if skipped else ""))
    if world > 1:
        distributed.destroy_process_group()


class Run:
    """What training changes, and so what a checkpoint holds: weights, their average, optimiser, schedule, scaler, the step."""

    def __init__(self, model: GRAttVIS, config: dict, args: argparse.Namespace, device: torch.device, amp: torch.dtype,
                 resumed: dict | None):
        """resumed: the contents of a checkpoint to go on from, whose weights the model has already."""
        self.model, self.config, self.args, self.device, self.amp = model, config, args, device, amp
        self.optimizer = torch.optim.AdamW(parameter_groups(model, args.lr, args.weight_decay, args.backbone_lr_factor), fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: learning_rate_factor(
            step, args.warmup, args.lr_steps, args.warmup_start, args.lr_gamma))
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
        self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) if args.ema else None
        self.parts = {"optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}
        self.parts |= {"ema": self.averaged} if args.ema else {}
        self.step, self.best, self.left_out = 0, -1.0, 0           # steps done, the best AP, steps left out in a row
        if resumed:
            self.step, self.best = resumed["step"], resumed.get("best", -1.0)
            for name, part in self.parts.items():
                part.load_state_dict(resumed[name])

    def advance(self, network: nn.Module, criterion: Criterion, batch: list) -> tuple[dict[str, float], float, str]:
        """One step, by this process's clips of it: losses, gradient norm, and why it was left out, if it was. FloatingPointError if it
        is not finite, and --skip-nonfinite steps before it were not."""
        norms = [buffer.clone() for buffer in self.model.buffers()] if self.args.skip_nonfinite else []
        losses, gradient = train_step(network, criterion, batch, self.args, self.device, self.amp, self.optimizer, self.scaler)
        total, reason = sum(losses.values()), ""
        found_scale = self.scaler.is_enabled() and math.isfinite(total)           # in fp16 the scaler leaves such a step out by itself
        self.left_out = 0 if math.isfinite(gradient + total) or found_scale else self.left_out + 1
        if self.left_out:
            reason = describe_nonfinite(losses, gradient, self.step, self.schedule.get_last_lr()[0], batch)
            if self.left_out > self.args.skip_nonfinite:
                raise FloatingPointError(reason)
            for buffer, before in zip(self.model.buffers(), norms):
                buffer.copy_(before)
        if not self.left_out or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        if self.averaged:
            self.averaged.update_parameters(self.model)
        self.step += 1
        return losses, gradient, reason

    def evaluate(self, videos: VideoSet, output: Path) -> str:
        """Measure the model on held-out videos (the averaged one where there is one): a line of the log, and best.pt if it is the best
        so far; returns a sentence."""
        model, args = self.averaged.module if self.averaged else self.model, self.args
        weights = self.finite_weights(model)
        model.eval()
        results = [entry for video, found in segment_videos(model, videos.videos, self.device, self.amp, args.test_short_side,
                                                            args.test_max_long_side, args.top_k, workers=args.workers)
                   for entry in to_entries(video, found, videos.categories)]
        model.train()
        metrics = {name: value for name, value in evaluate_results(results, videos.ground_truth).items() if isinstance(value, float)}
        log_line(output, {"step": self.step} | metrics)
        sentence = f"iteration {self.step}: AP {100 * metrics['AP']:.1f}"
        if metrics["AP"] <= self.best:
            return sentence
        self.best = metrics["AP"]
        save_checkpoint(output / "best.pt", {"model": weights, "step": self.step, "best": self.best, "config": self.config})
        return f"{sentence}, the best so far"

    def finite_weights(self, model: GRAttVIS) -> dict[str, torch.Tensor]:
        """The model's state; FloatingPointError if there is anything in it that is not finite."""
        weights = model.state_dict()
        if broken := [name for name, value in weights.items() if not value.isfinite().all()]:
            raise FloatingPointError(f"{', '.join(broken[:3])} {'is' if len(broken) == 1 else 'are'} not finite at iteration {self.step}: "
                                     "the checkpoints were left as they were")
        return weights

    def save(self, path: Path) -> None:
        """Write the checkpoint."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        save_checkpoint(path, {"model": self.finite_weights(self.model), "step": self.step, "best": self.best, "config": self.config}
                        | states)


def train_step(network: nn.Module, criterion: Criterion, batch: list, args: argparse.Namespace, device: torch.device,
               amp: torch.dtype, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> tuple[dict[str, float], float]:
    """Clipped gradients of one process's share of a step, in --accumulate parts; returns the losses, averaged over parts and
    processes, and the norm that the gradients had: the same in all processes, also where they are not finite.

    Each part counts its own instances, as each process would: the mean of the parts is what the optimiser sees.
    """
    optimizer.zero_grad(set_to_none=True)
    size, totals = len(batch) // args.accumulate, 0
    for first in range(0, len(batch), size):
        part, synchronised = batch[first:first + size], first + size == len(batch)
        with nullcontext() if synchronised or not hasattr(network, "no_sync") else network.no_sync():
            with torch.autocast(device.type, amp, enabled=amp != torch.float32):
                predictions = network([upload(clip.frames, device) for clip in part])
            losses, _ = criterion(predictions, part, whole_video=args.propagation == "clip")
            values = torch.stack(list(losses.values())) / args.accumulate
            scaler.scale(values.sum()).backward()
        totals = totals + values.detach()
    scaler.unscale_(optimizer)
    gradient = nn.utils.clip_grad_norm_(network.parameters(), args.clip_gradient or math.inf)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(totals)
        totals = totals / distributed.get_world_size()
    *values, gradient = torch.cat((totals, gradient[None].to(totals))).tolist()  # one wait for the GPU
    return dict(zip(losses, values)), gradient


def describe_nonfinite(losses: dict[str, float], gradient: float, step: int, rate: float, batch: list) -> str:
    """What is not finite, when, and on what; the losses are all processes', the clips this one's."""
    broken = [f"{name} {value}" for name, value in losses.items() if not math.isfinite(value)] or [f"the gradient's norm {gradient}"]
    return (f"not finite at iteration {step}, learning rate {rate:g}: {', '.join(broken)}; clips: "
            + "; ".join(clip.source for clip in batch) + ". Look at these, lower --lr, or pass --skip-nonfinite N")


def describe(args: argparse.Namespace, model: GRAttVIS, clips, world: int, device: torch.device, dtype: str, start: int) -> None:
    """Print what the run is, and what the learning rate of another batch size usually is."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    source = f"endless scenes ({', '.join(args.render)})" if args.render else f"{len(clips.videos)} videos"
    print(f"{args.recipe or args.preset}, {args.propagation} propagation, {trained / 1e6:.1f} M trained parameters; {device.type} x "
          f"{world}, {dtype}; deformable attention: {implementation(device)}\n"
          f"{source} of {len(clips.categories)} classes; a step is {args.batch} clips of {args.frames} "
          f"frames, {args.batch // world} a process" + (f" in {args.accumulate} parts" if args.accumulate > 1 else "")
          + f"; iterations {start} to {args.iterations}; output {args.output}")
    for sentence in clips.skipped:
        print(f"skipped: {sentence}")
    usual = RECIPES[args.recipe][1] if args.recipe else {}
    if usual.get("batch", args.batch) != args.batch and args.lr == usual["lr"]:
        print(f"the recipe's learning rate {args.lr:g} is for {usual['batch']} clips a step; for {args.batch}, "
              f"--lr {args.lr * args.batch / usual['batch']:g} is usual (nothing was changed)")


def log_line(output: Path, record: dict) -> None:
    """Append a line to log.jsonl."""
    try:
        with open(output / "log.jsonl", "a") as log:
            log.write(json.dumps(record) + "\n")
    except OSError as error:
        raise InputError(f"{output / 'log.jsonl'} cannot be written: {error.strerror}; --resume {output / 'last.pt'} goes on") from error


def trim_log(path: Path, step: int) -> None:
    """Leave out what a run that died wrote after its last checkpoint, half a line perhaps: those steps are done again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    try:
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds a line that training did not write: {error!r}") from error
    if len(kept) < len(lines):
        with atomic_write(path) as temporary:
            temporary.write_text("".join(kept))


def choose_seed(args: argparse.Namespace, resumed: dict | None, world: int) -> None:
    """Put a seed in the place of -1, the same in all processes; the checkpoint's in a resumed run."""
    if args.seed >= 0:
        return
    if resumed:
        args.seed = ((resumed.get("config") or {}).get("args") or {}).get("seed", -1)
        return
    drawn = [random.SystemRandom().randrange(2 ** 31)]
    if world > 1:
        distributed.broadcast_object_list(drawn)
    args.seed = drawn[0]


def check_run(args: argparse.Namespace, resumed: dict | None, world: int, last: Path) -> None:
    """InputError for arguments that contradict one another, the checkpoint to resume, or a run that is already there."""
    if resumed:
        check_resumed(args, resumed)
    if last.exists() and not (args.resume and last.samefile(args.resume)):
        raise InputError(f"{last} exists: resume it (--resume), or choose another --output")
    if last.parent.exists() and not last.parent.is_dir():
        raise InputError(f"--output {last.parent} is a file, not a folder")
    if args.batch % (world * args.accumulate):
        parts = f" in {args.accumulate} parts" if args.accumulate > 1 else ""
        raise InputError(f"--batch {args.batch} cannot be shared by {world} processes{parts}")
    if args.deterministic and args.compile != "off":
        raise InputError("--deterministic and --compile do not go together: compiled sums are in any order")
    if bool(args.train_json) != bool(args.train_images):
        raise InputError("--train-json and --train-images go together")
    if args.render and (args.train_json or args.train_sets):
        raise InputError("--render draws the training clips: --train-json and --train-sets (which a recipe sets) do not go with it")
    if args.propagation != "clip" and args.frames % args.clip_length:
        raise InputError(f"--frames {args.frames} is no multiple of --clip-length {args.clip_length}")


def make_model(args: argparse.Namespace, categories: list[tuple[int, str]], resumed: dict | None, say) -> tuple[GRAttVIS, dict]:
    """The model with the weights it starts from, and the config that a checkpoint will carry; `say` prints what was loaded."""
    options = {"gate_mask": args.gate_mask, "clip_length": args.clip_length}
    options |= {name: getattr(args, name) for name in ("norm", "window") if getattr(args, name) is not None}
    model = build_model(args.preset, len(categories), args.propagation, **options)
    config = {"preset": args.preset, "propagation": args.propagation, "model_options": options, "test_short_side": args.test_short_side,
              "categories": [list(category) for category in categories], "args": vars(args)}
    if resumed:
        if resumed["config"].get("categories") != config["categories"]:
            raise InputError(f"{args.resume} was trained on other classes than the data set has")
        report = load_weights(model, resumed)
        if report.missing or report.unexpected:
            raise InputError(f"{args.resume} does not fit the model: {report}")
    else:
        if args.init:
            say(f"init: {load_weights(model, args.init, args.reset_classes)}")
        if args.backbone_weights:
            say(f"backbone: {load_backbone(model, args.backbone_weights, PRESETS[args.preset]['backbone'])}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not args.freeze_detector or name.startswith("tracker."))
    return model, config


def set_up(model: GRAttVIS, args: argparse.Namespace, device: torch.device, amp: torch.dtype) -> None:
    """Put the model on its device, ready to be trained as the arguments say."""
    on_gpu = device.type == "cuda"                                 # channels last: convolutions are faster there
    model.to(device, memory_format=torch.channels_last if on_gpu else torch.contiguous_format).train()
    if amp != torch.float32:
        model.hold_frozen(amp)
    model.tracker.query_noise = args.query_noise
    model.pixel_decoder.recompute, model.backbone.recompute = args.recompute != "off", args.recompute == "all"
    if args.compile != "off":
        model.compile_parts(detector=args.compile == "all")


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, backbone_factor: float) -> list[dict]:
    """AdamW groups as upstream: no decay for norms, nn.Embedding and relative position tables; biases do decay."""
    norms = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
    groups: dict[tuple[float, float], list] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            exempt = isinstance(module, (*norms, nn.Embedding)) or name == "relative_position_bias_table"
            key = (lr * (backbone_factor if module_name.startswith("backbone") else 1.0), 0.0 if exempt else weight_decay)
            groups.setdefault(key, []).append(parameter)
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]


def learning_rate_factor(step: int, warmup: int, milestones: list[int], start: float = 0.0, gamma: float = 0.1) -> float:
    """Linear warm-up from a share of the rate, then times gamma at every milestone."""
    warm = min(1.0, (step + 1) / max(warmup, 1))
    return (start + (1 - start) * warm) * gamma ** sum(step >= milestone for milestone in milestones)


def check_resumed(args: argparse.Namespace, resumed: dict) -> None:
    """A resumed run must be the run that was interrupted: InputError naming what differs."""
    before = vars(parse_arguments([])) | resumed["config"]["args"]     # what an older version did not know was at its default
    changed = [name for name, value in vars(args).items() if name not in MAY_CHANGE and before[name] != value]
    if changed:
        raise InputError(f"{args.resume} was trained with " + ", ".join(
            f"--{name.replace('_', '-')} {before[name]} (now {getattr(args, name)})" for name in changed))
    if resumed["step"] > args.iterations:
        raise InputError(f"{args.resume} is already at iteration {resumed['step']}, past --iterations {args.iterations}")


if __name__ == "__main__":
    with cli_errors():
        main(parse_arguments())
