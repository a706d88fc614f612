"""What a device needs to know of a bundle, read from its `runtime.json` and `manifest.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boa_edge.errors import BoaEdgeError
from boa_edge.files import read_json, sha256_file

# Of each runtime; the first is meant where a bundle names none.
_FORMS = {"onnx": ("qdq", "fused", "fused-int8"), "executorch": ("llm",)}


@dataclass(frozen=True)
class Program:
    """A bundle's program.

    Attributes:
        runtime: which runner executes it.
        form: which inputs it takes: `qdq`, `fused` (also `fused-int8`) or `llm` (docs/contracts.md).
        model: name of the model's file; the others stand beside it.
        files: names of the files that must be on the device.
        session_config: settings for the runtime, as text.
        context_length: the most positions that the model, or its program's own cache, has.
        prefill_length: the most tokens that one call takes; None where there is no limit but the context.
        vocab_size: token ids are below this.
    """

    directory: Path
    runtime: str
    form: str
    model: str
    files: tuple[str, ...]
    session_config: dict[str, str]
    context_length: int
    vocab_size: int
    prefill_length: int | None = None


def read_program(directory: Path) -> Program:
    """Read and check a bundle directory. BoaEdgeError names the file and field that is wrong."""
    where = directory / "runtime.json"
    if not directory.is_dir():
        raise BoaEdgeError("there is no such bundle directory", where=directory, fix="Run `boa-edge export` first")
    document = read_json(where, "the bundle's runtime.json")
    if not isinstance(document, dict):
        raise BoaEdgeError("is not a JSON object", where=where)
    model = _field(document, "model", str, where)
    if model != Path(model).name or model in ("", ".", ".."):
        raise BoaEdgeError(f"'model' is {model!r}; it must be the name of a file in the bundle", where=where)
    if not (directory / model).is_file():
        raise BoaEdgeError("the bundle's model file is missing", where=directory / model, fix="Export it again")
    config = _field(document, "session_config", dict, where)
    for key, value in config.items():
        if not isinstance(value, str) or not key or "=" in key:
            raise BoaEdgeError(f"'session_config' entry {key!r} = {value!r} must be text to text", where=where)
    runtime = _field(document, "runtime", str, where)
    forms = _FORMS.get(runtime)
    if forms is None:
        known = f"Known: {', '.join(_FORMS)}"
        raise BoaEdgeError(f"there is no runner for runtime {runtime[:80]!r}", where=where, fix=known)
    form = document.get("form", forms[0])  # bundles from before there were two have none
    if form not in forms:
        known = " or ".join(forms)
        raise BoaEdgeError(f"'form' is {json.dumps(form)[:80]}; it must be {known}", where=where, fix="Export it again")
    limited = form == "llm"
    if limited != (document.get("prefill_length") is not None):
        takes = "needs a" if limited else "has no"
        raise BoaEdgeError(f"the form {form} {takes} 'prefill_length'", where=where, fix="Export it again")
    data = f"{model}.data"
    files = (model, data) if (directory / data).is_file() else (model,)
    _check_manifest(directory, files)
    return Program(
        directory=directory,
        runtime=runtime,
        form=form,
        model=model,
        files=files,
        session_config=config,
        context_length=_positive(document, "context_length", where),
        vocab_size=_positive(document, "vocab_size", where),
        prefill_length=_positive(document, "prefill_length", where) if limited else None,
    )


def _field(document: dict[str, Any], key: str, kind: type, where: Path) -> Any:
    if key not in document:
        raise BoaEdgeError(f"field '{key}' is missing", where=where, fix="Export the bundle again")
    value = document[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BoaEdgeError(f"field '{key}' is {json.dumps(value)[:80]}, not a {kind.__name__}", where=where)
    return value


def _positive(document: dict[str, Any], key: str, where: Path) -> int:
    value = _field(document, key, int, where)
    if value <= 0:
        raise BoaEdgeError(f"field '{key}' is {value}; it must be positive", where=where)
    return int(value)


def _check_manifest(directory: Path, names: tuple[str, ...]) -> None:
    """The files that go to the device must be the ones that were exported."""
    where = directory / "manifest.json"
    manifest = read_json(where, "the bundle's manifest")
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        raise BoaEdgeError("field 'files' is missing or no object", where=where, fix="Export the bundle again")
    for name in names:
        entry = files.get(name)
        if not isinstance(entry, dict):
            raise BoaEdgeError(f"does not list {name}", where=where, fix="Export the bundle again")
        path = directory / name
        size = path.stat().st_size
        if size != entry.get("size"):
            raise BoaEdgeError(
                f"has {size} bytes, its manifest says {entry.get('size')}", where=path, fix="Export the bundle again"
            )
        if sha256_file(path) != entry.get("sha256"):
            raise BoaEdgeError("its SHA-256 differs from its manifest's", where=path, fix="Export the bundle again")
