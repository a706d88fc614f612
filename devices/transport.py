"""How files and commands reach a device.

A transport opens a work place: an empty directory on the device that is gone afterwards. Commands run as a local
process that stands for the one on the device (the runner itself, the emulator, or a client of a remote shell). A
further way to reach devices is one file with such a class and one line in devices/registry.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from devices.binaries import Target
from devices.contract import Execution


class Workplace(Protocol):
    """An empty directory on the device, for one run."""

    def push(self, source: Path, name: str, *, executable: bool = False) -> None:
        """Put a file there as `name` (no slashes)."""
        ...

    def write(self, content: bytes, name: str) -> None:
        """Put a file with `content` there as `name`."""
        ...

    def path(self, name: str) -> str:
        """The path of a file there, as the device's programs see it."""
        ...

    def command(self, program: str, arguments: Sequence[str]) -> tuple[str, ...]:
        """The local command that runs `program` (a pushed file) with `arguments` on the device."""
        ...

    def pull(self, name: str) -> Path:
        """A local file with the content of `name`, valid while the work place is open."""
        ...


class Transport(Protocol):
    """Where a device's commands run."""

    @property
    def execution(self) -> Execution: ...

    @property
    def target(self) -> Target:
        """Which binaries the device runs."""
        ...

    def missing(self) -> tuple[str, ...]:
        """What this transport lacks here, in words; empty where it can be used."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What the device says of itself, JSON-ready."""
        ...

    def open(self) -> AbstractContextManager[Workplace]:
        """A work place, removed at the end of the block whatever happens."""
        ...
