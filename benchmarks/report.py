"""What the accuracy benchmark writes: its results, and from nothing but these accuracy.md and a chart."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.charts import pyplot, save
from benchmarks.contenders import not_run
from benchmarks.lines import Line, beside_peers, lines_of
from benchmarks.results import Outcome, in_order, rows_of, write_results
from boa_edge.files import write_text

OURS_COLOURS = ("#08306b", "#2171b5", "#4292c6", "#6baed6", "#9ecae1")
PEER_COLOURS = ("#7f2704", "#d94801", "#f16913", "#a63603", "#cc7a29", "#e6a04d", "#8c6239", "#c49a6c")
_TITLE = 66  # characters that fit above a panel
_COLUMNS = (
    "method",
    "KL (nats/token)",
    "by seed",
    "KL / best peer",
    "perplexity",
    "top-1",
    "seconds",
    "CPU seconds",
    "peak MB",
)


def write_report(output: Path, outcomes: Sequence[Outcome]) -> None:
    """Write all files, anew."""
    outcomes = in_order(outcomes)
    write_results(output, outcomes)
    write_text(output / "accuracy.md", markdown(outcomes))
    draw(output, outcomes)


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The tables, with everything that did not run and why."""
    parts = ["# Accuracy beside other quantizers", _protocol(outcomes), "![KL by setting and method](accuracy.svg)"]
    for title in dict.fromkeys(outcome.title for outcome in outcomes):
        parts += [f"## {title}: {_words(title)}", _table(title, outcomes)]
    parts += _notes(outcomes)
    parts += ["## Not run", "\n".join(f"- **{method}**: {reason}" for method, reason in not_run(outcomes).items())]
    return "\n\n".join(parts) + "\n"


def stated(outcomes: Sequence[Outcome], field: str) -> str:
    """What the outcomes say of the protocol."""
    return ", ".join(dict.fromkeys(outcome.facts[field] for outcome in outcomes))


def seeds_of(outcomes: Sequence[Outcome]) -> list[int]:
    """Those that have chosen calibration text for a figure."""
    rows = rows_of(outcomes)
    return sorted({row["seed"] for row in rows if row["calibrated"]} or {row["seed"] for row in rows})


def _protocol(outcomes: Sequence[Outcome]) -> str:
    rows = rows_of(outcomes)
    perplexity = f" Its perplexity there is {rows[0]['reference_perplexity']:.2f}." if rows else ""
    lines = [
        f"Model: {stated(outcomes, 'model')}. Every linear of every decoder block is quantized; embedding, head and",
        f"norms stay in float32. Calibration: {stated(outcomes, 'calibration')}, the same token ids for every method;",
        f"{_seeds(outcomes)}",
        "Methods that need no calibration give the same figures for every seed.",
        f"Evaluation: {stated(outcomes, 'text')}, one evaluator for all: KL(original || quantized), teacher-forced,",
        f"of the float weights that each method's integer codes stand for.{perplexity} Ratios are to the best other",
        "tool, each over the seeds that both methods have. Seconds are those of quantization alone,",
        "without imports and loading, mean over seeds; CPU seconds add up what all cores computed in them, which a",
        "shared machine changes least; peak MB is the process's largest resident size. Every method",
        "has its tool's defaults unless a note says otherwise; every weight was checked to be on the grid it claims.",
    ]
    text = "\n".join(lines)
    changed = {(each.facts["asked"], each.facts["setting"]) for each in outcomes}
    for asked, used in sorted(pair for pair in changed if pair[0] != pair[1]):
        group = "".join(re.findall(r"g(\d+)", asked))
        text += (
            f"\n\n**{asked} became {used}**: {group} does not divide every linear's inputs in this model. There\n"
            "llm-compressor, torchao and quanto refuse, GPTQModel and AutoRound make a row's last group smaller, and\n"
            "HQQ lets groups run over the ends of rows, so that figures would not compare."
        )
    return f"{text}\n\n{_made(rows)}"


