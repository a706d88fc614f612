"""How far figures can be from their true values.

Of n independent samples, the number below the true q-quantile is binomial (n, q). So two order statistics enclose that
quantile with a probability that follows from n and q alone, whatever the distribution. Means that two reports took over
the same places differ by the mean of the differences, whose noise those differences tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

_CONFIDENCE = 0.95
_DEVIATIONS = 1.96  # of a normal distribution that hold 95 % of it
_FEWEST_PAIRS = 20


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


def paired_change_interval(before: Sequence[float], after: Sequence[float]) -> Interval | None:
    """Relative change of the mean of a quantity that both took at the same places, with 95 % confidence.

    From the differences place by place, by the normal approximation of their mean. None for fewer than 20 places, other
    places, or a mean that is not positive.
    """
    count = len(before)
    mean = sum(before) / count if count else 0.0
    if count < _FEWEST_PAIRS or len(after) != count or mean <= 0:
        return None
    differences = [new - old for old, new in zip(before, after, strict=True)]
    middle = sum(differences) / count
    variance = sum((value - middle) ** 2 for value in differences) / (count - 1)
    reach = _DEVIATIONS * math.sqrt(variance / count)
    return Interval((middle - reach) / mean, (middle + reach) / mean)


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
