"""Training clips: frames of a video, or one image repeated, with masks and identities; several sources mixed by ratio.

    clips = ClipDataset(VideoSet("train.json", "train"), frames=5, reach=6, augmentation=Augmentation((288, 320)))
    clips[0].frames, clips[0].masks, clips[0].ids, clips[0].labels

Everything random about a clip is drawn from (seed, index of the clip), so a run is the same for any number of workers and
processes, and resumes exactly. An image (a COCO set's) is a pseudo video: the same picture in every frame, and an augmentation
that drifts. Upstream: vita/data/dataset_mapper.py and combined_loader.py. Shape letters: T frames, I instances, H, W.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors

from augmentation import Augmentation
from data import InputError, Video, VideoSet, read_frame, read_mask

MOST_BAD_IN_A_ROW = 20  # clips; more than that is no accident


@dataclass
class Clip:
    """A training clip and its ground truth."""
    frames: Tensor  # uint8 (T, 3, H, W), RGB
    labels: Tensor  # (I,) int64, 0-based
    ids: Tensor     # (I, T) int64, -1 where the instance is not visible
    masks: Tensor   # (I, T, H, W) bool, True = instance
    skipped: tuple[str, ...] = ()  # what was wrong with the clips that this one stands in for


def sample_frames(length: int, count: int, reach: int, generator: np.random.Generator) -> list[int]:
    """`count` sorted frame numbers: one anywhere, the others within `reach` of it, with replacement (as upstream).

    A video of one frame gives that frame `count` times.
    """
    centre = int(generator.integers(length))
    others = [t for t in range(max(0, centre - reach), min(length, centre + reach + 1)) if t != centre] or [centre]
    return sorted([centre, *(int(t) for t in generator.choice(others, count - 1))])


class ClipDataset(Dataset):
    """Training clips of a VideoSet by number; there are endlessly many, and number i is always the same one.

    Epochs are permutations of the annotated videos. Crowd annotations are left out. With skip_bad, a clip that cannot be read
    is replaced by one of another video, which then says so (Clip.skipped).
    """

    def __init__(self, videos: VideoSet, frames: int, reach: int, augmentation: Augmentation, seed: int = 0,
                 skip_bad: bool = False):
        self.videos = [video for video in videos.videos
                       if any(not annotation.get("iscrowd") for annotation in video.annotations)]
        if not self.videos:
            raise InputError(f"{videos.path} has no annotated video to train on")
        if frames < 1 or reach < 1:
            raise InputError(f"clips need at least one frame and a reach of one, not {frames} and {reach}")
        self.categories, self.skipped = videos.categories, videos.skipped
        self.frames, self.reach, self.augmentation = frames, reach, augmentation
        self.seed, self.skip_bad = seed, skip_bad

    def __getitem__(self, index: int) -> Clip:
        epoch, place = divmod(index, len(self.videos))
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.videos))
        video, generator = self.videos[order[place]], np.random.default_rng((self.seed, 1, index))
        skipped = []
        while True:
            try:
                clip = self.read(video, generator)
            except InputError as error:
                if not self.skip_bad or len(skipped) == MOST_BAD_IN_A_ROW:
                    raise
                skipped.append(str(error))
                video = self.videos[generator.integers(len(self.videos))]
            else:
                clip.skipped = tuple(skipped)
                return clip

    def read(self, video: Video, generator: np.random.Generator) -> Clip:
        """A clip of this video; InputError where a frame or a mask cannot be read."""
        chosen = sample_frames(len(video.files), self.frames, self.reach, generator)
        annotations = [annotation for annotation in video.annotations if not annotation.get("iscrowd")]
        pictures, outlines = {}, {}
        for t in set(chosen):                                      # a frame may be chosen more than once
            pictures[t] = np.asarray(read_frame(video.files[t], video.height, video.width))
            outlines[t] = np.stack([read_mask(annotation["segmentations"][t], video.height, video.width,
                                              f"annotation {annotation['id']}, frame {t},") for annotation in annotations])
        frames = torch.from_numpy(np.stack([pictures[t] for t in chosen])).permute(0, 3, 1, 2)
        masks = torch.from_numpy(np.stack([outlines[t] for t in chosen], 1))
        frames, masks = self.augmentation(tv_tensors.Video(frames), tv_tensors.Mask(masks), generator)
        masks = masks.as_subclass(Tensor)
        numbers = torch.arange(len(annotations))[:, None].expand(-1, len(chosen))
        ids = torch.where(torch.from_numpy(masks.numpy().any((2, 3))), numbers, -1)
        labels = torch.tensor([annotation["label"] for annotation in annotations])
        seen = (ids != -1).any(1)
        return Clip(frames.as_subclass(Tensor), labels[seen], ids[seen], masks[seen])


class MixedClips(Dataset):
    """Clips of several sources by number: each number's source is drawn by `ratios`, which need not add up to 1.

    Within a source, clips keep their numbers: none of its videos comes twice in as many numbers as it has videos.
    """

    def __init__(self, sources: list[ClipDataset], ratios: list[float], seed: int = 0):
        if len(sources) != len(ratios) or min(ratios) < 0 or sum(ratios) <= 0:
            raise InputError(f"{len(sources)} sources cannot be mixed by the ratios {ratios}")
        if any(source.categories != sources[0].categories for source in sources):
            raise InputError("sources of other categories cannot be mixed")
        self.sources, self.shares, self.seed = sources, np.array(ratios) / sum(ratios), seed
        self.categories = sources[0].categories
        self.videos = [video for source in sources for video in source.videos]
        self.skipped = [sentence for source in sources for sentence in source.skipped]

    def __getitem__(self, index: int) -> Clip:
        source = np.random.default_rng((self.seed, 2, index)).choice(len(self.sources), p=self.shares)
        return self.sources[source][index]


class StepSampler(Sampler):
    """Clip numbers of one process, batch by batch: step s of W processes trains clips s * W * B and up, in rank order."""

    def __init__(self, first_step: int, last_step: int, batch: int, rank: int = 0, world: int = 1):
        self.steps, self.batch, self.rank, self.world = range(first_step, last_step), batch, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = (step * self.world + self.rank) * self.batch
            yield list(range(first, first + self.batch))

    def __len__(self) -> int:
        return len(self.steps)
