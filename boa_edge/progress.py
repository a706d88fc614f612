"""Progress on stderr: a bar on a terminal, plain lines elsewhere. stdout is kept for the result."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from boa_edge.ranks import is_silent

T = TypeVar("T")

_PLAIN_SECONDS = 10.0


def say(message: str) -> None:
    """One plain line on stderr."""
    if not is_silent():
        print(f"{message}\n", end="", file=sys.stderr, flush=True)  # in one write: processes may share the stream


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Iterate `items`, showing how far `what` has come."""
    if is_silent():
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
            yield from progress.track(items, total=total, description=what)
        return
    start = last = time.monotonic()
    done = 0
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= _PLAIN_SECONDS:
            last = now
            say(f"{what}: {done}{f'/{total}' if total else ''} ({now - start:.0f} s)")
    say(f"{what}: {done} done in {time.monotonic() - start:.1f} s")
