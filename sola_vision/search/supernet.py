# SPDX-License-Identifier: Apache-2.0
"""The supernet: a network whose open layers contain every alternative, and gates that learn which one to keep.

In the first half of the training each step runs one random network, so that all layers and bridges are trained, each
kind in combination with the others. In the second half each step runs one network drawn by the gates, which are
straight-through Gumbel-softmax variables: an open layer computes all alternatives and outputs the one drawn, and the
gate receives the gradient of the soft weights at that choice. So every step trains a network of the space. Blended
outputs, as in most relaxed searches, ranked bridges below no bridges, although trained from scratch they are worth two
points.

Cost enters as a price: each letter's logit is reduced by its cost times the price, and the price is the one for which
the expected cost equals the budget. The gates are thus free to optimise accuracy. A penalty added to the loss has a
gradient without noise, which dominated that of the loss in Adam's steps.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sola_vision.backbone import SolaVision
from sola_vision.config import SolaConfig
from sola_vision.schedule import Bridge

from .costs import Costs

_RANDOM_PART = 0.5  # the fraction of the training before gates are learned
_TEMPERATURES = (1.0, 0.25)  # Gumbel-softmax temperature at the start and the end of the second half
_GATE_SPEED = 20.0  # logits per unit of a gate's parameters, whose steps are about the learning rate


class MixedLayer(nn.Module):
    """A linear and a softmax layer at the same position, of which the one selected by the letter `chosen` is used.

    shares: 1 for that letter and 0 for the others, carrying the gate's gradient; None when no gradient is needed.
    """

    def __init__(self, linear: nn.Module, softmax: nn.Module, letters: str) -> None:
        super().__init__()
        self.linear, self.softmax, self.letters = linear, softmax, letters
        self.gate = nn.Parameter(torch.zeros(len(letters)))
        self.chosen = letters[0]
        self.shares: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """The gate's logits [letters]."""
        return _GATE_SPEED * self.gate

    def choose(self, letter: str) -> None:
        """Select a letter, without a gradient to the gate."""
        self.chosen, self.shares = letter, None

    def draw(self, toll: Tensor, temperature: float) -> None:
        """Draw a letter by the gate's logits minus a toll per letter."""
        uniform = torch.rand(len(self.letters)).clamp(1e-6, 1 - 1e-6)
        gumbel = -torch.log(-torch.log(uniform)).to(self.gate.device)
        soft = torch.softmax((self.logits - toll + gumbel) / temperature, dim=0)
        index = int(soft.argmax())
        hard = torch.zeros_like(soft)
        hard[index] = 1
        self.chosen, self.shares = self.letters[index], hard + soft - soft.detach()

    def share(self, letter: str) -> Tensor:
        """Return the weight of a letter: 1 or 0, with the gate's gradient."""
        assert self.shares is not None
        return self.shares[self.letters.index(letter)]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        if self.shares is None:
            return (self.linear if self.chosen == "L" else self.softmax)(x)[0], None
        linear, softmax = self.linear(x)[0], self.softmax(x)[0]
        share = self.share("L").to(linear.dtype)
        return share * linear + (1 - share) * softmax, None


class GatedBridge(nn.Module):
    """A bridge that is active if the mixed layer at its end is set to the bridge's letter."""

    def __init__(self, bridge: nn.Module, layer: MixedLayer, letter: str) -> None:
        super().__init__()
        self.bridge, self.letter = bridge, letter
        self.ends_at = (layer,)  # in a tuple, so that it is not registered as a submodule twice

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        layer = self.ends_at[0]
        if layer.shares is not None:
            return layer.share(self.letter) * self.bridge(x, state)
        return self.bridge(x, state) if layer.chosen == self.letter else torch.zeros_like(x)


