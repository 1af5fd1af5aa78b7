"""Train GRAtt-VIS and its earlier stages: a detector on images, VITA and GenVIS on videos.

    python train.py                            # toy preset on synthetic videos, on 2 CPU cores
    python train.py --render easy occlusion    # scenes rendered on the fly
    torchrun --nproc-per-node 8 train.py --recipe grattvis/ovis/r50 --init vita_r50_ovis.pth
    torchrun --nproc-per-node 8 train.py --recipe grattvis/ovis/r50 --resume auto

The settings are in recipes.py. Writes last.pt (model, optimizer, schedule, scaler, step, config),
args.json and log.jsonl to --output, and best.pt with --evaluate-every. Paper: GRAtt-VIS (arXiv
2305.17096), implementation details. Upstream: train_net_grattvis.py.

Every step seeds torch from (seed, step, rank), and its clips depend only on (seed, step). A run can
therefore be resumed exactly without storing any random state. SIGINT and SIGTERM finish the current
step and save last.pt. Machines need not share a file system, because only rank 0 reads and writes
--output.
"""
import argparse
import json
import math
import random
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as distributed
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from augmentation import Augmentation
from checkpoint import load_backbone, load_weights, read_run, save_checkpoint
from clips import ClipDataset, MixedClips, StepSampler
from data import VideoSet, find_named_set, find_split
from deform_attn import implementation
from evaluation.inference import segment_videos, to_entries
from evaluation.metric import evaluate_results
from fast.acceleration import compile_parts, hold_frozen
from losses import Criterion
from model import PRESETS, GRAttVIS, build_model
from reading.ids import id_key
from recipes import RECIPES, official_setting, parse_arguments
from runtime.device import choose_amp, make_deterministic, upload
from runtime.errors import InputError, cli_errors
from runtime.files import atomic_write, checksum, folder_lock, save_json
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

# Arguments that may change between a run and its resumption.
MAY_CHANGE = {"recipe", "dry_run", "iterations", "output", "resume", "init", "backbone_weights",
              "reset_classes", "workers", "device", "recompute", "skip_nonfinite", "log_every",
              "save_every", "skip_bad", "data_root", "train_json", "train_images", "test_sets",
              "evaluate_every", "test_short_side", "test_max_long_side", "top_k"}
# Arguments that may differ between machines; of files, the contents are compared instead.
MAY_DIFFER = {"output", "resume", "init", "backbone_weights", "data_root", "train_json",
              "train_images", "device", "workers"}
FILES_OF_A_RUN = ("last.pt", "best.pt", "log.jsonl", "args.json")
PREFETCH = 4  # batches that each loader process reads ahead


