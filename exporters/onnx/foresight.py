"""What a recipe asks for that no ONNX graph of ours holds or runs fast: known before anything is quantized."""

from __future__ import annotations

from typing import cast

from boa_edge.errors import UsageError
from exporters.base import Request
from exporters.bundle import Form
from exporters.onnx.kernels import FUSED_GROUPS
from exporters.onnx.lowerable import ACCEPTED, obstacles
from toolchain.families import DecoderSpec
from toolchain.recipe import Recipe


def foresee(recipe: Recipe, spec: DecoderSpec | None, request: Request) -> None:
    """UsageError for what `check` would refuse in every checkpoint of this recipe (and model, where it is known)."""
    table = recipe.embedding
    groups = (("weights", recipe.weights.group_size), ("embedding", None if table is None else table.group_size))
    for field, size in groups:
        if size is not None and size not in FUSED_GROUPS:
            sizes = ", ".join(map(str, FUSED_GROUPS))
            raise UsageError(
                f"ONNX Runtime has no fast kernel for groups of {size}",
                where=f"recipe: {field}",
                fix=f"Choose a group size of {sizes}, or none",
            )
    if recipe.kv_cache is not None:
        fix = "Choose a recipe without kv8"
        raise UsageError("the graph keeps keys and values in float32", where="recipe: kv_cache", fix=fix)
    static = recipe.activations is not None and recipe.activations.scheme.startswith("static")
    if static and request.activations == "int8":
        raise UsageError(
            "ONNX Runtime's CPU has no kernel for int4 weights on static activations",
            where="recipe: activations",
            fix="Choose scheme per_block, or export with --activations float32",
        )
    if spec is not None:
        form = cast(Form, request.form)
        if found := obstacles(spec, form):
            problem = f"ONNX export of the family {spec.family!r} is not there yet, for want of: {', '.join(found)}"
            raise UsageError(problem, where="the model", fix=f"Accepted: {ACCEPTED[form]}")
