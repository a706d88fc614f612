"""What the accuracy benchmark writes: accuracy.json, accuracy.md and a chart."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.charts import pyplot, save
from boa_edge.files import write_json, write_text

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


@dataclass(frozen=True)
class Outcome:
    """One method at one setting and seed: a row with figures, or the reason why there is none."""

    setting: str
    method: str
    ours: bool
    seed: int
    row: dict[str, Any] | None
    reason: str | None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Protocol:
    """How the figures were made.

    Attributes:
        changed_groups: settings whose group size was halved, by the name that was asked for.
        not_run: methods that cannot run at all, with the reason.
    """

    model: str
    calibration: str
    seeds: list[int]
    text: str
    version: str
    changed_groups: dict[str, str]
    not_run: dict[str, str]


@dataclass(frozen=True)
class _Line:
    """A method's rows at one setting, over the seeds."""

    method: str
    ours: bool
    rows: list[dict[str, Any]]

    def mean(self, key: str) -> float:
        return fmean(row[key] for row in self.rows)

    @property
    def kls(self) -> list[float]:
        return [row["kl"] for row in self.rows]


def write_report(output: Path, outcomes: list[Outcome], protocol: Protocol) -> None:
    """Write all files, anew."""
    write_json(output / "accuracy.json", [outcome.row for outcome in outcomes if outcome.row])
    write_text(output / "accuracy.md", markdown(outcomes, protocol))
    draw(output, outcomes)


