"""What is put on a device to run a bundle: the runner, its runtime's library and, for ARM64, a C library to go with it.

A device needs nothing of its own: the dynamic loader and glibc travel along, so the same files run under QEMU and on
any 64-bit ARM Linux kernel.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from boa_edge.errors import BoaEdgeError
from boa_edge.files import disk_errors
from boa_edge.progress import say
from devices import executorch_library, onnxruntime_library, tools
from devices.paths import RUNNER_SOURCES, cache_directory
from devices.wheel import Wheel

Target = Literal["host", "aarch64"]

LOADER = "ld-linux-aarch64.so.1"
# What the runtimes' libraries and the runners name as needed.
_C_LIBRARY = (
    "libc.so.6",
    "libm.so.6",
    "libdl.so.2",
    "librt.so.1",
    "libpthread.so.0",
    "libgcc_s.so.1",
    "libstdc++.so.6",
)
_FLAGS = ("-Wall", "-Wextra", "-Wno-psabi", "-Wl,-rpath,$ORIGIN")


@dataclass(frozen=True)
class Runner:
    """A native program for one runtime.

    Attributes:
        runtime: the `runtime` of a bundle's runtime.json.
        program: the name of the executable.
        sources: its files in devices/runner; every header there counts as its source too.
        wheel: where the runtime's libraries come from.
        flags: what it is compiled and linked with, given the directory of those libraries.
    """

    runtime: str
    program: str
    sources: tuple[str, ...]
    wheel: Wheel
    flags: Callable[[Path], tuple[str, ...]]


RUNNERS = {
    "onnx": Runner(
        "onnx", "boa-edge-runner-onnx", ("onnx_runner.cpp",), onnxruntime_library.WHEEL, onnxruntime_library.flags
    ),
    "executorch": Runner(
        "executorch",
        "boa-edge-runner-executorch",
        ("executorch_runner.cpp", "llama_kernels.cpp"),
        executorch_library.WHEEL,
        executorch_library.flags,
    ),
}


def runner_for(runtime: str) -> Runner:
    """The runner of a bundle's runtime. BoaEdgeError where there is none."""
    if runtime not in RUNNERS:
        raise BoaEdgeError(f"there is no runner for runtime {runtime!r}", fix=f"Known: {', '.join(RUNNERS)}")
    return RUNNERS[runtime]


def missing(target: Target, runtime: str | None = None) -> tuple[str, ...]:
    """What a device of this target lacks here, in words; the runners themselves are built when they are first used.

    Args:
        target: which binaries the device runs.
        runtime: the only one that counts; None for all.
    """
    lacks = []
    compiler = tools.CROSS if target == "aarch64" else tools.HOST
    if tools.find(compiler) is None:
        lacks.append(f"{compiler.programs[0]} ({compiler.purpose}; Debian package {compiler.package})")
    for runner in RUNNERS.values() if runtime is None else [runner_for(runtime)]:
        wheel = runner.wheel
        if _libraries(runner, target) is None:
            what = "the ARM64" if target == "aarch64" else "the native"
            lacks.append(
                f"{what} {'libraries' if len(wheel.names) > 1 else 'library'} of {wheel.package} {wheel.version()}"
            )
    return tuple(lacks)


def files_for(runner: Runner, target: Target) -> dict[str, Path]:
    """Name on the device -> local file of everything a run needs besides the model; builds the runner where needed."""
    files = {runner.program: build(runner, target), **_require_libraries(runner, target)}
    if target == "aarch64":
        files |= _c_library()
    return files


def _libraries(runner: Runner, target: Target) -> dict[str, Path] | None:
    return runner.wheel.arm64() if target == "aarch64" else runner.wheel.host()


def _require_libraries(runner: Runner, target: Target) -> dict[str, Path]:
    found = _libraries(runner, target)
    if found is None:
        raise BoaEdgeError(f"{runner.wheel.title}'s native libraries for {target} are missing", fix="Run `make setup`")
    return found


def build(runner: Runner, target: Target) -> Path:
    """Compile the runner unless these sources were already built by this compiler; the path of the program."""
    compiler = tools.require(tools.CROSS if target == "aarch64" else tools.HOST)
    flags = (*_FLAGS, *runner.flags(next(iter(_require_libraries(runner, target).values())).parent))
    directory = cache_directory() / "runners" / f"{runner.runtime}-{target}-{_build_key(runner, compiler, flags)}"
    program = directory / runner.program
    if program.is_file():
        return program
    say(f"building {runner.program} for {target}")
    with disk_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=directory.parent) as name:
        ready = Path(name) / "ready"
        ready.mkdir()
        sources = [str(RUNNER_SOURCES / source) for source in runner.sources]
        # Sources before flags: a linker takes from a library only what was asked for before it.
        _compile([str(compiler), *sources, "-o", str(ready / runner.program), *flags])
        try:
            ready.rename(directory)
        except OSError:
            if not program.is_file():  # else another process built the same one
                raise
    return program


def _build_key(runner: Runner, compiler: Path, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for part in (*flags, _output([str(compiler), "--version"])):
        digest.update(part.encode() + b"\0")
    for source in [*(RUNNER_SOURCES / name for name in runner.sources), *sorted(RUNNER_SOURCES.glob("*.h"))]:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise BoaEdgeError(f"the runner cannot be compiled ({'; '.join(lines[:3])})", where=command[0])


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise BoaEdgeError(f"exited with {done.returncode}: {done.stderr.strip()[:300]}", where=" ".join(command))
    return done.stdout


def _c_library() -> dict[str, Path]:
    """The ARM64 loader and C library that came with the cross compiler."""
    compiler = tools.require(tools.CROSS)
    files = {}
    for name in (LOADER, *_C_LIBRARY):
        path = Path(_output([str(compiler), f"-print-file-name={name}"]).strip())
        if not path.is_absolute() or not path.is_file():  # gcc echoes a name it cannot find
            raise BoaEdgeError(
                f"the cross compiler has no {name}", where=compiler, fix=f"Install {tools.CROSS.package} completely"
            )
        files[name] = path.resolve()
    return files
