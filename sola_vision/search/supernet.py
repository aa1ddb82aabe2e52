# SPDX-License-Identifier: Apache-2.0
"""A network whose open layers hold both kinds, and gates that learn which one to keep.

First half of the training: every step takes one schedule at random, mostly of those that meet the budget, so that all
layers learn, and each kind in company of the other. Second half: gates are binary concrete variables (a softmax over
two kinds with Gumbel noise), whose temperature falls until they all but choose; a term draws their expected cost to the
budget.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sola_vision.backbone import SolaVision
from sola_vision.config import SolaConfig
from sola_vision.schedule import Layer
from sola_vision.tasks import Classification

from .costs import Costs

_RANDOM_PART = 0.5  # of the training, before gates are learned
_ELSEWHERE = 0.25  # of the random schedules cost anything, so that the curve has other points than the budget
_TEMPERATURES = (1.0, 0.1)  # of the gates, at the beginning and at the end of the second half
_GATE_SPEED = 10.0  # a gate's logit is its parameter times this: the optimiser moves parameters by the learning rate
_COST_WEIGHT = 4.0  # of the squared distance to the budget, where the whole range of costs is 1


class MixedLayer(nn.Module):
    """A linear and a softmax layer in one place; `share` of the output is the softmax layer's."""

    def __init__(self, linear: nn.Module, softmax: nn.Module) -> None:
        super().__init__()
        self.linear, self.softmax = linear, softmax
        self.gate = nn.Parameter(torch.zeros(()))
        self.share: Tensor | float = 0.0

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        if isinstance(self.share, float):
            return (self.softmax if self.share else self.linear)(x)[0], None
        linear, softmax = self.linear(x)[0], self.softmax(x)[0]
        # lerp would refuse the kinds of numbers that autocast mixes
        return linear + self.share.to(linear.dtype) * (softmax - linear), None


class GatedBridge(nn.Module):
    """A bridge that may be left out; it ends at a mixed layer and counts as far as that is softmax."""

    def __init__(self, bridge: nn.Module, layer: MixedLayer) -> None:
        super().__init__()
        self.bridge = bridge
        self.ends_at = (layer,)  # in a tuple, so that it is no submodule a second time
        self.gate = nn.Parameter(torch.zeros(()))
        self.share: Tensor | float = 0.0

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        share = self.share * self.ends_at[0].share
        if isinstance(share, float) and not share:
            return torch.zeros_like(x)
        return share * self.bridge(x, state)


