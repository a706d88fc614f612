"""Debian packages, with or without root. Standard library only: the set-up uses this file before anything is installed.

Root installs a package the usual way. Anybody else downloads it with what it needs through a private apt state and
unpacks it below a directory of the project; the system's own state is read and never written.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

Log = Callable[[str], None]

_LOCK_SECONDS = 600
_SOURCES = Path("/etc/apt/sources.list")


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
    """An apt state of our own in `directory`, for users who may not touch the system's; removed after the block.

    Args:
        directory: made and removed here.
        log: gets one line for each step.
        backports: packages come from the release's backports, which the system need not know, where they have them.
    """

    def __init__(self, directory: Path, log: Log, *, backports: bool = False) -> None:
        self._directory = directory
        self._log = log
        self._backports = backports
        self._suite: str | None = None
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
        wanted = [] if self._suite is None else ["--target-release", self._suite]
        options = ["-y", "--download-only", "--no-install-recommends", *wanted]
        with self._archives() as archives:
            self._apt("install", *options, *packages, archives=archives)
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
        if self._backports:
            self._add_backports()
        with self._archives() as archives:
            self._apt("update", archives=archives)
        self._fresh = True

    def _add_backports(self) -> None:
        """The system's own list of sources, and one line more: the same archive, with the release's backports."""
        wanted = "$(REPO_URI) $(RELEASE) $(COMPONENT) $(SIGNED_BY)"
        known = _run(["apt-get", "indextargets", "--format", wanted, "Created-By: Packages"]).splitlines()
        line = backports_line(known, _codename())
        if line is None:
            raise AptError(f"no source of packages for {_codename() or 'this release'} is known here")
        self._suite = f"{_codename()}-backports"
        own = _SOURCES.read_text(encoding="utf-8", errors="replace") if _SOURCES.is_file() else ""
        (self._directory / _SOURCES.name).write_text(f"{own}\n{line}\n", encoding="utf-8")

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
        if self._suite is not None:
            options["Dir::Etc::sourcelist"] = self._directory / _SOURCES.name
        (self._directory / "cache").mkdir(parents=True, exist_ok=True)
        flags = [item for key, value in options.items() for item in ("-o", f"{key}={value}")]
        _run(["apt-get", *flags, *arguments], cwd=archives)


def backports_line(targets: Sequence[str], codename: str) -> str | None:
    """A source of `codename`'s backports, at the place that its `main` comes from; None where that is unknown.

    Empty where they are a source already: to name one twice, otherwise signed, is an error of apt's.

    Args:
        targets: lines `URI RELEASE COMPONENT KEYRING` of `apt-get indextargets`; what apt does not know of a source
            it leaves as it was asked for, `$(NAME)`.
        codename: of the release, as /etc/os-release has it.
    """
    if any(target.split()[1:3] == [f"{codename}-backports", "main"] for target in targets):
        return ""
    for target in targets:
        place, release, component, *keyring = target.split()
        if (release, component) == (codename, "main"):
            signed = f"[signed-by={keyring[0]}] " if keyring and keyring[0].startswith("/") else ""
            return f"deb {signed}{place} {codename}-backports main"
    return None


def _codename() -> str:
    with suppress(OSError):
        return platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    return ""


def _run(command: list[str], cwd: Path | None = None) -> str:
    """What it printed. AptError has the end of it where it failed."""
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
    return done.stdout
