# SPDX-License-Identifier: Apache-2.0
"""From pixels to tokens: the stem, the position embedding after it, and patch merging between stages (section 4.2)."""

# not in the paper: the kinds of convolution and the norms after them. A plain patch stem and merging by a 3x3 stride-2
# convolution fit the paper's parameter counts and MACs (docs/reconstruction.md).

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sola_vision.layers.norm import LayerNorm
from sola_vision.layers.unmodified import is_exactly
from sola_vision.ops.path import exporting, transformed


class Stem(nn.Module):
    """Non-overlapping patches: image [B, C_in, H, W] -> tokens [B, ceil(H/p), ceil(W/p), C].

    Raises ValueError for an image of another rank or number of channels, or without pixels.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        *,
        patch_size: int = 4,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, device=device, dtype=dtype)
        self.norm: nn.Module = LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, image: Tensor) -> Tensor:
        """image [B, C_in, H, W] -> tokens [B, ceil(H/p), ceil(W/p), C]."""
        # not in the paper: sizes that the patch does not divide are padded with zeros on the right and at the bottom
        height, width = image.shape[-2:]
        # skipped while tracing, where sizes may be symbolic
        if type(width) is int and (image.dim() != 4 or image.shape[1] != self.in_chans or 0 in (height, width)):
            raise ValueError(
                f"image {list(image.shape)} must be [B, {self.in_chans}, H, W]: a batch, with in_chans={self.in_chans} "
                "channels and at least one pixel"
            )
        right, bottom = self._missing(width), self._missing(height)
        # padding by zero still copies, so eager mode skips it; tracers, whose sizes may be symbolic, always pad
        if torch.compiler.is_compiling() or type(width) is not int or right or bottom:
            image = nn.functional.pad(image, (0, right, 0, bottom))
        if not transformed(image):  # torch.func does not support memory formats
            # channels last in memory, so that the tokens need no copy
            image = image.contiguous(memory_format=torch.channels_last)
        return self.norm(self.proj(image).permute(0, 2, 3, 1))

    def _missing(self, size: int) -> int:
        """Pixels missing to the next multiple of patch_size; torch.compile cannot trace -size % patch_size."""
        return (size + self.patch_size - 1) // self.patch_size * self.patch_size - size


class PositionEmbedding(nn.Module):
    """Learned absolute positions on a square grid, interpolated to other grids."""

    # not in the paper: bicubic interpolation, as in DeiT

    def __init__(
        self, grid: int, dim: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dim, grid, grid, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, W, C] -> x plus the position embedding."""
        weight: Tensor = self.weight
        if not transformed(x, weight):
            weight = weight.contiguous(memory_format=torch.channels_last)  # x's layout
        size = (x.shape[1], x.shape[2])
        # a captured graph takes images of any size, so it always interpolates; on its own grid that is the identity
        captured = exporting() or torch.jit.is_tracing()
        if captured or weight.shape[-2:] != size:
            # autocast would round the products; a captured graph has to suit any device
            plain = captured or x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
            by = _interpolate if plain else _interpolate_by_products
            weight = by(weight.to(torch.promote_types(weight.dtype, torch.float32)), size)
        return x + weight.to(x.dtype).permute(0, 2, 3, 1)


def _interpolate(weight: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate [1, C, h, w] to another grid (height, width)."""
    return nn.functional.interpolate(weight, tuple(size), mode="bicubic", align_corners=False)


def _interpolate_by_products(weight: Tensor, size: Sequence[int]) -> Tensor:
    """The same as a matrix product per axis, channels last in memory: faster on a CPU than torch's loop over pixels."""
    rows, columns = (_stretching(old, new, weight) for old, new in zip(weight.shape[-2:], size, strict=True))
    channels_last = weight[0].permute(1, 2, 0)
    tall = (rows @ channels_last.flatten(1)).unflatten(1, channels_last.shape[1:])
    return (columns @ tall).permute(2, 0, 1)[None]


def _stretching(old: int, new: int, like: Tensor) -> Tensor:
    """The matrix [new, old] of torch's bicubic interpolation along one axis."""
    unit = torch.eye(old, device=like.device, dtype=like.dtype)[None, :, :, None]
    return _interpolate(unit, (new, 1))[0, :, :, 0].t()


def resize_position(weight: Tensor, grid: Sequence[int]) -> Tensor:
    """Resize a position embedding [1, C, h, w] to another grid (height, width), as the network's forward does."""
    if tuple(weight.shape[-2:]) == tuple(grid):
        return weight
    return _interpolate(weight.to(torch.promote_types(weight.dtype, torch.float32)), grid).to(weight.dtype)


class PatchMerging(nn.Module):
    """3x3 stride-2 convolution and LayerNorm: [B, H, W, C_in] -> [B, ceil(H/2), ceil(W/2), C_out]."""

    # not in the paper: odd sizes are rounded up

    def __init__(
        self, in_dim: int, dim: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=False, device=device, dtype=dtype)
        self.norm = LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, W, C_in] -> [B, ceil(H/2), ceil(W/2), C_out]."""
        x = x.permute(0, 3, 1, 2)
        width = x.shape[3]
        column = type(width) is int and width == 1 and x.device.type == "cpu" and torch.is_grad_enabled()
        if column and is_exactly(self.reduction, nn.Conv2d):
            # torch 2.14 on a CPU in bfloat16 does not write the weight gradient of the outer columns, which only see
            # padding here. The middle column alone computes the same result.
            reduced = nn.functional.conv2d(x, self.reduction.weight[..., 1:2], stride=2, padding=(1, 0))
        else:
            reduced = self.reduction(x)
        return self.norm(reduced.permute(0, 2, 3, 1))
