"""How far a quantile of noisy samples can be from the true one: intervals that assume no distribution.

Of n independent samples, the number below the true q-quantile is binomial (n, q). So two order statistics enclose that
quantile with a probability that follows from n and q alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """Both ends, `low` <= `high`."""

    low: float
    high: float


def quantile_interval(samples: Sequence[float], percent: float) -> Interval | None:
    """Where the true percentile lies, with 95 % confidence or with all that so few samples can give.

    With fewer samples than that takes (6 for the median), the whole range of the samples. None for a single sample:
    nothing is known of its noise.
    """
    if len(samples) < 2:
        return None
    ordered = sorted(samples)
    below, above = _ranks(len(ordered), float(Fraction(str(percent)) / 100))
    return Interval(ordered[below], ordered[above])


def change_interval(before: Interval, after: Interval) -> Interval | None:
    """Relative change of a positive quantity, from both intervals' far ends; None where `before` is not positive."""
    if before.low <= 0:
        return None
    return Interval(after.low / before.high - 1, after.high / before.low - 1)


def _ranks(count: int, share: float) -> tuple[int, int]:
    """Indices of the order statistics: the narrowest pair that leaves at most 2.5 % on either side, else the ends."""
    tail = (1 - _CONFIDENCE) / 2
    at_most = 0.0  # P(samples below the quantile <= index)
    low, high = 0, count - 1
    for index in range(count):
        at_most += _binomial(count, index, share)
        if at_most <= tail:
            low = index
        if at_most >= 1 - tail:
            high = index
            break
    return low, high


def _binomial(count: int, index: int, share: float) -> float:
    """P(X = index) for X binomial (count, share), by logarithms: the coefficients outgrow a float."""
    ways = math.lgamma(count + 1) - math.lgamma(index + 1) - math.lgamma(count - index + 1)
    return math.exp(ways + index * math.log(share) + (count - index) * math.log1p(-share))
