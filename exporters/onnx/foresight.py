"""What a recipe asks for that no ONNX graph of ours holds or runs fast: known before anything is quantized."""

from __future__ import annotations

from typing import cast

from boa_edge.errors import UsageError
from exporters.base import Request
from exporters.bundle import Form
from exporters.onnx.lowerable import Asked, refusals
from toolchain.families import DecoderSpec
from toolchain.recipe import Recipe


def foresee(recipe: Recipe, spec: DecoderSpec | None, request: Request) -> None:
    """UsageError for what `check` would refuse in every checkpoint of this recipe (and model, where it is known)."""
    table = recipe.embedding
    asked = Asked(
        form=cast(Form, request.form),
        activations=request.activations,
        groups=[("weights", recipe.weights.group_size), ("embedding", None if table is None else table.group_size)],
        scheme=None if recipe.activations is None else recipe.activations.scheme,
        cache=None if recipe.kv_cache is None else recipe.kv_cache.scheme,
        spec=spec,
    )
    for refusal in refusals(asked):
        where = "the model" if refusal.place == "model" else f"recipe: {refusal.place}"
        raise UsageError(refusal.problem, where=where, fix=refusal.fix)
