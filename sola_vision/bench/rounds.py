# SPDX-License-Identifier: Apache-2.0
"""Interleaved rounds: the timing protocol of every benchmark in this project.

In every round each job has two warm-up calls and several timed calls, of which the shortest counts; the result is the
median over rounds. Rounds interleave the jobs, so that a temporary slowdown of the machine affects all of them, and a
ratio of two jobs is the median of the ratios within rounds.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Job = Callable[[], Any]
Name = TypeVar("Name")


@dataclass(frozen=True)
class Protocol:
    """The number of rounds and warm-up calls, and the timed calls: at most `calls`, for about `seconds` in total.

    A job of which one call takes `seconds` has one warm-up call; one that takes three times as long is timed once per
    round, and only in the first `slow_rounds` rounds if that is given.
    """

    rounds: int = 7
    warm_up: int = 2
    calls: int = 10
    seconds: float = 1.0
    slow_rounds: int | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be at least 1; the spread is meaningful with 5 or more")


@dataclass(frozen=True)
class Times:
    """The shortest call of every round, in seconds."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median over the rounds, in seconds."""
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """The interquartile range over the median."""
        return spread(self.rounds)


def interleave(
    jobs: Mapping[Name, Job],
    protocol: Protocol,
    clock: Callable[[], float] = time.perf_counter,
    report: Callable[[int], None] = lambda number: None,
) -> dict[Name, Times]:
    """Time the jobs in interleaved rounds; `report` is called with the number of each finished round."""
    shortest: dict[Name, list[float]] = {name: [] for name in jobs}
    for number in range(protocol.rounds):
        for name, job in jobs.items():
            times = shortest[name]
            slow = bool(times) and times[0] >= 3 * protocol.seconds
            if not slow or protocol.slow_rounds is None or number < protocol.slow_rounds:
                times.append(_shortest_call(job, protocol, clock))
        report(number + 1)
    return {name: Times(tuple(times)) for name, times in shortest.items()}


def ratio(over: Times, under: Times) -> tuple[float, float]:
    """Return the time of `over` relative to `under`: the median of the ratios within rounds, and its spread."""
    ratios = [a / b for a, b in zip(over.rounds, under.rounds, strict=False)]
    return statistics.median(ratios), spread(ratios)


def spread(values: Sequence[float]) -> float:
    """Return the interquartile range over the median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    quarters = statistics.quantiles(values, n=4, method="inclusive")
    return (quarters[2] - quarters[0]) / statistics.median(values)


def _shortest_call(job: Job, protocol: Protocol, clock: Callable[[], float]) -> float:
    def timed() -> float:
        start = clock()
        job()
        return clock() - start

    slowest = 0.0
    for _ in range(protocol.warm_up):
        slowest = timed()
        if slowest >= protocol.seconds:
            break
    times = [timed()]
    least = 1 if slowest >= 3 * protocol.seconds else 2
    while len(times) < protocol.calls and (len(times) < least or sum(times) < protocol.seconds):
        times.append(timed())
    return min(times)