def main(args: argparse.Namespace) -> None:
    """Run training in this process; torchrun starts one process per GPU."""
    if args.dry_run:
        setting = {"recipe": args.recipe, "stage": args.stage} | official_setting(args)
        print(json.dumps(setting, indent=1))
        return
    rank, world, device = start_processes(args.device)
    if args.deterministic:
        make_deterministic()
    amp_dtype, reason = choose_amp(args.amp, device, training=True)
    say = print if rank == 0 else lambda *_: None
    output = Path(args.output)

    # An error in one process ends all of them before anything is written.
    with errors_of_any_process():
        resumed = read_resumed(args, output) if rank == 0 else None
    args.resume, resumed = broadcast((args.resume, resumed))
    args.seed = broadcast(choose_seed(args.seed, resumed))
    with errors_of_any_process():
        check_run(args, resumed, world)
        clips = open_clips(args)
        held_out = open_held_out(args, clips.categories)
        for sentence in held_out.skipped.sentences() if held_out else ():
            say(f"skipped: {sentence}")
        torch.manual_seed(args.seed)
        model, config = make_model(args, clips.categories, resumed, say)
        config["data"] = [checksum(path) for path in clips.paths]
    require_agreement(describe_run(args, config))
    if resumed and resumed["config"].get("data", config["data"]) != config["data"]:
        say(f"the annotations are not those that {args.resume} was trained on: from here on this "
            "is another run")
    if args.workers is None:
        args.workers = choose_workers(4 if args.recipe else 2, clip_bytes(args, world), PREFETCH)
    set_up(model, args, device, amp_dtype)
    run = Run(model, config, args, device, amp_dtype, resumed, rank, world)

    with ExitStack() as stack:
        with errors_of_any_process():
            if rank == 0:
                stack.enter_context(prepare_folder(run))
                dtype = f"{str(amp_dtype).removeprefix('torch.')} ({reason})"
                describe(args, model, clips, world, device, dtype, run.step)
                if not resumed:
                    run.save()  # a run has a checkpoint as soon as it has a folder
        sampler = StepSampler(run.step, args.iterations, args.batch // world, rank, world)
        network = make_network(model, args, device, world)
        criterion = make_criterion(args, clips)
        with (deferred_stop(),
              closing(read_ahead(clips, args.workers, device, batch_sampler=sampler,
                                 prefetch=PREFETCH)) as batches,
              tqdm(batches, initial=run.step, total=args.iterations, desc="train",
                   disable=rank > 0, mininterval=1) as bar):
            train(run, network, criterion, bar, held_out, clips.skipped.total)
    stop_processes()
    if run.stopping:
        raise Stopped(run.stopping, f"{run.last} holds iteration {run.step} of {args.iterations}, "
                      f"--resume {run.last} continues")


@contextmanager
def prepare_folder(run: "Run") -> Iterator[None]:
    """Create and lock the output folder, and write args.json."""
    run.output.mkdir(parents=True, exist_ok=True)
    with folder_lock(run.output):
        check_folder(run.args, run.output)
        save_json(run.output / "args.json", vars(run.args))
        trim_log(run.output / "log.jsonl", run.step)
        yield


def train(run: "Run", network: nn.Module, criterion: Criterion, bar: tqdm,
          held_out: VideoSet | None, skipped: int) -> None:
    """Train until the last step or a signal, with logs, evaluations and checkpoints.

    bar: iterates over lists of Clips, one per step. skipped: number of bad entries so far.
    """
    args, on_gpu = run.args, run.device.type == "cuda"
    if held_out and run.unevaluated:
        run.pause_to_evaluate(held_out, bar)
    waited, began = 0.0, perf_counter()
    mark = began
    for batch in () if run.stopping else bar:
        waited += perf_counter() - mark
        for sentence in (sentence for clip in batch for sentence in clip.skipped):
            skipped += 1
            bar.write(f"skipped: {sentence}")
        torch.manual_seed(hash((args.seed, run.step, run.rank)) % 2 ** 63)
        losses, grad_norm, left_out = run.advance(network, criterion, batch)
        if left_out:
            bar.write(f"left out: {left_out}")
        if run.step % args.log_every == 0:
            seconds, began = perf_counter() - began, perf_counter()
            total = sum(losses.values())
            run.log({"step": run.step, "loss": total, "lr": run.schedule.get_last_lr()[0],
                     # fp16 skips such a step
                     "gradient_norm": grad_norm if math.isfinite(grad_norm) else None,
                     "iterations_per_second": args.log_every / seconds,
                     "data_share": waited / seconds,
                     "memory_gib": torch.cuda.max_memory_allocated() / 2 ** 30 if on_gpu else None,
                     "skipped": skipped} | losses)
            bar.set_postfix(loss=f"{total:.2f}", data=f"{waited / seconds:.0%}", refresh=False)
            waited = 0.0
        if held_out and run.step % args.evaluate_every == 0:
            paused = perf_counter()
            run.pause_to_evaluate(held_out, bar)
            began += perf_counter() - paused  # evaluation does not count as training time
        if run.step % args.save_every == 0:
            run.save()
        run.stopping = run.stopping or largest(stop_requested())
        if run.stopping:
            break
        mark = perf_counter()
    run.save()
    bad = f"; left out {skipped} bad videos, annotations and clips" if skipped else ""
    if run.rank == 0 and not run.stopping:
        bar.close()
        print(f"saved {run.last}{bad}")


class Run:
    """The state of a training run, as stored in a checkpoint.

    Weights, their average, optimizer, schedule, scaler, and the number of steps.
    """

    def __init__(self, model: GRAttVIS, config: dict, args: argparse.Namespace,
                 device: torch.device, amp_dtype: torch.dtype, resumed: dict | None, rank: int = 0,
                 world: int = 1):
        """resumed: the contents of a checkpoint whose weights are already in the model."""
        self.model, self.config, self.args = model, config, args
        self.device, self.amp_dtype, self.rank, self.world = device, amp_dtype, rank, world
        self.output, self.last = Path(args.output), Path(args.output) / "last.pt"
        groups = parameter_groups(model, args.lr, args.weight_decay, args.backbone_lr_factor)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(
                step, args.warmup, args.lr_steps, args.warmup_start, args.lr_gamma))
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
        self.averaged = None
        if args.ema:
            self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
        self.stateful = {
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "scaler": self.scaler,
        }
        if args.ema:
            self.stateful["ema"] = self.averaged
        self.step = 0             # number of completed steps
        self.best = -1.0          # best AP so far
        self.unevaluated = False  # whether a signal interrupted this step's evaluation
        self.left_out = 0         # consecutive skipped steps
        self.saved = -1           # step of the last checkpoint
        self.stopping = 0         # signal received by any process
        if resumed:
            self.step, self.best = resumed["step"], resumed.get("best", -1.0)
            self.unevaluated = resumed.get("unevaluated", False)
            for name, stateful in self.stateful.items():
                stateful.load_state_dict(resumed[name])

    def advance(self, network: nn.Module, criterion: Criterion,
                batch: list) -> tuple[dict[str, float], float, str]:
        """Train one step on this process's clips.

        Returns losses, gradient norm, and the reason if the step was skipped. Raises
        FloatingPointError after --skip-nonfinite consecutive skipped steps.
        """
        buffers = list(self.model.buffers()) if self.args.skip_nonfinite else []
        buffers_before = [buffer.clone() for buffer in buffers]
        losses, grad_norm = train_step(network, criterion, batch, self.args, self.device,
                                       self.amp_dtype, self.optimizer, self.scaler)
        total, reason = sum(losses.values()), ""
        # With fp16, the gradient scaler skips steps with non-finite gradients itself.
        handled_by_scaler = self.scaler.is_enabled() and math.isfinite(total)
        finite = math.isfinite(grad_norm + total) or handled_by_scaler
        self.left_out = 0 if finite else self.left_out + 1
        if self.left_out:
            rate = self.schedule.get_last_lr()[0]
            reason = describe_nonfinite(losses, grad_norm, self.step, rate, batch)
            if self.left_out > self.args.skip_nonfinite:
                raise FloatingPointError(reason)
            for buffer, before in zip(buffers, buffers_before):
                buffer.copy_(before)
        if not self.left_out or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        if self.averaged:
            self.averaged.update_parameters(self.model)
        self.step += 1
        return losses, grad_norm, reason

    def pause_to_evaluate(self, videos: VideoSet, bar: tqdm) -> None:
        """Evaluate in rank 0 while the other processes wait.

        If a signal interrupts the evaluation, it is repeated when the run is resumed.
        """
        if self.rank == 0:
            try:
                self.unevaluated = True
                bar.write(self.evaluate(videos))
                self.unevaluated = False
            except Stopped:
                pass  # the next line informs all processes
        self.stopping = largest(stop_requested())

    def evaluate(self, videos: VideoSet) -> str:
        """Evaluate the model (with --ema, the averaged one) on held-out videos.

        Writes a line of the log, and best.pt if the AP is the best so far. Returns a message.
        """
        model, args = self.averaged.module if self.averaged else self.model, self.args
        weights = self.finite_weights(model)
        model.eval()
        segmented = segment_videos(model, videos.videos, self.device, self.amp_dtype,
                                   args.test_short_side, args.test_max_long_side, args.top_k,
                                   workers=args.workers, skip_bad=args.skip_bad)
        results, left_out = [], []
        for video, result in segmented:
            if isinstance(result, InputError):
                tqdm.write(f"skipped: {result}")
                left_out.append(video.id)
            else:
                results += to_entries(video, result, videos.categories)
        model.train()
        metrics = evaluate_results(results, videos.file.without(left_out).content)
        metrics.pop("per_class")
        self.log({"step": self.step} | metrics)
        sentence = f"iteration {self.step}: AP {100 * metrics['AP']:.1f}"
        if metrics["AP"] <= self.best:
            return sentence
        self.best = metrics["AP"]
        save_checkpoint(self.output / "best.pt", {"model": weights, "step": self.step,
                                                  "best": self.best, "config": self.config})
        return f"{sentence}, the best so far"

    def log(self, record: dict) -> None:
        """Append a line to log.jsonl, in rank 0."""
        if self.rank:
            return
        path = self.output / "log.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}; --resume {self.last} "
                             "continues") from error

    def finite_weights(self, model: GRAttVIS) -> dict[str, torch.Tensor]:
        """The state dict of the model; FloatingPointError if any of it is not finite."""
        weights = model.state_dict()
        broken = [name for name, value in weights.items() if not value.isfinite().all()]
        if broken:
            names = f"{', '.join(broken[:3])} {'is' if len(broken) == 1 else 'are'}"
            raise FloatingPointError(f"{names} not finite at iteration {self.step}: the "
                                     "checkpoints were left as they were")
        return weights

    def save(self) -> None:
        """Write last.pt, in rank 0, unless this step is saved already."""
        if self.rank or self.saved == self.step:
            return
        contents = {
            "model": self.finite_weights(self.model),
            "step": self.step,
            "best": self.best,
            "unevaluated": self.unevaluated,
            "config": self.config,
        }
        for name, stateful in self.stateful.items():
            contents[name] = stateful.state_dict()
        save_checkpoint(self.last, contents)
        self.saved = self.step


