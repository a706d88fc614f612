"""Runs one command and hands out its lines as they come; never longer silent than allowed, never left running."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

_LONGEST_LINE = 1 << 20
_STDERR_LINES = 20
_CHUNK = 1 << 16
# For a process of which nothing more is wanted: to end by itself and say why.
_GRACE_S = 2.0
_LONGEST_WAIT_S = 3600.0  # the system's own limit is 24 days

Listener = Callable[[str], bool | None]
"""Gets a line; True where no further one is wanted."""


@dataclass(frozen=True)
class Outcome:
    """How the process ended.

    Attributes:
        code: exit status; negative: the signal that ended it; None: stopped by us.
        stderr: its last lines on stderr.
        problem: why it was stopped, where it was.
        advice: what the user can do about that, where it is not the usual.
    """

    code: int | None
    stderr: tuple[str, ...]
    problem: str | None = None
    advice: str | None = None

    def describe(self) -> str:
        """How it ended, in words."""
        if self.problem is not None:
            return self.problem
        if self.code is not None and self.code < 0:
            try:
                name = signal.Signals(-self.code).name
            except ValueError:
                name = f"signal {-self.code}"
            return f"it was ended by {name}"
        return f"it exited with {self.code}"


def run_lines(
    command: Sequence[str],
    environment: Mapping[str, str],
    on_line: Listener,
    silence_limit_s: float,
) -> Outcome:
    """Run `command`; `on_line` gets each line of stdout, and an exception that it raises stops the process.

    Where it answers True, the process is stopped a moment later if it has not ended by then.
    """
    process = subprocess.Popen(
        list(command),
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        tail: deque[str] = deque(maxlen=_STDERR_LINES)
        reader = threading.Thread(target=_keep_tail, args=(process.stderr, tail), daemon=True)
        reader.start()
        problem, limit = _read_lines(process.stdout, on_line, silence_limit_s)
        if problem is None:
            try:
                process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                problem = f"it closed its output but did not end within {limit:g} s"
    finally:
        _stop(process)
        if process.stdout is not None:
            process.stdout.close()
    reader.join(timeout=5)
    return Outcome(None if problem else process.returncode, tuple(tail), problem)


def _read_lines(stream: IO[bytes], on_line: Listener, limit_s: float) -> tuple[str | None, float]:
    """Read to the end; why reading was given up, and how long the process may take to end."""
    buffer, enough = b"", False
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        deadline = time.monotonic() + limit_s
        while True:
            left = deadline - time.monotonic()
            is_ready = selector.select(timeout=min(max(0.0, left), _LONGEST_WAIT_S))
            if not is_ready and left > _LONGEST_WAIT_S:
                continue
            if (enough and left <= 0) or not is_ready:
                return "it was stopped" if enough else f"it printed nothing for {limit_s:g} s", limit_s
            chunk = os.read(stream.fileno(), _CHUNK)
            *lines, buffer = (buffer + chunk).split(b"\n") if chunk else (buffer, b"")
            # At the end of output, what follows the last line break is a line if it is anything.
            answers = [on_line(_text(line)) for line in lines if line or chunk]
            if not enough:
                enough = any(answers)
                limit_s = min(limit_s, _GRACE_S) if enough else limit_s
                deadline = time.monotonic() + limit_s if lines else deadline
            if not chunk:
                return None, limit_s
            if len(buffer) > _LONGEST_LINE:
                return f"it printed a line of more than {_LONGEST_LINE} bytes", limit_s


def _keep_tail(stream: IO[bytes], tail: deque[str]) -> None:
    with stream:
        for line in iter(lambda: stream.readline(_CHUNK), b""):
            if line.strip():
                tail.append(_text(line).strip())


def _text(line: bytes) -> str:
    return line.decode("utf-8", errors="replace")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and whatever it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all gone
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
