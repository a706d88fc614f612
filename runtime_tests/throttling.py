"""Whether a device slowed down while it was measured: by its own account, and by its tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from devices.contract import Execution, RunResult
from runtime_tests.events import Generation

# Below this many tokens they say little.
_FEWEST = 30
_SLOWER = 1.15
_HOT_STATUS = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")


# Between counted runs of one workload; less is how devices are.
_UNEVEN = 1.15


def uneven_note(generation: Generation, execution: Execution) -> list[str]:
    """A note where the counted runs differ more than a device at rest does; none for emulated ones."""
    means = [sum(run.token_ns) / len(run.token_ns) / 1e6 for run in generation.counted if run.token_ns]
    if execution != "measured" or len(means) < 2 or not 0 < min(means) * _UNEVEN < max(means):
        return []
    return [
        f"The counted runs differ: a token took {min(means):.4g} ms in the mean of one, {max(means):.4g} ms in that of "
        "another. Something else used the device, or its clocks changed. Close programs, and measure with more "
        "--repeats or on fixed --cores."
    ]


def throttling_notes(results: Sequence[RunResult], generation: Generation, execution: Execution) -> list[str]:
    """Notes for the report; none where nothing is amiss or nothing is known."""
    found = []
    slowdown = slowdown_of(generation)
    if execution == "measured" and slowdown is not None and slowdown > _SLOWER:
        found.append(
            f"The device slowed down while it generated: a token of the last runs took {slowdown:.2f} times as long as "
            "the same token of the first (medians). The speeds mix both; let it cool down and measure again."
        )
    states = [state for result in results for state in (result.state.get("before"), result.state.get("after")) if state]
    status = max((_status(state) for state in states), default=0)
    if status > 0:
        word = _HOT_STATUS[min(status, len(_HOT_STATUS) - 1)]
        found.append(f"The device reported thermal throttling while it was measured: status {status} ({word}).")
    if flags := _board_flags(results):
        found.append(f"The board reported throttling or low voltage while it was measured: {flags:#x}.")
    return found


def _board_flags(results: Sequence[RunResult]) -> int:
    """What a Raspberry Pi says of now (bits 0 to 3), and of what it keeps since it booted (16 to 19) the news."""
    found = 0
    for result in results:
        before, after = (_flags(result.state.get(when) or {}) for when in ("before", "after"))
        found |= ((before or 0) | (after or 0)) & 0xF
        if before is not None and after is not None:
            found |= after & ~before & 0xF0000
    return found


def _flags(state: Mapping[str, Any]) -> int | None:
    text = state.get("throttled")
    return int(text, 16) if isinstance(text, str) and re.fullmatch("0x[0-9a-fA-F]{1,8}", text) else None


def slowdown_of(generation: Generation) -> float | None:
    """How much longer a token takes in the last third of the counted runs than the same one in the first third.

    The median over the tokens; late ones cost more than early ones in every run, so only the same ones compare. None
    for a single run, or too few tokens.
    """
    runs = [run.token_ns for run in generation.counted if run.token_ns]
    if len(runs) < 2 or sum(map(len, runs)) < _FEWEST:
        return None
    some = max(1, len(runs) // 3)
    first, last = (map(median, zip(*part, strict=False)) for part in (runs[:some], runs[-some:]))
    ratios = [late / early for early, late in zip(first, last, strict=False) if early > 0]
    return median(ratios) if ratios else None


def _status(state: Mapping[str, Any]) -> int:
    value = state.get("thermal_status")
    return value if isinstance(value, int) else 0
