# SPDX-License-Identifier: Apache-2.0
"""Semantic segmentation: cross-entropy of the head and the auxiliary head; one confusion matrix over the whole set.

Intersection over union is computed once from the pixels of all images, not as a mean over images. It is undefined for
a class that is neither in the truth nor predicted: `miou` is the mean over the other classes (as in mmsegmentation and
most papers), `miou_all` counts it as 0 (as in ADE20K's official script). Both are equal if every class occurs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sola_vision.data import IGNORED
from sola_vision.engine import all_reduce_sum
from sola_vision.tasks.inference import Inference


@dataclass
class PixelCounts:
    """Pixels by (true class, predicted class), [classes, classes + 1]; the last column holds pixels without a class.

    Pixels whose truth is IGNORED are not counted.
    """

    confusion: Tensor

    @classmethod
    def of(cls, num_classes: int) -> "PixelCounts":
        """Return empty counts for `num_classes` classes."""
        return cls(torch.zeros(num_classes, num_classes + 1, dtype=torch.long))

    def add(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """Add predicted and true classes; a prediction may be IGNORED (no class). Return the counts that were added."""
        num_classes = len(self.confusion)
        counted = truth != IGNORED
        columns = torch.where(predicted == IGNORED, num_classes, predicted.long())[counted]
        pairs = truth.long()[counted] * (num_classes + 1) + columns
        counts = torch.bincount(pairs, minlength=self.confusion.numel()).reshape(self.confusion.shape).cpu()
        self.confusion += counts
        return counts

    def reduced(self, device: torch.device) -> "PixelCounts":
        """Return the sum over all processes, in integers, because float32 cannot count that many pixels exactly."""
        return PixelCounts(all_reduce_sum(self.confusion.to(device)).cpu())

    @property
    def pixels(self) -> NDArray[np.int64]:
        """The number of pixels of each class in the truth."""
        return self.confusion.sum(1).numpy()

    @property
    def iou(self) -> NDArray[np.float64]:
        """Intersection over union of each class, from 0 to 1; nan for a class neither in the truth nor predicted."""
        correct, predicted = self._correct, self.confusion[:, :-1].sum(0).numpy()
        return _divided(correct, self.pixels + predicted - correct)

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """The share of each class's pixels that are predicted correctly; nan for a class not in the truth."""
        return _divided(self._correct, self.pixels)

    @property
    def precision(self) -> NDArray[np.float64]:
        """The share of the pixels predicted as a class that belong to it; nan for a class never predicted."""
        return _divided(self._correct, self.confusion[:, :-1].sum(0).numpy())

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics in percent: miou and mean_accuracy over the classes that have a value, miou_all with 0 for others."""
        iou, accuracy = self.iou, self.accuracy
        return {
            "miou": 100 * _mean(iou[~np.isnan(iou)]),
            "miou_all": 100 * _mean(np.nan_to_num(iou)),
            "mean_accuracy": 100 * _mean(accuracy[~np.isnan(accuracy)]),
            "pixel_accuracy": 100 * _mean(_divided(self._correct.sum(keepdims=True), self.pixels.sum(keepdims=True))),
            "classes_present": float((~np.isnan(iou)).sum()),
        }

    @property
    def _correct(self) -> NDArray[np.int64]:
        return self.confusion.diagonal().numpy()


class Segmentation:
    """The task of `engine.fit`: training batches are (images [B, 3, H, W], classes [B, H, W]), evaluation batches
    lists of (image [3, H, W], classes [h, w]), where the classes keep the size of their file.
    """

    metric = "miou"

    def __init__(self, num_classes: int, auxiliary_weight: float = 0.4, inference: Inference | None = None) -> None:
        self.num_classes = num_classes
        percentages = ("miou", "miou_all", "mean_accuracy", "pixel_accuracy")
        self.printed = {**dict.fromkeys(percentages, "%"), "classes_present": ""}
        self.auxiliary_weight = auxiliary_weight
        self.inference = inference or Inference()

    def check_batch(self, size: int) -> None:
        """Raise ValueError if a batch is too small for BatchNorm. Commands call this before they write files."""
        if size < 2:
            raise ValueError(
                f"batch size per process must be at least 2 for BatchNorm in UPerNet's 1x1 pooling (got {size}); "
                "raise train.batch_size or lower train.accumulate"
            )

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        images, classes = batch
        outputs = model(images)
        if isinstance(outputs, Tensor):
            return _cross_entropy(outputs, classes), {}
        main, auxiliary = (_cross_entropy(logits, classes) for logits in outputs)
        return main + self.auxiliary_weight * auxiliary, {"main": main, "auxiliary": auxiliary}

    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        return self.count(model, batches).metrics

    def count(self, model: nn.Module, batches: Iterable[Any]) -> PixelCounts:
        """Return the pixel counts over this process's batches, summed over all processes."""
        counts = PixelCounts.of(self.num_classes)
        for batch in batches:
            for image, classes in batch:  # one by one, because sizes differ
                counts.add(self.inference(model, image, (classes.shape[0], classes.shape[1])), classes)
        return counts.reduced(next(model.parameters()).device)


def listed(samples: list[Any]) -> list[Any]:
    """Collate function of evaluation: return the list of samples, as images differ in size."""
    return samples


def share_right(predicted: Tensor, truth: Tensor) -> float:
    """Return the percentage of an image's pixels, without ignored ones, that are correct; nan if none remain."""
    counted = truth != IGNORED
    pixels = int(counted.sum())
    return 100 * int((counted & (predicted == truth)).sum()) / pixels if pixels else float("nan")


def _cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the mean over pixels that are not ignored; 0 for a batch without any, where torch's mean is nan."""
    total = nn.functional.cross_entropy(logits.float(), classes.long(), ignore_index=IGNORED, reduction="sum")
    # not in the paper: a mean over the pixels that are not ignored, as in torch; mmsegmentation divides by all pixels
    return total / (classes != IGNORED).sum().clamp(min=1)


def _divided(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else float("nan")
