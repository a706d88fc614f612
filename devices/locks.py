"""One process at a time, across processes; a crashed holder leaves no stale lock behind."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from boa_edge.files import disk_errors
from boa_edge.progress import say


@contextmanager
def only_one(lock: Path) -> Iterator[None]:
    """Hold `lock` (a file that stays) for the block, waiting for another holder."""
    with disk_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        stream = lock.open("a", encoding="utf-8")
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that holds {lock}")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
