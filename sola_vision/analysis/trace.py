# SPDX-License-Identifier: Apache-2.0
"""Run a SoLA network layer by layer and inspect each layer, without hooks or patching.

`walk` runs the network through its public modules and yields each layer with its input and output; `wkv_weights` and
`attention` return the weights with which a token reads the others in such a layer. For any other network,
`feature_maps` returns the maps of timm's `forward_intermediates` by name.
"""

from collections.abc import Iterator, Sequence
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

_CHUNK = 2**22  # float64 weights computed at a time


@dataclass(frozen=True)
class Step:
    """One layer of a network with its input and output, [B, H, W, C]."""

    place: Layer
    layer: LinearLayer | SoftmaxLayer
    input: Tensor  # including the outputs of bridges
    output: Tensor
    gates: tuple[tuple[Bridge, Tensor], ...]  # the gates sigmoid(x W_g) of the bridges that end here
    stride: int  # pixels between neighbouring tokens

    @property
    def kind(self) -> str:
        """ "L" for a linear layer, "S" for a softmax layer."""
        return "L" if isinstance(self.layer, LinearLayer) else "S"

    @property
    def name(self) -> str:
        """The position and the letter, such as "3.3 S"."""
        return f"{self.place} {self.kind}"


def walk(model: SolaVision, image: Tensor, *, without_softmax: bool = False) -> Iterator[Step]:
    """Run `model` on `image` [B, 3, H, W] and yield every layer in order.

    without_softmax: skip the attention of softmax layers (their MLP is kept), to measure its effect.
    Gradients are recorded, so that receptive fields of any layer can be computed.
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
            if isinstance(layer, SoftmaxLayer) and without_softmax:
                output, state = x + layer.mlp(layer.norm2(x)), None
            else:
                output, state = layer(x)
            if place in stage.carried and state is not None:
                states[place] = state
            yield Step(place, layer, x, output, tuple(gates), model.config.strides[place.stage])
            x = output


def feature_maps(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Return maps [B, C, H, W] by name: of every layer of a SoLA network, else those of `forward_intermediates`."""
    if isinstance(model, SolaVision):
        return {step.name: step.output.permute(0, 3, 1, 2) for step in walk(model, image)}
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(
            f"{type(model).__name__} has no forward_intermediates: analysis needs timm's contract for maps"
        )
    maps = cast("Any", model).forward_intermediates(image, intermediates_only=True)
    return {f"map {number}": feature for number, feature in enumerate(maps, start=1)}


def patches(model: nn.Module, image: tuple[int, int], maps: dict[str, Tensor]) -> dict[str, Patch]:
    """Return the size of a token's patch in pixels (rows, columns) for each map of `feature_maps`.

    image: (height, width). With a patch of s pixels, token t represents the pixels from s t to s (t + 1).
    A SoLA network pads only on the right and at the bottom: the stem with zeros to a multiple of its patch; merging,
    whose 3 x 3 windows are centred on every second token from the first, also has a token for an odd last one. So s is
    the stride of the stage, and the last patches may extend beyond the image. (A window also reads a row above and a
    column to the left of its patch.)
    For other timm networks s is the reduction in feature_info, if the map has the number of tokens that follows from
    it, rounded up or down; if rounded down, the last pixels belong to no patch. For other maps, and without
    feature_info, the image is divided evenly.
    """
    strides: list[int | None]
    if isinstance(model, SolaVision):
        strides = [model.config.strides[place.stage] for place in model.config.parsed_schedule.layers]
    else:
        strides = [entry.get("reduction") for entry in getattr(model, "feature_info", None) or ()]
    if len(strides) < len(maps):  # more entries than maps are valid: a pruned network keeps all of them
        strides = [None] * len(maps)
    return {
        name: _patch(image, feature.shape[2:], s) for (name, feature), s in zip(maps.items(), strides, strict=False)
    }


def _patch(image: tuple[int, int], grid: Sequence[int], stride: int | None) -> Patch:
    if stride and all(abs(tokens * stride - pixels) < stride for tokens, pixels in zip(grid, image, strict=True)):
        return float(stride), float(stride)
    return image[0] / grid[0], image[1] / grid[1]


def nearest_token(point: tuple[float, float], patch: Patch, grid: tuple[int, int]) -> tuple[int, int]:
    """Return the token (row, column) of a grid whose patch (see `patches`) contains a point (y, x) in pixels."""
    row, column = (min(max(int(p / s), 0), g - 1) for p, s, g in zip(point, patch, grid, strict=True))
    return row, column


def overlaps(pixels: int, tokens: int, patch: float) -> NDArray[np.float64]:
    """Return [tokens, pixels], the fraction of every pixel of a row (or column) that lies in each token's patch."""
    starts, pixel = patch * np.arange(tokens)[:, None], np.arange(pixels)
    return (np.minimum(starts + patch, pixel + 1) - np.maximum(starts, pixel)).clip(0, 1)


