"""The table of a comparison on a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from runtime_tests.comparison.comparing import Comparison, Row
from runtime_tests.labels import number, visible
from runtime_tests.model import Report

_STYLES = {"better": "green", "worse": "red"}


def print_comparison(found: Comparison, console: Console | None = None) -> None:
    """Print both reports' figures, the changes with their noise, and what failed, to stderr (or to `console`)."""
    console = console or Console(stderr=True)
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.title = Text(f"before  {_describe(found.before)}\nafter   {_describe(found.after)}")
    table.add_column("figure")
    for title in ("before", "after", "change", "with noise"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict")
    for row in found.rows:
        if row.before is None and row.after is None:
            continue
        unit = f", {row.figure.unit}" if row.figure.unit else ""
        table.add_row(
            f"{_title(found, row)}{unit}",
            "–" if row.before is None else number(row.before),
            "–" if row.after is None else number(row.after),
            "" if row.change is None else _percent(row.change),
            _noise(row),
            Text(row.verdict, style=_STYLES.get(row.verdict, "")),
        )
    console.print(table)
    for obstacle, labels in _obstacles(found).items():
        console.print(Text(visible(f"not comparable: {'; '.join(labels)} ({obstacle})")))
    for condition in found.excused:
        console.print(Text(f"within noise: {condition.text}"))
    for condition in found.failed:
        console.print(Text(f"regression: {condition.text}", style="red"))


def _obstacles(found: Comparison) -> dict[str, list[str]]:
    """Why figures are not comparable -> their labels."""
    reasons: dict[str, list[str]] = {}
    for row in found.rows:
        if row.obstacle is not None:
            reasons.setdefault(row.obstacle, []).append(_title(found, row))
    return reasons


def _title(found: Comparison, row: Row) -> str:
    """Of both values; where one is emulated and the other is not, the reports above the table say which."""
    before, after = found.before.device.execution, found.after.device.execution
    return row.figure.title(before) if before == after else row.figure.label


def _describe(report: Report) -> str:
    deployed = report.deployed
    device = f"{report.device.name} ({report.device.execution})"
    parts = (deployed.model, deployed.recipe_name, deployed.runtime, device, report.settings.workload)
    return visible(" · ".join(part for part in parts if part) + f" · {report.created}")


def _noise(row: Row) -> str:
    if row.interval is None:
        return ""
    return f"{100 * row.interval.low:+.1f} to {_percent(row.interval.high)}"


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %"
