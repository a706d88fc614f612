"""A method's rows at one setting, over the seeds, and how they compare with another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks.results import Outcome


@dataclass(frozen=True)
class Line:
    """One method's figures, seeds ascending."""

    method: str
    rows: list[dict[str, Any]]

    @property
    def ours(self) -> bool:
        return bool(self.rows[0]["ours"])

    @property
    def calibrated(self) -> bool:
        return bool(self.rows[0]["calibrated"])

    @property
    def seeds(self) -> list[int]:
        return [row["seed"] for row in self.rows]

    @property
    def kls(self) -> list[float]:
        return [row["kl"] for row in self.rows]

    def mean(self, key: str) -> float:
        return fmean(row[key] for row in self.rows)

    def over(self, other: Line) -> float | None:
        """The KL over another's, each a mean over the seeds that both have; None where they share none."""
        own, others = self._by_seed(other), other._by_seed(self)
        shared = own.keys() & others.keys()
        expected = sum(others[seed] for seed in shared)
        return sum(own[seed] for seed in shared) / expected if expected else None

    def _by_seed(self, other: Line) -> dict[int, float]:
        """KL by seed; without calibration it is the same for all."""
        if self.calibrated:
            return dict(zip(self.seeds, self.kls, strict=True))
        return dict.fromkeys((*self.seeds, *other.seeds), self.mean("kl"))


def lines_of(title: str, outcomes: Sequence[Outcome]) -> list[Line]:
    """A table's methods with figures, in the order in which they come first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for outcome in outcomes:
        if outcome.title == title and outcome.row:
            found.setdefault(outcome.method, []).append(outcome.row)
    return [Line(method, sorted(rows, key=lambda row: row["seed"])) for method, rows in found.items()]


def beside_peers(line: Line, lines: Sequence[Line]) -> float | None:
    """The KL over that of the best peer: the largest such ratio there is; None where no peer shares a seed."""
    ratios = [line.over(other) for other in lines if not other.ours]
    return max((ratio for ratio in ratios if ratio is not None), default=None)
