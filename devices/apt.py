"""Debian packages, with or without root. Standard library only: the set-up uses this file before anything is installed.

Root installs a package the usual way. Anybody else downloads it with what it needs through a private apt state and
unpacks it below a directory of the project; the system's own state is read and never written.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

Log = Callable[[str], None]

_LOCK_SECONDS = 600


class AptError(Exception):
    """apt could not do it; the text says why, in apt's words."""


def available() -> bool:
    """Whether this is a machine with apt and dpkg."""
    return all(shutil.which(tool) for tool in ("apt-get", "dpkg-deb"))


def is_root() -> bool:
    """Whether packages can be installed for the whole machine."""
    return os.geteuid() == 0


def install(packages: Sequence[str], log: Log) -> None:
    """Install for the whole machine (root). Lists are refreshed only where the first try needs it."""
    log(f"installing {', '.join(packages)} with apt-get")
    command = ["install", "-y", "--no-install-recommends", "-o", f"DPkg::Lock::Timeout={_LOCK_SECONDS}", *packages]
    try:
        _run(["apt-get", *command])
    except AptError:
        log("refreshing the package lists, then trying again")
        _run(["apt-get", "-o", f"DPkg::Lock::Timeout={_LOCK_SECONDS}", "update"])
        _run(["apt-get", *command])


class PrivateApt:
    """An apt state of our own in `directory`, for users who may not touch the system's; removed after the block."""

    def __init__(self, directory: Path, log: Log) -> None:
        self._directory = directory
        self._log = log
        self._fresh = False

    def __enter__(self) -> PrivateApt:
        return self

    def __exit__(self, *exception: object) -> None:
        # The package lists are large and soon out of date.
        shutil.rmtree(self._directory, ignore_errors=True)

    def unpack(self, packages: Sequence[str], destination: Path) -> None:
        """Download `packages` with everything that is not installed yet, and unpack all of it below `destination`."""
        self._refresh()
        self._log(f"downloading {', '.join(packages)} and what they need (no root: unpacked under {destination})")
        with self._archives() as archives:
            self._apt("install", "-y", "--download-only", "--no-install-recommends", *packages, archives=archives)
            self._extract(archives, destination)

    def unpack_only(self, packages: Sequence[str], destination: Path) -> None:
        """Unpack just these packages, without what they need."""
        self._refresh()
        self._log(f"downloading {', '.join(packages)}")
        with self._archives() as archives:
            self._apt("download", *packages, archives=archives)
            self._extract(archives, destination)

    @contextmanager
    def _archives(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="archives-", dir=self._directory) as name:
            (Path(name) / "partial").mkdir()
            yield Path(name)

    @staticmethod
    def _extract(archives: Path, destination: Path) -> None:
        found = sorted(archives.glob("*.deb"))
        if not found:
            raise AptError("apt downloaded nothing")
        destination.mkdir(parents=True, exist_ok=True)
        for archive in found:
            _run(["dpkg-deb", "-x", str(archive), str(destination)])

    def _refresh(self) -> None:
        if self._fresh:
            return
        self._log("reading the package lists")
        (self._directory / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        with self._archives() as archives:
            self._apt("update", archives=archives)
        self._fresh = True

    def _apt(self, *arguments: str, archives: Path) -> None:
        options = {
            "Dir::State": self._directory,
            "Dir::State::Lists": self._directory / "lists",
            "Dir::State::status": "/var/lib/dpkg/status",
            "Dir::Cache": self._directory / "cache",
            "Dir::Cache::Archives": archives,
            "Dir::Log": self._directory / "log",
            "Debug::NoLocking": "1",
            # As root, apt would fetch as a user who cannot write here.
            "APT::Sandbox::User": "root",
            # Package hooks of the system (cleaning its own cache, notifying services) are not for a private state.
            "APT::Update::Post-Invoke-Success": "",
        }
        (self._directory / "cache").mkdir(parents=True, exist_ok=True)
        flags = [item for key, value in options.items() for item in ("-o", f"{key}={value}")]
        _run(["apt-get", *flags, *arguments], cwd=archives)


def _run(command: list[str], cwd: Path | None = None) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        told = [line for line in lines if line.startswith(("E:", "W:", "dpkg"))] or lines
        raise AptError("; ".join(told[-3:]) or f"{command[0]} exited with {done.returncode}")
