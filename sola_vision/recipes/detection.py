# SPDX-License-Identifier: Apache-2.0
"""Detection: the paper's training on COCO, and a recipe for small datasets."""

from dataclasses import dataclass, field
from typing import ClassVar

from sola_vision.data import DetectionConfig
from sola_vision.engine import TrainConfig
from sola_vision.tasks import DetectorConfig, ModelConfig


@dataclass(kw_only=True)
class DetectionRecipe:
    """The whole configuration of a detection run, except its data and its output folder.

    Masks are predicted if the data has them.
    """

    task: ClassVar[str] = "detection"
    data: ClassVar[str] = "a folder with annotations/instances_SPLIT.json and images in SPLIT/, SPLIT train and val"
    model: ModelConfig = field(default_factory=ModelConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    image: DetectionConfig = field(default_factory=DetectionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    init: str | None = None  # checkpoint of a classifier (initialises the backbone) or of a detector (everything)


def _coco(name: str, drop_path_rate: float, checkpointing: bool = False) -> DetectionRecipe:
    """Section 5.2: Mask R-CNN, 1x schedule, AdamW 1e-4, weight decay 0.05, batch 16, from ImageNet, at 1333x800.

    Without bridges, as in Table 4 (section 8.1).
    """
    return DetectionRecipe(
        # not in the paper: stochastic depth, for tiny and small as strong as on ImageNet
        model=ModelConfig(name=name, bridges="", drop_path_rate=drop_path_rate),
        detector=DetectorConfig(checkpointing=checkpointing),
        image=DetectionConfig(keep_empty=False),  # the defaults are 800/1333 and a flip
        train=TrainConfig(
            epochs=12,
            batch_size=16,
            lr=1e-4,
            weight_decay=0.05,
            schedule="multistep",
            milestones=(8, 11),
            # not in the paper: Swin's detectors warm up over 500 steps and do not clip
            warmup_steps=500,
            warmup_lr=1e-7,
            clip=None,
            # not in the paper: bfloat16, which needs no loss scaling
            amp="bf16",
        ),
    )


def coco_tiny() -> DetectionRecipe:
    """SoLA-T in Mask R-CNN on COCO 2017, Table 4.

    Command: torchrun --nproc-per-node 8 -m sola_vision train coco_tiny --data COCO --init IMAGENET_RUN
        --detector.drop_bridges true
    Expected: 43.8 box AP and 40.0 mask AP in the paper; not yet run with this code.
    Cost: 12 epochs of 117,266 images at 55 GMACs each in the backbone.
    """
    return _coco("sola_tiny", 0.1)


def coco_small() -> DetectionRecipe:
    """SoLA-S in Mask R-CNN on COCO 2017, Table 4.

    Command: torchrun --nproc-per-node 8 -m sola_vision train coco_small --data COCO --init IMAGENET_RUN
        --detector.drop_bridges true
    Expected: 46.6 box AP and 42.0 mask AP in the paper; not yet run with this code.
    Cost: 12 epochs of 117,266 images at 133 GMACs each in the backbone.
    """
    return _coco("sola_small", 0.2)


def coco_base() -> DetectionRecipe:
    """SoLA-B in Mask R-CNN on COCO 2017, Table 4.

    Command: torchrun --nproc-per-node 8 -m sola_vision train coco_base --data COCO --init IMAGENET_RUN
        --detector.drop_bridges true
    Expected: 47.5 box AP and 42.3 mask AP in the paper; not yet run with this code.
    Cost: 12 epochs of 117,266 images at 418 GMACs each in the backbone.
    """
    # not in the paper: less stochastic depth than on ImageNet, because training is so short
    return _coco("sola_base", 0.3, checkpointing=True)


def few_objects() -> DetectionRecipe:
    """SoLA-nano in a small Mask R-CNN, from scratch on a folder in COCO's format; not in the paper.

    Command: sola train few_objects --data FOLDER
    Expected: see docs/results.md.
    Cost: within an hour on two cores for a few hundred images.
    """
    return DetectionRecipe(
        model=ModelConfig(name="sola_nano", drop_path_rate=0.0),
        detector=DetectorConfig(
            channels=64, box_channels=256, group_norm=True, anchor_scale=4.0, proposals=500, samples=128
        ),
        image=DetectionConfig(size=320, longest=480, crop=320, scale=(0.8, 1.25), color_jitter=0.3),
        train=TrainConfig(
            epochs=100,
            batch_size=4,
            lr=1e-3,
            warmup_epochs=2,
            weight_decay=0.05,
            clip=5.0,
            evaluate_every=10,
            log_every=20,
            workers=1,
        ),
    )
