# SPDX-License-Identifier: Apache-2.0
"""Search spaces: a schedule with a question mark for every open layer. No torch.

"LL/LL/??????/LS"    six open layers, 64 schedules; a choice is written "LLSLLS", one letter per open layer

With bridges, "1" is a softmax layer that reads the state of stage 1's last layer, "2" that of stage 2's: "LL1LL2".
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from sola_vision.config import SolaConfig
from sola_vision.schedule import Bridge, Bridges, Layer, parse_bridges, parse_schedule
from sola_vision.wording import amount

_MOST = 65_536  # networks of a space; pricing and ranking all of them takes about a second


@dataclass(frozen=True)
class Space:
    """All schedules that match `template`; with `bridges`, one Hidden State Bridge may end at each open softmax layer.

    Bridges start at the last layer of an earlier stage, if that layer is linear and not open. Iterating yields the
    kinds of every network. Raise ValueError for an invalid template or too many networks.
    """

    template: str
    bridges: bool = False

    def __post_init__(self) -> None:
        # letters and slashes must form a schedule; the errors of the parser point at the position
        parse_schedule(self.template.replace("?", "L"))
        networks = math.prod(map(len, self.letters))
        if not self.size or networks > _MOST:
            raise ValueError(
                f"space {self.template!r} has {amount(self.size, 'open layer')}"
                + (f" and so {networks:,} networks, more than {_MOST:,}" if self.size else "")
                + ": mark open layers with ?, such as LL/LL/??????/LL"
                + (", but fewer of them" if self.size else "")
                + (", or omit --bridges" if self.size and self.bridges else "")
            )

    @property
    def size(self) -> int:
        """The number of open layers."""
        return self.template.count("?")

    @property
    def open_layers(self) -> tuple[Layer, ...]:
        """The positions of the question marks."""
        layers = parse_schedule(self.template.replace("?", "L")).layers
        letters = self.template.replace("/", "")
        return tuple(layer for layer, letter in zip(layers, letters, strict=True) if letter == "?")

    @property
    def letters(self) -> tuple[str, ...]:
        """The alternatives of each open layer: "LS", or "LS12" where bridges from stages 1 and 2 may end."""
        sources = self.sources if self.bridges else {}
        return tuple("LS" + "".join(s for s in sources if int(s) <= place.stage) for place in self.open_layers)

    @property
    def sources(self) -> dict[str, Layer]:
        """The layers that bridges may start from, by letter."""
        stages = self.template.split("/")[:9]
        return {str(s + 1): Layer(s, len(kinds) - 1) for s, kinds in enumerate(stages) if kinds.endswith("L")}

    def schedule(self, kinds: str) -> str:
        """Return the schedule of these kinds: "LL1LL2" -> "LL/LL/LLSLLS/LS"."""
        left = iter(kinds)
        return "".join(("L" if next(left) == "L" else "S") if letter == "?" else letter for letter in self.template)

    def bridges_of(self, kinds: str) -> str:
        """Return the bridges of these kinds: "LL1LL2" -> "1.2>3.3 2.2>3.6"."""
        sources = self.sources
        found = [Bridge(sources[k], t) for k, t in zip(kinds, self.open_layers, strict=True) if k in sources]
        return str(Bridges(tuple(found)))

    def text(self, kinds: str) -> str:
        """Return schedule and bridges as one string: "LL/LL/LLSLLS/LS 1.2>3.3 2.2>3.6"."""
        return f"{self.schedule(kinds)} {self.bridges_of(kinds)}".rstrip()

    def config(self, base: SolaConfig, kinds: str) -> SolaConfig:
        """Return `base` with the schedule and bridges of these kinds."""
        return base.with_changes(schedule=self.schedule(kinds), bridges=self.bridges_of(kinds))

    def kinds(self, schedule: str, bridges: str = "") -> str:
        """Return the kinds of a schedule and its bridges. Raise ValueError if they do not fit the space."""
        parsed = parse_schedule(schedule)
        fits = len(schedule) == len(self.template) and all(
            slot in ("?", letter) for slot, letter in zip(self.template, schedule, strict=False)
        )
        if not fits or any(slot == "?" and letter == "/" for slot, letter in zip(self.template, schedule, strict=True)):
            raise ValueError(f"schedule {schedule!r} does not fit the space {self.template!r}: give L or S for each ?")
        allowed = dict(zip(self.open_layers, self.letters, strict=True))
        letters = {layer: parsed.kind(layer) for layer in self.open_layers}
        names = {source: letter for letter, source in self.sources.items()}
        for bridge in parse_bridges(bridges, parsed).bridges:
            letter = names.get(bridge.source, "none")
            if letters.get(bridge.target) != "S" or letter not in allowed[bridge.target]:
                starts = ", ".join(map(str, self.sources.values()))
                rule = (
                    f"start at {starts}, and one ends at each open softmax layer" if self.bridges else "need --bridges"
                )
                raise ValueError(f"bridge {bridge} does not fit the space {self.template!r}: bridges {rule}")
            letters[bridge.target] = letter
        return "".join(letters.values())

    def __iter__(self) -> Iterator[str]:
        return ("".join(kinds) for kinds in itertools.product(*self.letters))
