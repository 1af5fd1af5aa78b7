"""Training clips: frames of a video, or an image repeated, with masks and identities.

    videos = VideoSet("train.json", "train")
    clips = ClipDataset(videos, frames=5, reach=6, augmentation=Augmentation((288, 320)))
    clips[0].frames, clips[0].masks, clips[0].labels

A training clip (Clip, T frames) is a "video" of the model, the matcher and the losses. What the
tracker calls a clip is U consecutive frames of it (--clip-length).

The randomness of a clip depends only on (seed, index of the clip). A run is therefore the same for
any number of workers and processes, and can be resumed exactly. An image (of COCO, for example) is
a pseudo video: the same picture in every frame, with an augmentation that drifts. Clips of
synthetic scenes are in synthetic/clips.py.

Upstream: vita/data/dataset_mapper.py and combined_loader.py.
Shape letters: T frames, I instances, H, W.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors

from augmentation import Augmentation
from data import Video, VideoSet, read_frame, read_mask
from reading.annotations import Skipped
from runtime.errors import InputError

MAX_BAD_CLIPS = 20  # unreadable clips in a row before training stops


@dataclass
class Clip:
    """A training clip and its ground truth."""

    frames: Tensor  # uint8 (T, 3, H, W), RGB
    labels: Tensor  # (I,) int64, 0-based
    masks: Tensor  # (I, T, H, W) bool, True = instance; empty where it is not visible
    source: str = ""  # its files, for messages
    skipped: tuple[str, ...] = ()  # errors of the unreadable clips that this one replaces


def sample_frames(length: int, count: int, reach: int, generator: np.random.Generator) -> list[int]:
    """Sample `count` frame numbers: one anywhere, the others within `reach` of it.

    As upstream, the others are drawn with replacement. A video of one frame gives that frame
    `count` times. The result is sorted.
    """
    centre = int(generator.integers(length))
    first, last = max(0, centre - reach), min(length - 1, centre + reach)
    others = [t for t in range(first, last + 1) if t != centre] or [centre]
    chosen = generator.choice(others, count - 1).tolist()
    return sorted([centre, *chosen])


def make_clip(
    pictures: np.ndarray,
    masks: np.ndarray,
    labels: list[int],
    augmentation: Augmentation,
    generator: np.random.Generator,
) -> Clip:
    """An augmented clip; instances that are not visible in any frame are dropped.

    pictures: uint8 (T, H, W, 3), RGB. masks: bool (I, T, H, W). labels: I classes.
    """
    frames = tv_tensors.Video(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    masks = tv_tensors.Mask(torch.from_numpy(masks))
    frames, masks = augmentation(frames, masks, generator)
    masks = masks.as_subclass(Tensor)
    is_visible = torch.from_numpy(masks.numpy().any((1, 2, 3)))  # (I,). Speed: in NumPy
    return Clip(frames.as_subclass(Tensor), torch.tensor(labels)[is_visible], masks[is_visible])


class ClipDataset(Dataset):
    """Training clips of a VideoSet.

    The number of clips is unlimited, and clip i is always the same. An epoch is a permutation of
    the annotated videos. Crowd annotations are dropped.

    skip_bad: replace an unreadable clip by a clip of another video, and report the error in its
        `skipped`, instead of raising InputError.
    """

    def __init__(
        self,
        videos: VideoSet,
        frames: int,
        reach: int,
        augmentation: Augmentation,
        seed: int = 0,
        skip_bad: bool = False,
    ):
        self.videos = [video for video in videos.videos if instances_of(video)]
        if not self.videos:
            left_out = "; ".join(["", *videos.skipped.sentences()])
            raise InputError(f"{videos.path} has no annotated video to train on{left_out}")
        if frames < 1 or reach < 1:
            raise InputError(
                f"clips need at least one frame and a reach of one, not {frames} and {reach}"
            )
        self.categories = videos.categories
        self.skipped = videos.skipped
        self.paths = [videos.path]
        self.frames = frames
        self.reach = reach
        self.augmentation = augmentation
        self.seed = seed
        self.skip_bad = skip_bad

    def __getitem__(self, index: int) -> Clip:
        epoch, place = divmod(index, len(self.videos))
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.videos))
        generator = np.random.default_rng((self.seed, 1, index))
        video = self.videos[order[place]]
        errors = []
        while True:
            try:
                clip = self.load(video, generator)
            except InputError as error:
                if not self.skip_bad or len(errors) == MAX_BAD_CLIPS:
                    raise
                errors.append(str(error))
                video = self.videos[generator.integers(len(self.videos))]
            else:
                clip.skipped = tuple(errors)
                return clip

    def load(self, video: Video, generator: np.random.Generator) -> Clip:
        """A random clip of a video; InputError if a frame cannot be read."""
        chosen = sample_frames(len(video.files), self.frames, self.reach, generator)
        annotations = instances_of(video)
        pictures, masks = {}, {}
        for t in set(chosen):  # a frame may be chosen more than once
            picture = read_frame(video.files[t], video.height, video.width)
            pictures[t] = np.asarray(picture)
            codes = [annotation["segmentations"][t] for annotation in annotations]
            # The masks were validated by VideoSet.
            masks[t] = [
                read_mask(code, video.height, video.width, "", checked=True) for code in codes
            ]
        # Speed: one copy of all masks, instead of one per frame and one per clip.
        masks_of_instances = list(zip(*(masks[t] for t in chosen)))
        clip = make_clip(
            np.stack([pictures[t] for t in chosen]),
            np.array(masks_of_instances),
            [annotation["label"] for annotation in annotations],
            self.augmentation,
            generator,
        )
        first, *others = [video.files[t] for t in chosen]
        clip.source = ", ".join([str(first), *(file.name for file in others)])
        return clip


def instances_of(video: Video) -> list[dict]:
    """The annotations of a video that are not crowds."""
    return [annotation for annotation in video.annotations if not annotation.get("iscrowd")]


class MixedClips(Dataset):
    """Clips of several data sets: the data set of each clip is drawn with the given ratios.

    ratios: need not sum to 1. Clip i is clip i of its data set, so that no video of a data set of N
        videos comes twice in N clips.
    """

    def __init__(self, sources: list[ClipDataset], ratios: list[float], seed: int = 0):
        if len(sources) != len(ratios) or min(ratios) < 0 or sum(ratios) <= 0:
            raise InputError(f"{len(sources)} sources cannot be mixed by the ratios {ratios}")
        names = [[name for _, name in source.categories] for source in sources]
        if any(other != names[0] for other in names):
            raise InputError("sources of other categories cannot be mixed")
        self.sources = sources
        self.shares = np.array(ratios) / sum(ratios)
        self.seed = seed
        self.categories = sources[0].categories
        self.videos = [video for source in sources for video in source.videos]
        self.skipped = Skipped(source.skipped for source in sources)
        self.paths = [path for source in sources for path in source.paths]

    def __getitem__(self, index: int) -> Clip:
        generator = np.random.default_rng((self.seed, 2, index))
        source = generator.choice(len(self.sources), p=self.shares)
        return self.sources[source][index]


class StepSampler(Sampler):
    """Batch sampler: the clip indices of each step, for the process `rank` of `world`.

    Indices count up over processes first, then over steps, as if all were one large batch.
    """

    def __init__(
        self,
        first_step: int,
        last_step: int,
        clips_per_process: int,
        rank: int = 0,
        world: int = 1,
    ):
        self.steps = range(first_step, last_step)
        self.clips_per_process = clips_per_process
        self.rank = rank
        self.world = world

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = (step * self.world + self.rank) * self.clips_per_process
            yield list(range(first, first + self.clips_per_process))

    def __len__(self) -> int:
        return len(self.steps)
