# SPDX-License-Identifier: Apache-2.0
"""The effective receptive field: the gradient of a layer's output at one point with respect to each pixel.

After Luo et al. (the paper's [22]): the absolute gradient of the sum of the channels at a point, each with a fixed
sign, summed over colours and averaged over images. It covers the whole network (decay, keys, shifts, residuals), the
theory of `interaction` only the decay.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sola_vision.analysis.interaction import decay_range, spread
from sola_vision.analysis.trace import feature_maps, nearest_token, patches, walk
from sola_vision.backbone import SolaVision
from sola_vision.layers import LinearLayer

Array = NDArray[np.float64]
_SHARES = (0.2, 0.5, 0.9, 0.99)


@dataclass(frozen=True)
class FieldMap:
    """The receptive field of one token: a map [H, W] that sums to 1, and the centre (y, x) of its patch in pixels.

    The centre may lie outside the image if the network pads it.
    """

    map: Array
    centre: tuple[float, float]


@dataclass(frozen=True)
class Field:
    """Summary of a field. areas: by fraction of the field, the smallest fraction of the image that contains it."""

    areas: dict[float, float]
    rows: float  # root mean square distance from the token's centre, in pixels
    columns: float


def effective_receptive_field(
    model: nn.Module,
    images: Iterable[Tensor],
    point: tuple[float, float] | None = None,
    *,
    without_softmax: bool = False,
) -> dict[str, FieldMap]:
    """Return the field of every layer, averaged over `images` [3, H, W] of one size, at the token that covers a point.

    point: (y, x) in pixels, the centre by default. without_softmax: skip the attention of softmax layers.
    For networks other than SolaVision, the layers are the maps of timm's `forward_intermediates`. Raise ValueError for
    no images, images of different sizes, or a point outside them.
    """
    was_training = model.training
    model.eval()
    total: dict[str, Array] = {}
    centres: dict[str, tuple[float, float]] = {}
    number = 0
    try:
        for image in images:
            height, width = image.shape[-2:]
            at = point or (height / 2, width / 2)
            if not (0 <= at[0] < height and 0 <= at[1] < width):
                raise ValueError(f"point {at} (y, x) lies outside the {height}x{width} image")
            number += 1
            for name, gradient, centres[name] in _gradients(model, image[None], at, without_softmax):
                if name in total and total[name].shape != gradient.shape:
                    raise ValueError(f"images of {total[name].shape} and {gradient.shape} pixels: give them one size")
                total[name] = total.get(name, 0) + gradient
    finally:
        model.train(was_training)
    if not number:
        raise ValueError("no images: a receptive field is averaged over at least one")
    return {
        name: FieldMap(field / max(field.sum(), np.finfo(float).tiny), centres[name]) for name, field in total.items()
    }


def _gradients(
    model: nn.Module, image: Tensor, at: tuple[float, float], without_softmax: bool
) -> Iterable[tuple[str, Array, tuple[float, float]]]:
    """Yield the name, the field and the centre of the token of every layer."""
    image = image.clone().requires_grad_()
    size = (image.shape[-2], image.shape[-1])
    with torch.enable_grad():
        if isinstance(model, SolaVision):
            steps = walk(model, image, without_softmax=without_softmax)
            maps = {step.name: step.output.permute(0, 3, 1, 2) for step in steps}
        else:
            if without_softmax:
                raise ValueError(f"{type(model).__name__} is not a SoLA network: its softmax layers cannot be skipped")
            maps = feature_maps(model, image)
        for name, patch in patches(model, size, maps).items():
            output = maps[name]
            row, column = nearest_token(at, patch, (output.shape[2], output.shape[3]))
            centre = (row + 0.5) * patch[0], (column + 0.5) * patch[1]
            read = (output[0, :, row, column] * _signs(output.shape[1], output.device)).sum()
            (gradient,) = torch.autograd.grad(read, image, retain_graph=True)
            field = gradient[0].abs().sum(0).double()
            yield name, (field / field.sum().clamp(min=torch.finfo(torch.float64).tiny)).cpu().numpy(), centre


def _signs(channels: int, device: torch.device) -> Tensor:
    """Return a fixed random sign per channel; without signs, channels centred by a LayerNorm would sum to zero."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(0, 2, (channels,), generator=generator) * 2.0 - 1).to(device)


def field_statistics(field: FieldMap) -> Field:
    """Return the areas of a field and its extent around the token's centre."""
    ordered = np.sort(field.map, axis=None)[::-1].cumsum()
    areas = {share: float((np.searchsorted(ordered, share * ordered[-1]) + 1) / field.map.size) for share in _SHARES}
    row, column = field.centre
    rows, columns = spread(field.map, row - 0.5, column - 0.5)
    return Field(areas, rows, columns)


@dataclass(frozen=True)
class DecayRange:
    """The decay of one linear layer at one image size; `tokens` is eq. 5 for the channel at each quantile."""

    layer: str
    num_tokens: int
    width: int  # tokens in a row of the image
    stride: int  # pixels between tokens
    decays: dict[float, float]  # quantile -> w
    growing: float  # fraction of channels with w <= 0, whose weight never falls: no range
    tokens: dict[float, float]  # quantile -> N ln(1/eps) / w, infinite for w <= 0

    def rows(self, quantile: float) -> float:
        """Return the range in rows of tokens; in raster order a vertical neighbour is `width` tokens away."""
        return self.tokens[quantile] / self.width

    def pixels(self, quantile: float) -> float:
        """Return the range as a vertical distance in pixels of the image."""
        return self.rows(quantile) * self.stride


def decay_ranges(
    model: SolaVision, size: tuple[int, int], tolerance: float = 0.01, quantiles: tuple[float, ...] = (0.1, 0.5, 0.9)
) -> list[DecayRange]:
    """Return eq. 5 for every linear layer with its current decay, for images of `size` (height, width)."""
    ranges = []
    for place in model.config.parsed_schedule.layers:
        stage: Any = model.stages[place.stage]
        layer = stage.layers[place.layer]
        if not isinstance(layer, LinearLayer):
            continue
        stride = model.config.strides[place.stage]
        height, width = _grid(size, model.config.patch_size, place.stage)
        decay = layer.mixer.decay.detach().double().cpu().numpy()
        decays = {q: float(np.quantile(decay, q)) for q in quantiles}
        tokens = {q: height * width * decay_range(w, tolerance) if w > 0 else float("inf") for q, w in decays.items()}
        name = f"{place} L"
        ranges.append(DecayRange(name, height * width, width, stride, decays, float((decay <= 0).mean()), tokens))
    return ranges


def _grid(size: tuple[int, int], patch_size: int, stage: int) -> tuple[int, int]:
    height, width = (-(-side // patch_size) for side in size)
    for _ in range(stage):
        height, width = -(-height // 2), -(-width // 2)
    return height, width
