# SPDX-License-Identifier: Apache-2.0
"""The two mini-languages: schedules (the kind of each layer) and bridges (states passed forward). No torch import.

    schedule  "LL/LL/LLSLLS/LS"            a letter a layer (L linear, S softmax attention), a slash between stages
    bridges   "1.2>3.3 2.2>3.6 3.2>4.2"    one-based stage.layer, from a linear layer to a later softmax layer

`str` of a parsed value returns its text. Errors mark the wrong position and state the rule.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple


class Layer(NamedTuple):
    """A layer's position, zero-based as in `model.stages[stage].layers[layer]`; `str` is one-based."""

    stage: int
    layer: int

    def __str__(self) -> str:
        return f"{self.stage + 1}.{self.layer + 1}"


@dataclass(frozen=True)
class Schedule:
    """The layers of each stage as a string of L and S."""

    stages: tuple[str, ...]

    def __str__(self) -> str:
        return "/".join(self.stages)

    @property
    def depths(self) -> tuple[int, ...]:
        """The number of layers of each stage."""
        return tuple(len(stage) for stage in self.stages)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers in order."""
        return tuple(Layer(s, n) for s, stage in enumerate(self.stages) for n in range(len(stage)))

    def kind(self, layer: Layer) -> str:
        """Return "L" or "S"."""
        return self.stages[layer.stage][layer.layer]


class Bridge(NamedTuple):
    """The hidden state of linear layer `source` flows into the input of softmax layer `target`."""

    source: Layer
    target: Layer

    def __str__(self) -> str:
        return f"{self.source}>{self.target}"


@dataclass(frozen=True)
class Bridges:
    """Bridges in the order of the text; several into one layer are summed."""

    bridges: tuple[Bridge, ...] = ()

    def __str__(self) -> str:
        return " ".join(map(str, self.bridges))


def parse_schedule(text: str) -> Schedule:
    """Parse `"LL/LL/LLSLLS/LS"`. Raises ValueError that marks the first wrong position."""
    if not text:
        raise ValueError(_pointing("schedule", text, 0, "a schedule needs at least one layer, such as 'L'"))
    for position, letter in enumerate(text):
        if letter not in "LS/":
            hint = f"; write '{letter.upper()}'" if letter.upper() in "LS" else ""
            rule = f"{letter!r} is not a layer: L is linear, S is softmax attention, / separates stages{hint}"
            raise ValueError(_pointing("schedule", text, position, rule))
    stages = text.split("/")
    start = 0
    for stage in stages:
        if not stage:
            raise ValueError(_pointing("schedule", text, start, "a stage needs at least one layer"))
        start += len(stage) + 1
    return Schedule(tuple(stages))


_BRIDGE = re.compile(r"(\d+)\.(\d+)>(\d+)\.(\d+)")


def parse_bridges(text: str, schedule: Schedule | str | None = None) -> Bridges:
    """Parse `"1.2>3.3 2.2>3.6"`; with a schedule, check the layers against it.

    Raises ValueError that marks the first wrong bridge: malformed, backward, duplicate, outside the schedule, not
    starting at a linear layer or not ending at a softmax layer.
    """
    if isinstance(schedule, str):
        schedule = parse_schedule(schedule)
    found: list[Bridge] = []
    for word in re.finditer(r"\S+", text):
        start = word.start()
        match = _BRIDGE.fullmatch(word[0])
        if match is None:
            rule = f"{word[0]!r} is not a bridge: write stage.layer>stage.layer, such as 1.2>3.3"
            raise ValueError(_pointing("bridges", text, start, rule))
        numbers = [int(group) for group in match.groups()]
        for index, number in enumerate(numbers):
            if number == 0:
                raise ValueError(
                    _pointing("bridges", text, start + match.start(index + 1), "stages and layers count from 1")
                )
        bridge = Bridge(Layer(numbers[0] - 1, numbers[1] - 1), Layer(numbers[2] - 1, numbers[3] - 1))
        if bridge.target <= bridge.source:
            rule = f"{bridge} does not go forward: the target must come after the source"
            raise ValueError(_pointing("bridges", text, start, rule))
        if bridge in found:
            raise ValueError(_pointing("bridges", text, start, f"duplicate bridge {bridge}"))
        if schedule is not None:
            _check_end(text, start, bridge.source, schedule, "L", "start at a linear layer (L)")
            _check_end(text, start + match.start(3), bridge.target, schedule, "S", "end at a softmax layer (S)")
        found.append(bridge)
    return Bridges(tuple(found))


def _check_end(text: str, position: int, layer: Layer, schedule: Schedule, kind: str, rule: str) -> None:
    if layer.stage >= len(schedule.stages) or layer.layer >= len(schedule.stages[layer.stage]):
        places = ", ".join(f"{s + 1}.1 to {s + 1}.{depth}" for s, depth in enumerate(schedule.depths))
        raise ValueError(_pointing("bridges", text, position, f"{schedule} has no layer {layer}; it has {places}"))
    if schedule.kind(layer) != kind:
        rule = f"layer {layer} of {schedule} is {schedule.kind(layer)}; a bridge must {rule}"
        raise ValueError(_pointing("bridges", text, position, rule))


def _pointing(what: str, text: str, position: int, rule: str) -> str:
    """One line: the text with a mark at the wrong position (counted from 1), and the rule."""
    return f"{what} {text[:position] + '▸' + text[position:]!r}, position {position + 1}: {rule}"
