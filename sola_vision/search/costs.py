# SPDX-License-Identifier: Apache-2.0
"""The cost of schedules, in MACs or in measured time, and the schedules that meet a budget.

Costs are additive: that of the network with every open layer linear, plus a difference for each softmax layer and each
bridge.
"""

import statistics
import time
from dataclasses import dataclass

import torch

from sola_vision.analysis.cost import count
from sola_vision.backbone import SolaVision
from sola_vision.config import SolaConfig

from .space import Space

TOLERANCE = 0.02  # relative distance from the budget up to which a schedule meets it


@dataclass(frozen=True)
class Costs:
    """Additive costs of the schedules of a space.

    base: the cost with all open layers linear. extra: for each open layer, the additional cost of every other letter;
    negative for a layer cheaper than the linear one. unit: "MACs" or "seconds".
    """

    space: Space
    base: float
    extra: tuple[dict[str, float], ...]
    unit: str

    def of(self, kinds: str) -> float:
        """Return the cost of the network with these kinds of open layers."""
        return self.base + sum(extra[kind] for kind, extra in zip(kinds, self.extra, strict=True) if kind != "L")

    @property
    def cheapest(self) -> str:
        """The kinds of the network that costs least."""
        return min(self.space, key=self.of)

    @property
    def dearest(self) -> str:
        """The kinds of the network that costs most."""
        return max(self.space, key=self.of)

    def meeting(self, budget: float) -> list[str]:
        """Return the kinds of all networks within 2 % of the budget; if there are none, those of the next lower level.

        Raise ValueError if the budget lies outside the range of the space.
        """
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
        """Format a cost with its unit."""
        return f"{cost / 1e6:,.2f} MMACs" if self.unit == "MACs" else f"{1e3 * cost:.3f} ms"


def mac_costs(config: SolaConfig, space: Space, size: tuple[int, int]) -> Costs:
    """Return the exact MACs for one image of `size` (height, width), including the head."""

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
    """Return the seconds of a forward pass of one image on this machine, as medians over interleaved rounds.

    Layers of a stage cost the same, so only one per stage is measured, once for each of its letters.
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
                if round_ >= 2:  # the first two rounds warm up
                    times[name].append(seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    base = median[0, "L"]
    extra = tuple(
        {letter: median[layer.stage, letter] - base for letter in letters[1:]}
        for layer, letters in zip(space.open_layers, space.letters, strict=True)
    )
    return Costs(space, base, extra, "seconds")


def _only(space: Space, index: int, letter: str) -> str:
    """Return kinds that are linear except for one layer."""
    return "L" * index + letter + "L" * (space.size - index - 1)


def _seconds(model: SolaVision, image: torch.Tensor) -> float:
    start = time.perf_counter()
    model(image)
    if image.device.type == "cuda":
        torch.cuda.synchronize(image.device)
    return time.perf_counter() - start
