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
    """The "train" or "val" split of `data`; a folder that is really called digits is written ./digits."""
    if data == "digits":
        return Digits(split, transform, classes)
    return ImageFolder(data, split, transform, classes)
