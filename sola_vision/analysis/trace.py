# SPDX-License-Identifier: Apache-2.0
"""Walk through a SoLA network layer by layer, and look at what each layer does: no hooks, nothing is patched.

`walk` runs the network through its public parts and yields each layer with its input and output as it goes; the
functions below take a layer and its input and say what a token reads there. For any other network,
`feature_maps` gives the maps of timm's contract under names.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sola_vision.backbone import SolaVision, Stage
from sola_vision.layers import LinearLayer, SoftmaxLayer
from sola_vision.ops import reference
from sola_vision.ops.passes import interpolated
from sola_vision.schedule import Bridge, Layer

Patch = tuple[float, float]  # height and width of a token's patch in pixels

_AT_ONCE = 2**22  # weights in float64 at a time


@dataclass(frozen=True)
class Step:
    """One layer of a network at work; tensors are [B, H, W, C]."""

    place: Layer
    layer: LinearLayer | SoftmaxLayer
    input: Tensor  # with what bridges added
    output: Tensor
    gates: tuple[tuple[Bridge, Tensor], ...]  # the gates sigmoid(x W_g) of the bridges that end here
    stride: int  # pixels between neighbouring tokens

    @property
    def kind(self) -> str:
        return "L" if isinstance(self.layer, LinearLayer) else "S"

    @property
    def name(self) -> str:
        """ "3.3 S": place as in a schedule, and letter."""
        return f"{self.place} {self.kind}"


def walk(model: SolaVision, image: Tensor, *, skip: Callable[[Layer], bool] = lambda place: False) -> Iterator[Step]:
    """Run `model` on `image` [B, 3, H, W] and yield every layer in turn.

    skip: softmax layers whose attention is left out (their MLP stays), to see what they are for.
    Gradients flow through, so that receptive fields can be taken of any layer.
    """
    x = model.position(model.stem(image))
    states: dict[Layer, Tensor] = {}
    for stage in cast("list[Stage]", list(model.stages)):
        x = stage.merge(x)
        for number, module in enumerate(stage.layers):
            place = Layer(stage.index, number)
            gates = []
            base = x
            for ends, bridge in zip(stage.bridge_ends, cast("Any", stage.bridges), strict=True):
                if ends.target == place:
                    gates.append((ends, torch.sigmoid(bridge.gate(base))))
                    x = x + bridge(base, states[ends.source])
            layer = cast("LinearLayer | SoftmaxLayer", module)
            if isinstance(layer, SoftmaxLayer) and skip(place):
                output, state = x + layer.mlp(layer.norm2(x)), None
            else:
                output, state = layer(x)
            if place in stage.carried and state is not None:
                states[place] = state
            yield Step(place, layer, x, output, tuple(gates), model.config.strides[place.stage])
            x = output


def feature_maps(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Maps [B, C, H, W] by name: every layer of a SoLA network, otherwise what the model gives by timm's contract."""
    if isinstance(model, SolaVision):
        return {step.name: step.output.permute(0, 3, 1, 2) for step in walk(model, image)}
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(
            f"{type(model).__name__} has no forward_intermediates: analysis needs timm's contract for maps"
        )
    maps = cast("Any", model).forward_intermediates(image, intermediates_only=True)
    return {f"map {number}": feature for number, feature in enumerate(maps, start=1)}


def patches(model: nn.Module, image: tuple[int, int], maps: dict[str, Tensor]) -> dict[str, Patch]:
    """The patch, in pixels (rows, columns), that a token of each of `feature_maps`' maps stands for.

    image: its (height, width). With a patch of s pixels, token t stands for the pixels from s t to s (t + 1).
    A SoLA network pads on the right and below alone: the stem with zeros up to its patch, and merging, whose 3 x 3
    windows are centred on every second token from the first, has a token for an odd last one as well. So s is the
    stride of the stage, and the last patches may reach beyond the image. (A window also reads a row above and a
    column to the left of its patch.)
    Any other network of timm's: the reduction that feature_info has for the map, if the map has as many tokens as it
    makes of the image, rounded up or down; rounded down, the last pixels lie in no patch. For other maps, and without
    feature_info, the image is divided evenly.
    """
    strides: list[int | None]
    if isinstance(model, SolaVision):
        strides = [model.config.strides[place.stage] for place in model.config.parsed_schedule.layers]
    else:
        strides = [entry.get("reduction") for entry in getattr(model, "feature_info", None) or ()]
    if len(strides) < len(maps):  # more are left of a network that was cut
        strides = [None] * len(maps)
    return {
        name: _patch(image, feature.shape[2:], s) for (name, feature), s in zip(maps.items(), strides, strict=False)
    }


