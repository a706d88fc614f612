"""How files and commands reach a device.

A transport opens a work place: an empty directory on the device that is gone afterwards. A program there runs as a
local process that stands for the one on the device (the runner itself, the emulator, or a client of a remote shell). A
further way to reach devices is one file with such a class and one line in devices/registry.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from boa_edge.errors import BoaEdgeError
from devices.binaries import Target
from devices.contract import Execution, GaugeSample
from devices.process import Listener, Outcome


class ConnectionLostError(BoaEdgeError):
    """The device went away before it had answered. What it was asked for has to be asked again from the start."""


class Workplace(Protocol):
    """An empty directory on the device, for one run."""

    def push(self, source: Path, name: str, *, executable: bool = False) -> None:
        """Put a file there as `name` (no slashes)."""
        ...

    def write(self, content: bytes, name: str) -> None:
        """Put a file with `content` there as `name`."""
        ...

    def deploy(self) -> None:
        """Have everything there that was pushed and written. `run` does it by itself."""
        ...

    def path(self, name: str) -> str:
        """The path of a file there, as the device's programs see it."""
        ...

    def command(self, program: str, arguments: Sequence[str]) -> tuple[str, ...]:
        """The command that `run` runs, as the device sees it."""
        ...

    def run(self, program: str, arguments: Sequence[str], on_line: Listener, silence_limit_s: float) -> Outcome:
        """Run `program` (a pushed file) to its end; `on_line` gets each line of its stdout, and may end it early.

        Whatever happens, nothing is left running. Raises ConnectionLostError where the end was not seen.
        """
        ...

    def instructions(self) -> tuple[int, ...] | None:
        """Instructions that the last run had executed at each of its lines; None where they are not counted."""
        ...

    def state(self) -> dict[str, Any]:
        """Temperature, clocks and battery as they are now, JSON-ready; empty where there are no such probes."""
        ...

    def watch(self, battery: str) -> None:
        """Read this battery's gauge once a second during the next run. Only where `state` names a battery."""
        ...

    def gauge(self) -> tuple[GaugeSample, ...]:
        """What it said during the last run."""
        ...

    def pull(self, name: str) -> Path:
        """A local file with the content of `name`, valid while the work place is open."""
        ...


class Transport(Protocol):
    """Where a device's commands run."""

    @property
    def execution(self) -> Execution:
        """How its figures come about. BoaEdgeError where only the device can say and it does not answer."""
        ...

    @property
    def known_execution(self) -> Execution | None:
        """As `execution`, without asking the device: None where only it can say."""
        ...

    @property
    def target(self) -> Target:
        """Which binaries the device runs."""
        ...

    def missing(self) -> tuple[str, ...]:
        """What set-up has to bring before this transport can be used, in words."""
        ...

    def problem(self) -> str | None:
        """Why the device cannot be reached now and what to do about it; asked only where nothing is missing."""
        ...

    def notes(self) -> tuple[str, ...]:
        """What a reader of figures from this device has to know."""
        ...

    def recover(self) -> None:
        """Reach the device again after a ConnectionLostError. BoaEdgeError where it stays away."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What the device says of itself, JSON-ready."""
        ...

    def open(self) -> AbstractContextManager[Workplace]:
        """A work place, removed at the end of the block whatever happens."""
        ...
