# SPDX-License-Identifier: Apache-2.0
"""Preparation of `sola train` for a detection recipe: Mask R-CNN, or Faster R-CNN if the data has boxes only."""

from dataclasses import asdict, replace

import torch

from sola_vision.commands.dispatch import Job
from sola_vision.commands.options import Run
from sola_vision.data import CocoFolder, DetectionEvalTransform, DetectionTrainTransform, collate_lists
from sola_vision.engine import World
from sola_vision.recipes import DetectionRecipe
from sola_vision.tasks import metadata
from sola_vision.tasks.detection import Detection
from sola_vision.tasks.detector import backbone_of, build_detector, start_detector
from sola_vision.wording import amount


def prepare(request: Run, world: World) -> Job:
    """Return the data sets, network and task of the run."""
    recipe = request.configuration
    assert isinstance(recipe, DetectionRecipe)
    train_set = CocoFolder(
        request.data,
        "train",
        DetectionTrainTransform(recipe.image),
        masks=recipe.image.masks,
        keep_empty=recipe.image.keep_empty,
    )
    classes, masks = train_set.classes, train_set.masks
    val_set = CocoFolder(request.data, "val", DetectionEvalTransform(), classes, masks=masks)
    image, detector = replace(recipe.image, masks=masks), recipe.detector
    task = Detection(val_set, detector.max_detections, masks=masks)
    torch.manual_seed(recipe.train.seed)  # for the initial weights
    model = build_detector(recipe.model, detector, image, len(classes))
    # settings that concern only the start of training are not stored
    stored = {**asdict(detector), "frozen_stages": 0, "checkpointing": False, "drop_bridges": False}
    return Job(
        task=task,
        model=model,
        train_set=train_set,
        val_set=val_set,
        metadata=metadata(
            *("detection", recipe.model, image, classes, backbone_of(model)),
            detector=stored,
            category_ids=train_set.category_ids,
        ),
        description=f"{recipe.model.name} with {'Mask' if masks else 'Faster'} R-CNN on "
        f"{amount(len(train_set), 'image')} of {amount(len(classes), 'class', 'classes')}"
        f"{'' if masks else ' (boxes only)'} from {request.data}, {len(val_set):,} held out, "
        f"maxDets {detector.max_detections}",
        printed_metrics=("box_ap", "box_ap50", "mask_ap", "mask_ap50"),
        report=start_detector(model, request.start, classes, detector.drop_bridges) if request.start else None,
        collate=collate_lists,
    )
