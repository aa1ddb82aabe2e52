# SPDX-License-Identifier: Apache-2.0
"""The images of a study: a folder or tar file, optionally restricted to the classes in a file and to a number.

The identity of a run contains only their name, counts and fingerprint; the images are decoded for the first run.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from sola_vision.data import (
    Digits,
    EvalTransform,
    ImageConfig,
    ImageFolder,
    MemoryImages,
    TrainTransform,
    balanced_subset,
    decode,
    fingerprint,
    open_classification,
    shuffled_by_class,
)
from sola_vision.wording import amount

_FEWEST = 5  # the minimum number of training images per class, below which accuracy is meaningless


@dataclass(frozen=True)
class Identity:
    """The description of the images that results store."""

    name: str
    classes: int
    train: int
    val: int
    fingerprint: str


class Images:
    """Training and held-out images at one size.

    data: a path for `open_classification`. class_file: a file with one class name per line. limit: the number of
    training images. images: as in Scale. Raise ValueError for unknown classes or too few images.
    """

    def __init__(
        self, data: str, size: int, images: ImageConfig | None, limit: int | None, class_file: str | None = None
    ) -> None:
        self.size = size
        self.images = images
        names = None if class_file is None else _read_names(Path(class_file))
        self.train_files = open_classification(data, "train")
        self.classes = names or self.train_files.classes
        self.val_files = open_classification(data, "val", classes=None if names else self.classes)
        if missing := [name for name in self.classes if name not in self.train_files.classes]:
            raise ValueError(
                f"{class_file}: {missing[0]!r} is not among the {len(self.train_files.classes)} classes of {data}, "
                f"such as {self.train_files.classes[0]!r}; write one class folder name per line"
            )
        chosen = _of_classes(self.train_files, self.classes)
        labels = [self.train_files.targets[index] for index in chosen]
        self.train_indices = [chosen[place] for place in balanced_subset(labels, limit)]
        self.val_indices = _of_classes(self.val_files, self.classes)
        count = len(self.train_indices)
        if count < _FEWEST * len(self.classes):
            raise ValueError(
                f"{data}: {amount(count, 'training image')} for {len(self.classes)} classes, too few: a study needs "
                f"at least {_FEWEST} per class; add images, raise --limit or choose fewer classes"
            )
        if not self.val_indices:
            raise ValueError(
                f"{data}: no held-out image, on which accuracy is measured, is of the {len(self.classes)} chosen "
                "classes; add images or choose other classes"
            )
        both = fingerprint(self.train_files, self.train_indices) + fingerprint(self.val_files, self.val_indices)
        self.identity = Identity(Path(data).name, len(self.classes), count, len(self.val_indices), both)

    @cached_property
    def train(self) -> Dataset[Any]:
        """The training images, augmented."""
        return self._open(self.train_files, self.train_indices, training=True)

    @cached_property
    def val(self) -> Dataset[Any]:
        """The held-out images."""
        return self._open(self.val_files, self.val_indices, training=False)

    def split(self, share: float) -> tuple[Dataset[Any], Dataset[Any]]:
        """Split the training images into two datasets: most to train on, and a `share` of each class to validate on.

        The second is not augmented, like the held-out images.
        """
        by_class = shuffled_by_class([self.train_files.targets[index] for index in self.train_indices])
        # at least one per class, but never its only image
        chosen = {at for some in by_class for at in some[: min(len(some) - 1, max(1, round(share * len(some))))]}
        parts = [
            [index for at, index in enumerate(self.train_indices) if (at in chosen) == held] for held in (False, True)
        ]
        return self._open(self.train_files, parts[0], training=True), self._open(
            self.train_files, parts[1], training=False
        )

    def _open(self, files: ImageFolder | Digits, indices: list[int], training: bool) -> Dataset[Any]:
        label = {name: number for number, name in enumerate(self.classes)}
        targets = [label[files.classes[files.targets[index]]] for index in indices]
        if self.images is None:
            return MemoryImages(decode(files, self.size, indices), targets, augment=training)
        transform = TrainTransform(self.images) if training else EvalTransform(self.images)
        return _Chosen(files, indices, targets, transform)

    @property
    def settings(self) -> ImageConfig:
        """The settings of augmentation, mixing and smoothing; checkpoints store them as their preprocessing."""
        # images in memory are only cropped and flipped; label smoothing keeps its default
        plain = ImageConfig(size=self.size, auto_augment=None, color_jitter=0, erasing=0, mixup=0, cutmix=0)
        return self.images or plain

    def describe(self) -> dict[str, Any]:
        """Return the identity as a dictionary."""
        return asdict(self.identity)


class _Chosen(Dataset[tuple[Any, int]]):
    """A subset of a folder's images, with new labels."""

    def __init__(
        self,
        files: ImageFolder | Digits,
        indices: list[int],
        targets: list[int],
        transform: Callable[[Image.Image], Any],
    ) -> None:
        self.files, self.indices, self.targets, self.transform = files, indices, targets, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.files.image(self.indices[index])), self.targets[index]


def _of_classes(files: ImageFolder | Digits, names: list[str]) -> list[int]:
    wanted = set(names)
    labels = {label for label, name in enumerate(files.classes) if name in wanted}
    return [index for index, label in enumerate(files.targets) if label in labels]


def _read_names(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a file with one class folder name per line")
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"{path}: {amount(len(names), 'name')} of {amount(len(set(names)), 'class', 'classes')}: write two or "
            "more, without duplicates"
        )
    return sorted(names)
