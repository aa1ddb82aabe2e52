# SPDX-License-Identifier: Apache-2.0
"""Shared by the evaluations of all tasks: sharding over processes, unreadable images, result files."""

import csv
import json
import math
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress

from sola_vision.engine import EvaluationBatches, World, write_json

T = TypeVar("T")

_SOURCES = ("checkpoint", "results", "predictions", "data", "split", "annotations")
# pictures that evaluations of some tasks write next to eval.json and classes.csv
_PICTURES = ("confusion.png", "predictions.png", "worst.png", "precision_recall.png")


def finite(value: float) -> float | None:
    """Return the value, or None if it is infinite or NaN, which JSON does not have."""
    return value if math.isfinite(value) else None


def shard(size: int, world: World) -> range:
    """Return the indices of the images that this process evaluates."""
    return range(world.rank, size, world.size)


def agree_on_skipped(batches: EvaluationBatches) -> list[int]:
    """Exchange the unreadable images between the processes after an evaluation, and report them on the first one.

    Returns the indices of the images that this process has read. Raises ValueError if too many are unreadable.
    """
    skipped, world = batches.skipped, batches.world
    read = [index for index in shard(skipped.size, world) if index not in skipped.fresh]
    skipped.share(lambda text: print(f"sola: {text}", file=sys.stderr) if world.is_main else None)
    return read


def watched(items: Iterable[T], total: int, description: str, shown: bool = True) -> Iterator[T]:
    """Yield the items with a progress bar on standard error, if that is a terminal."""
    console = Console(stderr=True)
    if not (shown and console.is_terminal):  # not Progress(disable=True), which prints an empty line before rich 14.3
        yield from items
        return
    with Progress(console=console, transient=True) as bar:
        yield from bar.track(items, total=total, description=description)


def prepare_folder(out: Path, options: Namespace) -> None:
    """Create the folder of an evaluation and try to write to it, since a failure afterwards would lose the results;
    print which evaluation it has if that is of other data or of another checkpoint.
    """
    out.mkdir(parents=True, exist_ok=True)
    probe = out / ".probe"
    probe.touch()
    probe.unlink(missing_ok=True)  # another evaluation may do the same
    old = _earlier(out)
    given = {name: old[name] for name in _SOURCES if name in old}
    if any(value != getattr(options, name, None) for name, value in given.items()):
        of = " ".join(f"--{name} {value}" for name, value in given.items())
        print(f"sola: the evaluation in {out} will be replaced: {of}; another --out keeps it", file=sys.stderr)


def _earlier(out: Path) -> dict[str, Any]:
    """Return the eval.json of the folder, or {} if it has none that is readable."""
    try:
        document = json.loads((out / "eval.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def write_results(result: dict[str, Any], out: Path) -> None:
    """Write eval.json, and classes.csv with a row for each of result["classes"].

    The pictures of an earlier evaluation are removed, so that the folder has those of one only.
    """
    if _earlier(out):
        for name in _PICTURES:
            (out / name).unlink(missing_ok=True)
    write_json(out / "eval.json", result)
    write_csv(out / "classes.csv", result["classes"])


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows with a header of all their names; a name that a row lacks is an empty cell."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
