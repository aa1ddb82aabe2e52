# SPDX-License-Identifier: Apache-2.0
"""Labels of segmentation: the mapping from labels in a PNG to classes, the class names, and reading of label files.

The mapping is defined by one number, `ignore`, the label that is not evaluated. With 0, ADE20K's rule, the classes are
the labels 1..N. With any other (255, or 11 for CamVid) label 0 is a class: the classes are 0..N-1. In this package
classes are always 0..N-1 and IGNORED.
"""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..wording import amount
from .images import CorruptImage

IGNORED = -1

_NAMES = ("classes.txt", "objectInfo150.csv", "objectInfo150.txt")  # the latter two are ADE20K's
_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


@dataclass(frozen=True)
class LabelRule:
    """The mapping from labels to `num_classes` classes; `ignore` is the label of pixels without a class."""

    num_classes: int
    ignore: int

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes} must be at least 1")
        if self.ignore < 0 or 0 < self.ignore < self.num_classes:
            raise ValueError(
                f"ignore={self.ignore} must be 0 (classes are the labels 1..{self.num_classes}) or at least "
                f"{self.num_classes} (classes are the labels 0..{self.num_classes - 1})"
            )

    @property
    def first(self) -> int:
        """The label of class 0."""
        return 1 if self.ignore == 0 else 0

    def __str__(self) -> str:
        return f"labels {self.first}..{self.first + self.num_classes - 1} are classes, {self.ignore} is ignored"

    def to_classes(self, labels: NDArray[np.integer], name: str) -> NDArray[np.int16]:
        """Return the labels of a file as classes and IGNORED; raise ValueError with `name` for any other label."""
        ignored = labels == self.ignore
        classes = labels.astype(np.int32) - self.first
        wrong = labels[~ignored & ((classes < 0) | (classes >= self.num_classes))]
        if wrong.size:
            raise ValueError(
                f"{name}: label {wrong.max()} in {amount(wrong.size, 'pixel')} is not valid: {self}; "
                "set ignore and num_classes to the data's rule, or repair the file"
            )
        classes[ignored] = IGNORED
        return classes.astype(np.int16)

    def to_labels(self, classes: NDArray[np.integer]) -> NDArray[np.integer]:
        """Return classes as labels (the inverse of `to_classes`), in the smallest type that PNG supports."""
        labels = np.where(classes == IGNORED, self.ignore, classes.astype(np.int32) + self.first)
        return labels.astype(np.uint8 if max(self.ignore, self.num_classes) < 256 else np.uint16)


def read_labels(path: Path | str) -> NDArray[np.integer]:
    """Return the labels [H, W] of a file; of a palette PNG the indices, not the colours. Raise CorruptImage."""
    try:
        with Image.open(path, formats=("PNG", "TIFF", "BMP", "GIF")) as image:
            if image.mode not in _MODES:
                raise CorruptImage(
                    f"{path}: an image of mode {image.mode}, not labels: use one number per pixel "
                    "(8 or 16 bits, or a palette)"
                )
            labels = np.asarray(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such label file") from None
    except UnidentifiedImageError:
        raise CorruptImage(f"{path}: not a label file; use a lossless format: PNG, TIFF, BMP or GIF") from None
    except CorruptImage:
        raise
    # Pillow's decoders raise many types on malformed bytes
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk failed, not the file
        raise CorruptImage(f"{path}: cannot be read as labels: {' '.join(str(error).split())}") from error
    return labels.astype(np.uint8) if labels.dtype == bool else labels


def class_names_file(root: Path) -> Path | None:
    """Return the file in the folder `root` that names the classes, or None."""
    return next((root / name for name in _NAMES if (root / name).is_file()), None)


def read_class_names(root: Path, num_classes: int | None, ignore: int) -> list[str]:
    """Return the names of a dataset's classes, in the order of their labels.

    They are read from ROOT/classes.txt (one name per line, or "LABEL NAME") or ADE20K's objectInfo150; a line for the
    ignored label is skipped. Without a file `num_classes` is required.
    """
    first = 1 if ignore == 0 else 0
    path = class_names_file(root)
    if path is None:
        if num_classes is None:
            raise ValueError(
                f"{root}: no classes.txt and no number of classes: write the class names into {root / 'classes.txt'}, "
                "one per line in the order of the labels, or set image.num_classes"
            )
        return [f"class {first + index}" for index in range(num_classes)]
    named = _names_by_label(path, first)
    named.pop(ignore, None)
    if not named:
        raise ValueError(
            f"{path} names no class: write the class names into it, one per line in the order of the labels"
        )
    names = [named[label] for label in sorted(named)]
    if sorted(named) != list(range(first, first + len(named))):
        raise ValueError(
            f"{path}: labels must be {first}, {first + 1}, ... without a gap except the ignored {ignore} "
            f"(got {', '.join(map(str, sorted(named)[:8]))}{', ...' if len(named) > 8 else ''})"
        )
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{path}: duplicate class name {twice!r}: use unique names")
    if num_classes is not None and num_classes != len(names):
        raise ValueError(
            f"{path} names {amount(len(names), 'class', 'classes')}, but the number of classes is set to "
            f"{num_classes}: change one of them"
        )
    return names


def _names_by_label(path: Path, first: int) -> dict[int, str]:
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    if "\0" in text:  # also true for UTF-16, whose names would be garbled
        raise ValueError(f"{path} is not text in UTF-8: write the class names, one per line, in UTF-8")
    if path.name.startswith("objectInfo150"):
        rows = list(csv.reader(text.splitlines()[1:], delimiter="\t" if path.suffix == ".txt" else ","))
        try:
            # synonyms are separated by ; in one file and by , in the other
            synonyms = {int(row[0]): [word.strip() for word in re.split("[;,]", row[-1])] for row in rows if row}
        except (ValueError, IndexError):
            raise ValueError(
                f"{path} is not ADE20K's table: its columns must be Idx, Ratio, Train, Val, Stuff, Name"
            ) from None
        # the first synonym, unless two classes share it, such as "screen"
        first_words = [words[0] for words in synonyms.values()]
        return {
            label: words[0] if first_words.count(words[0]) == 1 else ", ".join(words)
            for label, words in synonyms.items()
        }
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    numbered = [re.fullmatch(r"(\d+)[\s:,]+(.+)", line) for line in lines]
    if lines and all(numbered):
        return {int(found[1]): found[2] for found in numbered if found}
    return {first + index: line for index, line in enumerate(lines)}
