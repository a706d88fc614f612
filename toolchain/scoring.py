"""Quantize by one recipe, and what it costs in accuracy on text that was held out."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

from boa_edge.errors import BoaEdgeError
from boa_edge.progress import say
from toolchain import distributed
from toolchain.activations.plan import ActivationPlan
from toolchain.calibration import Calibration
from toolchain.fake_quantized import FakeQuantized
from toolchain.guard import Guarded, guard
from toolchain.metrics import Fidelity, evaluate_logits
from toolchain.payload import payload_bytes_of
from toolchain.prepare import Prepared
from toolchain.recipe import Recipe
from toolchain.resume import ResumeFile
from toolchain.run import QuantizedModel, quantize_model
from toolchain.spill import Spill


@dataclass(frozen=True)
class Comparison:
    """One method on the held-out text.

    Attributes:
        payload_bytes: as in `toolchain.payload`.
        peak_mb: peak resident memory of the process so far, in megabytes (10^6).
    """

    method: str
    recipe: str
    perplexity: float
    kl: float
    top1: float
    payload_bytes: int
    seconds: float
    peak_mb: int


@dataclass(frozen=True)
class Scored:
    """A quantized model, which activations it computes with, and how it does on the held-out text."""

    quantized: QuantizedModel
    guarded: Guarded | None
    row: Comparison
    original_perplexity: float

    @property
    def activations(self) -> ActivationPlan | None:
        return None if self.guarded is None else self.guarded.plan


def quantize_and_score(
    prepared: Prepared, recipe: Recipe, resume: ResumeFile | None, text: Calibration, keep: Spill
) -> Scored:
    """Quantize, guard, score.

    Args:
        resume: where finished blocks are kept.
        keep: where activations are kept.

    Raises:
        BoaEdgeError: a Hessian that no damping mends.
    """
    start = time.monotonic()
    if resume is not None:
        resume.begin()
    source, plan = prepared.source, prepared.activations
    try:
        quantized = quantize_model(source, recipe, text.sequences, resume, text.weights, keep, plan, prepared.cache)
    except ArithmeticError as error:
        fix = "Use more calibration text, or a larger `damping` in the recipe"
        raise BoaEdgeError(str(error), where=f"recipe {recipe.name}", fix=fix) from error
    guarded: Guarded | None = None
    if plan is not None and recipe.activations is not None:
        budget = recipe.activations.budget
        if budget is not None and text.judges_scored:
            say("note: too little text is held out to evaluate on other than the guard chooses by (three sequences)")
        guarded = distributed.from_main(lambda: guard(source, quantized, plan, text.judged, budget, prepared.cache))
    seconds = time.monotonic() - start + (0.0 if resume is None else resume.spent)
    fidelity = distributed.from_main(lambda: _score(prepared, recipe, quantized, guarded, text))
    assert fidelity.kl is not None
    assert fidelity.top1 is not None
    assert fidelity.reference_perplexity is not None
    row = Comparison(
        method=recipe.method,
        recipe=recipe.name,
        perplexity=fidelity.perplexity,
        kl=fidelity.kl,
        top1=fidelity.top1,
        payload_bytes=payload_bytes_of(source, quantized, recipe),
        seconds=round(seconds, 1),
        peak_mb=_peak_mb(),
    )
    say(f"{recipe.name}: perplexity {row.perplexity:.2f}, KL {row.kl:.4f}, top-1 {row.top1:.1%} on held-out text")
    return Scored(quantized, guarded, row, fidelity.reference_perplexity)


def _score(
    prepared: Prepared, recipe: Recipe, quantized: QuantizedModel, guarded: Guarded | None, text: Calibration
) -> Fidelity:
    source, plan = prepared.source, None if guarded is None else guarded.plan
    fake = FakeQuantized(source.model, source.spec, quantized.weights, plan, prepared.cache)
    return evaluate_logits(
        fake.logits,
        text.scored,
        lambda tokens: source.model(tokens, use_cache=False).logits,
        f"scoring {recipe.name}",
    )


def _peak_mb() -> int:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)
