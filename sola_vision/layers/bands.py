# SPDX-License-Identifier: Apache-2.0
"""How a linear layer computes on a CPU: a tile of tokens at a time, where the kernel multiplies (`csrc/linear.cpp`);
otherwise inference goes through an image in bands of rows, so that what a pass writes is still in the cache when the
next one reads it, and large intermediates never exist as a whole.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sola_vision.layers.plain import hooked_everywhere, is_plain
from sola_vision.layers.products import matrices_stay_narrow
from sola_vision.ops import cpu, pinned, seen_through, tangents

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


def in_bands(x: Tensor, *modules: nn.Module) -> bool:
    """Whether bands serve what these norms and projections do to x: compilers want few large steps."""
    return not torch.compiler.is_compiling() and _values_only(x, *modules)


def in_tiles(x: Tensor, *modules: nn.Module) -> bool:
    """Whether the kernel takes x [..., C] through these norms and projections, a tile of tokens at a time."""
    weights = (module.weight for module in modules if isinstance(module, nn.Linear))
    # what is exported is for any processor
    return not torch.compiler.is_exporting() and _values_only(x, *modules) and multiplied_in_tiles(x, *weights)


def _values_only(x: Tensor, *modules: nn.Module) -> bool:
    """Whether nobody looks for more than values on a CPU: gradients need the intermediates, and a pinned path or a
    changed module is to be seen in plain. Who traces would lose what is written to a band.
    """
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and pinned() in (None, "native")
        and not (torch.jit.is_tracing() or seen_through(x) or tangents())
        and not hooked_everywhere()
        and is_plain(*modules)
    )


def multiplied_in_tiles(x: Tensor, *others: Tensor) -> bool:
    """Whether the kernel has products of x, and tensors like it, by weights, and they are worth that it packs these."""
    return (
        x.device.type == "cpu"
        and cpu.multiplies(x.dtype)
        and x.numel() >= _tokens_per_square(x.dtype) * x.shape[-1] ** 3
        and all(other.dtype == x.dtype for other in others)
        and not torch.is_autocast_enabled("cpu")
    )


@torch.compiler.assume_constant_result
def _tokens_per_square(dtype: torch.dtype) -> float:
    """Tokens for each channel squared from which on tiles are faster: the fewer tokens, the more the packing of the
    weights counts, and the more channels, the better torch's libraries multiply (benchmarks/tiles.py).
    """
    used = cpu.instruction_set()
    if dtype == torch.bfloat16:
        return 1 / 1400 if used == "amx" else 1 / 600
    return 1 / 3100 if used != "avx2" and matrices_stay_narrow() else 1 / 350


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
