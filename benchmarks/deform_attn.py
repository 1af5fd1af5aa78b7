"""Speed and error of deformable attention on a GPU: both CUDA kernels, PyTorch, hardware limits.

    python benchmarks/deform_attn.py                  # the operator, 5 shapes and 3 dtypes
    python benchmarks/deform_attn.py --no-compile     # without torch.compile, which takes minutes
    python benchmarks/deform_attn.py --pixel-decoder  # the whole pixel decoder of r50 and swin_l
    python benchmarks/deform_attn.py --json rows.json # also write all rows to a file

Times are medians in microseconds per call. The kernels are replayed from a CUDA graph, without
launch overhead. The PyTorch path copies level sizes from the host and cannot be captured, so it is
timed with events around ordinary calls; its backward is autograd.grad with a retained graph.

Errors are norm(result - reference) / norm(reference). The reference is the PyTorch path in float64
on the same rounded inputs. The gradient of the offsets is discontinuous where a sample crosses a
line of pixel centres; samples within GRID_MARGIN of one are excluded.

Lower bounds: "DRAM" is the time to read every input and write every output once at the measured
bandwidth (small inputs stay in L2 between calls and can be faster). "gathers" is the time to read
the four corners of every sample from L1, at 128 bytes per clock and multiprocessor; in the backward
pass it excludes the accumulation of the gradient.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import deform_attn_cuda
from deform_attn import LevelShapes, attend_in_pytorch, pixel_centres
from model import build_model

# Height, width, images.
SIZES = ((384, 640, 1), (448, 800, 1), (736, 1280, 1), (512, 768, 10), (512, 768, 40))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADS, CHANNELS, POINTS = 8, 32, 4
KERNELS = {"tuned": deform_attn_cuda.tuned, "plain": deform_attn_cuda.plain}
MAX_BATCH = 10  # of the PyTorch path, which needs more memory
CHECKED_IMAGES = 2  # of a batch, because the float64 reference needs more memory
GRID_MARGIN = 1e-3  # pixels
DECODERS = (("r50", 384, 640), ("swin_l", 448, 800))
REPEATS = 15  # a time is the median of so many
L1_BYTES_PER_CLOCK = 128  # per multiprocessor


@torch.no_grad()
def time_events(call: Callable, count: int) -> float:
    """Microseconds per call: median of REPEATS times `count` calls, from CUDA events."""
    for _ in range(3):
        call()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / count)
    return statistics.median(times)


@torch.no_grad()
def time_graph(call: Callable, count: int) -> float:
    """Microseconds per call from replays of a CUDA graph of `count` calls."""
    torch.cuda.synchronize()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call()  # libraries initialize at their first call
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(count):
                call()
        return time_events(graph.replay, 1) / count


def measure_ceilings() -> dict:
    """Print and return the properties of the GPU; rates are in bytes per second."""

    def copy_rate(size: int, count: int) -> float:
        source, target = torch.zeros(2, size // 4, device="cuda")
        # A kernel, which is faster than the copy engines.
        return 2 * size / time_graph(lambda: torch.neg(source, out=target), count) * 1e6

    gpu = torch.cuda.get_device_properties()
    clock, dram, cache = gpu.clock_rate * 1000, copy_rate(2**30, 3), copy_rate(2**24, 20)
    fastest = L1_BYTES_PER_CLOCK * gpu.multi_processor_count * clock
    print(
        f"{gpu.name}, {gpu.multi_processor_count} multiprocessors, torch {torch.__version__}\n"
        f"DRAM {dram / 1e12:6.2f} TB/s, measured: negation of 1 GiB, read + written\n"
        f"L2   {cache / 1e12:6.2f} TB/s, measured: negation of 16 MiB again and again, read + "
        "written, launch gaps included\n"
        f"L1   {fastest / 1e12:6.2f} TB/s, not measured: {L1_BYTES_PER_CLOCK} bytes per clock and "
        f"multiprocessor at {clock / 1e6:.0f} MHz, the highest clock\n",
        flush=True,
    )
    return {
        "gpu": gpu.name,
        "torch": torch.__version__,
        "multiprocessors": gpu.multi_processor_count,
        "clock_hertz": clock,
        "dram_rate": dram,
        "l2_rate": cache,
        "l1_rate": fastest,
    }


def make_inputs(images: int, shapes: LevelShapes, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Value, offsets (standard deviation 3 pixels), logits, and a gradient of the output.

    Shapes are those of `deformable_attention`.
    """
    generator = torch.Generator(device).manual_seed(0)
    pixels, levels = sum(height * width for height, width in shapes), len(shapes)
    sizes = (
        (HEADS, CHANNELS),
        (HEADS, levels, POINTS, 2),
        (HEADS, levels * POINTS),
        (HEADS * CHANNELS,),
    )
    return [
        (scale * torch.randn(images, pixels, *size, generator=generator, device=device)).to(dtype)
        for size, scale in zip(sizes, (1, 3, 1, 1))
    ]


