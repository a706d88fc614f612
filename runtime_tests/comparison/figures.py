"""The figures of a report that can be compared: by which name, which way is better, and from which samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from devices.contract import Execution
from runtime_tests.figure import Figure
from runtime_tests.hardware import difference
from runtime_tests.labels import label
from runtime_tests.model import Report
from runtime_tests.statistics import nearest_rank, rate

Better = Literal["less", "more"]
Kind = Literal["artefact", "accuracy", "speed", "instructions", "memory"]

_MILLISECOND = 1e6
_SAME_TEXT = 1e-3  # of a perplexity


@dataclass(frozen=True)
class Comparable:
    """One line of the table.

    Attributes:
        name: as conditions write it.
        label: in words.
        better: which way is better.
        kind: what both reports must have in common for it to be compared.
        figure: the figure, or None where a report has none.
        scale: the figure's value times this is in `unit`.
        samples: a value for each run or load, in `unit`; empty where it is a single value. Tokens of one run are fast
            or slow together, so that they are one sample.
        timed: its name in `labels`, where an emulator changes what it is called.
        places: what the figure is the mean of, one value a position of the text; empty where it is none.
    """

    name: str
    label: str
    better: Better
    kind: Kind
    unit: str
    figure: Callable[[Report], Figure | None]
    scale: float = 1.0
    samples: Callable[[Report], Sequence[float]] = lambda _: ()
    timed: str | None = None
    places: Callable[[Report], Sequence[float]] = lambda _: ()

    def title(self, execution: Execution) -> str:
        """The label, by how the figure was come by."""
        return self.label if self.timed is None or execution == "measured" else label(self.timed, execution)

    def value(self, report: Report) -> float | None:
        """The report's value in `unit`: where it has samples, their median, of which alone the noise is known."""
        entry = self.figure(report)
        number = None if entry is None else entry.number
        if number is None:
            return None
        samples = self.samples(report)
        return nearest_rank(samples, 50) if samples else number * self.scale


def _token_ms(percent: float) -> Callable[[Report], list[float]]:
    """Each run's own percentile."""

    def of(report: Report) -> list[float]:
        runs = [[ns for ns in run.token_ns if ns > 0] for run in report.samples.runs if not run.warmup]
        return [nearest_rank(run, percent) / _MILLISECOND for run in runs if run]

    return of


def _first_ms(report: Report) -> list[float]:
    return [run.prefill_ns / _MILLISECOND for run in report.samples.runs if not run.warmup and run.prefill_ns > 0]


def _load_ms(report: Report) -> list[float]:
    return [ns / _MILLISECOND for ns in report.samples.load_ns if ns > 0]


def _decode_rates(report: Report) -> list[float]:
    runs = [run for run in report.samples.runs if not run.warmup]
    return [found for run in runs if (found := rate(len(run.token_ns), sum(run.token_ns))) is not None]


def _prefill_rates(report: Report) -> list[float]:
    prompt = report.settings.prompt_tokens
    runs = [run for run in report.samples.runs if not run.warmup]
    return [found for run in runs if (found := rate(prompt, run.prefill_ns)) is not None]


# A figure more is one line here.
COMPARABLES: tuple[Comparable, ...] = (
    Comparable("size_mb", "Size on the device", "less", "artefact", "MB", lambda r: r.deployed.runtime_size, 1e-6),
    Comparable("ppl", "Perplexity", "less", "accuracy", "", lambda r: r.fidelity.deployed.perplexity),
    Comparable(
        "kl",
        "KL from the original",
        "less",
        "accuracy",
        "nats/token",
        lambda r: r.fidelity.deployed.kl_from_original,
        places=lambda r: r.fidelity.kl_by_position or (),
    ),
    Comparable(
        "top1",
        "Top token as the original",
        "more",
        "accuracy",
        "%",
        lambda r: r.fidelity.deployed.top1_with_original,
        100,
    ),
    Comparable("load_ms", "Load time", "less", "speed", "ms", lambda r: r.speed.load_time, 1, _load_ms, "load_time"),
    Comparable(
        "ttft_ms",
        "Time to first token",
        "less",
        "speed",
        "ms",
        lambda r: r.speed.time_to_first_token,
        1,
        _first_ms,
        "time_to_first_token",
    ),
    Comparable(
        "prefill_tok_s",
        "Prefill speed",
        "more",
        "speed",
        "tokens/s",
        lambda r: r.speed.prefill_speed,
        1,
        _prefill_rates,
        "prefill_speed",
    ),
    Comparable(
        "decode_tok_s",
        "Decode speed",
        "more",
        "speed",
        "tokens/s",
        lambda r: r.speed.decode_speed,
        1,
        _decode_rates,
        "decode_speed",
    ),
    Comparable(
        "token_p50_ms",
        "Token time, p50",
        "less",
        "speed",
        "ms",
        lambda r: r.speed.token_time_p50,
        1,
        _token_ms(50),
        "token_time_p50",
    ),
    Comparable(
        "token_p95_ms",
        "Token time, p95",
        "less",
        "speed",
        "ms",
        lambda r: r.speed.token_time_p95,
        1,
        _token_ms(95),
        "token_time_p95",
    ),
    Comparable(
        "instructions",
        "Instructions per token",
        "less",
        "instructions",
        "",
        lambda r: r.cost.instructions_per_token if r.cost else None,
    ),
    Comparable(
        "energy_j",
        "Energy per token",
        "less",
        "speed",
        "J",
        lambda r: r.energy.per_token if r.energy else None,
    ),
    Comparable(
        "peak_rss_mb", "Peak memory", "less", "memory", "MB", lambda r: r.memory.peak_rss, 1e-6, timed="peak_rss"
    ),
)
BY_NAME = {entry.name: entry for entry in COMPARABLES}


def obstacle(kind: Kind, before: Report, after: Report) -> str | None:
    """Why figures of a kind say nothing side by side; None where they do."""
    if kind == "artefact":
        return None
    if kind == "accuracy":
        if before.fidelity.positions != after.fidelity.positions:
            return f"{before.fidelity.positions} positions of text against {after.fidelity.positions}"
        if before.generation.prompt.tokens != after.generation.prompt.tokens or _another_text(before, after):
            return "other reference texts"
        return None
    if before.device.execution != after.device.execution:
        return f"{before.device.execution} against {after.device.execution}"
    if before.device.name != after.device.name:
        return f"device {before.device.name} against {after.device.name}"
    if before.settings.workload != after.settings.workload:
        return f"workload {before.settings.workload} against {after.settings.workload}"
    if before.settings.threads != after.settings.threads:
        return f"{before.settings.threads} threads against {after.settings.threads}"
    if before.settings.cores != after.settings.cores:
        return f"cores {_cores(before)} against {_cores(after)}"
    if before.settings.warmup != after.settings.warmup:
        return f"{before.settings.warmup} warm-up runs against {after.settings.warmup}"
    if kind == "instructions" and before.counted != after.counted:
        return f"counted in {before.counted} against {after.counted}"
    return difference(before.device.fingerprint, after.device.fingerprint)


def _cores(report: Report) -> str:
    return ",".join(map(str, report.settings.cores)) or "any"


def _another_text(before: Report, after: Report) -> bool:
    """The original model is in both, so on one text it has one perplexity, but for what PyTorch rounds elsewhere."""
    first, second = (report.fidelity.original.perplexity.number for report in (before, after))
    return first is not None and second is not None and abs(first - second) > _SAME_TEXT * first
