"""This project's own methods, by the command line that every peer's script has.

python -m benchmarks.ours --variant boa --model DIR --tokens FILE --bits 4 --group-size 32 --symmetric 1 --out DIR
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.harness import Job, Made, main
from boa_edge.errors import UsageError
from boa_edge.files import write_json
from boa_edge.quiet import quiet_libraries, quiet_transformers
from exporters import EXPORTERS
from toolchain.checkpoint import ACTIVATIONS
from toolchain.guard import guard
from toolchain.loading import load_source
from toolchain.methods import METHODS
from toolchain.prepare import prepare
from toolchain.recipe import DEFAULT_RECIPE, Recipe, WeightFormat, load_recipe
from toolchain.run import quantize_model

AT = "@"  # between a variant and the scheme of its activations
SCHEMES = ("per_block", "per_token")
# They change nothing but what a quantized table meets, and here the tables stay in floating point.
_FOR_TABLES = ("rotatetable",)
_GUARD_SHARE = 8  # one calibration sequence in so many is the guard's


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

_SEARCH = "grids by what errors cost the solver"
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
        (_SEARCH, {}),
        ("scales tried a step up and down", {"scale_steps": 1}),
        ("scales refitted", {"refits": 1}),
        ("descent on the codes", {"sweeps": 2}),
        ("costly statistics of a part of the text", {name: getattr(edge, name) for name in _PARTS}),
        ("safety net", {"safety_net": True}),
    ]
    options = boa.model_dump()
    search = METHODS["boa"].default_search
    steps = {}
    for name, fields in additions:
        options |= fields
        search = METHODS["edge"].default_search if name == _SEARCH else search
        steps[f"+ {name}"] = Own({"method": "edge", "scale_search": search, "solver": dict(options)})
    if options != edge.model_dump():
        raise AssertionError("the steps do not lead to edge")
    return steps


# Each as the one before it with one thing added.
STEPS: dict[str, Own] = {**{name: OURS[name] for name in ("rtn", "gptq", "boa")}, **_steps()}
_ALL = OURS | STEPS
VARIANTS = (*_ALL, *(f"{variant}{AT}{scheme}" for variant in OURS for scheme in SCHEMES))


def product_recipe(scheme: str | None) -> Recipe:
    """What the product takes where nobody names a recipe: for the runtime whose activations are of this scheme, or
    (None) for any.
    """
    if scheme is None:
        return load_recipe(DEFAULT_RECIPE)
    recipes = [load_recipe(exporter.recipe) for exporter in EXPORTERS.values()]
    return next(one for one in recipes if one.activations is not None and one.activations.scheme == scheme)


def recipe_for(variant: str, bits: int, group_size: int | None, symmetric: bool, scheme: str | None = None) -> Recipe:
    """The recipe of a variant at a format; the embedding stays in floating point, as with every peer.

    Args:
        scheme: of quantized activations, for which alone the default recipe's transforms are; None: none are quantized.
    """
    chosen, default = _ALL[variant].recipe, product_recipe(scheme)
    fields = default.model_dump() if chosen is None else dict(chosen)
    weights = WeightFormat.model_validate({"bits": bits, "group_size": group_size, "symmetric": symmetric})
    fields |= {"weights": weights.model_dump(), "embedding": None}
    if scheme is None:
        fields |= {"activations": None, "transforms": ()}
    elif chosen is None:
        fields["transforms"] = tuple(name for name in default.transforms if name not in _FOR_TABLES)
    else:
        fields["activations"] = {"scheme": scheme, "budget": None}
    return Recipe.model_validate(fields)


def name_of(recipe: Recipe) -> str | None:
    """Its name, less that the embedding stays in floating point; None where no name says what its solver does."""
    return recipe.name if recipe.solver is None else None


def split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What is calibrated on, and the sequences [n, length] at the end that the guard alone sees.

    Raises:
        UsageError: a single sequence.
    """
    if tokens.shape[0] < 2:
        raise UsageError("one sequence is too few to calibrate on and to hold out of", where="--sequences")
    count = max(1, tokens.shape[0] // _GUARD_SHARE)
    return tokens[:-count], tokens[-count:]


def make(job: Job) -> Made:
    """Quantize by `toolchain.run.quantize_model`."""
    quiet_libraries()
    quiet_transformers()
    source = load_source(str(job.model))
    made = Made()
    variant, _, scheme = job.variant.partition(AT)
    recipe = recipe_for(variant, job.bits, job.group_size, job.symmetric, scheme or None)
    budget = None if recipe.activations is None else recipe.activations.budget
    rows, guard_rows = (job.tokens, None) if budget is None else split(job.tokens)
    with made.timed():
        prepared = prepare(source, recipe, rows)
        plan = prepared.activations
        quantized = quantize_model(prepared.source, recipe, rows, activations=plan)
        if plan is not None and guard_rows is not None:
            plan = guard(prepared.source, quantized, plan, guard_rows, budget).plan
    with torch.inference_mode():
        made.weights = {f"{name}.weight": weight.dequantize() for name, weight in quantized.weights.items()}
    original = dict(source.model.named_parameters())
    for name, parameter in prepared.source.model.named_parameters():
        if name not in made.weights and not torch.equal(parameter, original[name]):
            made.weights[name] = parameter
    if plan is not None:
        write_json(job.out / ACTIVATIONS, plan.to_document())
        made.notes.append(f"{len(plan.kept)} linears keep floating-point activations")
    if guard_rows is not None:
        made.notes.append(f"calibrated on {len(rows)} of the sequences; the other {len(guard_rows)} are the guard's")
    if _ALL[variant].recipe is None and scheme:
        made.notes += [
            f"without `{name}`, which changes nothing where the table stays in floating point"
            for name in product_recipe(scheme).transforms
            if name not in recipe.transforms
        ]
    return made


if __name__ == "__main__":
    main("boa-edge", make, VARIANTS)
