"""Conditions on changes: `decode_tok_s<-5%,kl>+10%` names what may not happen."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from boa_edge.errors import UsageError
from runtime_tests.comparison.figures import BY_NAME

_CONDITION = re.compile(r"\s*([A-Za-z0-9_]+)\s*([<>])\s*([+-]?)(\d+(?:\.\d+)?)\s*(%?)\s*")
_FLAG = "--fail-on"
_FORM = "Write NAME<-N% or NAME>+N%, such as decode_tok_s<-5%; without % in the figure's own unit"


@dataclass(frozen=True)
class Condition:
    """Fails where the change of a figure is beyond a limit.

    Attributes:
        name: of the figure.
        falls: it fails on changes below the limit; else on those above.
        limit: of the change: a share of the earlier value (`-5%` is -0.05), or in the figure's unit.
        relative: whether the limit is a share.
        text: as it was written.
    """

    name: str
    falls: bool
    limit: float
    relative: bool
    text: str

    def holds(self, change: float) -> bool:
        """Whether a change (a share where `relative`) is beyond the limit."""
        return change < self.limit if self.falls else change > self.limit


def parse(text: str) -> tuple[Condition, ...]:
    """The conditions in a comma-separated list; none in an empty text. UsageError names the one that cannot be read."""
    found = tuple(_parse_one(part) for part in text.split(",") if part.strip())
    if text and not found:
        raise UsageError(f"{text!r} has no condition in it, so that nothing could fail", where=_FLAG, fix=_FORM)
    return found


def _parse_one(part: str) -> Condition:
    match = _CONDITION.fullmatch(part)
    if match is None:
        raise UsageError(f"{part.strip()!r} is no condition on a change", where=_FLAG, fix=_FORM)
    name, sign, direction, digits, percent = match.groups()
    if name not in BY_NAME:
        close = difflib.get_close_matches(name, BY_NAME, n=1)
        hint = f"Did you mean {close[0]}? " if close else ""
        raise UsageError(f"unknown figure {name!r}", where=_FLAG, fix=f"{hint}Known: {', '.join(BY_NAME)}")
    value = float(digits) / (100 if percent else 1)
    limit = -value if direction == "-" else value
    falls = sign == "<"
    # `kl>-5%` would hold for figures that stayed as they were: never what a gate is meant to say.
    if (falls and limit > 0) or (not falls and limit < 0):
        fix = "A fall is written NAME<-N%, a rise NAME>+N%"
        raise UsageError(f"{part.strip()!r} would hold for a figure that has not changed", where=_FLAG, fix=fix)
    if falls == (BY_NAME[name].better == "less"):
        meant = f"{name}{'>+' if falls else '<-'}{digits}{percent}"
        problem = f"{part.strip()!r} would fail on improvements alone: {BY_NAME[name].better} is better"
        raise UsageError(problem, where=_FLAG, fix=f"Write {meant}")
    return Condition(name, falls, limit, bool(percent), part.strip())
