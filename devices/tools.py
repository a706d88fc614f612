"""The programs of the system that the devices need: where they are, and how they get here.

A program on PATH is always preferred. Otherwise it stands below the cache directory, unpacked without root, behind a
small wrapper that points it at its own files.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from boa_edge.errors import BoaEdgeError
from boa_edge.progress import say
from devices import apt
from devices.locks import only_one
from devices.paths import cache_directory


@dataclass(frozen=True)
class Tool:
    """A program and the Debian package that carries it.

    Attributes:
        key: our name for it, and its directory in the cache.
        programs: names on PATH, best first; the first is what the package carries.
        package: what to install.
        purpose: for messages.
        target: where the program stands in the unpacked package, if not `usr/bin/PROGRAM`.
        arguments: words that the unpacked program needs first; `$root` is where it was unpacked.
        environment: variables likewise.
        files: further files below `$root`, for what the package's own scripts would have set up.
        private: unpacked below the cache even by root, whatever the system has.
        backports: the package may be in the release's backports only.
    """

    key: str
    programs: tuple[str, ...]
    package: str
    purpose: str
    target: str = ""
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    private: bool = False
    backports: bool = False


_FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
  <dir prefix="relative">usr/share/fonts</dir>
  <dir>/usr/share/fonts</dir>
  <cachedir prefix="xdg">fontconfig</cachedir>
</fontconfig>
"""

QEMU = Tool(
    "qemu",
    ("qemu-aarch64", "qemu-aarch64-static"),
    "qemu-user",
    "the ARM64 emulator",
    arguments=("-U", "LD_LIBRARY_PATH"),  # the emulator's libraries are not the guest's
)
CROSS = Tool(
    "cross",
    ("aarch64-linux-gnu-g++",),
    "g++-aarch64-linux-gnu",
    "the ARM64 C++ compiler and C library",
    arguments=("--sysroot=$root",),
)
HOST = Tool("host", ("g++", "c++", "clang++"), "g++", "the C++ compiler", arguments=("--sysroot=$root",))
ADB = Tool("adb", ("adb",), "adb", "the client for Android devices")
SSH = Tool("ssh", ("ssh",), "openssh-client", "the client for ARM boards")
# Never installed for the whole machine: its package would start a server there.
SSHD = Tool(
    "sshd",
    ("boa-edge-sshd",),
    "openssh-server",
    "the server that the tests of ssh devices log in to",
    target="usr/sbin/sshd",
    private=True,
)
# Never installed either: its users are not asked for a password. Debian 12 has it in its backports.
ADBD = Tool(
    "adbd",
    ("boa-edge-adbd",),
    "adbd",
    "Android's own daemon, for the tests",
    target="usr/lib/android-sdk/platform-tools/adbd",
    private=True,
    backports=True,
)
# Android's commands and shell, as Debian packages them.
TOYBOX = Tool("toybox", ("toybox",), "toybox", "Android's commands, for the tests")
MKSH = Tool("mksh", ("mksh",), "mksh", "Android's shell, for the tests", target="bin/mksh")
CHROMIUM = Tool(
    "chromium",
    ("chromium", "chromium-browser", "google-chrome"),
    "chromium",
    "the browser that the tests open the report in",
    target="usr/lib/chromium/chromium",
    environment=(("FONTCONFIG_FILE", "$root/fonts.conf"),),
    files=(("fonts.conf", _FONTS),),
)

SETUP_TOOLS = (HOST, CROSS, QEMU, ADB, SSH)
TEST_TOOLS = (CHROMIUM, SSHD, TOYBOX, MKSH, ADBD)


def system_directory() -> Path:
    """Where unpacked packages stand: one directory for each tool."""
    return cache_directory() / "system"


def find(tool: Tool) -> Path | None:
    """The program, or None where it has to be set up."""
    for program in tool.programs:
        if found := shutil.which(program):
            return Path(found)
    wrapper = system_directory() / tool.key / "bin" / tool.programs[0]
    return wrapper if wrapper.is_file() else None


def require(tool: Tool) -> Path:
    """The program. BoaEdgeError where it is missing."""
    found = find(tool)
    if found is None:
        raise BoaEdgeError(f"{tool.programs[0]} ({tool.purpose}) is missing", fix="Run `make setup`")
    return found


