# SPDX-License-Identifier: Apache-2.0
"""The images of a study: a folder or tar file, of which a file of names may choose the classes and a limit the number.

What a run's identity needs of them is `name`, counts and fingerprint; the images are decoded at the first run.
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

_FEWEST = 5  # training images of a class, below which an accuracy says nothing


@dataclass(frozen=True)
class Identity:
    """What results remember of their images."""

    name: str
    classes: int
    train: int
    val: int
    fingerprint: str


class Images:
    """Training and held-out images at one size.

    data: what `open_classification` takes. class_file: a file with the name of one class a line.
    limit: training images. images: as in Scale.
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
                f"such as {self.train_files.classes[0]!r}; write one name of a class folder a line"
            )
        chosen = _of_classes(self.train_files, self.classes)
        labels = [self.train_files.targets[index] for index in chosen]
        self.train_indices = [chosen[place] for place in balanced_subset(labels, limit)]
        self.val_indices = _of_classes(self.val_files, self.classes)
        count = len(self.train_indices)
        if count < _FEWEST * len(self.classes):
            raise ValueError(
                f"{data}: {count} training images for {len(self.classes)} classes are too few: a study needs "
                f"{_FEWEST} a class at least; add images, raise --limit or choose fewer classes"
            )
        if not self.val_indices:
            raise ValueError(
                f"{data}: none of its {len(self.val_files.targets)} held-out images is of the {len(self.classes)} "
                "classes chosen, and accuracy is measured on them; add images or choose other classes"
            )
        both = fingerprint(self.train_files, self.train_indices) + fingerprint(self.val_files, self.val_indices)
        self.identity = Identity(Path(data).name, len(self.classes), count, len(self.val_indices), both)

    @cached_property
    def train(self) -> Dataset[Any]:
        return self._open(self.train_files, self.train_indices, training=True)

    @cached_property
    def val(self) -> Dataset[Any]:
        return self._open(self.val_files, self.val_indices, training=False)

    def split(self, share: float) -> tuple[Dataset[Any], Dataset[Any]]:
        """The training images in two: most to train on, and a `share` of each class, seen as held-out ones are."""
        by_class = shuffled_by_class([self.train_files.targets[index] for index in self.train_indices])
        # one at least, but never the last one that there is to learn from
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
        """Of loading, mixing and smoothing; also what a checkpoint says about showing an image to the network."""
        # in memory images are cropped and flipped only; smoothing is the default's
        plain = ImageConfig(size=self.size, auto_augment=None, color_jitter=0, erasing=0, mixup=0, cutmix=0)
        return self.images or plain

    def describe(self) -> dict[str, Any]:
        return asdict(self.identity)


class _Chosen(Dataset[tuple[Any, int]]):
    """Some images of a folder under other labels."""

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
        raise FileNotFoundError(f"{path}: no such file; give a file with the name of one class folder a line")
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"{path}: {len(names)} names of {len(set(names))} classes: write two or more, each once")
    return sorted(names)
