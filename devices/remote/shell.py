"""Runs scripts on a device through a client program, and tells a script's end from a broken connection."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from boa_edge.errors import BoaEdgeError
from boa_edge.visible import one_line
from devices.remote.marker import EndMarker
from devices.transport import ConnectionLostError

_TIMEOUT_S = 60.0
_SLOWEST_BYTES_PER_S = 250_000
_NO_SPACE = ("no space left on device", "disk quota exceeded", "write failed: no space")


class DiskFullError(BoaEdgeError):
    """The device has no room for a file."""


class RemoteShell(Protocol):
    """A client program that reaches one device. Adding another way to reach devices is one such class."""

    @property
    def name(self) -> str:
        """The device, for messages."""
        ...

    @property
    def environment(self) -> Mapping[str, str]:
        """Of the client program, here; nothing of it reaches the device."""
        ...

    def argv(self, script: str) -> list[str]:
        """The local command that runs `script` in the device's POSIX shell with its stdin closed."""
        ...

    def send(self, source: Path, path: str, timeout_s: float) -> None:
        """Copy a local file to `path` there. The copy is not trusted: the caller checks it.

        Raises DiskFullError, ConnectionLostError, or BoaEdgeError for any other refusal.
        """
        ...

    def fetch(self, path: str, target: Path, timeout_s: float) -> None:
        """Copy the file `path` there to `target`. The copy is not trusted: the caller checks it."""
        ...


@dataclass(frozen=True)
class Answer:
    """What a script left: its exit code and its output, decoded as UTF-8 with replacements."""

    code: int
    out: str
    err: str

    def __bool__(self) -> bool:
        return self.code == 0


def ask(shell: RemoteShell, script: str, *, timeout_s: float = _TIMEOUT_S) -> Answer:
    """Run `script` on the device. ConnectionLostError where its end marker does not arrive in time."""
    marker = EndMarker()
    done = run_client(shell, shell.argv(marker.wrap(script)), timeout_s)
    body = marker.split(done.stdout)
    if not isinstance(marker.code, int):
        raise lost(shell, done.stderr)
    return Answer(marker.code, body, done.stderr)


def demand(shell: RemoteShell, script: str, what: str, *, timeout_s: float = _TIMEOUT_S) -> str:
    """What a script that must succeed printed. BoaEdgeError says `what` could not be done, and the device's words."""
    answer = ask(shell, script, timeout_s=timeout_s)
    if not answer:
        said = last_line(answer.err) or last_line(answer.out) or f"exit code {answer.code}"
        kind = DiskFullError if is_disk_full(said) else BoaEdgeError
        raise kind(f"{what} ({said})", where=f"device {shell.name}")
    return answer.out


def run_client(
    shell: RemoteShell, command: list[str], timeout_s: float, source: Path | None = None, target: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the client program, stdin from `source`, stdout to `target`. ConnectionLostError where it takes too long."""
    with contextlib.ExitStack() as files:
        stdin = subprocess.DEVNULL if source is None else files.enter_context(source.open("rb"))
        stdout = subprocess.PIPE if target is None else files.enter_context(target.open("wb"))
        return _run(shell, command, timeout_s, stdin, stdout)


def _run(
    shell: RemoteShell, command: list[str], timeout_s: float, stdin: int | IO[bytes], stdout: int | IO[bytes]
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            env=dict(shell.environment),
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConnectionLostError(f"did not answer within {timeout_s:g} s", where=f"device {shell.name}") from None
    except OSError as error:
        raise BoaEdgeError(f"cannot be started ({error.strerror})", where=command[0], fix="Run `make setup`") from None


def transfer_limit(size: int) -> float:
    """Seconds that a copy of `size` bytes may take before it counts as stuck."""
    return _TIMEOUT_S + size / _SLOWEST_BYTES_PER_S


def lost(shell: RemoteShell, said: str = "") -> ConnectionLostError:
    """The error for an answer without its end."""
    words = last_line(said)
    return ConnectionLostError(
        "the connection was lost" + (f" ({words})" if words else ""), where=f"device {shell.name}"
    )


def last_line(text: str) -> str:
    """The last line that says anything, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return one_line(lines[-1], 300) if lines else ""


def whole(text: str) -> int | None:
    """A number as a device prints one, of at most 18 digits; None for anything else."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def is_disk_full(text: str) -> bool:
    """Whether a program's words mean that there is no room left."""
    return any(phrase in text.lower() for phrase in _NO_SPACE)
