# SPDX-License-Identifier: Apache-2.0
"""The networks that a search may find: a schedule with a question mark for every layer that is open. No torch.

"LL/LL/??????/LS"    six open layers, 64 schedules; what is found for them is written "LLSLLS", a letter a layer

With bridges, a softmax layer that takes the state of stage 1's last layer is written "1", of stage 2's "2": "LL1LL2".
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from sola_vision.config import SolaConfig
from sola_vision.schedule import Bridge, Bridges, Layer, parse_bridges, parse_schedule

_MOST = 65_536  # networks, all of which are priced and ranked; takes a second


@dataclass(frozen=True)
class Space:
    """All schedules that fit `template`; with `bridges`, one Hidden State Bridge may end at each open softmax layer.

    Bridges start at the last layer of an earlier stage, where that is linear and not open.
    """

    template: str
    bridges: bool = False

    def __post_init__(self) -> None:
        # the letters and slashes have to be a schedule's; its errors point at the position
        parse_schedule(self.template.replace("?", "L"))
        networks = math.prod(map(len, self.letters))
        if not self.size or networks > _MOST:
            raise ValueError(
                f"space {self.template!r} has {self.size} open layers"
                + (f" and so {networks:,} networks, more than {_MOST:,}" if self.size else "")
                + ": mark open layers with ?, such as LL/LL/??????/LL"
                + (", not so many of them" if self.size else "")
                + (", or leave --bridges out" if self.size and self.bridges else "")
            )

    @property
    def size(self) -> int:
        return self.template.count("?")

    @property
    def open_layers(self) -> tuple[Layer, ...]:
        """Where the question marks are."""
        layers = parse_schedule(self.template.replace("?", "L")).layers
        letters = self.template.replace("/", "")
        return tuple(layer for layer, letter in zip(layers, letters, strict=True) if letter == "?")

    @property
    def letters(self) -> tuple[str, ...]:
        """What each open layer may be: "LS", or "LS12" where bridges from stages 1 and 2 may end."""
        sources = self.sources if self.bridges else {}
        return tuple("LS" + "".join(s for s in sources if int(s) <= place.stage) for place in self.open_layers)

    @property
    def sources(self) -> dict[str, Layer]:
        """By letter, the layers that bridges may start at."""
        stages = self.template.split("/")[:9]
        return {str(s + 1): Layer(s, len(kinds) - 1) for s, kinds in enumerate(stages) if kinds.endswith("L")}

    def schedule(self, kinds: str) -> str:
        """ "LL1LL2" -> "LL/LL/LLSLLS/LS"."""
        left = iter(kinds)
        return "".join(("L" if next(left) == "L" else "S") if letter == "?" else letter for letter in self.template)

    def bridges_of(self, kinds: str) -> str:
        """ "LL1LL2" -> "1.2>3.3 2.2>3.6"."""
        sources = self.sources
        found = [Bridge(sources[k], t) for k, t in zip(kinds, self.open_layers, strict=True) if k in sources]
        return str(Bridges(tuple(found)))

    def text(self, kinds: str) -> str:
        """Both in one: "LL/LL/LLSLLS/LS 1.2>3.3 2.2>3.6"."""
        return f"{self.schedule(kinds)} {self.bridges_of(kinds)}".rstrip()

    def config(self, base: SolaConfig, kinds: str) -> SolaConfig:
        return base.with_changes(schedule=self.schedule(kinds), bridges=self.bridges_of(kinds))

    def kinds(self, schedule: str, bridges: str = "") -> str:
        """The opposite of both; ValueError if they do not fit."""
        parsed = parse_schedule(schedule)
        fits = len(schedule) == len(self.template) and all(
            mine in ("?", theirs) for mine, theirs in zip(self.template, schedule, strict=False)
        )
        if not fits or any(m == "?" and t == "/" for m, t in zip(self.template, schedule, strict=True)):
            raise ValueError(f"schedule {schedule!r} does not fit the space {self.template!r}: give L or S for each ?")
        may_be = dict(zip(self.open_layers, self.letters, strict=True))
        letters = {layer: parsed.kind(layer) for layer in self.open_layers}
        names = {source: letter for letter, source in self.sources.items()}
        for bridge in parse_bridges(bridges, parsed).bridges:
            letter = names.get(bridge.source, "none")
            if letters.get(bridge.target) != "S" or letter not in may_be[bridge.target]:
                starts = ", ".join(map(str, self.sources.values()))
                rule = (
                    f"start at {starts}, and one ends at each open softmax layer" if self.bridges else "need --bridges"
                )
                raise ValueError(f"bridge {bridge} does not fit the space {self.template!r}: bridges {rule}")
            letters[bridge.target] = letter
        return "".join(letters.values())

    def __iter__(self) -> Iterator[str]:
        """The kinds of every network."""
        return ("".join(kinds) for kinds in itertools.product(*self.letters))
