"""Outliers of activations: a chart by place and decoder block, before and after, and the worst of each for a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from runtime_tests.labels import PLACES, number
from runtime_tests.model import Outlier, OutlierFacts, Place
from runtime_tests.report.svg import INK, MUTED, SERIES, draw

Measure = Literal["maximum", "kurtosis"]

NORMAL_KURTOSIS = 3.0
_ROW_HEIGHT = 122
_MARK_AREA, _ROOMY_BLOCKS = 13.0, 40  # marks of more blocks are smaller, or they would cover each other
_MOST_TICKS = 5
_LARGEST_POWER = 300
_NAMES: dict[Measure, str] = {"maximum": "Largest magnitude", "kurtosis": "Kurtosis"}
_BLOCK_PLACES: tuple[Place, ...] = ("attention", "o", "mlp", "down")
_Point = tuple[int, Place, float]


@dataclass(frozen=True)
class Worst:
    """The largest figures of a place over all its layers; None where there is none."""

    place: str
    maximum_before: float | None
    maximum_after: float | None
    kurtosis_before: float | None
    kurtosis_after: float | None


def changed(facts: OutlierFacts) -> bool:
    """Whether there is a before and an after to tell apart: without a transform they are the same."""
    return bool(facts.before and facts.after) and facts.before != facts.after


def worst(facts: OutlierFacts) -> list[Worst]:
    """A row for each place that was looked at."""
    return [
        Worst(
            PLACES[place],
            _largest(facts.before, place, "maximum"),
            _largest(facts.after, place, "maximum"),
            _largest(facts.before, place, "kurtosis"),
            _largest(facts.after, place, "kurtosis"),
        )
        for place in PLACES
        if any(row.place == place for row in (*facts.before, *facts.after))
    ]


def outlier_chart(facts: OutlierFacts | None, measure: Measure) -> Markup | None:
    """A panel for each place: decoder blocks across, the measure up, on a logarithmic scale that all panels share."""
    if facts is None:
        return None
    before, after = (_points(rows, measure) for rows in (facts.before, facts.after))
    if not (before or after):
        return None
    both = changed(facts)
    if not both:
        after, before = after or before, []
    every = [*before, *after]
    lowest, highest = _decades([value for _, _, value in every])
    places = [place for place in _BLOCK_PLACES if any(at == place for _, at, _ in every)]
    head = any(at == "head" for _, at, _ in every)
    rows = max(1, -(-len(places) // 2))
    last = max([layer for layer, _, _ in every] + [0])
    area = max(5.0, _MARK_AREA * min(1.0, _ROOMY_BLOCKS / (last + 1)))

    def panel(axes: Any, place: Place, *, labelled: bool) -> None:
        axes.set_yscale("log")
        axes.set_ylim(10.0**lowest / 1.25, 10.0**highest * 1.25)
        _ticks(axes, lowest, highest, labelled=labelled)
        axes.set_title(PLACES[place], fontsize=10.5, color=INK, pad=4)
        if measure == "kurtosis":
            axes.axhline(NORMAL_KURTOSIS, color=MUTED, linewidth=1, linestyle=(0, (3, 2)))
        size = _MARK_AREA if place == "head" else area
        _mark(axes, before, place, _style(size, faint=True))
        _mark(axes, after, place, _style(size, faint=False))

    def paint(drawing: Drawing) -> None:
        cells = drawing.add_gridspec(rows, 3 if head else 2, width_ratios=(10, 10, 1.6) if head else None)
        for index, place in enumerate(places):
            axes = drawing.add_subplot(cells[index // 2, index % 2])
            panel(axes, place, labelled=index % 2 == 0)
            axes.set_xlim(-0.8, last + 0.8)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
            axes.tick_params(axis="x", labelbottom=index + 2 >= len(places))
        if head:
            axes = drawing.add_subplot(cells[0, 2])
            panel(axes, "head", labelled=not places)
            axes.set_xticks([])
            axes.set_xlim(-1.5, -0.5)
        if places:
            drawing.supxlabel("decoder block", fontsize=10.5, color=MUTED)
        if both:
            handles = [drawing.axes[0].scatter([], [], **_style(_MARK_AREA, faint=faint)) for faint in (True, False)]
            drawing.legend(handles, ["before", "after"], loc="outside upper right", ncols=2, handletextpad=0.2)

    shown = [place for place in (*places, "head") if place != "head" or head]
    listed = "; ".join(_told(before if both else [], after, place) for place in shown)
    what = f"{_NAMES[measure]} of what the linears take in, the largest by place"
    return draw(f"outliers-{measure}", 48 + _ROW_HEIGHT * rows, f"{what}: {listed}.", paint)


def _points(rows: Sequence[Outlier], measure: Measure) -> list[_Point]:
    """What a logarithmic axis can show."""
    found = [(row.layer, row.place, _value(row, measure)) for row in rows]
    return [(layer, place, value) for layer, place, value in found if value]


def _value(row: Outlier, measure: Measure) -> float | None:
    return row.maximum if measure == "maximum" else row.kurtosis


def _largest(rows: Sequence[Outlier], place: str, measure: Measure) -> float | None:
    values = [_value(row, measure) for row in rows if row.place == place]
    return max((value for value in values if value is not None), default=None)


def _told(before: Sequence[_Point], after: Sequence[_Point], place: str) -> str:
    """The largest at a place in words."""
    sides = [max((value for _, at, value in side if at == place), default=None) for side in (before, after)]
    texts = ["none" if value is None else number(value) for value in sides]
    return f"{PLACES[place]} {texts[0]} before, {texts[1]} after" if before else f"{PLACES[place]} {texts[1]}"


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten that enclose all values, at least one decade apart."""
    lowest = max(math.floor(math.log10(min(values))), -_LARGEST_POWER)
    return lowest, min(max(math.ceil(math.log10(max(values))), lowest + 1), _LARGEST_POWER)


def _ticks(axes: Any, lowest: int, highest: int, *, labelled: bool) -> None:
    step = -(-(highest - lowest) // (_MOST_TICKS - 1))
    axes.yaxis.set_major_locator(FixedLocator([10.0**power for power in range(lowest, highest + 1, step)]))
    axes.yaxis.set_minor_locator(FixedLocator([]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    axes.tick_params(axis="y", labelleft=labelled)


def _power(value: float) -> str:
    """A power of ten, in few characters."""
    if 1e-3 <= value < 1e3:
        return f"{value:g}"
    for unit, name in ((1e3, "k"), (1e6, "M")):
        if unit <= value < 999 * unit:
            return f"{value / unit:.0f}{name}"
    return f"{value:.0e}"


def _mark(axes: Any, points: Sequence[_Point], place: Place, style: dict[str, Any]) -> None:
    own = [(layer, value) for layer, at, value in points if at == place]
    if own:
        axes.scatter(*zip(*own, strict=True), clip_on=False, **style)


def _style(area: float, *, faint: bool) -> dict[str, Any]:
    """Marks of `area` square points: rings before, discs after."""
    if faint:
        width = (area / _MARK_AREA) ** 0.5
        return {
            "s": area,
            "facecolors": "none",
            "edgecolors": SERIES[1],
            "linewidths": width,
            "alpha": 0.6,
            "zorder": 2,
        }
    return {"s": 0.85 * area, "color": SERIES[0], "linewidths": 0, "zorder": 3}
