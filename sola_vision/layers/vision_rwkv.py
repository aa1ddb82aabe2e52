# SPDX-License-Identifier: Apache-2.0
"""Vision-RWKV's layer, built from the parts of our linear layer as in its published networks.

Small to large normalise a branch after its mix instead of before it and scale its output; large also normalises the
read-out and the squared ReLU. Not fused: these networks exist here for their weights. [B, H, W, C] throughout.
"""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from sola_vision.layers.linear import IDENTITY, ChannelMix, LinearMixer
from sola_vision.layers.replaced import MIXER_RESULTS, two_results
from sola_vision.ops import gate, published_wkv, quad_shift, squared_relu, wkv


class VisionRwkvMixer(LinearMixer):
    """Spatial mix. key_norm: normalise the read-out; eq9: see `VisionRwkvLayer`."""

    def __init__(
        self,
        dim: int,
        *,
        key_norm: bool,
        eq9: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, device=device, dtype=dtype)
        self.operator = _eq9 if eq9 else published_wkv
        self.readout_norm = nn.LayerNorm(dim, device=device, dtype=dtype) if key_norm else nn.Identity()

    def forward(self, x: Tensor, norm: nn.LayerNorm = IDENTITY) -> tuple[Tensor, Tensor]:
        """x [B, H, W, C] -> the branch's output and the read-out before its norm, both [B, H, W, C]."""
        x = norm(x)
        shifted = quad_shift(x)
        receptance = self.receptance(_mixed(x, shifted, self.mix_receptance))
        key = self.key(_mixed(x, shifted, self.mix_key)).flatten(1, 2)
        value = self.value(_mixed(x, shifted, self.mix_value)).flatten(1, 2)
        readout = self.operator(self.decay, self.bonus, key, value).view(receptance.shape)
        return self.output(gate(receptance, self.readout_norm(readout))), readout


class VisionRwkvChannelMix(ChannelMix):
    """Channel mix. key_norm: normalise the squared ReLU."""

    def __init__(
        self,
        dim: int,
        *,
        key_norm: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, device=device, dtype=dtype)
        self.hidden_norm = nn.LayerNorm(4 * dim, device=device, dtype=dtype) if key_norm else nn.Identity()

    def forward(self, x: Tensor, norm: nn.LayerNorm = IDENTITY) -> Tensor:
        """x [B, H, W, C] -> the branch's output, the same shape."""
        x = norm(x)
        shifted = quad_shift(x)
        hidden = squared_relu(self.key(_mixed(x, shifted, self.mix_key)))
        receptance = self.receptance(_mixed(x, shifted, self.mix_receptance))
        return gate(receptance, self.value(self.hidden_norm(hidden)))


class VisionRwkvLayer(nn.Module):
    """Spatial mix and channel mix, two residual branches.

    scale: initial value of the branches' scales; a branch is then normalised after its mix. None: before it, no scale.
    key_norm: normalise the read-out and the squared ReLU as well.
    eq9: use eq. 9 instead of the published operator; in both the bonus is divided by the number of tokens.
    """

    def __init__(
        self,
        dim: int,
        *,
        scale: float | None = None,
        key_norm: bool = False,
        eq9: bool = False,
        drop_path: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.mixer = VisionRwkvMixer(dim, key_norm=key_norm, eq9=eq9, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.channel_mix = VisionRwkvChannelMix(dim, key_norm=key_norm, **dd)
        self.scale1 = None if scale is None else nn.Parameter(torch.full((dim,), scale, **dd))
        self.scale2 = None if scale is None else nn.Parameter(torch.full((dim,), scale, **dd))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, W, C] -> the same shape."""
        if self.scale1 is None:
            x = x + self.drop_path(self._mixed(self.norm1(x)))
            return x + self.drop_path(self.channel_mix(self.norm2(x)))
        x = x + self.drop_path(self.scale1 * self.norm1(self._mixed(x)))
        return x + self.drop_path(self.scale2 * self.norm2(self.channel_mix(x)))

    def _mixed(self, x: Tensor) -> Tensor:
        return two_results(self.mixer(x), self.mixer, MIXER_RESULTS)[0]


def _mixed(x: Tensor, shifted: Tensor, mix: Tensor) -> Tensor:
    """Interpolate per channel between the shifted neighbour (0) and the token itself (1)."""
    return torch.lerp(shifted, x, mix.to(x.dtype))


def _eq9(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return wkv(decay, bonus / key.shape[1], key, value)
