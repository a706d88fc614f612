"""The recipe `boa-edge`."""

from __future__ import annotations

from typing import Any

from boa_edge_optimum import Program, lower

from ..recipe_registry import register_recipe


@register_recipe("boa-edge")
def export_with_boa_edge(model: Any, **kwargs: Any) -> dict[str, Program]:
    """The program of a checkpoint by its file's name; arguments and errors as in `boa_edge_optimum.lower`."""
    return {"model": lower(model, **kwargs)}
