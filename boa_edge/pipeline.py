"""All stages in a row, each in a directory of its own; a stage that is finished for the same request is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from boa_edge import __version__
from boa_edge.errors import UsageError
from boa_edge.files import as_input, check_output, check_writable, disk_errors, sha256_file, write_text
from boa_edge.progress import say
from devices import open_device
from exporters import EXPORTERS, export, no_lengths
from exporters.base import Activations, Request
from runtime_tests import Wishes, measure_together, print_summary
from toolchain.accelerator import find_accelerator
from toolchain.loading import describe_source
from toolchain.quantize import quantize
from toolchain.recipe import DEFAULT_RECIPE, Recipe, load_recipe

ALL = "all"
"""In place of a runtime: a bundle for each, from one checkpoint, in one report."""

_FIRST = "onnx"  # whose report the others stand in
_RECORDS = ("provenance.json", "manifest.json")
_END = 1 << 20


def run_all(
    output: Path,
    *,
    model: str,
    recipe: str,
    runtime: str,
    device: str,
    calibration: str | None,
    compare: tuple[str, ...],
    activations: Activations | None,
    form: str | None = None,
    context_length: int | None = None,
    prefill_length: int | None = None,
    accelerator: str | None = None,
) -> dict[str, Any]:
    """quantize, export and measure. Raises what they raise; what can be known to fail is checked before any work.

    The lengths are for the runtimes whose programs have a cache of their own (executorch).
    """
    chosen = load_recipe(recipe)
    runtimes = _runtimes(runtime, form)
    lengths = {"context_length": context_length, "prefill_length": prefill_length}
    if not any(EXPORTERS[name].lengths for name, _ in runtimes.values()) and any(lengths.values()):
        raise no_lengths(runtime)
    _foresee(chosen, model, runtimes, activations, lengths)
    find_accelerator(accelerator)
    checkpoint, report = output / "checkpoint", output / "report"
    bundles = [output / name for name in runtimes]
    inputs = {
        "the model": None if model == "default" else as_input(model),
        "the recipe": as_input(recipe),
        "the calibration text": as_input(calibration),
        "the device's profile": as_input(device),
    }
    check_writable(output, "-o")
    for place in (checkpoint, *bundles, report):
        check_output(place, overwrite=True, inputs=inputs)
    status = open_device(device).status()
    if not status.usable:  # it may be plugged in by then, and finished stages are kept
        say(f"note: device {device} cannot be used now, and measuring will need it: {'; '.join(status.missing)}")
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    quantizing = {
        "model": _identity(model),
        "recipe": chosen.effective(),
        "calibration": _identity(calibration or "self"),
        "compare": compare,
        "accelerator": accelerator or "cpu",
        "version": __version__,
    }
    _stage(
        output,
        checkpoint,
        quantizing,
        lambda: quantize(
            model,
            checkpoint,
            recipe=chosen,
            calibration=calibration,
            compare=compare,
            overwrite=True,
            accelerator=accelerator,
        ).as_dict(),
    )
    for bundle, (name, shape) in zip(bundles, runtimes.values(), strict=True):
        own = lengths if EXPORTERS[name].lengths else {}
        exporting = {**quantizing, "runtime": name, "activations": activations, "form": shape, **own}
        exporting["checkpoint"] = _made(checkpoint)
        _stage(
            output,
            bundle,
            exporting,
            partial(_export, checkpoint, name, bundle, activations=activations, form=shape, **own),
        )
    # Measurements are made anew each time: the device is not part of the request.
    results = measure_together(bundles, device, report, Wishes(), overwrite=True)
    for result in results:
        print_summary(result)
    say(f"report: {report / 'report.html'}")
    made = {"bundle": str(bundles[0])} if len(bundles) == 1 else {"bundles": [str(bundle) for bundle in bundles]}
    return {"output": str(output), "checkpoint": str(checkpoint), **made, **results[0].summary()}


def default_recipe(runtime: str) -> str:
    """Of a run that names none: the runtime's own; one checkpoint for all of them gets the general one."""
    exporter = EXPORTERS.get(runtime)
    return DEFAULT_RECIPE if exporter is None else exporter.recipe


