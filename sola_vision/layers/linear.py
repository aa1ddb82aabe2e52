# SPDX-License-Identifier: Apache-2.0
"""The linear layer (L): spatial mix by Bi-WKV attention, then channel mix, two residuals (section 4.4, Fig. 4c).

    spatial mix   r, k, v = linear(token shift(norm(x)));   x + linear(sigmoid(r) * wkv(w, u, k, v))       4 C^2
    channel mix   r, k    = linear(token shift(norm(x)));   x + sigmoid(r) * linear(relu(k)^2)             9 C^2

[B, H, W, C] throughout; tokens are the pixels in raster order, N = H W. `forward` is the formula, with matrix products
that fuse the pass before them (`projections.py`); `add_to` adds the residual and takes the fastest implementation that
`dispatch.py` allows.
"""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from sola_vision.layers.bands import bands
from sola_vision.layers.dispatch import in_bands, in_one_node, in_tiles
from sola_vision.layers.fused_gpu import channel_mix, spatial_mix
from sola_vision.layers.projections import gate_linear, shift_linear, squared_relu_linear
from sola_vision.layers.replaced import MIXER_RESULTS, two_results
from sola_vision.layers.residual import drop_factors, drops_nothing, is_fusible
from sola_vision.layers.unmodified import is_exactly, is_unhooked
from sola_vision.ops import gate, gated_sum, wkv


def _interpolation(dim: int, power: float, *, device: torch.device | None, dtype: torch.dtype | None) -> nn.Parameter:
    """The initial weight of the token itself against its shifted neighbour, from 0 to 1 over the channels."""
    # not in the paper: RWKV's initialisation of its first layer, in every layer here. Vision-RWKV's depends on depth.
    ramp = torch.arange(dim, device=device, dtype=torch.float32) / max(1, dim - 1)
    return nn.Parameter((ramp**power).to(dtype or torch.get_default_dtype()))


IDENTITY: Any = nn.Identity()  # for inputs that are normalised already


