# SPDX-License-Identifier: Apache-2.0
"""Recipes: one function per run, whose docstring states the source, the command, the expected result and the cost.

A recipe is a complete configuration. `sola train NAME --data FOLDER` runs it, and options override single fields.
"""

from collections.abc import Callable

from sola_vision.recipes.classification import (
    Recipe,
    cifar10,
    digits,
    few_images,
    imagenet_base,
    imagenet_small,
    imagenet_tiny,
)
from sola_vision.recipes.detection import DetectionRecipe, coco_base, coco_small, coco_tiny, few_objects
from sola_vision.recipes.distillation import (
    DistillationRecipe,
    distill_few_images,
    distill_imagenet_base,
    distill_imagenet_small,
    distill_imagenet_tiny,
)
from sola_vision.recipes.segmentation import (
    SegmentationRecipe,
    ade20k_base,
    ade20k_small,
    ade20k_tiny,
    few_masks,
)
from sola_vision.suggest import suggestion

AnyRecipe = Recipe | DistillationRecipe | DetectionRecipe | SegmentationRecipe

RECIPES: dict[str, Callable[[], AnyRecipe]] = {
    recipe.__name__: recipe
    for recipe in (
        *(imagenet_tiny, imagenet_small, imagenet_base, digits, cifar10, few_images),
        *(distill_imagenet_tiny, distill_imagenet_small, distill_imagenet_base, distill_few_images),
        *(coco_tiny, coco_small, coco_base, few_objects),
        *(ade20k_tiny, ade20k_small, ade20k_base, few_masks),
    )
}

__all__ = [
    "RECIPES",
    "AnyRecipe",
    "DetectionRecipe",
    "DistillationRecipe",
    "Recipe",
    "SegmentationRecipe",
    "get_recipe",
]


def get_recipe(name: str) -> AnyRecipe:
    """Return the recipe called `name`. Raise ValueError, which lists the names, for an unknown one."""
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        raise ValueError(f"recipe {name!r} is unknown{suggestion(name, RECIPES)}; the recipes are {known}")
    return RECIPES[name]()
