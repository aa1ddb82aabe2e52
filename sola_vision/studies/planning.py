# SPDX-License-Identifier: Apache-2.0
"""Plans: a study at a scale on given images, as a list of runs. All options are validated here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sola_vision.config import SolaConfig
from sola_vision.engine import TrainConfig
from sola_vision.wording import amount

from .definition import Arm, Study
from .images import Images
from .runs import Run
from .scales import Scale
from .segmentation import SegmentationImages, segmentation_runs


@dataclass(frozen=True)
class Plan:
    """A study at a scale on given images. Runs are ordered by seed, so that all arms progress evenly."""

    study: Study
    scale: Scale
    images: Images | SegmentationImages
    seeds: int
    train: TrainConfig
    runs: tuple[Run, ...]

    @cached_property
    def description(self) -> dict[str, Any]:
        """The plan as stored in results.json, with the counted cost of every arm."""
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
    """Return the plan of a study. Options that are None default to the scale's or the study's value.

    class_file: for classification, a file with the names of the classes to use. ignore, init: for segmentation, the
    label to ignore and the checkpoints to start from. Raise ValueError if the options or images do not suit the study.
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
            f"{data}: {amount(images.identity.train, 'training image')}, fewer than one batch of {train.batch_size}: "
            "add images"
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
    """Return the images and a run of every arm with seed 0."""
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
            f"schedule {arm.schedule!r} has {amount(stages, 'stage')} but the scale's network has {len(base.dims)}: "
            "give one group of letters per stage, separated by slashes"
        )
    return base.with_changes(
        schedule=arm.schedule, bridges=arm.bridges, token_shift=arm.token_shift, num_classes=classes
    )
