# SPDX-License-Identifier: Apache-2.0
"""Inference of segmentation networks: whole images or sliding windows, with mirrored and multi-scale test views.

A single view is scored by its logits; several views (mirrored, scaled) are averaged as probabilities, as mmsegmentation
does. Overlapping windows are averaged as logits, each pixel over the windows that contain it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

_CLASSES_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Inference:
    """Settings of inference: windows of `slide` pixels every `stride` pixels, mirrored views (`flip`), scales."""

    slide: int | None = None
    stride: int | None = None
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name in ("slide", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1 pixel")
        if self.stride is not None and self.slide is None:
            raise ValueError(f"stride={self.stride} needs windows: set their side with slide, or omit stride")
        if self.stride is not None and self.slide is not None and self.stride > self.slide:
            raise ValueError(f"stride={self.stride} must be at most slide={self.slide}, or pixels are skipped")
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"scales={self.scales} must be finite factors above 0 on the image size")

    def __call__(self, model: nn.Module, image: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return the classes [h, w] at `size` (default: the image's) of a preprocessed image [3, H, W]."""
        scores = self.scores(model, image[None])
        return best_classes(scores, size or (image.shape[1], image.shape[2]))

    def scores(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return scores [B, classes, H, W] of images [B, 3, H, W]: logits of a single view, else mean probabilities."""
        views = [(scale, mirrored) for scale in self.scales for mirrored in ((False, True) if self.flip else (False,))]
        total: Tensor | None = None
        for scale, mirrored in views:
            view = images if scale == 1 else _scaled(images, scale)
            logits = self._logits(model, view.flip(-1) if mirrored else view).float()
            logits = logits.flip(-1) if mirrored else logits
            if logits.shape[-2:] != images.shape[-2:]:
                logits = interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)
            if len(views) == 1:
                return logits
            probabilities = logits.softmax(1)
            total = probabilities if total is None else total + probabilities
        assert total is not None
        return total / len(views)

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if self.slide is None or max(height, width) <= self.slide:
            return model(images)
        side, stride = self.slide, self.stride or max(1, self.slide * 2 // 3)
        total: Tensor | None = None
        count = images.new_zeros(height, width)
        for top in _starts(height, side, stride):
            for left in _starts(width, side, stride):
                rows, columns = slice(top, top + side), slice(left, left + side)
                logits = model(images[:, :, rows, columns]).float()
                if total is None:
                    total = logits.new_zeros(len(images), logits.shape[1], height, width)
                total[:, :, rows, columns] += logits
                count[rows, columns] += 1
        assert total is not None
        return total / count


def best_classes(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the best class of each pixel [h, w] of scores [1, classes, H, W], interpolated bilinearly to `size`."""
    if scores.shape[-2:] == size:
        return scores[0].argmax(0)
    best: Tensor | None = None
    classes: Tensor | None = None
    # in groups of classes, because 150 maps of a large photograph would take gigabytes
    for first in range(0, scores.shape[1], _CLASSES_AT_ONCE):
        some = interpolate(scores[:, first : first + _CLASSES_AT_ONCE], size=size, mode="bilinear", align_corners=False)
        value, index = some[0].max(0)
        if best is None or classes is None:
            best, classes = value, index
        else:
            better = value > best
            best = torch.where(better, value, best)
            classes = torch.where(better, index + first, classes)
    assert classes is not None
    return classes


def _starts(length: int, side: int, stride: int) -> list[int]:
    """Return the start of each window; together they cover `length` without exceeding it, the last may overlap more."""
    if length <= side:
        return [0]
    return [*range(0, length - side, stride), length - side]


def _scaled(images: Tensor, scale: float) -> Tensor:
    height, width = images.shape[-2:]
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    # not in the paper: smaller images are smoothed first, as Pillow does when it resizes
    return interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=scale < 1)
