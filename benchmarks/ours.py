"""This project's own methods, by the command line that every peer's script has.

python -m benchmarks.ours --variant boa --model DIR --tokens FILE --bits 4 --group-size 32 --symmetric 1 --out DIR
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.peers.harness import Job, Made, main
from boa_edge.quiet import quiet_libraries, quiet_transformers
from toolchain.loading import load_source
from toolchain.methods import METHODS
from toolchain.recipe import DEFAULT_RECIPE, Recipe, WeightFormat, load_recipe
from toolchain.run import quantize_model


@dataclass(frozen=True)
class Own:
    """A method by what its recipe says besides the format; None: all that the default recipe says."""

    recipe: dict[str, Any] | None
    calibrated: bool = True


# A new method is one line here.
OURS: dict[str, Own] = {
    "default": Own(None),
    "boa": Own({"method": "boa"}),
    "gptq": Own({"method": "gptq"}),
    "rtn": Own({"method": "rtn"}, calibrated=False),
}

_PARTS = ("attention_sequences", "compared_sequences")


def _steps() -> dict[str, Own]:
    """From BoA to `edge`, one addition after the other; the last step is `edge` itself."""
    boa, edge = METHODS["boa"].options, METHODS["edge"].options
    assert boa is not None
    assert edge is not None
    additions: list[tuple[str, dict[str, Any]]] = [
        ("statistics again, inputs' deviation", {"recollect": True, "deviation": 0.5}),
        ("residual stream's deviation", {"residual": 0.5}),
        ("rows that see the softmax", {"attention_rows": "gauss_newton"}),
        ("activation order", {"activation_order": True}),
        ("scales refitted", {"refits": 1}),
        ("descent on the codes", {"sweeps": 2}),
        ("costly statistics of a part of the text", {name: getattr(edge, name) for name in _PARTS}),
        ("safety net", {"safety_net": True}),
    ]
    options = boa.model_dump()
    steps = {}
    for name, fields in additions:
        options |= fields
        steps[f"+ {name}"] = Own({"method": "edge", "solver": dict(options)})
    if options != edge.model_dump():
        raise AssertionError("the steps do not lead to edge")
    return steps


# Each as the one before it with one thing added.
STEPS: dict[str, Own] = {**{name: OURS[name] for name in ("rtn", "gptq", "boa")}, **_steps()}
_ALL = OURS | STEPS


def recipe_for(variant: str, bits: int, group_size: int | None, symmetric: bool) -> Recipe:
    """The recipe of a variant at a format; the embedding stays in floating point, as with every peer."""
    chosen = _ALL[variant].recipe
    fields = load_recipe(DEFAULT_RECIPE).model_dump() if chosen is None else dict(chosen)
    weights = WeightFormat.model_validate({"bits": bits, "group_size": group_size, "symmetric": symmetric})
    return Recipe.model_validate({**fields, "weights": weights.model_dump(), "embedding": None})


def make(job: Job) -> Made:
    """Quantize by `toolchain.run.quantize_model`."""
    quiet_libraries()
    quiet_transformers()
    source = load_source(str(job.model))
    made = Made()
    recipe = recipe_for(job.variant, job.bits, job.group_size, job.symmetric)
    with made.timed():
        quantized = quantize_model(source, recipe, job.tokens)
    with torch.inference_mode():
        made.weights = {f"{name}.weight": weight.dequantize() for name, weight in quantized.weights.items()}
    return made


if __name__ == "__main__":
    main("boa-edge", make, tuple(_ALL))
