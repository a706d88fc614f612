"""Which of the processes that `torchrun` has started this one is; nothing is imported to know it."""

from __future__ import annotations

import os

from boa_edge.errors import UsageError

LAUNCH = "Start several processes by `torchrun`; for a single one, unset RANK and WORLD_SIZE"


def launched_rank() -> int | None:
    """This process's rank; None where it was started alone.

    Raises:
        UsageError: a variable is no whole number, or there is no such rank.
    """
    if "RANK" not in os.environ or (size := whole_number("WORLD_SIZE", 1)) < 2:
        return None
    rank = whole_number("RANK", 0)
    if not 0 <= rank < size:
        raise UsageError(f"{rank}, where WORLD_SIZE is {size}", where="the variable RANK", fix=LAUNCH)
    return rank


def whole_number(variable: str, default: int) -> int:
    """A variable that `torchrun` sets. UsageError where it is no whole number."""
    value = os.environ.get(variable, str(default))
    try:
        return int(value)
    except ValueError:
        raise UsageError(f"{value!r} is no whole number", where=f"the variable {variable}", fix=LAUNCH) from None


def is_silent() -> bool:
    """Whether another process speaks for this one."""
    return launched_rank() not in (None, 0)
