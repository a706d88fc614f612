"""The figures of many reports over time: every report.json below a directory, those of the same kind in one line."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boa_edge.errors import BoaEdgeError
from boa_edge.files import write_text
from boa_edge.progress import say
from runtime_tests.hardware import describe
from runtime_tests.model import Report
from runtime_tests.reading import REPORT, read_report
from runtime_tests.report.trend import render_history

Kind = tuple[str, ...]


@dataclass(frozen=True)
class History:
    """Reports by what makes them comparable, each list in order of time.

    Attributes:
        skipped: files that are no readable reports, with the reason.
    """

    series: dict[Kind, list[Report]]
    skipped: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "series": [{"of": " · ".join(kind), "reports": len(reports)} for kind, reports in self.series.items()],
            "skipped": self.skipped,
        }


def history(directory: Path, output: Path) -> History:
    """Draw every report below `directory` into the page `output`.

    Raises:
        BoaEdgeError: no such directory, or no report in it.
    """
    if not directory.is_dir():
        raise BoaEdgeError("there is no such directory", where=directory, fix="Name one that holds reports")
    found: list[Report] = []
    skipped: dict[str, str] = {}
    for path in sorted(directory.rglob(REPORT)):
        try:
            found.append(read_report(path))
        except BoaEdgeError as error:
            skipped[path.relative_to(directory).as_posix()] = str(error)
            say(f"left out: {error}")
    if not found:
        raise BoaEdgeError(f"holds no readable {REPORT}", where=directory, fix="Name one that holds reports")
    made = History(arrange(found), skipped)
    write_text(output, render_history(made.series))
    return made


def arrange(reports: Iterable[Report]) -> dict[Kind, list[Report]]:
    """The reports by kind, each kind in order of time; kinds in the order of their names."""
    by_kind: dict[Kind, list[Report]] = defaultdict(list)
    for report in sorted(reports, key=lambda report: report.created):
        by_kind[kind_of(report)].append(report)
    return dict(sorted(by_kind.items()))


def kind_of(report: Report) -> Kind:
    """Everything that two reports must share for their figures to be one line."""
    deployed, settings = report.deployed, report.settings
    return (
        deployed.model or "model not recorded",
        deployed.recipe_name or "recipe not recorded",
        " ".join(filter(None, (deployed.runtime, deployed.runtime_config.get("form"), deployed.activations))),
        " ".join(
            filter(None, (report.device.name, f"({report.device.execution})", describe(report.device.fingerprint)))
        ),
        f"{settings.workload}, {settings.threads} thread{'' if settings.threads == 1 else 's'}"
        + (f", cores {','.join(map(str, settings.cores))}" if settings.cores else ""),
    )
