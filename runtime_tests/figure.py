"""A figure: a number that never travels without its unit and without how it was come by."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from devices.contract import Execution

Missing = Literal["unavailable", "denied"]

MOST = 2**63 - 1
"""The largest number that a report has room for: nanoseconds and bytes of 64 bits."""

EMULATED_TIME = "emulated time: the clock of an emulator, which says nothing about the speed of a phone"
EMULATED_MEMORY = "upper bound: includes the emulator's own memory"


class Frozen(BaseModel):
    """Base of everything in a report: immutable, finite, and nothing in it that the schema does not name."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Figure(Frozen):
    """One figure of a report.

    Attributes:
        value: the number; a probe that gave none says `unavailable` or `denied`, never 0.
        unit: e.g. `ms`, `tokens/s`, `bytes`, `nats/token`.
        execution: `measured` on the hardware it stands for, `emulated` under an emulator, or `estimated`.
        n: how many samples it summarises.
        note: what a reader has to know to read it right.
    """

    value: Annotated[int, Field(ge=-MOST, le=MOST)] | float | Missing
    unit: str
    execution: Execution
    n: Annotated[int, Field(ge=0, le=MOST)] | None = None
    note: str | None = None

    @property
    def number(self) -> float | None:
        """The value, or None where there is none."""
        return None if isinstance(self.value, str) else float(self.value)


def figure(
    value: float | None, unit: str, execution: Execution, *, n: int | None = None, note: str | None = None
) -> Figure:
    """A figure of `value`; `unavailable` where it is None or not finite."""
    if value is None or not math.isfinite(value):
        return Figure(value="unavailable", unit=unit, execution=execution, n=n, note=note)
    return Figure(value=value, unit=unit, execution=execution, n=n, note=note)


def time_note(execution: Execution) -> str | None:
    """What goes beside a time or a speed."""
    return EMULATED_TIME if execution == "emulated" else None


def memory_note(execution: Execution) -> str | None:
    """What goes beside an amount of memory."""
    return EMULATED_MEMORY if execution == "emulated" else None
