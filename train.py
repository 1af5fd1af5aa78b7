"""Train GRAtt-VIS (and VITA, GenVIS) on clips of videos.

    python train.py                                             # toy preset on the synthetic set, 2 CPU cores, minutes
    torchrun --nproc-per-node 4 train.py --preset r50 --data-root ytvis_2021 --init vita_r50_ytvis2021.pth ...
    python train.py --resume runs/toy/last.pt                   # go on exactly where it stopped

Writes last.pt (model, optimizer, schedule, scaler, step, config), args.json and log.jsonl into --output. Paper: GRAtt-VIS
(arXiv 2305.17096), implementation details; upstream train_net_grattvis.py.

Every step seeds torch from (seed, step, rank) and its clips are a function of (seed, step), so that a run resumes exactly
and no random state has to be stored.
"""
import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as distributed
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from augmentation import Augmentation
from checkpoint import load_backbone, load_weights, read_file, save_checkpoint, save_json
from data import ClipDataset, InputError, StepSampler, VideoSet, exit_with_sentence, find_split
from deform_attn import implementation
from matcher import GATE_LOSSES, Criterion
from model import PRESETS, GRAttVIS, build_model
from tracker import GATE_MASKS, PROPAGATIONS

MAY_CHANGE = {"iterations", "output", "resume", "init", "backbone_weights", "reset_classes", "workers", "device", "log_every",
              "save_every", "data_root", "train_json", "train_images"}  # between a run and its resumption


