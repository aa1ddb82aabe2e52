# SPDX-License-Identifier: Apache-2.0
"""The runs: one function each, whose docstring says source, command, expected result and cost.

A recipe is a whole configuration; `sola train NAME --data FOLDER` runs it, any field can be given beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from sola_vision.data import DetectionConfig, ImageConfig, SegmentationConfig
from sola_vision.engine import TrainConfig
from sola_vision.tasks import DetectorConfig, ModelConfig, UPerNetConfig


@dataclass(kw_only=True)
class Recipe:
    """Everything that a classification run is, apart from its data and its folder.

    Every task has a class of recipes: its fields that are dataclasses are the sections of options on the command line.
    """

    task: ClassVar[str] = "classification"
    data: ClassVar[str] = "a folder with train/CLASS/ and val/CLASS/ images, a .tar of it, or the word digits"
    model: ModelConfig = field(default_factory=ModelConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    init: str | None = None  # checkpoint whose weights the network starts from; its head is replaced if classes differ


@dataclass(kw_only=True)
class DetectionRecipe:
    """Everything that a detection run is, apart from its data and its folder; with masks if the data has them."""

    task: ClassVar[str] = "detection"
    data: ClassVar[str] = "a folder with annotations/instances_SPLIT.json and images in SPLIT/, SPLIT train and val"
    model: ModelConfig = field(default_factory=ModelConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    image: DetectionConfig = field(default_factory=DetectionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    init: str | None = None  # a classifier's checkpoint for the backbone, or a detector's for everything


@dataclass(kw_only=True)
class SegmentationRecipe:
    """Everything that a segmentation run is, apart from its data and its folder."""

    task: ClassVar[str] = "segmentation"
    data: ClassVar[str] = "a folder with images/SPLIT and annotations/SPLIT, SPLIT training and validation"
    model: ModelConfig = field(default_factory=ModelConfig)
    segmenter: UPerNetConfig = field(default_factory=UPerNetConfig)
    image: SegmentationConfig = field(default_factory=SegmentationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    init: str | None = None  # a classifier's checkpoint for the backbone, or a segmentation one for everything


def _imagenet(name: str, drop_path_rate: float) -> Recipe:
    """Section 5.1: "the training strategy and data augmentation of Swin", batch 1024, AdamW, 1e-3, cosine to 1e-5, 300
    epochs. With bridges: Table 3's 79.8 for T is Table 6's 79.83, "SoLA Pattern + HSB".
    """
    return Recipe(
        model=ModelConfig(name=name, bridges="paper", drop_path_rate=drop_path_rate),
        image=ImageConfig(),  # the defaults are Swin's
        train=TrainConfig(
            epochs=300,
            batch_size=1024,
            lr=1e-3,
            min_lr=1e-5,
            warmup_epochs=20,
            weight_decay=0.05,
            clip=5.0,
            # not in the paper: bfloat16, which needs no loss scaling; Swin used float16
            amp="bf16",
        ),
    )


def imagenet_tiny() -> Recipe:
    """SoLA-T on ImageNet-1K, Table 3.

    Command: torchrun --nproc-per-node 8 -m sola_vision train imagenet_tiny --data IMAGENET
    Expected: 79.8 % top-1 is the paper's; not yet run with this code.
    Cost: 300 epochs of 1.28 million images at 1.9 GMACs each.
    """
    return _imagenet("sola_tiny", 0.1)


def imagenet_small() -> Recipe:
    """SoLA-S on ImageNet-1K, Table 3.

    Command: torchrun --nproc-per-node 8 -m sola_vision train imagenet_small --data IMAGENET
    Expected: 82.9 % top-1 is the paper's; not yet run with this code.
    Cost: 300 epochs of 1.28 million images at 4.9 GMACs each.
    """
    return _imagenet("sola_small", 0.2)


def imagenet_base() -> Recipe:
    """SoLA-B on ImageNet-1K, Table 3.

    Command: torchrun --nproc-per-node 8 -m sola_vision train imagenet_base --data IMAGENET
    Expected: 84.1 % top-1 is the paper's; not yet run with this code.
    Cost: 300 epochs of 1.28 million images at 15.4 GMACs each.
    """
    return _imagenet("sola_base", 0.5)


def digits() -> Recipe:
    """SoLA-nano on scikit-learn's 8x8 digits, for a first look; not in the paper.

    Command: sola train digits
    Expected: 99 % top-1 on the held-out fifth (docs/results.md).
    Cost: under two minutes on two cores.
    """
    return Recipe(
        model=ModelConfig(name="sola_nano", drop_path_rate=0.0),
        image=ImageConfig(
            size=32,
            scale=(0.6, 1.0),
            ratio=(0.8, 1.25),
            # a mirrored digit is another sign or none; strong augmentation would hide 8x8 pixels
            hflip=0.0,
            auto_augment=None,
            color_jitter=0.0,
            erasing=0.0,
            mixup=0.2,
            cutmix=0.0,
        ),
        train=TrainConfig(
            epochs=25,
            batch_size=64,
            lr=2e-3,
            warmup_epochs=2,
            weight_decay=0.05,
            workers=0,
            log_every=11,
            evaluate_every=5,
        ),
    )


def cifar10() -> Recipe:
    """SoLA-nano on 32-pixel images such as CIFAR-10's; not in the paper.

    Command: sola train cifar10 --data cifar10.tar
    Expected: see docs/results.md.
    Cost: minutes an epoch of 50,000 images on two cores.
    """
    return Recipe(
        model=ModelConfig(name="sola_nano", patch_size=2, drop_path_rate=0.05),
        image=ImageConfig(size=32, mixup=0.2, mixup_prob=0.5, erasing=0.1, auto_augment="rand-m7-mstd0.5-inc1"),
        train=TrainConfig(epochs=60, batch_size=128, lr=2e-3, warmup_epochs=3, weight_decay=0.05),
    )


def few_images() -> Recipe:
    """SoLA-nano from scratch on your own folder of some hundreds to thousands of photographs; not in the paper.

    Command: sola train few_images --data FOLDER
    Expected: 83 % top-1 on caltech16's 16 classes with 512 training images (docs/results.md).
    Cost: under 20 minutes on two cores for 512 images.
    """
    return Recipe(
        model=ModelConfig(name="sola_nano", drop_path_rate=0.05),
        image=ImageConfig(
            size=128,
            scale=(0.35, 1.0),
            auto_augment="rand-m6-mstd0.5-inc1",
            erasing=0.1,
            mixup=0.2,
            cutmix=1.0,
            mixup_prob=0.5,
        ),
        train=TrainConfig(
            epochs=120,
            batch_size=32,
            lr=1.5e-3,
            warmup_epochs=8,
            weight_decay=0.05,
            amp="bf16",
            evaluate_every=10,
            log_every=16,
            workers=2,
        ),
    )


def _coco(name: str, drop_path_rate: float, checkpointing: bool = False) -> DetectionRecipe:
    """Section 5.2: Mask R-CNN, 1x schedule, AdamW 1e-4, weight decay 0.05, batch 16, from ImageNet, at 1333x800.

    Table 4 is without bridges, as its parameters and FLOPs say.
    """
    return DetectionRecipe(
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
            amp="bf16",
        ),
    )


def coco_tiny() -> DetectionRecipe:
    """SoLA-T in Mask R-CNN on COCO 2017, Table 4.

    Command: torchrun --nproc-per-node 8 -m sola_vision train coco_tiny --data COCO --init IMAGENET_RUN
        --detector.drop_bridges true
    Expected: 43.8 box AP and 40.0 mask AP are the paper's; not yet run with this code.
    Cost: 12 epochs of 117,266 images at 55 GMACs each in the backbone.
    """
    return _coco("sola_tiny", 0.1)


def coco_small() -> DetectionRecipe:
    """SoLA-S in Mask R-CNN on COCO 2017, Table 4.

    Command: torchrun --nproc-per-node 8 -m sola_vision train coco_small --data COCO --init IMAGENET_RUN
        --detector.drop_bridges true
    Expected: 46.6 box AP and 42.0 mask AP are the paper's; not yet run with this code.
    Cost: 12 epochs of 117,266 images at 133 GMACs each in the backbone.
    """
    return _coco("sola_small", 0.2)


def coco_base() -> DetectionRecipe:
    """SoLA-B in Mask R-CNN on COCO 2017, Table 4.

    Command: torchrun --nproc-per-node 8 -m sola_vision train coco_base --data COCO --init IMAGENET_RUN
        --detector.drop_bridges true
    Expected: 47.5 box AP and 42.3 mask AP are the paper's; not yet run with this code.
    Cost: 12 epochs of 117,266 images at 418 GMACs each in the backbone.
    """
    # not in the paper: less stochastic depth than on ImageNet in so few epochs
    return _coco("sola_base", 0.3, checkpointing=True)


def few_objects() -> DetectionRecipe:
    """SoLA-nano in a small Mask R-CNN from scratch on your own folder in COCO's format; not in the paper.

    Command: sola train few_objects --data FOLDER
    Expected: see docs/results.md.
    Cost: within an hour on two cores for some hundreds of images.
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


