# SPDX-License-Identifier: Apache-2.0
"""The multi-scale test image of Fig. 6(a): one object at several scales, with masks, boxes and a measure.

The measure is the fraction of a map's energy that falls on each object, compared with the object's fraction of the
area: a map that detects an object has more energy there than a uniform map would, at every scale.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sola_vision.analysis.trace import Patch, overlaps

# not in the paper: its scene is not published. Centre x, y and height of each owl, as fractions of the image's side
_OWLS = ((0.30, 0.38, 0.56), (0.74, 0.24, 0.34), (0.66, 0.68, 0.20), (0.88, 0.56, 0.12), (0.86, 0.86, 0.07))


@dataclass(frozen=True)
class MultiScale:
    """Image [H, W, 3] of bytes, masks [n, H, W] and boxes [n, 4] (x0 y0 x1 y1, exclusive ends), largest first."""

    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    boxes: NDArray[np.int64]


def multiscale_image(side: int = 1024, seed: int = 0) -> MultiScale:
    """Return an image of five owls on a cloudy background, 56 to 7 % of its height; deterministic for a seed."""
    if side < 64:
        raise ValueError(f"side {side}: the smallest object needs an image of at least 64 pixels")
    rng = np.random.default_rng(seed)
    pixels = _ground(rng, side)
    masks = np.zeros((len(_OWLS), side, side), bool)
    for mask, (x, y, height) in zip(masks, _OWLS, strict=True):
        _paint_owl(pixels, mask, x * side, y * side, height * side)
    pixels += rng.normal(0, 4, pixels.shape)
    boxes = np.array([_box(mask) for mask in masks])
    return MultiScale(np.rint(pixels).clip(0, 255).astype(np.uint8), masks, boxes)


def energy_shares(energy: Tensor, masks: NDArray[np.bool_], patch: Patch) -> list[tuple[float, float]]:
    """Return for each object (its fraction of the energy of a map [h, w], its fraction of the image's area).

    masks: [n, H, W], at the resolution of the image. patch: a token's patch in pixels (rows, columns). A token's energy
    is spread evenly over the part of its patch within the image; padding gets none.
    """
    if energy.ndim != 2 or bool((energy < 0).any()):
        raise ValueError(f"energy must be a map [h, w] without negative values, got {list(energy.shape)}")
    down, across = (overlaps(*sides) for sides in zip(masks.shape[1:], energy.shape, patch, strict=True))
    spread = down.T @ energy.double().cpu().numpy() @ across  # [H, W], by pixel
    total = max(float(spread.sum()), np.finfo(float).tiny)
    return [(float(spread[mask].sum()) / total, float(mask.mean())) for mask in masks]


def _ground(rng: np.random.Generator, side: int) -> NDArray[np.float64]:
    """Return a background of clouds: smooth noise at three scales, dull green and brown."""
    ground = np.zeros((side, side))
    for cells, height in ((4, 1.0), (16, 0.5), (64, 0.25)):
        coarse = torch.from_numpy(rng.uniform(-1, 1, (1, 1, cells, cells)))
        fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)
        ground += height * fine[0, 0].numpy()
    return np.array([96.0, 112.0, 84.0]) + 22 * ground[..., None] * np.array([1.0, 0.9, 0.7])


def _paint_owl(pixels: NDArray[np.float64], mask: NDArray[np.bool_], x: float, y: float, height: float) -> None:
    """Paint an owl of this height in pixels into `pixels`, and its silhouette into `mask`."""
    side = len(pixels)
    column, row = (np.arange(side) + 0.5 - x) / height, (np.arange(side) + 0.5 - y) / height
    u, v = np.meshgrid(column, row)  # owl units: its height is 1

    def ellipse(cx: float, cy: float, rx: float, ry: float) -> NDArray[np.bool_]:
        return ((u - cx) / rx) ** 2 + ((v - cy) / ry) ** 2 <= 1

    ears = (np.abs(np.abs(u) - 0.19) <= (v + 0.52) * 0.5) & (v >= -0.52) & (v <= -0.3)
    body = ellipse(0, 0.05, 0.32, 0.45) | ellipse(0, -0.22, 0.29, 0.26) | ears
    mask |= body
    pixels[body] = (128, 84, 46)
    pixels[ellipse(0, 0.17, 0.2, 0.27)] = (222, 196, 150)
    feathers = ellipse(0, 0.17, 0.2, 0.27) & (np.sin(40 * v + 2.5 * np.cos(25 * u)) > 0.6)
    pixels[feathers] = (150, 106, 64)
    for across in (-0.13, 0.13):
        pixels[ellipse(across, -0.2, 0.12, 0.12)] = (246, 226, 120)
        pixels[ellipse(across, -0.2, 0.055, 0.055)] = (20, 18, 16)
    pixels[(np.abs(u) <= (-0.02 - v) * 0.5) & (v >= -0.14) & (v <= -0.02)] = (224, 138, 40)


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
