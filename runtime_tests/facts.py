"""What a bundle says of itself: its manifest, how it is loaded, its recipe. Opening it verifies every file's hash."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from exporters.bundle import Bundle
from pydantic import ValidationError

from boa_edge.errors import BoaEdgeError
from boa_edge.files import read_json
from runtime_tests.figure import figure
from runtime_tests.model import BundleFile, Deployed
from runtime_tests.provenance import Provenance, read_provenance
from runtime_tests.reference import Reference, read_reference

_FIX = "Export the checkpoint again"


@dataclass(frozen=True)
class BundleFacts:
    """A verified bundle, read for measuring."""

    path: Path
    deployed: Deployed
    reference: Reference
    provenance: Provenance


def open_bundle(path: Path) -> BundleFacts:
    """Verify a bundle against its manifest and read what a measurement needs.

    Raises:
        BoaEdgeError: a file is missing, does not match the manifest, or is malformed.
    """
    Bundle.open(path)
    manifest = _object(path / "manifest.json", "the manifest")
    runtime = _object(path / "runtime.json", "the runtime settings")
    provenance = read_provenance(path / "reference" / "provenance.json")
    vocabulary = runtime.get("vocab_size")
    return BundleFacts(
        path=path,
        deployed=_deployed(path, manifest, runtime, provenance),
        reference=read_reference(
            path / "reference" / "reference.safetensors", vocabulary if isinstance(vocabulary, int) else None
        ),
        provenance=provenance,
    )


def _deployed(path: Path, manifest: dict[str, Any], runtime: dict[str, Any], provenance: Provenance) -> Deployed:
    files = _files(path / "manifest.json", manifest)
    model = str(runtime.get("model", "model.onnx"))
    recipe = _recipe(path / "reference" / "recipe.yaml")
    original = next((row.payload_bytes for row in provenance.comparison if row.method == "original"), None)
    return Deployed(
        bundle=str(path),
        model=provenance.source.model,
        recipe_name=_recipe_name(manifest.get("recipe"), recipe),
        recipe=recipe,
        created_by=manifest.get("created_by"),
        runtime=str(runtime.get("runtime", "onnx")),
        activations=str(runtime.get("activations", "not recorded")),
        runtime_config=runtime,
        runtime_size=figure(sum(file.bytes for file in files if file.role == "runtime"), "bytes", "measured"),
        model_size=figure(
            sum(file.bytes for file in files if file.path in (model, f"{model}.data")) or None, "bytes", "measured"
        ),
        original_size=None if original is None else figure(original, "bytes", "measured"),
        files=files,
    )


def _files(path: Path, manifest: dict[str, Any]) -> tuple[BundleFile, ...]:
    entries = manifest.get("files")
    if not isinstance(entries, dict):
        raise BoaEdgeError("has no `files`", where=path, fix=_FIX)
    try:
        return tuple(
            BundleFile(path=name, bytes=entry["size"], sha256=entry["sha256"], role=entry["role"])
            for name, entry in sorted(entries.items())
        )
    except (KeyError, TypeError, ValidationError) as error:
        raise BoaEdgeError(f"a file's entry is malformed ({error!r})", where=path, fix=_FIX) from None


def _recipe(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BoaEdgeError(f"is not valid YAML ({error})", where=path, fix=_FIX) from None
    return document if isinstance(document, dict) else None


def _recipe_name(stated: Any, recipe: dict[str, Any] | None) -> str | None:
    """The name that the manifest or the recipe gives itself, else the one that its fields spell (`w4g32-boa`)."""
    documents = [part for part in (stated, recipe) if isinstance(part, dict)]
    for candidate in (stated, *(document.get("name") for document in documents)):
        if isinstance(candidate, str) and candidate:
            return candidate
    for document in documents:
        weights, method = document.get("weights"), document.get("method")
        if isinstance(weights, dict) and weights.get("bits") and method:
            group = f"g{weights['group_size']}" if weights.get("group_size") else ""
            return f"w{weights['bits']}{group}{'' if weights.get('symmetric', True) else 'asym'}-{method}"
    return None


def _object(path: Path, what: str) -> dict[str, Any]:
    document = read_json(path, what)
    if not isinstance(document, dict):
        raise BoaEdgeError(f"{what} is not a JSON object", where=path, fix=_FIX)
    return document
