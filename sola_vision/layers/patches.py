# SPDX-License-Identifier: Apache-2.0
"""From pixels to tokens: the stem, the position embedding after it, and patch merging between stages (section 4.2)."""

# not in the paper: the kinds of convolution. A plain patch stem and merging by a 3x3 stride-2 convolution are
# the choice that fits the paper's parameter counts and MACs (docs/reconstruction.md).

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sola_vision.layers.plain import is_exactly
from sola_vision.ops.path import transformed


class Stem(nn.Module):
    """Non-overlapping patches: image [B, C_in, H, W] -> tokens [B, ceil(H/p), ceil(W/p), C].

    Raises ValueError for an image of another rank or number of channels.
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
        self.norm: nn.Module = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, image: Tensor) -> Tensor:
        # not in the paper: sizes that the patch does not divide are padded with zeros on the right and at the bottom
        height, width = image.shape[-2:]
        # tracers, whose sizes may be symbols, need no word for people
        if type(width) is int and (image.dim() != 4 or image.shape[1] != self.in_chans):
            raise ValueError(
                f"image {list(image.shape)} must be [B, {self.in_chans}, H, W]: a batch, its channels as in_chans says"
            )
        right, bottom = self._missing(width), self._missing(height)
        # padding by nothing is a copy; tracers and compilers, whose sizes may be symbols, have it always
        if torch.compiler.is_compiling() or type(width) is not int or right or bottom:
            image = nn.functional.pad(image, (0, right, 0, bottom))
        if not transformed(image):  # torch.func has no layouts
            # channels last in memory, so that the tokens need no copy
            image = image.contiguous(memory_format=torch.channels_last)
        return self.norm(self.proj(image).permute(0, 2, 3, 1))

    def _missing(self, size: int) -> int:
        """Pixels to the next multiple of a patch; torch.compile does not follow a remainder of a negative number."""
        return (size + self.patch_size - 1) // self.patch_size * self.patch_size - size


class PositionEmbedding(nn.Module):
    """Learned absolute positions on a square grid, interpolated bicubically to other grids."""

    def __init__(
        self, grid: int, dim: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dim, grid, grid, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, W, C] -> x plus its positions."""
        weight: Tensor = self.weight
        if not transformed(x, weight):
            weight = weight.contiguous(memory_format=torch.channels_last)  # as x lies in memory
        size = (x.shape[1], x.shape[2])
        # an exported graph takes images of any size, so it always interpolates; on the grid itself that changes nothing
        if torch.compiler.is_exporting() or weight.shape[-2:] != size:
            # in autocast products would be rounded; a trace is for any machine
            plain = x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or torch.jit.is_tracing()
            by = _interpolate if plain or torch.compiler.is_exporting() else _interpolate_by_products
            weight = by(weight.to(torch.promote_types(weight.dtype, torch.float32)), size)
        return x + weight.to(x.dtype).permute(0, 2, 3, 1)


def _interpolate(weight: Tensor, size: Sequence[int]) -> Tensor:
    """[1, C, h, w] for another grid (height, width)."""
    return nn.functional.interpolate(weight, tuple(size), mode="bicubic", align_corners=False)


def _interpolate_by_products(weight: Tensor, size: Sequence[int]) -> Tensor:
    """The same, one axis after the other as a matrix product; channels last in memory. torch goes from pixel to pixel,
    which takes longer on a CPU.
    """
    rows, columns = (_stretching(old, new, weight) for old, new in zip(weight.shape[-2:], size, strict=True))
    channels_last = weight[0].permute(1, 2, 0)
    tall = (rows @ channels_last.flatten(1)).unflatten(1, channels_last.shape[1:])
    return (columns @ tall).permute(2, 0, 1)[None]


def _stretching(old: int, new: int, like: Tensor) -> Tensor:
    """The matrix [new, old] of torch's bicubic interpolation along one axis."""
    unit = torch.eye(old, device=like.device, dtype=like.dtype)[None, :, :, None]
    return _interpolate(unit, (new, 1))[0, :, :, 0].t()


def resize_position(weight: Tensor, grid: Sequence[int]) -> Tensor:
    """A position embedding [1, C, h, w] for another grid (height, width), as the network itself has it, to rounding."""
    if tuple(weight.shape[-2:]) == tuple(grid):
        return weight
    return _interpolate(weight.to(torch.promote_types(weight.dtype, torch.float32)), grid).to(weight.dtype)


class PatchMerging(nn.Module):
    """3x3 stride-2 convolution and LayerNorm: [B, H, W, C_in] -> [B, ceil(H/2), ceil(W/2), C_out]."""

    def __init__(
        self, in_dim: int, dim: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=False, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        width = x.shape[3]
        column = type(width) is int and width == 1 and x.device.type == "cpu" and torch.is_grad_enabled()
        if column and is_exactly(self.reduction, nn.Conv2d):
            # In bfloat16 torch 2.14 leaves the gradient of outer columns, which see nothing but padding, unwritten on a
            # CPU. The middle one alone gives the same.
            reduced = nn.functional.conv2d(x, self.reduction.weight[..., 1:2], stride=2, padding=(1, 0))
        else:
            reduced = self.reduction(x)
        return self.norm(reduced.permute(0, 2, 3, 1))
