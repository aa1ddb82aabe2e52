# SPDX-License-Identifier: Apache-2.0
"""Opening of the dataset given by `--data`: "digits", or a folder or .tar file in ImageFolder layout."""

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
    """Open the "train" or "val" split of `data`; use "./digits" for a folder of that name.

    Without `classes` raise ValueError for a single class, on which every network is correct.
    """
    if data == "digits":
        return Digits(split, transform, classes)
    images = ImageFolder(data, split, transform, classes)
    if classes is None and len(images.classes) < 2:
        raise ValueError(
            f"{data}: {images.classes[0]!r} is its only class, but at least two are needed: "
            f"put images of another class into a folder next to {split}/{images.classes[0]}/"
        )
    return images
