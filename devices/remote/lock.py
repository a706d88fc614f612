"""One user of a device at a time: a lock on this machine, and one on the device for other machines' sake."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from boa_edge.errors import BoaEdgeError
from devices.locks import only_one
from devices.remote.shell import RemoteShell, ask, demand
from devices.transport import ConnectionLostError

# A holder that has not run anything for so long is taken for dead; by the device's own clock.
_STALE_S = 12 * 3600


@contextmanager
def host_lock(device: str) -> Iterator[None]:
    """Wait until no other process of this user on this machine uses `device`."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "boa-edge" / "locks"
    name = hashlib.sha256(device.encode()).hexdigest()[:16]
    with only_one(base / f"device-{name}"):
        yield


@contextmanager
def device_lock(shell: RemoteShell, base: str) -> Iterator[None]:
    """Hold the directory `lock` below `base` on the device. Call with the host lock held.

    Raises BoaEdgeError where somebody on another machine, or another user of this one, holds it.
    """
    token = f"{socket.gethostname()}:{os.geteuid()} {os.getpid()}"
    lock = shlex.quote(f"{base}/lock")
    take = f"mkdir {lock} 2>/dev/null && printf '%s %s\\n' {shlex.quote(token)} \"$({_BOOT})\" > {lock}/owner"
    if not ask(shell, take):
        _take_over(shell, lock)
        demand(shell, take, "the device's lock cannot be taken")
    try:
        yield
    finally:
        with contextlib.suppress(ConnectionLostError):  # the next run from here knows its own lock
            ask(shell, f"rm -rf {lock}")


def break_lock(shell: RemoteShell, base: str) -> None:
    """Remove the lock whoever holds it."""
    ask(shell, f"rm -rf {shlex.quote(f'{base}/lock')}")


_BOOT = "cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo unknown"


def _take_over(shell: RemoteShell, lock: str) -> None:
    """Remove a lock whose holder is gone; BoaEdgeError where it may be alive."""
    script = (
        f"[ -d {lock} ] || exit 44\ncat {lock}/owner 2>/dev/null || echo unknown 0 unknown\n{_BOOT}\n"
        f"now=$(date +%s); then=$(stat -c %Y {lock} 2>/dev/null || echo 0); echo $((now - then))"
    )
    answer = ask(shell, script)
    if answer.code == 44:
        where = f"device {shell.name}"
        raise BoaEdgeError(
            "its directory cannot be written", where=where, fix="Name another `directory` in its profile"
        )
    lines = answer.out.split("\n")
    owner, pid, boot = (lines[0].split() + ["unknown"] * 3)[:3]
    rebooted = boot != "unknown" and len(lines) > 1 and lines[1].strip() not in (boot, "unknown")
    age = lines[2].strip() if len(lines) > 2 else ""
    here = owner == f"{socket.gethostname()}:{os.geteuid()}"
    if here or rebooted or (age.isdigit() and int(age) > _STALE_S):
        ask(shell, f"rm -rf {lock}")
        return
    since = f" for {int(age)} s" if age.isdigit() else ""
    raise BoaEdgeError(
        f"is in use by process {pid} of {owner.partition(':')[0]}{since}",
        where=f"device {shell.name}",
        fix="Wait for it, or if that process is gone: boa-edge devices clean NAME --force",
    )
