# SPDX-License-Identifier: Apache-2.0
"""Distillation: the classification recipes with a teacher that the user provides; nothing here is in the paper.

The teacher is a run of `sola train` or any timm network with its weights: --teacher.checkpoint, --teacher.name.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from sola_vision.recipes.classification import (
    Recipe,
    few_images,
    imagenet_base,
    imagenet_small,
    imagenet_tiny,
)
from sola_vision.tasks import DistillConfig, TeacherConfig


@dataclass(kw_only=True)
class DistillationRecipe(Recipe):
    """A classification recipe with a teacher and the settings of distillation."""

    task: ClassVar[str] = "distillation"
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)


def _with_teacher(recipe: Recipe, distill: DistillConfig) -> DistillationRecipe:
    return DistillationRecipe(model=recipe.model, image=recipe.image, train=recipe.train, distill=distill)


def _imagenet(recipe: Recipe) -> DistillationRecipe:
    """The paper's recipe; the teacher's probabilities, at temperature 1, weigh as much as the labels.

    Feature maps are not distilled. timm's logit distillation has the same defaults.
    """
    return _with_teacher(recipe, DistillConfig(target_weight=0.5, temperature=1.0, feature_weight=0.0))


def distill_imagenet_tiny() -> DistillationRecipe:
    """SoLA-T on ImageNet-1K with a teacher; not in the paper.

    Command: torchrun --nproc-per-node 8 -m sola_vision train distill_imagenet_tiny --data IMAGENET
        --teacher.name convnext_base --teacher.checkpoint convnext_base.safetensors
    Expected: not yet run.
    Cost: that of imagenet_tiny plus a forward pass of the teacher per image.
    """
    return _imagenet(imagenet_tiny())


def distill_imagenet_small() -> DistillationRecipe:
    """SoLA-S on ImageNet-1K with a teacher; not in the paper.

    Command: torchrun --nproc-per-node 8 -m sola_vision train distill_imagenet_small --data IMAGENET
        --teacher.name convnext_base --teacher.checkpoint convnext_base.safetensors
    Expected: not yet run.
    Cost: that of imagenet_small plus a forward pass of the teacher per image.
    """
    return _imagenet(imagenet_small())


def distill_imagenet_base() -> DistillationRecipe:
    """SoLA-B on ImageNet-1K with a teacher; not in the paper.

    Command: torchrun --nproc-per-node 8 -m sola_vision train distill_imagenet_base --data IMAGENET
        --teacher.name convnext_large --teacher.checkpoint convnext_large.safetensors
    Expected: not yet run.
    Cost: that of imagenet_base plus a forward pass of the teacher per image.
    """
    return _imagenet(imagenet_base())


def distill_few_images() -> DistillationRecipe:
    """SoLA-nano on a folder of photographs, with a teacher; not in the paper.

    Command: sola train distill_few_images --data FOLDER --teacher.checkpoint RUN
    Expected: no gain after 20 epochs at 64 pixels on caltech16 (docs/distillation.md, section 4); longer not yet run.
    Cost: that of few_images plus a forward pass of the teacher per image.
    """
    return _with_teacher(few_images(), DistillConfig())
