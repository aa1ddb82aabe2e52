# SPDX-License-Identifier: Apache-2.0
"""A study at a scale on somebody's images, as a list of runs. Whatever can be wrong is refused here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sola_vision.config import SolaConfig
from sola_vision.engine import TrainConfig

from .definition import Arm, Study
from .images import Images
from .runs import Run
from .scales import Scale
from .segmentation import SegmentationImages, segmentation_runs


@dataclass(frozen=True)
class Plan:
    """A study at a scale on some images: its runs, seeds outermost, so that every arm has as many at any time."""

    study: Study
    scale: Scale
    images: Images | SegmentationImages
    seeds: int
    train: TrainConfig
    runs: tuple[Run, ...]

    @cached_property
    def description(self) -> dict[str, Any]:
        """What results.json keeps of the plan; the costs of all arms are counted for it."""
        study, scale, train = self.study, self.scale, self.train
        level = scale.segmentation if study.task == "segmentation" else scale
        size = study.cost_size if scale.name == "paper" else level.size
        in_epoch = self.images.identity.train // train.batch_size
        return {
            "name": study.name,
            "scale": scale.name,
            "what": level.what,
            "data": self.images.describe(),
            "epochs": train.epochs if train.steps is None else round(train.steps / in_epoch, 2),
            "batch_size": train.batch_size,
            "steps": train.steps or train.epochs * in_epoch,
            "lr": train.lr,
            "size": level.size,
            "cost_size": size,
            "seeds": self.seeds,
            "arms": {run.arm: self._arm(run, size) for run in self.runs if run.seed == 0},
            "keys": {run.key: [run.arm, run.seed] for run in self.runs},
        }

    def _arm(self, run: Run, size: int) -> dict[str, Any]:
        arm = self.study.arm(run.arm)
        weights = run.definition.get("weights")
        return {"schedule": arm.schedule, "bridges": arm.bridges, **run.cost(size)} | (
            {"weights": weights} if weights else {}
        )


def plan(
    study: Study,
    scale: Scale,
    data: str,
    *,
    class_file: str | None = None,
    ignore: int | None = None,
    init: Sequence[str] = (),
    seeds: int | None = None,
    epochs: int | None = None,
    limit: int | None = None,
    device: str = "auto",
) -> Plan:
    """Values that are None are the scale's or the study's.

    class_file: of classification, names of the classes to use. ignore, init: of segmentation, the label that counts
    nowhere and the checkpoints to start from.
    """
    images: Images | SegmentationImages
    first: Sequence[Run]
    if study.task == "segmentation":
        images, first = segmentation_runs(
            study, scale.segmentation, data, ignore=ignore, init=init, epochs=epochs, limit=limit, device=device
        )
    else:
        images, first = _classification_runs(study, scale, data, class_file, epochs, limit, device)
    train = first[0].train
    if images.identity.train < train.batch_size:
        raise ValueError(
            f"{data}: {images.identity.train} training images are fewer than one batch of {train.batch_size}: "
            "give more images"
        )
    number = seeds or scale.seeds
    runs = tuple(run.with_seed(seed) for seed in range(number) for run in first)
    return Plan(study, scale, images, number, train, runs)


def _classification_runs(
    study: Study,
    scale: Scale,
    data: str,
    class_file: str | None,
    epochs: int | None,
    limit: int | None,
    device: str,
) -> tuple[Images, list[Run]]:
    """The images, and a run of every arm, all with seed 0."""
    base = scale.hierarchical if study.network == "hierarchical" else scale.isotropic
    epochs = epochs or scale.epochs.get(study.network, study.epochs)
    images = Images(data, scale.size, scale.images, limit or scale.limit, class_file)
    train = replace(scale.train, epochs=epochs, device=device)
    if train.warmup_epochs >= epochs:
        train = replace(train, warmup_epochs=epochs / 10)
    return images, [
        Run(
            arm=arm.name,
            config=_config(base, arm, images.identity.classes),
            change=arm.change,
            train=train,
            images=scale.images,
            identity=images.describe(),
        )
        for arm in study.arms
    ]


def _config(base: SolaConfig, arm: Arm, classes: int) -> SolaConfig:
    stages = len(arm.schedule.split("/"))
    if stages != len(base.dims):
        raise ValueError(
            f"schedule {arm.schedule!r} has {stages} stages but the scale's network has {len(base.dims)}: give one "
            "group of letters for each stage, with a slash between them"
        )
    return base.with_changes(
        schedule=arm.schedule, bridges=arm.bridges, token_shift=arm.token_shift, num_classes=classes
    )
