# SPDX-License-Identifier: Apache-2.0
"""A schedule as tiles, each layer's letter with its multiply-adds, and the cost of the whole network.

Counted on meta tensors, which takes about a second.
"""

from dataclasses import dataclass
from functools import lru_cache

from sola_vision import config
from sola_vision.analysis.cost import Cost, build, count
from sola_vision.schedule import Schedule, parse_schedule

SIZES = {f"sola_{size.__name__}": size for size in (config.nano, config.tiny, config.small, config.base)}


@dataclass(frozen=True)
class Tile:
    """A layer: its stage and index (from zero), L or S, and its multiply-adds, if the schedule can be built."""

    stage: int
    layer: int
    kind: str
    gmacs: float | None

    @property
    def text(self) -> str:
        """The label of the tile."""
        return self.kind if self.gmacs is None else f"{self.kind}  {self.gmacs:.3f}"


@dataclass(frozen=True)
class Price:
    """A schedule's tiles by stage, and a line with its cost, or the error if it cannot be built."""

    schedule: str
    stages: tuple[tuple[Tile, ...], ...]
    summary: str
    error: str = ""


def toggled(schedule: str, stage: int, layer: int) -> str:
    """Return the schedule with one layer changed to the other kind."""
    parsed = parse_schedule(schedule)
    letters = list(parsed.stages[stage])
    letters[layer] = "S" if letters[layer] == "L" else "L"
    stages = [*parsed.stages[:stage], "".join(letters), *parsed.stages[stage + 1 :]]
    return str(Schedule(tuple(stages)))


@lru_cache(maxsize=256)
def price(name: str, schedule: str, size: int) -> Price:
    """Return the cost of a sola_* network with this schedule, for square images, relative to its default schedule."""
    parsed = parse_schedule(schedule)
    try:
        cost = _count(name, schedule, size)
    except ValueError as error:
        return Price(schedule, _tiles(parsed, None), "", " ".join(str(error).split()))
    default = _count(name, SIZES[name]().schedule, size)
    summary = (
        f"**{cost.gmacs:.2f} GMACs** {_change(cost.gmacs, default.gmacs)}, "
        f"{cost.parameters / 1e6:.2f} M parameters {_change(cost.parameters, default.parameters)}, "
        f"{cost.peak_bytes / 2**20:.0f} MiB at inference {_change(cost.peak_bytes, default.peak_bytes)}, "
        f"{cost.saved_bytes / 2**20:.0f} MiB kept in training {_change(cost.saved_bytes, default.saved_bytes)}"
    )
    return Price(schedule, _tiles(parsed, cost), f"{summary}. In brackets: relative to {SIZES[name]().schedule}.")


@lru_cache(maxsize=256)
def _count(name: str, schedule: str, size: int) -> Cost:
    return count(build(name, (size, size), 1000, schedule=schedule), (size, size), name=name)


def _tiles(schedule: Schedule, cost: Cost | None) -> tuple[tuple[Tile, ...], ...]:
    macs = {group.name.partition(" ")[0]: group.macs for group in cost.layers} if cost is not None else {}
    return tuple(
        tuple(
            Tile(stage, layer, kind, macs[f"{stage + 1}.{layer + 1}"] / 1e9 if macs else None)
            for layer, kind in enumerate(kinds)
        )
        for stage, kinds in enumerate(schedule.stages)
    )


def _change(new: float, old: float) -> str:
    return f"({round(100 * (new / old - 1)):+d} %)"
