"""What a device says of itself: one script, many questions, each answered by a value, `unavailable` or `denied`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from devices.remote import gauge
from devices.remote.shell import RemoteShell, ask, whole

UNAVAILABLE = "unavailable"
DENIED = "denied"
_MOST = 1 << 63  # as a device counts
_REFUSALS = ("permission denied", "operation not permitted", "permission denial", "not allowed", "eacces")

# Field and record separators that no answer contains; $(...) drops nothing of what matters to us.
_UNIT, _RECORD = "\x1f", "\x1e"
_ASK = """ask() {
  n=$1; shift
  v=$("$@" 2>&1 </dev/null); c=$?
  printf '%s\\037%s\\037%s\\036' "$n" "$c" "$v"
}
each() { for f in $1; do [ -e "$f" ] && printf '%s ' "${f#$2}" && cat "$f"; done; true; }
"""


@dataclass(frozen=True)
class Probe:
    """One question.

    Attributes:
        name: the key of its answer.
        command: shell words; what they print is the answer.
        parse: turns the text into a JSON value; None or a ValueError mean `unavailable`.
    """

    name: str
    command: str
    parse: Callable[[str], Any] = str


def _number(text: str) -> int:
    return int(text.split()[0])


def _kibibytes(name: str) -> Callable[[str], int | None]:
    def parse(text: str) -> int | None:
        found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
        return int(found[1]) * 1024 if found else None

    return parse


def _cpu_features(text: str) -> list[str] | None:
    """What all cores have."""
    sets = [set(line.partition(":")[2].split()) for line in text.splitlines() if line.startswith("Features")]
    return sorted(set.intersection(*sets)) if sets else None


def _cpu_parts(text: str) -> list[str] | None:
    """Implementer and part of each core, in order: `0x41:0xd0b`."""
    makers = re.findall(r"^CPU implementer\s*:\s*(\S+)", text, re.MULTILINE)
    parts = re.findall(r"^CPU part\s*:\s*(\S+)", text, re.MULTILINE)
    return [f"{maker}:{part}" for maker, part in zip(makers, parts, strict=False)] or None


def _cores(text: str) -> int | None:
    return len(re.findall(r"^processor\s*:", text, re.MULTILINE)) or None


def _per_core(text: str) -> dict[str, int | str] | None:
    """`cpu0/cpufreq/NAME VALUE` lines as core -> value."""
    found: dict[str, int | str] = {}
    for core, value in re.findall(r"^cpu(\d+)/\S+ (.*)$", text, re.MULTILINE):
        number = whole(value.strip())
        found[f"cpu{core}"] = _refusal(value) or value.strip() if number is None else number
    return found or None


def _zones(text: str) -> dict[str, float] | None:
    """Pairs of lines, a zone's type and its millidegrees, as name -> degrees Celsius."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        place, _, value = line.rpartition("=")
        zone, separator, kind = place.partition("=")
        if not (zone and separator and re.fullmatch(r"-?\d{1,9}", value)):
            continue
        degrees = int(value) / 1000 if abs(int(value)) >= 1000 else float(value)
        if -40 < degrees < 200 and degrees != 0:  # vendors leave odd numbers in zones without a sensor
            found[f"{zone}:{kind}"] = degrees
    return found or None


def _battery(text: str) -> dict[str, Any] | None:
    """`dumpsys battery`: level in percent, temperature in degrees Celsius, whether it is being charged."""
    fields = dict(re.findall(r"^[ \t]*([A-Za-z][A-Za-z ]*): (\S.*)$", text, re.MULTILINE))
    found: dict[str, Any] = {}
    level = whole(fields.get("level", ""))
    if level is not None:
        found["level_percent"] = level
    if re.fullmatch(r"-?\d{1,9}", fields.get("temperature", "")):
        found["temperature_c"] = int(fields["temperature"]) / 10
    powered = [name for name in ("AC", "USB", "Wireless") if fields.get(f"{name} powered") == "true"]
    if found:
        found["powered_by"] = powered or "battery"
    return found or None


def _thermal_status(text: str) -> int | None:
    """Android's throttling status: 0 none, 1 light, 2 moderate, 3 severe, 4 critical and above."""
    found = re.search(r"Thermal Status: (\d+)", text)
    return int(found[1]) if found else None


