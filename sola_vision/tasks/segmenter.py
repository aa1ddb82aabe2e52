# SPDX-License-Identifier: Apache-2.0
"""A segmentation network from its configuration, from a classifier's checkpoint, or from its own."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import timm
from torch import nn

from sola_vision.data import LabelRule, SegmentationConfig
from sola_vision.engine import LoadReport, load_weights, read_weights
from sola_vision.tasks.model import (
    ModelConfig,
    foreign_metadata,
    read_description,
    read_network,
    read_settings,
    weights_file,
)
from sola_vision.tasks.upernet import UPerNet, UPerNetConfig


@dataclass(frozen=True)
class SegmentationCheckpoint:
    """A trained segmentation network and what its file says about it."""

    model: UPerNet
    name: str
    classes: list[str]
    image: SegmentationConfig

    @property
    def rule(self) -> LabelRule:
        return LabelRule(len(self.classes), self.image.ignore)


def build_segmenter(model: ModelConfig, head: UPerNetConfig, num_classes: int, image_size: int) -> UPerNet:
    """The network with fresh weights, the backbone's position grid laid out for `image_size`."""
    changes: dict[str, Any] = {
        field.name: getattr(model, field.name)
        for field in fields(model)
        if field.name != "name" and getattr(model, field.name) is not None
    }
    if model.name.startswith("sola_"):
        changes["img_size"] = image_size
    elif unknown := sorted(set(changes) - {"drop_path_rate"}):
        raise ValueError(f"{model.name} has no {', '.join(unknown)}: these belong to the sola_* networks")
    return _create(model.name, head, num_classes, changes)


def _create(name: str, head: UPerNetConfig, num_classes: int, changes: dict[str, Any]) -> UPerNet:
    try:
        body = timm.create_model(name, features_only=True, **changes)
        return UPerNet(body, num_classes, head)
    # timm's networks refuse with a TypeError what they have no argument for, and features with a RuntimeError
    except (TypeError, AssertionError, RuntimeError, AttributeError, ValueError) as error:
        raise ValueError(f"{name} cannot be built as a backbone with {changes}: {error}") from None


def backbone_of(model: UPerNet) -> nn.Module:
    """timm's network inside, whose configuration a checkpoint carries."""
    inner = getattr(model.backbone.body, "model", model.backbone.body)
    assert isinstance(inner, nn.Module)
    return inner


def load_segmenter(path: str | Path) -> SegmentationCheckpoint:
    """A segmentation checkpoint of ours, or a run's folder (its best weights), ready for evaluation."""
    path, values = read_description(path)
    if values["task"] != "segmentation":
        raise ValueError(f"{path} is of the task {values['task']!r}: a segmentation checkpoint is needed here")
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
    """Start from a classifier's weights, or from a whole segmentation checkpoint; returns what happened, in one line.

    Of the latter the classifiers stay fresh where the classes differ.
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
        raise ValueError(f"{path} does not fit the network: {report}; start from a checkpoint of the same network")
    model.load_state_dict(stored)
    return f"weights from {path}" + (f" ({', '.join(fresh)} fresh, the classes differ)" if fresh else "")
