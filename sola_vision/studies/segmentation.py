# SPDX-License-Identifier: Apache-2.0
"""Segmentation studies: images with a class per pixel, and runs of a network with UPerNet.

A run starts from fresh weights, or from the checkpoint that fits its network. A checkpoint with bridges also fits the
network without them, with its bridges dropped.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from sola_vision.data import (
    SegmentationConfig,
    SegmentationEvalTransform,
    SegmentationFolder,
    SegmentationTrainTransform,
    open_segmentation,
)
from sola_vision.engine import read_weights
from sola_vision.tasks import ModelConfig, UPerNetConfig, metadata
from sola_vision.tasks.inference import Inference
from sola_vision.tasks.segmentation import Segmentation, listed
from sola_vision.tasks.segmenter import backbone_of, build_segmenter, start_segmenter
from sola_vision.tasks.upernet import UPerNet

from .definition import Arm, Study
from .images import Identity
from .runs import Job, Run
from .scales import SegmentationScale


class SegmentationImages:
    """Training and held-out images.

    settings: as in SegmentationScale. limit: the number of training images, evenly spread over the folder.
    """

    def __init__(self, data: str, settings: SegmentationConfig, limit: int | None) -> None:
        folder = Path(data).expanduser()
        if folder.is_file() or (folder.is_dir() and not (folder / "images").is_dir()):
            raise ValueError(
                f"{data} has no folder images/: a study of segmentation needs images/SPLIT and annotations/SPLIT with "
                "a label for every pixel, not folders of classes"
            )
        self.settings = settings
        rule = (settings.ignore, settings.num_classes)
        self.train_files, self.classes = open_segmentation(data, "train", *rule, SegmentationTrainTransform(settings))
        self.val_files, _ = open_segmentation(data, "val", *rule, SegmentationEvalTransform(settings), self.classes)
        for files in (self.train_files, self.val_files):
            files.check_labels()
        # neighbours in a folder are often consecutive video frames, so take images evenly spread
        count = min(limit or len(self.train_files), len(self.train_files))
        self.train_indices = np.linspace(0, len(self.train_files) - 1, count).round().astype(int).tolist()
        self.identity = Identity(folder.name, len(self.classes), count, len(self.val_files), self._fingerprint())

    def _fingerprint(self) -> str:
        """Hash the names of the images, as elsewhere, and the contents of the label files."""
        digest = hashlib.blake2b(digest_size=12)
        for files, indices in ((self.train_files, self.train_indices), (self.val_files, range(len(self.val_files)))):
            for index in indices:
                name = files.names[index].encode("utf-8", "surrogateescape")
                digest.update(name + b"\n" + files.labels[index].read_bytes())
        return digest.hexdigest()

    @cached_property
    def train(self) -> Dataset[Any]:
        """The training images, augmented."""
        return Subset(self.train_files, self.train_indices)

    @property
    def val(self) -> SegmentationFolder:
        """The held-out images."""
        return self.val_files

    def describe(self) -> dict[str, Any]:
        """Return identity and label rule as a dictionary."""
        return {**asdict(self.identity), "rule": str(self.train_files.rule)}


@dataclass(frozen=True)
class Weights:
    """A checkpoint that a network starts from."""

    path: str
    fingerprint: str
    drop_bridges: bool


@dataclass(frozen=True, kw_only=True)
class SegmentationRun(Run):
    """A run of a backbone with UPerNet; weights None: from scratch."""

    images: SegmentationConfig
    head: UPerNetConfig
    weights: Weights | None = None

    @property
    def definition(self) -> dict[str, Any]:
        weights = self.weights and {"fingerprint": self.weights.fingerprint, "drop_bridges": self.weights.drop_bridges}
        return {**super().definition, "segmenter": asdict(self.head), "weights": weights}

    def build(self, device: str | None = None) -> UPerNet:
        config = self.config
        with torch.device(device or "cpu"):
            return build_segmenter(ModelConfig.of(config), self.head, config.num_classes, config.img_size)

    def cost(self, size: int) -> dict[str, int]:
        """Return parameters including both heads, and MACs of the backbone only, as in the paper."""
        parameters = sum(parameter.numel() for parameter in self.build("meta").parameters())
        return {**super().cost(size), "parameters": parameters}

    def prepare(self, images: Any) -> Job:
        assert isinstance(images, SegmentationImages)
        torch.manual_seed(self.seed)  # determines the initial weights
        model = self.build()
        if self.weights:
            start_segmenter(model, self.weights.path, images.classes, self.weights.drop_bridges)
        inference = Inference(slide=self.images.slide, stride=self.images.stride)
        named = metadata(
            *("segmentation", ModelConfig(name="sola_tiny"), self.images, images.classes, backbone_of(model)),
            segmenter=asdict(self.head),
        )
        return Job(
            Segmentation(len(images.classes), self.head.auxiliary_weight, inference),
            model,
            metadata=named,
            eval_collate=listed,
        )


def segmentation_runs(
    study: Study,
    scale: SegmentationScale,
    data: str,
    *,
    ignore: int | None,
    init: Sequence[str],
    epochs: int | None,
    limit: int | None,
    device: str,
) -> tuple[SegmentationImages, list[SegmentationRun]]:
    """Return the images, and a run with seed 0 of every arm whose network the scale has."""
    if scale.pretrained and not init:
        raise ValueError(
            f"{study.name} at this scale starts from ImageNet weights: give --init CHECKPOINT, such as the folder of "
            "sola train imagenet_tiny; give one per size of the network"
        )
    settings = scale.images if ignore is None else replace(scale.images, ignore=ignore)
    images = SegmentationImages(data, settings, limit)
    train = replace(scale.train, device=device)
    if epochs is not None:
        train = replace(train, steps=None, epochs=epochs, warmup_steps=None, warmup_epochs=epochs / 10)
    runs = {
        arm: SegmentationRun(
            arm=arm.name,
            config=scale.networks[arm.size].with_changes(
                schedule=arm.schedule,
                bridges=arm.bridges,
                token_shift=arm.token_shift,
                num_classes=len(images.classes),
                img_size=settings.crop,
            ),
            change=arm.change,
            train=train,
            images=settings,
            identity=images.describe(),
            head=scale.head,
        )
        for arm in study.arms
        if arm.size in scale.networks
    }
    return images, list((_started(runs, init, images.classes) if init else runs).values())


def _started(runs: dict[Arm, SegmentationRun], init: Sequence[str], classes: list[str]) -> dict[Arm, SegmentationRun]:
    """Return the runs of all sizes for which a checkpoint is given, each with the checkpoint that fits it."""
    known = {path: _fingerprint(path) for path in init}
    errors: dict[Arm, ValueError] = {}
    started: dict[Arm, SegmentationRun] = {}
    for arm, run in runs.items():
        model = run.build()
        # prefer a checkpoint of exactly this network to one whose bridges are dropped
        for drop_bridges, path in ((drop, path) for drop in (False, True) for path in init):
            try:
                start_segmenter(model, path, classes, drop_bridges)
            except ValueError as error:
                errors.setdefault(arm, error)
            else:
                started[arm] = replace(run, weights=Weights(path, known[path], drop_bridges))
                break
    sizes = {arm.size for arm in started}
    for arm in runs:
        if arm not in started and (arm.size in sizes or not sizes):
            raise ValueError(f"no weights for {arm.name}: {errors[arm]}")
    return started


def _fingerprint(checkpoint: str) -> str:
    path = Path(checkpoint)
    path = path / "best.safetensors" if path.is_dir() else path
    read_weights(path)  # report a damaged file as damaged, not as one that does not fit
    return hashlib.blake2b(path.read_bytes(), digest_size=12).hexdigest()
