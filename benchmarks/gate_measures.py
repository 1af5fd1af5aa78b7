"""What the gate study measures: AP by occlusion and causes, identity switches, and open gates.

AP by occlusion: ground truth instances are binned by their longest gap, the number of consecutive
frames without a mask between two frames with one (occluded, or outside the frame). In the AP of a
bin, instances of other bins are ignored like those of other area ranges. An unmatched detection has
no gap, so it counts as a false positive in every bin. Bins with few instances therefore have a
lower AP; compare models, not bins. AR10 ignores false positives and is comparable across bins.

Causes: the AP gained by fixing one cause of errors (evaluation/causes.py), and the AP after linking
the same masks best (evaluation/linking.py).

Identity switches: in each frame, tracks with a score of at least 0.3 are assigned to instances by
mask IoU (Hungarian matching, at least 0.5, ignoring classes). An instance keeps its track of the
previous frame if possible, as in CLEAR-MOT (Bernardin and Stiefelhagen 2008). A switch is an
instance whose track differs from its last one, possibly after an occlusion. A query with several
labels is one track. Losing a track without getting another is not a switch; AP covers it.

Gates: the share of open gates, over frames and decoder layers, of the track that an instance has
most often, if it has it in at least half of its visible frames. A closed gate resets the query to
the one propagated from the previous frame, so the gate of the last layer decides whether anything
from this frame is kept; it is also listed separately. An object is visible where it has a mask,
occluded between two frames with a mask, and outside before the first and after the last. Its
visible share is relative to its largest area in the video.

Time: of `encode_video` on the GPU or CPU that measures, from frames in memory to run-length codes,
per frame of the first video of a suite. It is comparable only if nothing else runs meanwhile.

Letters: T frames, G ground truth instances, K tracks, D decoder layers.
"""

import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as rle
from scipy.optimize import linear_sum_assignment

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import Video, VideoSet, frames_at_test_size, read_frame  # noqa: E402
from evaluation.inference import segment_videos, to_entries  # noqa: E402
from evaluation.metric import (  # noqa: E402
    accumulate_videos,
    category_ids,
    mean_defined,
)
from evaluation.occlusion import GAP, group_sizes  # noqa: E402
from evaluation.overlaps import measure_overlaps, track_rles  # noqa: E402
from evaluation.postprocess import EncodedVideo  # noqa: E402
from evaluation.scoring import score_part  # noqa: E402
from model import GRAttVIS  # noqa: E402
from synthetic.scenes import Difficulty  # noqa: E402
from viewing.overlays import best_labels  # noqa: E402

MAX_LONG_SIDE = 1333  # pixels
TOP_K = 10  # instances per video
MIN_SCORE = 0.3  # of a track that can be given to an instance
MIN_IOU = 0.5
TIMED_FRAMES = 48
# Lower end excluded.
SHARES = ("0", "0-25 %", "25-50 %", "50-75 %", "75-100 %")
STATES = ("visible", "occluded", "outside", "visible, clean frame", "visible, noisy frame")


def measure_suite(
    model: GRAttVIS,
    videos: VideoSet,
    device: torch.device,
    amp_dtype: torch.dtype,
    short_side: int,
    difficulty: Difficulty,
) -> dict[str, dict]:
    """All that gate_tables.TITLES names, and "instances by gap", of a model on a suite."""
    results = []
    switches = 0
    opened = defaultdict(list)  # gates (D,) by name of STATES and SHARES
    segmented = segment_videos(
        model, videos.videos, device, amp_dtype, short_side, MAX_LONG_SIDE, TOP_K
    )
    for video, result in segmented:
        results += to_entries(video, result, videos.categories)
        tracks = best_labels(result, MIN_SCORE)
        assigned = assign_tracks(frame_overlaps(result, tracks, video))
        switches += count_switches(assigned)
        noisy = noisy_frames(video, difficulty.noise) if difficulty.noisy else None
        for annotation, track_of in zip(video.annotations, assigned.T):
            areas = visible_areas(annotation)
            usual = usual_track(track_of, areas)
            if usual is None:
                continue
            gates = result.gates[tracks[usual]].numpy()  # (T, D)
            for name, chosen in frame_groups(areas, noisy).items():
                opened[name] += gates[chosen].tolist()
    metrics = score_part(results, videos.file).metrics
    scores = {name: metrics[name] for name in ("AP", "AP50", "AR10")}
    scores |= {name: metrics["tracking"]["over_detections"][name] for name in ("HOTA", "AssA")}
    scores["switches"] = switches / len(videos)
    scores["ms per frame"] = milliseconds_per_frame(
        model, videos.videos[0], device, amp_dtype, short_side
    )
    causes = {name: gain["AP"] for name, gain in metrics["causes"].items()}
    causes["best linking"] = metrics["oracle"]["linking"]["AP"]
    return (
        {"scores": scores, "causes": causes}
        | scores_by_gap(results, videos.ground_truth)
        | open_shares(opened)
    )


def milliseconds_per_frame(
    model: GRAttVIS, video: Video, device: torch.device, amp_dtype: torch.dtype, short_side: int
) -> float:
    """The time of a model per frame of a video; the median of three runs after a first one."""
    chosen = slice(0, TIMED_FRAMES)
    frames = torch.stack(list(frames_at_test_size(video, short_side, MAX_LONG_SIDE, chosen)))
    times = []
    for _ in range(4):
        began = time.perf_counter()
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
            model.encode_video(frames, (video.height, video.width), TOP_K)
        times.append(time.perf_counter() - began)
    return 1e3 * sorted(times[1:])[1] / len(frames)


