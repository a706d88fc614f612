"""Rows of an earlier run that a new one does not make anew: a benchmark of hours is put together from several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.contenders import Setting, gaps
from benchmarks.ours import SCHEMES
from benchmarks.peers.table import Format
from benchmarks.report import Outcome, Protocol
from boa_edge.errors import BoaEdgeError
from boa_edge.files import read_json

Write = Callable[[Path, list[Outcome], Protocol], None]
_SAME = 1e-4  # by how much, relatively, two machines may disagree on the original's perplexity


def beside(path: Path, write: Write) -> Write:
    """`write`, with the rows that stand in `path` now and are not among the outcomes.

    Raises:
        BoaEdgeError: the file is none of this benchmark's, or its rows are of another model or text.
    """
    rows = read_json(path, "the rows to keep") if path.exists() else []
    try:
        kept = [_outcome(row) for row in rows]
    except (TypeError, KeyError) as error:
        raise BoaEdgeError(f"is no list of rows of this benchmark ({error})", where=path, fix=_FIX) from None

    def write_all(output: Path, outcomes: list[Outcome], protocol: Protocol) -> None:
        made = {_key(outcome) for outcome in outcomes if outcome.row}
        for new in outcomes:
            for old in kept:
                if new.row and old.row:
                    _check(path, old.row, new.row)
        left = [outcome for outcome in kept if _key(outcome) not in made]
        there = {_key(outcome) for outcome in left}
        together = _in_order([*left, *(each for each in outcomes if _key(each) not in there)])
        write(output, together, _of_all(protocol, together) if left else protocol)

    return write_all


_FIX = "Leave --keep out to write the file anew"


def _outcome(row: dict[str, Any]) -> Outcome:
    scheme = row["activations"]
    title = row["setting"] if scheme is None else f"{row['setting']} {scheme}"
    return Outcome(title, row["method"], row["ours"], row["seed"], row, None, list(row.get("notes", ())))


def _key(outcome: Outcome) -> tuple[str, str, int]:
    return outcome.setting, outcome.method, outcome.seed


def _check(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Both were evaluated on one model and text, and calibrated on as much."""
    known, found = old["reference_perplexity"], new["reference_perplexity"]
    if abs(known - found) > _SAME * found:
        problem = f"holds rows in which the original's perplexity is {known:.4f}; here it is {found:.4f}"
        raise BoaEdgeError(f"{problem}: another model or text", where=path, fix=_FIX)
    if (known := old.get("calibration", new["calibration"])) != new["calibration"]:
        raise BoaEdgeError(f"holds rows calibrated on {known}, not on {new['calibration']}", where=path, fix=_FIX)


def _of_all(protocol: Protocol, outcomes: list[Outcome]) -> Protocol:
    """What is true of the rows of several runs."""
    seeds = sorted({outcome.seed for outcome in outcomes if outcome.row})
    return replace(protocol, seeds=seeds, not_run={**protocol.not_run, **_gaps(outcomes)})


def _gaps(outcomes: list[Outcome]) -> dict[str, str]:
    """The peers that no run has asked for, and where; what was asked for and failed stands in the tables."""
    missing: dict[str, list[str]] = {}
    for row in {outcome.setting: outcome.row for outcome in outcomes if outcome.row}.values():
        scheme = row["activations"]
        form = Format(row["bits"], row["group_size"], row["symmetric"])
        setting = Setting(row["setting"], row["setting"], form, (None,) if scheme is None else SCHEMES)
        there = {outcome.method for outcome in outcomes if outcome.setting == setting.titled(scheme)}
        for label in gaps(setting, there):
            missing.setdefault(label, []).append(setting.titled(scheme))
    return {f"{label} at {', '.join(titles)}": "no run of it there yet" for label, titles in missing.items()}


def _in_order(outcomes: list[Outcome]) -> list[Outcome]:
    """Setting by setting and method by method, in the order in which they come first; seeds ascending."""
    settings = list(dict.fromkeys(outcome.setting for outcome in outcomes))
    methods = list(dict.fromkeys(outcome.method for outcome in outcomes))
    return sorted(outcomes, key=lambda one: (settings.index(one.setting), methods.index(one.method), one.seed))
