# SPDX-License-Identifier: Apache-2.0
"""What schedules cost, in MACs or in measured time, and which of them meet a budget.

Layers add up: a schedule costs what it costs with every open layer linear, and more for each that is softmax.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sola_vision.analysis.cost import count
from sola_vision.backbone import SolaVision
from sola_vision.config import SolaConfig

from .space import Space

TOLERANCE = 0.02  # by how much a schedule may miss the budget


@dataclass(frozen=True)
class Costs:
    """base: with all open layers linear; extra: what softmax adds, an entry an open layer (below zero if it saves)."""

    space: Space
    base: float
    extra: tuple[float, ...]
    unit: str

    def of(self, kinds: str) -> float:
        return self.base + sum(more for kind, more in zip(kinds, self.extra, strict=True) if kind == "S")

    @property
    def cheapest(self) -> str:
        return min(self.space, key=self.of)

    @property
    def dearest(self) -> str:
        return max(self.space, key=self.of)

    def meeting(self, budget: float) -> list[str]:
        """The kinds that cost the budget, give or take 2 %; where levels lie further apart, the level below it."""
        low, high = self.of(self.cheapest), self.of(self.dearest)
        if not low <= budget * (1 + TOLERANCE) or not high >= budget * (1 - TOLERANCE):
            raise ValueError(
                f"budget {self.text(budget)}: no schedule of {self.space.template} meets it; they cost "
                f"{self.text(low)} ({self.space.schedule(self.cheapest)}) to {self.text(high)} "
                f"({self.space.schedule(self.dearest)})"
            )
        near = [kinds for kinds in self.space if abs(self.of(kinds) / budget - 1) <= TOLERANCE]
        if near:
            return near
        below = max(cost for kinds in self.space if (cost := self.of(kinds)) <= budget)
        return [kinds for kinds in self.space if abs(self.of(kinds) / below - 1) <= TOLERANCE / 2]

    def text(self, cost: float) -> str:
        return f"{cost / 1e6:,.2f} MMACs" if self.unit == "MACs" else f"{1e3 * cost:.3f} ms"


def mac_costs(config: SolaConfig, space: Space, size: tuple[int, int]) -> Costs:
    """MACs of one image of `size` (height, width), head included; exact."""
    return _costs(space, lambda kinds: float(_macs(config, space.schedule(kinds), size)), "MACs")


def _macs(config: SolaConfig, schedule: str, size: tuple[int, int]) -> int:
    return count(SolaVision(config.with_changes(schedule=schedule, bridges=""), device="meta").eval(), size).macs


def latency_costs(
    config: SolaConfig, space: Space, size: tuple[int, int], device: torch.device | str = "cpu", rounds: int = 15
) -> Costs:
    """Seconds of one forward of one image on this machine, medians of interleaved rounds.

    Layers of a stage are alike, so one of each stage is measured as softmax.
    """
    first = {layer.stage: index for index, layer in reversed(list(enumerate(space.open_layers)))}
    networks = {-1: "L" * space.size}
    networks |= {stage: "".join("S" if i == at else "L" for i in range(space.size)) for stage, at in first.items()}
    models = {
        stage: SolaVision(config.with_changes(schedule=space.schedule(kinds), bridges="")).to(device).eval()
        for stage, kinds in networks.items()
    }
    image = torch.randn(1, config.in_chans, *size, device=device)
    times: dict[int, list[float]] = {stage: [] for stage in models}
    with torch.no_grad():
        for round_ in range(rounds + 2):
            for stage, model in models.items():
                seconds = _seconds(model, image)
                if round_ >= 2:  # the first ones warm up
                    times[stage].append(seconds)
    median = {stage: statistics.median(values) for stage, values in times.items()}
    extra = tuple(median[layer.stage] - median[-1] for layer in space.open_layers)
    return Costs(space, median[-1], extra, "seconds")


def _seconds(model: SolaVision, image: torch.Tensor) -> float:
    start = time.perf_counter()
    model(image)
    if image.device.type == "cuda":
        torch.cuda.synchronize(image.device)
    return time.perf_counter() - start


def _costs(space: Space, price: Callable[[str], float], unit: str) -> Costs:
    base = price("L" * space.size)
    extra = tuple(price("L" * i + "S" + "L" * (space.size - i - 1)) - base for i in range(space.size))
    return Costs(space, base, extra, unit)