def _seeds(outcomes: Sequence[Outcome]) -> str:
    """Which there are, and whether every method has them all."""
    seeds = seeds_of(outcomes)
    if not seeds:
        return "no seed has figures yet."
    words = f"seed {seeds[0]} chooses" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))} choose"
    lines = [line for title in {each.title for each in outcomes} for line in lines_of(title, outcomes)]
    if all(line.seeds == seeds for line in lines if line.calibrated):
        return f"{words} the windows."
    return f"{words} the windows. Not every method has them all: where figures name their seeds, means are over these."


def _made(rows: list[dict[str, Any]]) -> str:
    """When, from which commits and on which machines."""
    if not rows:
        return "Nothing was made."
    dates = sorted({row["date"] for row in rows})
    commits = list(dict.fromkeys(row["version"] for row in rows if row["ours"]))
    when = dates[0] if len(dates) == 1 else f"Between {dates[0]} and {dates[-1]}"
    which = f"; {', '.join(commits)}" if commits else ""
    several = " (accuracy.json has each row's)" if len(commits) > 1 or len(dates) > 1 else ""
    text = f"{when}{which}{several}. No GPU."
    machines = _letters(rows)
    if len(machines) < 2:
        return f"{text} {next(iter(machines))}."
    lines = [f"- {letter}: {machine}" for machine, letter in machines.items()]
    return "\n".join([f"{text} Times compare only on one machine:\n", *lines])


def _letters(rows: list[dict[str, Any]]) -> dict[str, str]:
    """A letter for each machine that the rows were made on, in the order in which they come first."""
    return {machine: chr(ord("A") + index) for index, machine in enumerate(dict.fromkeys(r["machine"] for r in rows))}


def _table(title: str, outcomes: Sequence[Outcome]) -> str:
    lines = _best_first(title, outcomes)
    seeds = seeds_of(outcomes)
    machines = _letters(rows_of(outcomes))
    columns = [*_COLUMNS, *(["on"] if len(machines) > 1 else [])]
    text = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for line in lines:
        name = f"**{line.method}**" if line.ours else line.method
        ratio = beside_peers(line, lines)
        cells = [
            name,
            f"{line.mean('kl'):.4f}",
            _by_seed(line, seeds),
            "" if ratio is None else f"{ratio:.2f}",
            f"{line.mean('perplexity'):.2f}",
            f"{line.mean('top1'):.1%}",
            f"{line.mean('seconds'):.0f}",
            f"{line.mean('cpu_seconds'):.0f}",
            str(max(row["peak_mb"] for row in line.rows)),
            ", ".join(dict.fromkeys(machines[row["machine"]] for row in line.rows)),
        ]
        text.append(f"| {' | '.join(cells[: len(columns)])} |")
    for method, reason in _reasons(title, outcomes).items():
        text.append(f"| {method} | {reason.replace('|', '/')} |" + " |" * (len(columns) - 2))
    return "\n".join(text)


def _by_seed(line: Line, seeds: list[int]) -> str:
    """Its figures, with their seeds where it does not have them all."""
    if not line.calibrated:
        return "no calibration"
    named = line.seeds != seeds
    return " / ".join((f"{row['seed']}: " if named else "") + f"{row['kl']:.4f}" for row in line.rows)


def _best_first(title: str, outcomes: Sequence[Outcome]) -> list[Line]:
    return sorted(lines_of(title, outcomes), key=lambda line: line.mean("kl"))


