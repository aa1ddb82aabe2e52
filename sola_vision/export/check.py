# SPDX-License-Identifier: Apache-2.0
"""An exported file against the network that it was made of, on the spot."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sola_vision.export.networks import Exportable

Run = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Comparison:
    """How far a file is from the network on a batch of random images: the worst result counts.

    error is the largest difference over the largest value, infinite where there is one that is no number.
    """

    batch: int
    height: int
    width: int
    output: str
    error: float


def compare(network: Exportable, run: Run, batch: int, size: tuple[int, int]) -> Comparison:
    """On one batch of images of this (height, width)."""
    if network.fixed_size is not None and size != network.fixed_size:
        raise ValueError(f"size {size[0]}x{size[1]}: the network takes only {network.fixed_size[0]} pixels a side")
    generator = torch.Generator().manual_seed(batch * 10**8 + size[0] * 10**4 + size[1])
    images = torch.randn(batch, network.channels, *size, generator=generator)
    with torch.inference_mode():
        wanted = network(images)
    found = run(images)
    errors = {name: _difference(f, w) for name, f, w in zip(network.names, found, wanted, strict=True)}
    worst = max(errors, key=lambda name: errors[name])
    return Comparison(batch, *size, worst, errors[worst])


def _difference(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    if torch.equal(found, wanted):  # also where all is zero, which is no measure of a difference
        return 0.0
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    return error if np.isfinite(error) else float("inf")
