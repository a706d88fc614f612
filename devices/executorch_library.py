"""ExecuTorch's native libraries and headers, as its Python wheel carries them.

The wheels of all platforms of a version have the same headers, so the installed one's serve for 64-bit ARM too.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path, PurePosixPath

from boa_edge.errors import BoaEdgeError
from devices.wheel import Wheel

# The runtime itself, then what registers itself with it: nothing refers to a kernel by name.
_LINKED = (
    "executorch",
    "executorch_kernels_optimized",
    "executorch_kernels_quantized",
    "executorch_backend_xnnpack",
    "executorch_threadpool",
    "executorch_etdump",
)
_NAMES = tuple(f"lib{name}.so" for name in _LINKED)


def _name_of(path: PurePosixPath) -> str | None:
    return path.name if path.name in _NAMES and path.parent == PurePosixPath("executorch/lib") else None


WHEEL = Wheel("executorch", "ExecuTorch", _NAMES, _name_of)


def flags(libraries: Path) -> tuple[str, ...]:
    """What the runner is compiled and linked with. `libraries`: the directory of the target's libraries.

    The C++ library stays shared: the runner and ExecuTorch's libraries pass objects of it to each other.
    """
    headers = _headers()
    portable = headers / "executorch" / "runtime" / "core" / "portable_type" / "c10"
    return (
        *("-std=c++17", "-O3", "-DNDEBUG", "-ffp-contract=fast"),
        # What ExecuTorch's own build passes to programs that use its headers.
        *("-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_USE_THREADPOOL", "-DET_EVENT_TRACER_ENABLED"),
        f'-DBOA_EDGE_RUNTIME_VERSION="{WHEEL.version()}"',
        *("-isystem", str(headers), "-isystem", str(portable)),
        *("-Wl,--no-as-needed", f"-L{libraries}", *(f"-l{name}" for name in _LINKED)),
    )


def _headers() -> Path:
    wanted = PurePosixPath("executorch/include/executorch/runtime/executor/method.h")
    WHEEL.version()  # says so where the package is missing
    for file in importlib.metadata.files("executorch") or []:
        if PurePosixPath(file) == wanted:
            path = Path(str(file.locate()))
            if path.is_file():
                return path.parents[3]
    raise BoaEdgeError(
        "the installed wheel has no C++ headers", where=f"executorch {WHEEL.version()}", fix="Run `make setup`"
    )
