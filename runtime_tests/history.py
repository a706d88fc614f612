"""The figures of many reports over time: every report.json below a directory, those of the same kind in one line."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boa_edge.errors import BoaEdgeError, UsageError
from boa_edge.files import check_writable, disk_errors, write_text
from boa_edge.progress import say
from runtime_tests.hardware import describe
from runtime_tests.model import Report
from runtime_tests.reading import REPORT, read_report
from runtime_tests.report.trend import PAGE_MARKS, render_history

Kind = tuple[str, ...]
_HEAD = 4096  # bytes in which a page's marks stand


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
        UsageError: something else than such a page is at `output`, or nothing can be written there.
    """
    page = _check_page(output)
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
    with disk_errors(page):
        page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, render_history(made.series))
    return made


def _check_page(output: Path) -> Path:
    """The place that `output` leads to, where nothing is or a page that this command has made."""
    place = Path(os.path.realpath(output.expanduser()))
    fix = "Choose another -o"
    if os.path.lexists(place):
        if not place.is_file():
            raise UsageError("exists and is not a file", where=output, fix=fix)
        with disk_errors(place), place.open("rb") as stream:
            head = stream.read(_HEAD)
        if not all(mark in head for mark in PAGE_MARKS):
            raise UsageError("exists already, and is no page of `report --history`: it is kept", where=output, fix=fix)
    check_writable(place.parent, "-o", beside=place.name)
    return place


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
        + (f", cores {','.join(map(str, settings.cores))}" if settings.cores else "")
        + f", {settings.warmup} warm-up{'' if settings.warmup == 1 else 's'}"
        + ("" if report.counted in (None, settings.workload) else f", instructions of {report.counted}"),
        f"{report.fidelity.positions} positions of text",
    )