def markdown(outcomes: list[Outcome], protocol: Protocol) -> str:
    """The tables, with everything that did not run and why."""
    settings = list(dict.fromkeys(outcome.setting for outcome in outcomes))
    parts = [
        "# Accuracy beside other quantizers",
        _protocol(outcomes, protocol),
        "![KL by setting and method](accuracy.svg)",
    ]
    for setting in settings:
        parts += [f"## {setting}: {_words(setting)}", _table(setting, outcomes)]
    parts += _notes(outcomes)
    if protocol.not_run:
        lines = [f"- **{method}**: {reason}" for method, reason in protocol.not_run.items()]
        parts += ["## Not run", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _protocol(outcomes: list[Outcome], protocol: Protocol) -> str:
    references = [outcome.row["reference_perplexity"] for outcome in outcomes if outcome.row]
    perplexity = f" Its perplexity there is {references[0]:.2f}." if references else ""
    seeds = ", ".join(map(str, protocol.seeds))
    lines = [
        f"Model: {protocol.model}. Every linear of every decoder block is quantized; embedding, head and norms stay in",
        f"float32. Calibration: {protocol.calibration}, the same token ids for every method; seeds {seeds} choose the",
        "windows. Methods that need no calibration give the same figures for every seed.",
        f"Evaluation: {protocol.text}, one evaluator for all: KL(original || quantized), teacher-forced, of the float",
        f"weights that each method's integer codes stand for.{perplexity} Seconds are those of quantization alone,",
        "without imports and loading, mean over seeds; CPU seconds add up what all cores computed in them, which a",
        "shared machine changes least; peak MB is the process's largest resident size. Every method",
        "has its tool's defaults unless a note says otherwise; every weight was checked to be on the grid it claims.",
    ]
    text = "\n".join(lines)
    for asked, used in protocol.changed_groups.items():
        group = asked.partition("g")[2].removesuffix("asym")
        text += (
            f"\n\n**{asked} became {used}**: {group} does not divide every linear's inputs in this model. There\n"
            "llm-compressor, torchao and quanto refuse, GPTQModel and AutoRound make a row's last group smaller, and\n"
            "HQQ lets groups run over the ends of rows, so that figures would not compare."
        )
    return f"{text}\n\n{_made([outcome.row for outcome in outcomes if outcome.row])}"


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


def _table(setting: str, outcomes: list[Outcome]) -> str:
    lines = _lines(setting, outcomes)
    peers = [line.mean("kl") for line in lines if not line.ours]
    best = min(peers) if peers else None
    machines = _letters([outcome.row for outcome in outcomes if outcome.row])
    columns = [*_COLUMNS, *(["on"] if len(machines) > 1 else [])]
    text = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for line in lines:
        first = line.rows[0]
        name = f"**{line.method}**" if line.ours else line.method
        seeds = " / ".join(f"{kl:.4f}" for kl in line.kls) if first["calibrated"] else "no calibration"
        ratio = f"{line.mean('kl') / best:.2f}" if best else ""
        figures = f"{line.mean('kl'):.4f} | {seeds} | {ratio} | {line.mean('perplexity'):.2f} | {line.mean('top1'):.1%}"
        peak = max(row["peak_mb"] for row in line.rows)
        where = ", ".join(dict.fromkeys(machines[row["machine"]] for row in line.rows))
        cells = [name, figures, f"{line.mean('seconds'):.0f}", f"{line.mean('cpu_seconds'):.0f}", str(peak), where]
        text.append(f"| {' | '.join(cells[: None if len(machines) > 1 else -1])} |")
    for method, reason in _reasons(setting, outcomes).items():
        text.append(f"| {method} | {reason.replace('|', '/')} |" + " |" * (len(columns) - 2))
    return "\n".join(text)


def _lines(setting: str, outcomes: list[Outcome]) -> list[_Line]:
    """A setting's methods with figures, the best first."""
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.setting == setting and outcome.row:
            found.setdefault(outcome.method, []).append(outcome)
    lines = [_Line(method, group[0].ours, [one.row for one in group if one.row]) for method, group in found.items()]
    return sorted(lines, key=lambda line: line.mean("kl"))


def _reasons(setting: str, outcomes: list[Outcome]) -> dict[str, str]:
    """Why a setting's methods have no figures, or not for every seed."""
    reasons: dict[str, str] = {}
    for outcome in outcomes:
        if outcome.setting == setting and outcome.reason:
            reasons.setdefault(outcome.method, outcome.reason)
    return reasons


def _notes(outcomes: list[Outcome]) -> list[str]:
    notes: dict[str, list[str]] = {}
    for outcome in outcomes:
        version = outcome.row["version"] if outcome.row and not outcome.ours else None
        for note in [*([version] if version else []), *outcome.notes]:
            if note not in notes.setdefault(outcome.method, []):
                notes[outcome.method].append(note)
    lines = [f"- **{method}**: {'; '.join(told)}" for method, told in notes.items() if told]
    return ["## Notes", "\n".join(lines)] if lines else []


_RUNTIMES = {
    "per_block": "int8 activations per token and block (ONNX Runtime)",
    "per_token": "int8 activations per token (ExecuTorch)",
}


def _words(setting: str) -> str:
    form, _, scheme = setting.partition(" ")
    name = form.removesuffix("a8")
    symmetric = not name.endswith("asym")
    bits, _, group = name.removesuffix("asym").removeprefix("w").partition("g")
    scales = f"a scale per {group} inputs" if group else "a scale per output channel"
    words = f"{bits} bits, {'symmetric' if symmetric else 'asymmetric'}, {scales}"
    return f"{words}; {_RUNTIMES[scheme]}" if scheme else words


def draw(output: Path, outcomes: list[Outcome]) -> None:
    """KL by setting and method on a log axis: a panel per setting, the best on top, a dot per seed."""
    plt = pyplot()
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    settings = list(dict.fromkeys(outcome.setting for outcome in outcomes if outcome.row))
    if not settings:
        return
    panels = {setting: _lines(setting, outcomes) for setting in settings}
    methods = list(dict.fromkeys((outcome.method, outcome.ours) for outcome in outcomes))
    own = [method for method, ours in methods if ours]
    others = [method for method, ours in methods if not ours]
    colours = {method: OURS_COLOURS[index % len(OURS_COLOURS)] for index, method in enumerate(own)}
    colours |= {method: PEER_COLOURS[index % len(PEER_COLOURS)] for index, method in enumerate(others)}
    counts = [len(lines) for lines in panels.values()]
    height = 0.27 * sum(counts) + 0.75 * len(counts) + 0.7
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8.5, height), sharex=True, squeeze=False, height_ratios=counts, layout="constrained"
    )
    for axis, (setting, lines) in zip(axes[:, 0], panels.items(), strict=True):
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
        axis.set_title(textwrap.fill(f"{setting}: {_words(setting)}", _TITLE), loc="left", fontsize=10)
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
