# SPDX-License-Identifier: Apache-2.0
"""Labels of segmentation: which number in a PNG is which class, the classes' names, and reading such files.

The rule is one stated number, `ignore`: the label that counts nowhere. 0 is ADE20K's rule: the classes are the labels
1..N. Any other (255, or 11 for CamVid) leaves label 0 a class: the classes are 0..N-1. Inside the program classes are
0..N-1 and IGNORED everywhere.
"""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from .images import CorruptImage

IGNORED = -1

_NAMES = ("classes.txt", "objectInfo150.csv", "objectInfo150.txt")  # the latter two are ADE20K's
_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


@dataclass(frozen=True)
class LabelRule:
    """`num_classes` classes; `ignore` is the label that is none of them."""

    num_classes: int
    ignore: int

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"{self.num_classes} classes: there has to be at least one")
        if self.ignore < 0 or 0 < self.ignore < self.num_classes:
            raise ValueError(
                f"ignore {self.ignore}: with {self.num_classes} classes it is 0 (then the classes are the labels "
                f"1..{self.num_classes}) or at least {self.num_classes} (then they are 0..{self.num_classes - 1})"
            )

    @property
    def first(self) -> int:
        """The label of class 0."""
        return 1 if self.ignore == 0 else 0

    def __str__(self) -> str:
        return f"labels {self.first}..{self.first + self.num_classes - 1} are classes, {self.ignore} is ignored"

    def to_classes(self, labels: NDArray[np.integer], name: str) -> NDArray[np.int16]:
        """Labels of a file as classes and IGNORED; a label that is neither is a ValueError that names the file."""
        ignored = labels == self.ignore
        classes = labels.astype(np.int32) - self.first
        wrong = labels[~ignored & ((classes < 0) | (classes >= self.num_classes))]
        if wrong.size:
            raise ValueError(
                f"{name}: label {wrong.max()} in {wrong.size} pixels is neither: {self}; "
                "state the data's own rule (ignore, num_classes) or repair the file"
            )
        classes[ignored] = IGNORED
        return classes.astype(np.int16)

    def to_labels(self, classes: NDArray[np.integer]) -> NDArray[np.integer]:
        """The opposite, in the smallest type that PNG knows."""
        labels = np.where(classes == IGNORED, self.ignore, classes.astype(np.int32) + self.first)
        return labels.astype(np.uint8 if max(self.ignore, self.num_classes) < 256 else np.uint16)


def read_labels(path: Path | str) -> NDArray[np.integer]:
    """The numbers of a label file [H, W]: of a palette PNG its indices, not its colours. Raises CorruptImage."""
    try:
        with Image.open(path, formats=("PNG", "TIFF", "BMP", "GIF")) as image:
            if image.mode not in _MODES:
                raise CorruptImage(
                    f"{path}: a picture of mode {image.mode}, not labels: one number a pixel is needed "
                    "(8 or 16 bits, or a palette)"
                )
            labels = np.asarray(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such label file") from None
    except UnidentifiedImageError:
        raise CorruptImage(f"{path}: not a label file; PNG, TIFF, BMP and GIF keep labels as they are") from None
    except CorruptImage:
        raise
    # on hostile bytes Pillow's decoders raise whatever their parsing stumbles over
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk failed, not the file
        raise CorruptImage(f"{path}: cannot be read as labels: {' '.join(str(error).split())}") from error
    return labels.astype(np.uint8) if labels.dtype == bool else labels


def read_class_names(root: Path, num_classes: int | None, ignore: int) -> list[str]:
    """The names of a data set's classes, in the order of their labels.

    They come from ROOT/classes.txt (a name a line, or "LABEL NAME") or ADE20K's objectInfo150; a line for the label
    that is ignored is left out. Without a file `num_classes` has to say how many there are.
    """
    first = 1 if ignore == 0 else 0
    path = next((root / name for name in _NAMES if (root / name).is_file()), None)
    if path is None:
        if num_classes is None:
            raise ValueError(
                f"{root}: no classes.txt and no number of classes: write their names into {root / 'classes.txt'}, "
                "one a line in the order of the labels, or give a recipe's image.num_classes"
            )
        return [f"class {first + index}" for index in range(num_classes)]
    named = _names_by_label(path, first)
    named.pop(ignore, None)
    if not named:
        raise ValueError(f"{path} names no class: write their names into it, one a line in the order of the labels")
    names = [named[label] for label in sorted(named)]
    if sorted(named) != list(range(first, first + len(named))):
        raise ValueError(
            f"{path}: its labels must be {first}, {first + 1}, ... without a gap apart from the ignored {ignore}; "
            f"they are {', '.join(map(str, sorted(named)[:8]))}{', ...' if len(named) > 8 else ''}"
        )
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{path}: two classes are called {twice!r}; a name has to tell one class")
    if num_classes is not None and num_classes != len(names):
        raise ValueError(
            f"{path} names {len(names)} classes, but the number of classes given is {num_classes}: change one"
        )
    return names


def _names_by_label(path: Path, first: int) -> dict[int, str]:
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    if "\0" in text:  # UTF-16 as well, whose names would be garbled
        raise ValueError(f"{path} is not text in UTF-8: write the classes' names into it, one a line, and save it so")
    if path.name.startswith("objectInfo150"):
        rows = list(csv.reader(text.splitlines()[1:], delimiter="\t" if path.suffix == ".txt" else ","))
        try:
            # synonyms are separated by ; in one file and by , in the other
            synonyms = {int(row[0]): [word.strip() for word in re.split("[;,]", row[-1])] for row in rows if row}
        except (ValueError, IndexError):
            raise ValueError(
                f"{path} is not ADE20K's table: Idx, Ratio, Train, Val, Stuff, Name are its columns"
            ) from None
        # the first synonym, unless it is the first of two classes, as "screen" is
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