def _reasons(title: str, outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Why a table's methods have no figures, or not for every seed."""
    with_figures = {line.method for line in lines_of(title, outcomes)}
    seeds: dict[tuple[str, str], list[str]] = {}
    for one in outcomes:
        if one.title == title and not one.row:
            seeds.setdefault((one.method, one.facts["reason"]), []).append(str(one.seed))
    reasons: dict[str, list[str]] = {}
    for (method, reason), of in seeds.items():
        told = f"seed {', '.join(of)}: {reason}" if method in with_figures else reason
        reasons.setdefault(method, []).append(told)
    return {method: "; ".join(told) for method, told in reasons.items()}


def _notes(outcomes: Sequence[Outcome]) -> list[str]:
    notes: dict[str, list[str]] = {}
    recipes: dict[str, list[str]] = {}
    for row in rows_of(outcomes):
        own = notes.setdefault(row["method"], [])
        own += [note for note in ([] if row["ours"] else [row["version"]]) + row.get("notes", []) if note not in own]
        if row.get("recipe"):
            recipes.setdefault(row["method"], []).append(f"`{row['recipe']}`")
    for method, names in recipes.items():
        notes[method].insert(0, f"{', '.join(dict.fromkeys(names))}, with the embedding in floating point")
    lines = [f"- **{method}**: {'; '.join(told)}" for method, told in notes.items() if told]
    return ["## Notes", "\n".join(lines)] if lines else []


_RUNTIMES = {
    "per_block": "int8 activations per token and block (ONNX Runtime)",
    "per_token": "int8 activations per token (ExecuTorch)",
}


def _words(title: str) -> str:
    form, _, scheme = title.partition(" ")
    name = form.removesuffix("a8")
    symmetric = not name.endswith("asym")
    bits, _, group = name.removesuffix("asym").removeprefix("w").partition("g")
    scales = f"a scale per {group} inputs" if group else "a scale per output channel"
    words = f"{bits} bits, {'symmetric' if symmetric else 'asymmetric'}, {scales}"
    return f"{words}; {_RUNTIMES[scheme]}" if scheme else words


def draw(output: Path, outcomes: Sequence[Outcome]) -> None:
    """KL by setting and method on a log axis: a panel per setting, the best on top, a dot per seed."""
    plt = pyplot()
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rows = rows_of(outcomes)
    titles = dict.fromkeys(outcome.title for outcome in outcomes if outcome.row)
    if not titles:
        return
    panels = {title: _best_first(title, outcomes) for title in titles}
    methods = list(dict.fromkeys((row["method"], row["ours"]) for row in rows))
    own = [method for method, ours in methods if ours]
    others = [method for method, ours in methods if not ours]
    colours = {method: OURS_COLOURS[index % len(OURS_COLOURS)] for index, method in enumerate(own)}
    colours |= {method: PEER_COLOURS[index % len(PEER_COLOURS)] for index, method in enumerate(others)}
    counts = [len(lines) for lines in panels.values()]
    height = 0.27 * sum(counts) + 0.75 * len(counts) + 0.7
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8.5, height), sharex=True, squeeze=False, height_ratios=counts, layout="constrained"
    )
    for axis, (title, lines) in zip(axes[:, 0], panels.items(), strict=True):
        for place, line in enumerate(lines):
            colour, marker = colours[line.method], "o" if line.ours else "D"
            axis.plot([min(line.kls), max(line.kls)], [place, place], color=colour, lw=1.5, zorder=2)
            axis.plot(line.kls, [place] * len(line.kls), marker, color=colour, ms=3.5, alpha=0.6, lw=0, zorder=3)
            axis.plot(line.mean("kl"), place, marker, color=colour, ms=7, zorder=4)
            axis.annotate(
                f"{line.mean('kl'):.3g}",
                (max(line.kls), place),
                (8, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=OURS_COLOURS[0] if line.ours else PEER_COLOURS[0],
            )
        axis.set_yticks(range(len(lines)), [line.method for line in lines], fontsize=9)
        for label, line in zip(axis.get_yticklabels(), lines, strict=True):
            label.set_color(OURS_COLOURS[0] if line.ours else PEER_COLOURS[0])
            label.set_fontweight("bold" if line.ours else "normal")
        axis.set_ylim(len(lines) - 0.4, -0.6)
        axis.set_title(textwrap.fill(f"{title}: {_words(title)}", _TITLE), loc="left", fontsize=10)
        axis.set_xscale("log")
        axis.grid(axis="x", which="both", color="#e3e3e3", lw=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    bottom = axes[-1, 0]
    bottom.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    bottom.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bottom.xaxis.set_minor_formatter(NullFormatter())
    kls = [kl for lines in panels.values() for line in lines for kl in line.kls if kl > 0]
    if kls:
        bottom.set_xlim(min(kls) / 1.25, max(kls) * 1.7)  # room for the last figure
    bottom.set_xlabel("KL(original || quantized), nats per token, log scale (less is better)")
    handles = [
        plt.Line2D([], [], marker="o", lw=0, color=OURS_COLOURS[1], label="boa-edge"),
        plt.Line2D([], [], marker="D", lw=0, color=PEER_COLOURS[1], label="other tools (small marks: each seed)"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    save(figure, output, "accuracy")
