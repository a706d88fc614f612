"""What the benchmark of the runtimes writes: runtimes.json, runtimes.md and a chart."""

from __future__ import annotations

import datetime
import os
import platform
from dataclasses import asdict
from pathlib import Path

from benchmarks.charts import pyplot, save
from benchmarks.report import OURS_COLOURS, PEER_COLOURS
from benchmarks.runtimes.figures import Spread
from benchmarks.runtimes.rows import Protocol, Report, Row
from boa_edge.files import write_json, write_text
from devices.local import host_facts

_HEAD = (
    "| program | prefill tok/s | decode tok/s | load s | peak MB | file MB | KL (nats/token) | KL, first sequence |\n"
    "|---|---|---|---|---|---|---|---|"
)
_SAME = 1e-6  # below this KL a program computes the original, and would only stretch the chart's axis
_RATIOS = "| ours | beside | prefill, ours / other | decode, ours / other |\n|---|---|---|---|"


def write_report(output: Path, report: Report) -> None:
    """Write all files, anew."""
    document = {"protocol": asdict(report.protocol), "rows": [row.as_dict() for row in report.rows]}
    write_json(output / "runtimes.json", document | {"not_run": report.not_run, "notes": report.notes})
    write_text(output / "runtimes.md", markdown(report))
    draw(output, report.rows)


def markdown(report: Report) -> str:
    """The tables, with everything that did not run and why."""
    lines = [_HEAD]
    for row in report.rows:
        name = f"**{row.label}**" if row.ours else row.label
        speeds = f"{_spread(row.prefill, 0)} | {_spread(row.decode)}"
        memory = f"{row.peak_bytes / 1e6:.0f} | {row.size / 1e6:.0f}"
        lines.append(f"| {name} | {speeds} | {row.load_s:.2f} | {memory} | {_kl(row, report.protocol)} |")
    parts = ["# Speed beside other runtimes", _protocol(report.protocol), "\n".join(lines)]
    compared = [row for row in report.rows if row.prefill_ratio is not None and row.decode_ratio is not None]
    if compared:
        told = [_RATIOS]
        for row in compared:
            assert row.prefill_ratio is not None
            assert row.decode_ratio is not None
            ratios = f"{_spread(row.prefill_ratio, 2)} | {_spread(row.decode_ratio, 2)}"
            told.append(f"| {row.beside} | {row.label} | {ratios} |")
        parts += ["Above 1, ours is faster. Ratios of medians, in brackets the smallest and largest within a round."]
        parts += ["\n".join(told)]
    if report.rows:
        parts.append("![KL against decode speed; the area is the size](runtimes.svg)")
        left_out = [row.label for row in report.rows if row.kl_first is not None and row.kl_first <= _SAME]
        if left_out:
            parts.append(f"Not in the chart, because it computes the original: {', '.join(left_out)}.")
    notes = {row.label: [*([row.note] if row.note else []), *report.notes.get(row.label, [])] for row in report.rows}
    listed = [f"- **{label}**: {'; '.join(told)}" for label, told in notes.items() if told]
    if listed:
        parts += ["## Notes", "\n".join(listed)]
    if report.not_run:
        parts += ["## Not run", "\n".join(f"- **{label}**: {why}" for label, why in report.not_run.items())]
    return "\n\n".join(parts) + "\n"


def _spread(found: Spread, digits: int = 1) -> str:
    return f"{found.median:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def _kl(row: Row, protocol: Protocol) -> str:
    if row.kl is None or row.kl_first is None:
        return "not measured | not measured"
    whole = f"{row.kl:.4f}" if row.kl_rows == protocol.rows else "of the first only"
    return f"{whole} | {row.kl_first:.4f}"


def _protocol(protocol: Protocol) -> str:
    facts = host_facts()
    plural = "thread" if protocol.threads == 1 else "threads"
    low, high = protocol.loads
    text = (
        f"Model: {protocol.model}. {protocol.prompt} tokens of prompt (the same ids for all), {protocol.new_tokens}\n"
        f"new ones, greedy, batch 1, {protocol.threads} {plural}. Every run is a process of its own: one generation\n"
        f"that does not count, then {protocol.repeats} of which the median does. {protocol.rounds} rounds, each with\n"
        "one run of every program, in turns; the table has the median of the rounds, in brackets the smallest and the\n"
        "largest. Load time is from opening the file until it can run; peak MB is the process's largest resident\n"
        "size, and includes Python where the runtime was driven from there (notes); a native program runs ours."
    )
    if protocol.rows:
        text += (
            f"\nKL(original || program) is teacher-forced through the program itself, on {protocol.rows} sequences of\n"
            f"{protocol.length} tokens of {protocol.text}; the original is the source model in float32."
        )
    text += (
        f"\nThe load average of the machine at the starts of the runs was {low:.1f} to {high:.1f} (a run itself\n"
        f"adds up to {protocol.threads})."
    )
    features = ", ".join(facts["features"]) or "no known features"
    machine = f"{facts['cpu']} ({features}), {os.cpu_count()} cores, Python {platform.python_version()}"
    return f"{text}\n\n{datetime.date.today():%Y-%m-%d}, {protocol.version}; {machine}."


def draw(output: Path, rows: list[Row]) -> None:
    """KL on a log axis against decode speed, areas by size, and the line that nobody betters on both."""
    plt = pyplot()
    shown = [row for row in rows if row.kl_first is not None and row.kl_first > _SAME]
    if not shown:
        return
    figure, axis = plt.subplots(figsize=(10.5, 5.0), layout="constrained")
    front = pareto([(row.decode.median, row.kl_first or 0.0) for row in shown])
    axis.plot(*zip(*front, strict=True), color="#b0b0b0", lw=1, ls="--", zorder=1, label="bettered by none on both")
    for number, row in enumerate(shown, 1):
        colour = (OURS_COLOURS if row.ours else PEER_COLOURS)[1]
        place = (row.decode.median, row.kl_first or 0.0)
        axis.scatter(*place, s=row.size / 4e5, color=colour, alpha=0.65, zorder=2)
        axis.annotate(str(number), place, ha="center", va="center", fontsize=8, color="white", fontweight="bold")
        text = f"{number}  {row.label} ({row.size / 1e6:.0f} MB)"
        axis.plot([], [], "o", color=colour, label=text)
    axis.set_yscale("log")
    axis.margins(x=0.1, y=0.15)
    axis.set_xlabel("decode, tokens per second (more is better)")
    axis.set_ylabel("KL(original || program), nats per token,\nfirst sequence, log scale (less is better)")
    axis.grid(which="both", color="#e3e3e3", lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("Area: size of the file. Blue: boa-edge", loc="left", fontsize=10)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save(figure, output, "runtimes")


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (speed, loss), those that no other betters on one without being worse on the other; by falling speed."""
    front: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda each: (-each[0], each[1])):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front
