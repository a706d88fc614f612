"""The order of the runs, and what becomes of their figures: medians, spreads and ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds: the median, and the smallest and the largest."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Speed:
    """One process of one contender; medians of its runs.

    Attributes:
        prefill, decode: tokens per second. The first new token belongs to the prefill.
        load_s: from opening the file until it can run, without the start of the process.
        peak_bytes: the process's largest resident size.
    """

    prefill: float
    decode: float
    load_s: float
    peak_bytes: int


@dataclass(frozen=True)
class Timed:
    """One generation in a process: nanoseconds until the first new token, and of all others together."""

    prefill_ns: int
    decode_ns: int


def speed_of(runs: Sequence[Timed], prompt: int, new_tokens: int, load_ns: int, peak_bytes: int) -> Speed:
    """Of the runs of one process, each from `prompt` tokens to `new_tokens` others (at least 2)."""
    if new_tokens < 2:
        raise ValueError("a decode speed needs a token after the first")
    if not runs or any(run.prefill_ns <= 0 or run.decode_ns <= 0 for run in runs):
        raise ValueError("no time was measured")
    return Speed(
        prefill=prompt * 1e9 / median(run.prefill_ns for run in runs),
        decode=(new_tokens - 1) * 1e9 / median(run.decode_ns for run in runs),
        load_s=load_ns / 1e9,
        peak_bytes=peak_bytes,
    )


def interleaved(labels: Sequence[str], rounds: int) -> list[tuple[int, str]]:
    """(round, label) in the order of the runs: every label once a round, each round starting with another one."""
    count = len(labels)
    return [(turn, labels[(turn + place) % count]) for turn in range(rounds) for place in range(count)]


def spread(values: Sequence[float]) -> Spread:
    """Of the rounds' values, at least one."""
    return Spread(median(values), min(values), max(values))


def ratio(ours: Sequence[float], others: Sequence[float]) -> Spread:
    """Ratio of the medians, with the smallest and largest ratio within a round.

    Raises:
        ValueError: the two have not the same rounds.
    """
    within = [mine / theirs for mine, theirs in zip(ours, others, strict=True)]
    return Spread(median(ours) / median(others), min(within), max(within))