class SuperNet(nn.Module):
    """All schedules of a space in one network. In training it draws its own gates; `choose` sets them otherwise."""

    step: Tensor

    def __init__(self, config: SolaConfig, costs: Costs, budget: float, steps: int, bridges: bool, seed: int) -> None:
        super().__init__()
        space = costs.space
        self.costs, self.budget, self.steps = costs, budget, steps
        self.candidates = costs.meeting(budget)
        torch.manual_seed(seed)
        linear = SolaVision(config.with_changes(schedule=space.schedule("L" * space.size), bridges=""))
        self.sources = _sources(linear, space.open_layers) if bridges else ()
        ends = " ".join(f"{s}>{t}" for t in space.open_layers for s in self.sources if s.stage < t.stage)
        self.network = SolaVision(config.with_changes(schedule=space.schedule("S" * space.size), bridges=ends))
        self.mixed: list[MixedLayer] = []
        for place in space.open_layers:
            layers = self.network.stages[place.stage].get_submodule("layers")
            theirs = linear.stages[place.stage].get_submodule("layers")
            softmax = layers.get_submodule(str(place.layer))
            mixed = MixedLayer(theirs.get_submodule(str(place.layer)), softmax)
            setattr(layers, str(place.layer), mixed)
            self.mixed.append(mixed)
        self.bridges = dict(_gate_bridges(self.network, dict(zip(space.open_layers, self.mixed, strict=True))))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.choose(self.candidates[0])

    def forward(self, image: Tensor) -> Tensor:
        if self.training:
            self._draw()
        return self.network(image)

    def _draw(self) -> None:
        done = int(self.step) / max(1, self.steps)
        self.step += 1
        if done < _RANDOM_PART:
            kinds = self.candidates[int(torch.randint(len(self.candidates), ()))]
            if torch.rand(()) < _ELSEWHERE:
                kinds = "".join("LS"[int(bit)] for bit in torch.randint(2, (len(self.mixed),)))
            self.choose(kinds, {ends: bool(torch.rand(()) < 0.5) for ends in self.bridges})
            return
        progress = min(1.0, (done - _RANDOM_PART) / (1 - _RANDOM_PART))
        hot, cold = _TEMPERATURES
        temperature = hot * (cold / hot) ** progress
        everything: list[MixedLayer | GatedBridge] = [*self.mixed, *self.bridges.values()]
        for gated in everything:
            uniform = torch.rand(()).clamp(1e-6, 1 - 1e-6)
            noise = torch.log(uniform) - torch.log1p(-uniform)
            gated.share = torch.sigmoid((_GATE_SPEED * gated.gate + noise) / temperature)

    def choose(self, kinds: str, bridges: dict[tuple[Layer, Layer], bool] | None = None) -> None:
        """One schedule, and which bridges to use (those that its gates favour)."""
        for mixed, kind in zip(self.mixed, kinds, strict=True):
            mixed.share = 1.0 if kind == "S" else 0.0
        wanted = {ends: bool(gated.gate > 0) for ends, gated in self.bridges.items()} if bridges is None else bridges
        for ends, gated in self.bridges.items():
            gated.share = 1.0 if wanted[ends] else 0.0

    def penalty(self) -> Tensor:
        """Squared distance of the gates' expected cost from the budget; zero while schedules are drawn at random."""
        if any(isinstance(mixed.share, float) for mixed in self.mixed):
            return torch.zeros(())
        chance = torch.sigmoid(_GATE_SPEED * torch.stack([mixed.gate for mixed in self.mixed]))
        expected = self.costs.base + (chance * chance.new_tensor(self.costs.extra)).sum()
        spread = self.costs.of(self.costs.dearest) - self.costs.of(self.costs.cheapest)
        return _COST_WEIGHT * ((expected - self.budget) / max(spread, 1e-12)).square()

    @property
    def logits(self) -> list[float]:
        """Of softmax, an open layer each."""
        return [_GATE_SPEED * float(mixed.gate.detach()) for mixed in self.mixed]

    def ranked(self, candidates: Sequence[str]) -> list[str]:
        """Those first whose product of gates is largest."""
        logits = self.logits

        def score(kinds: str) -> float:
            return sum(-_softplus(-logit if kind == "S" else logit) for kind, logit in zip(kinds, logits, strict=True))

        return sorted(candidates, key=score, reverse=True)

    def chosen_bridges(self, kinds: str) -> str:
        """For every softmax layer the source whose gate is largest, if any is open: "1.2>3.3 2.2>3.6"."""
        found = []
        for place, kind in zip(self.costs.space.open_layers, kinds, strict=True):
            arriving = [(float(gated.gate.detach()), ends) for ends, gated in self.bridges.items() if ends[1] == place]
            if kind == "S" and arriving and max(arriving)[0] > 0:
                found.append("{}>{}".format(*max(arriving)[1]))
        return " ".join(found)


class SearchTask(Classification):
    """Classification with the supernet's cost term."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, _ = super().loss(model, batch)
        assert isinstance(model, SuperNet)
        penalty = model.penalty().to(loss.device)
        return loss + penalty, {"cost_term": penalty.detach()}


def _sources(network: SolaVision, targets: Sequence[Layer]) -> tuple[Layer, ...]:
    """The last layer of each stage before an open one, where it is linear and not open itself."""
    schedule = network.config.parsed_schedule
    last = [Layer(stage, depth - 1) for stage, depth in enumerate(schedule.depths)]
    before = max(target.stage for target in targets)
    return tuple(s for s in last if s.stage < before and s not in targets and schedule.kind(s) == "L")


def _gate_bridges(network: SolaVision, mixed: dict[Layer, MixedLayer]) -> list[tuple[tuple[Layer, Layer], GatedBridge]]:
    gated = []
    for stage in network.stages:
        modules: Any = stage.get_submodule("bridges")
        ends: Any = stage.bridge_ends
        for number, bridge in enumerate(ends):
            modules[number] = GatedBridge(modules[number], mixed[bridge.target])
            gated.append(((bridge.source, bridge.target), modules[number]))
    return gated


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