def _ade20k(name: str, drop_path_rate: float) -> SegmentationRecipe:
    """Section 5.2: UPerNet, AdamW, 6e-5, weight decay 0.01, batch 16, crop 512, 160,000 iterations, from ImageNet
    weights. Without bridges, as Table 5; Table 8's other rows are --model.bridges paper.
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
    Expected: 44.7 mIoU is the paper's, 45.0 with bridges; not yet run with this code.
    Cost: 160,000 steps of 16 crops at 10.9 GMACs each in the backbone.
    """
    return _ade20k("sola_tiny", 0.1)


def ade20k_small() -> SegmentationRecipe:
    """SoLA-S with UPerNet on ADE20K, Tables 5 and 8.

    Command: torchrun --nproc-per-node 8 -m sola_vision train ade20k_small --data ADEChallengeData2016
        --init runs/imagenet_small --segmenter.drop_bridges true
    Expected: 48.1 mIoU is the paper's, 48.6 with bridges; not yet run with this code.
    Cost: 160,000 steps of 16 crops at 27.2 GMACs each in the backbone.
    """
    return _ade20k("sola_small", 0.2)


def ade20k_base() -> SegmentationRecipe:
    """SoLA-B with UPerNet on ADE20K, Tables 5 and 8.

    Command: torchrun --nproc-per-node 8 -m sola_vision train ade20k_base --data ADEChallengeData2016
        --init runs/imagenet_base --segmenter.drop_bridges true
    Expected: 50.5 mIoU is the paper's, 51.4 with bridges; not yet run with this code.
    Cost: 160,000 steps of 16 crops at 89.0 GMACs each in the backbone.
    """
    return _ade20k("sola_base", 0.5)


def few_masks() -> SegmentationRecipe:
    """SoLA-nano with a narrow UPerNet, from scratch on your own folder of some dozens to hundreds of labelled images.

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


AnyRecipe = Recipe | DetectionRecipe | SegmentationRecipe

RECIPES: dict[str, Callable[[], AnyRecipe]] = {
    recipe.__name__: recipe
    for recipe in (
        *(imagenet_tiny, imagenet_small, imagenet_base, digits, cifar10, few_images),
        *(coco_tiny, coco_small, coco_base, few_objects),
        *(ade20k_tiny, ade20k_small, ade20k_base, few_masks),
    )
}


def get_recipe(name: str) -> AnyRecipe:
    """A recipe by name; ValueError lists the names if there is none."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is unknown; the recipes are {', '.join(RECIPES)}")
    return RECIPES[name]()
