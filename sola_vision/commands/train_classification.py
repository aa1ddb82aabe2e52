# SPDX-License-Identifier: Apache-2.0
"""Preparation of `sola train` for a classification recipe."""

import torch

from sola_vision.commands.dispatch import Job
from sola_vision.commands.options import Run
from sola_vision.data import EvalTransform, ImageConfig, TrainTransform, open_classification
from sola_vision.engine import World
from sola_vision.engine.loading import micro_batch_size
from sola_vision.recipes import Recipe
from sola_vision.tasks import Classification, build_model, initialise, metadata
from sola_vision.wording import amount


def prepare(request: Run, world: World) -> Job:
    """Return the data sets, network and task of the run."""
    recipe = request.configuration
    assert isinstance(recipe, Recipe)
    train_set = open_classification(request.data, "train", _train_transform(recipe.image))
    classes = train_set.classes
    val_set = open_classification(request.data, "val", EvalTransform(recipe.image), classes)
    torch.manual_seed(recipe.train.seed)  # for the initial weights
    model = build_model(recipe.model, len(classes), recipe.image.size)
    task = Classification(len(classes), recipe.image)
    if recipe.train.batch_size <= len(train_set):  # a larger batch is refused as such
        task.check_batch(micro_batch_size(recipe.train, world))
    held_out = set(val_set.targets)
    absent = [name for label, name in enumerate(classes) if label not in held_out]
    return Job(
        task=task,
        model=model,
        train_set=train_set,
        val_set=val_set,
        metadata=metadata("classification", recipe.model, recipe.image, classes, model),
        description=f"{recipe.model.name} on {amount(len(train_set), 'image')} of {len(classes)} classes from "
        f"{request.data}, {len(val_set):,} held out",
        printed_metrics=("top1", "top5", "loss"),
        report=initialise(model, request.start, classes) if request.start else None,
        note=f"no held-out images of: {', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}" if absent else None,
    )


def _train_transform(image: ImageConfig) -> TrainTransform:
    try:
        return TrainTransform(image)
    # timm checks an augmentation policy by assertions
    except (AssertionError, KeyError, ValueError) as error:
        text = str(error) or "not a policy of timm"
        raise ValueError(
            f"--image.auto_augment {image.auto_augment}: {text}; use a policy such as rand-m9-mstd0.5-inc1"
        ) from None