def least_bytes(images: int, shapes: LevelShapes, dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes that forward and backward must move through DRAM, and bytes of all corners read."""
    queries = images * HEADS * sum(height * width for height, width in shapes)
    samples = queries * len(shapes) * POINTS
    value, points = queries * CHANNELS, samples * 3  # a sample has x, y and a logit
    # The output has the size of the value.
    counts = (2 * value + points, 3 * value + 2 * points, samples * 4 * CHANNELS)
    return tuple(count * dtype.itemsize for count in counts)


def output_and_gradients(function: Callable, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Output and gradients of value, offsets and logits."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def off_grid(offsets: Tensor, shapes: LevelShapes) -> Tensor:
    """1.0 for samples farther than GRID_MARGIN from the lines through pixel centres, else 0.0.

    Returns (N, pixels, heads, levels, points, 1).
    """
    sizes = offsets.new_tensor([(width, height) for height, width in shapes])
    places = pixel_centres(shapes, offsets)[:, None, None, None] * sizes[:, None] + offsets - 0.5
    return ((places - places.round()).abs() > GRID_MARGIN).all(-1, keepdim=True).to(offsets.dtype)


def relative_error(result: Tensor, reference: Tensor) -> float:
    return ((result.double() - reference).norm() / reference.norm()).item()


def call_kernel(kernel: ModuleType, sizes: list[int], *inputs: Tensor) -> Tensor:
    return kernel.forward(*inputs, sizes)


def measure_operator(
    size: tuple[int, int, int], dtype: torch.dtype, ceilings: dict, compiled: bool
) -> Iterator[dict]:
    """A row for each implementation and for each lower bound."""
    height, width, images = size
    shapes = [(-(-height // stride), -(-width // stride)) for stride in (32, 16, 8)]
    count = 20 if images == 1 else 3
    flat = [length for shape in shapes for length in shape]
    *inputs, grad = make_inputs(images, shapes, dtype, "cuda")

    def in_pytorch(value: Tensor, *others: Tensor) -> Tensor:
        return attend_in_pytorch(value, shapes, *others)

    ways = {name: partial(call_kernel, kernel, flat) for name, kernel in KERNELS.items()}
    ways["PyTorch"] = in_pytorch
    if compiled:
        torch.compiler.reset()  # or the limit of recompilations would be reached
        ways["PyTorch compiled"] = torch.compile(in_pytorch, dynamic=False)
    checked = [x[:CHECKED_IMAGES].double() for x in inputs]
    masks = {"output": 1, "value": 1, "offsets": off_grid(checked[1], shapes), "logits": 1}
    reference = output_and_gradients(ways["PyTorch"], checked, grad[:CHECKED_IMAGES].double())
    common = {"size": f"{height}x{width} B={images}", "type": str(dtype).removeprefix("torch.")}
    for name, function in ways.items():
        kernel = KERNELS.get(name)
        if kernel is None and images > MAX_BATCH:
            yield common | {"what": name}
            continue
        if kernel is not None:
            forward = time_graph(lambda: kernel.forward(*inputs, flat), count)
            backward = time_graph(lambda: kernel.backward(grad, *inputs, flat), count)
        else:
            forward = time_events(lambda: function(*inputs), count)
            leaves = [x.detach().requires_grad_() for x in inputs]
            # Needed to retain the graph of a compiled function.
            with torch._functorch.config.patch(donated_buffer=False):
                output = function(*leaves)
            backward = time_events(
                lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True), count
            )
            del output  # it holds gigabytes
        result = [x[:CHECKED_IMAGES] for x in output_and_gradients(function, inputs, grad)]
        yield (
            common
            | {"what": name, "forward_us": forward, "backward_us": backward}
            | {
                f"error_{key}": relative_error(x * mask, y * mask)
                for (key, mask), x, y in zip(masks.items(), result, reference)
            }
        )
    forward, backward, corners = least_bytes(images, shapes, dtype)
    # Bytes per microsecond.
    dram, gathers = ceilings["dram_rate"] / 1e6, ceilings["l1_rate"] / 1e6
    yield common | {
        "what": "floor: DRAM",
        "forward_us": forward / dram,
        "backward_us": backward / dram,
    }
    yield common | {
        "what": "floor: gathers",
        "forward_us": corners / gathers,
        "backward_us": corners / gathers,
    }


@torch.no_grad()
def measure_decoder(preset: str, height: int, width: int, device: str) -> Iterator[dict]:
    """A row for each way of running the pixel decoder, on 1 and on 8 frames.

    Errors are relative to the PyTorch path in float32.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = build_model(preset, num_classes=25)
    decoder = model.pixel_decoder.eval()
    # They are initialized to zero, so all pixels would have the same offsets.
    for layer in decoder.layers:
        nn.init.normal_(layer.attention.sampling_offsets.weight, std=0.01)
    for frames in (1, 8):
        maps = [
            torch.randn(frames, channels, height // stride, width // stride, device=device)
            for channels, stride in zip(model.backbone.channels, (4, 8, 16, 32))
        ]
        reference = None
        for name, in_bfloat16, with_kernel in (
            ("float32, PyTorch", False, False),
            ("float32, kernel", False, True),  # deform_attn.KERNEL
            ("bfloat16, kernel", True, True),
        ):

            def run() -> tuple[list[Tensor], Tensor]:
                with torch.autocast(device, torch.bfloat16, enabled=in_bfloat16):
                    return decoder(maps)

            with patch("deform_attn_cuda.load", return_value=with_kernel):
                levels, output = run()
                times = {"eager_us": time_events(run, 3)} | (
                    {"graph_us": time_graph(run, 3)} if with_kernel else {}
                )
            result = {"fpn": output.double()} | {
                f"stride{s}": level.double() for s, level in zip((32, 16, 8), levels)
            }
            reference = reference or result
            yield (
                {"size": f"{preset} {height}x{width}", "frames": frames, "what": name}
                | times
                | {f"error_{key}": relative_error(x, reference[key]) for key, x in result.items()}
            )


def print_row(row: dict, columns: tuple[str, ...]) -> None:
    """Print a line of microseconds and errors, with "-" for missing values."""
    print(
        " ".join(
            f"{row[key]:<18}"
            if "_" not in key
            else f"{'-':>14}"
            if key not in row
            else f"{row[key]:>14.1f}"
            if key.endswith("_us")
            else f"{row[key]:>14.1e}"
            for key in columns
        ),
        flush=True,
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Time deformable attention on a CUDA GPU and compare it with float64."
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile of the PyTorch path"
    )
    parser.add_argument(
        "--pixel-decoder",
        action="store_true",
        help="time the whole pixel decoder instead of the operator",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all rows to this file")
    return parser.parse_args(arguments)


def main(options: argparse.Namespace) -> None:
    """Measure and print row by row."""
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a CUDA GPU, and PyTorch finds none here.")
    if not deform_attn_cuda.load():
        sys.exit("The kernels of deform_attn_cuda/ are disabled or could not be built.")
    ceilings = measure_ceilings()
    if options.pixel_decoder:
        print(
            "Errors are relative to the first row of a group; convolutions and linear layers use "
            "PyTorch's defaults."
        )
        columns = (
            "size",
            "frames",
            "what",
            "eager_us",
            "graph_us",
            "error_fpn",
            "error_stride32",
            "error_stride16",
            "error_stride8",
        )
        measured = (row for arguments in DECODERS for row in measure_decoder(*arguments, "cuda"))
    else:
        print(
            f"Errors are relative to float64, over at most {CHECKED_IMAGES} images; - is not "
            "measured."
        )
        columns = (
            "size",
            "type",
            "what",
            "forward_us",
            "backward_us",
            "error_output",
            "error_value",
            "error_offsets",
            "error_logits",
        )
        measured = (
            row
            for size in SIZES
            for dtype in DTYPES
            for row in measure_operator(size, dtype, ceilings, not options.no_compile)
        )
    print(" ".join(f"{name:>14}" if "_" in name else f"{name:<18}" for name in columns))
    rows = []
    for row in measured:
        rows.append(row)
        print_row(row, columns)
    if options.json:
        options.json.write_text(
            json.dumps(ceilings | {"rows": rows}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main(parse_arguments())
