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


def recipe_for(variant: str, bits: int, group_size: int | None, symmetric: bool) -> Recipe:
    """The recipe of a variant at a format; the embedding stays in floating point, as with every peer."""
    chosen = OURS[variant].recipe
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
    main("boa-edge", make, tuple(OURS))
