"""Training clips: frames of a video, one image repeated, or scenes drawn on the fly, with masks and identities; sources mixed by ratio.

    clips = ClipDataset(VideoSet("train.json", "train"), frames=5, reach=6, augmentation=Augmentation((288, 320)))
    clips[0].frames, clips[0].masks, clips[0].ids, clips[0].labels

Everything random about a clip is drawn from (seed, index of the clip), so a run is the same for any number of workers and
processes, and resumes exactly. An image (a COCO set's) is a pseudo video: the same picture in every frame, and an augmentation
that drifts. Upstream: vita/data/dataset_mapper.py and combined_loader.py. Shape letters: T frames, I instances, H, W.
"""
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors

from augmentation import Augmentation
from data import Video, VideoSet, read_frame, read_mask
from reading.annotations import Skipped
from runtime.errors import InputError
from synthetic.scenes import CATEGORIES
from synthetic.suites import HEIGHT, SUITES, WIDTH, make_video

MOST_BAD_IN_A_ROW = 20  # clips; more than that is no accident


@dataclass
class Clip:
    """A training clip and its ground truth."""
    frames: Tensor  # uint8 (T, 3, H, W), RGB
    labels: Tensor  # (I,) int64, 0-based
    ids: Tensor     # (I, T) int64, -1 where the instance is not visible
    masks: Tensor   # (I, T, H, W) bool, True = instance
    source: str = ""               # where it comes from, for people
    skipped: tuple[str, ...] = ()  # what was wrong with the clips that this one stands in for

    def pin_memory(self) -> "Clip":
        """The clip in memory that a GPU reads without the CPU; a DataLoader calls it."""
        return replace(self, frames=self.frames.pin_memory(), masks=self.masks.pin_memory())


def sample_frames(length: int, count: int, reach: int, generator: np.random.Generator) -> list[int]:
    """`count` sorted frame numbers: one anywhere, the others within `reach` of it, with replacement (as upstream).

    A video of one frame gives that frame `count` times.
    """
    centre = int(generator.integers(length))
    others = [t for t in range(max(0, centre - reach), min(length, centre + reach + 1)) if t != centre] or [centre]
    return sorted([centre, *(int(t) for t in generator.choice(others, count - 1))])


def make_clip(pictures: np.ndarray, masks: np.ndarray, labels: list[int], augmentation: Augmentation,
              generator: np.random.Generator) -> Clip:
    """The clip of pictures uint8 (T, H, W, 3), RGB, and masks bool (I, T, H, W), augmented; who is not seen is left out."""
    frames = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    frames, masks = augmentation(tv_tensors.Video(frames), tv_tensors.Mask(torch.from_numpy(masks)), generator)
    masks = masks.as_subclass(Tensor)
    numbers = torch.arange(len(masks))[:, None].expand(-1, len(frames))
    ids = torch.where(torch.from_numpy(masks.numpy().any((2, 3))), numbers, -1)
    seen = (ids != -1).any(1)
    return Clip(frames.as_subclass(Tensor), torch.tensor(labels)[seen], ids[seen], masks[seen])


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
            left_out = "; ".join(["", *videos.skipped.sentences()])
            raise InputError(f"{videos.path} has no annotated video to train on{left_out}")
        if frames < 1 or reach < 1:
            raise InputError(f"clips need at least one frame and a reach of one, not {frames} and {reach}")
        self.categories, self.skipped, self.paths = videos.categories, videos.skipped, [videos.path]
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
        """A clip of this video; InputError where a frame cannot be read."""
        chosen = sample_frames(len(video.files), self.frames, self.reach, generator)
        annotations = [annotation for annotation in video.annotations if not annotation.get("iscrowd")]
        pictures, outlines = {}, {}
        for t in set(chosen):                                      # a frame may be chosen more than once
            pictures[t] = np.asarray(read_frame(video.files[t], video.height, video.width))
            # VideoSet has checked all masks.
            outlines[t] = np.stack([
                read_mask(annotation["segmentations"][t], video.height, video.width, "", checked=True)
                for annotation in annotations])
        clip = make_clip(np.stack([pictures[t] for t in chosen]), np.stack([outlines[t] for t in chosen], 1),
                         [annotation["label"] for annotation in annotations], self.augmentation, generator)
        return replace(clip, source=", ".join([str(video.files[chosen[0]]), *(video.files[t].name for t in chosen[1:])]))


class RenderedClips(Dataset):
    """Training clips of synthetic scenes that are drawn when asked for; there are endlessly many, and number i is always the same one.

    `suites` are names of synthetic.SUITES, in turn. Every clip has its own scene, which is in no set that data.py writes, and shows
    at least one instance.
    """

    def __init__(self, suites: list[str], frames: int, reach: int, augmentation: Augmentation, seed: int = 0):
        self.names = list(suites)
        self.categories, self.skipped, self.paths = list(enumerate(CATEGORIES, 1)), Skipped(), []
        self.frames, self.reach, self.augmentation, self.seed = frames, reach, augmentation, seed

    def __getitem__(self, index: int) -> Clip:
        name = self.names[index % len(self.names)]
        suite = SUITES[name]
        generator = np.random.default_rng((self.seed, 3, index))   # the files' scenes are drawn from (seed, 0 or 1, index)
        for _ in range(MOST_BAD_IN_A_ROW):
            chosen = sample_frames(suite.frames, self.frames, self.reach, generator)
            pictures, instances = make_video(generator.spawn(1)[0], suite.frames, HEIGHT, WIDTH, suite.objects, suite.difficulty, chosen)
            if instances:                                          # somewhere in the video there are, perhaps not in these frames
                clip = make_clip(pictures, np.stack([masks for _, masks in instances]), [category_id - 1 for category_id, _ in instances],
                                 self.augmentation, generator)
                if len(clip.labels):
                    return replace(clip, source=f"scene {index} of the suite {name}")
        raise InputError(f"clip {index}: after augmentation, {MOST_BAD_IN_A_ROW} scenes in a row show no instance")


class MixedClips(Dataset):
    """Clips of several sources by number: each number's source is drawn by `ratios`, which need not add up to 1.

    Within a source, clips keep their numbers: none of its videos comes twice in as many numbers as it has videos.
    """

    def __init__(self, sources: list[ClipDataset], ratios: list[float], seed: int = 0):
        if len(sources) != len(ratios) or min(ratios) < 0 or sum(ratios) <= 0:
            raise InputError(f"{len(sources)} sources cannot be mixed by the ratios {ratios}")
        names = [[name for _, name in source.categories] for source in sources]
        if any(other != names[0] for other in names):
            raise InputError("sources of other categories cannot be mixed")
        self.sources, self.shares, self.seed = sources, np.array(ratios) / sum(ratios), seed
        self.categories = sources[0].categories
        self.videos = [video for source in sources for video in source.videos]
        self.skipped = Skipped(source.skipped for source in sources)
        self.paths = [path for source in sources for path in source.paths]

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
