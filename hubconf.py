"""Models for torch.hub: from a copy of the repository, or from GitHub.

    torch.hub.load("path/to/repository", "gratt_vis_small", source="local")
    torch.hub.load("OWNER/REPOSITORY", "gratt_vis", weights="grattvis_r50_ovis.pth", preset="r50")

The modules of this repository have short names, and Python has one module of each name. Loading
therefore fails if another project's `model` or `tracker` is imported already, and a later
`import model` finds ours: keep such modules in a package.
"""

import sys
from pathlib import Path as _Path

dependencies = ["numpy", "pycocotools", "scipy", "torch", "torchvision", "tqdm"]
_MODULES = (
    "backbone batching checkpoint deform_attn deform_attn_cuda detector evaluation fast model "
    "reading runtime tracker transformer"
).split()  # those that a model needs

for _name in filter(sys.modules.get, _MODULES):
    _module = sys.modules[_name]
    _file = getattr(_module, "__file__", None) or next(iter(_module.__path__))
    if not _Path(_file).resolve().is_relative_to(_Path(__file__).resolve().parent):
        raise ImportError(
            f"GRAtt-VIS has a module named {_name}, and {_file} of that name is imported already: "
            "move that one into a package, or load GRAtt-VIS in a process of its own"
        )

from checkpoint import SHIPPED_WEIGHTS as _SHIPPED_WEIGHTS  # noqa: E402
from checkpoint import load_weights as _load_weights  # noqa: E402
from checkpoint import model_from_checkpoint as _model_from_checkpoint  # noqa: E402
from model import build_model as _build_model  # noqa: E402


def gratt_vis(preset=None, num_classes=None, weights=None, propagation=None, **options):
    """A GRAtt-VIS model in evaluation mode, as of `model_from_checkpoint` or `build_model`.

    preset: r50, r101, swin_t, swin_s, swin_b, swin_l, small or toy; files of train.py contain it.
    num_classes: for random weights, or to start training from weights of other classes: parameters
        that do not fit are random, and printed. None = as in the weights, which must be complete.
    weights: a file (official or of train.py), an https address or the name of an official file.
    propagation: gated (default), plain, memory, gated+memory or clip; most weights imply it.
    options: other arguments of GRAttVIS and Tracker.

        video = model.segment_video(frames)  # uint8 RGB (T, 3, H, W) at test size
        video.scores, video.labels, video.masks, video.track_ids
    """
    if num_classes is None:
        if weights is None:
            raise ValueError("give weights, or num_classes for a model with random weights")
        return _model_from_checkpoint(weights, preset, propagation, **options)[0]
    model = _build_model(preset, num_classes, propagation or "gated", **options).eval()
    if weights is not None:
        print(f"{weights}: {_load_weights(model, weights, reset_classes=True)}")
    return model


def gratt_vis_small():
    """The preset small with weights/small.pt, which knows six shapes: see weights/README.md."""
    return _model_from_checkpoint(_SHIPPED_WEIGHTS)[0]
