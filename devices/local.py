"""This machine as a device."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from devices.binaries import Target
from devices.contract import Execution
from devices.profile import Profile
from devices.workplace import LocalWorkplace, local_directory

_INTERESTING = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "fma", "asimddp", "asimdhp", "i8mm", "sve")


class LocalTransport:
    """Runs programs natively, here."""

    execution: Execution = "measured"
    known_execution: Execution | None = "measured"
    target: Target = "host"

    def __init__(self, profile: Profile) -> None:
        self._profile = profile

    def missing(self) -> tuple[str, ...]:
        return ()

    def problem(self) -> str | None:
        return None

    def notes(self) -> tuple[str, ...]:
        return ()

    def recover(self) -> None:
        """A process of this machine is not lost."""

    def fingerprint(self) -> dict[str, Any]:
        return host_facts()

    @contextmanager
    def open(self) -> Iterator[LocalWorkplace]:
        with local_directory() as directory:
            yield LocalWorkplace(directory)


def host_facts() -> dict[str, Any]:
    """CPU, cores, memory and operating system of this machine; None where it does not say."""
    cpuinfo = _key_values(Path("/proc/cpuinfo"))
    flags = set((cpuinfo.get("flags") or cpuinfo.get("Features") or "").split())
    memory = _key_values(Path("/proc/meminfo")).get("MemTotal", "").split()
    return {
        "cpu": cpuinfo.get("model name") or cpuinfo.get("CPU part") or None,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "features": [name for name in _INTERESTING if name in flags],
        "memory_bytes": int(memory[0]) * 1024 if memory and memory[0].isdigit() else None,
        "system": f"{platform.system()} {platform.release()}",
        "distribution": _key_values(Path("/etc/os-release"), "=").get("PRETTY_NAME", "").strip('"') or None,
    }


def _key_values(path: Path, separator: str = ":") -> dict[str, str]:
    """First value of each `key separator value` line; empty where the file cannot be read."""
    found: dict[str, str] = {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return found
    for line in text.splitlines():
        key, mark, value = line.partition(separator)
        if mark:
            found.setdefault(key.strip(), value.strip())
    return found
