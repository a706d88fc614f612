"""A device behind a remote shell, as a transport."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from boa_edge.errors import BoaEdgeError
from boa_edge.visible import one_line
from devices.binaries import Target
from devices.contract import Execution
from devices.profile import Profile
from devices.remote import probes
from devices.remote.hashing import find_hasher
from devices.remote.lock import break_lock, device_lock, host_lock
from devices.remote.ownership import check_ours
from devices.remote.shell import RemoteShell, ask, demand
from devices.remote.store import Store
from devices.remote.workplace import RemoteWorkplace, sweep

UNTRIED = (
    "How this device is reached has been tested on emulated devices only, not on real hardware: "
    "boa-edge devices check says what works on yours."
)
_NO_HASHER = "The device has no sha256sum: files were checked by fetching them back."
_MEBIBYTE = 1 << 20


class Connection(RemoteShell, Protocol):
    """A remote shell that can be lost and found."""

    def address(self) -> str:
        """What this machine reaches the device by, the same whatever the profile's name is."""
        ...

    def directory(self) -> str:
        """The absolute path on the device below which everything of ours stands."""
        ...

    def emulated(self) -> bool:
        """Whether the device is an emulator by its own account."""
        ...

    def recover(self) -> None:
        """Wait until the device answers again. BoaEdgeError where it stays away."""
        ...


class RemoteTransport(ABC):
    """What adb and ssh devices share. A subclass finds the device.

    Nothing is asked of the device before it is needed; what is learned of it is kept until the connection breaks.
    """

    target: Target = "aarch64"

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._open: Connection | None = None
        self._hasher: str | None = None
        self._emulated = profile.emulated
        self._fingerprint: dict[str, Any] | None = None

    @abstractmethod
    def _connect(self) -> Connection:
        """Find the device. BoaEdgeError says what the user has to do where it cannot be used."""

    @abstractmethod
    def missing(self) -> tuple[str, ...]:
        """What is missing on this machine to reach any such device."""

    def _reachable(self) -> str | None:
        """As `problem`, before a connection is tried."""
        return None

    def problem(self) -> str | None:
        try:
            reason = self._reachable()
            if reason is None:
                self.connection()
        except BoaEdgeError as error:
            return str(error)
        return reason

    @property
    def execution(self) -> Execution:
        """`emulated` where the profile or the device says so. BoaEdgeError where it cannot be asked."""
        if self.known_execution is None:
            self.connection()
        return "emulated" if self._emulated else "measured"

    @property
    def known_execution(self) -> Execution | None:
        if self._profile.emulated:
            return "emulated"
        if self._open is None:
            return None
        return "emulated" if self._emulated else "measured"

    def connection(self) -> Connection:
        """The device, found and checked once. BoaEdgeError where it cannot run our programs."""
        if self._open is None:
            found = self._connect()
            machine = ask(found, "uname -m").out.strip()
            if machine != "aarch64" and self._profile.runner_path is None:
                other = one_line(machine, 40) or "of an unknown kind"
                own = "Name a runner of your own for it in its profile (runner_path)"
                fix = own if machine.startswith("arm") else "Use a 64-bit ARM device; here: --device host"
                problem = f"its processor is {other}; our runners are for aarch64 (64-bit ARM)"
                raise BoaEdgeError(problem, where=f"device {found.name}", fix=fix)
            self._emulated = self._profile.emulated or found.emulated()
            self._hasher = find_hasher(found)
            self._open = found
        return self._open

    def fingerprint(self) -> dict[str, Any]:
        if self._fingerprint is None:
            self._fingerprint = probes.read_fingerprint(self.connection())
        return self._fingerprint

    def notes(self) -> tuple[str, ...]:
        notes = [] if self.known_execution == "emulated" else [UNTRIED]
        return (*notes, *([] if self._hasher else [_NO_HASHER]))

    def recover(self) -> None:
        if self._open is not None:
            self._open.recover()
        # It may have been restarted, or be another one by now.
        self._open = self._fingerprint = None

    @contextmanager
    def open(self) -> Iterator[RemoteWorkplace]:
        with self._held() as (connection, base):
            store = Store(connection, base, self._hasher, self._profile.store_limit_mb * _MEBIBYTE)
            workplace = RemoteWorkplace(connection, base, store, self._hasher, self._profile.time_limit_s)
            try:
                yield workplace
            finally:
                workplace.remove()

    def clean(self, *, force: bool = False) -> str:
        """Remove everything of ours from the device; its directory's path. `force`: whoever holds its lock."""
        if force:
            connection = self.connection()
            break_lock(connection, connection.directory())
        with self._held() as (connection, base):
            demand(connection, f"rm -rf '{base}/files' '{base}/runs'", "the device's directory cannot be removed")
        ask(connection, f"rmdir '{base}'")
        return base

    @contextmanager
    def _held(self) -> Iterator[tuple[Connection, str]]:
        """The device with its directory made, for us alone; what cut-off runs left there is gone."""
        connection = self.connection()
        base = connection.directory()
        check_ours(connection, base)
        with host_lock(f"{self._profile.transport} {connection.address()}"):
            made = f"mkdir -p '{base}/files' '{base}/runs'"
            demand(connection, made, f"{base} cannot be made on the device")
            with device_lock(connection, base):
                sweep(connection, base)
                yield connection, base
