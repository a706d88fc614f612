"""Compare two reports, figure by figure, and judge the changes by conditions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from boa_edge.errors import UsageError
from runtime_tests.comparison.conditions import Condition, parse
from runtime_tests.comparison.figures import BY_NAME, COMPARABLES, Comparable, obstacle
from runtime_tests.comparison.noise import (
    Interval,
    change_interval,
    paired_change_interval,
    quantile_interval,
)
from runtime_tests.model import Report
from runtime_tests.reading import read_report

Verdict = Literal["better", "worse", "same", "within noise", "not comparable", "not recorded"]


@dataclass(frozen=True)
class Row:
    """One figure of both reports.

    Attributes:
        before, after: values in the figure's unit; None where a report has none.
        change: after / before - 1, None where it cannot be had.
        interval: where the change lies given the noise of both; None where nothing is known of the noise, and the
            change is taken at its word.
        obstacle: why the two say nothing side by side.
    """

    figure: Comparable
    before: float | None
    after: float | None
    change: float | None
    interval: Interval | None
    verdict: Verdict
    obstacle: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        interval = None if self.interval is None else [round(self.interval.low, 6), round(self.interval.high, 6)]
        found = {
            "before": self.before,
            "after": self.after,
            "unit": self.figure.unit,
            "change": None if self.change is None else round(self.change, 6),
            "interval": interval,
            "verdict": self.verdict,
            "reason": self.obstacle,
        }
        return {key: value for key, value in found.items() if value is not None}


@dataclass(frozen=True)
class Comparison:
    """Two reports, and which of the conditions hold: those are regressions."""

    before: Report
    after: Report
    rows: tuple[Row, ...]
    failed: tuple[Condition, ...]
    excused: tuple[Condition, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "before": _name(self.before),
            "after": _name(self.after),
            "figures": {row.figure.name: row.as_dict() for row in self.rows},
            "regressions": [condition.text for condition in self.failed],
            "within_noise": [condition.text for condition in self.excused],
        }


def compare(before: Path, after: Path, *, fail_on: str = "") -> Comparison:
    """Compare the report `after` with the earlier one `before`.

    A condition counts as failed where the change is beyond its limit and larger than the noise of both reports
    together: the interval of the change leaves out 0. A change beyond the limit that noise could explain is excused,
    and said.

    Args:
        before, after: directories that `measure` wrote, or their report.json.
        fail_on: comma-separated conditions (`runtime_tests.comparison.conditions`).

    Raises:
        BoaEdgeError: a report that cannot be read.
        UsageError: a condition that cannot be read, or on a figure that the two reports cannot be compared by.
    """
    conditions = parse(fail_on)
    first, second = read_report(before), read_report(after)
    rows = tuple(_row(entry, first, second) for entry in COMPARABLES)
    failed: list[Condition] = []
    excused: list[Condition] = []
    by_name = {row.figure.name: row for row in rows}
    for condition in conditions:
        row = by_name[condition.name]
        change = _change(row, condition)
        if not condition.holds(change):
            continue
        noisy = row.interval is not None and row.interval.low <= 0 <= row.interval.high
        (excused if noisy else failed).append(condition)
    return Comparison(first, second, rows, tuple(failed), tuple(excused))


def _row(entry: Comparable, first: Report, second: Report) -> Row:
    before, after = entry.value(first), entry.value(second)
    if before is None or after is None:
        return Row(entry, before, after, None, None, "not recorded")
    reason = obstacle(entry.kind, first, second)
    if reason is not None:
        return Row(entry, before, after, None, None, "not comparable", reason)
    change = after / before - 1 if before > 0 else None
    interval = _interval(entry, first, second)
    return Row(entry, before, after, change, interval, _verdict(entry, before, after, interval))


def _interval(entry: Comparable, first: Report, second: Report) -> Interval | None:
    if entry.places(first):
        return paired_change_interval(entry.places(first), entry.places(second))
    old = quantile_interval(entry.samples(first), 50)
    new = quantile_interval(entry.samples(second), 50)
    return None if old is None or new is None else change_interval(old, new)


def _verdict(entry: Comparable, before: float, after: float, interval: Interval | None) -> Verdict:
    if before == after:
        return "same"
    if interval is not None and interval.low <= 0 <= interval.high:
        return "within noise"
    return "better" if (after < before) == (entry.better == "less") else "worse"


def _change(row: Row, condition: Condition) -> float:
    """What the condition is about. UsageError where the reports do not have it."""
    where = f"--fail-on {condition.text}"
    if row.obstacle is not None:
        raise UsageError(f"the two cannot be compared by it ({row.obstacle})", where=where)
    if row.before is None or row.after is None:
        which = "the earlier" if row.before is None else "the later"
        raise UsageError(f"{which} report has no {BY_NAME[condition.name].label.lower()}", where=where)
    if not condition.relative:
        return row.after - row.before
    if row.change is None:
        raise UsageError("the earlier value is 0, so that no share of it can be taken", where=where)
    return row.change


def _name(report: Report) -> dict[str, Any]:
    return {
        "created": report.created,
        "model": report.deployed.model,
        "recipe": report.deployed.recipe_name,
        "runtime": report.deployed.runtime,
        "device": report.device.name,
        "execution": report.device.execution,
        "workload": report.settings.workload,
    }
