"""What every runtime's export function takes and gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from exporters.bundle import Bundle
from toolchain.checkpoint import Checkpoint
from toolchain.families import DecoderSpec
from toolchain.recipe import DEFAULT_RECIPE, Recipe

Activations = Literal["int8", "float32"]


class Decoder(Protocol):
    """A bundle's program, running on the host."""

    def logits(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """tokens int64 [batch, length] -> logits float32 [batch, length, vocabulary]."""

    def greedy(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """The `new_tokens` most likely ids after `prompt`, one after the other, none of them treated as an end."""


@dataclass(frozen=True)
class Request:
    """What the user wants of an export.

    Attributes:
        activations: precision of the inputs of the quantized linears.
        form: one of the exporter's forms.
        context_length, prefill_length: how many tokens the program's cache holds, and how many one call takes at most;
            None means the exporter's default. Only for exporters with `lengths`.
    """

    activations: Activations
    form: str
    context_length: int | None = None
    prefill_length: int | None = None


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
        foresee: refuses, before anything is quantized, a recipe whose every checkpoint `check` would refuse, and such a
            model where it is known; raises UsageError.
        check: refuses, before any heavy work, what the runtime cannot hold or run fast; raises BoaEdgeError.
        lower: writes the model files and `runtime.json` into an empty directory, and proves that they load.
        forms: what a request may name, the default first.
        open: a checked bundle -> its program on the host; raises BoaEdgeError where the runtime refuses it.
        lengths: whether a request may set the context's and the prefill's length.
        recipe: which a run takes that names none: activations as the runtime quantizes them.
    """

    foresee: Callable[[Recipe, DecoderSpec | None, Request], None]
    check: Callable[[Checkpoint, Request], None]
    lower: Callable[[Checkpoint, Path, Request], Lowered]
    forms: tuple[str, ...]
    open: Callable[[Bundle], Decoder]
    lengths: bool = False
    recipe: str = DEFAULT_RECIPE
