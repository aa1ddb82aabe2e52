# SPDX-License-Identifier: Apache-2.0
"""Statistics of a few paired runs: mean difference, Student's t interval, and the exact sign-flip test.

Runs are paired by seed: same initial weights, order of images and augmentation. The interval assumes normally
distributed differences; the sign-flip test does not, but with n seeds its one-sided p is at least 2^-n.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Comparison:
    """The comparison over n seeds; low and high are None for one seed. p: one-sided, for a difference above zero."""

    n: int
    mean: float
    low: float | None
    high: float | None
    p: float

    @property
    def equal(self) -> bool:
        """True if all seeds have the same difference, up to rounding."""
        return self.low is not None and self.high is not None and self.high - self.low <= 1e-9 * abs(self.mean)

    @property
    def verdict(self) -> str:
        """ "holds", "reversed" or "undecided": the interval lies above zero, below zero, or contains it.

        Equal differences are undecided: their interval is a point, and they give no estimate of chance.
        """
        if self.low is None or self.high is None or self.equal:
            return "undecided"
        return "holds" if self.low > 0 else "reversed" if self.high < 0 else "undecided"


def compare(differences: Sequence[float], confidence: float = 0.95) -> Comparison:
    """Return the comparison for one difference per seed."""
    n = len(differences)
    mean = sum(differences) / n
    p = sign_flip_p(differences)
    if n == 1:
        return Comparison(1, mean, None, None, p)
    reach = t_quantile(confidence, n - 1) * standard_error(differences)
    return Comparison(n, mean, mean - reach, mean + reach, p)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; 0 for a single value, for which it is unknown."""
    n = len(values)
    if n < 2:
        return 0.0
    mean = sum(values) / n
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the exact one-sided p of the sign-flip test; nan if a difference is not finite.

    It is the fraction of all 2^n sign patterns for which the sum of the differences is at least as large.
    """
    if not all(map(math.isfinite, differences)):
        return math.nan
    sizes = [abs(difference) for difference in differences]
    seen = sum(differences) - 1e-9 * sum(sizes)  # sums in another order may differ in the last bit
    # combine the sums of one half with the sorted sums of the other: 2^(n/2) numbers instead of 2^n
    some, others = _signed_sums(sizes[::2]), np.sort(_signed_sums(sizes[1::2]))
    large = len(some) * len(others) - int(np.searchsorted(others, seen - some).sum())
    return large / 2 ** len(sizes)


def _signed_sums(sizes: Sequence[float]) -> NDArray[np.float64]:
    sums = np.zeros(1)
    for size in sizes:
        sums = np.concatenate((sums - size, sums + size))
    return sums


def t_quantile(confidence: float, freedom: int) -> float:
    """Return t such that P(|T| < t) equals `confidence`."""
    low, high = 0.0, 1.0
    while t_probability(high, freedom) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, freedom) < confidence else (low, middle)
    return high


def t_probability(t: float, freedom: int) -> float:
    """Return P(|T| < t) of Student's t with integer degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
