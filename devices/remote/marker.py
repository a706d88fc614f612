"""The end marker: the last line of everything that runs on a device.

A remote shell whose connection breaks may end like one whose command succeeded (`adb shell` then exits with 0). So
every script prints a line of its own at its end, with a token that nothing else knows, and only that line says how it
ended.
"""

from __future__ import annotations

import secrets
from typing import Literal

from devices.process import Listener

TIMED_OUT: Literal["timeout"] = "timeout"
_LONGEST_SIGNAL = 64


class EndMarker:
    """One script's end.

    Attributes:
        code: the exit code as the device's shell gave it, `timeout` where its time limit ended it, None until the
            marker has been seen.
    """

    def __init__(self) -> None:
        self._prefix = f"boa-edge-end {secrets.token_hex(16)} "
        self.code: int | Literal["timeout"] | None = None

    def wrap(self, script: str) -> str:
        """`script` in a shell of its own, then the marker with its exit code."""
        return f"( {script}\n)\n{self.print_code('$?')}"

    def print_code(self, code: str) -> str:
        """The command that prints the marker; `code` is shell text."""
        return f"printf '\\n{self._prefix}%s\\n' \"{code}\""

    def split(self, output: str) -> str:
        """What the script printed, without the marker; `code` is set if the marker is its last line."""
        body, mark, end = output.rpartition(f"\n{self._prefix}")
        if mark and end.endswith("\n") and self._read(end[:-1]):
            return body
        return output

    def filter(self, on_line: Listener) -> Listener:
        """An `on_line` that keeps the marker, and the empty line that goes before it, from the given one."""
        held = False

        def accept(line: str) -> bool:
            nonlocal held
            if line.startswith(self._prefix) and self._read(line.removeprefix(self._prefix)):
                held = False
                return False
            enough = bool(held and on_line(""))
            held = line == ""
            return bool(not held and on_line(line)) or enough

        return accept

    def _read(self, text: str) -> bool:
        if text == TIMED_OUT:
            self.code = TIMED_OUT
        elif text.isascii() and text.isdigit() and int(text) < 256:
            self.code = int(text)
        else:
            return False
        return True


def as_signal(code: int) -> int:
    """An exit code of a shell as Python's: 137 is -9, what ended by a signal is negative."""
    return 128 - code if 128 < code <= 128 + _LONGEST_SIGNAL else code
