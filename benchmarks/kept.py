"""Results of an earlier run that a new one does not make anew: a benchmark of hours is put together from several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import FIGURES, Outcome, read_results
from boa_edge.errors import BoaEdgeError

Write = Callable[[Path, list[Outcome]], None]
_SAME = 1e-4  # by how much, relatively, two machines may disagree on the original's perplexity
_FIX = "Leave --keep out to write the files anew"


def beside(output: Path, protocol: Mapping[str, str], write: Write) -> Write:
    """`write`, with what a directory holds now and the outcomes do not replace. Figures yield to figures alone.

    Args:
        protocol: model, text and calibration of this run.

    Raises:
        BoaEdgeError: the files are none of this benchmark's, lack a field, or are of another protocol.
    """
    path = output / FIGURES
    kept = read_results(output, protocol, _FIX)
    for old in kept:
        for field in ("text", "calibration"):  # a model goes by several names; its perplexity tells
            if old.facts[field] != protocol[field]:
                problem = f"holds rows whose {field} is {old.facts[field]}; here it is {protocol[field]}"
                raise BoaEdgeError(problem, where=path, fix=_FIX)

    def write_all(output: Path, outcomes: list[Outcome]) -> None:
        for new in outcomes:
            for old in kept:
                if new.row and old.row:
                    _check(path, old.row, new.row)
        made = {_key(outcome): outcome for outcome in outcomes}
        left = [old for old in kept if _key(old) not in made or (old.row and not made[_key(old)].row)]
        there = {_key(outcome) for outcome in left}
        write(output, [*left, *(each for each in outcomes if _key(each) not in there)])

    return write_all


def _key(outcome: Outcome) -> tuple[str, str, int]:
    return outcome.title, outcome.method, outcome.seed


def _check(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Both were evaluated against the same original on the same text, whatever their names."""
    known, found = old["reference_perplexity"], new["reference_perplexity"]
    if abs(known - found) > _SAME * found:
        problem = f"holds rows in which the original's perplexity is {known:.4f}; here it is {found:.4f}"
        raise BoaEdgeError(f"{problem}: another model or text", where=path, fix=_FIX)
