# SPDX-License-Identifier: Apache-2.0
"""Image settings of classification, and the transforms of training and evaluation.

The defaults are Swin's, which the paper trains with: random resized crop, flip, RandAugment, random erasing, and
Mixup, CutMix and label smoothing on the batch, all from timm. Images of up to 32 pixels are treated as in Swin: a
padded random crop of the whole image in training, no crop in evaluation.
"""

from dataclasses import dataclass

from PIL import Image
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import transforms

from .images import check_normalisation

_SMALL = 32  # Swin's data/build.py: resize_im = IMG_SIZE > 32
_PADDING = 4
_LONGEST = 8  # maximum aspect ratio; longer images are cropped before they are resized


@dataclass(kw_only=True)
class ImageConfig:
    """Size, crop and augmentation; mixup, cutmix, mixup_prob and smoothing are applied to whole batches in training.

    Args:
        size: side in pixels of training crops and of evaluation.
        crop_pct: fraction of the shorter side that evaluation uses; null = 0.875, and 1 up to 32 pixels.
        interpolation: method of resizing: bicubic, bilinear, lanczos or, in training, random.
        mean: subtracted from pixels in 0..1.
        std: divisor of the pixels after that.
        scale: smallest and largest area of a training crop, as fractions of the image; null = 0.08 and 1, and up to 32
            pixels a padded crop of the whole image.
        ratio: smallest and largest aspect ratio, width / height, of a training crop.
        hflip: probability that a training image is flipped horizontally.
        color_jitter: strength of changes of brightness, contrast and saturation; no effect with auto_augment, as in
            timm and Swin.
        auto_augment: a policy of timm, such as Swin's rand-m9-mstd0.5-inc1; null = none.
        erasing: probability that a rectangle of a training image is erased.
        mixup: alpha of Mixup, which blends two images; 0 = off.
        cutmix: alpha of CutMix, which pastes a part of one image into another; 0 = off.
        mixup_prob: probability that a batch is mixed.
        smoothing: label smoothing, the share of the target that is spread over all classes.
    """

    size: int = 224
    crop_pct: float | None = None
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    color_jitter: float = 0.4
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_prob: float = 1.0
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size} must be at least 1 pixel; 224 is usual")
        if self.interpolation not in ("bicubic", "bilinear", "lanczos", "random"):
            raise ValueError(f"interpolation={self.interpolation!r} must be bicubic, bilinear, lanczos or random")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct={self.crop_pct} must be above 0 and at most 1")
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale={self.scale} must be two fractions of the area, 0 < smallest <= largest <= 1")
        check_normalisation(self.mean, self.std)
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio={self.ratio} must be two ratios width / height, 0 < smallest <= largest")
        for name in ("hflip", "erasing", "mixup_prob", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a probability from 0 to 1")
        for name in ("color_jitter", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 (off) or above")

    @property
    def evaluated_part(self) -> float:
        """crop_pct, or its default for the size."""
        return self.crop_pct or (1.0 if self.size <= _SMALL else 0.875)


class TrainTransform:
    """PIL image -> randomly augmented, normalised tensor [3, size, size]."""

    def __init__(self, config: ImageConfig) -> None:
        self.pipeline = create_transform(
            config.size,
            is_training=True,
            scale=config.scale,
            ratio=config.ratio,
            hflip=config.hflip,
            color_jitter=config.color_jitter or None,
            auto_augment=config.auto_augment,
            interpolation=config.interpolation,
            mean=config.mean,
            std=config.std,
            re_prob=config.erasing,
            re_mode="pixel",
            re_count=1,
        )
        if config.size <= _SMALL and config.scale is None:
            # Swin crops here without resizing; the resize allows images of other sizes, such as 8x8 digits
            self.pipeline.transforms[0] = transforms.Compose(
                [
                    transforms.Resize((config.size, config.size), _mode(config.interpolation)),
                    transforms.RandomCrop(config.size, padding=_PADDING),
                ]
            )

    def __call__(self, image: Image.Image) -> Tensor:
        return self.pipeline(image.convert("RGB"))

    def __repr__(self) -> str:
        return f"TrainTransform({self.pipeline})"


class EvalTransform:
    """PIL image -> normalised tensor [3, size, size]: shorter side resized to size / crop_pct, then a centre crop."""

    def __init__(self, config: ImageConfig) -> None:
        self.pipeline = create_transform(
            config.size,
            is_training=False,
            crop_pct=config.evaluated_part,
            interpolation="bilinear" if config.interpolation == "random" else config.interpolation,
            mean=config.mean,
            std=config.std,
        )

    def __call__(self, image: Image.Image) -> Tensor:
        return self.pipeline(_without_far_ends(image.convert("RGB")))

    def __repr__(self) -> str:
        return f"EvalTransform({self.pipeline})"


def _mode(interpolation: str) -> transforms.InterpolationMode:
    if interpolation == "random":
        return transforms.InterpolationMode.BICUBIC
    return transforms.InterpolationMode(interpolation)


def _without_far_ends(image: Image.Image) -> Image.Image:
    """Crop a very elongated image first: one of 1x10,000 would grow to gigabytes before its centre is cropped."""
    width, height = image.size
    longest = _LONGEST * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, min(width, left + longest), min(height, top + longest)))
