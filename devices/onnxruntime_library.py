"""ONNX Runtime's native library, as its Python wheel carries it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from devices.wheel import Wheel

NAME = "libonnxruntime.so"


def _name_of(path: PurePosixPath) -> str | None:
    return NAME if path.name.startswith(f"{NAME}.") else None


WHEEL = Wheel("onnxruntime", "ONNX Runtime", (NAME,), _name_of)


def version() -> str:
    """Version of the installed onnxruntime package."""
    return WHEEL.version()


def flags(libraries: Path) -> tuple[str, ...]:
    """The runner opens the library when it runs, so nothing of it is needed to build."""
    return ("-std=c++17", "-O2", "-static-libstdc++", "-static-libgcc", "-ldl")
