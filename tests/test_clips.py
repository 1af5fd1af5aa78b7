"""Training clips: unreadable clips are replaced, invalid mixtures are errors.

More tests of clips are in test_data.py.
"""

import json
import shutil

import pytest
import torch

from augmentation import Augmentation
from clips import ClipDataset, MixedClips
from data import VideoSet
from reading.layouts import find_split
from runtime.errors import InputError
from synthetic.clips import RenderedClips
from synthetic.suites import make_dataset

AS_IT_IS = Augmentation(short_sides=(64,), flip=False)
VIDEOS = 4


@pytest.fixture
def root(tmp_path):
    make_dataset(
        tmp_path / "set",
        train_videos=VIDEOS,
        valid_videos=1,
        frames=4,
        height=64,
        width=64,
        objects=(1, 2),
    )
    return tmp_path / "set"


def open_clips(root, **options):
    return ClipDataset(
        VideoSet(*find_split(root, "train")), frames=2, reach=2, augmentation=AS_IT_IS, **options
    )


def read_all(clips):
    """One clip of each video."""
    return [clips[number] for number in range(VIDEOS)]


def spoil(root, *videos):
    """Make all frames of these videos unreadable."""
    for video in videos:
        for frame in (root / f"train/JPEGImages/{video:05d}").iterdir():
            frame.write_bytes(b"no picture")


def test_a_clip_that_cannot_be_read_is_replaced(root):
    """The replacement is of another video and says why; other clips stay as they are."""
    whole = read_all(open_clips(root))
    spoil(root, 2)
    clips = read_all(open_clips(root, skip_bad=True))
    replaced = [number for number, clip in enumerate(whole) if "/00002/" in clip.source]
    assert len(replaced) == 1
    for number, (clip, before) in enumerate(zip(clips, whole)):
        if number in replaced:
            assert "/00002/" in clip.skipped[0] and "/00002/" not in clip.source
        else:
            assert not clip.skipped and torch.equal(clip.frames, before.frames)
    with pytest.raises(InputError, match="00002"):
        read_all(open_clips(root))


class Counted(list):
    """A list of which at most a hundred items are asked for."""

    asked = 0

    def __getitem__(self, index):
        self.asked += 1
        assert self.asked <= 100
        return super().__getitem__(index)


def test_a_set_of_which_nothing_can_be_read_is_refused(root):
    """After some attempts, and not never."""
    spoil(root, *range(VIDEOS))
    clips = open_clips(root, skip_bad=True)
    clips.videos = Counted(clips.videos)
    with pytest.raises(InputError, match="cannot be read"):
        clips[0]
    assert clips.videos.asked > VIDEOS


@pytest.mark.parametrize("frames, reach", [(0, 1), (1, 0), (-3, 2)])
def test_clips_of_no_frames_are_refused(root, frames, reach):
    with pytest.raises(InputError, match="at least one frame and a reach of one"):
        ClipDataset(VideoSet(*find_split(root, "train")), frames, reach, AS_IT_IS)


def test_sources_of_other_classes_are_not_mixed(root, tmp_path):
    shutil.copytree(root, tmp_path / "other")
    content = json.loads((tmp_path / "other/train.json").read_text())
    content["categories"][0]["name"] = "another"
    (tmp_path / "other/train.json").write_text(json.dumps(content))
    one, other = open_clips(root), open_clips(tmp_path / "other")
    assert MixedClips([one, one], [1, 1]).categories == one.categories
    with pytest.raises(InputError, match="other categories cannot be mixed"):
        MixedClips([one, other], [1, 1])


@pytest.mark.parametrize("ratios", [[1], [1, 1, 1], [1, -1], [0, 0]])
def test_shares_that_make_no_sense_are_refused(root, ratios):
    clips = open_clips(root)
    with pytest.raises(InputError, match="2 sources cannot be mixed"):
        MixedClips([clips, clips], ratios)
    MixedClips([clips, clips], [1, 0])  # a source may be left out


def test_a_mixture_knows_all_of_its_sources(root, tmp_path):
    shutil.copytree(root, tmp_path / "other")
    shutil.rmtree(tmp_path / "other/train/JPEGImages/00001")
    other = ClipDataset(
        VideoSet(*find_split(tmp_path / "other", "train"), skip_bad=True), 2, 2, AS_IT_IS
    )
    mixed = MixedClips([open_clips(root), other], [1, 3])
    assert len(mixed.videos) == 2 * VIDEOS - 1 and mixed.skipped.total == 1
    assert MixedClips([other, open_clips(root)], [1, 3]).skipped.total == 1  # of any source
    assert mixed.paths == [root / "train.json", tmp_path / "other/train.json"]
    from_other = sum(str(tmp_path / "other") in mixed[number].source for number in range(120))
    assert 75 <= from_other <= 105  # three quarters, within three standard errors


def test_a_scene_is_rendered_at_the_asked_size_and_length():
    augmentation = Augmentation((40,), max_long_side=50, flip=False)
    clip = RenderedClips(["easy"], frames=3, reach=2, augmentation=augmentation)[0]
    assert clip.frames.shape[:2] == (3, 3) and max(clip.frames.shape[2:]) == 50
