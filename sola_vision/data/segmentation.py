# SPDX-License-Identifier: Apache-2.0
"""Segmentation data in ADE20K's layout: ROOT/images/SPLIT/NAME.jpg and ROOT/annotations/SPLIT/NAME.png.

SPLIT is training or train, validation or val; subfolders of a split are searched, and an image and its label have the
same path and name except for the suffix. The mapping from labels to classes is set by the recipe (`labels.LabelRule`).
"""

import logging
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from ..wording import amount
from .images import SUFFIXES, CorruptImage, read_image
from .labels import IGNORED, LabelRule, read_class_names, read_labels

logger = logging.getLogger(__name__)

_SPLITS = {"train": ("training", "train"), "val": ("validation", "val")}
_LAYOUT = "expected ROOT/images/SPLIT/NAME.jpg and ROOT/annotations/SPLIT/NAME.png, SPLIT training or validation"
_LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")
_CHECKED = 16  # number of labels that are checked before a run starts

Transform = Callable[[Image.Image, NDArray[np.int16]], Any]


class SegmentationFolder(Dataset[Any]):
    """Images and pixel classes of one split; samples are transform(image, classes [H, W]).

    Classes are 0..N-1 and IGNORED, independent of the labels in the files. `names` holds the paths below the split.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        rule: LabelRule,
        transform: Transform | None = None,
    ) -> None:
        self.rule = rule
        self.transform = transform
        root = Path(root).expanduser()
        self.images_folder = _split_folder(root, "images", split)
        self.labels_folder = _split_folder(root, "annotations", split)
        images = _files(self.images_folder, SUFFIXES)
        labels = _files(self.labels_folder, _LABEL_SUFFIXES)
        if not images:
            raise ValueError(f"{self.images_folder}: no images; {_LAYOUT}")
        without = [name for name in images if name not in labels]
        if without:
            more = f" ({len(without)} of {len(images)} images have none)" if len(without) > 1 else ""
            missing = self.labels_folder / f"{without[0]}.png"
            raise FileNotFoundError(f"{images[without[0]]}: no label {missing}{more}; add it or remove the image")
        if spare := len(labels.keys() - images.keys()):
            logger.warning("%s: skipped %s without an image", self.labels_folder, amount(spare, "label"))
        self.names = list(images)
        self.images = [images[name] for name in self.names]
        self.labels = [labels[name] for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Any:
        image, classes = self.image(index), self.classes(index)
        self._check_size(index, image, classes)
        return (image, classes) if self.transform is None else self.transform(image, classes)

    def image(self, index: int) -> Image.Image:
        """Return image `index` without any transform, upright and in RGB; CorruptImage if it cannot be read."""
        return read_image(self.images[index])

    def classes(self, index: int) -> NDArray[np.int16]:
        """Return the classes [H, W] of the pixels of image `index`."""
        return self.rule.to_classes(read_labels(self.labels[index]), str(self.labels[index]))

    def _check_size(self, index: int, image: Image.Image, classes: NDArray[np.int16]) -> None:
        if (image.height, image.width) != classes.shape:
            raise ValueError(
                f"{self.labels[index]} has {classes.shape[1]}x{classes.shape[0]} pixels, its image "
                f"{self.images[index].name} {image.width}x{image.height}: they must have the same size"
            )

    def check_labels(self) -> None:
        """Check a sample of the labels; raise ValueError if the label rule does not fit, before a run starts."""
        seen: set[int] = set()
        chosen = np.unique(np.linspace(0, len(self) - 1, _CHECKED).round().astype(int))
        for index in chosen.tolist():
            classes = self.classes(index)
            # corrupt images are counted and skipped later, when they are loaded
            with suppress(CorruptImage):
                self._check_size(index, self.image(index), classes)
            seen.update(np.unique(classes).tolist())
        # a class may be rare, or a set may only have background; but only 0 and the ignored 255 look like a binary mask
        if self.rule.num_classes > 1 and self.rule.ignore == 255 and seen == {IGNORED, 0}:
            raise ValueError(
                f"{self.labels_folder}: {amount(len(chosen), 'label checked holds', 'labels checked hold')} only class "
                f"0 and the ignored 255 ({self.rule}); masks of 0 and 255 must be written as labels 0 and 1"
            )


def open_segmentation(
    root: str | Path,
    split: str,
    ignore: int,
    num_classes: int | None,
    transform: Transform | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[SegmentationFolder, list[str]]:
    """Return the "train" or "val" split and its class names: `classes` (of a checkpoint) or those of the data."""
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; {_LAYOUT}")
    names = list(classes) if classes is not None else read_class_names(folder, num_classes, ignore)
    return SegmentationFolder(folder, split, LabelRule(len(names), ignore), transform), names


def label_files(folder: Path) -> dict[str, Path]:
    """Return the label files below a folder, by their path without suffix."""
    return _files(folder, _LABEL_SUFFIXES)


def _split_folder(root: Path, what: str, split: str) -> Path:
    choices = _SPLITS.get(split, (split,))
    for name in choices:
        if (root / what / name).is_dir():
            return root / what / name
    raise FileNotFoundError(f"{root}: no folder {what}/{f' or {what}/'.join(choices)}; {_LAYOUT}")


def _files(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Return the files by path below the folder without suffix, sorted; a duplicate name is a ValueError."""
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        if any(part.startswith(".") for part in below.parts) or path.suffix.lower() not in suffixes:
            continue
        if not path.is_file():
            continue
        # names of images and labels may be in different Unicode normalisation forms
        name = unicodedata.normalize("NFC", below.with_suffix("").as_posix())
        if name in files:
            raise ValueError(f"{path}: duplicate of {files[name].name}; use one file per image and one per label")
        files[name] = path
    return files
