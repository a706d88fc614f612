"""What a bundle says of itself: its manifest, how it is loaded, its recipe. Opening it verifies every file's hash."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from boa_edge.errors import BoaEdgeError
from boa_edge.files import read_json
from exporters.bundle import Bundle
from runtime_tests.figure import figure
from runtime_tests.model import BundleFile, Deployed
from runtime_tests.placement import read_kernels, read_placement
from runtime_tests.provenance import Provenance, read_provenance
from runtime_tests.reference import Reference, read_reference
from toolchain.recipe import Recipe

_FIX = "Export the checkpoint again"


@dataclass(frozen=True)
class BundleFacts:
    """A verified bundle, read for measuring."""

    path: Path
    deployed: Deployed
    config: dict[str, Any]
    reference: Reference
    provenance: Provenance


def open_bundle(path: Path) -> BundleFacts:
    """Verify a bundle against its manifest and read what a measurement needs.

    Raises:
        BoaEdgeError: a file is missing, does not match the manifest, is not in it, or is malformed; a signature that
            does not hold.
    """
    bundle = Bundle.open(path)
    provenance = read_provenance(path / "reference" / "provenance.json")
    return BundleFacts(
        path=path,
        deployed=_deployed(bundle, provenance),
        config=_config(path / "config.json"),
        reference=read_reference(path / "reference" / "reference.safetensors", bundle.runtime.vocab_size),
        provenance=provenance,
    )


def _deployed(bundle: Bundle, provenance: Provenance) -> Deployed:
    files = tuple(
        BundleFile(path=name, bytes=entry.size, sha256=entry.sha256, role=entry.role)
        for name, entry in sorted(bundle.manifest.files.items())
    )
    runtime = bundle.runtime
    recipe = _recipe(bundle.path / "reference" / "recipe.yaml") or bundle.manifest.recipe or None
    original = next((row.payload_bytes for row in provenance.comparison if row.method == "original"), None)
    weights = sum(file.bytes for file in files if file.path in (runtime.model, f"{runtime.model}.data"))
    return Deployed(
        bundle=str(bundle.path),
        model=provenance.source.model,
        recipe_name=provenance.recipe or _spelled(recipe),
        recipe=recipe,
        created_by=bundle.manifest.created_by,
        runtime=runtime.runtime,
        activations=runtime.activations,
        runtime_config=runtime.model_dump(mode="json"),
        runtime_size=figure(sum(file.bytes for file in files if file.role == "runtime"), "bytes", "measured"),
        model_size=figure(weights, "bytes", "measured"),
        original_size=None if original is None else figure(original, "bytes", "measured"),
        placement=read_placement(bundle),
        kernels=read_kernels(bundle),
        files=files,
    )


def _config(path: Path) -> dict[str, Any]:
    """The source model's config.json; empty where the bundle has none."""
    document = read_json(path, "the model's config") if path.exists() else {}
    return document if isinstance(document, dict) else {}


def _recipe(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BoaEdgeError(f"is not valid YAML ({error})", where=path, fix=_FIX) from None
    return document if isinstance(document, dict) else None


def _spelled(recipe: dict[str, Any] | None) -> str | None:
    """The name that a recipe's fields spell, e.g. `w4g32a8-edge-smooth`; None for what is no recipe of this version."""
    if recipe is None:
        return None
    try:
        return Recipe.model_validate(recipe).name
    except ValidationError:
        return None
