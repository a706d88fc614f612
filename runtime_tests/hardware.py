"""Which hardware a report is from: a device's name can stand for another phone every day."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from devices.remote.probes import DENIED, UNAVAILABLE

# What the transports' fingerprints tell hardware apart by, the plainest first.
_FIELDS = ("manufacturer", "model", "board", "soc", "cpu", "midr")
_COUNTS = ("cores", "usable_cores")


def hardware(fingerprint: Mapping[str, Any]) -> dict[str, str]:
    """What is known of it, field -> value in words; nothing that a probe did not answer."""
    known = {name: fingerprint.get(name) for name in _FIELDS}
    none = (UNAVAILABLE, DENIED)
    found = {name: value for name, value in known.items() if isinstance(value, str) and value not in none}
    found |= {name: str(count) for name in _COUNTS if isinstance(count := fingerprint.get(name), int)}
    parts = fingerprint.get("cpu_parts")
    if isinstance(parts, list) and parts:
        found["cpu_parts"] = ", ".join(f"{count} x {part}" for part, count in Counter(map(str, parts)).items())
    memory = fingerprint.get("memory_bytes")
    if isinstance(memory, int):
        # In whole units, since a system keeps a little of it for itself, and another version a little more.
        found["memory"] = f"{-(-memory // 2**30)} GiB"
    return found


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """The first field that both fingerprints have and that differs, in words; None where there is none."""
    first, second = hardware(before), hardware(after)
    for name, value in first.items():
        if second.get(name, value) != value:
            return f"{name} {value} against {second[name]}"
    return None


def describe(fingerprint: Mapping[str, Any]) -> str:
    """All that `difference` looks at, such as `Google Pixel 8, soc Tensor G3, cores 9, memory 8 GiB`; or nothing."""
    known = hardware(fingerprint)
    names = ("manufacturer", "model") if "model" in known else ("board",) if "board" in known else ("cpu",)
    named = " ".join(known[name] for name in names if name in known)
    return ", ".join(filter(None, (named, *(f"{name} {known[name]}" for name in known if name not in names))))
