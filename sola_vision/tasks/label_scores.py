# SPDX-License-Identifier: Apache-2.0
"""Pairs of predicted and true label files, to score predictions of any program by the same confusion matrix."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sola_vision.data import LabelRule, read_labels
from sola_vision.data.segmentation import label_files


@dataclass(frozen=True)
class LabelPair:
    """The predicted and the true label file of one image, with their common name."""

    name: str
    predicted: Path
    truth: Path

    def read(self, rule: LabelRule) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        """Return predicted and true classes [H, W]; pixels predicted as the ignored label have no class."""
        predicted = rule.to_classes(read_labels(self.predicted), str(self.predicted))
        truth = rule.to_classes(read_labels(self.truth), str(self.truth))
        if predicted.shape != truth.shape:
            raise ValueError(
                f"{self.predicted} has {predicted.shape[1]}x{predicted.shape[0]} pixels, its truth "
                f"{truth.shape[1]}x{truth.shape[0]}: predictions must have the size of the annotations"
            )
        return predicted, truth


def pair_folders(predictions: Path, annotations: Path) -> list[LabelPair]:
    """Return a pair for every file below `annotations`; a missing prediction is a FileNotFoundError."""
    for folder in (predictions, annotations):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder of label PNGs")
    predicted, truth = label_files(predictions), label_files(annotations)
    if not truth:
        raise ValueError(f"{annotations}: no label PNGs")
    missing = [name for name in truth if name not in predicted]
    if missing:
        raise FileNotFoundError(
            f"{predictions / missing[0]}.png: no prediction for {truth[missing[0]]} "
            f"(missing: {len(missing)} of {len(truth)}); every annotation needs one"
        )
    return [LabelPair(name, predicted[name], file) for name, file in truth.items()]