def at_least(minimum: int):
    """An argparse type: a whole number that is not smaller."""
    def whole_number(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return int(text)
    return whole_number


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults train the toy preset on the synthetic set."""
    parser = argparse.ArgumentParser(description="Train on clips of videos. The defaults are the toy job; the official "
                                     "settings are in the README.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--preset", default="toy", choices=PRESETS, help="model size")
    model.add_argument("--propagation", default="gated", choices=PROPAGATIONS, help="what is carried from clip to clip")
    model.add_argument("--gate-mask", default="additive", choices=GATE_MASKS, help="as released, or as in the paper")
    model.add_argument("--norm", choices=("frozen", "batch", "group"),
                       help="of a ResNet; frozen suits pretrained weights, group training from scratch (default: the preset's)")
    model.add_argument("--clip-length", type=at_least(1), default=1, help="frames the tracker reads at once")
    weights = parser.add_argument_group("weights")
    weights.add_argument("--init", metavar="FILE", help="start from a checkpoint, ours or official; what it lacks starts anew")
    weights.add_argument("--reset-classes", action="store_true", help="with --init: class layers of another class count start anew")
    weights.add_argument("--backbone-weights", metavar="FILE", help='local file, or "imagenet" for torchvision\'s own')
    weights.add_argument("--freeze-detector", action="store_true", help="train the tracker alone")
    weights.add_argument("--resume", metavar="FILE", help="go on with this checkpoint of an interrupted run")
    data = parser.add_argument_group("data")
    data.add_argument("--data-root", default="datasets/synthetic", help="data set with a train split")
    data.add_argument("--train-json", help="instead of --data-root: the annotation file")
    data.add_argument("--train-images", help="with --train-json: the folder that its file names are relative to")
    data.add_argument("--frames", type=at_least(1), default=3, help="frames a clip")
    data.add_argument("--reach", type=at_least(1), default=6, help="largest distance of a clip's frames from its first choice, in frames")
    data.add_argument("--short-sides", type=at_least(1), nargs="+", default=[80, 96], help="of a clip, drawn from these, pixels")
    data.add_argument("--max-long-side", type=at_least(1), default=768, help="pixels")
    data.add_argument("--crop-short-sides", type=at_least(1), nargs="*", default=[], help="before a crop, pixels; none = no crop")
    data.add_argument("--crop-size", type=at_least(1), nargs=2, default=[384, 600], help="smallest and largest side of a crop, pixels")
    data.add_argument("--no-flip", action="store_true", help="never mirror a clip")
    data.add_argument("--rotation", type=at_least(0), default=0, help="largest angle, which drifts over a clip, degrees")
    data.add_argument("--jitter", type=at_least(0), default=0, help="large-scale jitter in a square of so many pixels; 0 = none")
    data.add_argument("--workers", type=at_least(0), default=2, help="loader processes a GPU; 0 = load in the training process")
    loss = parser.add_argument_group("loss")
    loss.add_argument("--points", type=at_least(4), default=512, help="points a mask (official: 12544)")
    loss.add_argument("--no-object-weight", type=float, default=0.1)
    loss.add_argument("--similarity-weight", type=float, default=0.5)
    loss.add_argument("--gate-weight", type=float, default=0.0, help="0 = no gate loss, as in all official recipes")
    loss.add_argument("--gate-loss", default="logits", choices=GATE_LOSSES, help="released = the official double sigmoid")
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--iterations", type=at_least(0), default=500)
    optimisation.add_argument("--batch", type=at_least(1), default=4, help="clips a step, over all GPUs together")
    optimisation.add_argument("--lr", type=float, default=1e-3, help="learning rate (official: 5e-5 for 8 clips)")
    optimisation.add_argument("--lr-steps", type=at_least(0), nargs="*", default=[420], help="iterations at which the rate is divided by 10")
    optimisation.add_argument("--warmup", type=at_least(0), default=50, help="iterations of linear warm-up; 0 = none")
    optimisation.add_argument("--backbone-lr-factor", type=float, default=1.0, help="official: 0.1, from pretrained weights")
    optimisation.add_argument("--weight-decay", type=float, default=0.05, help="not of norms, embeddings and position tables")
    optimisation.add_argument("--clip-gradient", type=float, default=0.1, help="global norm (official: 0.01); 0 = no clipping")
    optimisation.add_argument("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"),
                              help="auto = bf16 on a GPU that has it, fp16 on another, off on a CPU")
    run = parser.add_argument_group("run")
    run.add_argument("--output", default="runs/toy", help="folder of the run")
    run.add_argument("--seed", type=at_least(0), default=0)
    run.add_argument("--device", default="auto", help="auto, cpu, cuda")
    run.add_argument("--log-every", type=at_least(1), default=20, help="iterations between lines of log.jsonl")
    run.add_argument("--save-every", type=at_least(1), default=500, help="iterations between checkpoints")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """One training run, in this process (torchrun starts one a GPU)."""
    rank, world, device = start_processes(args.device)
    amp, reason = choose_amp(args.amp, device)
    output, last = Path(args.output), Path(args.output) / "last.pt"
    resumed = read_file(args.resume) if args.resume else None
    check_run(args, resumed, world, last)
    clips = open_clips(args)
    torch.manual_seed(args.seed)
    model, config = make_model(args, clips.categories, resumed, say=print if rank == 0 else lambda *_: None)
    model.to(device).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, args.lr, args.weight_decay, args.backbone_lr_factor))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, args.warmup, args.lr_steps))
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    parts = {"optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    for name, part in parts.items():
        if resumed:
            part.load_state_dict(resumed[name])
    start = resumed["step"] if resumed else 0

    network = model
    if world > 1:
        unread_memory = model.tracker.remembers and args.frames <= args.clip_length  # one clip: written, never read
        network = nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None,
                                                      find_unused_parameters=unread_memory)
    criterion = Criterion(len(clips.categories), points=args.points, no_object_weight=args.no_object_weight,
                          similarity_weight=args.similarity_weight, gate_weight=args.gate_weight, gate_loss=args.gate_loss,
                          freeze_detector=args.freeze_detector)
    loader = DataLoader(clips, batch_sampler=StepSampler(start, args.iterations, args.batch // world, rank, world),
                        num_workers=args.workers, collate_fn=list, prefetch_factor=4 if args.workers else None)
    if rank == 0:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{args.preset}, {args.propagation} propagation, {trained / 1e6:.1f} M trained parameters; {device.type} x {world}, "
              f"{str(amp).removeprefix('torch.')} ({reason}); deformable attention: {implementation(device)}\n"
              f"{len(clips.videos)} videos of {len(clips.categories)} classes; a step is {args.batch} clips of {args.frames} "
              f"frames, {args.batch // world} a process; iterations {start} to {args.iterations}; output {output}")
        output.mkdir(parents=True, exist_ok=True)
        save_json(output / "args.json", vars(args))

    def save(step: int) -> None:
        if rank == 0:
            states = {name: part.state_dict() for name, part in parts.items()}
            save_checkpoint(last, {"model": model.state_dict(), "step": step, "config": config} | states)

    bar = tqdm(loader, initial=start, total=args.iterations, desc="train", disable=rank > 0, mininterval=1)
    waited, mark = 0.0, time.perf_counter()
    began = mark
    for step, batch in enumerate(bar, start):
        waited += time.perf_counter() - mark
        torch.manual_seed(hash((args.seed, step, rank)) % 2 ** 63)
        with torch.autocast(device.type, amp, enabled=amp != torch.float32):
            predictions = network([clip.frames for clip in batch])
        losses, _ = criterion(predictions, batch, whole_video=args.propagation == "clip")
        total = sum(losses.values())
        if not math.isfinite(total.item()):
            raise FloatingPointError(f"the loss is not finite at iteration {step}: "
                                     + ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items()))
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(total).backward()
        scaler.unscale_(optimizer)
        gradient = nn.utils.clip_grad_norm_(model.parameters(), args.clip_gradient or math.inf)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        done = step + 1
        if rank == 0 and done % args.log_every == 0:
            seconds, began = time.perf_counter() - began, time.perf_counter()
            record = {"step": done, "loss": total.item(), "lr": schedule.get_last_lr()[0],
                      "gradient_norm": gradient.item() if gradient.isfinite() else None,  # fp16 skips such a step
                      "iterations_per_second": args.log_every / seconds, "data_share": waited / seconds,
                      "memory_gib": torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else None}
            with open(output / "log.jsonl", "a") as log:
                log.write(json.dumps(record | {name: value.item() for name, value in losses.items()}) + "\n")
            bar.set_postfix(loss=f"{total.item():.2f}", refresh=False)
            waited = 0.0
        if done % args.save_every == 0:
            save(done)
        mark = time.perf_counter()
    save(args.iterations)
    if rank == 0:
        print(f"saved {last}")
    if world > 1:
        distributed.destroy_process_group()


def check_run(args: argparse.Namespace, resumed: dict | None, world: int, last: Path) -> None:
    """InputError for arguments that contradict one another, the checkpoint to resume, or a run that is already there."""
    if resumed:
        check_resumed(args, resumed)
    if last.exists() and not (args.resume and last.samefile(args.resume)):
        raise InputError(f"{last} exists: resume it (--resume), or choose another --output")
    if last.parent.exists() and not last.parent.is_dir():
        raise InputError(f"--output {last.parent} is a file, not a folder")
    if args.batch % world:
        raise InputError(f"--batch {args.batch} cannot be shared by {world} processes")
    if bool(args.train_json) != bool(args.train_images):
        raise InputError("--train-json and --train-images go together")
    if args.propagation != "clip" and args.frames % args.clip_length:
        raise InputError(f"--frames {args.frames} is no multiple of --clip-length {args.clip_length}")


def open_clips(args: argparse.Namespace) -> ClipDataset:
    """The training clips that the arguments describe."""
    videos = VideoSet(*((args.train_json, args.train_images) if args.train_json else find_split(args.data_root, "train")))
    augmentation = Augmentation(tuple(args.short_sides), args.max_long_side, tuple(args.crop_short_sides),
                                tuple(args.crop_size), not args.no_flip, args.rotation, args.jitter)
    return ClipDataset(videos, args.frames, args.reach, augmentation, args.seed)


def make_model(args: argparse.Namespace, categories: list[tuple[int, str]], resumed: dict | None, say) -> tuple[GRAttVIS, dict]:
    """The model with the weights it starts from, and the config that a checkpoint will carry; `say` prints what was loaded."""
    options = {"gate_mask": args.gate_mask, "clip_length": args.clip_length} | ({"norm": args.norm} if args.norm else {})
    model = build_model(args.preset, len(categories), args.propagation, **options)
    config = {"preset": args.preset, "propagation": args.propagation, "model_options": options,
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


def start_processes(asked: str) -> tuple[int, int, torch.device]:
    """(rank, processes, device) of this process; joins the group when torchrun has started several."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no GPU here")
    if asked.partition(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"--device {asked}: give auto, cpu or cuda")
    device = torch.device(asked)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    if world > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def choose_amp(asked: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of autocast (float32 = off) and why."""
    if asked != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[asked], "asked for"
    if device.type != "cuda":
        return torch.float32, "a CPU is not faster in 16 bit"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the GPU has it"
    return torch.float16, "the GPU has no bf16"


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


def learning_rate_factor(step: int, warmup: int, milestones: list[int]) -> float:
    """Linear warm-up, then a tenth at every milestone."""
    return min(1.0, (step + 1) / max(warmup, 1)) * 0.1 ** sum(step >= milestone for milestone in milestones)


def check_resumed(args: argparse.Namespace, resumed: dict) -> None:
    """A resumed run must be the run that was interrupted: InputError naming what differs."""
    if not {"step", "optimizer", "config"} <= resumed.keys() or "args" not in (resumed["config"] or {}):
        raise InputError(f"{args.resume} is no checkpoint of a training run: start from it with --init")
    before = resumed["config"]["args"]
    changed = [name for name, value in vars(args).items() if name not in MAY_CHANGE and before.get(name, value) != value]
    if changed:
        raise InputError(f"{args.resume} was trained with " + ", ".join(
            f"--{name.replace('_', '-')} {before[name]} (now {getattr(args, name)})" for name in changed))
    if resumed["step"] > args.iterations:
        raise InputError(f"{args.resume} is already at iteration {resumed['step']}, past --iterations {args.iterations}")


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except (InputError, FloatingPointError) as error:
        exit_with_sentence(error)
