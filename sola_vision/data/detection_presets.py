# SPDX-License-Identifier: Apache-2.0
"""Image settings of detection, and the transforms of training and evaluation. Batches are lists of images of any size.

# not in the paper: the augmentation. The paper only says "1x schedule"; the defaults are MMDetection's for Mask R-CNN:
# the shorter side resized to 800 pixels, the longer one to 1333 at most, mirrored with probability 0.5.

Training images are resized here, in the workers. Evaluation images are returned whole and resized by the network, so
that its boxes are in the pixels of the original.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import transforms

from .coco import Objects
from .images import check_normalisation

Target = dict[str, Any]


@dataclass(kw_only=True)
class DetectionConfig:
    """Sizes and augmentation of detection.

    Args:
        size: pixels of the shorter side after resizing; null = the original size times zoom.
        longest: maximum pixels of the longer side.
        zoom: factor on the original size if size is null, for small objects.
        crop: side in pixels of random training crops; null = whole images.
        scale: smallest and largest random factor on the size of a training image.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip, for images without a fixed orientation.
        color_jitter: strength of random changes of brightness, contrast and saturation.
        mean: mean of each channel, for pixels from 0 to 1.
        std: standard deviation of each channel, for pixels from 0 to 1.
        masks: null = learn masks if the data has them; false = boxes only.
        keep_empty: train on images without objects.
    """

    size: int | None = 800
    longest: int = 1333
    zoom: float = 1.0
    crop: int | None = None
    scale: tuple[float, float] = (1.0, 1.0)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    masks: bool | None = None
    keep_empty: bool = True

    def __post_init__(self) -> None:
        for name in ("size", "longest", "crop"):
            value = getattr(self, name)
            if value is not None and value < 32:
                raise ValueError(f"{name}={value} must be at least 32 pixels, or the last feature map would be empty")
        if self.size is not None and self.zoom != 1:
            raise ValueError(f"zoom={self.zoom} only applies to images of original size: set size to null")
        if not self.zoom > 0 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"zoom={self.zoom} and scale={self.scale} must be above 0, the smallest scale first")
        check_normalisation(self.mean, self.std)
        for name in ("hflip", "vflip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a probability from 0 to 1")
        if self.color_jitter < 0:
            raise ValueError(f"color_jitter={self.color_jitter} must be 0 (off) or above")

    def resized(self, height: int, width: int, factor: float = 1.0) -> tuple[int, int]:
        """Return height and width after resizing an image, before any crop."""
        scale = self.zoom if self.size is None else self.size / min(height, width)
        scale = factor * min(scale, self.longest / max(height, width))
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


class DetectionTrainTransform:
    """(image, objects) -> (uint8 [3, h, w], {"boxes", "labels", "masks" if used, "image_id"})."""

    def __init__(self, config: DetectionConfig) -> None:
        self.config = config
        strength = config.color_jitter
        self.jitter = transforms.ColorJitter(strength, strength, strength) if strength else None

    def __call__(self, image: Image.Image, objects: Objects) -> tuple[Tensor, Target]:
        config = self.config
        height, width = config.resized(image.height, image.width, random.uniform(*config.scale))
        h, w = (min(side, config.crop or side) for side in (height, width))
        top, left = random.randint(0, height - h), random.randint(0, width - w)
        across, down = random.random() < config.hflip, random.random() < config.vflip
        # the window in pixels of the original, so that images and masks are cropped and resized in one step
        y, x = image.height / height, image.width / width
        window = (left * x, top * y, (left + w) * x, (top + h) * y)

        boxes = objects.boxes / (x, y, x, y) - (left, top, left, top)
        inside = boxes.clip(0, (w, h, w, h))
        kept = np.flatnonzero(((inside[:, 2:] - inside[:, :2]) >= 1).all(1))
        target: Target = {"image_id": objects.image_id}
        if objects.segmentations is not None:
            kept, inside, target["masks"] = _cut_masks(objects, kept, boxes, inside, window, (w, h), across, down)
        inside = inside[kept]
        if across:
            inside[:, [0, 2]] = w - inside[:, [2, 0]]
        if down:
            inside[:, [1, 3]] = h - inside[:, [3, 1]]
        target["boxes"] = torch.from_numpy(inside.astype(np.float32))
        target["labels"] = torch.from_numpy(objects.labels[kept])

        image = image.resize((w, h), Image.Resampling.BILINEAR, box=window)
        if self.jitter is not None:
            image = self.jitter(image)
        pixels = _mirrored(np.asarray(image), across, down)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), target


class DetectionEvalTransform:
    """(image, objects) -> (uint8 [3, H, W], {"image_id"}), the whole image."""

    def __call__(self, image: Image.Image, objects: Objects) -> tuple[Tensor, Target]:
        return to_pixels(image), {"image_id": objects.image_id}


def to_pixels(image: Image.Image) -> Tensor:
    """Return an RGB image as uint8 [3, H, W]."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def collate_lists(samples: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Collate function for images of different sizes: return a list of images and a list of targets."""
    return [image for image, _ in samples], [target for _, target in samples]


def _cut_masks(
    objects: Objects,
    candidates: np.ndarray,
    boxes: np.ndarray,
    inside: np.ndarray,
    window: tuple[float, float, float, float],
    size: tuple[int, int],
    across: bool,
    down: bool,
) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Return the candidates with a remaining pixel, all boxes, tightened for cropped objects, and the masks."""
    masks, kept, inside = [], [], inside.copy()
    for index in candidates:
        whole = Image.fromarray(objects.mask(index) * np.uint8(255))
        mask = np.asarray(whole.resize(size, Image.Resampling.BILINEAR, box=window)) >= 128
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            continue
        if (boxes[index] != inside[index]).any():
            inside[index] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        masks.append(_mirrored(mask, across, down))
        kept.append(index)
    stacked = np.stack(masks) if masks else np.zeros((0, size[1], size[0]), bool)
    return np.array(kept, dtype=np.int64), inside, torch.from_numpy(stacked.astype(np.uint8))


def _mirrored(pixels: np.ndarray, across: bool, down: bool) -> np.ndarray:
    pixels = pixels[:, ::-1] if across else pixels
    return pixels[::-1] if down else pixels
