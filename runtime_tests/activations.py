"""Which activations the deployed model and the PyTorch model compute with, by the recipe and by the bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime_tests.labels import RUNTIMES, SCHEMES
from runtime_tests.model import Deployed

# Whose rounding a scheme is; the others belong to runtimes that no bundle is made for yet.
_ROUNDING = {
    ("onnx", "per_block"): "as the runtime does on x86",
    ("executorch", "per_token"): "as the runtime does on x86",
}


def quantizes_activations(recipe: Mapping[str, Any] | None) -> bool:
    """Whether a recipe, as read from YAML, asks for quantized activations."""
    return (recipe or {}).get("activations") is not None


def scheme(recipe: Mapping[str, Any] | None) -> str | None:
    """How the recipe has activations quantized, e.g. `per_block`; None where it does not say."""
    chosen = (recipe or {}).get("activations")
    found = chosen.get("scheme") if isinstance(chosen, Mapping) else None
    return found if isinstance(found, str) else None


def compared(deployed: Deployed) -> str:
    """What the two models compute with, as the beginning of a sentence about the difference between them."""
    integers = deployed.activations == "int8"
    if not quantizes_activations(deployed.recipe):
        if integers:
            return "The bundle has the runtime compute with int8 activations, the PyTorch model computes with float32"
        return f"Both compute with {deployed.activations} activations"
    if not integers:
        return (
            "The PyTorch model computes with int8 activations, as the recipe has it, but the bundle was exported with "
            f"{deployed.activations} activations"
        )
    chosen = scheme(deployed.recipe)
    rounding = _ROUNDING.get((deployed.runtime, chosen or ""))
    if rounding is not None:
        return f"Both compute with int8 activations, the PyTorch model rounding them {rounding}"
    how = SCHEMES.get(chosen or "", f"by the scheme {chosen!r}")
    return (
        f"Both compute with int8 activations, but the PyTorch model quantizes them otherwise than "
        f"{RUNTIMES.get(deployed.runtime, deployed.runtime)} does: {how}"
    )
