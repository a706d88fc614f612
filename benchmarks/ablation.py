"""What each addition is worth: round to nearest, GPTQ, BoA, then one thing after the other up to `edge`.

    python -m benchmarks.ablation --calibration valid.txt --text test.txt --settings w3asym -o docs/benchmarks

Runs, resumes and evaluates as `benchmarks.accuracy` does, with which it shares results. Writes ablation.json,
ablation.md and ablation.svg/.png: KL, and the time and memory of each step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy import Benchmark, parse
from benchmarks.charts import pyplot, save
from benchmarks.contenders import OURS_PREFIX, own_contenders
from benchmarks.lines import Line, lines_of
from benchmarks.ours import STEPS
from benchmarks.report import OURS_COLOURS, seeds_of, stated
from benchmarks.results import Outcome, rows_of
from boa_edge.errors import BoaEdgeError
from boa_edge.files import write_json, write_text
from boa_edge.quiet import quiet_libraries, quiet_transformers

_HEAD = "| step | KL (nats/token) | of the step before | seconds | CPU seconds | peak MB |\n|---|---|---|---|---|---|"


def main() -> None:
    """The command line of `benchmarks.accuracy`."""
    arguments = parse(sys.argv[1:])
    if arguments.redraw or arguments.keep:
        sys.exit("error: --redraw and --keep are for benchmarks.accuracy alone.")
    quiet_libraries()
    quiet_transformers()
    try:
        outcomes = Benchmark(arguments, own_contenders(STEPS)).run(write)
    except BoaEdgeError as error:
        sys.exit(f"error: {error}")
    rows = sum(outcome.row is not None for outcome in outcomes)
    print(json.dumps({"rows": rows, "output": str(arguments.output)}, separators=(",", ":")))


def write(output: Path, outcomes: Sequence[Outcome]) -> None:
    """All files, anew."""
    rows = rows_of(outcomes)
    write_json(output / "ablation.json", rows)
    settings = list(dict.fromkeys(outcome.title for outcome in outcomes))
    parts = [
        "# What each addition is worth",
        f"{stated(outcomes, 'model')}, calibrated on {stated(outcomes, 'calibration')} (seeds "
        f"{', '.join(map(str, seeds_of(outcomes)))}), evaluated on {stated(outcomes, 'text')}; "
        "embedding, head and norms in float32. From BoA on every step has all that stands above it. Seconds are of "
        "quantization alone; CPU seconds add up all cores.",
        "![KL, time and memory by step](ablation.svg)",
    ]
    for setting in settings:
        lines = [_HEAD]
        before: Line | None = None
        for name, line in _by_step(setting, outcomes).items():
            figures = f"{line.mean('seconds'):.0f} | {line.mean('cpu_seconds'):.0f}"
            peak = max(row["peak_mb"] for row in line.rows)
            lines.append(f"| {name} | {line.mean('kl'):.4f} | {_beside(line, before)} | {figures} | {peak} |")
            before = line
        parts += [f"## {setting}", "\n".join(lines)]
    versions = ", ".join(dict.fromkeys(row["version"] for row in rows))
    write_text(output / "ablation.md", "\n\n".join(parts) + f"\n\n{versions}\n")
    draw(output, settings, outcomes)


def _beside(line: Line, before: Line | None) -> str:
    """A step's KL over that of the step before, or that it is one on paper only: its limits bind nothing."""
    ratio = None if before is None else line.over(before)
    if before is not None and (line.seeds, line.kls) == (before.seeds, before.kls):
        return "nothing changes at this size of text"
    return "" if ratio is None else f"{ratio:.3f}"


def _by_step(setting: str, outcomes: Sequence[Outcome]) -> dict[str, Line]:
    return {line.method.removeprefix(OURS_PREFIX): line for line in lines_of(setting, outcomes)}


def draw(output: Path, settings: list[str], outcomes: Sequence[Outcome]) -> None:
    """Three panels per setting, a bar per step: KL on a log axis, CPU seconds, peak memory."""
    plt = pyplot()
    from matplotlib.ticker import NullFormatter

    tables = {setting: _by_step(setting, outcomes) for setting in settings}
    tables = {setting: steps for setting, steps in tables.items() if steps}
    if not tables:
        return
    panels = (("kl", "KL, nats per token (log)"), ("cpu_seconds", "CPU seconds"), ("peak_mb", "peak MB"))
    counts = [len(steps) for steps in tables.values()]
    figure, axes = plt.subplots(
        len(tables),
        len(panels),
        figsize=(11, 0.36 * sum(counts) + 1.1 * len(counts)),
        squeeze=False,
        height_ratios=counts,
        layout="constrained",
    )
    for line, (setting, steps) in zip(axes, tables.items(), strict=True):
        for axis, (key, title) in zip(line, panels, strict=True):
            values = [step.mean(key) for step in steps.values()]
            axis.barh(range(len(values)), values, color=OURS_COLOURS[2], height=0.62, log=key == "kl")
            for place, value in enumerate(values):
                text = f"{value:.3g}" if key == "kl" else f"{value:.0f}"
                axis.annotate(text, (value, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
            axis.set_yticks(range(len(values)), list(steps) if axis is line[0] else [], fontsize=9)
            axis.invert_yaxis()
            axis.margins(x=0.22)
            if key == "kl":
                axis.xaxis.set_minor_formatter(NullFormatter())  # the numbers stand beside the bars
            axis.set_title(f"{setting}: {title}" if axis is line[0] else title, loc="left", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
    save(figure, output, "ablation")


if __name__ == "__main__":
    main()
