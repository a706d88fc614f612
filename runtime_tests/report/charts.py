"""The report's charts. Each gives None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure as Drawing
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from devices.contract import Execution
from runtime_tests.labels import label, method_name, number, short, show, show_bytes, visible
from runtime_tests.model import LayerError, MethodRow, Report, Variant
from runtime_tests.report.layers import LayerGrid, grid
from runtime_tests.report.svg import INK, MUTED, SERIES, SURFACE, draw

_METHOD_STYLE = {"rtn": (SERIES[1], "s"), "gptq": (SERIES[2], "^"), "edge": (SERIES[0], "o"), "boa": (SERIES[3], "D")}
_OTHER_STYLE = (SERIES[3], "v")
_LABEL_GAP = 14.0
_LABELLED_POINTS = 8


def size_against_kl(rows: Sequence[MethodRow]) -> Markup | None:
    """A point a method: bytes across, KL from the original up. The original itself is the table's."""
    points = [
        (row, row.payload_size.number, row.kl.number)
        for row in rows
        if row.method != "original" and row.payload_size is not None and row.kl is not None
    ]
    known = [(row, size, kl) for row, size, kl in points if size is not None and kl is not None]
    if not known:
        return None

    def paint(drawing: Drawing) -> None:
        axes = drawing.add_subplot()
        kls = [kl for _, _, kl in known]
        if min(kls) > 0 and max(kls) / min(kls) > 30:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, max(kls) * 1.15 or 1)
            axes.yaxis.set_major_locator(MaxNLocator(5))
        sizes = [size for _, size, _ in known]
        spread = max(max(sizes) - min(sizes), 0.2 * max(sizes))
        middle = (max(sizes) + min(sizes)) / 2
        axes.set_xlim(middle - 0.75 * spread, middle + 0.75 * spread)
        for row, size, kl in known:
            colour, marker = _METHOD_STYLE.get(row.method.lower(), _OTHER_STYLE)
            axes.scatter([size], [kl], s=58, color=colour, marker=marker, edgecolors=SURFACE, linewidths=1, zorder=3)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show_bytes(value)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        axes.set_xlabel("size of the weights")
        axes.set_ylabel("KL from the original, nats/token")
        if len(known) <= _LABELLED_POINTS:
            _label_points(drawing, axes, known)

    listed = "; ".join(f"{method_name(row.method)} {show(row.payload_size)}, {show(row.kl)}" for row, _, _ in known)
    return draw("size-kl", 250, f"Size against KL divergence. {visible(listed)}.", paint)


def kl_against_speed(variants: Sequence[Variant], execution: Execution) -> Markup | None:
    """A point a bundle: decode speed across, KL from the original up, its area the bundle's size."""
    points = [
        (one, one.decode_speed.number, one.kl_from_original.number, one.runtime_size.number)
        for one in variants
        if one.kl_from_original is not None
    ]
    known = [
        (one, speed, kl, size)
        for one, speed, kl, size in points
        if speed is not None and kl is not None and size is not None
    ]
    if not known:
        return None

    def paint(drawing: Drawing) -> None:
        axes = drawing.add_subplot()
        axes.set_ylim(0, max(kl for _, _, kl, _ in known) * 1.25 or 1)
        axes.set_xlim(0, max(speed for _, speed, _, _ in known) * 1.2 or 1)
        largest = max(size for *_, size in known)
        for index, (_, speed, kl, size) in enumerate(known):
            colour = SERIES[index % len(SERIES)]
            axes.scatter([speed], [kl], s=40 + 200 * size / largest, color=colour, alpha=0.85, edgecolors=SURFACE)
        axes.xaxis.set_major_locator(MaxNLocator(5, prune="lower"))  # the other axis has that 0
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"{label('decode_speed', execution).lower()}, tokens/s")
        axes.set_ylabel("KL from the original, nats/token")
        drawing.draw_without_rendering()
        places = sorted(
            ((*axes.transData.transform((speed, kl)), *point) for point in known for _, speed, kl, _ in [point]),
            key=lambda place: place[1],
        )
        low, high = axes.transAxes.transform([(0, 0), (1, 1)])
        levels = _spread([y for _, y, *_ in places], low[1] + 6, high[1] - 4)
        for (x, y, one, speed, kl, size), level in zip(places, levels, strict=True):
            right = x < (low[0] + high[0]) / 2
            axes.annotate(
                short(f"{one.name}, {show_bytes(size)}", 28),
                (speed, kl),
                xytext=(11 if right else -11, level - y),
                textcoords="offset points",
                ha="left" if right else "right",
                va="center",
                fontsize=10.5,
                annotation_clip=False,
            )

    listed = "; ".join(f"{one.name} {show(one.decode_speed)}, {show(one.kl_from_original)}" for one, *_ in known)
    return draw("kl-speed", 250, f"KL divergence against decode speed. {visible(listed)}.", paint)


