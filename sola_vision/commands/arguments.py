# SPDX-License-Identifier: Apache-2.0
"""Shared by the commands: argument parser, values of options, output folders, input images, names to print."""

import errno
import os
import sys
from argparse import SUPPRESS, Action, ArgumentParser, HelpFormatter, Namespace
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from rich.text import Text

from sola_vision.data import SUFFIXES, ImageConfig
from sola_vision.tasks import Checkpoint, takes_one_size
from sola_vision.wording import amount


class Arguments(ArgumentParser):
    """An ArgumentParser that raises ValueError of one line, shows defaults, and accepts no abbreviations."""

    def __init__(
        self,
        prog: str,
        description: str | None = None,
        formatter_class: type[HelpFormatter] = HelpFormatter,
        epilog: str | None = None,
    ) -> None:
        super().__init__(
            prog=prog, description=description, formatter_class=formatter_class, epilog=epilog, allow_abbrev=False
        )

    def add_argument(self, *names: Any, **more: Any) -> Action:
        """Add an argument, and append its default to the help text, unless that mentions it already."""
        action = super().add_argument(*names, **more)
        no_default = action.default is None or isinstance(action.default, bool) or action.default in ([], SUPPRESS)
        if action.option_strings and action.help and "default" not in action.help and not no_default:
            values = action.default if isinstance(action.default, list) else [action.default]
            action.help += f" (default: {' '.join(map(str, values))})"
        return action

    def has_option(self, word: str) -> bool:
        """True if a word of a command line, such as --size or --size=32, is an option of this parser."""
        return word.partition("=")[0] in self._option_string_actions

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")


def out_folder(path: str | Path) -> Path:
    """Return the output folder. Raise NotADirectoryError, before any work, if it or a parent of it is a file."""
    path = Path(path)
    if any(place.is_file() for place in (path, *path.parents)):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    return path


def check_parent_folder(file: str | None) -> None:
    """Raise FileNotFoundError, before any work, if the folder of a file to be written does not exist."""
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file)


def check_minimum(options: Namespace, **least: int) -> None:
    """Raise ValueError for the first given option, or value in its list, that is less than its smallest value."""
    for name, minimum in least.items():
        given = getattr(options, name)
        value = min(given) if isinstance(given, list) else given
        if value is not None and value < minimum:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {minimum}")


def parse_size(text: str, option: str = "--size") -> tuple[int, int]:
    """Parse "224" or "1333x800" as (height, width); errors name `option`."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} {text!r} must be HEIGHTxWIDTH or one number, in pixels, such as 224 or 1333x800")
    return int(parts[0]), int(parts[-1])


def refuse_unused(options: Namespace, file: str, names: Sequence[str]) -> None:
    """Raise ValueError for an option that has no effect with --results or --predictions, which need no network."""
    for name in names:
        if (value := getattr(options, name)) is not None:
            values = value if isinstance(value, list) else [] if value is True else [value]
            given = " ".join([f"--{name}", *map(str, values)])
            raise ValueError(f"{given} has no effect with --{file}: leave one out")


def image_settings(checkpoint: Checkpoint, size: int | None) -> ImageConfig:
    """Return the settings that the checkpoint was trained with, at another size if one is given."""
    if size is None or size == checkpoint.image.size:
        return checkpoint.image
    if takes_one_size(checkpoint.name):
        raise ValueError(f"--size {size}: {checkpoint.name} takes only images of {checkpoint.image.size} pixels")
    return replace(checkpoint.image, size=size)


def plain(name: str) -> Text:
    """Return a name as plain text: rich would parse brackets as markup, and file names may be unprintable."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name))


def image_files(source: Path, out: Path | None = None) -> list[Path]:
    """Return the image, or all images of the folder and its subfolders, sorted by name.

    Hidden files are skipped, and so are files below `out`, the output of an earlier call.
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
        raise ValueError(f"{source} contains no images ({', '.join(sorted(SUFFIXES))})")
    return files


def name_below(file: Path, source: Path) -> str:
    """Return the path of an image of `image_files` below the folder `source`, or its name if `source` is the image."""
    return file.relative_to(source).as_posix() if source.is_dir() else file.name


def check_leftovers(out: Path, written: Iterable[Path]) -> None:
    """Raise ValueError if the pictures or labels in `out` are not all among the files that will be written."""
    replaced = {out / path for path in written}
    for name in ("labels", "pictures"):
        for path in sorted((out / name).rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(out).parts)
            if path.is_file() and not hidden and path not in replaced:
                raise ValueError(
                    f"--out {out}: {path} would be mixed with the results of this call, which do not replace it; "
                    "use another folder, or remove the earlier results"
                )


def evaluation_folder(checkpoint: str) -> Path:
    """Return the default of --out: eval/ in the run's folder, or next to the checkpoint file."""
    path = Path(checkpoint)
    return (path if path.is_dir() else path.parent) / "eval"


def print_skipped_count(number: int) -> None:
    """Print how many images an evaluation has skipped."""
    if number:
        images = amount(number, "image could not be read and was", "images could not be read and were")
        print(f"{images} skipped", file=sys.stderr)


def print_skipped(rows: Sequence[object], unreadable: Sequence[str]) -> None:
    """Print the images that could not be read; raise ValueError if no image could be."""
    if not rows:
        others = len(unreadable) - 1
        more = f" (and {amount(others, 'other image')})" if others else ""
        raise ValueError(unreadable[0] + more)
    for reason in unreadable:
        print(f"sola: skipped: {reason}", file=sys.stderr)
