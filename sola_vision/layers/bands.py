# SPDX-License-Identifier: Apache-2.0
"""Inference on a CPU goes through an image in bands of rows, so that what a pass writes is still in the cache when the
next one reads it, and large intermediates never exist as a whole.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sola_vision.ops import pinned, seen_through

BAND_BYTES = 8 << 20  # of intermediates in a band


class Band(NamedTuple):
    """Some images, or some rows of one, and the rows above and below (0 or 1) that token shift reads as well."""

    images: slice
    rows: slice
    top: int
    bottom: int

    def of(self, x: Tensor) -> Tensor:
        """The band of x [B, H, W, C], contiguous as x is."""
        return x[self.images, self.rows]

    def with_neighbours(self, x: Tensor) -> Tensor:
        return x[self.images, self.rows.start - self.top : self.rows.stop + self.bottom]


def in_bands(x: Tensor, *projections: nn.Module) -> bool:
    """Whether bands serve: gradients need the intermediates, compilers and GPUs want few large steps, and a pinned
    path or a changed projection is to be seen in plain.
    """
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and pinned() in (None, "native")
        and not seen_through(x)  # who traces would lose what is written to a band
        and plain_linear(*projections)
    )


def plain_linear(*projections: nn.Module) -> bool:
    """Whether each is its weight and nothing else."""
    return all(unchanged(projection) and projection.bias is None for projection in projections)


def unchanged(projection: nn.Module) -> bool:
    """Whether it is a linear layer that does what its weight and bias say. A low-rank adapter, a quantised module or
    weight, and one that is hooked or whose forward was replaced does more, and has to be called.
    """
    return (
        type(projection) is nn.Linear
        and type(projection.weight) in (nn.Parameter, Tensor)
        and "forward" not in vars(projection)
        and not (projection._forward_hooks or projection._forward_pre_hooks)
        and not (projection._backward_hooks or projection._backward_pre_hooks)
    )


def bands(x: Tensor, width: int) -> Iterator[Band]:
    """Covers x [B, H, W, C]; `width` is the number of intermediate values that a token has."""
    batch, height, columns, _ = x.shape
    row = max(1, columns * width * x.element_size())
    images = BAND_BYTES // (row * max(1, height))
    if images:
        for b in range(0, batch, images):
            yield Band(slice(b, min(b + images, batch)), slice(0, height), 0, 0)
        return
    rows = max(1, BAND_BYTES // row)
    for b in range(batch):
        for h in range(0, height, rows):
            stop = min(h + rows, height)
            yield Band(slice(b, b + 1), slice(h, stop), min(1, h), min(1, height - stop))
