# SPDX-License-Identifier: Apache-2.0
"""Segmentation: the paper's training on ADE20K, and a recipe for small datasets."""

from dataclasses import dataclass, field
from typing import ClassVar

from sola_vision.data import SegmentationConfig
from sola_vision.engine import TrainConfig
from sola_vision.tasks import ModelConfig, UPerNetConfig


@dataclass(kw_only=True)
class SegmentationRecipe:
    """The whole configuration of a segmentation run, except its data and its output folder."""

    task: ClassVar[str] = "segmentation"
    data: ClassVar[str] = "a folder with images/SPLIT and annotations/SPLIT, SPLIT training and validation"
    model: ModelConfig = field(default_factory=ModelConfig)
    segmenter: UPerNetConfig = field(default_factory=UPerNetConfig)
    image: SegmentationConfig = field(default_factory=SegmentationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    init: str | None = None  # checkpoint of a classifier (initialises the backbone) or of a segmenter (everything)


def _ade20k(name: str, drop_path_rate: float) -> SegmentationRecipe:
    """Section 5.2: UPerNet, AdamW, 6e-5, weight decay 0.01, batch 16, crop 512, 160,000 iterations, from ImageNet
    weights. Without bridges, as in Table 5; for the other rows of Table 8 add --model.bridges paper.
    """
    return SegmentationRecipe(
        # not in the paper: stochastic depth, here as strong as on ImageNet
        model=ModelConfig(name=name, bridges="", drop_path_rate=drop_path_rate),
        # the defaults are mmsegmentation's for this data; label 0 is "other", the 150 classes are 1..150
        image=SegmentationConfig(ignore=0, num_classes=150),
        train=TrainConfig(
            steps=160_000,
            batch_size=16,
            lr=6e-5,
            weight_decay=0.01,
            # not in the paper: poly with a warm-up of 1500 steps and no clipping, which Swin's numbers come from
            schedule="poly",
            min_lr=0.0,
            warmup_steps=1500,
            clip=None,
            # not in the paper: bfloat16, which needs no loss scaling
            amp="bf16",
            evaluate_every=10,  # an epoch has 1263 steps
        ),
    )


def ade20k_tiny() -> SegmentationRecipe:
    """SoLA-T with UPerNet on ADE20K, Tables 5 and 8.

    Command: torchrun --nproc-per-node 8 -m sola_vision train ade20k_tiny --data ADEChallengeData2016
        --init runs/imagenet_tiny --segmenter.drop_bridges true
    Expected: 44.7 mIoU in the paper, 45.0 with bridges; not yet run with this code.
    Cost: 160,000 steps of 16 crops at 10.8 GMACs each in the backbone.
    """
    return _ade20k("sola_tiny", 0.1)


def ade20k_small() -> SegmentationRecipe:
    """SoLA-S with UPerNet on ADE20K, Tables 5 and 8.

    Command: torchrun --nproc-per-node 8 -m sola_vision train ade20k_small --data ADEChallengeData2016
        --init runs/imagenet_small --segmenter.drop_bridges true
    Expected: 48.1 mIoU in the paper, 48.6 with bridges; not yet run with this code.
    Cost: 160,000 steps of 16 crops at 27.2 GMACs each in the backbone.
    """
    return _ade20k("sola_small", 0.2)


def ade20k_base() -> SegmentationRecipe:
    """SoLA-B with UPerNet on ADE20K, Tables 5 and 8.

    Command: torchrun --nproc-per-node 8 -m sola_vision train ade20k_base --data ADEChallengeData2016
        --init runs/imagenet_base --segmenter.drop_bridges true
    Expected: 50.5 mIoU in the paper, 51.4 with bridges; not yet run with this code.
    Cost: 160,000 steps of 16 crops at 84.9 GMACs each in the backbone.
    """
    return _ade20k("sola_base", 0.5)


def few_masks() -> SegmentationRecipe:
    """SoLA-nano with a narrow UPerNet, from scratch on a folder of dozens to hundreds of labelled images.

    Command: sola train few_masks --data FOLDER
    Expected: see docs/results.md; not in the paper.
    Cost: an hour and a half on one core.
    """
    return SegmentationRecipe(
        model=ModelConfig(name="sola_nano", drop_path_rate=0.05),
        segmenter=UPerNetConfig(channels=128, auxiliary_channels=64),
        image=SegmentationConfig(size=360, crop=288),
        train=TrainConfig(
            steps=1800,
            batch_size=8,
            lr=1e-3,
            min_lr=0.0,
            schedule="poly",
            warmup_steps=100,
            weight_decay=0.05,
            amp="bf16",
            evaluate_every=20,
            log_every=20,
            workers=1,
        ),
    )