def _label_points(drawing: Drawing, axes: Any, points: Sequence[tuple[MethodRow, float, float]]) -> None:
    """Name each point beside it, moved up or down as far as it takes for no two names to touch."""
    by_recipe = len(points) > len({row.method for row, _, _ in points})
    drawing.draw_without_rendering()
    places = sorted(
        ((*axes.transData.transform((size, kl)), row, size, kl) for row, size, kl in points), key=lambda place: place[1]
    )
    low, high = axes.transAxes.transform([(0, 0), (1, 1)])
    levels = _spread([y for _, y, *_ in places], low[1] + 6, high[1] - 4)
    for (x, y, row, size, kl), level in zip(places, levels, strict=True):
        text = row.recipe if by_recipe and row.recipe else method_name(row.method)
        right = x < (low[0] + high[0]) / 2 + 1
        axes.annotate(
            short(text, 18),
            (size, kl),
            xytext=(9 if right else -9, level - y),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            fontsize=10.5,
            annotation_clip=False,
        )


def _spread(levels: Sequence[float], least: float, most: float) -> list[float]:
    """Ascending levels at least a line apart, moved as little as a pass up and a pass down do."""
    spread: list[float] = []
    for level in levels:
        spread.append(max(level, spread[-1] + _LABEL_GAP if spread else least))
    limit = most
    for index in reversed(range(len(spread))):
        spread[index] = min(spread[index], limit)
        limit = spread[index] - _LABEL_GAP
    return spread


def layer_strip(layers: Sequence[LayerError]) -> Markup | None:
    """Relative error by block (across) and kind of layer (down); the stronger, the larger, on a logarithmic scale."""
    cells = grid(layers)
    if cells is None:
        return None

    def paint(drawing: Drawing) -> None:
        axes = drawing.add_subplot()
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        for (row, column), value in cells.values.items():
            box = Rectangle((column + 0.04, row + 0.04), 0.92, 0.92, facecolor=SERIES[0], alpha=cells.strength(value))
            axes.add_patch(box)
        axes.set_xlim(0, cells.blocks)
        axes.set_ylim(len(cells.kinds), 0)
        axes.set_yticks([row + 0.5 for row in range(len(cells.kinds))], [short(kind, 14) for kind in cells.kinds])
        step = max(1, -(-cells.blocks // 8))
        ticks = range(0, cells.blocks, step)
        axes.set_xticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
        axes.set_xlabel("decoder block")
        _strength_key(drawing, axes, cells)

    height = 92 + 20 * len(cells.kinds)
    largest = max(cells.values.values())
    text = f"Relative error of {len(cells.values)} layers, from {number(cells.least)} to {number(largest)}."
    return draw("layers", height, text, paint)


def _strength_key(drawing: Drawing, axes: Any, cells: LayerGrid) -> None:
    """What the strengths stand for, above the strip."""
    key = axes.inset_axes((0, 1.03, 1, 18 / (20 * len(cells.kinds))))
    key.set_axis_off()
    key.set_xlim(0, 100)
    key.set_ylim(0, 1)
    key.text(33, 0.5, f"{cells.least:.1e}", ha="right", va="center", color=MUTED, fontsize=10.5)
    for step in range(5):
        value = cells.least * (cells.largest / cells.least) ** (step / 4)
        box = Rectangle((35 + 6 * step, 0.15), 5.6, 0.7, facecolor=SERIES[0], alpha=cells.strength(value))
        key.add_patch(box)
    key.text(67, 0.5, f"{cells.largest:.1e}", ha="left", va="center", color=MUTED, fontsize=10.5)


def token_times(report: Report) -> Markup | None:
    """Milliseconds of each generated token after the first, a line a counted run."""
    runs = [run for run in report.samples.runs if not run.warmup and run.token_ns]
    if not runs:
        return None
    emulated = report.samples.execution == "emulated"
    median, tail = report.speed.token_time_p50.number, report.speed.token_time_p95.number
    top = max(ns for run in runs for ns in run.token_ns) / 1e6

    def paint(drawing: Drawing) -> None:
        axes = drawing.add_subplot()
        for run in runs:
            numbers = range(2, len(run.token_ns) + 2)
            axes.plot(
                numbers,
                [ns / 1e6 for ns in run.token_ns],
                color=SERIES[0],
                linewidth=1.4,
                alpha=1.0 if len(runs) == 1 else 0.7,
                marker="o" if len(run.token_ns) <= 64 else None,
                markersize=2.6,
            )
        if median is not None:
            axes.axhline(median, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"p50 {number(median)} ms")
        if tail is not None:
            axes.axhline(tail, color=MUTED, linewidth=1, linestyle=(0, (1, 2)), label=f"p95 {number(tail)} ms")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2, handlelength=1.8)
        axes.set_ylim(0, top * 1.12 or 1)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axes.set_xlabel("generated token")
        axes.set_ylabel("emulated time, ms" if emulated else "time, ms")

    what = "Emulated time" if emulated else "Time"
    count = sum(len(run.token_ns) for run in runs)
    text = f"{what} of {count} tokens in {len(runs)} runs; median {show(report.speed.token_time_p50)}, p95 "
    return draw("tokens", 230, f"{text}{show(report.speed.token_time_p95)}.", paint)
