# SPDX-License-Identifier: Apache-2.0
"""The timing protocol of the benchmarks, on a simulated clock."""

import pytest

from sola_vision.bench.rounds import Protocol, Times, interleave, ratio, spread


class Machine:
    """Jobs of given durations, on a clock that only they advance."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def clock(self):
        return self.now

    def job(self, name, seconds):
        """seconds: of every call in turn, the last one for all that follow."""
        left = list(seconds)

        def call():
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_rounds_interleave_and_the_shortest_timed_call_counts():
    machine = Machine()
    # the first two calls of a round only warm up, however quick they are
    jobs = {"a": machine.job("a", [0.001, 0.001, 5e-2, 3e-2, 4e-2, 9e-2]), "b": machine.job("b", [1e-2])}
    times = interleave(jobs, Protocol(rounds=2, calls=3), machine.clock)
    assert "".join(machine.log) == "aaaaabbbbb" * 2
    assert times["a"].rounds == pytest.approx((3e-2, 9e-2))
    assert times["b"].rounds == pytest.approx((1e-2, 1e-2))


def test_the_result_is_the_median_over_rounds_with_its_spread():
    times = Times((4.0, 1.0, 2.0, 3.0, 100.0))
    assert times.median == 3.0
    assert times.spread == pytest.approx((4 - 2) / 3)
    assert spread((7.0,)) == 0.0


def test_a_ratio_is_taken_within_rounds():
    """The machine slowed down for a while: the ratio of the medians would be wrong, the median of the ratios is not."""
    over, under = Times((2.0, 2.0, 8.0)), Times((1.0, 4.0, 4.0))
    assert over.median / under.median == 0.5
    assert ratio(over, under)[0] == 2.0


@pytest.mark.parametrize(
    ("seconds", "calls"),
    [
        (0.01, 2 + 10),  # as many as allowed
        (0.25, 2 + 4),  # until a second is full
        (0.9, 2 + 2),  # at least two
        (1.5, 1 + 2),  # one call warms up
        (3.5, 1 + 1),
    ],
)
def test_slow_jobs_are_called_less_often(seconds, calls):
    machine = Machine()
    interleave({"a": machine.job("a", [seconds])}, Protocol(rounds=1), machine.clock)
    assert len(machine.log) == calls


def test_very_slow_jobs_can_be_left_out_of_the_later_rounds():
    machine = Machine()
    jobs = {"a": machine.job("a", [3.5]), "b": machine.job("b", [2.0])}
    times = interleave(jobs, Protocol(rounds=4, slow_rounds=2), machine.clock)
    assert (len(times["a"].rounds), len(times["b"].rounds)) == (2, 4)
    assert ratio(times["a"], times["b"])[0] == pytest.approx(1.75)


def test_rounds_are_at_least_one():
    with pytest.raises(ValueError, match="rounds=0 must be at least 1"):
        Protocol(rounds=0)
