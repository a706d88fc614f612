"""All stages in a row, each in a directory of its own; a stage that is finished for the same request is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from boa_edge import __version__
from boa_edge.errors import UsageError
from boa_edge.files import disk_errors, sha256_file, write_text
from boa_edge.progress import say
from devices import open_device
from exporters import EXPORTERS, export
from exporters.base import Activations
from runtime_tests import measure, print_summary
from toolchain.quantize import quantize
from toolchain.recipe import load_recipe


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
) -> dict[str, Any]:
    """quantize, export and measure. Raises what they raise; what can be known to fail is checked before any work."""
    chosen = load_recipe(recipe)
    if runtime not in EXPORTERS:
        raise UsageError(f"unknown runtime {runtime!r}", where="--runtime", fix=f"Accepted: {', '.join(EXPORTERS)}")
    forms = EXPORTERS[runtime].forms
    if form is not None and form not in forms:
        raise UsageError(f"{runtime} has no form {form!r}", where="--form", fix=f"Accepted: {', '.join(forms)}")
    open_device(device)
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    quantizing = {
        "model": _identity(model),
        "recipe": chosen.model_dump(),
        "calibration": _identity(calibration or "self"),
        "compare": compare,
        "version": __version__,
    }
    checkpoint, bundle, report = output / "checkpoint", output / "bundle", output / "report"
    _stage(
        output,
        checkpoint,
        quantizing,
        lambda: quantize(
            model, checkpoint, recipe=chosen, calibration=calibration, compare=compare, overwrite=True
        ).as_dict(),
    )
    exporting = {**quantizing, "runtime": runtime, "activations": activations, "form": form}
    _stage(
        output,
        bundle,
        exporting,
        lambda: export(checkpoint, runtime, bundle, activations=activations, form=form, overwrite=True).as_dict(),
    )
    # Measurements are made anew each time: the device is not part of the request.
    result = measure(bundle, device, report, overwrite=True)
    print_summary(result)
    say(f"report: {report / 'report.html'}")
    return {"output": str(output), "checkpoint": str(checkpoint), "bundle": str(bundle), **result.summary()}


def _identity(name: str) -> dict[str, Any]:
    """What a path's content is known by without reading all of it; a name that is no path is known by itself."""
    path = Path(name).expanduser()
    if path.is_file():
        return {"name": name, "sha256": sha256_file(path)}
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        return {"name": name, "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]}
    return {"name": name}


def _stage(output: Path, target: Path, request: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
    """Do `work` unless `target` was made by the same request."""
    digest = hashlib.sha256(json.dumps(request, sort_keys=True, default=str).encode()).hexdigest()
    stamp = output / f".request-{target.name}"
    if target.is_dir() and stamp.is_file() and stamp.read_bytes() == digest.encode():
        say(f"{target}: made by the same request, kept")
        return
    stamp.unlink(missing_ok=True)
    work()
    write_text(stamp, digest)