def train_step(network: nn.Module, criterion: Criterion, batch: list, args: argparse.Namespace,
               device: torch.device, amp_dtype: torch.dtype, optimizer: torch.optim.Optimizer,
               scaler: torch.amp.GradScaler) -> tuple[dict[str, float], float]:
    """Compute the clipped gradients of this process's clips, in --accumulate micro-batches.

    Each micro-batch is normalised by its own instances, as if it were a process; the gradient is
    their mean. Returns the losses, averaged over micro-batches and processes, and the gradient norm
    before clipping. Both are the same in all processes, even if not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    size, totals = len(batch) // args.accumulate, 0
    for first in range(0, len(batch), size):
        micro_batch = batch[first:first + size]
        # DDP exchanges gradients only after the last micro-batch.
        last = first + size == len(batch) or not hasattr(network, "no_sync")
        with nullcontext() if last else network.no_sync():
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
                predictions = network([upload(clip.frames, device) for clip in micro_batch])
            losses, _ = criterion(predictions, micro_batch, whole_video=args.propagation == "clip")
            values = torch.stack(list(losses.values())) / args.accumulate
            scaler.scale(values.sum()).backward()
        totals = totals + values.detach()
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(network.parameters(), args.clip_gradient or math.inf)
    if started():
        distributed.all_reduce(totals)
        totals = totals / distributed.get_world_size()
    # A single synchronisation with the GPU.
    *values, grad_norm = torch.cat((totals, grad_norm[None].to(totals))).tolist()
    return dict(zip(losses, values)), grad_norm


def describe_nonfinite(losses: dict[str, float], grad_norm: float, step: int, rate: float,
                       batch: list) -> str:
    """Describe what is not finite, when, and for which clips of this process.

    losses: averaged over all processes.
    """
    broken = [f"{name} {value}" for name, value in losses.items() if not math.isfinite(value)]
    broken = ", ".join(broken or [f"the gradient's norm {grad_norm}"])
    sources = "; ".join(clip.source for clip in batch)
    return (f"not finite at iteration {step}, learning rate {rate:g}: {broken}; clips: {sources}. "
            "Look at these, lower --lr, or pass --skip-nonfinite N")


def describe(args: argparse.Namespace, model: GRAttVIS, clips, world: int, device: torch.device,
             dtype: str, start: int) -> None:
    """Print the setting of the run, and the usual learning rate for another batch size."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    source = f"{len(clips.videos)} videos" if not args.render else (
        f"endless scenes ({', '.join(args.render)})")
    parts = f" in {args.accumulate} parts" if args.accumulate > 1 else ""
    print(f"{args.recipe or args.preset}, {args.propagation} propagation, {trained / 1e6:.1f} M "
          f"trained parameters; {device.type} x {world}, {dtype}; deformable attention: "
          f"{implementation(device)}")
    print(f"{source} of {len(clips.categories)} classes; a step is {args.batch} clips of "
          f"{args.frames} frames, {args.batch // world} a process{parts}; iterations {start} to "
          f"{args.iterations}; {args.workers} loader processes; output {args.output}")
    for sentence in clips.skipped.sentences():
        print(f"skipped: {sentence}")
    usual = RECIPES[args.recipe][1] if args.recipe else {}
    if usual.get("batch", args.batch) != args.batch and args.lr == usual["lr"]:
        print(f"the recipe's learning rate {args.lr:g} is for {usual['batch']} clips a step; for "
              f"{args.batch}, --lr {args.lr * args.batch / usual['batch']:g} is usual (nothing was "
              "changed)")


