# SPDX-License-Identifier: Apache-2.0
"""The statistics against their definitions, and against SciPy where it is installed."""

import itertools
import math
import random

import pytest

from sola_vision.studies.statistics import compare, sign_flip_p, standard_error, t_probability, t_quantile


@pytest.mark.parametrize("freedom", range(1, 13))
def test_t_is_students(freedom):
    stats = pytest.importorskip("scipy.stats")
    for t in (0.1, 1.0, 2.5, 9.0):
        assert t_probability(t, freedom) == pytest.approx(2 * stats.t.cdf(t, freedom) - 1, abs=1e-12)
    for confidence in (0.5, 0.9, 0.95, 0.999):
        assert t_quantile(confidence, freedom) == pytest.approx(stats.t.ppf(0.5 + confidence / 2, freedom), rel=1e-9)


def test_t_by_the_tables():
    assert t_quantile(0.95, 2) == pytest.approx(4.303, abs=5e-4)
    assert t_quantile(0.9, 9) == pytest.approx(1.833, abs=5e-4)


def test_the_interval_covers_as_often_as_it_says():
    draw = random.Random(0)
    covered = sum(
        (c := compare([draw.gauss(1.0, 2.0) for _ in range(3)], 0.9)).low <= 1.0 <= c.high for _ in range(2000)
    )
    assert 0.88 < covered / 2000 < 0.92


def test_three_seeds_of_one_sign_have_the_smallest_p_there_is():
    assert sign_flip_p([1.0, 2.0, 0.5]) == 1 / 8
    assert sign_flip_p([-1.0, -2.0, -0.5]) == 1
    assert sign_flip_p([0.0, 0.0]) == 1
    assert math.isnan(sign_flip_p([1.0, math.nan]))


@pytest.mark.parametrize("seeds", [1, 2, 5, 8])
def test_the_sign_flip_test_counts_every_way(seeds):
    draw = random.Random(seeds)
    differences = [draw.choice((-1.0, 0.5, 2.0, 2.0)) for _ in range(seeds)]
    ways = itertools.product((-1, 1), repeat=seeds)
    sums = [sum(sign * abs(d) for sign, d in zip(signs, differences, strict=True)) for signs in ways]
    assert sign_flip_p(differences) == sum(value >= sum(differences) for value in sums) / len(sums)


def test_many_seeds_take_no_time():
    assert sign_flip_p([1.0] * 30) == 2.0**-30  # a billion sign patterns


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([1.0, 1.1, 0.9], "holds"),
        ([-1.0, -1.1, -0.9], "reversed"),
        ([1.0, -1.1, 0.9], "undecided"),
        ([9.0], "undecided"),
        ([0.28, 0.28], "undecided"),
        ([50.28 - 50, 51.28 - 51, 52.28 - 52], "undecided"),
        ([0.0, 0.0, 0.0], "undecided"),
        ([math.nan] * 3, "undecided"),
        ([1.0, math.inf, 0.9], "undecided"),
    ],
)
def test_verdicts(differences, verdict):
    assert compare(differences).verdict == verdict


def test_shifting_all_differences_shifts_the_interval():
    some, more = compare([0.3, -0.2, 0.9]), compare([5.3, 4.8, 5.9])
    assert (more.low - some.low, more.high - some.high) == pytest.approx((5.0, 5.0))


def test_standard_error_of_one_run_is_not_made_up():
    assert standard_error([3.0]) == 0.0
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)
