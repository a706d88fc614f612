"""Outcomes as they are kept: figures in accuracy.json, and in accuracy-failed.json why there are none.

Both are lists of flat objects; what is written about an outcome can be read from its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boa_edge.errors import BoaEdgeError
from boa_edge.files import read_json, write_json

FIGURES, FAILED = "accuracy.json", "accuracy-failed.json"
PROTOCOL = ("model", "text", "calibration")
_EACH = ("method", "setting", "bits", "group_size", "symmetric", "activations", "seed", *PROTOCOL)
_MEASURED = (
    *("ours", "calibrated", "kl", "perplexity", "reference_perplexity", "top1"),
    *("seconds", "cpu_seconds", "peak_mb", "version", "date", "machine"),
)


@dataclass(frozen=True)
class Outcome:
    """One method at one setting and seed.

    Attributes:
        facts: what is kept of it: figures, or a `reason` why there are none.
    """

    facts: dict[str, Any]

    @property
    def row(self) -> dict[str, Any] | None:
        """The facts, where there are figures among them."""
        return None if "reason" in self.facts else self.facts

    @property
    def title(self) -> str:
        """Of the table that it stands in."""
        return titled(self.facts["setting"], self.facts["activations"])

    @property
    def method(self) -> str:
        return str(self.facts["method"])

    @property
    def seed(self) -> int:
        return int(self.facts["seed"])


def titled(setting: str, scheme: str | None) -> str:
    """The name of a table."""
    return setting if scheme is None else f"{setting} {scheme}"


def rows_of(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Those with figures."""
    return [outcome.row for outcome in outcomes if outcome.row]


def in_order(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """As they are kept, so that reading gives what was written: figures first, then setting by setting and method by
    method, in the order in which they come first; seeds ascending.
    """
    figures_first = sorted(outcomes, key=lambda one: one.row is None)
    titles = list(dict.fromkeys(one.title for one in figures_first))
    methods = list(dict.fromkeys((one.title, one.method) for one in figures_first))

    def place(one: Outcome) -> tuple[bool, int, int, int]:
        return one.row is None, titles.index(one.title), methods.index((one.title, one.method)), one.seed

    return sorted(outcomes, key=place)


def write_results(output: Path, outcomes: Sequence[Outcome]) -> None:
    """Both files, anew."""
    write_json(output / FIGURES, rows_of(outcomes))
    write_json(output / FAILED, [outcome.facts for outcome in outcomes if not outcome.row])


def read_results(output: Path, known: Mapping[str, str], fix: str) -> list[Outcome]:
    """What a directory holds, empty where it holds nothing.

    Args:
        known: fields of PROTOCOL for those that lack them.
        fix: what can be done about a file that is refused.

    Raises:
        BoaEdgeError: a file is no such list, or lacks a field: which one, and of what.
    """
    found: list[Outcome] = []
    for name, own in ((FIGURES, _MEASURED), (FAILED, ("reason",))):
        path = output / name
        listed = read_json(path, "the benchmark's results") if path.exists() else []
        if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
            raise BoaEdgeError("is no list of this benchmark's results", where=path, fix=fix)
        for each in listed:
            facts = {**known, **each}
            if missing := [field for field in (*_EACH, *own) if field not in facts]:
                whose = " ".join(str(facts[field]) for field in ("setting", "method", "seed") if field in facts)
                problem = f"lacks {', '.join(f'`{field}`' for field in missing)} in the row {whose}"
                raise BoaEdgeError(problem, where=path, fix=fix)
            found.append(Outcome({**facts, "asked": facts.get("asked", facts["setting"])}))
    return found
