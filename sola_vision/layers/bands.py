# SPDX-License-Identifier: Apache-2.0
"""How a linear layer computes on a CPU: a tile of tokens at a time, where the kernel multiplies (`csrc/linear.cpp`);
otherwise inference goes through an image in bands of rows, so that what a pass writes is still in the cache when the
next one reads it, and large intermediates never exist as a whole.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sola_vision.ops import cpu, pinned, seen_through, tangents

BAND_BYTES = 8 << 20  # of intermediates in a band
# Tokens for each channel squared from which on tiles are faster: the fewer tokens, the more the packing of the weights
# counts, and the more channels, the better torch's libraries multiply (benchmarks/tiles.py).
_TOKENS_PER_SQUARE = {torch.float32: 1 / 350, torch.bfloat16: 1 / 1400}


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
    """Whether bands serve: compilers want few large steps."""
    return not torch.compiler.is_compiling() and _values_only(x, *projections)


def in_tiles(x: Tensor, *projections: nn.Linear) -> bool:
    """Whether the kernel multiplies x [..., C] by projections, a tile of tokens at a time through all passes."""
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()  # what is exported is for any processor
    weights = (projection.weight for projection in projections)
    return not exporting and _values_only(x, *projections) and multiplied_in_tiles(x, *weights)


def _values_only(x: Tensor, *projections: nn.Module) -> bool:
    """Whether nobody looks for more than values on a CPU: gradients need the intermediates, and a pinned path or a
    changed projection is to be seen in plain.
    """
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and pinned() in (None, "native")
        and not (seen_through(x) or tangents())  # who traces would lose what is written to a band
        and plain_linear(*projections)
        and (torch.compiler.is_compiling() or not torch.nn.modules.module._has_any_global_hook())
    )


def multiplied_in_tiles(x: Tensor, *others: Tensor) -> bool:
    """Whether the kernel has products of x, and tensors like it, by weights, and they are worth that it packs these."""
    return (
        x.device.type == "cpu"
        and cpu.multiplies(x.dtype)
        and x.numel() >= _TOKENS_PER_SQUARE[x.dtype] * x.shape[-1] ** 3
        and all(other.dtype == x.dtype for other in others)
        and not torch.is_autocast_enabled("cpu")
    )


def plain_linear(*projections: nn.Module) -> bool:
    """Whether each is its weight and nothing else."""
    return all(unchanged(projection) and projection.bias is None for projection in projections)


def unchanged(projection: nn.Module) -> bool:
    """Whether it is a linear layer that does what its weight and bias say. A low-rank adapter, a quantised module or
    weight, and one that is hooked or whose forward was replaced does more, and has to be called.
    """
    return exactly(projection, nn.Linear) and type(projection.weight) in (nn.Parameter, Tensor)


def exactly(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module does what its class says: no subclass, no wrapper, no hook, no other forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and "forward" not in vars(module) and not any(hooks)


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
