# SPDX-License-Identifier: Apache-2.0
"""Segmentation networks built from a configuration, a classifier's checkpoint or a segmentation checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sola_vision.data import LabelRule, SegmentationConfig
from sola_vision.engine import LoadReport, load_weights, read_weights
from sola_vision.tasks.model import (
    ModelConfig,
    foreign_metadata,
    network_changes,
    read_description,
    read_network,
    read_settings,
    weights_file,
)
from sola_vision.tasks.pyramid import create_body
from sola_vision.tasks.upernet import UPerNet, UPerNetConfig

_ANY = (45, 67)  # test size of the backbone that no stride divides, because images are evaluated at any size


@dataclass(frozen=True)
class SegmentationCheckpoint:
    """A trained segmentation network with the metadata of its file."""

    model: UPerNet
    name: str
    classes: list[str]
    image: SegmentationConfig

    @property
    def rule(self) -> LabelRule:
        """The rule that maps labels to classes."""
        return LabelRule(len(self.classes), self.image.ignore)


def build_segmenter(model: ModelConfig, head: UPerNetConfig, num_classes: int, image_size: int) -> UPerNet:
    """Return a newly initialised network with a position grid for `image_size`."""
    return _create(model.name, head, num_classes, network_changes(model, image_size))


def _create(name: str, head: UPerNetConfig, num_classes: int, changes: dict[str, Any]) -> UPerNet:
    try:
        return UPerNet(create_body(name, changes, _ANY), num_classes, head)
    except ValueError as error:
        raise ValueError(f"{name} cannot be the backbone of UPerNet: {error}") from None


def backbone_of(model: UPerNet) -> nn.Module:
    """Return timm's network inside, whose configuration is stored in a checkpoint."""
    return model.backbone.network


def load_segmenter(path: str | Path) -> SegmentationCheckpoint:
    """Load a segmentation checkpoint of this package, from a file or a run's folder (its best weights), for evaluation.

    Raise FileNotFoundError or ValueError if it is missing, damaged, or written by another program or for another task.
    """
    path, values = read_description(path)
    if values["task"] != "segmentation":
        raise ValueError(f"{path} is a checkpoint of the task {values['task']!r}: use a segmentation checkpoint")
    try:
        image = read_settings(SegmentationConfig, values["image"])
        head = read_settings(UPerNetConfig, values["segmenter"])
        classes = [str(label) for label in values["classes"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise foreign_metadata(path, error) from None
    name, network = read_network(path, values)
    model = _create(name, head, len(classes), network)
    load_weights(model, path)
    return SegmentationCheckpoint(model.eval(), name, classes, image)


def start_segmenter(model: UPerNet, path: str | Path, classes: Sequence[str], drop_bridges: bool) -> str:
    """Initialise `model` from a classifier's or a segmentation checkpoint; return a one-line description.

    From the latter, the output layers are newly initialised if the classes differ.
    """
    path = weights_file(path)
    stored = read_weights(path)
    if not any(name.startswith("backbone.body.") for name in stored):
        return model.backbone.start_from(stored, path, drop_bridges)
    own = model.state_dict()
    fresh = []
    if path.suffix != ".safetensors" or read_description(path)[1]["classes"] != list(classes):
        fresh = [name for name in own if ".classifier." in name]
        stored |= {name: own[name] for name in fresh}
    report = LoadReport.of(own, stored)
    if report:
        raise ValueError(f"{path} does not fit the network: {report}; use a checkpoint of the same network")
    model.load_state_dict(stored)
    return f"weights from {path}" + (f" ({', '.join(fresh)} newly initialised, the classes differ)" if fresh else "")
