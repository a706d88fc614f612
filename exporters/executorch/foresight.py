"""What a recipe asks for that no ExecuTorch program holds: known before anything is quantized."""

from __future__ import annotations

from boa_edge.errors import UsageError
from exporters.base import Request
from exporters.executorch.lowerable import GROUP, check_family, lengths
from toolchain.families import DecoderSpec
from toolchain.recipe import Recipe


def foresee(recipe: Recipe, spec: DecoderSpec | None, request: Request) -> None:
    """UsageError for what `check` would refuse in every checkpoint of this recipe (and model, where it is known)."""
    weights, table = recipe.weights, recipe.embedding
    if not weights.symmetric:
        fix = "Choose a recipe without asym"
        raise UsageError("XNNPACK ignores the zero points of weights without a word", where="recipe: weights", fix=fix)
    if weights.group_size is not None and weights.group_size % GROUP:
        fix = f"Choose a group size of {GROUP}, or none"
        raise UsageError(
            f"groups of {weights.group_size}; XNNPACK takes multiples of {GROUP}", where="recipe: weights", fix=fix
        )
    if weights.group_size is not None and weights.bits in (8, "auto"):
        # Any of the layers may get 8 bits.
        fix = "Choose one scale per output channel (no group size), or 4 bits"
        raise UsageError("XNNPACK has no 8-bit weights in groups", where="recipe: weights", fix=fix)
    # The head has the table's format, whether or not it is the table.
    groups = weights.group_size is not None or (table is not None and table.group_size is not None)
    if groups and not recipe.round_scales:
        fix = "Set it to true"
        raise UsageError("XNNPACK keeps the scales of groups in bfloat16", where="recipe: round_scales", fix=fix)
    if recipe.kv_cache is not None:
        fix = "Choose a recipe without kv8"
        raise UsageError("the program keeps keys and values in float32", where="recipe: kv_cache", fix=fix)
    static = recipe.activations is not None and recipe.activations.scheme.startswith("static")
    if recipe.activations is not None and static and request.activations == "int8":
        problem = f"XNNPACK has no kernel for int4 weights on {recipe.activations.scheme} activations"
        raise UsageError(problem, where="recipe: activations", fix="Choose scheme per_token")
    if table is not None and table.group_size is not None:
        if table.bits == 8:
            problem = f"the head would be an 8-bit table in groups of {table.group_size}, which XNNPACK does not have"
            raise UsageError(problem, where="recipe: embedding", fix="Set its group_size to null")
        if table.group_size % GROUP:
            problem = f"the head would be a table in groups of {table.group_size}; XNNPACK takes multiples of {GROUP}"
            raise UsageError(problem, where="recipe: embedding", fix=f"Set its group_size to {GROUP}, or to null")
    if request.activations == "float32" and groups:
        whose = "" if weights.group_size is not None else ", as the head's are (recipe: embedding)"
        problem = f"XNNPACK takes int8 inputs only where weights are in groups{whose}"
        raise UsageError(problem, where="--activations", fix="Leave it out, or choose a recipe without groups")
    if spec is not None:
        check_family(spec, "the model")
        lengths(spec, request)
        _check_widths(recipe, spec)


def _check_widths(recipe: Recipe, spec: DecoderSpec) -> None:
    """Codes of fewer than 8 bits stand in pairs."""
    odd = [(name, width) for name, width in spec.linear_inputs().items() if width % 2]
    if odd and recipe.weights.bits != 8:
        problem = f"{odd[0][0]} has {odd[0][1]} inputs, and XNNPACK takes codes of fewer than 8 bits in pairs"
        raise UsageError(problem, where="recipe: weights", fix="Choose 8 bits")
    if recipe.embedding is not None and recipe.embedding.bits != 8 and spec.hidden_size % 2:
        problem = f"rows of {spec.hidden_size} codes do not fill bytes"
        raise UsageError(problem, where="recipe: embedding", fix="Set its bits to 8")
