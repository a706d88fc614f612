"""What every runtime's export function takes and gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from toolchain.checkpoint import Checkpoint

Activations = Literal["int8", "float32"]


@dataclass(frozen=True)
class Lowered:
    """What a runtime's exporter says about the files it has written.

    Attributes:
        quantized_linears: linears that stand as integer codes in the runtime's file, the head among them.
        weight_bytes: bytes of every weight as stored: codes, scales, zero points and float parameters.
        notes: things the user should know, one line each (a file that is not smaller, a slower kernel).
    """

    quantized_linears: int
    weight_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportResult:
    """A finished bundle.

    Attributes:
        bundle: the directory.
        runtime: the runtime that it is for.
        form: which of the runtime's forms it has.
        activations: `int8` or `float32`, the precision of the inputs of the quantized linears.
        size_bytes: sum of the sizes of the files that are needed to run (role `runtime` in the manifest).
        quantized_linears, weight_bytes, notes: see `Lowered`.
        seconds: wall time of the export.
    """

    bundle: Path
    runtime: str
    form: str
    activations: Activations
    size_bytes: int
    quantized_linears: int
    weight_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "bundle": str(self.bundle),
            "runtime": self.runtime,
            "form": self.form,
            "activations": self.activations,
            "size_bytes": self.size_bytes,
            "quantized_linears": self.quantized_linears,
            "weight_bytes": self.weight_bytes,
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Exporter:
    """One line of the table in `exporters`.

    Attributes:
        check: refuses, before any heavy work, what the runtime cannot hold or run fast; raises BoaEdgeError.
        lower: writes the model files and `runtime.json` into an empty directory, and proves that they load.
        forms: what `check` and `lower` know as the last argument, the default first.
    """

    check: Callable[[Checkpoint, Activations, str], None]
    lower: Callable[[Checkpoint, Path, Activations, str], Lowered]
    forms: tuple[str, ...]