def trim_log(path: Path, step: int) -> None:
    """Remove the lines after the last checkpoint, whose steps are repeated."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    try:
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds a line that training did not write: {error!r}") from error
    if len(kept) < len(lines):
        with atomic_write(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


# Data

def open_clips(args: argparse.Namespace) -> ClipDataset | MixedClips | RenderedClips:
    """The training clips: of one data set, of several named data sets, or of rendered scenes."""
    if args.render:
        clips = RenderedClips(args.render, args.frames, args.reach,
                              make_augmentation(args, pseudo=False), args.seed)
        check_num_classes(args, "--render", clips.categories)
        return clips
    if args.train_json:
        target = VideoSet(args.train_json, args.train_images, args.skip_bad)
    elif args.train_sets:
        return open_named_sets(args)
    else:
        target = VideoSet(*find_split(args.data_root, "train"), args.skip_bad)
    check_num_classes(args, target.path, target.categories)
    return make_clips(args, target)


def open_named_sets(args: argparse.Namespace) -> ClipDataset | MixedClips:
    """The clips of --train-sets. The classes are those of the last one, the target."""
    *others, last = [find_named_set(args.data_root, name) for name in args.train_sets]
    json_path, frames, category_map = last
    if category_map:
        raise InputError(f"--train-sets {' '.join(args.train_sets)}: the last must be the data set "
                         "whose classes are trained")
    target = VideoSet(json_path, frames, args.skip_bad)
    known = {id_key(category_id) for category_id, _ in target.categories}
    for _, _, category_map in others:
        unknown = set((category_map or {}).values()) - known
        if unknown:
            raise InputError(f"{target.path} lacks categories that COCO's are mapped to: "
                             f"{sorted(unknown)}")
    sources = [
        VideoSet(json_path, frames, args.skip_bad, category_map,
                 target.categories if category_map else None)
        for json_path, frames, category_map in others
    ]
    check_num_classes(args, target.path, target.categories)
    if not sources:
        return make_clips(args, target)
    if len(args.train_ratio or []) != len(args.train_sets):
        raise InputError("--train-ratio must give one share for each of the "
                         f"{len(args.train_sets)} sets")
    clips = [make_clips(args, videos) for videos in [*sources, target]]
    return MixedClips(clips, args.train_ratio, args.seed)


def make_clips(args: argparse.Namespace, videos: VideoSet) -> ClipDataset:
    """The clips of one data set; pseudo videos have an augmentation of their own."""
    augmentation = make_augmentation(args, pseudo=videos.category_map is not None)
    return ClipDataset(videos, args.frames, args.reach, augmentation, args.seed, args.skip_bad)


def make_augmentation(args: argparse.Namespace, pseudo: bool) -> Augmentation:
    """The augmentation of videos, or of pseudo videos."""
    return Augmentation(
        short_sides=tuple(args.pseudo_short_sides if pseudo else args.short_sides),
        max_long_side=args.max_long_side,
        crop_short_sides=tuple(args.crop_short_sides),
        crop_size=tuple(args.pseudo_crop_size if pseudo else args.crop_size),
        crop_relative=args.crop_relative and not pseudo,
        flip=args.flip,
        rotation=args.rotation if pseudo else 0.0,
        lsj_size=args.lsj_size if args.lsj else 0,
    )


def check_num_classes(args: argparse.Namespace, source, categories: list) -> None:
    """InputError if --num-classes is given and differs."""
    if args.num_classes not in (None, len(categories)):
        raise InputError(f"{source} has {len(categories)} categories, not {args.num_classes}")


def open_held_out(args: argparse.Namespace, categories: list[tuple[int, str]]) -> VideoSet | None:
    """The videos of periodic evaluation; None without --evaluate-every.

    Raises InputError if they have no annotations or other categories than the training clips.
    """
    if not args.evaluate_every:
        return None
    if args.train_json:
        raise InputError("--evaluate-every needs --data-root or --test-sets")
    if args.test_sets:
        json_path, frames, _ = find_named_set(args.data_root, args.test_sets[0])
    else:
        json_path, frames = find_split(args.data_root, "valid")
    videos = VideoSet(json_path, frames, args.skip_bad)
    if not videos.ground_truth["annotations"]:
        raise InputError(f"--evaluate-every: {videos.path} has no annotations")
    if [name for _, name in videos.categories] != [name for _, name in categories]:
        raise InputError(f"--evaluate-every: {videos.path} has other categories than the "
                         "training clips")
    return videos


def clip_bytes(args: argparse.Namespace, world: int) -> int:
    """Approximate size of one process's clips of a step: frames and masks of 10 instances."""
    short_side = max(args.short_sides + args.pseudo_short_sides)
    long_side = min(args.max_long_side, short_side * 16 // 9)
    pixels = args.lsj_size ** 2 if args.lsj else short_side * long_side
    return args.batch // world * args.frames * pixels * (3 + 10)


# Before a run

def read_resumed(args: argparse.Namespace, output: Path) -> dict | None:
    """The contents of the checkpoint to resume, or None; sets args.resume to its path."""
    if args.resume == "auto":
        last = output / "last.pt"
        args.resume = str(last) if last.exists() else None
    check_folder(args, output)
    return read_run(args.resume) if args.resume else None


def check_folder(args: argparse.Namespace, output: Path) -> None:
    """InputError if --output contains files of another run than the one to resume."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file, not a folder")
    existing = [name for name in FILES_OF_A_RUN if (output / name).exists()]
    if not existing:
        return
    last, resumed = output / "last.pt", Path(args.resume) if args.resume else None
    if last.exists():
        if not (resumed and resumed.exists() and last.samefile(resumed)):
            raise InputError(f"{last} exists: resume it (--resume), or choose another --output")
    elif not (resumed and resumed.resolve().parent == output.resolve()):
        raise InputError(f"{output} holds {' and '.join(existing)} of a run that has no last.pt: "
                         "remove the folder, or choose another --output")


def choose_seed(given: int, resumed: dict | None) -> int:
    """--seed; for -1, the seed of the resumed checkpoint, or a random one."""
    if given >= 0:
        return given
    if resumed:
        return ((resumed.get("config") or {}).get("args") or {}).get("seed", -1)
    return random.SystemRandom().randrange(2 ** 31)


def check_run(args: argparse.Namespace, resumed: dict | None, world: int) -> None:
    """InputError for arguments that contradict each other, or the checkpoint to resume."""
    if resumed:
        check_resumed(args, resumed)
    if args.batch % (world * args.accumulate):
        parts = f" in {args.accumulate} parts" if args.accumulate > 1 else ""
        raise InputError(f"--batch {args.batch} cannot be shared by {world} processes{parts}")
    if args.deterministic and args.compile != "off":
        raise InputError("--deterministic and --compile do not go together: the order of compiled "
                         "sums is not fixed")
    if bool(args.train_json) != bool(args.train_images):
        raise InputError("--train-json and --train-images go together")
    if args.render and (args.train_json or args.train_sets):
        raise InputError("--render draws the training clips: --train-json and --train-sets (which "
                         "a recipe sets) do not go with it")
    if args.propagation != "clip" and args.frames % args.clip_length:
        raise InputError(f"--frames {args.frames} is no multiple of --clip-length "
                         f"{args.clip_length}")


def describe_run(args: argparse.Namespace, config: dict) -> dict[str, object]:
    """Values on which all processes must agree before the first step."""
    flags = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items()
             if name not in MAY_DIFFER}
    files = {f"the contents of --{name.replace('_', '-')}": checksum(getattr(args, name))
             for name in ("init", "backbone_weights")
             if not args.resume and getattr(args, name) and Path(getattr(args, name)).is_file()}
    return flags | files | {"the contents of the annotation files": config["data"]}


def make_model(args: argparse.Namespace, categories: list[tuple[int, str]],
               resumed: dict | None, say) -> tuple[GRAttVIS, dict]:
    """The model with its initial weights, and the config to store in checkpoints.

    say: prints what was loaded.
    """
    options = {"gate_mask": args.gate_mask, "clip_length": args.clip_length}
    given = {"norm": args.norm, "window": args.window}  # None: the preset's
    options |= {name: value for name, value in given.items() if value is not None}
    model = build_model(args.preset, len(categories), args.propagation,
                        query_noise=args.query_noise, **options)
    config = {"preset": args.preset, "propagation": args.propagation, "model_options": options,
              "test_short_side": args.test_short_side,
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
            backbone = PRESETS[args.preset]["backbone"]
            say(f"backbone: {load_backbone(model, args.backbone_weights, backbone)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not args.freeze_detector or name.startswith("tracker."))
    return model, config


def make_network(model: GRAttVIS, args: argparse.Namespace, device: torch.device,
                 world: int) -> nn.Module:
    """The model, wrapped so that the processes average their gradients."""
    if world == 1:
        return model
    # The memory of a single clip is written, but never read.
    unread_memory = model.tracker.use_memory and args.frames <= args.clip_length
    return nn.parallel.DistributedDataParallel(
        model, [device] if device.type == "cuda" else None, find_unused_parameters=unread_memory)


def make_criterion(args: argparse.Namespace, clips) -> Criterion:
    """The losses of the arguments."""
    return Criterion(len(clips.categories), points=args.points,
                     no_object_weight=args.no_object_weight,
                     similarity_weight=args.similarity_weight, gate_weight=args.gate_weight,
                     gate_loss=args.gate_loss, freeze_detector=args.freeze_detector,
                     similarity_span=args.similarity_span)


def set_up(model: GRAttVIS, args: argparse.Namespace, device: torch.device,
           amp_dtype: torch.dtype) -> None:
    """Move the model to its device and prepare it for training."""
    # Convolutions on a GPU are faster with channels last.
    on_gpu = device.type == "cuda"
    memory_format = torch.channels_last if on_gpu else torch.contiguous_format
    model.to(device, memory_format=memory_format).train()
    if amp_dtype != torch.float32:
        hold_frozen(model, amp_dtype)
    model.pixel_decoder.recompute = args.recompute != "off"
    model.backbone.recompute = args.recompute == "all"
    if args.compile != "off":
        compile_parts(model, detector=args.compile == "all")


def parameter_groups(model: nn.Module, lr: float, weight_decay: float,
                     backbone_factor: float) -> list[dict]:
    """AdamW parameter groups, as upstream.

    No weight decay for norms, nn.Embedding, relative position tables and vectors other than biases,
    such as layer scales; biases do decay.
    """
    norms = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
    groups: dict[tuple[float, float], list] = {}
    for module_name, module in model.named_modules():
        rate = lr * (backbone_factor if module_name.startswith("backbone") else 1.0)
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            exempt = isinstance(module, (*norms, nn.Embedding))
            exempt = exempt or name == "relative_position_bias_table"
            is_vector = parameter.numel() == len(parameter)  # (C,), or a layer scale (C, 1, 1)
            exempt = exempt or is_vector and not name.endswith("bias")
            groups.setdefault((rate, 0.0 if exempt else weight_decay), []).append(parameter)
    return [{"params": parameters, "lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()]


def learning_rate_factor(step: int, warmup: int, milestones: list[int], start: float = 0.0,
                         gamma: float = 0.1) -> float:
    """Linear warm-up from `start` to 1, multiplied by gamma at every milestone."""
    warm = min(1.0, (step + 1) / max(warmup, 1))
    passed = sum(step >= milestone for milestone in milestones)
    return (start + (1 - start) * warm) * gamma ** passed


def check_resumed(args: argparse.Namespace, resumed: dict) -> None:
    """InputError naming the arguments that differ from those of the interrupted run."""
    # Arguments added since then had their default values.
    before = vars(parse_arguments([])) | resumed["config"]["args"]
    changed = [f"--{name.replace('_', '-')} {before[name]} (now {value})"
               for name, value in vars(args).items()
               if name not in MAY_CHANGE and before[name] != value]
    if changed:
        raise InputError(f"{args.resume} was trained with {', '.join(changed)}")
    if resumed["step"] > args.iterations:
        raise InputError(f"{args.resume} is already at iteration {resumed['step']}, past "
                         f"--iterations {args.iterations}")


if __name__ == "__main__":
    with cli_errors():
        main(parse_arguments())
