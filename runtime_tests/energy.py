"""Energy by the battery's own gauge, in a run of its own; or why it was not measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from devices.contract import Execution, GaugeSample
from runtime_tests.events import Generation
from runtime_tests.figure import figure
from runtime_tests.model import Energy

_FEWEST = 10  # samples, a second apart
_RUN_S = 20.0  # how long the run should take
_MOST_REPEATS = 200
_PLAUSIBLE_W = (0.05, 60.0)
_NOTE = "of the whole device, its screen and radio included, by its battery's gauge"


def obstacle(state: Mapping[str, Any], execution: Execution) -> str | None:
    """Why the energy of a device in this state cannot be measured; None where it can."""
    if execution != "measured":
        return "an emulated device draws nothing from a battery"
    found = state.get("gauge")
    if found == "denied":
        return "the device denies a look at its battery's gauge (current_now; many phones ask for root)"
    if not isinstance(found, Mapping):
        return "no battery's gauge can be read there"
    if found["status"] != "Discharging":
        return (
            f"the battery is not being used ({found['status']}), and its gauge does not see what a charger gives: "
            "connect by Wi-Fi (adb pair, or adb tcpip) and unplug it"
        )
    return None


def repeats(generation: Generation) -> int:
    """How often to run the workload so that the gauge is read often enough."""
    run = generation.counted[0]
    seconds = (run.prefill_ns + sum(run.token_ns)) / 1e9
    return min(_MOST_REPEATS, max(1, math.ceil(_RUN_S / seconds))) if seconds > 0 else 1


def energy(found: Sequence[GaugeSample], load_ns: int | None, generation: Generation) -> Energy:
    """Mean power while the workload ran, over time, and what that makes per generated token at its mean time.

    Args:
        found: from the start of the run on; what was read before the model was loaded is left out.
        load_ns: how long that took.
    """
    if load_ns is None:
        return Energy(reason="the runner did not say how long the model took to load, which is no part of a token")
    # The gauge is read first after the program has begun to load.
    samples = [sample for sample in found if sample.seconds >= found[0].seconds + load_ns / 1e9]
    if len(samples) < _FEWEST:
        often = f"{len(samples)} times while the workload ran"
        return Energy(reason=f"the gauge was read {often}; {_FEWEST} are needed: a longer --workload")
    if len({sample.amperes for sample in samples}) < 3:
        return Energy(reason="the gauge hardly moved during the run")
    signs = {math.copysign(1, sample.amperes) for sample in samples if sample.amperes}
    if len(signs) > 1:
        return Energy(reason="the battery was charged and discharged in turns")
    joules = sum(
        (abs(one.amperes) * one.volts + abs(two.amperes) * two.volts) / 2 * (two.seconds - one.seconds)
        for one, two in pairwise(samples)
    )
    seconds = samples[-1].seconds - samples[0].seconds
    watts = joules / seconds if seconds > 0 else 0.0
    if not _PLAUSIBLE_W[0] <= watts <= _PLAUSIBLE_W[1]:
        return Energy(
            reason=f"the gauge says {watts:.3g} W, which no phone draws: it may not count in microamperes or microvolts"
        )
    times = [ns for run in generation.counted for ns in run.token_ns]
    per_token = watts * sum(times) / len(times) / 1e9 if times else None
    count = len(samples)
    return Energy(
        power=figure(watts, "W", "measured", n=count, note=_NOTE),
        per_token=figure(per_token, "J", "measured", n=count, note=_NOTE),
    )
