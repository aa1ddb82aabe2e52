# SPDX-License-Identifier: Apache-2.0
"""Image classification: cross-entropy with Mixup, CutMix and label smoothing; top-1, top-5 and the confusion matrix."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from sola_vision.data import ImageConfig
from sola_vision.engine import all_reduce_sum
from sola_vision.wording import amount


@dataclass
class Tally:
    """Counts over a labelled set, from which all its metrics are computed.

    confusion [classes, classes] counts images by (true class, predicted class); top5 counts those whose class is among
    the five highest logits; loss is the sum of the cross-entropies. Classes without images do not affect any metric.
    """

    confusion: Tensor
    top5: float = 0.0
    loss: float = 0.0

    @classmethod
    def of(cls, num_classes: int) -> "Tally":
        """Return an empty tally for `num_classes` classes."""
        return cls(torch.zeros(num_classes, num_classes, dtype=torch.long))

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits [B, classes], labels [B]."""
        num_classes = logits.shape[1]
        pairs = labels * num_classes + logits.argmax(1)
        counts = torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
        self.confusion += counts.to(self.confusion.device)
        best = logits.topk(min(5, num_classes), dim=1).indices
        self.top5 += (best == labels[:, None]).any(1).sum().item()
        self.loss += nn.functional.cross_entropy(logits.float(), labels, reduction="sum").item()

    def reduced(self, device: torch.device) -> "Tally":
        """Return the sum over all processes."""
        counts = torch.cat(
            (self.confusion.flatten().double(), torch.tensor([self.top5, self.loss], dtype=torch.float64))
        )
        # float64 holds counts exactly; MPS lacks it, and float32 is exact up to 2^24 per cell
        counts = all_reduce_sum(counts.to(device, torch.float32 if device.type == "mps" else torch.float64)).cpu()
        return Tally(counts[:-2].reshape(self.confusion.shape).long(), counts[-2].item(), counts[-1].item())

    @property
    def images(self) -> int:
        """The number of images."""
        return int(self.confusion.sum())

    @property
    def metrics(self) -> dict[str, float]:
        """top1 and top5 in percent, loss in nats, over all images."""
        n = max(1, self.images)
        return {
            "top1": 100 * self.confusion.diagonal().sum().item() / n,
            "top5": 100 * self.top5 / n,
            "loss": self.loss / n,
        }


class Classification:
    """The task of `engine.fit`: batches are (images [B, 3, H, W], labels [B])."""

    metric = "top1"

    def __init__(self, num_classes: int, image: ImageConfig) -> None:
        self.num_classes = num_classes
        top5 = {"top5": "%"} if num_classes > 5 else {}  # otherwise always 100
        self.printed = {"top1": "%", **top5, "loss": ""}
        self.mixup = None
        self.criterion: nn.Module = (
            LabelSmoothingCrossEntropy(image.smoothing) if image.smoothing else nn.CrossEntropyLoss()
        )
        if image.mixup_prob and (image.mixup or image.cutmix):
            self.mixup = Mixup(
                image.mixup,
                image.cutmix,
                prob=image.mixup_prob,
                label_smoothing=image.smoothing,
                num_classes=num_classes,
            )
            self.criterion = SoftTargetCrossEntropy()

    def check_batch(self, size: int) -> None:
        """Raise ValueError if `size` images cannot be mixed in pairs. Commands call this before they write files."""
        if self.mixup is not None and size % 2:
            raise ValueError(
                f"a batch of {amount(size, 'image')} cannot be mixed in pairs: choose an even batch size per process, "
                "or image.mixup 0 and image.cutmix 0"
            )

    def mixed(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the images and targets of a training batch, after Mixup and CutMix if enabled."""
        images, labels = batch
        if self.mixup is not None:
            self.check_batch(len(images))
            images, labels = self.mixup(images, labels)
        return images, labels

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = self.mixed(batch)
        return self.criterion(model(images).float(), labels), {}

    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        return self.tally(model, batches).metrics

    def tally(self, model: nn.Module, batches: Iterable[Any]) -> Tally:
        """Return the counts over this process's batches, summed over all processes."""
        tally = Tally.of(self.num_classes)
        device = next(model.parameters()).device
        for images, labels in batches:
            tally.add(model(images), labels)
        return tally.reduced(device)
