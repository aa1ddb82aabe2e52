# SPDX-License-Identifier: Apache-2.0
"""Semantic segmentation: cross-entropy of the head and the auxiliary head; one confusion matrix over the whole set.

Intersection over union is computed once from the pixels of all images, never as a mean over images. A class that is
nowhere, neither in the truth nor predicted, has none: `miou` is the mean over the other classes (mmsegmentation's and
most papers' number), `miou_all` counts it as 0 (ADE20K's official script). Both are the same where every class occurs.
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

    Pixels whose truth is IGNORED count nowhere, whatever is predicted there.
    """

    confusion: Tensor

    @classmethod
    def of(cls, num_classes: int) -> "PixelCounts":
        return cls(torch.zeros(num_classes, num_classes + 1, dtype=torch.long))

    def add(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """Classes of pixels, predicted ones possibly IGNORED (= none); returns what they added to the matrix."""
        num_classes = len(self.confusion)
        counted = truth != IGNORED
        columns = torch.where(predicted == IGNORED, num_classes, predicted.long())[counted]
        pairs = truth.long()[counted] * (num_classes + 1) + columns
        counts = torch.bincount(pairs, minlength=self.confusion.numel()).reshape(self.confusion.shape).cpu()
        self.confusion += counts
        return counts

    def reduced(self, device: torch.device) -> "PixelCounts":
        """The sum over all processes; in integers, because a large set has more pixels than float64 tells apart."""
        return PixelCounts(all_reduce_sum(self.confusion.to(device)).cpu())

    @property
    def pixels(self) -> NDArray[np.int64]:
        """Pixels of each class in the truth."""
        return self.confusion.sum(1).numpy()

    @property
    def iou(self) -> NDArray[np.float64]:
        """Of each class, a share of 1; nan where it is neither in the truth nor predicted."""
        right, named = self._right, self.confusion[:, :-1].sum(0).numpy()
        return _divided(right, self.pixels + named - right)

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """The share of each class's pixels that got it; nan where the truth has none."""
        return _divided(self._right, self.pixels)

    @property
    def precision(self) -> NDArray[np.float64]:
        """The share of the pixels that got a class and are of it; nan where none got it."""
        return _divided(self._right, self.confusion[:, :-1].sum(0).numpy())

    @property
    def metrics(self) -> dict[str, float]:
        """In percent: miou and mean_accuracy over the classes that have one, miou_all with 0 for the others."""
        iou, accuracy = self.iou, self.accuracy
        return {
            "miou": 100 * _mean(iou[~np.isnan(iou)]),
            "miou_all": 100 * _mean(np.nan_to_num(iou)),
            "mean_accuracy": 100 * _mean(accuracy[~np.isnan(accuracy)]),
            "pixel_accuracy": 100 * _mean(_divided(self._right.sum(keepdims=True), self.pixels.sum(keepdims=True))),
            "classes_present": float((~np.isnan(iou)).sum()),
        }

    @property
    def _right(self) -> NDArray[np.int64]:
        return self.confusion.diagonal().numpy()


class Segmentation:
    """The task of `engine.fit`: training batches are (images [B, 3, H, W], classes [B, H, W]), evaluation batches
    lists of (image [3, H, W], classes [h, w]), where the classes keep the size of their file.
    """

    metric = "miou"

    def __init__(self, num_classes: int, auxiliary_weight: float = 0.4, inference: Inference | None = None) -> None:
        self.num_classes = num_classes
        self.auxiliary_weight = auxiliary_weight
        self.inference = inference or Inference()

    def check_batch(self, size: int) -> None:
        """Refuses what BatchNorm cannot normalise; a command line asks before it writes anything."""
        if size < 2:
            raise ValueError(
                f"a batch of {size} image a process: the 1x1 pooling of UPerNet needs two for its BatchNorm; "
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
        """The confusion over this process's batches, summed over all processes."""
        counts = PixelCounts.of(self.num_classes)
        for batch in batches:
            for image, classes in batch:  # one by one, because each has its own size
                counts.add(self.inference(model, image, (classes.shape[0], classes.shape[1])), classes)
        return counts.reduced(next(model.parameters()).device)


def listed(samples: list[Any]) -> list[Any]:
    """The collate function of evaluation: images of any size side by side."""
    return samples


def share_right(predicted: Tensor, truth: Tensor) -> float:
    """Percent of an image's counted pixels that got their class; nan where none counts."""
    counted = truth != IGNORED
    pixels = int(counted.sum())
    return 100 * int((counted & (predicted == truth)).sum()) / pixels if pixels else float("nan")


def _cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Mean over the pixels that count. A batch without any gives 0, where torch's mean would be no number."""
    total = nn.functional.cross_entropy(logits.float(), classes.long(), ignore_index=IGNORED, reduction="sum")
    # not in the paper: a mean over the pixels that count, as torch's; mmsegmentation divides by all of them
    return total / (classes != IGNORED).sum().clamp(min=1)


def _divided(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else float("nan")
