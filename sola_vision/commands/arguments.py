# SPDX-License-Identifier: Apache-2.0
"""What commands share: their parser, where results go, the images they are about, names to print."""

import errno
import os
import sys
from argparse import SUPPRESS, Action, ArgumentParser, HelpFormatter, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from rich.text import Text

from sola_vision.data import SUFFIXES, ImageConfig
from sola_vision.tasks import Checkpoint, takes_one_size


class Arguments(ArgumentParser):
    """argparse without its page of usage before every error and options that are cut short, and with its defaults."""

    def __init__(
        self, prog: str, description: str | None = None, formatter_class: type[HelpFormatter] = HelpFormatter
    ) -> None:
        super().__init__(prog=prog, description=description, formatter_class=formatter_class, allow_abbrev=False)

    def add_argument(self, *names: Any, **more: Any) -> Action:
        """As argparse's; the help says the default where there is one and it does not say it already."""
        action = super().add_argument(*names, **more)
        unsaid = action.default is None or isinstance(action.default, bool) or action.default in ([], SUPPRESS)
        if action.option_strings and action.help and "default" not in action.help and not unsaid:
            values = action.default if isinstance(action.default, list) else [action.default]
            action.help += f" (default: {' '.join(map(str, values))})"
        return action

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; `{self.prog} --help` lists what there is")


def out_folder(path: str | Path) -> Path:
    """Where results go. A file in its way is found before the work, which could not be kept otherwise."""
    path = Path(path)
    if any(place.is_file() for place in (path, *path.parents)):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    return path


def check_folder_of(file: str | None) -> None:
    """Of a file that will be written: it has to be there before the work."""
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file)


def refuse_unused(options: Namespace, file: str, names: Sequence[str]) -> None:
    """Refuses what would have no effect beside --results or --predictions, which need no network."""
    for name in names:
        if (value := getattr(options, name)) is not None:
            values = value if isinstance(value, list) else [] if value is True else [value]
            given = " ".join([f"--{name}", *map(str, values)])
            raise ValueError(f"{given} has no use beside --{file}, which is scored as it is: leave one out")


def image_settings(checkpoint: Checkpoint, size: int | None) -> ImageConfig:
    """The settings that the checkpoint was trained with, at another size if one is asked for."""
    if size is None or size == checkpoint.image.size:
        return checkpoint.image
    if takes_one_size(checkpoint.name):
        raise ValueError(f"--size {size}: {checkpoint.name} takes only images of {checkpoint.image.size} pixels")
    return replace(checkpoint.image, size=size)


def plain(name: str) -> Text:
    """A name as it is: rich would take brackets for markup, and a file's bytes need not be text."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name))


def image_files(source: Path, out: Path | None = None) -> list[Path]:
    """The image, or all images of the folder and of the folders in it, by name; hidden ones are nobody's photos, and
    those below `out` are what an earlier call has left there.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such image or folder")
    if source.is_file():
        return [source]
    found = (p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    files = sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(source).parts))
    if out is not None and source.resolve() in out.resolve().parents:
        files = [p for p in files if out.resolve() not in p.resolve().parents]
    if not files:
        raise ValueError(f"{source} holds no images ({', '.join(sorted(SUFFIXES))})")
    return files


def beside(checkpoint: str) -> Path:
    """Where an evaluation of this file, or of a run's folder, goes unless --out says it."""
    path = Path(checkpoint)
    return (path if path.is_dir() else path.parent) / "eval"


def tell_unreadable(number: int) -> None:
    """How many images an evaluation had to leave out."""
    if number:
        images = "1 image could not be read and is" if number == 1 else f"{number} images could not be read and are"
        print(f"{images} left out", file=sys.stderr)


def left_out(rows: Sequence[object], unreadable: Sequence[str]) -> None:
    """Names the images that could not be read; a ValueError if there was no other."""
    if not rows:
        more = f" (and {len(unreadable) - 1} other images)" if len(unreadable) > 1 else ""
        raise ValueError(unreadable[0] + more)
    for reason in unreadable:
        print(f"sola: left out: {reason}", file=sys.stderr)
