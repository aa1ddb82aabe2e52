# SPDX-License-Identifier: Apache-2.0
"""Shared by the evaluations of all tasks: sharding over processes, unreadable images, result files."""

import csv
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress

from sola_vision.engine import EvaluationBatches, World, write_json

T = TypeVar("T")


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
    with Progress(console=console, disable=not (shown and console.is_terminal), transient=True) as bar:
        yield from bar.track(items, total=total, description=description)


def write_results(result: dict[str, Any], out: Path) -> None:
    """Write eval.json, and classes.csv with a row for each of result["classes"]."""
    write_json(out / "eval.json", result)
    write_csv(out / "classes.csv", result["classes"])


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows with a header of all their names; a name that a row lacks is an empty cell."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
