# SPDX-License-Identifier: Apache-2.0
"""Modifications of a built network for studies, so that the layers need no options for them.

Each function modifies a SolaVision in place, on any device; new weights are initialised like those of the network.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from sola_vision.backbone import SolaVision
from sola_vision.layers import LinearLayer, LinearMixer, SoftmaxLayer


def same_ffn(model: SolaVision) -> None:
    """Give every layer the MLP of the softmax layer, so that linear and softmax layers differ only in attention."""
    device = next(model.parameters()).device
    # a network of softmax layers only has an initialised MLP for every position
    kinds = "/".join("S" * depth for depth in model.config.parsed_schedule.depths)
    donor = SolaVision(model.config.with_changes(schedule=kinds, bridges=""), device=device)
    lenders = [layer for stage in donor.stages for layer in _layers(stage)]
    for place, (layer, lender) in enumerate(zip(_all_layers(model), lenders, strict=True)):
        if isinstance(layer, LinearLayer):
            assert isinstance(lender, SoftmaxLayer)
            _replace(model, place, _WithMlp(layer, lender.mlp))


def decay_vision_rwkv(model: SolaVision) -> None:
    """Set Vision-RWKV's "fancy" initial decay: -5 to 3 over the channels, steeper in deeper layers."""
    mixers = list(_mixers(model))
    for number, mixer in enumerate(mixers):
        depth = number / max(1, len(mixers) - 1)
        ramp = torch.linspace(0, 1, mixer.decay.shape[0], device=mixer.decay.device)
        _set(mixer.decay, -5 + 8 * ramp ** (0.7 + 1.3 * depth))


def decay_zero(model: SolaVision) -> None:
    """Set the initial decay to zero: weights depend only on the keys."""
    for mixer in _mixers(model):
        _set(mixer.decay, torch.zeros_like(mixer.decay))


def decay_negative(model: SolaVision) -> None:
    """Negate the initial decay: weights grow with distance."""
    for mixer in _mixers(model):
        _set(mixer.decay, -mixer.decay)


def order_columns(model: SolaVision) -> None:
    """Make all linear layers read the tokens column by column."""
    _transpose_every(model, 1)


def order_in_turn(model: SolaVision) -> None:
    """Make every second linear layer read the tokens column by column."""
    _transpose_every(model, 2)


def bridge_outputs(model: SolaVision) -> None:
    """Make bridges carry the output of their source layer instead of its state's read-out."""
    sources = {bridge.source for bridge in model.config.parsed_bridges.bridges}
    for place, (name, layer) in enumerate(zip(model.config.parsed_schedule.layers, _all_layers(model), strict=True)):
        if name in sources:
            _replace(model, place, _OutputAsState(layer))


CHANGES: dict[str, Callable[[SolaVision], None]] = {
    change.__name__: change
    for change in (
        same_ffn,
        decay_vision_rwkv,
        decay_zero,
        decay_negative,
        order_columns,
        order_in_turn,
        bridge_outputs,
    )
}


class _WithMlp(nn.Module):
    """A linear layer with an MLP instead of its channel mix."""

    def __init__(self, layer: LinearLayer, mlp: nn.Module) -> None:
        super().__init__()
        layer.channel_mix = _ZeroMix()  # type: ignore[assignment]  # any module that maps x to its shape
        self.layer, self.mlp = layer, mlp

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, readout = self.layer(x)
        return x + self.layer.drop_path(self.mlp(self.layer.norm2(x))), readout


class _ZeroMix(nn.Module):
    """A channel mix that outputs zero."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def add_to(self, x: Tensor, *_: nn.Module) -> Tensor:
        return x


class _Transposed(nn.Module):
    """A linear layer applied to the image with rows and columns exchanged.

    Left and right in the token shift become up and down, which only permutes groups of channels.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, readout = self.layer(x.transpose(1, 2).contiguous())
        return x.transpose(1, 2).contiguous(), readout.transpose(1, 2)


class _OutputAsState(nn.Module):
    """A layer whose output is the state that bridges read."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, _ = self.layer(x)
        return x, x


def _transpose_every(model: SolaVision, step: int) -> None:
    """Transpose the last of every `step` linear layers."""
    linear = [place for place, layer in enumerate(_all_layers(model)) if isinstance(layer, LinearLayer)]
    for place in linear[step - 1 :: step]:
        _replace(model, place, _Transposed(_all_layers(model)[place]))


def _layers(stage: nn.Module) -> Iterator[nn.Module]:
    return stage.get_submodule("layers").children()


def _all_layers(model: SolaVision) -> list[nn.Module]:
    return [layer for stage in model.stages for layer in _layers(stage)]


def _replace(model: SolaVision, place: int, layer: nn.Module) -> None:
    """Replace a layer; `place` is its index in the whole network."""
    where = model.config.parsed_schedule.layers[place]
    setattr(model.stages[where.stage].get_submodule("layers"), str(where.layer), layer)


def _mixers(model: SolaVision) -> Iterator[LinearMixer]:
    return (layer.mixer for layer in _all_layers(model) if isinstance(layer, LinearLayer))


@torch.no_grad()
def _set(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value)
