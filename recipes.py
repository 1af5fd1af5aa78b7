"""The official settings by name: stages, and the recipes of the paper's models.

    python train.py --recipe grattvis/ovis/r50

A recipe is a training stage and its differences from the stage's defaults. The keys are the flags
of train.py (trainer/flags.py). Paper: GRAtt-VIS (arXiv 2305.17096), implementation details, and
VITA (2206.04403) for the stages before. Upstream: configs/grattvis, configs/vita and
vita/config.py.
"""

from model import TEST_SIDES

# What is trained: a detector on single images, VITA on videos, GenVIS, GRAtt-VIS.
STAGES = {
    "detector": dict(propagation="clip", window=0, frames=1),
    "vita": dict(propagation="clip", window=6),
    "genvis": dict(propagation="memory", window=0, freeze_detector=True),
    "grattvis": dict(propagation="gated", window=0, freeze_detector=True),
}

# Shared by all official settings.
ALL = dict(
    points=12544,
    clip_gradient=0.01,
    backbone_lr_factor=0.1,
    weight_decay=0.05,
    warmup=10,
    warmup_start=1.0,
    lr_gamma=0.1,
    save_every=5000,
    seed=-1,
    crop_size=(384, 600),
    pseudo_crop_size=(384, 600),
    rotation=15.0,
)
SIDES = (288, 320, 352, 384, 416, 448, 480, 512)
VIDEO = ALL | dict(
    batch=8,
    lr=5e-5,
    short_sides=SIDES,
    pseudo_short_sides=SIDES,
    max_long_side=768,
    crop_short_sides=(400, 500, 600),
    lsj=False,
    lsj_size=768,
)
# VITA and COCO have "clip" propagation, so clip_length and gate_weight have no effect there.
VITA = VIDEO | dict(stage="vita", clip_length=5, gate_weight=1.0)
GRATTVIS = VIDEO | dict(stage="grattvis", frames=5, reach=6, clip_length=1, gate_weight=0.0)
COCO = ALL | dict(
    stage="detector",
    train_sets=("coco_2017_train",),
    train_ratio=(),
    test_sets=("coco_2017_val",),
    num_classes=80,
    top_k=100,
    batch=16,
    lr=1e-4,
    reach=20,
    short_sides=(800,),
    max_long_side=1333,
    pseudo_short_sides=tuple(range(480, 769, 32)),
    crop_short_sides=(),
    crop_relative=True,
    crop_size=(0.9, 0.9),
    lsj=True,  # instead of the sizes and crops above, so no recipe crops with crop_relative
    lsj_size=1024,
    test_short_side=800,
    clip_length=5,
    gate_weight=1.0,
)
COCO_50_EPOCHS = COCO | dict(
    iterations=368750,
    lr_steps=(327778, 355092),
    backbone_weights="detectron2://ImageNetPretrained/torchvision/R-50.pkl",
)
COCO_100_EPOCHS = COCO | dict(
    iterations=737500,
    lr_steps=(655556, 710184),
    backbone_weights="swin_large_patch4_window12_384_22k.pkl",
)


def video_data(name: str, share: float, num_classes: int, top_k: int) -> dict:
    """Pseudo videos of COCO images and the videos of a data set, mixed 1 : share."""
    return dict(
        train_sets=(f"coco2{name.replace('_', '')}_train", f"{name}_train"),
        train_ratio=(1.0, share),
        test_sets=(f"{name}_val",),
        num_classes=num_classes,
        top_k=top_k,
    )


OVIS = video_data("ovis", share=0.25, num_classes=25, top_k=20)
YTVIS_2019 = video_data("ytvis_2019", share=0.75, num_classes=40, top_k=10)
YTVIS_2021 = video_data("ytvis_2021", share=0.75, num_classes=40, top_k=10)
VITA_OVIS = VITA | OVIS | dict(iterations=150000, lr_steps=(50000, 125000), frames=6, reach=8)
VITA_2019 = VITA | YTVIS_2019 | dict(iterations=140000, lr_steps=(75000,), frames=5, reach=20)
VITA_2021 = (
    VITA
    | YTVIS_2021
    | dict(train_ratio=(1.0, 0.8), iterations=187500, lr_steps=(100000,), frames=6, reach=8)
)
GRATTVIS_OVIS = GRATTVIS | OVIS | dict(iterations=140000, lr_steps=(100000,))
GRATTVIS_2019 = GRATTVIS | YTVIS_2019 | dict(propagation="gated+memory")
GRATTVIS_2021 = (
    GRATTVIS | YTVIS_2021 | dict(propagation="gated+memory", iterations=90000, lr_steps=(50000,))
)
R50, R101, SWIN_L = (
    dict(preset=preset, test_short_side=TEST_SIDES[preset]) for preset in ("r50", "r101", "swin_l")
)

