# SPDX-License-Identifier: Apache-2.0
"""The schedules that a search may find: a schedule with a question mark for every layer that is open. No torch.

"LL/LL/??????/LS"    six open layers, 64 schedules; what is found for them is written "LLSLLS"
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from sola_vision.schedule import Layer, parse_schedule

_MOST = 16  # open layers; 65,536 schedules are still enumerated in a moment


@dataclass(frozen=True)
class Space:
    """All schedules that fit `template`."""

    template: str

    def __post_init__(self) -> None:
        # the letters and slashes have to be a schedule's; its errors point at the position
        parse_schedule(self.template.replace("?", "L"))
        if not 1 <= self.size <= _MOST:
            raise ValueError(
                f"space {self.template!r} has {self.size} open layers: mark 1 to {_MOST} of them with ?, such as "
                "LL/LL/??????/LL"
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

    def schedule(self, kinds: str) -> str:
        """ "LLSLLS" -> "LL/LL/LLSLLS/LS"."""
        left = iter(kinds)
        return "".join(next(left) if letter == "?" else letter for letter in self.template)

    def kinds(self, schedule: str) -> str:
        """The opposite; ValueError if the schedule does not fit."""
        parse_schedule(schedule)
        fits = len(schedule) == len(self.template) and all(
            mine in ("?", theirs) for mine, theirs in zip(self.template, schedule, strict=False)
        )
        if not fits or any(m == "?" and t == "/" for m, t in zip(self.template, schedule, strict=True)):
            raise ValueError(f"schedule {schedule!r} does not fit the space {self.template!r}: give L or S for each ?")
        return "".join(theirs for mine, theirs in zip(self.template, schedule, strict=True) if mine == "?")

    def __iter__(self) -> Iterator[str]:
        """The kinds of every schedule."""
        return ("".join(kinds) for kinds in itertools.product("LS", repeat=self.size))
