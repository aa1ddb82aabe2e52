# SPDX-License-Identifier: Apache-2.0
"""UPerNet (Xiao et al. 2018) over a pyramid of four maps, as mmsegmentation has it, with an auxiliary FCN head.

    maps at strides 4, 8, 16, 32 -> pyramid pooling (1, 2, 3, 6) on the last, 1x1 laterals, top-down sums,
    3x3 convolutions -> all at stride 4, side by side -> 3x3 fusion -> 1x1 classifier -> logits at the image's size

# not in the paper: all of the head but its name. mmsegmentation's is what the paper's numbers are compared with;
# tests/tasks/test_upernet.py holds it to Hugging Face's port with copied weights, to the last bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sola_vision.tasks.pyramid import Pyramid

_POOLS = (1, 2, 3, 6)


@dataclass(kw_only=True)
class UPerNetConfig:
    """The head of a segmentation network, and how it treats its backbone.

    Args:
        channels: width of the head.
        dropout: of whole channels before the classifiers, while training.
        auxiliary_channels: width of the auxiliary head on the stride-16 map, which only trains.
        auxiliary_weight: of its loss beside the main one; 0 = no auxiliary head.
        drop_bridges: start from a checkpoint with bridges although this network has none; they are left out.
        frozen_stages: stages of the backbone whose weights stay as they are, the stem with them.
        checkpointing: compute the backbone's layers again in the backward pass instead of keeping what they made.
    """

    channels: int = 512
    dropout: float = 0.1
    auxiliary_channels: int = 256
    auxiliary_weight: float = 0.4
    drop_bridges: bool = False
    frozen_stages: int = 0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("channels", "auxiliary_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        if not self.auxiliary_weight >= 0:
            raise ValueError(f"auxiliary_weight={self.auxiliary_weight} must not be negative")


class UPerNet(nn.Module):
    """image [B, 3, H, W] -> logits [B, classes, H, W]; while training also the auxiliary head's, in a tuple."""

    def __init__(self, body: nn.Module, num_classes: int, config: UPerNetConfig) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = Pyramid(body)
        if config.frozen_stages:
            self.backbone.freeze(config.frozen_stages)
        if config.checkpointing:
            self.backbone.set_grad_checkpointing()
        channels = self.backbone.channels
        self.head = UPerHead(channels, config.channels, num_classes, config.dropout)
        self.auxiliary = (
            FCNHead(channels[2], config.auxiliary_channels, num_classes, config.dropout)
            if config.auxiliary_weight
            else None
        )

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        maps = self.backbone(image)
        logits = _resized(self.head(maps), image)
        if self.training and self.auxiliary is not None:
            return logits, _resized(self.auxiliary(maps[2]), image)
        return logits

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return self.backbone.group_matcher("backbone")

    def no_weight_decay(self) -> set[str]:
        return self.backbone.no_weight_decay("backbone")


class UPerHead(nn.Module):
    """Maps [B, C_i, H_i, W_i], finest first -> logits [B, classes, H_0, W_0]."""

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        *finer, coarsest = in_channels
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), ConvNormAct(coarsest, channels, 1)) for size in _POOLS
        )
        self.bottleneck = ConvNormAct(coarsest + len(_POOLS) * channels, channels, 3)
        self.laterals = nn.ModuleList(ConvNormAct(count, channels, 1) for count in finer)
        self.smooth = nn.ModuleList(ConvNormAct(channels, channels, 3) for _ in finer)
        self.fuse = ConvNormAct(len(in_channels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = _classifier(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *finer, coarsest = maps
        pooled = [_resized(pool(coarsest), coarsest) for pool in self.pools]
        top = self.bottleneck(torch.cat([coarsest, *pooled], dim=1))
        levels = [lateral(x) for lateral, x in zip(self.laterals, finer, strict=True)] + [top]
        for index in range(len(levels) - 1, 0, -1):
            levels[index - 1] = levels[index - 1] + _resized(levels[index], levels[index - 1])
        smoothed = [smooth(x) for smooth, x in zip(self.smooth, levels, strict=False)] + [top]
        together = torch.cat([_resized(x, smoothed[0]) for x in smoothed], dim=1)
        return self.classifier(self.dropout(self.fuse(together)))


class FCNHead(nn.Module):
    """One map [B, C, H, W] -> logits [B, classes, H, W]; while training it makes the backbone's middle tell classes."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.convolution = ConvNormAct(in_channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = _classifier(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.convolution(x)))


class ConvNormAct(nn.Sequential):
    """Convolution without bias, BatchNorm, ReLU, at the same size."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")


def _classifier(channels: int, num_classes: int) -> nn.Conv2d:
    classifier = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(classifier.weight, std=0.01)
    assert classifier.bias is not None
    nn.init.zeros_(classifier.bias)
    return classifier


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """x [B, C, H, W] at the height and width of `like`."""
    size = (like.shape[-2], like.shape[-1])
    if x.shape[-2:] == size:
        return x
    return nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
