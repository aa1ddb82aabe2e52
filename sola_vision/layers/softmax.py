# SPDX-License-Identifier: Apache-2.0
"""The softmax layer (S): ViT's global multi-head self-attention, then an MLP with a 3x3 depth-wise convolution
(section 4.4). Two residual branches, [B, H, W, C] throughout; attention is global, without windows.
"""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from sola_vision.layers.norm import LayerNorm
from sola_vision.layers.onednn import convolve_gelu, project_biased
from sola_vision.layers.residual import add_branch
from sola_vision.ops import attention


class SoftmaxMixer(nn.Module):
    """Multi-head self-attention over all tokens (eq. 1)."""

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 32,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"SoftmaxMixer: dim={dim} must be a multiple of head_dim={head_dim}")
        # not in the paper: 32 channels a head, as in Swin, and projections with bias, as in ViT
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.output = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, W, C] -> the same shape."""
        mixed = attention(project_biased(x, self.qkv).flatten(1, 2), self.head_dim)
        return project_biased(mixed.unflatten(1, x.shape[1:3]), self.output)


class ConvMlp(nn.Module):
    """Linear, 3x3 depth-wise convolution, GELU, linear, at four times the width."""

    def __init__(self, dim: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        # not in the paper: ratio 4, which the parameter counts of Tables 3 and 7 imply, and ViT's GELU
        self.fc1 = nn.Linear(dim, 4 * dim, **dd)
        self.depthwise = nn.Conv2d(4 * dim, 4 * dim, 3, padding=1, groups=4 * dim, **dd)
        self.fc2 = nn.Linear(4 * dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, W, C] -> the same shape."""
        x = project_biased(x, self.fc1).permute(0, 3, 1, 2)  # [B, 4C, H, W], channels last in memory
        # not in the paper: the convolution comes before the activation, as in PVT v2, which introduced this MLP
        x = convolve_gelu(x, self.depthwise).permute(0, 2, 3, 1)
        return project_biased(x, self.fc2)


class SoftmaxLayer(nn.Module):
    """One letter S of a schedule."""

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 32,
        drop_path: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, **dd)
        self.mixer = SoftmaxMixer(dim, head_dim=head_dim, **dd)
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = ConvMlp(dim, **dd)
        self.drop_path = DropPath(drop_path)

    def branch_outputs(self) -> tuple[nn.Linear, nn.Linear]:
        """The projections that end the two residual branches."""
        return self.mixer.output, self.mlp.fc2

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [B, H, W, C] -> the same shape, and None: attention has no hidden state for a bridge to carry."""
        x = add_branch(x, self.mixer(self.norm1(x)), self.drop_path)
        return add_branch(x, self.mlp(self.norm2(x)), self.drop_path), None
