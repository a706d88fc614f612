"""What is done to a model before it is quantized: outliers are taken out of its activations, its function unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from boa_edge.errors import BoaEdgeError
from boa_edge.progress import say
from toolchain import distributed
from toolchain.activations import FLOAT, ActivationFormat, RangeObserver, simulate
from toolchain.activations.cache import CachePlan
from toolchain.activations.plan import ActivationPlan
from toolchain.block import BlockRunner
from toolchain.cache_search import CacheCalibration, HeadSamples, search_key_smoothing
from toolchain.families import LayerNames
from toolchain.grids import GridFormat
from toolchain.loading import SourceModel
from toolchain.outliers import PLACES, Outliers, measure_outliers, observe
from toolchain.recipe import CacheChoice, Recipe
from toolchain.rotation_learning import Learning, learn_rotations
from toolchain.statistics.covariance import Covariance
from toolchain.text import spread
from toolchain.transforms import (
    Pair,
    Smooth,
    Transform,
    apply,
    refusal,
    scale_shape,
    turns_of,
    value_sharing,
)
from toolchain.transforms.named import LEARNED_ROTATION, ROTATIONS, SMOOTH
from toolchain.transforms.smooth_descent import STEPS, Steps
from toolchain.transforms.smooth_search import search_smoothing, solved_costs

_SEQUENCES = 8  # of calibration text that is looked at
_SAMPLES, _ROWS = 256, 384  # tokens and rows of the weight on which a smoothing strength is tried
_CHECKED_TOKENS = 32
_LARGEST_DRIFT = 1e-3  # of log-probabilities, in float32

# By pair: where its input is looked at, the roles that read it, and the role whose rows take up its scales. Those with
# such a role come first: the norms' scales are searched for on the weights that these leave.
_PAIRS: dict[Pair, tuple[str, tuple[str, ...], str | None]] = {
    "v_o": ("o", ("o",), "v"),
    "up_down": ("down", ("down",), "up"),
    "attention_norm": ("q", ("q", "k", "v"), None),
    "mlp_norm": ("up", ("gate", "up"), None),
}


@dataclass(frozen=True)
class Prepared:
    """A model ready to be quantized.

    Attributes:
        source: computes what the original does.
        transforms: what it has gone through, in order.
        activations: how its linears' inputs will be quantized; None: not at all.
        cache: how its keys and values will be kept; None: in floating point.
        cache_statistics: the ranges of keys and values, JSON-ready.
        before, after: what the linears take in, in the original and now; empty where nobody asked.
        notes: what was left out and why.
    """

    source: SourceModel
    transforms: list[Transform] = field(default_factory=list)
    activations: ActivationPlan | None = None
    cache: CachePlan | None = None
    cache_statistics: dict[str, Any] | None = None
    before: list[Outliers] = field(default_factory=list)
    after: list[Outliers] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def prepare(source: SourceModel, recipe: Recipe, sequences: Tensor) -> Prepared:
    """Transform a model as the recipe says, and plan its activations and its cache.

    Args:
        sequences: calibration tokens int64 [n, length].

    Raises:
        BoaEdgeError: a transform and the model do not go together, or it has changed what the model computes.
    """
    if not recipe.transforms and recipe.activations is None and recipe.kv_cache is None:
        return Prepared(source)
    rows = sequences[:_SEQUENCES]
    expected = _answers(source, rows)
    before: list[Outliers] = []
    after: list[Outliers] = []
    if recipe.transforms[:1] != (SMOOTH,):  # which looks for itself
        before = distributed.from_main(lambda: observe(source, rows, _ignore, "looking at activations"))
    transforms: list[Transform] = []
    notes: list[str] = []
    for name in recipe.transforms:
        step, told, seen, after = _step(source, recipe, name, rows)
        before = before or seen
        source, left_out = apply(source, step)
        transforms += step
        notes += told + left_out
    for note in notes:
        say(f"note: {note}")
    if recipe.transforms:
        drift = float((_answers(source, rows) - expected).abs().max())
        if not drift < _LARGEST_DRIFT:
            names = ", ".join(recipe.transforms)
            problem = f"{names}: the transformed model's log-probabilities are off by {drift:.2g}"
            raise BoaEdgeError(problem, where="transforms", fix="Leave the transform out, and report this")
    plan = _plan(source, recipe)
    look = _Look(plan, recipe.kv_cache)
    if look.wanted or (recipe.transforms and not after):
        after, look = distributed.from_main(lambda: look.run(source, rows))
    plan = plan and replace(plan, ranges=look.ranges)
    cache = look.cache
    return Prepared(
        source,
        transforms,
        plan,
        None if cache is None else cache.plan(),
        None if cache is None else cache.to_document(),
        before,
        after or before,
        notes,
    )


def _step(
    source: SourceModel, recipe: Recipe, name: str, rows: Tensor
) -> tuple[list[Transform], list[str], list[Outliers], list[Outliers]]:
    """What a name stands for on this model, what there is to say about it, and the outliers before it and after it
    where they were seen.
    """
    if name == SMOOTH:
        smooth, found, left = distributed.from_main(lambda: _smoothing(source, recipe, rows))
        return [smooth], [], found, left
    if name != LEARNED_ROTATION:
        return ROTATIONS[name](recipe.seed), [], [], []
    plan, how = _plan(source, recipe), Learning(**recipe.learning.model_dump())
    assert plan is not None
    learned = distributed.from_main(lambda: learn_rotations(source, plan, rows, how, recipe.seed))
    told = f"{name}: KL on the text learned from {learned.before:.3g} -> {learned.after:.3g}"
    return learned.transforms, [told], [], []


def _answers(source: SourceModel, rows: Tensor) -> Tensor:
    with torch.inference_mode():
        logits = source.model(rows[:1, :_CHECKED_TOKENS], use_cache=False).logits
    return torch.log_softmax(logits.to(torch.float64), -1)


def _ignore(*_: object) -> None:
    pass


def _plan(source: SourceModel, recipe: Recipe) -> ActivationPlan | None:
    if recipe.activations is None:
        return None
    sizes: dict[str, int | None] = dict.fromkeys(source.spec.linear_inputs(), recipe.weights.group_size)
    form = ActivationFormat(recipe.activations.scheme, recipe.activations.bits)
    if recipe.embedding is not None and not form.needs_range:  # graphs with static activations leave the head alone
        sizes[source.spec.head] = recipe.embedding.group_size
    return ActivationPlan(form, sizes)


def _turns(source: SourceModel) -> list[Callable[[Tensor], Tensor]]:
    """What each layer does to queries and keys after RoPE."""
    found = turns_of(source.model, source.spec)
    return [found.get(layer, lambda x: x) for layer in range(source.spec.layers)]


def _smoothing(source: SourceModel, recipe: Recipe, rows: Tensor) -> tuple[Smooth, list[Outliers], list[Outliers]]:
    """Scales of every pair that folds away, each of the strength that its own errors ask for; and the outliers as they
    are and as these scales leave them.
    """
    spec, fmt = source.spec, recipe.grid_format
    chosen = recipe.activations
    scheme = FLOAT if chosen is None else ActivationFormat(chosen.scheme)

    scales: dict[tuple[int, Pair], Tensor] = {}
    left: list[Outliers] = []
    cache, samples, turns = recipe.kv_cache, HeadSamples(), _turns(source)

    def visit(index: int, names: LayerNames, runner: BlockRunner, inputs: Mapping[str, Tensor]) -> None:
        weights = {role: runner.original(role) for role in runner.parts}
        scaled = dict(inputs)
        for pair, (place, readers, writer) in _PAIRS.items():
            if refusal(spec, pair) is not None:
                continue
            weight = torch.cat([weights[role] for role in readers if role in weights])
            shared = value_sharing(spec) if pair == "v_o" else None
            # Without groups, descent looks at one channel at a time: too long for every pair.
            steps = STEPS[scheme.scheme] if fmt.group_size is not None else "unknown"
            scale = _search(weight, inputs[place], fmt, scheme, shared, steps, recipe.options is not None)
            scales[index, pair] = scale.view(scale_shape(spec, index, pair))
            scaled[place] = inputs[place] / (scale if shared is None else scale[shared]).to(inputs[place])
            if writer is not None:
                weights[writer] = weights[writer] / scale.to(weights[writer])[:, None]
        left.extend(measure_outliers(index, PLACES[role], x) for role, x in scaled.items())
        if cache is not None:
            query, key, _ = samples.take()
            places = spread(torch.arange(key.shape[1]), _SAMPLES)
            scales[index, "q_k"] = search_key_smoothing(
                query[:, places],
                key[:, places],
                cache.scheme,
                len(spec.attention[index].rope_inv_freq),
                joint=bool(names.head_norms()),
                turn=turns[index],
            ).scales

    title = "searching for smoothing scales"
    found = observe(source, rows, visit, title, None if cache is None else samples.add)
    return Smooth(scales), found, [*left, found[-1]]


def _search(
    weight: Tensor,
    x: Tensor,
    fmt: GridFormat,
    scheme: ActivationFormat,
    shared: Tensor | None,
    steps: Steps | Literal["unknown"] | None,
    solved: bool,
) -> Tensor:
    def quantized(x: Tensor) -> Tensor:
        narrow = x.to(torch.float32)
        limits = (float(x.min()), float(x.max())) if scheme.needs_range else None
        return simulate(narrow, scheme, group_size=fmt.group_size, static_range=limits).to(x.dtype)

    covariance = Covariance(x.shape[1], x)
    covariance.add(x)
    hessian = covariance.hessian()
    costs = solved_costs(hessian) if solved else hessian
    found = search_smoothing(
        weight,
        costs,
        x.abs().amax(0),
        spread(x, _SAMPLES),
        fmt,
        quantized,
        shared=shared,
        rows=_ROWS,
        dtype=torch.float32,
        steps=steps,
    )
    return found.scales


class _Look:
    """The last look at a model before it is quantized: what fixed ranges and scales need.

    Attributes:
        ranges: of every module's inputs, with the least squared error for the text at hand; for static schemes.
        cache: what is found out about keys and values.
    """

    def __init__(self, plan: ActivationPlan | None, cache: CacheChoice | None) -> None:
        self._static = plan if plan is not None and plan.format.needs_range else None
        self.ranges: dict[str, tuple[float, float]] = {}
        self.cache = None if cache is None else CacheCalibration(cache.scheme)

    @property
    def wanted(self) -> bool:
        return self._static is not None or self.cache is not None

    def run(self, source: SourceModel, rows: Tensor) -> tuple[list[Outliers], _Look]:
        """The outliers that are seen on the way, and itself, filled."""
        samples, turns = HeadSamples(), _turns(source)

        def visit(index: int, names: LayerNames, runner: BlockRunner, inputs: Mapping[str, Tensor]) -> None:
            if self._static is not None:
                self._add_ranges(self._static, names, inputs)
            if self.cache is not None:
                query, key, value = samples.take()
                self.cache.add(turns[index](query), turns[index](key), value, runner.original("o"))

        found = observe(source, rows, visit, "looking again", None if self.cache is None else samples.add)
        return found, self

    def _add_ranges(self, plan: ActivationPlan, names: LayerNames, inputs: Mapping[str, Tensor]) -> None:
        of = {"q": "q", "k": "q", "v": "q", "gate": "up"}
        for role, part in names.parts().items():
            if part.module in plan.group_sizes and part.module not in self.ranges:
                self.ranges[part.module] = _range(inputs[of.get(role, role)], plan)


def _range(x: Tensor, plan: ActivationPlan) -> tuple[float, float]:
    observer = RangeObserver()
    observer.update(x)
    return observer.range("mse", signed=plan.format.scheme == "static_int8")