def _patch(image: tuple[int, int], grid: Sequence[int], stride: int | None) -> Patch:
    if stride and all(abs(tokens * stride - pixels) < stride for tokens, pixels in zip(grid, image, strict=True)):
        return float(stride), float(stride)
    return image[0] / grid[0], image[1] / grid[1]


def nearest_token(point: tuple[float, float], patch: Patch, grid: tuple[int, int]) -> tuple[int, int]:
    """The token (row, column) of a grid whose patch a point (y, x) of the image, in pixels, lies in: see `patches`."""
    row, column = (min(max(int(p / s), 0), g - 1) for p, s, g in zip(point, patch, grid, strict=True))
    return row, column


def overlaps(pixels: int, tokens: int, patch: float) -> NDArray[np.float64]:
    """[tokens, pixels]: the part of every pixel of a row (or column) that lies in each token's patch."""
    starts, pixel = patch * np.arange(tokens)[:, None], np.arange(pixels)
    return (np.minimum(starts + patch, pixel + 1) - np.maximum(starts, pixel)).clip(0, 1)


def keys(step: Step) -> Tensor:
    """The keys k_i of a linear layer [B, N, C]."""
    assert isinstance(step.layer, LinearLayer)
    mixer, norm = step.layer.mixer, step.layer.norm1
    if mixer.token_shift:
        (x,) = interpolated(norm(step.input), mixer.mix_key[None], 0, 0)
    else:
        x = norm(step.input)
    return mixer.key(x).flatten(1, 2)


