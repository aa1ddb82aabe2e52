# SPDX-License-Identifier: Apache-2.0
"""Scales: the network, the images, the length of training and the number of seeds of a study in `catalogue`.

`paper` is the paper's recipe; `small` suits two CPU cores, `medium` a GPU for an afternoon.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sola_vision import config
from sola_vision.config import SolaConfig
from sola_vision.data import ImageConfig, SegmentationConfig
from sola_vision.engine import TrainConfig
from sola_vision.tasks import UPerNetConfig


@dataclass(frozen=True, kw_only=True)
class SegmentationScale:
    """The scale of a segmentation study, in place of the fields of Scale.

    what: a description for the page.
    networks: by the size of an arm; smaller scales have only one.
    pretrained: True if training starts from given weights.
    """

    what: str
    networks: Mapping[str, SolaConfig]
    head: UPerNetConfig = field(default_factory=UPerNetConfig)
    images: SegmentationConfig = field(default_factory=SegmentationConfig)
    train: TrainConfig
    pretrained: bool = False

    @property
    def size(self) -> int:
        """The side of a crop in pixels."""
        return self.images.crop


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Everything about a run that the study does not define.

    what: a description for the page.
    hierarchical, isotropic: the networks, whose schedules and bridges the study replaces.
    images: the settings of loading; None: decoded once, kept in memory, randomly cropped and flipped.
    limit: the number of training images, the same in every run; None: all.
    epochs: by kind of network; empty: those of the study.
    train: the other settings of the training.
    seeds: the number of runs per arm.
    segmentation: the scale of segmentation studies.
    """

    name: str
    what: str
    hierarchical: SolaConfig
    isotropic: SolaConfig
    images: ImageConfig | None
    limit: int | None
    epochs: Mapping[str, int] = field(default_factory=dict)
    train: TrainConfig
    seeds: int = 3
    segmentation: SegmentationScale

    @property
    def size(self) -> int:
        """The side of the images in pixels."""
        return self.hierarchical.img_size


PAPER = Scale(
    name="paper",
    what="the paper's recipe: SoLA-T, or 192 channels at patch 16 in stacks of one stage; 224 pixels, batches of 1024",
    hierarchical=config.tiny(),
    # not in the paper: width and patch of the stack, which fit its costs (docs/reconstruction.md), and T's drop path
    isotropic=SolaConfig(schedule="LLLLLL", dims=(192,), patch_size=16, drop_path_rate=0.1),
    images=ImageConfig(),
    limit=None,
    train=TrainConfig(
        batch_size=1024,
        lr=1e-3,
        min_lr=1e-5,
        warmup_epochs=20,
        weight_decay=0.05,
        clip=5.0,
        amp="bf16",
        evaluate_every=10,
    ),
    segmentation=SegmentationScale(
        what="the paper's recipe: SoLA-T, S and B under a UPerNet of 512 channels, from ImageNet weights; crops of 512 "
        "pixels, batches of 16",
        networks={"tiny": config.tiny(), "small": config.small(), "base": config.base()},
        # section 5.2; what it leaves open is as in the recipes ade20k_*
        images=SegmentationConfig(ignore=0),
        train=TrainConfig(
            steps=160_000,
            batch_size=16,
            lr=6e-5,
            weight_decay=0.01,
            schedule="poly",
            min_lr=0.0,
            warmup_steps=1500,
            clip=None,
            amp="bf16",
            evaluate_every=10,
        ),
        pretrained=True,
    ),
)

MEDIUM = Scale(
    name="medium",
    what="four stages of 48, 64, 96 and 128 channels, or stacks of 128 channels at patch 4; 32 pixels, up to 50,000 "
    "training images, 30 epochs",
    hierarchical=SolaConfig(
        schedule="LL/LL/LLSLLS/LS", dims=(48, 64, 96, 128), patch_size=1, img_size=32, drop_path_rate=0.05
    ),
    isotropic=SolaConfig(schedule="LLLLLL", dims=(128,), patch_size=4, img_size=32, drop_path_rate=0.05),
    images=None,
    limit=50_000,
    epochs={"hierarchical": 30, "isotropic": 30},
    train=TrainConfig(
        batch_size=128, lr=2e-3, min_lr=1e-5, warmup_epochs=2, weight_decay=0.05, amp="bf16", evaluate_every=1000
    ),
    seeds=5,
    # the recipe few_masks
    segmentation=SegmentationScale(
        what="sola_nano under a UPerNet of 128 channels, from scratch; crops of 288 pixels from images of 360, 1,800 "
        "steps",
        networks={"tiny": config.nano(drop_path_rate=0.05)},
        head=UPerNetConfig(channels=128, auxiliary_channels=64),
        images=SegmentationConfig(size=360, crop=288),
        train=TrainConfig(
            steps=1800,
            batch_size=8,
            lr=1e-3,
            weight_decay=0.05,
            schedule="poly",
            min_lr=0.0,
            warmup_steps=100,
            amp="bf16",
            evaluate_every=1000,
        ),
    ),
)

# stem patch 1, so that stage 3 has 8 x 8 tokens; a run takes minutes on one core
SMALL = Scale(
    name="small",
    what="four stages of 16, 32, 64 and 96 channels, or stacks of 64 channels at patch 4; 32 pixels, up to 20,000 "
    "training images, 2 or 3 epochs",
    hierarchical=SolaConfig(schedule="LL/LL/LLSLLS/LS", dims=(16, 32, 64, 96), patch_size=1, img_size=32, head_dim=16),
    isotropic=SolaConfig(schedule="LLLLLL", dims=(64,), patch_size=4, img_size=32, head_dim=16),
    images=None,
    limit=20_000,
    epochs={"hierarchical": 2, "isotropic": 3},
    train=TrainConfig(
        batch_size=32,
        lr=1.5e-3,
        min_lr=1e-5,
        warmup_epochs=0.2,
        weight_decay=0.05,
        workers=0,
        evaluate_every=1000,
        save_seconds=120,
        log_every=100,
    ),
    segmentation=SegmentationScale(
        what="four stages of 32, 48, 64 and 96 channels under a UPerNet of 32 channels, from scratch; crops of 128 "
        "pixels from images of 128, 800 steps",
        networks={"tiny": config.nano(dims=(32, 48, 64, 96))},
        head=UPerNetConfig(channels=32, auxiliary_channels=32),
        # crops cover about the whole image; smaller ones would need longer training
        images=SegmentationConfig(size=128, crop=128, scale=(0.75, 1.5)),
        train=TrainConfig(
            steps=800,
            batch_size=8,
            lr=2e-3,
            weight_decay=0.05,
            schedule="poly",
            min_lr=0.0,
            warmup_steps=50,
            workers=0,
            evaluate_every=1000,
            save_seconds=120,
            log_every=20,
        ),
    ),
)

SCALES = {scale.name: scale for scale in (SMALL, MEDIUM, PAPER)}