_CPU = "/sys/devices/system/cpu"
_FINGERPRINT = (
    Probe("manufacturer", "getprop ro.product.manufacturer"),
    Probe("model", "getprop ro.product.model"),
    Probe("board", "cat /proc/device-tree/model", lambda text: text.rstrip("\0")),
    Probe("soc_manufacturer", "getprop ro.soc.manufacturer"),
    Probe("soc", "getprop ro.soc.model"),
    Probe("platform", "getprop ro.board.platform"),
    Probe("build", "getprop ro.build.fingerprint"),
    Probe("android", "getprop ro.build.version.release"),
    Probe("api_level", "getprop ro.build.version.sdk", _number),
    Probe("security_patch", "getprop ro.build.version.security_patch"),
    Probe("abis", "getprop ro.product.cpu.abilist", lambda text: text.split(",")),
    Probe("distribution", "sh -c '. /etc/os-release && echo \"$PRETTY_NAME\"'"),
    Probe("machine", "uname -m"),
    Probe("kernel", "uname -r"),
    Probe("cores", "cat /proc/cpuinfo", _cores),
    Probe("cpu_parts", "cat /proc/cpuinfo", _cpu_parts),
    Probe("features", "cat /proc/cpuinfo", _cpu_features),
    Probe("governors", f"each '{_CPU}/cpu*/cpufreq/scaling_governor' {_CPU}/", _per_core),
    Probe("max_khz", f"each '{_CPU}/cpu*/cpufreq/cpuinfo_max_freq' {_CPU}/", _per_core),
    Probe("memory_bytes", "cat /proc/meminfo", _kibibytes("MemTotal")),
    Probe("boot_id", "cat /proc/sys/kernel/random/boot_id"),
    Probe("epoch_s", "date +%s", _number),
)
_STATE = (
    Probe("current_khz", f"each '{_CPU}/cpu*/cpufreq/scaling_cur_freq' {_CPU}/", _per_core),
    Probe("battery", "dumpsys battery", _battery),
    Probe("gauge", gauge.COMMAND, gauge.parse),
    Probe("thermal_status", "dumpsys thermalservice", _thermal_status),
    Probe(
        "temperatures_c",
        "eval 'for z in /sys/class/thermal/thermal_zone*; do [ -r $z/temp ] && "
        'echo "${z##*/thermal_}=$(cat $z/type)=$(cat $z/temp)"; done; true\'',
        _zones,
    ),
    Probe("throttled", "vcgencmd get_throttled", lambda text: text.strip().removeprefix("throttled=")),
    Probe("memory_available_bytes", "cat /proc/meminfo", _kibibytes("MemAvailable")),
)


def read_fingerprint(shell: RemoteShell) -> dict[str, Any]:
    """What the device is. `clock_skew_s`: by how many seconds its wall clock is ahead of this machine's."""
    found = _read(shell, _FINGERPRINT)
    epoch = found.pop("epoch_s")
    found["clock_skew_s"] = epoch - int(time.time()) if isinstance(epoch, int) else epoch
    return found


def read_state(shell: RemoteShell) -> dict[str, Any]:
    """What changes while it works."""
    return _read(shell, _STATE)


def _read(shell: RemoteShell, probes: tuple[Probe, ...]) -> dict[str, Any]:
    # A question that several probes ask is put once.
    commands = list(dict.fromkeys(probe.command for probe in probes))
    script = _ASK + "\n".join(f"ask {index} {command}" for index, command in enumerate(commands)) + "\ntrue"
    answers: dict[str, tuple[int, str]] = {}
    for record in ask(shell, script).out.split(_RECORD):
        parts = record.split(_UNIT)
        index, code = map(whole, parts[:2]) if len(parts) == 3 else (None, None)
        if index is not None and index < len(commands) and code is not None:
            answers[commands[index]] = (code, parts[2])
    return {probe.name: _answer(probe, answers) for probe in probes}


def _answer(probe: Probe, answers: Mapping[str, tuple[int, str]]) -> Any:
    code, text = answers.get(probe.command, (1, ""))
    text = text.strip()
    if code:
        return _refusal(text) or UNAVAILABLE
    if not text:
        return UNAVAILABLE
    try:
        value = probe.parse(text)
    except (ValueError, IndexError, ArithmeticError):
        return UNAVAILABLE
    if value is None or not _sound(value):
        return _refusal(text) or UNAVAILABLE
    return value


def _sound(value: Any) -> bool:
    """Whether every number in it is one that a report can hold."""
    if isinstance(value, dict):
        return all(map(_sound, value.values()))
    if isinstance(value, list):
        return all(map(_sound, value))
    return not isinstance(value, int | float) or abs(value) < _MOST


def _refusal(text: str) -> str | None:
    return DENIED if any(phrase in text.lower() for phrase in _REFUSALS) else None