def wkv_weights(step: Step, token: tuple[int, int], channels: list[int] | None = None) -> Tensor:
    """What a linear layer really looks at: the weights of eq. 9 with which `token` (row, column) reads every token.

    [B, H, W] averaged over all channels, or [B, K, H, W] for `channels`; float64, each map sums to 1. ValueError for a
    token that the layer has not.
    """
    assert isinstance(step.layer, LinearLayer)
    height, width = step.input.shape[1:3]
    if not (0 <= token[0] < height and 0 <= token[1] < width):
        raise ValueError(f"token {token}: {step.name} has {height} x {width} tokens; rows and columns count from 0")
    key, mixer = keys(step), step.layer.mixer
    index = token[0] * width + token[1]
    row = slice(index, index + 1)
    if channels is not None:
        picked = torch.tensor(channels, device=key.device)
        read = reference.weights(mixer.decay[picked], mixer.bonus[picked], key[..., picked], row)
        return read[:, 0].transpose(1, 2).unflatten(-1, (height, width))
    # channels in chunks, so that a photograph's hundred thousand tokens fit
    step_size = max(1, _AT_ONCE // (key.shape[0] * key.shape[1]))
    mean = torch.zeros(key.shape[:2], dtype=torch.float64, device=key.device)
    for start in range(0, key.shape[-1], step_size):
        some = slice(start, start + step_size)
        mean += reference.weights(mixer.decay[some], mixer.bonus[some], key[..., some], row)[:, 0].sum(-1)
    return (mean / key.shape[-1]).unflatten(-1, (height, width))


class Reader:
    """`wkv_weights` averaged over channels, for many tokens of one image: the exponentials are taken once.

    Single precision, because a page of maps needs no more; without gradients, for which `wkv_weights` is.
    """

    @torch.no_grad()
    def __init__(self, step: Step) -> None:
        assert isinstance(step.layer, LinearLayer)
        key = keys(step)[0].double()  # [N, C]
        num_tokens = key.shape[0]
        rate = step.layer.mixer.decay.double() / num_tokens
        # the largest exponent of each channel is 0, also where the weight grows with distance (w < 0)
        fall = torch.arange(num_tokens, device=key.device)[:, None] * -rate
        self.falls = (fall - fall.amax(0)).exp().float()  # [N, C] by distance - 1
        self.content = (key - key.amax(0)).exp().float()
        self.own = (step.layer.mixer.bonus.double() - fall.amax(0)).exp().float()
        self.grid = (step.input.shape[1], step.input.shape[2])

    @torch.no_grad()
    def read(self, token: tuple[int, int]) -> Tensor:
        """[H, W], sums to 1."""
        here = token[0] * self.grid[1] + token[1]
        weights = torch.empty_like(self.content)
        torch.mul(self.content[:here], self.falls[:here].flip(0), out=weights[:here])
        weights[here] = self.content[here] * self.own
        after = len(weights) - here - 1
        torch.mul(self.content[here + 1 :], self.falls[:after], out=weights[here + 1 :])
        totals = weights.sum(0).clamp(min=torch.finfo(torch.float32).tiny)
        return (weights @ (1 / totals) / weights.shape[1]).unflatten(0, self.grid)


def attention(step: Step, token: tuple[int, int]) -> Tensor:
    """The softmax attention of `token` (row, column) over all tokens, a map a head [B, heads, H, W] that sums to 1."""
    assert isinstance(step.layer, SoftmaxLayer)
    mixer = step.layer.mixer
    height, width = step.input.shape[1:3]
    qkv = mixer.qkv(step.layer.norm1(step.input)).flatten(1, 2).unflatten(-1, (3, -1, mixer.head_dim))
    query, key = qkv[:, token[0] * width + token[1], 0], qkv[:, :, 1]  # [B, heads, d], [B, N, heads, d]
    scores = torch.einsum("bhd,bnhd->bhn", query, key) * mixer.head_dim**-0.5
    return scores.double().softmax(-1).unflatten(-1, (height, width))


def activation(feature: Tensor) -> Tensor:
    """Feature activation map: root mean square over the channels, [B, C, H, W] -> [B, H, W]; its square is energy.

    # not in the paper: Figs. 3, 6 and 7 do not say how channels become one number. This one has no sign to lose, and
    # does not depend on how a map is scaled for display.
    """
    return feature.double().pow(2).mean(1).sqrt()


def eigencam(feature: Tensor) -> Tensor:
    """EigenCAM with a defined sign: the first principal component over the tokens, [B, C, H, W] -> [B, H, W].

    A principal component has no sign of its own, and common tools leave it to the solver, which inverts half of the
    maps. Here it is positive where the features are strong: where it correlates with their energy. If the two do not
    correlate at all, its largest value is positive. ValueError for features that are not finite.
    """
    if not torch.isfinite(feature).all():
        raise ValueError("features that are not finite have no principal component: has the network diverged?")
    tokens = feature.double().flatten(2).transpose(1, 2)  # [B, N, C]
    # not in the paper: centring, without which the first component is mostly the mean feature; and the sign, below
    centred = tokens - tokens.mean(1, keepdim=True)
    if centred.shape[1] < centred.shape[2]:
        # fewer tokens than channels: the small side of the decomposition gives the projection itself
        values, vectors = torch.linalg.eigh(centred @ centred.mT)
        component = vectors[..., -1] * values[..., -1:].clamp(min=0).sqrt()
    else:
        _, vectors = torch.linalg.eigh(centred.mT @ centred)
        component = (centred @ vectors[..., -1:]).squeeze(-1)
    energy = tokens.pow(2).sum(-1)
    agreement = (component * (energy - energy.mean(1, keepdim=True))).sum(1, keepdim=True)
    norms = component.norm(dim=1, keepdim=True) * (energy - energy.mean(1, keepdim=True)).norm(dim=1, keepdim=True)
    undecided = agreement.abs() <= 1e-9 * norms
    largest = component.gather(1, component.abs().argmax(1, keepdim=True))
    sign = torch.where(undecided, largest, agreement).sign()
    sign = torch.where(sign == 0, torch.ones_like(sign), sign)
    return (component * sign).unflatten(1, feature.shape[2:])