def _runtimes(runtime: str, form: str | None) -> dict[str, tuple[str, str | None]]:
    """What is to be exported: directory of the bundle -> runtime and form. UsageError where there is no such thing."""
    if runtime == ALL:
        if form is not None:
            raise UsageError(f"{form!r} is a form of one runtime", where="--form", fix=f"Leave it out with {ALL}")
        return {f"bundle-{name}": (name, None) for name in sorted(EXPORTERS, key=lambda name: (name != _FIRST, name))}
    if runtime not in EXPORTERS:
        accepted = ", ".join((*sorted(EXPORTERS), ALL))
        raise UsageError(f"unknown runtime {runtime!r}", where="--runtime", fix=f"Accepted: {accepted}")
    forms = EXPORTERS[runtime].forms
    if form is not None and form not in forms:
        raise UsageError(f"{runtime} has no form {form!r}", where="--form", fix=f"Accepted: {', '.join(forms)}")
    return {"bundle": (runtime, form)}


def _foresee(
    recipe: Recipe,
    model: str,
    runtimes: dict[str, tuple[str, str | None]],
    activations: Activations | None,
    lengths: dict[str, int | None],
) -> None:
    """UsageError for what no export could hold, before hours of quantizing."""
    # A GGUF file's metadata takes seconds to read; what is asked of every model without lengths can wait for the load.
    spec = describe_source(model) if Path(model).expanduser().is_dir() or any(lengths.values()) else None
    for runtime, form in runtimes.values():
        exporter = EXPORTERS[runtime]
        own = lengths if exporter.lengths else {}
        exporter.foresee(recipe, spec, Request(activations or "int8", form or exporter.forms[0], **own))


def _export(checkpoint: Path, runtime: str, bundle: Path, **choices: Any) -> dict[str, Any]:
    return export(checkpoint, runtime, bundle, overwrite=True, **choices).as_dict()


def _identity(name: str) -> dict[str, Any]:
    """What a path's content is known by without reading all of it; a name that is no path is known by itself."""
    path = Path(name).expanduser()
    if path.is_file():
        return {"name": name, "sha256": sha256_file(path)}
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        return {"name": name, "files": [[file.name, *_sketch(file)] for file in files]}
    return {"name": name}


def _sketch(file: Path) -> tuple[int, int, str]:
    """Size, time of the last change, and a hash of a file's two ends, between which weights of gigabytes may lie."""
    status = file.stat()
    with file.open("rb") as stream:
        ends = stream.read(_END)
        stream.seek(max(status.st_size - _END, len(ends)))
        ends += stream.read(_END)
    return status.st_size, status.st_mtime_ns, hashlib.sha256(ends).hexdigest()


def _stage(output: Path, target: Path, request: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
    """Do `work` unless `target` was made by the same request, and nobody has put something else there since."""
    digest = hashlib.sha256(json.dumps(request, sort_keys=True, default=str).encode()).hexdigest()
    stamp = output / f".request-{target.name}"
    if target.is_dir() and stamp.is_file() and stamp.read_bytes() == f"{digest} {_made(target)}".encode():
        say(f"{target}: made by the same request, kept")
        return
    stamp.unlink(missing_ok=True)
    work()
    write_text(stamp, f"{digest} {_made(target)}")


def _made(target: Path) -> str:
    """What a stage's directory is known by: its files' sizes, and the record of how they were made."""
    files = sorted(file for file in target.rglob("*") if file.is_file())
    records = [sha256_file(file) for name in _RECORDS if (file := target / name).is_file()]
    listed = [[file.relative_to(target).as_posix(), file.stat().st_size] for file in files]
    return hashlib.sha256(json.dumps([records, listed]).encode()).hexdigest()
