# SPDX-License-Identifier: Apache-2.0
"""Comparison of an exported file with its network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sola_vision.export.networks import Exportable

Run = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Comparison:
    """The error of a file on a batch of random images, in its worst output.

    error: largest difference over largest value; infinite if it is not a finite number or the shapes differ.
    """

    batch: int
    height: int
    width: int
    output: str
    error: float


def compare(network: Exportable, run: Run, batch: int, size: tuple[int, int]) -> Comparison:
    """Compare a file with the network on one batch of images of `size` (height, width)."""
    if network.fixed_size is not None and size != network.fixed_size:
        raise ValueError(f"size {size[0]}x{size[1]}: the network takes only {network.fixed_size[0]} pixels a side")
    generator = torch.Generator().manual_seed(batch * 10**8 + size[0] * 10**4 + size[1])
    images = torch.randn(batch, network.channels, *size, generator=generator)
    with torch.inference_mode():
        expected = network(images)
    actual = run(images)
    errors = {name: _relative_error(a, e) for name, a, e in zip(network.names, actual, expected, strict=True)}
    worst = max(errors, key=lambda name: errors[name])
    return Comparison(batch, *size, worst, errors[worst])


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    if torch.equal(actual, expected):  # including all zeros, where the relative error is undefined
        return 0.0
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    return error if np.isfinite(error) else float("inf")
