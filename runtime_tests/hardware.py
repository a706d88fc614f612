"""Which hardware a report is from: a device's name can stand for another phone every day."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from devices.remote.probes import DENIED, UNAVAILABLE

# What the transports' fingerprints tell hardware apart by, the plainest first.
_FIELDS = ("manufacturer", "model", "board", "soc", "cpu", "midr")


def hardware(fingerprint: Mapping[str, Any]) -> dict[str, str]:
    """What is known of it, field -> value; nothing that a probe did not answer."""
    known = {name: fingerprint.get(name) for name in _FIELDS}
    none = (UNAVAILABLE, DENIED)
    return {name: value for name, value in known.items() if isinstance(value, str) and value not in none}


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """The first field that both fingerprints have and that differs, in words; None where there is none."""
    first, second = hardware(before), hardware(after)
    for name, value in first.items():
        if second.get(name, value) != value:
            return f"{name} {value} against {second[name]}"
    return None


def describe(fingerprint: Mapping[str, Any]) -> str:
    """In a few words, such as `Google Pixel 8`; empty where nothing is known."""
    known = hardware(fingerprint)
    names = ("manufacturer", "model") if "model" in known else ("board",) if "board" in known else ("cpu",)
    return " ".join(known[name] for name in names if name in known)
