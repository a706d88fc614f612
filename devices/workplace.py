"""Work places on this machine's own disk, beside what they are filled from so that files are linked, not copied."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from boa_edge.files import disk_errors
from devices.contract import GaugeSample
from devices.locks import only_one
from devices.paths import cache_directory
from devices.process import Listener, Outcome, run_lines

_PREFIX = "run-"
# Nothing of the user's environment reaches a runner; ONNX Runtime's library would otherwise report its use.
RUNNER_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "ORT_DISABLE_TELEMETRY": "1"}


class LocalWorkplace:
    """A directory here whose programs run natively."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def push(self, source: Path, name: str, *, executable: bool = False) -> None:
        target = self.directory / name
        with disk_errors(self.directory):
            # A program is copied: its mode is set below, and a link would set the original's.
            if executable or not _link(source.resolve(), target):
                shutil.copyfile(source, target)
            if executable:
                target.chmod(0o755)

    def write(self, content: bytes, name: str) -> None:
        with disk_errors(self.directory):
            (self.directory / name).write_bytes(content)

    def deploy(self) -> None:
        """It is there as soon as it is pushed."""

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def command(self, program: str, arguments: Sequence[str]) -> tuple[str, ...]:
        return (self.path(program), *arguments)

    def run(self, program: str, arguments: Sequence[str], on_line: Listener, silence_limit_s: float) -> Outcome:
        return run_lines(self.command(program, arguments), RUNNER_ENVIRONMENT, on_line, silence_limit_s)

    def instructions(self) -> tuple[int, ...] | None:
        return None

    def state(self) -> dict[str, Any]:
        return {}

    def watch(self, battery: str) -> None:
        raise ValueError("this machine's batteries are not looked at")

    def gauge(self) -> tuple[GaugeSample, ...]:
        return ()

    def pull(self, name: str) -> Path:
        return self.directory / name


@contextmanager
def local_directory() -> Iterator[Path]:
    """A new directory below the cache, removed after the block; those of processes that were killed go too."""
    base = cache_directory() / "work"
    with only_one(base / ".lock"), disk_errors(base):
        _sweep(base)
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        held = _hold(directory)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        if held is not None:
            os.close(held)


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError as error:
        # Another disk, a file system without links, or one that may not be linked by this user: copy it.
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP):
            return False
        raise
    return True


def _sweep(base: Path) -> None:
    for path in base.glob(f"{_PREFIX}*"):
        held = _hold(path)
        if held is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(held)


def _hold(directory: Path) -> int | None:
    """Mark a directory as in use for as long as the descriptor is open; None where another process holds it."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