class LinearMixer(nn.Module):
    """Bi-WKV attention (eq. 9) with its receptance gate."""

    # not in the paper: projections without bias, and the one after the gate, as in Vision-RWKV; the parameter counts of
    # Tables 3 and 7 imply the latter

    def __init__(
        self,
        dim: int,
        *,
        token_shift: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.receptance = nn.Linear(dim, dim, bias=False, **dd)
        self.key = nn.Linear(dim, dim, bias=False, **dd)
        self.value = nn.Linear(dim, dim, bias=False, **dd)
        self.output = nn.Linear(dim, dim, bias=False, **dd)
        self.decay = nn.Parameter(torch.empty(dim, **dd))
        self.bonus = nn.Parameter(torch.empty(dim, **dd))
        self.token_shift = token_shift
        if token_shift:
            self.mix_receptance = _interpolation(dim, 0.5, **dd)
            self.mix_key = _interpolation(dim, 1.0, **dd)
            self.mix_value = _interpolation(dim, 1.0, **dd)
        self.reset_decay()

    @torch.no_grad()
    def reset_decay(self) -> None:
        """Set decays whose ranges go from the whole image to a few tokens, and Vision-RWKV's bonus around ln 0.3."""
        # not in the paper: its analysis requires w > 0; Vision-RWKV starts most channels at w < 0, where the weight
        # grows with distance. Values from 1 to 64 spread the range of eq. 5 from the whole image, N tokens, down to
        # N / 64; the optimiser moves w too slowly to get there from elsewhere. Nor does it state the bonus.
        ramp = torch.linspace(0, 1, self.decay.shape[0], device=self.decay.device)
        self.decay.copy_(64**ramp)
        zigzag = torch.arange(self.bonus.shape[0], device=self.bonus.device) % 3 - 1
        self.bonus.copy_(-1.2 + 0.5 * zigzag)

    def forward(self, x: Tensor, norm: nn.LayerNorm = IDENTITY) -> tuple[Tensor, Tensor]:
        """x [B, H, W, C], which `norm` is applied to first -> the branch's output and the ungated read-out wkv_t, both
        [B, H, W, C]. The norm can be an argument because kernels fuse it with the token shift and the products.
        """
        projections = (self.receptance, self.key, self.value)
        if self.token_shift and in_one_node(x, norm, *projections, self.output):
            parts = (self.mix_receptance, self.mix_key, self.mix_value)
            return spatial_mix(x, norm, self.decay, self.bonus, parts, (*projections, self.output), residual=False)
        if self.token_shift:
            mixes = torch.stack((self.mix_receptance, self.mix_key, self.mix_value))
            receptance, key, value = shift_linear(x, norm, mixes, projections)
        else:
            n = norm(x)
            receptance, key, value = (projection(n) for projection in projections)
        readout = self.read(key, value)
        return gate_linear(receptance, readout, self.output), readout

    def add_to(self, x: Tensor, norm: nn.LayerNorm, drop_path: nn.Module) -> tuple[Tensor, Tensor]:
        """x + drop_path(the branch's output), and the read-out (see `forward`). drop_path must be fusible."""
        projections = (self.receptance, self.key, self.value, self.output)
        if self.token_shift and in_one_node(x, norm, *projections):
            parts, factors = (self.mix_receptance, self.mix_key, self.mix_value), drop_factors(drop_path, x)
            return spatial_mix(x, norm, self.decay, self.bonus, parts, projections, residual=True, factors=factors)
        if not (self.token_shift and drops_nothing(drop_path) and in_tiles(x, norm, *projections)):
            mixed, readout = self(x, norm)
            return x + drop_path(mixed), readout
        # the receptance is computed where it gates, after the read-out
        normed = x, norm.weight, norm.bias, norm.eps
        mixes, weights = torch.stack((self.mix_key, self.mix_value)), [self.key.weight, self.value.weight]
        readout = self.read(*torch.ops.sola.norm_shift_linear(*normed, mixes, weights))
        mix, weights = self.mix_receptance[None], [self.receptance.weight, self.output.weight]
        return torch.ops.sola.spatial_mix(*normed, mix, *weights, readout), readout

    def read(self, key: Tensor, value: Tensor) -> Tensor:
        """Apply the operator to key and value [B, H, W, C]; the same shape."""
        # not in the paper: pixels in raster order, as in Vision-RWKV
        return wkv(self.decay, self.bonus, key.flatten(1, 2), value.flatten(1, 2)).view(key.shape)


class ChannelMix(nn.Module):
    """The linear layer's feed-forward half: squared ReLU with a receptance gate."""

    def __init__(
        self,
        dim: int,
        *,
        token_shift: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        # not in the paper: ratio 4, which the parameter counts of Tables 3 and 7 imply
        self.key = nn.Linear(dim, 4 * dim, bias=False, **dd)
        self.value = nn.Linear(4 * dim, dim, bias=False, **dd)
        self.receptance = nn.Linear(dim, dim, bias=False, **dd)
        self.token_shift = token_shift
        if token_shift:
            self.mix_key = _interpolation(dim, 1.0, **dd)
            self.mix_receptance = _interpolation(dim, 1.0, **dd)

    def forward(self, x: Tensor, norm: nn.LayerNorm = IDENTITY) -> Tensor:
        """x [B, H, W, C], which `norm` is applied to first -> the branch's output, the same shape."""
        projections = (self.key, self.receptance, self.value)
        if self.token_shift and in_one_node(x, norm, *projections):
            return channel_mix(x, norm, (self.mix_key, self.mix_receptance), projections, residual=False)
        return gate(*self.project(x, norm))

    def project(self, x: Tensor, norm: nn.LayerNorm, top: int = 0, bottom: int = 0) -> tuple[Tensor, Tensor]:
        """x [B, H, W, C] before its norm -> the gate's receptance and the value it multiplies.

        The first `top` and last `bottom` rows are read by the token shift only; the results do not have them.
        """
        projections = (self.key, self.receptance)
        if self.token_shift:
            mixes = torch.stack((self.mix_key, self.mix_receptance))
            hidden, receptance = shift_linear(x, norm, mixes, projections, top=top, bottom=bottom)
        else:
            n = norm(x[:, top : x.shape[1] - bottom])
            hidden, receptance = (projection(n) for projection in projections)
        return receptance, squared_relu_linear(hidden, self.value)

    def add_to(self, x: Tensor, norm: nn.LayerNorm, drop_path: nn.Module) -> Tensor:
        """x + drop_path(the branch's output) (see `forward`). drop_path must be fusible."""
        projections = (self.key, self.receptance, self.value)
        if self.token_shift and in_one_node(x, norm, *projections):
            parts, factors = (self.mix_key, self.mix_receptance), drop_factors(drop_path, x)
            return channel_mix(x, norm, parts, projections, residual=True, factors=factors)
        if not drops_nothing(drop_path):
            return x + drop_path(self(x, norm))
        if self.token_shift and in_tiles(x, norm, *projections):
            mixes = torch.stack((self.mix_key, self.mix_receptance))
            weights = (projection.weight for projection in projections)
            return torch.ops.sola.channel_mix(x, norm.weight, norm.bias, norm.eps, mixes, *weights)
        if not in_bands(x, norm, *projections):
            return gated_sum(x, *self.project(x, norm))
        x = x.contiguous()
        out = torch.empty_like(x)
        for band in bands(x, self.key.out_features):
            receptance, value = self.project(band.with_neighbours(x), norm, band.top, band.bottom)
            gated_sum(band.of(x), receptance, value, out=band.of(out))
        return out


def _branch(mix: nn.Module, kind: type[nn.Module], norm: nn.Module, x: Tensor) -> Any:
    """mix(norm(x)). Only an unmodified mix is passed the norm itself, which it may fuse; hooks (such as those that
    accelerate offloads weights with) and replacements are passed a tensor.
    """
    return mix(x, norm) if is_unhooked(mix, kind) else mix(norm(x))


class LinearLayer(nn.Module):
    """One letter L of a schedule."""

    def __init__(
        self,
        dim: int,
        *,
        token_shift: bool = True,
        drop_path: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.mixer = LinearMixer(dim, token_shift=token_shift, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.channel_mix = ChannelMix(dim, token_shift=token_shift, **dd)
        self.drop_path = DropPath(drop_path)

    def branch_outputs(self) -> tuple[nn.Linear, nn.Linear]:
        """The projections that end the two residual branches."""
        return self.mixer.output, self.channel_mix.value

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, H, W, C] -> the same shape, and the hidden state's read-out [B, H, W, C] for bridges."""
        fusible = is_fusible(self.drop_path)
        if fusible and is_exactly(self.mixer, LinearMixer):
            x, readout = self.mixer.add_to(x, self.norm1, self.drop_path)
        else:
            returned = _branch(self.mixer, LinearMixer, self.norm1, x)
            mixed, readout = two_results(returned, self.mixer, MIXER_RESULTS)
            x = x + self.drop_path(mixed)
        if fusible and is_exactly(self.channel_mix, ChannelMix):
            return self.channel_mix.add_to(x, self.norm2, self.drop_path), readout
        return x + self.drop_path(_branch(self.channel_mix, ChannelMix, self.norm2, x)), readout