def provide(tools: Sequence[Tool]) -> None:
    """Make every tool available. BoaEdgeError names the packages to ask for where that cannot be done."""
    missing = [tool for tool in tools if find(tool) is None]
    if not missing:
        return
    packages = [tool.package for tool in missing]
    ask = f"Ask the administrator for: apt-get install {' '.join(packages)}"
    if not apt.available():
        names = ", ".join(f"{tool.programs[0]} ({tool.purpose})" for tool in missing)
        raise BoaEdgeError(f"{names}: not on PATH, and this machine has no apt-get to fetch them with", fix=ask)
    reasons = []
    installable = [tool.package for tool in missing if not tool.private]
    if apt.is_root() and installable:
        try:
            apt.install(installable, say)
            missing = [tool for tool in missing if find(tool) is None]
        except apt.AptError as error:
            reasons.append(f"apt-get install: {error}")
    if missing:
        try:
            _unpack(missing)
        except (apt.AptError, OSError) as error:
            reasons.append(f"unpacking without root: {error}")
    if any(find(tool) is None for tool in tools):
        raise BoaEdgeError(f"system packages cannot be set up ({'; '.join(reasons)})", fix=ask)


def _unpack(tools: Sequence[Tool]) -> None:
    base = system_directory()
    base.mkdir(parents=True, exist_ok=True)
    for backports in (False, True):
        wanted = [tool for tool in tools if tool.backports == backports]
        if not wanted:
            continue
        with only_one(base / ".lock"), apt.PrivateApt(base / ".apt", say, backports=backports) as private:
            for tool in wanted:
                if find(tool) is None:  # else somebody was faster
                    _unpack_one(tool, base, private)


def _unpack_one(tool: Tool, base: Path, private: apt.PrivateApt) -> None:
    partial = base / f".{tool.key}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    private.unpack([tool.package], partial / "root")
    _adopt_system_libraries(partial / "root")
    _write_wrapper(tool, partial)
    shutil.rmtree(base / tool.key, ignore_errors=True)
    partial.rename(base / tool.key)


def _adopt_system_libraries(root: Path) -> None:
    """Link what unpacked linker scripts name and only the system has: with --sysroot, ld looks nowhere else."""
    for script in root.glob("usr/lib/*/lib*.so"):
        if script.is_symlink() or script.stat().st_size > 4096:
            continue
        for word in script.read_text(encoding="utf-8", errors="replace").split():
            if not word.startswith("/") or word.startswith("/*"):
                continue
            here, there = root / word.lstrip("/"), Path(word)
            if not here.exists() and there.exists():
                here.parent.mkdir(parents=True, exist_ok=True)
                here.symlink_to(there)


def _library_directories(root: Path) -> list[str]:
    """Directories below `root` with shared libraries of the host, relative to it."""
    found = []
    for pattern in ("lib/*-linux-gnu*", "usr/lib/*-linux-gnu*", "usr/lib/*-linux-gnu*/*"):
        for directory in sorted(root.glob(pattern)):
            if directory.is_dir() and any(directory.glob("lib*.so*")):
                found.append(str(directory.relative_to(root)))
    return found


def _write_wrapper(tool: Tool, directory: Path) -> None:
    root = directory / "root"
    program = tool.target or f"usr/bin/{tool.programs[0]}"
    if not (root / program).exists():
        raise apt.AptError(f"package {tool.package} does not carry {program}")
    for name, content in tool.files:
        (root / name).write_text(content, encoding="utf-8")
    libraries = ":".join(f"$root/{item}" for item in _library_directories(root))
    lines = [
        "#!/bin/sh",
        f"# {tool.package}, unpacked without root.",
        'root=$(CDPATH= cd -- "$(dirname -- "$0")/../root" && pwd) || exit 1',
        f'export LD_LIBRARY_PATH="{libraries}"' if libraries else "",
        'export PATH="$root/usr/bin:$PATH"',
        *(f'export {name}="{value}"' for name, value in tool.environment),
        " ".join(['exec "$root"/' + shlex.quote(program), *(f'"{word}"' for word in tool.arguments), '"$@"']),
    ]
    wrapper = directory / "bin" / tool.programs[0]
    wrapper.parent.mkdir()
    wrapper.write_text("\n".join(line for line in lines if line) + "\n", encoding="utf-8")
    wrapper.chmod(0o755)
