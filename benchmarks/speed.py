"""End-to-end speed on a GPU: video inference, live inference and training.

    python benchmarks/speed.py                       # all parts
    python benchmarks/speed.py --parts floor video live swin train others --profile 10
    python benchmarks/speed.py --compile --amp bf16  # another 16-bit dtype than the default

Sizes are those at which the official code was measured. Weights are random; time and memory do not
depend on them. Every time is a median.

Floor: all matrix multiplications of a frame, at the speed of large ones. Video: uint8 frames on the
CPU to masks at output size on the GPU (`segment_video`, top 10). Live: `step`, frame by frame,
synchronised after each; `step_streams` for 8 videos. Train: whole iterations, from clips on the CPU
to the optimizer step. Others: VidEoMT of transformers, if installed, model only, compiled. Errors
compare the fast path with float32 in the first frame, before differences accumulate. Without a GPU,
only floor and live run in minutes.
"""

import argparse
import gc
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clips import Clip  # noqa: E402
from deform_attn import implementation  # noqa: E402
from fast.acceleration import accelerate_training  # noqa: E402
from fast.fused_sampling import fuse_sampling  # noqa: E402
from losses import Criterion  # noqa: E402
from model import build_model  # noqa: E402
from runtime.device import choose_amp  # noqa: E402
from train import parameter_groups, train_step  # noqa: E402
from trainer.flags import parse_arguments as parse_training_arguments  # noqa: E402
from transformer import mask_logits  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
TOP_K = 10
TRAINING = {"frozen8": (8, True), "frozen2": (2, True), "unfrozen2": (2, False)}


