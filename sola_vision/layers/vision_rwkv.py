# SPDX-License-Identifier: Apache-2.0
"""Vision-RWKV's layer, built from the parts of our linear layer as in its published networks.

Small to large normalise a branch after its mix instead of before it and scale its output; large also normalises the
read-out and the squared ReLU. Not fused: these networks exist here for their weights. [B, H, W, C] throughout.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from sola_vision.layers.linear import ChannelMix, LinearMixer
from sola_vision.ops import gate, published_wkv, quad_shift, squared_relu, wkv


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
        self.operator = _eq9 if eq9 else published_wkv
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.mixer = LinearMixer(dim, **dd)
        self.readout_norm = nn.LayerNorm(dim, **dd) if key_norm else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.channel_mix = ChannelMix(dim, **dd)
        self.hidden_norm = nn.LayerNorm(4 * dim, **dd) if key_norm else nn.Identity()
        self.scale1 = None if scale is None else nn.Parameter(torch.full((dim,), scale, **dd))
        self.scale2 = None if scale is None else nn.Parameter(torch.full((dim,), scale, **dd))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, W, C] -> the same shape."""
        x = x + self.drop_path(_branch(x, self.norm1, self._mix_tokens, self.scale1))
        return x + self.drop_path(_branch(x, self.norm2, self._mix_channels, self.scale2))

    def _mix_tokens(self, x: Tensor) -> Tensor:
        mixer, shifted = self.mixer, quad_shift(x)
        receptance = mixer.receptance(_mixed(x, shifted, mixer.mix_receptance))
        key = mixer.key(_mixed(x, shifted, mixer.mix_key)).flatten(1, 2)
        value = mixer.value(_mixed(x, shifted, mixer.mix_value)).flatten(1, 2)
        readout = self.operator(mixer.decay, mixer.bonus, key, value).view(receptance.shape)
        return mixer.output(gate(receptance, self.readout_norm(readout)))

    def _mix_channels(self, x: Tensor) -> Tensor:
        mix, shifted = self.channel_mix, quad_shift(x)
        hidden = squared_relu(mix.key(_mixed(x, shifted, mix.mix_key)))
        receptance = mix.receptance(_mixed(x, shifted, mix.mix_receptance))
        return gate(receptance, mix.value(self.hidden_norm(hidden)))


def _branch(x: Tensor, norm: nn.Module, mix: Callable[[Tensor], Tensor], scale: Tensor | None) -> Tensor:
    return mix(norm(x)) if scale is None else scale * norm(mix(x))


def _mixed(x: Tensor, shifted: Tensor, mix: Tensor) -> Tensor:
    """Interpolate per channel between the shifted neighbour (0) and the token itself (1)."""
    return torch.lerp(shifted, x, mix.to(x.dtype))


def _eq9(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return wkv(decay, bonus / key.shape[1], key, value)
