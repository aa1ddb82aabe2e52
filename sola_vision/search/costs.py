# SPDX-License-Identifier: Apache-2.0
"""What schedules cost, in MACs or in measured time, and which of them meet a budget.

Layers add up: a network costs what it costs with every open layer linear, and more for each that is softmax, and again
for each bridge.
"""

import statistics
import time
from dataclasses import dataclass

import torch

from sola_vision.analysis.cost import count
from sola_vision.backbone import SolaVision
from sola_vision.config import SolaConfig

from .space import Space

TOLERANCE = 0.02  # by how much a schedule may miss the budget


@dataclass(frozen=True)
class Costs:
    """base: with all open layers linear; extra: what else costs more, by letter, an entry an open layer.

    What is cheaper than linear has an extra below zero.
    """

    space: Space
    base: float
    extra: tuple[dict[str, float], ...]
    unit: str

    def of(self, kinds: str) -> float:
        return self.base + sum(extra[kind] for kind, extra in zip(kinds, self.extra, strict=True) if kind != "L")

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
                f"{self.text(low)} ({self.space.text(self.cheapest)}) to {self.text(high)} "
                f"({self.space.text(self.dearest)})"
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

    def macs(kinds: str) -> int:
        return count(SolaVision(space.config(config, kinds), device="meta").eval(), size).macs

    base = macs("L" * space.size)
    extra = tuple(
        {letter: float(macs(_only(space, index, letter)) - base) for letter in letters[1:]}
        for index, letters in enumerate(space.letters)
    )
    return Costs(space, float(base), extra, "MACs")


def latency_costs(
    config: SolaConfig, space: Space, size: tuple[int, int], device: torch.device | str = "cpu", rounds: int = 15
) -> Costs:
    """Seconds of one forward of one image on this machine, medians of interleaved rounds.

    Layers of a stage are alike, so one of each stage is measured, with each of its letters.
    """
    first = {layer.stage: index for index, layer in reversed(list(enumerate(space.open_layers)))}
    networks = {(0, "L"): "L" * space.size}
    for stage, index in first.items():
        networks |= {(stage, letter): _only(space, index, letter) for letter in space.letters[index][1:]}
    models = {name: SolaVision(space.config(config, kinds)).to(device).eval() for name, kinds in networks.items()}
    image = torch.randn(1, config.in_chans, *size, device=device)
    times: dict[tuple[int, str], list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for round_ in range(rounds + 2):
            for name, model in models.items():
                seconds = _seconds(model, image)
                if round_ >= 2:  # the first ones warm up
                    times[name].append(seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    base = median[0, "L"]
    extra = tuple(
        {letter: median[layer.stage, letter] - base for letter in letters[1:]}
        for layer, letters in zip(space.open_layers, space.letters, strict=True)
    )
    return Costs(space, base, extra, "seconds")


def _only(space: Space, index: int, letter: str) -> str:
    """All linear but for one layer."""
    return "L" * index + letter + "L" * (space.size - index - 1)


def _seconds(model: SolaVision, image: torch.Tensor) -> float:
    start = time.perf_counter()
    model(image)
    if image.device.type == "cuda":
        torch.cuda.synchronize(image.device)
    return time.perf_counter() - start
