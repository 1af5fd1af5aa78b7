"""Made-up predictions and ground truth for the tests of matching and losses.

A query "painted" to fit an instance has its mask and its class. Shape letters as in matcher.py.
"""

import torch
import torch.nn.functional as F

from clips import Clip
from matcher import Matches, Predictions, Targets, pad_targets, to_device
from model import FrameOutput, TrainingOutput
from tracker import ClipPrediction

CLASSES = 3
WEIGHTS = {"class": 2.0, "mask": 5.0, "dice": 5.0}
SIZE = (16, 24)


def fixed_points(rows: int, count: int, like: torch.Tensor) -> torch.Tensor:
    """In place of matcher.random_points: the same points for every row."""
    generator = torch.Generator().manual_seed(count)
    points = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return points.to(like).expand(rows, -1, -1)


def make_clip(visible: list[list[int]]) -> Clip:
    """Instance i: class i, a column of the frame where visible[i][t].

    Frames are black; there are 3 without any instance.
    """
    instances, frames = len(visible), len(visible[0]) if visible else 3
    shown = torch.tensor(visible, dtype=torch.bool).view(instances, frames)
    masks = torch.zeros(instances, frames, *SIZE, dtype=torch.bool)
    for index in range(instances):
        masks[index, shown[index], 2:14, 6 * index : 6 * index + 5] = True
    return Clip(torch.zeros(frames, 3, *SIZE, dtype=torch.uint8), torch.arange(instances), masks)


def visible_in_frames(clip: Clip) -> torch.Tensor:
    """(I, T) bool."""
    return clip.masks.flatten(2).any(2)


def make_targets(*clips: Clip) -> Targets:
    return pad_targets(list(clips), SIZE, torch.device("cpu"))


def make_matches(query_of, targets: Targets, predictions: Predictions) -> Matches:
    """Matches with the given queries (G, R, B, I)."""
    length = predictions.clip_length
    visible = [part.any(1) for part in targets.visible.split(length, 1)]
    (query_of,) = to_device([query_of], targets.masks.device)
    return Matches(query_of, torch.stack(visible), None)


def random_output(
    batch: int,
    frames: int,
    clip_length: int,
    layers: int = 2,
    depth: int = 2,
    queries: int = 6,
    channels: int = 8,
) -> TrainingOutput:
    """Random predictions of the shapes that the model makes in training, with gradients."""

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def random_clip(length):
        streams = layers, batch
        gates = [random(*streams, queries) for _ in range(depth)]
        return ClipPrediction(
            logits=[random(*streams, queries, CLASSES + 1) for _ in range(depth)],
            mask_kernel=[random(*streams, queries, channels + 1) for _ in range(depth)],
            clip_embed=random(*streams, queries, channels),
            frame_embed=random(*streams, length, queries, channels),
            gate_logits=gates,
            gate_soft=[gate.sigmoid() for gate in gates],
        )

    count, size = batch * frames, (SIZE[0] // 4, SIZE[1] // 4)
    predictions = [
        (random(count, queries, CLASSES + 1), random(count, queries, channels + 1))
        for _ in range(layers + 1)
    ]
    queries_of_frames = random(layers, count, queries, channels)
    detected = FrameOutput(predictions, queries_of_frames, random(count, channels, *size))
    lengths = [min(clip_length, frames - first) for first in range(0, frames, clip_length)]
    return TrainingOutput(detected, [random_clip(length) for length in lengths], SIZE)


def only_video(output: TrainingOutput, video: int, batch: int) -> TrainingOutput:
    """The predictions for one video of a batch."""
    frames = len(output.frames.predictions[0][0]) // batch
    rows = slice(video * frames, (video + 1) * frames)
    predictions = [(logits[rows], kernels[rows]) for logits, kernels in output.frames.predictions]
    detected = FrameOutput(
        predictions, output.frames.queries[:, rows], output.frames.features[rows]
    )

    def of_video(value):
        return [of_video(x) for x in value] if isinstance(value, list) else value[:, [video]]

    clips = [ClipPrediction(*map(of_video, vars(clip).values())) for clip in output.clips]
    return TrainingOutput(detected, clips, output.padded_size)


def paint(kernel: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Mask logits (..., T, h, w) of kernels (..., C + 1) on features (T, C, h, w)."""
    masks = torch.einsum("...c,tchw->...thw", kernel[..., :-1], features)
    return masks + kernel[..., -1, None, None, None]


def painted_output(clip: Clip, plan: list[list[int]], queries: int = 4) -> TrainingOutput:
    """Clips of one frame: in clip t, query plan[t][i] is painted to fit instance i.

    There is one stream and one decoder layer.
    """
    instances, frames = clip.masks.shape[:2]
    features = torch.where(clip.masks, 20.0, -20.0)
    frame_logits = torch.zeros(frames, queries, CLASSES + 1)
    frame_kernels = torch.zeros(frames, queries, instances + 1)
    clips = []
    for t, queries_of_instances in enumerate(plan):
        logits, kernel = torch.zeros(queries, CLASSES + 1), torch.zeros(queries, instances + 1)
        logits[:, -1] = 5
        for instance, query in enumerate(queries_of_instances):
            logits[query] = 10 * F.one_hot(clip.labels[instance], CLASSES + 1)
            kernel[query, instance] = 1
        frame_logits[t], frame_kernels[t] = logits, kernel
        clips.append(
            ClipPrediction(
                [logits[None, None]],
                [kernel[None, None]],
                torch.zeros(1, 1, queries, 2),
                torch.zeros(1, 1, 1, queries, 2),
                [],
                [],
            )
        )
    detected = FrameOutput(
        [(frame_logits, frame_kernels)],
        torch.zeros(1, frames, queries, 2),
        features.transpose(0, 1),
    )
    return TrainingOutput(detected, clips, SIZE)
