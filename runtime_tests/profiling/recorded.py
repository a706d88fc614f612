"""What a runtime's record holds, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime_tests.model import OperatorTime


@dataclass(frozen=True)
class Recorded:
    """Times in nanoseconds.

    Attributes:
        total_ns: of all runs of the model.
        calls: operator and whether a delegate ran it -> time of each call.
    """

    total_ns: float
    calls: Mapping[tuple[str, bool], Sequence[float]]

    def operators(self) -> tuple[OperatorTime, ...]:
        """All calls of an operator together, the slowest first."""
        found = [
            OperatorTime(name=name, delegated=delegated, calls=len(times), ns=round(sum(times)))
            for (name, delegated), times in self.calls.items()
        ]
        return tuple(sorted(found, key=lambda entry: (-entry.ns, entry.name)))
