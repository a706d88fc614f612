"""One user of a device at a time: a lock on this machine, and one on the device for other machines' sake."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from boa_edge.errors import BoaEdgeError
from boa_edge.visible import one_line
from devices.locks import only_one
from devices.remote.shell import RemoteShell, ask, demand, whole
from devices.transport import ConnectionLostError

# A holder that has not run anything for so long is taken for dead; by the device's own clock.
_STALE_S = 12 * 3600
_TAKING_S = 60  # in which a holder has written who it is
# User, process, boot of the device, mark; older locks have no mark.
_OWNER = re.compile(r"([!-~]+) (\d+) ([!-~]+)(?: ([!-~]+))?")


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

    Raises BoaEdgeError where another run holds it that cannot wait at the host lock: one from another machine, of
    another user, or that reaches the device another way.
    """
    token, mark = f"{_this_user()} {os.getpid()}", f"{_started(os.getpid())}-{secrets.token_hex(8)}"
    lock = shlex.quote(f"{base}/lock")
    words = f'{shlex.quote(token)} "$({_BOOT})" {mark}'
    take = f"mkdir {lock} && {{ printf '%s %s %s\\n' {words} > {lock}/owner || {{ rm -rf {lock}; exit 1; }}; }}"
    _HELD.add(mark)
    try:
        if not ask(shell, take):
            _take_over(shell, lock)
            demand(shell, take, "its directory cannot be locked")
        try:
            yield
        finally:
            with contextlib.suppress(ConnectionLostError):  # the next run from here knows its own lock
                ask(shell, f"grep -q {mark} {lock}/owner && rm -rf {lock}")  # unless another run has broken it
    finally:
        _HELD.discard(mark)


def break_lock(shell: RemoteShell, base: str) -> None:
    """Remove the lock whoever holds it."""
    ask(shell, f"rm -rf {shlex.quote(f'{base}/lock')}")


# The marks of the locks that this process holds now.
_HELD: set[str] = set()
_BOOT = "cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo unknown"


def _take_over(shell: RemoteShell, lock: str) -> None:
    """Remove a lock, if there is one, whose holder is gone; BoaEdgeError where it may be alive."""
    script = (
        f"[ -d {lock} ] || exit 44\n{_BOOT}\n"
        f"now=$(date +%s); then=$(stat -c %Y {lock} 2>/dev/null || echo 0); echo $((now - then))\n"
        f"cat {lock}/owner 2>/dev/null"
    )
    answer = ask(shell, script)
    if answer.code == 44:
        return
    now, age_text, said = [*answer.out.split("\n", 2), "", ""][:3]
    age = whole(age_text.strip())
    known = _OWNER.fullmatch(said.strip())
    owner, pid, boot, mark = (word or "unknown" for word in known.groups()) if known else ("unknown",) * 4
    rebooted = boot != "unknown" and now.strip() not in (boot, "unknown")
    if owner == _this_user():
        gone = not _lives(pid, mark)
    else:
        # One that never got to write who it is, or whose words a power cut took.
        gone = age is not None and age > (_STALE_S if known else _TAKING_S)
    if gone or rebooted:
        ask(shell, f"rm -rf {lock}")
        return
    since = f" for {age} s" if age is not None else ""
    raise BoaEdgeError(
        f"is in use by process {one_line(pid, 20)} of {one_line(owner.partition(':')[0], 80)}{since}",
        where=f"device {shell.name}",
        fix="Wait for it, or if that process is gone: boa-edge devices clean NAME --force",
    )


def _this_user() -> str:
    return f"{socket.gethostname()}:{os.geteuid()}"


def _lives(pid: str, mark: str) -> bool:
    """Whether the process of this user here that left a lock with `mark` still holds it."""
    if mark in _HELD:
        return True
    number = whole(pid)
    if number is None or number == os.getpid():
        return False
    started = _started(number)
    # The number may be another process's by now. Older locks bear no mark.
    return started is not None and mark.partition("-")[0] in (started, "unknown")


def _started(pid: int) -> str | None:
    """When a process of this machine was started, in ticks since it booted; None where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()[19]