# Our name: the official name, and the values of the flags.
RECIPES = {
    "detector/coco/r50": ("vita/coco/vita_R50_bs16_50ep", R50 | COCO_50_EPOCHS),
    "detector/coco/r101": ("vita/coco/vita_R101_bs16_50ep", R101 | COCO_50_EPOCHS),
    "detector/coco/swin_l": (
        "vita/coco/vita_swin_large_IN21k_384_bs16_100ep_lsj",
        SWIN_L | COCO_100_EPOCHS,
    ),
    "vita/ytvis_2019/r50": (
        "vita/youtubevis_2019/vita_R50_bs8",
        VITA_2019 | R50 | dict(init="vita_r50_coco.pth"),
    ),
    "vita/ytvis_2019/r101": (
        "vita/youtubevis_2019/vita_R101_bs8",
        VITA_2019 | R101 | dict(init="vita_r101_coco.pth"),
    ),
    "vita/ytvis_2019/swin_l": (
        "vita/youtubevis_2019/vita_SWIN_bs8",
        VITA_2019 | SWIN_L | dict(init="vita_swin_coco.pth"),
    ),
    "vita/ytvis_2021/r50": (
        "vita/youtubevis_2021/vita_R50_bs8",
        VITA_2021 | R50 | dict(init="vita_r50_coco.pth"),
    ),
    "vita/ytvis_2021/r101": (
        "vita/youtubevis_2021/vita_R101_bs8",
        VITA_2021 | R101 | dict(init="vita_r101_coco.pth"),
    ),
    "vita/ytvis_2021/swin_l": (
        "vita/youtubevis_2021/vita_SWIN_bs8",
        VITA_2021 | SWIN_L | dict(init="vita_swin_coco.pth"),
    ),
    "vita/ovis/r50": (
        "vita/ovis/vita_R50_bs8",
        VITA_OVIS | R50 | dict(init="vita_r50_coco.pth"),
    ),
    "vita/ovis/swin_l": (
        "vita/ovis/vita_SWIN_bs8",
        VITA_OVIS | SWIN_L | dict(init="vita_swin_coco.pth"),
    ),
    "grattvis/ytvis_2019/r50": (
        "grattvis/youtubevis_2019/grattvis_R50_bs8",
        GRATTVIS_2019
        | R50
        | dict(iterations=15000, lr_steps=(10000,), init="vita_r50_ytvis2019.pth"),
    ),
    "grattvis/ytvis_2019/swin_l": (
        "grattvis/youtubevis_2019/grattvis_SWIN_bs8",
        GRATTVIS_2019
        | SWIN_L
        | dict(iterations=20000, lr_steps=(10000, 15000), init="vita_swin_ytvis2019.pth"),
    ),
    "grattvis/ytvis_2021/r50": (
        "grattvis/youtubevis_2021/grattvis_R50_bs8",
        GRATTVIS_2021 | R50 | dict(init="vita_r50_ytvis2021.pth"),
    ),
    "grattvis/ytvis_2021/swin_l": (
        "grattvis/youtubevis_2021/grattvis_SWIN_bs8",
        GRATTVIS_2021 | SWIN_L | dict(init="vita_swin_ytvis2021.pth"),
    ),
    "grattvis/ovis/r50": (
        "grattvis/ovis/grattvis_R50_bs8",
        GRATTVIS_OVIS | R50 | dict(init="vita_r50_ovis.pth"),
    ),
    "grattvis/ovis/swin_l": (
        "grattvis/ovis/grattvis_SWIN_bs8",
        GRATTVIS_OVIS | SWIN_L | dict(propagation="gated+memory", init="vita_swin_ovis.pth"),
    ),
}


# What a recipe says about its data set.
OF_THE_DATA_SET = ("train_sets", "train_ratio", "test_sets", "num_classes", "top_k", "init")


def official_defaults(stage: str, preset: str) -> dict:
    """The settings of a stage for any data set: those of COCO or OVIS; {} without official ones."""
    family = {"detector": "detector/coco", "vita": "vita/ovis"}.get(stage, "grattvis/ovis")
    if f"detector/coco/{preset}" not in RECIPES:
        return {}
    # There is no recipe of R-101 on OVIS; it differs from R-50 in the preset alone.
    _, recipe = RECIPES.get(f"{family}/{preset}") or RECIPES[f"{family}/r50"]
    kept = {name: value for name, value in recipe.items() if name not in OF_THE_DATA_SET}
    if stage == "genvis":  # has the settings of GRAtt-VIS, but no gate
        kept.pop("propagation", None)
    return kept | {"preset": preset, "test_short_side": recipe["test_short_side"]}