def seconds(function, repeat: int = 5, warm_up: int = 2) -> list[float]:
    """The times of calls, sorted, the GPU's work included."""
    times = []
    for _ in range(warm_up + repeat):
        began = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[warm_up:])


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def make_video(frames: int, height: int, width: int) -> torch.Tensor:
    """uint8 (T, 3, H, W): a smooth picture that moves."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 3, height // 16 + 8, width // 16 + 8, generator=generator)
    picture = nn.functional.interpolate(
        picture, scale_factor=16, mode="bicubic", align_corners=False
    )[0].clamp(0, 1)
    frames = torch.stack(
        [
            (255 * picture[:, t % 100 : t % 100 + height, t % 97 : t % 97 + width]).to(torch.uint8)
            for t in range(frames)
        ]
    )
    return frames.pin_memory() if CUDA else frames  # as a loader gives them


def make_model(
    preset: str, args: argparse.Namespace, fast: bool = True
) -> tuple[nn.Module, torch.autocast]:
    """A model of random weights for inference, and the autocast to run it under."""
    torch.manual_seed(0)
    dtype = choose_amp(args.amp, DEVICE)[0] if fast else torch.float32
    model = build_model(preset, 25).to(DEVICE).accelerate(dtype, args.compile and fast)
    return model, torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32)


def floor(preset: str, size: tuple[int, int], args: argparse.Namespace) -> None:
    """A lower bound: the matrix products and convolutions of a frame at the speed of large ones."""
    model, dtype = (
        build_model(preset, 25).eval().requires_grad_(False).to(DEVICE),
        choose_amp(args.amp, DEVICE)[0],
    )
    with FlopCounterMode(display=False) as counter:
        queries = model.detect(model.prepare([make_video(1, *size)])).queries
        model.tracker(queries[:, None, None])
    side = 8192 if CUDA else 2048
    large = torch.randn(side, side, device=DEVICE, dtype=dtype)
    rate, work = 2 * side**3 / seconds(lambda: large @ large, 9)[4], counter.get_total_flops()
    print(
        f"{preset}, {size[0]}x{size[1]}: {work / 1e9:.1f} GFLOP a frame; matmuls of {side}x{side} "
        f"run at {rate / 1e9:.0f} GFLOP/s in "
        f"{dtype}, so {1e3 * work / rate:.2f} ms a frame at least",
        flush=True,
    )


def video(
    preset: str,
    frames: int,
    size: tuple[int, int],
    output: tuple[int, int],
    args: argparse.Namespace,
) -> None:
    """A whole video to masks on the GPU."""
    (model, autocast), clip = make_model(preset, args), make_video(frames, *size)

    def segment() -> object:
        with autocast:
            return model.segment_video(clip, output, TOP_K)

    segment()
    reset_peak()
    times = seconds(segment)
    middle = times[len(times) // 2]
    print(
        f"{preset}, {frames} frames of {size[0]}x{size[1]} to masks of {output[0]}x{output[1]}: "
        f"{1e3 * middle / frames:.2f} ms a "
        f"frame, {frames / middle:.0f} frames a second ({frames / times[-1]:.0f} to "
        f"{frames / times[0]:.0f}){peak()}",
        flush=True,
    )
    profile(segment, args.profile)

    on_device = clip.to(DEVICE)

    def alone() -> None:
        with autocast:
            for chunk in model.track_video(on_device):
                mask_logits(chunk.mask_kernel, chunk.features)

    middle = seconds(alone)[2]
    print(
        f"{preset}, the same, model alone (frames on the GPU, masks of all queries at stride 4): "
        f"{1e3 * middle / frames:.2f} ms a frame, "
        f"{frames / middle:.0f} frames a second",
        flush=True,
    )


def errors(preset: str, size: tuple[int, int], args: argparse.Namespace) -> None:
    """The fast path against float32 without it."""
    logits = []
    for fast in (False, True):
        model, autocast = make_model(preset, args, fast)
        with autocast:
            logits.append(model.segment_video(make_video(1, *size), None, TOP_K).logits.double())
    exact, fast = logits
    error = (fast - exact).norm() / exact.norm()
    print(
        f"{preset}, {size[0]}x{size[1]}: class logits of the fast path are {error:.1e} from "
        "float32",
        flush=True,
    )


def live(
    preset: str, size: tuple[int, int], output: tuple[int, int], args: argparse.Namespace
) -> None:
    """Frame by frame, each waited for; few on a CPU."""
    frames, warm_up = (300, 20) if CUDA else (15, 3)
    (model, autocast), clip, state = make_model(preset, args), make_video(50, *size), None
    times = []
    for number in range(warm_up + frames):
        if number == warm_up // 2:  # CUDA graphs have been captured
            reset_peak()
        began = time.perf_counter()
        with autocast:
            _, state = model.step(clip[number % 50], state, output, TOP_K)
        synchronize()
        times.append(time.perf_counter() - began)
    times = sorted(times[warm_up:])
    print(
        f"{preset} live, {size[0]}x{size[1]} to masks of {output[0]}x{output[1]}: "
        f"{frames / sum(times):.3g} frames a second, p50 "
        f"{1e3 * times[frames // 2]:.2f} ms, p99 {1e3 * times[int(0.99 * frames)]:.2f} ms{peak()}",
        flush=True,
    )


def streams(
    preset: str,
    count: int,
    size: tuple[int, int],
    output: tuple[int, int],
    args: argparse.Namespace,
) -> None:
    """The next frames of several videos at once, each time waited for; few on a CPU."""
    steps, warm_up = (100, 10) if CUDA else (5, 1)
    model, autocast = make_model(preset, args)
    clip, states = make_video(50, *size), [None] * count
    times = []
    for number in range(warm_up + steps):
        if number == warm_up // 2:  # CUDA graphs have been captured
            reset_peak()
        frames = torch.stack([clip[(number + 5 * stream) % 50] for stream in range(count)])
        began = time.perf_counter()
        with autocast:
            _, states = model.step_streams(frames, states, output, TOP_K)
        synchronize()
        times.append(time.perf_counter() - began)
    times = sorted(times[warm_up:])
    print(
        f"{preset} live, {count} videos at once: {count * steps / sum(times):.4g} frames a second "
        f"together, p50 {1e3 * times[steps // 2]:.2f} ms{peak()}",
        flush=True,
    )


def make_clip(frames: int, height: int, width: int, instances: int) -> Clip:
    """Random frames, rectangles that are visible in most of them."""
    masks = torch.zeros(instances, frames, height, width, dtype=torch.bool)
    for number in range(instances):
        for t in range(number % 3 // 2, frames):
            top, left = (
                (37 * number + 9 * t) % (height - 160),
                (91 * number + 11 * t) % (width - 200),
            )
            masks[number, t, top : top + 160, left : left + 200] = True
    return Clip(
        torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8),
        torch.arange(instances) % 25,
        masks,
    )


def train(
    clips: int, frozen: bool, args: argparse.Namespace, size: tuple[int, int] = (480, 768)
) -> None:
    """Iterations of 5 frames and 6 instances a clip, R-50, the OVIS setting."""
    torch.manual_seed(0)
    setting = parse_training_arguments(["--recipe", "grattvis/ovis/r50"])
    model = build_model("r50", 25).to(DEVICE, memory_format=torch.channels_last).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or name.startswith("tracker."))
    amp, _ = choose_amp(args.amp, DEVICE, training=True)
    model.pixel_decoder.recompute, model.backbone.recompute = (
        args.recompute != "off",
        args.recompute == "all",
    )
    accelerate_training(model, amp, "all" if args.compile else "off", args.graphs)
    criterion = fuse_sampling(Criterion(25, points=setting.points, freeze_detector=frozen))
    optimizer = torch.optim.AdamW(
        parameter_groups(model, 1e-6, setting.weight_decay, setting.backbone_lr_factor), fused=CUDA
    )
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=amp == torch.float16)
    batch = [make_clip(5, *size, 6) for _ in range(clips)]
    if CUDA:
        batch = [  # as a loader gives them
            replace(clip, frames=clip.frames.pin_memory(), masks=clip.masks.pin_memory())
            for clip in batch
        ]

    def iterate() -> None:
        train_step(model, criterion, batch, setting, DEVICE, amp, optimizer, scaler)
        scaler.step(optimizer)
        scaler.update()

    for _ in range(3):
        iterate()
    reset_peak()
    times = seconds(iterate, 12, 0)
    print(
        f"train r50, detector {'' if frozen else 'not '}frozen, {clips} clips of 5 frames of "
        f"{size[0]}x{size[1]}: "
        f"{times[6]:.3f} s an iteration ({times[0]:.3f} to {times[-1]:.3f}), "
        f"{5 * clips / times[6]:.0f} frames a second{peak()}",
        flush=True,
    )
    profile(iterate, args.profile)


def reset_peak() -> None:
    gc.collect()  # compiled models refer to themselves, so they are not freed at once
    if CUDA:
        torch.cuda.empty_cache()  # with the pools of graphs that are gone
        torch.cuda.reset_peak_memory_stats()


def peak() -> str:
    """The most memory that tensors had, with that of CUDA graphs; and what was reserved for it."""
    if not CUDA:
        return ""
    # Graphs keep their memory, of which PyTorch counts only tensors that are still referred to.
    of_graphs = sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) != (0, 0)
    )
    return (
        f"; {(torch.cuda.max_memory_allocated() + of_graphs) / 1e9:.2f} GB, "
        f"{torch.cuda.max_memory_reserved() / 1e9:.2f} reserved"
    )


def profile(function, rows: int) -> None:
    """The kernels that take longest, and how long the GPU is busy at all."""
    if not rows:
        return
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile_result:
        began = time.perf_counter()
        function()
        synchronize()
        elapsed = time.perf_counter() - began
    kernels = [
        event
        for event in profile_result.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    busy, launches = (
        sum(event.self_device_time_total for event in kernels) / 1e3,
        sum(event.count for event in kernels),
    )
    waits = sum(
        event.count for event in profile_result.key_averages() if "Synchronize" in event.key
    )
    print(
        f"  {1e3 * elapsed:.1f} ms under the profiler, kernels {busy:.1f} ms in {launches} "
        f"launches, {waits} waits"
    )
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:rows]:
        print(
            f"  {event.self_device_time_total / 1e3:8.2f} ms {event.count:6d} x  {event.key[:100]}"
        )


def others(args: argparse.Namespace, frames: int = 36) -> None:
    """VidEoMT-S of transformers, random weights, 640x640: the model alone, frame by frame and in
    chunks.
    """
    try:
        from transformers import VideomtConfig, VideomtForUniversalSegmentation
    except ImportError as error:
        print(f"VidEoMT was not measured: {error}")
        return
    torch.manual_seed(0)
    dtype, _ = choose_amp(args.amp, DEVICE)
    config = VideomtConfig(
        hidden_size=384,
        num_attention_heads=6,
        num_hidden_layers=12,
        num_blocks=3,
        image_size=640,
        num_labels=40,
    )
    model = VideomtForUniversalSegmentation(config).eval().to(DEVICE, dtype)
    compiled = torch.compile(model, dynamic=False)
    for chunk in args.chunks:
        clip = torch.randn(1, chunk, 3, 640, 640, device=DEVICE, dtype=dtype)

        @torch.no_grad()
        def run() -> None:
            for _ in range(max(1, frames // chunk)):
                compiled(pixel_values_videos=clip)

        times = seconds(run, 7, 3)
        print(
            f"VidEoMT-S, 640x640, chunks of {chunk}: "
            f"{max(1, frames // chunk) * chunk / times[3]:.0f} frames a second",
            flush=True,
        )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measure speed.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    names = ("floor", "video", "live", "swin", "train", "others")
    parser.add_argument("--parts", nargs="+", default=names, choices=names)
    parser.add_argument(
        "--frames", type=int, nargs="+", default=[36, 200], help="lengths of the videos"
    )
    parser.add_argument(
        "--training",
        nargs="+",
        default=list(TRAINING),
        choices=TRAINING,
        help="clips, and whether the detector is frozen",
    )
    parser.add_argument(
        "--chunks",
        type=int,
        nargs="+",
        default=[1, 8, 36],
        help="frames that the other model takes at once",
    )
    parser.add_argument(
        "--amp",
        default="auto",
        choices=("auto", "bf16", "fp16", "off"),
        help="as evaluate.py's and train.py's",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument(
        "--graphs", action=argparse.BooleanOptionalAction, default=True, help="as train.py's"
    )
    parser.add_argument(
        "--recompute", default="off", choices=("off", "decoder", "all"), help="as train.py's"
    )
    parser.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="N",
        help="print the N longest kernels of every part",
    )
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Run the parts selected on the command line."""
    kinds = [
        str(choose_amp(args.amp, DEVICE, training)[0]).removeprefix("torch.")
        for training in (False, True)
    ]
    print(
        f"torch {torch.__version__}, {torch.cuda.get_device_name() if CUDA else 'CPU'}, "
        f"{implementation(DEVICE)}, {kinds[0]}, in training "
        f"{kinds[1]}",
        flush=True,
    )
    if "floor" in args.parts:
        floor("r50", (360, 640), args)
        floor("swin_l", (448, 800), args)
    if "video" in args.parts:
        errors("r50", (360, 640), args)
        for frames in args.frames:
            video("r50", frames, (360, 640), (720, 1280), args)
    if "live" in args.parts:
        live("r50", (360, 640), (720, 1280), args)
        streams("r50", 8, (360, 640), (720, 1280), args)
    if "swin" in args.parts:
        errors("swin_l", (448, 800), args)
        video("swin_l", 36, (448, 800), (720, 1280), args)
    if "train" in args.parts:
        for setting in args.training:
            train(*TRAINING[setting], args)
    if "others" in args.parts:
        others(args)


if __name__ == "__main__":
    main(parse_arguments())