# The ground truth


def visible_areas(annotation: dict) -> np.ndarray:
    """(T,) pixels, 0 where the instance has no mask."""
    return np.array([area or 0 for area in annotation["areas"]])


def noisy_frames(video: Video, noise: float) -> np.ndarray:
    """bool (T,): the frames that are lost in noise of so many grey levels.

    No annotation tells them, but the pictures do: in noise of 70, the difference of neighbouring
    pixels has a standard deviation of 27 to 62, else of 1 to 12 (40 videos).
    """
    noisy = []
    for file in video.files:
        picture = read_frame(file, video.height, video.width).convert("L")
        differences = np.diff(np.asarray(picture, np.float32), axis=1)
        noisy.append(differences.std() > noise / 4)
    return np.array(noisy)


def frame_groups(areas: np.ndarray, noisy: np.ndarray | None) -> dict[str, np.ndarray]:
    """Sort the frames of an instance: bool (T,) for every name of STATES and SHARES.

    areas: its visible pixels (T,). noisy: bool (T,), None where no frame ever is.
    """
    visible = areas > 0
    frames = np.arange(len(areas))
    first = visible.argmax()
    last = len(areas) - 1 - visible[::-1].argmax()
    present = (frames >= first) & (frames <= last)
    groups = {
        "visible": visible,
        "occluded": present & ~visible,
        "outside": ~present,
        "visible, clean frame": np.zeros_like(visible),
        "visible, noisy frame": np.zeros_like(visible),
    }
    if noisy is not None:
        groups["visible, clean frame"] = visible & ~noisy
        groups["visible, noisy frame"] = visible & noisy
    quarters = np.ceil(4 * areas / areas.max())
    for number, name in enumerate(SHARES):
        groups[name] = present & (quarters == number)
    return groups


# Which track an instance has


def frame_overlaps(result: EncodedVideo, tracks: list[int], video: Video) -> np.ndarray:
    """IoU (T, G, K) of the ground truth's masks with those of some of the predicted instances."""
    size = {"height": video.height, "width": video.width}
    actual = [track_rles(annotation, size) for annotation in video.annotations]
    overlaps = np.zeros((len(video.files), len(actual), len(tracks)))
    for t, overlap in enumerate(overlaps):
        if overlap.size:
            overlap[:] = rle.iou(
                [masks[t] for masks in actual],
                [result.segmentations[track][t] for track in tracks],
                [False] * len(tracks),
            )
    return overlaps


def assign_tracks(overlaps: np.ndarray) -> np.ndarray:
    """IoU (T, G, K) -> the track of each instance in each frame, int (T, G), -1 = none."""
    assigned = np.full(overlaps.shape[:2], -1)
    for t, overlap in enumerate(overlaps):
        worth = np.where(overlap >= MIN_IOU, overlap, 0.0)
        if t:
            kept = (assigned[t - 1, :, None] == np.arange(overlap.shape[1])) & (worth > 0)
            worth += len(worth) * kept  # more than the sum of all overlaps
        instances, tracks = linear_sum_assignment(worth, maximize=True)
        matched = worth[instances, tracks] > 0
        assigned[t, instances[matched]] = tracks[matched]
    return assigned


def count_switches(assigned: np.ndarray) -> int:
    """How often an instance has another track than the last it had; `assigned` as assign_tracks."""
    switches = 0
    for track_of in assigned.T:
        known = track_of[track_of >= 0]
        switches += int(np.count_nonzero(np.diff(known)))
    return switches


def usual_track(track_of: np.ndarray, areas: np.ndarray) -> int | None:
    """The most frequent track of an instance, if it has it in half of its visible frames."""
    times = np.bincount(track_of[track_of >= 0], minlength=1)
    if 2 * times.max() < np.count_nonzero(areas):
        return None
    return int(times.argmax())


# Numbers


def scores_by_gap(results: list[dict], ground_truth: dict) -> dict[str, dict[str, float]]:
    """AP and AR10 of the instances in each bin of occlusion.GAP, and their number.

    Arguments as for metric.accumulate.
    """
    videos = measure_overlaps(results, ground_truth)
    precision, recall, _ = accumulate_videos(videos, category_ids(ground_truth), [GAP])
    bins = list(enumerate(GAP.ranges))
    return {
        "AP by gap": {name: mean_defined(precision[:, :, :, a, -1]) for a, name in bins},
        "AR10 by gap": {name: mean_defined(recall[:, :, a, 1]) for a, name in bins},
        "instances by gap": group_sizes(videos, GAP),
    }


def open_shares(opened: dict[str, list[list[bool]]]) -> dict[str, dict[str, float]]:
    """The share of gates that are open, of all layers and of the last; -1 for none.

    opened: D gates for each frame, by name of STATES and SHARES.
    """
    shares = {}
    for what, names in (("state", STATES), ("share", SHARES)):
        shares[f"open by {what}"] = {name: mean_defined(np.array(opened[name])) for name in names}
        last = {name: [gates[-1:] for gates in opened[name]] for name in names}
        shares[f"last open by {what}"] = {
            name: mean_defined(np.array(last[name])) for name in names
        }
    return shares
