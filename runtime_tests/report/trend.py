"""`history.html`: a chart a figure, a line a kind of report; one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter, MaxNLocator

from boa_edge import __version__
from devices.contract import Execution
from runtime_tests.comparison.figures import COMPARABLES, Comparable
from runtime_tests.labels import number, visible
from runtime_tests.model import Report
from runtime_tests.report.svg import SERIES, draw

_DIRECTORY = Path(__file__).parent
_MARKERS = ("o", "s", "^", "D")
PAGE_MARKS = (b'<meta name="generator" content="boa-edge ', b" over time</title>")
"""What a page of this kind, and no other of ours, has in its head."""
Series = Mapping[tuple[str, ...], Sequence[Report]]


def render_history(series: Series) -> str:
    """The page. Names come from files and are escaped, what could hide or reorder text spelled out."""
    environment = Environment(
        loader=FileSystemLoader(_DIRECTORY),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    charts = [
        (entry, execution, chart)
        for entry in COMPARABLES
        for execution in _apart(entry, series)
        if (chart := _chart(entry, series, execution)) is not None
    ]
    kinds = [
        {
            "name": " · ".join(kind),
            "colour": f"var(--series-{index % len(SERIES) + 1})",
            "marker": "●■▲◆"[index // len(SERIES) % len(_MARKERS)],
            **_table(reports),
        }
        for index, (kind, reports) in enumerate(series.items())
    ]
    return environment.get_template("history.html.j2").render(
        version=__version__,
        style=Markup((_DIRECTORY / "report.css").read_text(encoding="utf-8")),
        charts=charts,
        kinds=kinds,
        count=sum(len(reports) for reports in series.values()),
    )


def _apart(entry: Comparable, series: Series) -> Sequence[Execution | None]:
    """What gets a chart of its own: emulated times and memory say nothing beside measured ones."""
    if entry.kind in ("artefact", "accuracy"):
        return [None]
    found = {report.device.execution for reports in series.values() for report in reports}
    return sorted(found, reverse=True)


def _chart(entry: Comparable, series: Series, execution: Execution | None) -> Markup | None:
    """The figure against the number of the report in its kind; None where nobody has it.

    Args:
        execution: of the devices whose reports are drawn; None for all.
    """
    lines = []
    for index, reports in enumerate(series.values()):
        if execution not in (None, reports[0].device.execution):
            continue
        values = [(place, entry.value(report)) for place, report in enumerate(reports, start=1)]
        known = [(place, value) for place, value in values if value is not None]
        if known:
            lines.append((index, known))
    if not lines:
        return None
    top = max(value for _, known in lines for _, value in known)
    longest = max(place for _, known in lines for place, _ in known)

    def paint(drawing: Drawing) -> None:
        axes = drawing.add_subplot()
        for index, known in lines:
            axes.plot(
                *zip(*known, strict=True),
                color=SERIES[index % len(SERIES)],
                marker=_MARKERS[index // len(SERIES) % len(_MARKERS)],
                markersize=4,
                linewidth=1.4,
            )
        axes.set_ylim(0, top * 1.15 or 1)
        axes.set_xlim(0.5, longest + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axes.set_xlabel("report, in order of time")
        axes.set_ylabel(entry.unit or entry.label.lower())

    how = "" if execution is None else f", {execution},"
    text = f"{entry.label}{how} of {sum(len(known) for _, known in lines)} reports, at most {number(top)} {entry.unit}"
    return draw(f"history-{entry.name}-{execution or 'all'}", 200, f"{text.strip()}.", paint)


def _table(reports: Sequence[Report]) -> dict[str, Any]:
    """Heads and rows: the figures that at least one of these reports of one kind has."""
    known = [entry for entry in COMPARABLES if any(entry.value(report) is not None for report in reports)]
    titles = [(entry.title(reports[0].device.execution), entry.unit) for entry in known]
    return {
        "heads": [", ".join(filter(None, title)) for title in titles],
        "rows": [(report.created, [_cell(entry, report) for entry in known]) for report in reports],
    }


def _cell(entry: Comparable, report: Report) -> str:
    value = entry.value(report)
    return "–" if value is None else number(value)