def keys(step: Step) -> Tensor:
    """Return the keys k_i of a linear layer [B, N, C]."""
    assert isinstance(step.layer, LinearLayer)
    mixer, norm = step.layer.mixer, step.layer.norm1
    if mixer.token_shift:
        (x,) = interpolated(norm(step.input), mixer.mix_key[None], 0, 0)
    else:
        x = norm(step.input)
    return mixer.key(x).flatten(1, 2)


def wkv_weights(step: Step, token: tuple[int, int], channels: list[int] | None = None) -> Tensor:
    """Return the weights of eq. 9 with which `token` (row, column) of a linear layer reads every token.

    [B, H, W] averaged over all channels, or [B, K, H, W] for `channels`; float64, each map sums to 1. Raise ValueError
    for a token outside the layer's grid.
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
    # in chunks of channels, to bound memory for the hundred thousand tokens of a photograph
    step_size = max(1, _CHUNK // (key.shape[0] * key.shape[1]))
    mean = torch.zeros(key.shape[:2], dtype=torch.float64, device=key.device)
    for start in range(0, key.shape[-1], step_size):
        some = slice(start, start + step_size)
        mean += reference.weights(mixer.decay[some], mixer.bonus[some], key[..., some], row)[:, 0].sum(-1)
    return (mean / key.shape[-1]).unflatten(-1, (height, width))


class Reader:
    """`wkv_weights` averaged over channels, for many tokens of one image: exponentials are computed only once.

    In single precision, which is enough for maps, and without gradients (use `wkv_weights` for these).
    """

    @torch.no_grad()
    def __init__(self, step: Step) -> None:
        assert isinstance(step.layer, LinearLayer)
        key = keys(step)[0].double()  # [N, C]
        num_tokens = key.shape[0]
        rate = step.layer.mixer.decay.double() / num_tokens
        # shift the largest exponent of each channel to 0, also if the weight grows with distance (w < 0)
        fall = torch.arange(num_tokens, device=key.device)[:, None] * -rate
        self.falls = (fall - fall.amax(0)).exp().float()  # [N, C] by distance - 1
        self.content = (key - key.amax(0)).exp().float()
        self.own = (step.layer.mixer.bonus.double() - fall.amax(0)).exp().float()
        self.grid = (step.input.shape[1], step.input.shape[2])

    @torch.no_grad()
    def read(self, token: tuple[int, int]) -> Tensor:
        """Return the weights [H, W] with which `token` (row, column) reads every token; they sum to 1."""
        here = token[0] * self.grid[1] + token[1]
        weights = torch.empty_like(self.content)
        torch.mul(self.content[:here], self.falls[:here].flip(0), out=weights[:here])
        weights[here] = self.content[here] * self.own
        after = len(weights) - here - 1
        torch.mul(self.content[here + 1 :], self.falls[:after], out=weights[here + 1 :])
        totals = weights.sum(0).clamp(min=torch.finfo(torch.float32).tiny)
        return (weights @ (1 / totals) / weights.shape[1]).unflatten(0, self.grid)


def attention(step: Step, token: tuple[int, int]) -> Tensor:
    """Return the softmax attention of `token` (row, column), [B, heads, H, W]; the map of each head sums to 1."""
    assert isinstance(step.layer, SoftmaxLayer)
    mixer = step.layer.mixer
    height, width = step.input.shape[1:3]
    qkv = mixer.qkv(step.layer.norm1(step.input)).flatten(1, 2).unflatten(-1, (3, -1, mixer.head_dim))
    query, key = qkv[:, token[0] * width + token[1], 0], qkv[:, :, 1]  # [B, heads, d], [B, N, heads, d]
    scores = torch.einsum("bhd,bnhd->bhn", query, key) * mixer.head_dim**-0.5
    return scores.double().softmax(-1).unflatten(-1, (height, width))


def activation(feature: Tensor) -> Tensor:
    """Return the feature activation map, the root mean square over channels: [B, C, H, W] -> [B, H, W].

    Its square is called energy.

    # not in the paper: how Figs. 3, 6 and 7 reduce channels to one number. The root mean square has no sign to lose
    # and does not depend on how a map is scaled for display.
    """
    return feature.double().pow(2).mean(1).sqrt()


def eigencam(feature: Tensor) -> Tensor:
    """Return EigenCAM, the first principal component over the tokens, with a defined sign: [B, C, H, W] -> [B, H, W].

    The sign of a principal component is arbitrary; common implementations leave it to the solver, which inverts half of
    the maps. Here the map correlates positively with the energy of the features; if there is no correlation, its
    largest absolute value is positive. Raise ValueError for features that are not finite.
    """
    if not torch.isfinite(feature).all():
        raise ValueError("features that are not finite have no principal component: has the network diverged?")
    tokens = feature.double().flatten(2).transpose(1, 2)  # [B, N, C]
    # not in the paper: centring, without which the first component is mostly the mean feature; and the sign, below
    centred = tokens - tokens.mean(1, keepdim=True)
    if centred.shape[1] < centred.shape[2]:
        # fewer tokens than channels: the smaller Gram matrix gives the projection directly
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
