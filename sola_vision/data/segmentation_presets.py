# SPDX-License-Identifier: Apache-2.0
"""Image settings of segmentation, and the transforms of training and evaluation.

# not in the paper: the augmentation. The defaults are mmsegmentation's for ADE20K, with which UPerNet results are
# usually obtained: shorter side 512 times 0.5 to 2, a crop of 512 in which no class has more than three quarters of the
# pixels, flip, photometric distortion, padding that is ignored.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms.functional import normalize, pil_to_tensor

from .images import check_normalisation
from .labels import IGNORED

_LONGEST = 4  # maximum aspect ratio at full size, mmsegmentation's 2048 x 512; longer images get a smaller shorter side
_TRIES = 10  # maximum number of random crops tried to get one with several classes


@dataclass(kw_only=True)
class SegmentationConfig:
    """Labels, sizes, augmentation and inference.

    Args:
        ignore: the label that is not evaluated; 0 = ADE20K's rule (classes are the labels 1..N), with any other
            label 0 is a class (classes are 0..N-1).
        num_classes: number of classes of the data; null = the number of names in its classes.txt or objectInfo150.
        size: pixels that the shorter side is first resized to, also in evaluation; null = the original size.
        crop: side in pixels of the training crops.
        scale: smallest and largest random factor on the size in training.
        cat_max_ratio: maximum share of a crop that one class should fill; a few random crops are tried.
        hflip: probability that a training image is flipped horizontally.
        distort: probability of each photometric change: brightness, contrast, saturation, hue.
        slide: side in pixels of the windows of sliding-window inference; null = the whole image at once.
        stride: distance in pixels between these windows; null = two thirds of their side.
        mean: subtracted from pixels in 0..1.
        std: divisor of the pixels after that.
    """

    ignore: int = 255
    num_classes: int | None = None
    size: int | None = 512
    crop: int = 512
    scale: tuple[float, float] = (0.5, 2.0)
    cat_max_ratio: float = 0.75
    hflip: float = 0.5
    distort: float = 0.5
    slide: int | None = None
    stride: int | None = None
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD

    def __post_init__(self) -> None:
        for name in ("num_classes", "size", "crop", "slide", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.ignore < 0:
            raise ValueError(f"ignore={self.ignore} must be a label, 0 or above; 255 is usual")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale={self.scale} must be two factors, 0 < smallest <= largest")
        for name in ("cat_max_ratio", "hflip", "distort"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 1")
        if self.stride is not None and (self.slide is None or self.stride > self.slide):
            raise ValueError(f"stride={self.stride} must be at most slide={self.slide}, or pixels are skipped")
        check_normalisation(self.mean, self.std)


class SegmentationTrainTransform:
    """(image, classes [H, W]) -> a normalised crop [3, crop, crop] and its classes [crop, crop]."""

    def __init__(self, config: SegmentationConfig) -> None:
        self.config = config

    def __call__(self, image: Image.Image, classes: NDArray[np.int16]) -> tuple[Tensor, Tensor]:
        config = self.config
        factor = _uniform(*config.scale)
        height, width = _resized_size(image.height, image.width, config.size, factor)
        scaled = _nearest(classes, height, width)
        top, left, bottom, right = self._window(scaled)
        # only the crop is resized, which is a small part of the image at a factor of 2
        per_x, per_y = image.width / width, image.height / height
        box = (left * per_x, top * per_y, right * per_x, bottom * per_y)
        crop = image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=box)
        labels = scaled[top:bottom, left:right]
        pixels = pil_to_tensor(self._distorted(crop))
        if torch.rand(()) < config.hflip:
            pixels, labels = pixels.flip(-1), labels[:, ::-1]
        padding = (0, config.crop - labels.shape[1], 0, config.crop - labels.shape[0])
        # after normalisation, zero is the mean colour
        images = torch.nn.functional.pad(normalise(pixels, config), padding)
        return images, torch.nn.functional.pad(torch.from_numpy(labels.copy()), padding, value=IGNORED)

    def _distorted(self, image: Image.Image) -> Image.Image:
        """Apply mmsegmentation's PhotoMetricDistortion, in 8 bits."""
        brightness, contrast, saturation, hue = (bool(torch.rand(()) < self.config.distort) for _ in range(4))
        contrast_first = bool(torch.rand(()) < 0.5)
        values = np.arange(256)
        if brightness:
            image = image.point(_table(values + _uniform(-32, 32)) * 3)
        by_contrast = _table(values * _uniform(0.5, 1.5)) * 3
        if contrast and contrast_first:
            image = image.point(by_contrast)
        if saturation or hue:
            hues = _table((values + round(_uniform(-18, 18) / 180 * 256) * hue) % 256)
            saturations = _table(values * (_uniform(0.5, 1.5) if saturation else 1.0))
            image = image.convert("HSV").point(hues + saturations + _table(values)).convert("RGB")
        if contrast and not contrast_first:
            image = image.point(by_contrast)
        return image

    def _window(self, classes: NDArray[np.int16]) -> tuple[int, int, int, int]:
        """Return top, left, bottom, right of a crop; retry a few times if a class exceeds cat_max_ratio."""
        crop = self.config.crop
        height, width = classes.shape
        for _ in range(_TRIES if self.config.cat_max_ratio < 1 else 1):
            top = int(torch.randint(max(0, height - crop) + 1, ()))
            left = int(torch.randint(max(0, width - crop) + 1, ()))
            window = (top, left, min(height, top + crop), min(width, left + crop))
            counts = np.bincount(classes[top : window[2], left : window[3]].ravel() + 1)[1:]
            # mmsegmentation's condition; it never holds for an image of a single class
            if np.count_nonzero(counts) > 1 and counts.max() < self.config.cat_max_ratio * counts.sum():
                break
        return window


class SegmentationEvalTransform:
    """(image, classes) -> the normalised image, resized for evaluation, and the unchanged classes."""

    def __init__(self, config: SegmentationConfig) -> None:
        self.config = config

    def __call__(self, image: Image.Image, classes: NDArray[np.int16]) -> tuple[Tensor, Tensor]:
        return self.image(image), torch.from_numpy(classes)

    def image(self, image: Image.Image) -> Tensor:
        """Return an image as the network's input [3, H, W]."""
        height, width = _resized_size(image.height, image.width, self.config.size, 1.0)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return normalise(pil_to_tensor(image), self.config)


def normalise(pixels: Tensor, config: SegmentationConfig) -> Tensor:
    """Return 8-bit pixels [3, H, W] as normalised floats, the network's input."""
    return normalize(pixels.float() / 255, list(config.mean), list(config.std))


def _uniform(low: float, high: float) -> float:
    return float(torch.empty(()).uniform_(low, high))


def _table(values: NDArray[np.number]) -> list[int]:
    """Return a lookup table of 256 levels in the form Pillow expects."""
    return values.round().clip(0, 255).astype(int).tolist()


def _resized_size(height: int, width: int, size: int | None, factor: float) -> tuple[int, int]:
    shorter, longer = min(height, width), max(height, width)
    by = 1.0 if size is None else min(size / shorter, _LONGEST * size / longer)
    return max(1, round(height * by * factor)), max(1, round(width * by * factor))


def _nearest(classes: NDArray[np.int16], height: int, width: int) -> NDArray[np.int16]:
    """Return classes resized by nearest neighbour, sampled at the centres of the new pixels."""
    rows = ((np.arange(height) + 0.5) * (classes.shape[0] / height)).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * (classes.shape[1] / width)).astype(np.int64)
    return classes[rows][:, columns]
