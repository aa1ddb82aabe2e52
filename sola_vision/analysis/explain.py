# SPDX-License-Identifier: Apache-2.0
"""All maps of a network for one image and one point, as arrays: the data that `sola explain` draws and saves.

`explain` returns one view per layer, in order; `arrays` flattens them for `numpy.savez`, under names such as
"3.3 S/attention".
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sola_vision.analysis.interaction import spread
from sola_vision.analysis.trace import (
    Patch,
    Reader,
    Step,
    activation,
    attention,
    eigencam,
    feature_maps,
    nearest_token,
    overlaps,
    patches,
    walk,
    wkv_weights,
)
from sola_vision.backbone import SolaVision
from sola_vision.layers import LinearLayer

Array = NDArray[np.float64]

_SIDE = 32  # the largest side, in tokens, of a map in page.html
_KNOWN = 12  # the largest number of rows (and columns) of tokens whose maps page.html contains, per layer
_BUDGET = 2e9  # the largest number of weights computed for all of these maps together


@dataclass(frozen=True)
class LayerView:
    """The maps of one layer, [h, w] each, on the layer's grid of tokens.

    Map and image share their upper left corner. If `patch` times the grid exceeds the image, the image ends within the
    last tokens.
    """

    name: str
    activation: Array
    eigencam: Array
    token: tuple[int, int]  # (row, column) of the token at the chosen point
    patch: Patch  # a token's patch in pixels (rows, columns)
    reads: Array | None = None  # the weights with which that token reads, averaged over channels or heads; sums to 1
    examples: dict[str, Array] = field(default_factory=dict)  # the same for single channels or heads, by name
    gates: dict[str, Array] = field(default_factory=dict)  # the gates of bridges that end here, averaged over channels
    elsewhere: NDArray[np.uint8] | None = None  # [tokens, h, w], `reads` of other tokens for a page, see `encode`
    known: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # the rows and the columns of those tokens, a grid

    def numbers(self, image: tuple[int, int]) -> dict[str, float]:
        """Return numbers that summarise the maps: distances in pixels of the image, areas and weights in per cent."""
        energy, covers = self.activation**2, self.covers(image)
        values = {
            "activation_area": 100 * effective_area(energy, covers),
            "activation_smoothness": smoothness(self.activation),
        }
        if self.reads is not None:
            rows, columns = spread(self.reads, *self.token)
            values |= {
                "read_area": 100 * effective_area(self.reads, covers),
                "read_own": 100 * float(self.reads[self.token]),
                # distances between tokens are multiples of the patch, also if the last one exceeds the image
                "read_rows": rows * self.patch[0],
                "read_columns": columns * self.patch[1],
            }
        return values

    def covers(self, image: tuple[int, int]) -> Array:
        """Return [h, w], the fraction of the image (height, width) that each token's patch covers."""
        down, across = (
            overlaps(*sides).sum(1) / sides[0] for sides in zip(image, self.activation.shape, self.patch, strict=True)
        )
        return np.outer(down, across)

    def middle(self, image: tuple[int, int]) -> tuple[float, float]:
        """Return (y, x) in pixels, the middle of the part of the chosen token's patch that lies within the image."""
        y, x = ((t * s + min((t + 1) * s, side)) / 2 for t, s, side in zip(self.token, self.patch, image, strict=True))
        return y, x


def effective_area(weights: Array, covers: Array | None = None) -> float:
    """Return the fraction of the image that a map is spread over: exp(entropy) / N; 1 for a uniform map.

    covers: the fraction of the image that each token covers, the result for a map of that token alone; default 1 / N.
    """
    covers = np.full(weights.shape, 1 / weights.size) if covers is None else covers
    mass = weights * covers
    some = mass > 0
    share = mass[some] / mass.sum()
    return float(np.exp(-(share * np.log(share / covers[some])).sum()))


def smoothness(values: Array) -> float:
    """Return the correlation of a map with itself shifted by one token: 0 for noise, close to 1 for large shapes."""
    pairs = [(values[:, :-1], values[:, 1:]), (values[:-1], values[1:])]
    left = np.concatenate([a.ravel() for a, _ in pairs])
    right = np.concatenate([b.ravel() for _, b in pairs])
    if not left.size or left.std() == 0 or right.std() == 0:
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])


@torch.inference_mode()
def explain(
    model: nn.Module, image: Tensor, point: tuple[float, float] | None = None, *, elsewhere: bool = False
) -> list[LayerView]:
    """Return a view of every layer for a normalised image [3, H, W] and a point (y, x) in pixels (default: centre).

    elsewhere: include the maps of other tokens, which page.html shows on a click.
    For networks other than SolaVision the views have only activation and EigenCAM, of the maps that timm's
    `forward_intermediates` returns. Raise ValueError for a point outside the image.
    """
    size = (image.shape[-2], image.shape[-1])
    at = point or (size[0] / 2, size[1] / 2)
    if not all(0 <= p < s for p, s in zip(at, size, strict=True)):
        raise ValueError(f"point x={at[1]:g}, y={at[0]:g} lies outside the image of {size[1]} x {size[0]} pixels")
    if not isinstance(model, SolaVision):
        maps = feature_maps(model, image[None])
        return [
            LayerView(name, *_static_maps(maps[name]), nearest_token(at, patch, _grid(maps[name])), patch)
            for name, patch in patches(model, size, maps).items()
        ]
    side = tokens_a_side(model, size) if elsewhere else 0
    return [_view(step, at, side) for step in walk(model, image[None])]


