"""Lower a quantized checkpoint to a runtime. A new one is one package beside this file and one line in EXPORTERS."""

from __future__ import annotations

import contextlib
import difflib
import time
from collections.abc import Iterator
from pathlib import Path

from boa_edge.errors import BoaEdgeError, UsageError
from boa_edge.files import output_directory
from boa_edge.progress import say
from exporters import executorch, onnx
from exporters.base import Activations, Decoder, Exporter, ExportResult, Lowered, Request
from exporters.bundle import Bundle, copy_companions, write_manifest
from toolchain.checkpoint import Checkpoint

__all__ = [
    "EXPORTERS",
    "Activations",
    "Bundle",
    "Decoder",
    "ExportResult",
    "Exporter",
    "Lowered",
    "Request",
    "export",
    "no_lengths",
    "open_decoder",
]

EXPORTERS: dict[str, Exporter] = {"executorch": executorch.EXPORTER, "onnx": onnx.EXPORTER}
_KEPT_FLOAT = (
    "the checkpoint was quantized for int8 activations ({}) and this bundle keeps them in float32, so its figures "
    "differ from the recorded ones (--activations int8 keeps them)"
)
_UNPLANNED = (
    "the checkpoint was quantized for floating-point activations and this bundle rounds them to int8, so its figures "
    "differ from the recorded ones (--activations float32 keeps them; recipes with a8 are made for int8)"
)


def export(
    checkpoint: Path,
    runtime: str,
    output: Path,
    *,
    activations: Activations | None = None,
    form: str | None = None,
    context_length: int | None = None,
    prefill_length: int | None = None,
    overwrite: bool = False,
) -> ExportResult:
    """Lower a quantized checkpoint to a bundle that `runtime` loads (docs/contracts.md, "Bundle").

    Args:
        checkpoint: directory that `quantize` wrote; only its codes are read, never a float weight of a quantized layer.
        runtime: a key of EXPORTERS.
        output: the bundle's directory; whole or absent afterwards.
        activations: precision of the inputs of the quantized linears; None means int8, the fast default.
        form: one of the runtime's forms (`qdq` or `fused` for onnx); None means its default.
        context_length, prefill_length: in tokens, of a program with a cache of its own (executorch); None means its
            default.
        overwrite: replace an existing `output` that a stage has made.

    Raises:
        UsageError: an unknown runtime, activation type or form, lengths that are impossible or not for this runtime, or
            `output` exists.
        BoaEdgeError: the checkpoint is broken, cannot be run fast by the runtime, or the disk is full.
    """
    start = time.monotonic()
    exporter = EXPORTERS.get(runtime)
    if exporter is None:
        close = difflib.get_close_matches(runtime, EXPORTERS, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise UsageError(f"unknown runtime {runtime!r}", fix=f"{hint}Known: {', '.join(sorted(EXPORTERS))}")
    chosen: Activations = activations or "int8"
    if chosen not in ("int8", "float32"):
        raise UsageError(f"unknown activation type {chosen!r}", fix="Known: int8, float32")
    shape = form or exporter.forms[0]
    if shape not in exporter.forms:
        raise UsageError(f"{runtime} has no form {shape!r}", fix=f"Known: {', '.join(exporter.forms)}")
    if not exporter.lengths and (context_length is not None or prefill_length is not None):
        raise no_lengths(runtime)
    request = Request(chosen, shape, context_length, prefill_length)
    source = Checkpoint(checkpoint)
    exporter.check(source, request)
    with output_directory(output, overwrite=overwrite, inputs={"the checkpoint": checkpoint}) as directory:
        with _naming(checkpoint, directory, output):
            lowered = exporter.lower(source, directory, request)
        copy_companions(source, directory)
        manifest = write_manifest(directory, source.recipe)
    notes = (*_of_activations(source, chosen), *lowered.notes)
    for note in notes:
        say(f"note: {note}")
    return ExportResult(
        bundle=output,
        runtime=runtime,
        form=shape,
        activations=chosen,
        size_bytes=sum(entry.size for entry in manifest.files.values() if entry.role == "runtime"),
        quantized_linears=lowered.quantized_linears,
        weight_bytes=lowered.weight_bytes,
        seconds=time.monotonic() - start,
        notes=notes,
    )


def _of_activations(source: Checkpoint, activations: Activations) -> tuple[str, ...]:
    """Where the bundle's are of another kind than those that the checkpoint's figures stand for."""
    plan = source.activations
    if plan is None or plan.format.scheme == "float":
        return (_UNPLANNED,) if activations == "int8" else ()
    return (_KEPT_FLOAT.format(plan.format.scheme),) if activations == "float32" else ()


@contextlib.contextmanager
def _naming(checkpoint: Path, directory: Path, output: Path) -> Iterator[None]:
    """Errors of files below `directory`, which nobody will see, name the checkpoint that these were made of."""
    try:
        yield
    except BoaEdgeError as error:
        where = Path(error.where) if isinstance(error.where, str | Path) else None
        if where is None or not where.is_relative_to(directory):
            raise
        what = f"the {where.relative_to(directory)} made of it: {error.what}".replace(str(directory), str(output))
        raise type(error)(what, where=checkpoint, fix=error.fix) from error


def no_lengths(runtime: str) -> UsageError:
    """For lengths that were given to a runtime whose programs have none."""
    return UsageError(f"{runtime} takes no --context and no --prefill: its graph bounds neither", fix="Leave them out")


def open_decoder(bundle: Bundle) -> Decoder:
    """A checked bundle, ready to run on the host.

    Raises:
        BoaEdgeError: nobody knows its runtime, or the runtime refuses its program.
    """
    exporter = EXPORTERS.get(bundle.runtime.runtime)
    if exporter is None:
        problem = f"is a bundle for {bundle.runtime.runtime!r}"
        raise BoaEdgeError(problem, where=bundle.path, fix=f"Known: {', '.join(sorted(EXPORTERS))}")
    return exporter.open(bundle)
