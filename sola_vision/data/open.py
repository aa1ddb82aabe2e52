# SPDX-License-Identifier: Apache-2.0
"""What `--data` names: the word "digits", or a folder or .tar file in ImageFolder layout."""

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from .digits import Digits
from .folder import ImageFolder


def open_classification(
    data: str,
    split: str,
    transform: Callable[[Image.Image], Any] | None = None,
    classes: Sequence[str] | None = None,
) -> Digits | ImageFolder:
    """The "train" or "val" split of `data`; a folder that is really called digits is written ./digits.

    Without `classes` there must be two at least, because of one alone every network is right.
    """
    if data == "digits":
        return Digits(split, transform, classes)
    images = ImageFolder(data, split, transform, classes)
    if classes is None and len(images.classes) < 2:
        raise ValueError(
            f"{data}: {images.classes[0]!r} is its only class, and there is nothing to tell it from: "
            f"put images of another into a folder beside {split}/{images.classes[0]}/"
        )
    return images
