# SPDX-License-Identifier: Apache-2.0
"""Changes that a study makes to a network after it was built, so that the layers need no option for them.

Each takes a SolaVision, on any device, and changes it in place; the weights it brings are drawn as the network's own.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from sola_vision.backbone import SolaVision
from sola_vision.layers import LinearLayer, LinearMixer


def same_ffn(model: SolaVision) -> None:
    """Every layer's second half is the softmax layer's MLP: linear and softmax layers differ in attention alone."""
    device = next(model.parameters()).device
    # a network of softmax layers alone has one for every place, initialised as it has to be
    kinds = "/".join("S" * depth for depth in model.config.parsed_schedule.depths)
    donor = SolaVision(model.config.with_changes(schedule=kinds, bridges=""), device=device)
    for stage, lending in zip(model.stages, donor.stages, strict=True):
        for layer, lender in zip(_layers(stage), _layers(lending), strict=True):
            if isinstance(layer, LinearLayer):
                layer.channel_mix = lender.mlp  # type: ignore[assignment]


def decay_vision_rwkv(model: SolaVision) -> None:
    """Vision-RWKV's "fancy" start: -5 to 3 over the channels, steeper in deeper layers."""
    mixers = list(_mixers(model))
    for number, mixer in enumerate(mixers):
        depth = number / max(1, len(mixers) - 1)
        ramp = torch.linspace(0, 1, mixer.decay.shape[0], device=mixer.decay.device)
        _set(mixer.decay, -5 + 8 * ramp ** (0.7 + 1.3 * depth))


def decay_zero(model: SolaVision) -> None:
    """No decay at the start: all tokens weigh by their keys alone."""
    for mixer in _mixers(model):
        _set(mixer.decay, torch.zeros_like(mixer.decay))


def decay_negative(model: SolaVision) -> None:
    """The network's own rates with the other sign: weight grows with distance."""
    for mixer in _mixers(model):
        _set(mixer.decay, -mixer.decay)


def order_columns(model: SolaVision) -> None:
    """Linear layers read the tokens column by column."""
    for layer in _linear_layers(model):
        layer.mixer = _Transposed(layer.mixer)  # type: ignore[assignment]


def order_in_turn(model: SolaVision) -> None:
    """Of the linear layers, every second one reads the tokens column by column."""
    for number, layer in enumerate(_linear_layers(model)):
        if number % 2:
            layer.mixer = _Transposed(layer.mixer)  # type: ignore[assignment]


def bridge_outputs(model: SolaVision) -> None:
    """Bridges carry the output of the layer they start at instead of its state's read-out."""
    for stage in model.stages:
        layers = stage.get_submodule("layers")
        for place in getattr(stage, "carried"):  # noqa: B009 - to mypy a stage is any module
            if place.stage == getattr(stage, "index"):  # noqa: B009
                setattr(layers, str(place.layer), _OutputAsState(layers.get_submodule(str(place.layer))))


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


class _Transposed(nn.Module):
    """A mixer that sees the image with rows and columns exchanged.

    The token shift's left and right become above and below, which renames groups of channels and changes nothing else.
    """

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mixed, readout = self.mixer(x.transpose(1, 2).contiguous())
        return mixed.transpose(1, 2), readout.transpose(1, 2)


class _OutputAsState(nn.Module):
    """A layer that hands its output to bridges."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, _ = self.layer(x)
        return x, x


def _layers(stage: nn.Module) -> Iterator[nn.Module]:
    return stage.get_submodule("layers").children()


def _linear_layers(model: SolaVision) -> list[LinearLayer]:
    return [layer for stage in model.stages for layer in _layers(stage) if isinstance(layer, LinearLayer)]


def _mixers(model: SolaVision) -> Iterator[LinearMixer]:
    return (layer.mixer for layer in _linear_layers(model))


@torch.no_grad()
def _set(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value)
