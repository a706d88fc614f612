"""A battery's gauge on a device: what it says now, and once a second beside a run."""

from __future__ import annotations

import re
from typing import Any

from devices.contract import GaugeSample

_SUPPLIES = "/sys/class/power_supply"
_NAME = re.compile(r"[\w.-]+")
# The first battery: name, whether it is being discharged, microamperes, microvolts.
COMMAND = (
    f"eval 'for d in {_SUPPLIES}/*; do "
    '[ "$(cat $d/type 2>/dev/null)" = Battery ] && '
    'echo "${d##*/}=$(cat $d/status 2>&1)=$(cat $d/current_now 2>&1)=$(cat $d/voltage_now 2>&1)"; '
    "done; true'"
)


def parse(text: str) -> dict[str, Any] | None:
    """What `COMMAND` prints; None where no battery says how much flows."""
    found = re.search(r"^([\w.-]+)=([^=\n]+)=(-?\d{1,15})=(\d{1,15})$", text, re.MULTILINE)
    if found is None:
        return None
    return {"battery": found[1], "status": found[2], "current_ua": int(found[3]), "voltage_uv": int(found[4])}


def sampling(battery: str, target: str) -> str:
    """Shell words that append one sample to the file `target` (quoted): uptime in seconds, current, voltage."""
    if not _NAME.fullmatch(battery):
        raise ValueError(f"{battery!r} is no battery's name")
    place = f"{_SUPPLIES}/{battery}"
    return f'read u r < /proc/uptime; echo "$u $(cat {place}/current_now) $(cat {place}/voltage_now)" >> {target}; '


def read_samples(text: str) -> tuple[GaugeSample, ...]:
    """The lines that `sampling` wrote; those that are not three numbers, since the gauge gave none, are left out."""
    found = re.findall(r"^(\d{1,15}(?:\.\d{1,9})?) (-?\d{1,15}) (\d{1,15})$", text, re.MULTILINE)
    return tuple(GaugeSample(float(at), int(current) / 1e6, int(voltage) / 1e6) for at, current, voltage in found)
