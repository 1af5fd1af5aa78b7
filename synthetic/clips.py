"""Training clips of synthetic scenes, rendered on the fly."""

from dataclasses import replace

import numpy as np
from torch.utils.data import Dataset

from augmentation import Augmentation
from clips import Clip, make_clip, sample_frames
from reading.annotations import Skipped
from runtime.errors import InputError
from synthetic.rendering import make_video
from synthetic.scenes import CATEGORIES
from synthetic.suites import HEIGHT, SUITES, WIDTH

MAX_EMPTY_SCENES = 20  # in a row before training stops


class RenderedClips(Dataset):
    """Training clips of synthetic scenes, with the interface of ClipDataset.

    The number of clips is unlimited, and clip i is always the same. Every clip has its own scene,
    which is in no data set written by data.py, and shows at least one instance.

    suites: names of SUITES, used in turn.
    """

    def __init__(
        self, suites: list[str], frames: int, reach: int, augmentation: Augmentation, seed: int = 0
    ):
        self.names = list(suites)
        self.categories = list(enumerate(CATEGORIES, 1))
        self.skipped = Skipped()
        self.paths = []
        self.frames = frames
        self.reach = reach
        self.augmentation = augmentation
        self.seed = seed

    def __getitem__(self, index: int) -> Clip:
        name = self.names[index % len(self.names)]
        # The scenes of data sets are seeded with (seed, 0 or 1, index).
        generator = np.random.default_rng((self.seed, 3, index))
        for _ in range(MAX_EMPTY_SCENES):
            clip = self.render(name, generator)
            if clip is not None and len(clip.labels):
                return replace(clip, source=f"scene {index} of the suite {name}")
        raise InputError(
            f"clip {index}: after augmentation, {MAX_EMPTY_SCENES} scenes in a row show no instance"
        )

    def render(self, name: str, generator: np.random.Generator) -> Clip | None:
        """A clip of a new scene; None if its frames show no instance."""
        suite = SUITES[name]
        chosen = sample_frames(suite.frames, self.frames, self.reach, generator)
        scene_generator = generator.spawn(1)[0]
        pictures, instances = make_video(
            scene_generator,
            suite.frames,
            HEIGHT,
            WIDTH,
            suite.objects,
            suite.difficulty,
            only=chosen,
        )
        if not instances:
            return None
        masks = np.stack([masks for _, masks in instances])
        labels = [category_id - 1 for category_id, _ in instances]
        return make_clip(pictures, masks, labels, self.augmentation, generator)
