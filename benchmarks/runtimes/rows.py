"""The rows of the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from benchmarks.runtimes.contenders import Contender
from benchmarks.runtimes.figures import Speed, Spread, ratio, spread


@dataclass(frozen=True)
class Row:
    """A contender's figures over the rounds.

    Attributes:
        prefill, decode: tokens per second.
        load_s, peak_bytes: medians.
        size: bytes of the program's files.
        kl: nats per token, over `kl_rows` sequences of the text; None where it was not measured.
        kl_first: the same over the first sequence alone, on which every contender was scored.
        beside: what of ours `prefill_ratio` and `decode_ratio` compare with: its speed over this one's.
    """

    label: str
    ours: bool
    prefill: Spread
    decode: Spread
    load_s: float
    peak_bytes: int
    size: int
    kl: float | None
    kl_rows: int
    kl_first: float | None
    beside: str | None
    prefill_ratio: Spread | None
    decode_ratio: Spread | None
    note: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class Protocol:
    """How the figures were made. `loads`: the smallest and largest load average of a minute at the start of a run."""

    model: str
    text: str
    prompt: int
    new_tokens: int
    threads: int
    rounds: int
    repeats: int
    rows: int
    length: int
    loads: tuple[float, float]
    version: str


@dataclass(frozen=True)
class Report:
    """Rows, how they were made, label -> reason of what did not run, and label -> what a driver said of itself."""

    rows: list[Row]
    protocol: Protocol
    not_run: dict[str, str]
    notes: dict[str, list[str]]


def rows_of(
    contenders: Sequence[Contender],
    speeds: Mapping[str, Sequence[Speed]],
    sizes: Mapping[str, int],
    kls: Mapping[str, Sequence[float] | None],
) -> list[Row]:
    """One row per contender, in their order.

    Args:
        speeds: label -> one per round, for every contender.
        kls: label -> the KL of each sequence; a contender that runs another's file has that one's.
    """
    found = []
    for contender in contenders:
        mine = speeds[contender.label]
        beside = speeds.get(contender.beside) if contender.beside is not None else None
        kl = kls.get(contender.label) or kls.get(contender.same_program or "")
        prefills, decodes = [one.prefill for one in mine], [one.decode for one in mine]
        found.append(
            Row(
                label=contender.label,
                ours=contender.ours,
                prefill=spread(prefills),
                decode=spread(decodes),
                load_s=spread([one.load_s for one in mine]).median,
                peak_bytes=int(spread([one.peak_bytes for one in mine]).median),
                size=sizes[contender.label],
                kl=fmean(kl) if kl else None,
                kl_rows=len(kl) if kl else 0,
                kl_first=kl[0] if kl else None,
                beside=contender.beside if beside else None,
                prefill_ratio=ratio([one.prefill for one in beside], prefills) if beside else None,
                decode_ratio=ratio([one.decode for one in beside], decodes) if beside else None,
                note=contender.note,
            )
        )
    return found
