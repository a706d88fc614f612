"""A device that starts hot throttles: wait until it has cooled down before anything is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from boa_edge.errors import BoaEdgeError
from boa_edge.progress import say

_POLL_S = 10.0


def temperature_of(state: Mapping[str, Any]) -> float | None:
    """Degrees Celsius: of the battery, else of the hottest zone; None where the device says neither."""
    battery = state.get("battery")
    found = battery.get("temperature_c") if isinstance(battery, Mapping) else None
    if isinstance(found, int | float):
        return float(found)
    zones = state.get("temperatures_c")
    values = [value for value in zones.values() if isinstance(value, int | float)] if isinstance(zones, Mapping) else []
    return max(values, default=None)


def wait_until_cool(
    read: Callable[[], dict[str, Any]],
    below_c: float | None,
    limit_s: float,
    device: str,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Read the state until its temperature is at most `below_c`; the last state read.

    Args:
        read: asks the device.
        below_c: None, or a device that does not say how warm it is, is not waited for.
        limit_s: how long to wait.

    Raises:
        BoaEdgeError: it is still hotter after that.
    """
    state = read()
    start = clock()
    told = False
    while below_c is not None and (now := temperature_of(state)) is not None and now > below_c:
        waited = clock() - start
        if waited >= limit_s:
            raise BoaEdgeError(
                f"still at {now:.1f} °C after {waited:.0f} s; runs start at {below_c:g} °C or less",
                where=f"device {device}",
                fix="Let it cool down, take it off the charger, or raise start_below_c in its profile",
            )
        if not told:
            say(f"{device}: {now:.1f} °C; waiting until it is at {below_c:g} °C or less")
            told = True
        sleep(min(_POLL_S, max(limit_s - waited, 0.0)))
        state = read()
    return state