class SuperNet(nn.Module):
    """All networks of a space in one. Training draws a network in every step; `choose` selects one for evaluation."""

    step: Tensor

    def __init__(self, config: SolaConfig, costs: Costs, budget: float, steps: int, seed: int) -> None:
        super().__init__()
        space = costs.space
        self.costs, self.budget, self.steps = costs, budget, steps
        self.settled = False
        self.candidates = costs.meeting(budget)
        torch.manual_seed(seed)
        linear = SolaVision(space.config(config, "L" * space.size))
        bridges = {
            Bridge(space.sources[letter], place): letter
            for place, letters in zip(space.open_layers, space.letters, strict=True)
            for letter in letters[2:]
        }
        softmax = space.schedule("S" * space.size)
        self.network = SolaVision(config.with_changes(schedule=softmax, bridges=" ".join(map(str, bridges))))
        self.mixed: list[MixedLayer] = []
        for place, letters in zip(space.open_layers, space.letters, strict=True):
            layers: Any = self.network.stages[place.stage].get_submodule("layers")
            linear_layers: Any = linear.stages[place.stage].get_submodule("layers")
            layers[place.layer] = MixedLayer(linear_layers[place.layer], layers[place.layer], letters)
            self.mixed.append(layers[place.layer])
        at = dict(zip(space.open_layers, self.mixed, strict=True))
        for stage in self.network.stages:
            modules: Any = stage.get_submodule("bridges")
            ends: Any = stage.bridge_ends
            for number, bridge in enumerate(ends):
                modules[number] = GatedBridge(modules[number], at[bridge.target], bridges[bridge])
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.choose(self.candidates[0])

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that the optimiser does not decay."""
        return {f"network.{name}" for name in self.network.no_weight_decay()}

    def forward(self, image: Tensor) -> Tensor:
        if self.training and not self.settled:
            self._draw()
        return self.network(image)

    def _draw(self) -> None:
        done = int(self.step) / max(1, self.steps)
        self.step += 1
        if done < _RANDOM_PART:
            for mixed in self.mixed:
                mixed.choose(mixed.letters[int(torch.randint(len(mixed.letters), ()))])
            return
        progress = min(1.0, (done - _RANDOM_PART) / (1 - _RANDOM_PART))
        hot, cold = _TEMPERATURES
        price = self.price()
        for mixed, extra in zip(self.mixed, self.costs.extra, strict=True):
            toll = mixed.gate.new_tensor([0.0, *(price * cost for cost in extra.values())])
            mixed.draw(toll, hot * (cold / hot) ** progress)

    def choose(self, kinds: str) -> None:
        """Select one network, by a letter for every open layer."""
        for mixed, kind in zip(self.mixed, kinds, strict=True):
            mixed.choose(kind)

    def settle(self, kinds: str) -> None:
        """Select one network for good, in training too. It keeps its shared weights."""
        self.choose(kinds)
        self.settled = True

    def price(self) -> float:
        """Return the price per unit of cost at which the gates' expected cost equals the budget.

        The expected cost falls as the price rises, so bisection converges to it.
        """
        logits = self.logits
        steepest = min((abs(cost) for extra in self.costs.extra for cost in extra.values() if cost), default=1.0)
        strongest = max(abs(logit) for each in logits for logit in each.values())
        # at either end almost only cost decides; a budget out of reach is approximated as closely as possible
        high = (30 + 2 * strongest) / steepest
        low = -high
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self._expected_cost(logits, middle) > self.budget else (low, middle)
        return (low + high) / 2

    def _expected_cost(self, logits: list[dict[str, float]], price: float) -> float:
        total = self.costs.base
        for each, extra in zip(logits, self.costs.extra, strict=True):
            tolled = {letter: each[letter] - price * cost for letter, cost in extra.items()}
            most = max(0.0, *tolled.values())
            weights = {letter: math.exp(logit - most) for letter, logit in tolled.items()}
            total += sum(weights[letter] * extra[letter] for letter in extra) / (
                math.exp(-most) + sum(weights.values())
            )
        return total

    @property
    def logits(self) -> list[dict[str, float]]:
        """The logits of each open layer's letters relative to L."""
        values = [mixed.logits.tolist() for mixed in self.mixed]
        return [
            {letter: logit - logits[0] for letter, logit in zip(mixed.letters[1:], logits[1:], strict=True)}
            for mixed, logits in zip(self.mixed, values, strict=True)
        ]

    def ranked(self, candidates: Sequence[str]) -> list[str]:
        """Sort by the sum of the gates' logits, largest first; without the price, since candidates meet the budget."""
        logits = [{"L": 0.0} | each for each in self.logits]
        return sorted(candidates, key=lambda kinds: -sum(each[kind] for each, kind in zip(logits, kinds, strict=True)))
