# SPDX-License-Identifier: Apache-2.0
"""Bands: groups of images, or of rows of one image, whose intermediates fit the cache.

In inference a linear layer goes from band to band, so that one pass's output is still in the cache when the next pass
reads it, and large intermediates never exist as a whole.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

BAND_BYTES = 8 << 20  # of a band's intermediates


class Band(NamedTuple):
    """A slice of images or of one image's rows; top and bottom: rows beyond it (0 or 1) that the token shift reads."""

    images: slice
    rows: slice
    top: int
    bottom: int

    def of(self, x: Tensor) -> Tensor:
        """The band's part of x [B, H, W, C]; contiguous if x is."""
        return x[self.images, self.rows]

    def with_neighbours(self, x: Tensor) -> Tensor:
        """The band's part of x [B, H, W, C] with the rows that the token shift reads."""
        return x[self.images, self.rows.start - self.top : self.rows.stop + self.bottom]


def bands(x: Tensor, width: int) -> Iterator[Band]:
    """Yield the bands that cover x [B, H, W, C]; `width` is the number of intermediate values per token."""
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
