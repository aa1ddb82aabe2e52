# SPDX-License-Identifier: Apache-2.0
"""Networks and image sizes as `sola cost` and `sola bench model` name them."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import timm
from rich.text import Text

from sola_vision.commands.arguments import parse_size, plain
from sola_vision.tasks import describe_classifier

SIZE_HELP = "image sizes, such as 224 1333x800 (default: those of the runs or checkpoints, 224 for names)"


def full_name(name: str) -> str:
    """Return timm's name for a short one (swin_tiny: swin_tiny_patch4_window7_224), the shortest with that prefix.

    The path of a classifier's run or checkpoint is returned unchanged; raise ValueError or OSError for any other path.
    """
    if Path(name).exists():
        describe_classifier(name)
        return name
    if timm.is_model(name):
        return name
    longer = timm.list_models(f"{name}_*")
    if not longer or not re.fullmatch(r"[\w.]+", name):
        raise ValueError(
            f"network {name!r} is unknown: use sola_nano, sola_tiny, sola_small, sola_base, a timm name, or the path "
            "of a run or checkpoint"
        )
    return min(longer, key=len)


def short_name(model: str) -> Text:
    """Return the label of a network in a table: its name, or the last two parts of the path of a run or checkpoint."""
    return plain(str(Path(*Path(model).parts[-2:])) if os.path.exists(model) else model)  # not Path: a long label


def image_sizes(texts: Sequence[str] | None, models: Sequence[str]) -> list[tuple[int, int]]:
    """Return the sizes of --size; by default the image sizes of the runs and checkpoints in `models`, otherwise 224."""
    if texts is not None:
        return [parse_size(text) for text in texts]
    sides = [describe_classifier(model).image_size for model in models if Path(model).exists()]
    return [(side, side) for side in dict.fromkeys(sides or [224])]
