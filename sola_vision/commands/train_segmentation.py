# SPDX-License-Identifier: Apache-2.0
"""Preparation of `sola train` for a segmentation recipe."""

import torch

from sola_vision.commands.dispatch import Job
from sola_vision.commands.options import Run
from sola_vision.data import SegmentationEvalTransform, SegmentationTrainTransform, open_segmentation
from sola_vision.engine import World
from sola_vision.engine.loading import micro_batch_size
from sola_vision.recipes import SegmentationRecipe
from sola_vision.tasks import metadata
from sola_vision.tasks.inference import Inference
from sola_vision.tasks.segmentation import Segmentation, listed
from sola_vision.tasks.segmenter import backbone_of, build_segmenter, start_segmenter
from sola_vision.wording import amount


def prepare(request: Run, world: World) -> Job:
    """Return the data sets, network and task of the run."""
    recipe = request.configuration
    assert isinstance(recipe, SegmentationRecipe)
    image, head = recipe.image, recipe.segmenter
    train_set, classes = open_segmentation(
        request.data, "train", image.ignore, image.num_classes, SegmentationTrainTransform(image)
    )
    if len(classes) < 2:
        raise ValueError(
            f"{request.data}: {classes[0]!r} is the only class of its labels, and training needs two: "
            f"label more, or choose another --image.ignore than {image.ignore}"
        )
    val_set, _ = open_segmentation(
        request.data, "val", image.ignore, image.num_classes, SegmentationEvalTransform(image), classes
    )
    train_set.check_labels()
    val_set.check_labels()
    torch.manual_seed(recipe.train.seed)  # for the initial weights
    model = build_segmenter(recipe.model, head, len(classes), image.crop)
    task = Segmentation(len(classes), head.auxiliary_weight, Inference(slide=image.slide, stride=image.stride))
    task.check_batch(micro_batch_size(recipe.train, world))
    return Job(
        task=task,
        model=model,
        train_set=train_set,
        val_set=val_set,
        metadata=metadata(
            *("segmentation", recipe.model, image, classes, backbone_of(model)),
            # settings that concern only the start of training are not stored
            segmenter={**vars(head), "drop_bridges": False, "frozen_stages": 0, "checkpointing": False},
        ),
        description=f"{recipe.model.name} with UPerNet on {amount(len(train_set), 'image')} of "
        f"{amount(len(classes), 'class', 'classes')} from {request.data} ({train_set.rule}), {len(val_set):,} held out",
        printed_metrics=("miou", "mean_accuracy", "pixel_accuracy"),
        report=start_segmenter(model, request.start, classes, head.drop_bridges) if request.start else None,
        eval_collate=listed,
    )
