"""This project's own methods, by the command line that every peer's script has.

python -m benchmarks.ours --variant boa --model DIR --tokens FILE --bits 4 --group-size 32 --symmetric 1 --out DIR
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.peers.harness import Job, Made, main
from boa_edge.files import write_json
from boa_edge.quiet import quiet_libraries, quiet_transformers
from toolchain.checkpoint import ACTIVATIONS
from toolchain.guard import guard
from toolchain.loading import load_source
from toolchain.methods import METHODS
from toolchain.prepare import prepare
from toolchain.recipe import DEFAULT_RECIPE, Recipe, WeightFormat, load_recipe
from toolchain.run import quantize_model

AT = "@"  # between a variant and the scheme of its activations
SCHEMES = ("per_block", "per_token")
RECOMMENDED_TRANSFORMS = ("smooth",)


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
VARIANTS = (*_ALL, *(f"{variant}{AT}{scheme}" for variant in OURS for scheme in SCHEMES))


def recipe_for(variant: str, bits: int, group_size: int | None, symmetric: bool, scheme: str | None = None) -> Recipe:
    """The recipe of a variant at a format; the embedding stays in floating point, as with every peer.

    Args:
        scheme: of quantized activations, for which alone the default recipe's transforms are; None: none are quantized.
    """
    chosen = _ALL[variant].recipe
    fields = load_recipe(DEFAULT_RECIPE).model_dump() if chosen is None else dict(chosen)
    weights = WeightFormat.model_validate({"bits": bits, "group_size": group_size, "symmetric": symmetric})
    fields |= {"weights": weights.model_dump(), "embedding": None}
    if scheme is None:
        fields |= {"activations": None, "transforms": ()}
    else:
        budget = {"budget": None} if chosen is not None else {}
        fields["activations"] = {**(fields.get("activations") or {}), **budget, "scheme": scheme}
        fields["transforms"] = RECOMMENDED_TRANSFORMS if chosen is None else ()
    return Recipe.model_validate(fields)


def make(job: Job) -> Made:
    """Quantize by `toolchain.run.quantize_model`."""
    quiet_libraries()
    quiet_transformers()
    source = load_source(str(job.model))
    made = Made()
    variant, _, scheme = job.variant.partition(AT)
    recipe = recipe_for(variant, job.bits, job.group_size, job.symmetric, scheme or None)
    with made.timed():
        prepared = prepare(source, recipe, job.tokens)
        plan = prepared.activations
        quantized = quantize_model(prepared.source, recipe, job.tokens, activations=plan)
        if plan is not None and recipe.activations is not None:
            plan = guard(prepared.source, quantized, plan, job.tokens, recipe.activations.budget).plan
    with torch.inference_mode():
        made.weights = {f"{name}.weight": weight.dequantize() for name, weight in quantized.weights.items()}
    original = dict(source.model.named_parameters())
    for name, parameter in prepared.source.model.named_parameters():
        if name not in made.weights and not torch.equal(parameter, original[name]):
            made.weights[name] = parameter
    if plan is not None:
        write_json(job.out / ACTIVATIONS, plan.to_document())
        made.notes.append(f"{len(plan.kept)} linears keep floating-point activations")
    return made


if __name__ == "__main__":
    main("boa-edge", make, VARIANTS)
