"""An ARM64 device under QEMU user emulation, as its profile describes it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from boa_edge.errors import BoaEdgeError
from boa_edge.files import disk_errors
from devices import instructions, tools
from devices.binaries import LOADER, Target
from devices.contract import Execution
from devices.fake_files import fake_files
from devices.local import host_facts
from devices.profile import Cpu, Profile
from devices.workplace import LocalWorkplace, local_directory


class QemuTransport:
    """Runs ARM64 programs here, one process at a time, with the profile's CPU and its `/proc` and `/sys` files."""

    execution: Execution = "emulated"
    known_execution: Execution | None = "emulated"
    target: Target = "aarch64"

    def __init__(self, profile: Profile) -> None:
        if profile.cpu is None:
            raise BoaEdgeError("an emulated device needs a [cpu] table", where=f"device {profile.name}")
        self._profile = profile
        self._cpu: Cpu = profile.cpu

    def missing(self) -> tuple[str, ...]:
        emulator = tools.find(tools.QEMU)
        if emulator is None:
            return (f"{tools.QEMU.programs[0]} ({tools.QEMU.purpose}; Debian package {tools.QEMU.package})",)
        if _choose_cpu(emulator, self._cpu) is None:
            return (f"an emulator that knows CPU {' or '.join(self._cpu.qemu)} (found {_version(emulator)})",)
        return ()

    def problem(self) -> str | None:
        return None

    def notes(self) -> tuple[str, ...]:
        return ()

    def recover(self) -> None:
        """A process of this machine is not lost."""

    def fingerprint(self) -> dict[str, Any]:
        emulator = tools.require(tools.QEMU)
        chosen = _choose_cpu(emulator, self._cpu)
        return {
            "cpu": chosen,
            "cpu_as_profiled": chosen == self._cpu.qemu[0],
            "machine": "aarch64",
            "cores": self._cpu.cores,
            "midr": f"0x{self._cpu.midr:08x}",
            "features": list(self._cpu.features),
            "emulator": _version(emulator),
            "host": host_facts(),
        }

    @contextmanager
    def open(self) -> Iterator[QemuWorkplace]:
        emulator = tools.require(tools.QEMU)
        chosen = _choose_cpu(emulator, self._cpu)
        if chosen is None:
            raise BoaEdgeError(
                f"{_version(emulator)} emulates none of: {', '.join(self._cpu.qemu)}",
                where=f"device {self._profile.name}",
                fix="Install a newer QEMU or name another CPU in the profile",
            )
        with local_directory() as directory:
            prefix = directory / "prefix"
            with disk_errors(directory):
                for name, content in fake_files(self._cpu).items():
                    (prefix / name).parent.mkdir(parents=True, exist_ok=True)
                    (prefix / name).write_text(content, encoding="ascii")
                (directory / "files").mkdir()
            emulate = (str(emulator), "-cpu", chosen, "-L", str(prefix))
            yield QemuWorkplace(directory / "files", emulate, instructions.plugin_for(emulator))


class QemuWorkplace(LocalWorkplace):
    """A directory here whose programs run under the emulator, with the C library that was pushed along."""

    def __init__(self, directory: Path, emulate: tuple[str, ...], plugin: Path | None = None) -> None:
        super().__init__(directory)
        self._emulate = emulate
        self._counts = directory.parent / "instructions"
        self._plugin = () if plugin is None else instructions.option(plugin, self._counts)

    def command(self, program: str, arguments: Sequence[str]) -> tuple[str, ...]:
        loader = (self.path(LOADER), "--library-path", str(self.directory))
        return (*self._emulate, *self._plugin, *loader, self.path(program), *arguments)

    def instructions(self) -> tuple[int, ...] | None:
        return instructions.read_counts(self._counts) if self._plugin else None


def _choose_cpu(emulator: Path, cpu: Cpu) -> str | None:
    known = _known_cpus(emulator)
    return next((choice for choice in cpu.qemu if choice.split(",")[0] in known), None)


@cache
def _known_cpus(emulator: Path) -> frozenset[str]:
    return frozenset(re.findall(r"^\s+(\S+)\s*$", _ask(emulator, "-cpu", "help"), re.MULTILINE))


@cache
def _version(emulator: Path) -> str:
    first = _ask(emulator, "--version").partition("\n")[0]
    return first.strip() or "an emulator that does not tell its version"


def _ask(emulator: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            [str(emulator), *arguments], capture_output=True, text=True, errors="replace", check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BoaEdgeError(f"the emulator does not start ({error})", where=emulator, fix="Run `make setup`") from error
    # `-cpu help` exits with 0 or 1, depending on QEMU's version.
    return done.stdout
