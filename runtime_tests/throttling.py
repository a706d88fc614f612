"""Whether a device slowed down while it was measured: by its own account, and by its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from devices.contract import Execution, RunResult
from runtime_tests.events import Generation

# Below this many tokens a third of them says little.
_FEWEST = 30
# Tokens late in a sequence cost a little more anyway.
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
            f"The device slowed down while it generated: the last third of the tokens took {slowdown:.2f} times as "
            "long as the first third (medians). The speeds mix both; let it cool down and measure again."
        )
    states = [state for result in results for state in (result.state.get("before"), result.state.get("after")) if state]
    status = max((_status(state) for state in states), default=0)
    if status > 0:
        word = _HOT_STATUS[min(status, len(_HOT_STATUS) - 1)]
        found.append(f"The device reported thermal throttling while it was measured: status {status} ({word}).")
    flags = {state["throttled"] for state in states if str(state.get("throttled", "")).startswith("0x")} - {"0x0"}
    if flags:
        found.append(f"The board reported throttling or low voltage: {', '.join(sorted(flags))}.")
    return found


def slowdown_of(generation: Generation) -> float | None:
    """Median time of the last third of all counted tokens over that of the first third; None for too few tokens."""
    times = [ns for run in generation.counted for ns in run.token_ns]
    third = len(times) // 3
    if len(times) < _FEWEST:
        return None
    first = median(times[:third])
    return median(times[-third:]) / first if first > 0 else None


def _status(state: Mapping[str, Any]) -> int:
    value = state.get("thermal_status")
    return value if isinstance(value, int) else 0
