# SPDX-License-Identifier: Apache-2.0
"""From pixels to tokens: the stem, the position embedding after it, and patch merging between stages (section 4.2).

# not in the paper: the kinds of convolution. A plain patch stem and merging by a 3x3 stride-2 convolution are
# the choice that fits the paper's parameter counts and MACs (docs/reconstruction.md).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Stem(nn.Module):
    """Non-overlapping patches: image [B, C_in, H, W] -> tokens [B, ceil(H/p), ceil(W/p), C]."""

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
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, device=device, dtype=dtype)
        self.norm: nn.Module = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, image: Tensor) -> Tensor:
        # not in the paper: sizes that the patch does not divide are padded with zeros on the right and at the bottom
        height, width = image.shape[-2:]
        image = nn.functional.pad(image, (0, -width % self.patch_size, 0, -height % self.patch_size))
        # channels last in memory, so that the tokens need no copy
        image = image.contiguous(memory_format=torch.channels_last)
        return self.norm(self.proj(image).permute(0, 2, 3, 1))


class PositionEmbedding(nn.Module):
    """Learned absolute positions on a square grid, interpolated bicubically to other grids."""

    def __init__(
        self, grid: int, dim: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dim, grid, grid, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, W, C] -> x plus its positions."""
        weight = self.weight.contiguous(memory_format=torch.channels_last)  # as x lies in memory
        # an exported graph takes images of any size, so it always interpolates; on the grid itself that changes nothing
        if torch.compiler.is_exporting() or weight.shape[-2:] != x.shape[1:3]:
            size = (x.shape[1], x.shape[2])
            weight = nn.functional.interpolate(weight.float(), size, mode="bicubic", align_corners=False)
        return x + weight.to(x.dtype).permute(0, 2, 3, 1)


def resize_position(weight: Tensor, grid: Sequence[int]) -> Tensor:
    """A position embedding [1, C, h, w] for another grid (height, width), as the network itself interpolates it."""
    if tuple(weight.shape[-2:]) == tuple(grid):
        return weight
    return nn.functional.interpolate(weight.float(), tuple(grid), mode="bicubic", align_corners=False).to(weight.dtype)


class PatchMerging(nn.Module):
    """3x3 stride-2 convolution and LayerNorm: [B, H, W, C_in] -> [B, ceil(H/2), ceil(W/2), C_out]."""

    def __init__(
        self, in_dim: int, dim: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=False, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
