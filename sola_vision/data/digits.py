# SPDX-License-Identifier: Apache-2.0
"""The 1797 handwritten digits that come with scikit-learn: real images of 8x8 pixels, no download.

They allow a first training run within a minute. Every fifth digit of each class is held out as "val".
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

CLASSES = tuple("0123456789")


class Digits(Dataset[tuple[Any, int]]):
    """Images (RGB, 8x8) and labels of "train" (1438 digits) or "val" (359); same attributes as ImageFolder."""

    def __init__(
        self,
        split: str,
        transform: Callable[[Image.Image], Any] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"split must be 'train' or 'val' for the digits (got {split!r})")
        self.classes = list(CLASSES if classes is None else classes)
        if unknown := sorted(set(CLASSES) - set(self.classes)):
            raise ValueError(
                f"digits: class {unknown[0]!r} is not among the {len(self.classes)} known classes "
                f"({', '.join(self.classes[:5])}, ...); use data with the same classes"
            )
        pixels, digits = _load()
        chosen = [i for i, held_out in enumerate(_held_out(digits)) if held_out == (split == "val")]
        self.transform = transform
        self.samples = [f"{digits[i]}/{i:04d}.png" for i in chosen]
        self.targets = [self.classes.index(str(digits[i])) for i in chosen]
        self._pixels = pixels[chosen]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.image(index)
        return (image if self.transform is None else self.transform(image)), self.targets[index]

    def image(self, index: int) -> Image.Image:
        """Return digit `index` before any transform."""
        return Image.fromarray(self._pixels[index]).convert("RGB")

    def location(self, index: int) -> str:
        """Return the name of digit `index`, for messages."""
        return f"digits:{self.samples[index]}"


def write_folder(root: str | Path, count: int) -> list[Path]:
    """Write `count` held-out digits, the classes in turn, as ROOT/val/CLASS/NNNN.png; returns the files."""
    digits = Digits("val")
    if not 1 <= count <= len(digits):
        raise ValueError(f"count={count} must be from 1 to {len(digits)}, the number of held-out digits")
    rank_in_class = [digits.targets[:i].count(label) for i, label in enumerate(digits.targets)]
    in_turn = sorted(range(len(digits)), key=lambda i: (rank_in_class[i], digits.targets[i]))
    files = []
    for index in in_turn[:count]:
        file = Path(root) / "val" / digits.samples[index]
        file.parent.mkdir(parents=True, exist_ok=True)
        digits.image(index).save(file)
        files.append(file)
    return files


def _load() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError('the digits come with scikit-learn: pip install "sola-vision[demo]"') from None
    data = load_digits()
    return np.rint(data.images * (255 / 16)).astype(np.uint8), data.target.astype(int)


def _held_out(digits: np.ndarray) -> np.ndarray:
    """True for the middle one of every five digits of a class: stratified, and independent of library versions."""
    held_out = np.zeros(len(digits), dtype=bool)
    for digit in range(10):
        held_out[np.flatnonzero(digits == digit)[2::5]] = True
    return held_out
