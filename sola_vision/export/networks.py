# SPDX-License-Identifier: Apache-2.0
"""Networks to export, as functions of normalised images with named outputs.

classifier          logits [B, classes]
features            stride4, stride8, ... [B, C_i, ceil(H / 4), ceil(W / 4)], ...
segmenter           logits [B, classes, H, W]
detector_pyramid    p2 ... p6 [B, channels, h, w]: a detector's backbone and feature pyramid
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Exportable(nn.Module):
    """Maps float32 images [B, 3, H, W] to a tuple of float32 tensors, which are named by `names`.

    fixed_size: (height, width) of a network that takes no other size, else None.
    dtype: data type of the computation (default: that of the weights).
    """

    def __init__(
        self,
        network: nn.Module,
        names: Sequence[str],
        call: Callable[[Any, Tensor], Sequence[Tensor]],
        fixed_size: tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.network = network.eval()
        self.names = tuple(names)
        self.fixed_size = fixed_size
        self._call = call
        self._dtype = dtype or next(network.parameters()).dtype

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.float() for x in self._call(self.network, images.to(self._dtype)))

    @property
    def channels(self) -> int:
        """The number of channels of an image."""
        return next(p.shape[1] for p in self.network.parameters() if p.ndim == 4 and p.shape[0] != 1)

    @property
    def outputs(self) -> dict[str, str]:
        """The names of the outputs with their shapes, such as [batch, 48, height/4, width/4], rounded up."""
        height, width = self.fixed_size or (128, 192)
        with torch.inference_mode():
            results = self(torch.zeros(1, self.channels, height, width))

        def described(result: Tensor) -> str:
            sides = list(map(str, result.shape[1:]))
            if self.fixed_size is None and result.ndim == 4:
                rows, columns = result.shape[2:]
                sides[1:] = _share("height", height // rows), _share("width", width // columns)
            return f"[batch, {', '.join(sides)}]"

        return {name: described(result) for name, result in zip(self.names, results, strict=True)}

    def prepared(self, dtype: torch.dtype) -> "Exportable":
        """Return a copy that computes in `dtype` and can be traced for images of any size."""
        network = copy.deepcopy(self.network).requires_grad_(False).to(dtype)
        for module in list(network.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size not in (1, (1, 1)):
                    setattr(module, name, _AveragePool(child.output_size))
        return Exportable(network, self.names, self._call, self.fixed_size, dtype)


def _share(side: str, stride: int) -> str:
    return side if stride == 1 else f"{side}/{stride}"


def classifier(model: nn.Module, fixed_size: tuple[int, int] | None = None) -> Exportable:
    """Return a classifier with its logits as output."""
    return Exportable(copy.deepcopy(model), ["logits"], lambda network, images: [network(images)], fixed_size)


def features(model: nn.Module, fixed_size: tuple[int, int] | None = None) -> Exportable:
    """Return a hierarchical network, sola_* or another of timm, without head and with its feature maps as outputs.

    Raises ValueError for a network without feature maps at several strides.
    """
    info: Any = getattr(model, "feature_info", ())
    strides = [level["reduction"] for level in info]
    if not strides or len(set(strides)) < len(strides) or not hasattr(model, "forward_intermediates"):
        raise ValueError(f"{type(model).__name__} has no feature maps at several strides: export it as a classifier")
    backbone: Any = copy.deepcopy(model)
    backbone.prune_intermediate_layers(list(range(len(strides))), prune_norm=True)

    def call(network: Any, images: Tensor) -> list[Tensor]:
        return network.forward_intermediates(images, indices=len(strides), intermediates_only=True)

    return Exportable(backbone, [f"stride{stride}" for stride in strides], call, fixed_size)


def segmenter(model: nn.Module) -> Exportable:
    """Return a segmentation network with the logits of every pixel as output."""
    return Exportable(copy.deepcopy(model), ["logits"], lambda network, images: [network(images)])


def detector_pyramid(backbone: nn.Module) -> Exportable:
    """Return the part of a detector that is the same for every image: its backbone and feature pyramid."""
    return Exportable(
        copy.deepcopy(backbone), [f"p{level}" for level in range(2, 7)], lambda net, images: list(net(images).values())
    )


class _AveragePool(nn.Module):
    """nn.AdaptiveAvgPool2d as two matrix products: exporters support it for fixed sizes only."""

    def __init__(self, output_size: Any) -> None:
        super().__init__()
        self.size = output_size if isinstance(output_size, tuple) else (output_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        return _means(self.size[0], x.shape[-2], x) @ x @ _means(self.size[1], x.shape[-1], x).mT


def _means(count: int, length: int, like: Tensor) -> Tensor:
    """Return [count, length]: row i averages positions floor(i length / count) up to ceil((i + 1) length / count)."""
    first = torch.arange(count, device=like.device)[:, None] * length
    position = torch.arange(length, device=like.device) * count
    inside = ((position > first - count) & (position < first + length)).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)
