# SPDX-License-Identifier: Apache-2.0
"""Classification data in the ImageFolder layout: ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg.

ROOT is a folder, one .tar file with train/ and val/ inside (possibly below one more folder), or a folder of shards
(train-000.tar, train-001.tar, ..., with CLASS/name.jpg inside). Tar files are read in place. The order of the samples
is the same for all three: by class, then by name.
"""

import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..wording import amount
from . import tar
from .images import SUFFIXES, read_image

logger = logging.getLogger(__name__)

_SPLITS = {"train": ("train",), "val": ("val", "validation", "test")}
_LAYOUT = "expected ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg"


class ImageFolder(Dataset[tuple[Any, int]]):
    """Images and integer labels of one split; `classes` are the sorted names, or the given ones in their order.

    `samples` are paths below the split ("cat/001.jpg"), `targets` their labels. With `classes` (of the training split
    or a checkpoint) the split may lack some of them but must not have others.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        transform: Callable[[Image.Image], Any] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        listing = _find(Path(root).expanduser(), split)
        listing.log_ignored()
        self.transform = transform
        self.classes = listing.check_classes(classes)
        self._base = listing.where
        self._archives = listing.archives
        self._inside = listing.inside
        labels = {name: label for label, name in enumerate(self.classes)}
        found = sorted(listing.files, key=lambda file: (file[0], file[1], file[2]))
        self.samples = [name for _, name, *_ in found]
        self.targets = [labels[class_name] for class_name, *_ in found]
        # one array instead of a million tuples: forked workers share it without copying
        self._places = np.array([file[2:] for file in found], dtype=np.int64)  # shard, offset, size

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.image(index)
        return (image if self.transform is None else self.transform(image)), self.targets[index]

    def image(self, index: int) -> Image.Image:
        """Return image `index` without any transform, upright and in RGB; CorruptImage if it cannot be read."""
        if not self._archives:
            return read_image(os.path.join(self._base, self.samples[index]), name=self.location(index))
        shard, offset, size = (int(number) for number in self._places[index])
        return read_image(BytesIO(tar.read(self._archives[shard], offset, size)), name=self.location(index))

    def location(self, index: int) -> str:
        """Return the location of sample `index` for messages: a path, or ARCHIVE.tar:PATH."""
        if not self._archives:
            return _printable(os.path.join(self._base, self.samples[index]))
        archive = self._archives[int(self._places[index][0])]
        return _printable(f"{archive.path}:{self._inside}{self.samples[index]}")


class _Listing:
    """The files below one split, before they are checked. A class may have no images."""

    def __init__(self, where: str, archives: list[tar.Archive]) -> None:
        self.where = where  # for messages: a folder, or ARCHIVE.tar:FOLDER (the first of several shards)
        self.archives = archives
        self.inside = ""  # path of the split in its archives, with a trailing slash
        self.found_classes: dict[str, str] = {}  # printable name -> name on disk
        self._files: dict[tuple[int, str], tuple[str, int, int]] = {}
        self.hidden = 0
        self.foreign: list[str] = []
        self.unsafe = 0

    @property
    def files(self) -> Iterable[tuple[str, str, int, int, int]]:
        """(class, path below the split, shard, offset, size) of every image."""
        for (shard, name), (class_name, offset, size) in self._files.items():
            yield class_name, name, shard, offset, size

    def add_folder(self, parts: Sequence[str]) -> None:
        """Add a folder; its first part is a class."""
        if parts and not parts[0].startswith("."):
            name = _printable(parts[0])
            other = self.found_classes.setdefault(name, parts[0])
            if other != parts[0] and unicodedata.normalize("NFC", other) != unicodedata.normalize("NFC", parts[0]):
                one, two = (os.fsencode(written) for written in sorted((other, parts[0])))
                raise ValueError(
                    f"{_printable(self.where)}: the class folders {one!r} and {two!r} cannot be told apart "
                    f"(both print as {name}): rename them in UTF-8, without control characters"
                )

    def add_file(self, parts: Sequence[str], shard: int = 0, offset: int = 0, size: int = 0) -> None:
        """Add a file, or count it if it is hidden or not an image of a class."""
        if any(part.startswith(".") for part in parts):
            self.hidden += 1
            return
        if len(parts) > 1:
            self.add_folder(parts)
        if len(parts) < 2 or not parts[-1].lower().endswith(SUFFIXES):
            self.foreign.append("/".join(parts))
            return
        # a dict, because the later of two tar members with the same name replaces the earlier
        self._files[shard, "/".join(parts)] = (_printable(parts[0]), offset, size)

    def log_ignored(self) -> None:
        """Log the number of files that were ignored."""
        if self.foreign or self.unsafe:
            parts = []
            if number := len(self.foreign):
                what = amount(number, "file that is not an image", "files that are not images")
                parts.append(f"{what} in a class folder (the first: {_printable(self.foreign[0])})")
            if self.hidden:
                parts.append(amount(self.hidden, "hidden file"))
            if self.unsafe:
                parts.append(amount(self.unsafe, "link or unsafe path", "links or unsafe paths"))
            logger.warning("%s: ignored %s", _printable(self.where), ", ".join(parts))
        elif self.hidden:
            logger.info("%s: ignored %s", _printable(self.where), amount(self.hidden, "hidden file"))

    def check_classes(self, expected: Sequence[str] | None) -> list[str]:
        """Return the class names; ValueError if classes are missing, empty or not among the expected ones."""
        where = _printable(self.where)
        slash = "" if where.endswith(":") else "/"
        if not self.found_classes:
            raise ValueError(f"{where}: no class folders; put the images of each class into {where}{slash}CLASS/")
        full = {class_name for class_name, *_ in self.files}
        # with a given list a class may be missing, so its folder may also be empty
        empty = sorted(self.found_classes.keys() - full) if expected is None or not full else []
        if empty:
            others = len(empty) - 1
            more = f" (and {amount(others, 'other class', 'other classes')})" if others else ""
            raise ValueError(
                f"{where}{slash}{empty[0]}: class without images{more}; "
                "add images (.jpg, .png, ...) or remove the folder"
            )
        if expected is None:
            return sorted(full)
        # classes of a checkpoint may come from a file system with another Unicode normalisation form
        names = [_printable(name) for name in expected]
        unknown = sorted(full - set(names))
        if unknown:
            more = f" (and {amount(len(unknown) - 1, 'other')})" if len(unknown) > 1 else ""
            some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(
                f"{where}{slash}{unknown[0]}: class {unknown[0]!r}{more} is not among the "
                f"{amount(len(names), 'known class', 'known classes')} ({some}); "
                "rename or remove the folder, or train with it"
            )
        return names


def _find(root: Path, split: str) -> _Listing:
    choices = _SPLITS.get(split, (split,))
    if root.is_file():
        if root.suffix.lower() != ".tar":
            raise ValueError(f"{root}: neither a folder nor an uncompressed .tar file; {_LAYOUT}")
        return _split_of_tar(root, split, choices)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder or .tar file; use the folder that holds train/ and val/")
    for name in choices:
        if (root / name).is_dir():
            return _scan_folder(root / name)
        if shards := _shards(root, name):
            return _scan_shards(shards, name)
    raise _no_split(root, choices, (entry.name for entry in root.iterdir()))


def _no_split(root: Path, choices: Sequence[str], found: Iterable[str]) -> ValueError:
    present = sorted(_printable(name) for name in found if not name.startswith("."))
    some = ", ".join(present[:4]) + (", ..." if len(present) > 4 else "") if present else "nothing"
    wanted = " or ".join(f"{name}/" for name in choices)
    return ValueError(f"{root}: no {wanted} (found: {some}); {_LAYOUT}, or shards {choices[0]}-000.tar, ...")


def _scan_folder(base: Path) -> _Listing:
    listing = _Listing(str(base), [])

    def walk(folder: str, parts: tuple[str, ...], above: frozenset[tuple[int, int]]) -> None:
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            return  # a link to a folder that contains it
        with os.scandir(folder) as entries:
            for entry in entries:
                below = (*parts, entry.name)
                # os.path functions, because an entry's methods raise an error for a link that points to itself
                if not os.path.isdir(entry.path):
                    # a broken link is neither a file nor an image
                    listing.add_file(below if os.path.isfile(entry.path) else (entry.name,))
                elif entry.name.startswith("."):
                    listing.hidden += 1
                else:
                    listing.add_folder(below)
                    walk(entry.path, below, above | {identity})

    walk(str(base), (), frozenset())
    return listing


def _split_of_tar(path: Path, split: str, choices: Sequence[str]) -> _Listing:
    archive = tar.Archive.at(path)
    members = list(tar.index(archive))
    # candidates for splits: folders, and paths with a class folder and a file below
    paths = [member.parts for member in members]
    outer = {parts[0] for parts, member in zip(paths, members, strict=True) if len(parts) > 2 or _names(member, 1)}
    inner = {parts[:2] for parts, member in zip(paths, members, strict=True) if len(parts) > 3 or _names(member, 2)}
    known = {split, *(name for names in _SPLITS.values() for name in names)}
    tops = {top for top, name in inner if name in known}
    top = () if outer & known or len(tops) != 1 else (tops.pop(),)
    splits = {name for first, name in inner if (first,) == top} if top else outer
    chosen = next((name for name in choices if name in splits), None)
    if chosen is None:
        raise _no_split(path, choices, splits)
    prefix = (*top, chosen)
    listing = _Listing(f"{path}:{'/'.join(prefix)}", [archive])
    listing.inside = "/".join(prefix) + "/"
    inside = [m._replace(parts=m.parts[len(prefix) :]) for m in members if m.parts[: len(prefix)] == prefix]
    _add_members(listing, 0, inside)
    listing.unsafe = sum(not parts and not member.is_folder for parts, member in zip(paths, members, strict=True))
    return listing


def _names(member: tar.Member, depth: int) -> bool:
    return member.is_folder and len(member.parts) == depth


def _shards(root: Path, name: str) -> list[Path]:
    pattern = re.compile(rf"{re.escape(name)}([-_.].*)?\.tar", re.IGNORECASE)
    return sorted(path for path in root.iterdir() if pattern.fullmatch(path.name) and path.is_file())


def _scan_shards(shards: Sequence[Path], name: str) -> _Listing:
    archives = [tar.Archive.at(path) for path in shards]
    listing = _Listing(f"{shards[0]}:", archives)
    contents = [list(tar.index(archive)) for archive in archives]
    # shards packed one level too high (train/CLASS/name.jpg) would give a single class called "train"
    heads = {member.parts[0] for members in contents for member in members if member.parts}
    strip = 1 if heads == {name} and any(len(m.parts) > 2 for members in contents for m in members) else 0
    for shard, members in enumerate(contents):
        _add_members(listing, shard, (m._replace(parts=m.parts[strip:]) if m.parts else m for m in members))
        listing.unsafe += sum(not member.parts and not member.is_folder for member in members)
    if strip:
        listing.where += name
        listing.inside = f"{name}/"
    return listing


def _add_members(listing: _Listing, shard: int, members: Iterable[tar.Member]) -> None:
    for member in members:
        if member.is_folder:
            listing.add_folder(member.parts)
        elif member.parts:
            listing.add_file(member.parts, shard, member.offset, member.size)


def _printable(name: str) -> str:
    """Return a printable name: accents composed (macOS stores them decomposed), invalid bytes and controls replaced."""
    text = unicodedata.normalize("NFC", name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
