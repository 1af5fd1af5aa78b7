"""What the algebraic rewrites of the core files gain, each against its plain equation.

    python benchmarks/rewrites.py            # R-50 at 360x640, float32 on a CPU, 16 bit on a GPU

Prints the time of both forms per frame (or per training video), the largest difference between
them, and the difference as a share of a frame. On a GPU, times are those of the kernels
alone, replayed as a CUDA graph for a chunk of frames, as in inference. docs/performance.md has the
table.
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deform_attn import sampling_locations, weighted_samples  # noqa: E402
from detector import AttentionMask, features_for_masks, resize  # noqa: E402
from evaluation.postprocess import resize_masks  # noqa: E402
from fast.video_pipeline import INFERENCE_CHUNK  # noqa: E402
from matcher import sample_at, sample_features  # noqa: E402
from model import build_model  # noqa: E402
from transformer import mask_kernel, mask_logits  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.float16 if CUDA else torch.float32
FRAME, STRIDE_4, OUTPUT = (360, 640), (96, 160), (720, 1280)  # frames are padded to 384x640
QUERIES, CHANNELS, POINTS, PREDICTIONS = 100, 256, 12544, 9
CHUNK = INFERENCE_CHUNK if CUDA else 1  # frames together


def random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def milliseconds(function, repeat: int = 5) -> float:
    """Median time of a call, after one to warm up."""
    times = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        function()
        if CUDA:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return sorted(times[1:])[repeat // 2]


def kernel_milliseconds(function, calls: int = 20) -> float:
    """Time of a call; on a GPU, of its kernels alone."""
    if not CUDA:
        return milliseconds(function)
    with torch.cuda.stream(torch.cuda.Stream()):
        function()  # libraries set themselves up
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()

    def replay() -> None:
        for _ in range(calls):
            graph.replay()

    return milliseconds(replay) / calls


def deformable_sampling():
    """Deformable attention of six layers, without the CUDA kernel."""
    levels = [(12, 20), (24, 40), (48, 80)]
    pixels, heads = sum(height * width for height, width in levels), 8
    value = random(1, pixels, heads, CHANNELS // heads, dtype=torch.float32)
    offsets = random(1, pixels, heads, 3, 4, 2, dtype=torch.float32)
    logits = random(1, pixels, heads, 12, dtype=torch.float32)
    locations, weights = sampling_locations(levels, offsets, logits)

    def plain() -> Tensor:
        total, parts = 0, value.split([height * width for height, width in levels], 1)
        for level, (height, width) in enumerate(levels):
            maps = parts[level][0].permute(1, 2, 0).unflatten(2, (height, width))
            grid = (2 * locations[0, :, :, level] - 1).transpose(0, 1)  # (heads, pixels, 4)
            samples = F.grid_sample(maps, grid, align_corners=False)
            total = total + (samples * weights[0, :, :, level].transpose(0, 1)[:, None]).sum(-1)
        return total.permute(2, 0, 1).flatten(1)[None]

    return 6, plain, lambda: weighted_samples(value, levels, locations, weights)


def masks_of_queries():
    """Masks of the frame decoder (ten times) or the tracker: kernels on unprojected features."""
    convolution = torch.nn.Conv2d(CHANNELS, CHANNELS, 1).to(DEVICE, DTYPE)
    embed, features = random(CHUNK, QUERIES, CHANNELS), random(CHUNK, CHANNELS, *STRIDE_4)

    def plain() -> Tensor:
        return torch.einsum("nqc,nchw->nqhw", embed, convolution(features))

    return 2 / CHUNK, plain, lambda: mask_logits(mask_kernel(embed, convolution), features)


def masks_for_attention():
    """Attention masks of nine layers: features resized once per level instead of masks."""
    sizes = [(12, 20), (24, 40), (48, 80)] * 3
    kernel = random(CHUNK, QUERIES, CHANNELS + 1)
    features = random(CHUNK, CHANNELS, *STRIDE_4)

    def plain() -> Tensor:
        masks = [resize(mask_logits(kernel, features), size) for size in sizes]
        return torch.cat([mask.flatten(2).sigmoid() < 0.5 for mask in masks], 2)

    def rewritten() -> Tensor:
        attention_mask = AttentionMask()
        sources = features_for_masks(features, sizes[:3]) * 3
        return torch.cat(
            [attention_mask(kernel, source, size)[:, 0] for source, size in zip(sources, sizes)], 2
        )

    return 1 / CHUNK, plain, rewritten


def masks_at_output_size():
    """Masks of all queries, enlarged to the frame and to the output."""
    logits = random(QUERIES, *STRIDE_4)
    padded = 4 * STRIDE_4[0], 4 * STRIDE_4[1]

    def plain() -> Tensor:
        large = F.interpolate(logits[None], padded, mode="bilinear", align_corners=False)
        large = large[..., : FRAME[0], : FRAME[1]]
        return F.interpolate(large, OUTPUT, mode="bilinear", align_corners=False)[0]

    return 1, plain, lambda: resize_masks(logits, FRAME, OUTPUT)


def masks_for_matching():
    """Masks at points for the matching costs of the tracker, a training video of five frames."""
    kernel = random(5, PREDICTIONS * QUERIES, CHANNELS + 1, dtype=torch.float32)
    features = random(5, CHANNELS, 120, 192, dtype=torch.float32)
    points = torch.rand(5, POINTS, 2, device=DEVICE)

    def plain() -> Tensor:
        return sample_at(mask_logits(kernel, features), points)

    def rewritten() -> Tensor:
        return torch.einsum("tqc,tcp->tqp", kernel, sample_features(features, points))

    return 1, plain, rewritten


@torch.no_grad()
def main() -> None:
    """Time all rewrites and print a line for each."""
    torch.manual_seed(0)
    model = build_model("r50", 25).to(DEVICE).accelerate(DTYPE)
    video = torch.randint(256, (36 if CUDA else 2, 3, *FRAME), dtype=torch.uint8)
    with torch.autocast(DEVICE.type, DTYPE, enabled=DTYPE != torch.float32):
        whole = milliseconds(lambda: model.segment_video(video, OUTPUT, top_k=20)) / len(video)
    print(
        f"torch {torch.__version__}, {DEVICE.type}, {torch.get_num_threads()} threads, {DTYPE}; "
        f"a frame of R-50 at {FRAME[0]}x{FRAME[1]}: {whole:.2f} ms"
    )
    for rewrite in (
        deformable_sampling,
        masks_of_queries,
        masks_for_attention,
        masks_at_output_size,
        masks_for_matching,
    ):
        times, plain, rewritten = rewrite()
        difference = (plain().float() - rewritten().float()).abs().max().item()
        slow, fast = times * kernel_milliseconds(plain), times * kernel_milliseconds(rewritten)
        share = (
            "" if rewrite is masks_for_matching else (f", {(slow - fast) / whole:+.1%} of a frame")
        )
        print(
            f"{rewrite.__name__}: plain {slow:.2f} ms, rewritten {fast:.2f} ms{share}; "
            f"largest difference {difference:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
