# SPDX-License-Identifier: Apache-2.0
"""UPerNet (Xiao et al. 2018) over a pyramid of four maps, as in mmsegmentation, with an auxiliary FCN head.

    maps at strides 4, 8, 16, 32 -> pyramid pooling (1, 2, 3, 6) on the last, 1x1 laterals, top-down sums,
    3x3 convolutions -> concatenation at stride 4 -> 3x3 fusion -> 1x1 classifier -> logits at the image size

# not in the paper: all of the head but its name. This is mmsegmentation's, with which the paper's numbers are compared;
# tests/tasks/test_upernet.py checks bit-equality with Hugging Face's port, with copied weights.
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
    """Settings of the head of a segmentation network, and of how its backbone is trained.

    Args:
        channels: channels of the head.
        dropout: dropout rate of whole channels before the classifiers, in training.
        auxiliary_channels: channels of the auxiliary head on the stride-16 map, used only in training.
        auxiliary_weight: weight of the auxiliary loss relative to the main loss; 0 = no auxiliary head.
        drop_bridges: leave out the bridges of the checkpoint that training starts from.
        frozen_stages: number of stages that, with the stem, keep their initial weights; 0 = all are trained.
        checkpointing: recompute the backbone's activations in the backward pass instead of keeping them.
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
    """image [B, 3, H, W] -> logits [B, classes, H, W]; in training a tuple with the auxiliary head's logits."""

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
        """Return timm's groups for layer-wise decay: the backbone's; the heads use the full rate."""
        return self.backbone.group_matcher("backbone")

    def no_weight_decay(self) -> set[str]:
        """Return the names of the backbone's parameters without weight decay."""
        return self.backbone.no_weight_decay("backbone")


class UPerHead(nn.Module):
    """UPerNet's head: maps [B, C_i, H_i, W_i], finest first -> logits [B, classes, H_0, W_0]."""

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
    """The auxiliary head, which supervises the third map in training: [B, C, H, W] -> logits [B, classes, H, W]."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.convolution = ConvNormAct(in_channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = _classifier(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.convolution(x)))


class ConvNormAct(nn.Sequential):
    """Convolution without bias, BatchNorm, ReLU; the size does not change."""

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
    """Return x [B, C, H, W] resized to the height and width of `like`."""
    size = (like.shape[-2], like.shape[-1])
    if x.shape[-2:] == size:
        return x
    return nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
