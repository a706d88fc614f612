"""Errors that a user can act on."""

from __future__ import annotations


class BoaEdgeError(Exception):
    """Something outside the program is wrong: one line that says what, where and what to do.

    Attributes:
        exit_code: what the command exits with (1: the work failed).
        what, where, fix: as they were given.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object | None = None, fix: str | None = None) -> None:
        """`what` was found, `where` (a file, field or layer), and `fix`: what the user can do."""
        self.what, self.where, self.fix = what, where, fix
        parts = [f"{where}: {what}" if where is not None else what]
        if fix:
            parts.append(fix)
        super().__init__(". ".join(part.rstrip(".") for part in parts) + ".")


class UsageError(BoaEdgeError):
    """The request itself is wrong (an unknown recipe key, a flag's value): exit code 2."""

    exit_code = 2
