"""Statistics of raw samples: nearest-rank percentiles, and none where the samples are too few to have one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def samples_needed(percent: float) -> int:
    """The fewest samples with which a percentile is not simply their maximum: 20 for p95, 100 for p99.

    A percentile p <= 50 needs one sample; above, `1 / (1 - p/100)` of them.
    """
    if not 0 < percent < 100:
        raise ValueError(f"a percentile lies between 0 and 100, not at {percent}")
    if percent <= 50:
        return 1
    return math.ceil(100 / (100 - Fraction(str(percent))))


def percentile(samples: Sequence[float], percent: float) -> float | None:
    """The nearest-rank percentile: the smallest sample that at least `percent` % of the samples do not exceed.

    Always one of the samples, never an interpolation. None where there are fewer samples than `samples_needed`.
    """
    return None if len(samples) < samples_needed(percent) else nearest_rank(samples, percent)


def nearest_rank(samples: Sequence[float], percent: float) -> float:
    """As `percentile`, of any number of samples but none."""
    rank = math.ceil(Fraction(str(percent)) * len(samples) / 100)
    return sorted(samples)[rank - 1]


def rate(items: int, nanoseconds: int) -> float | None:
    """Items per second; None where the clock did not advance."""
    return items * 1e9 / nanoseconds if nanoseconds > 0 else None