def tokens_a_side(model: SolaVision, size: tuple[int, int]) -> int:
    """Return the number of rows (and columns) of tokens per layer in page.html: 12, fewer for large images.

    The limit keeps computing their maps to seconds.
    """
    tokens = size[0] * size[1] / model.config.patch_size**2
    schedule = model.config.parsed_schedule.stages
    layers = sum(s.count("L") * d / 4**i for i, (s, d) in enumerate(zip(schedule, model.config.dims, strict=True)))
    return int(min(_KNOWN, max(2.0, (_BUDGET / max(1.0, tokens * layers)) ** 0.5)))


def _spread_out(count: int, side: int) -> tuple[int, ...]:
    """Return `side` evenly spaced indices below `count`, or all of them if there are not more."""
    return tuple(range(count)) if count <= side else tuple((2 * i + 1) * count // (2 * side) for i in range(side))


def arrays(views: list[LayerView]) -> dict[str, Array]:
    """Flatten the views to arrays by name, for `numpy.savez(file, **arrays(views))`."""
    flat: dict[str, Array] = {}
    for view in views:
        flat |= {f"{view.name}/activation": view.activation, f"{view.name}/eigencam": view.eigencam}
        flat[f"{view.name}/token"], flat[f"{view.name}/patch"] = np.array(view.token), np.array(view.patch)
        if view.reads is not None:
            kind = "wkv" if view.name.endswith("L") else "attention"
            flat[f"{view.name}/{kind}"] = view.reads
            flat |= {f"{view.name}/{kind} {name}": read for name, read in view.examples.items()}
        flat |= {f"{view.name}/gate {name}": gate for name, gate in view.gates.items()}
    return flat


def encode(reads: Tensor) -> NDArray[np.uint8]:
    """Encode a map that sums to 1 as bytes, at most 32 x 32: 0 to 255 for 0.01 to 100 times the uniform weight."""
    height, width = reads.shape
    pooled = nn.functional.adaptive_avg_pool2d(reads[None].double(), (min(_SIDE, height), min(_SIDE, width)))[0]
    times_uniform = pooled * reads.numel()
    return np.rint(255 * (times_uniform.clamp(1e-2, 1e2).log10().numpy() + 2) / 4).astype(np.uint8)


def _static_maps(feature: Tensor) -> tuple[Array, Array]:
    return activation(feature)[0].cpu().numpy(), eigencam(feature)[0].cpu().numpy()


def _grid(feature: Tensor) -> tuple[int, int]:
    return feature.shape[2], feature.shape[3]


def _view(step: Step, at: tuple[float, float], side: int) -> LayerView:
    feature = step.output.permute(0, 3, 1, 2)
    grid, patch = _grid(feature), (float(step.stride), float(step.stride))
    token = nearest_token(at, patch, grid)
    maps = _static_maps(feature)
    gates = {str(bridge): gate[0].double().mean(-1).cpu().numpy() for bridge, gate in step.gates}
    known = _spread_out(grid[0], side), _spread_out(grid[1], side)
    tokens = [(row, column) for row in known[0] for column in known[1]]
    if isinstance(step.layer, LinearLayer):
        reads = wkv_weights(step, token)[0]
        channels = _channels(step.layer)
        single = wkv_weights(step, token, list(channels.values()))[0]
        reader = Reader(step) if tokens else None
        elsewhere = [encode(reader.read(t)) for t in tokens] if reader else []
    else:
        single = attention(step, token)[0]
        reads = single.mean(0)
        channels = {f"head {h + 1}": h for h in range(min(3, len(single)))}
        elsewhere = [encode(attention(step, t)[0].mean(0)) for t in tokens]
    examples = {name: one.cpu().numpy() for name, one in zip(channels, single, strict=False)}
    return LayerView(
        step.name,
        *maps,
        token,
        patch,
        reads=reads.cpu().numpy(),
        examples=examples,
        gates=gates,
        elsewhere=np.stack(elsewhere) if elsewhere else None,
        known=known,
    )


def _channels(layer: LinearLayer) -> dict[str, int]:
    """Return the channels with the slowest, median and fastest decay of a layer, by name."""
    order = layer.mixer.decay.float().argsort().tolist()
    picked = {order[0]: "slowest", order[len(order) // 2]: "median", order[-1]: "fastest"}
    decay = layer.mixer.decay.float()
    return {f"channel {c}, w {float(decay[c]):.1f}": c for c in picked}
