"""Instructions that an emulated program executes, counted by a plugin of QEMU: the cost figure that repeats.

Emulated time says nothing about a phone; the number of instructions between two events does not depend on how busy this
machine is. It compares builds and models on one profile, and does not convert to time.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from boa_edge.files import disk_errors
from boa_edge.progress import say
from devices import tools
from devices.paths import PACKAGE, cache_directory

_SOURCE = PACKAGE / "plugin" / "instructions.c"
_FLAGS = ("-shared", "-fPIC", "-O2", "-fvisibility=hidden")


def plugin_for(emulator: Path) -> Path | None:
    """The plugin, built where needed; None where this QEMU takes none (its static builds) or another kind."""
    if "," in str(cache_directory()):  # which QEMU reads as the end of the path
        say("no instructions are counted: the cache's path has a comma in it (BOA_EDGE_CACHE)")
        return None
    plugin = _build()
    return plugin if plugin is not None and _accepts(emulator, plugin) else None


def option(plugin: Path, counts: Path) -> tuple[str, ...]:
    """QEMU's arguments that load the plugin, with the file for its counts."""
    return ("-plugin", f"{plugin},out={counts}")


def read_counts(counts: Path) -> tuple[int, ...] | None:
    """The count at each write to stdout; None where there are none, or the program had several threads."""
    try:
        lines = counts.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    if not lines or not all(line.isdigit() for line in lines):
        return None
    return tuple(map(int, lines))


def _build() -> Path | None:
    compiler = tools.find(tools.HOST)
    if compiler is None:
        return None
    key = hashlib.sha256(" ".join((str(compiler), *_FLAGS)).encode() + _SOURCE.read_bytes()).hexdigest()[:16]
    plugin = cache_directory() / "plugins" / f"instructions-{key}.so"
    if plugin.is_file():
        return plugin
    with disk_errors(plugin):
        plugin.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=plugin.parent) as name:
        made = Path(name) / plugin.name
        command = [str(compiler), "-x", "c", str(_SOURCE), *_FLAGS, "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            say(f"note: instructions are not counted: the plugin cannot be compiled ({reason[:200]})")
            return None
        made.replace(plugin)
    return plugin


@cache
def _accepts(emulator: Path, plugin: Path) -> bool:
    """Whether this QEMU loads the plugin: it then makes its file before it looks for the program."""
    with tempfile.TemporaryDirectory(prefix="boa-edge-") as name:
        counts = Path(name) / "counts"
        command = [str(emulator), *option(plugin, counts), str(Path(name) / "no-program")]
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
        return counts.is_file()
