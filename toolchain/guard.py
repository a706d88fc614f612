"""Which linears keep floating-point activations: as few as the recipe's budget asks for, the costliest first.

What int8 activations cost a linear is measured, not guessed: the KL from the model with quantized weights alone to the
same with this one linear's inputs quantized. The sum of these is close to what all cost together, so the costliest are
spared first, and as many as it takes are found by bisection on the real figure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from boa_edge.progress import say, track
from toolchain.activations.cache import CachePlan
from toolchain.activations.plan import ActivationPlan
from toolchain.fake_quantized import FakeQuantized
from toolchain.loading import SourceModel
from toolchain.run import QuantizedModel

_SEQUENCES, _TOKENS = 8, 256  # on which the budget is judged
_TOKENS_EACH = 128  # on which each linear is


@dataclass(frozen=True)
class Guarded:
    """What the guard has found.

    Attributes:
        plan: with the exceptions that the budget asks for.
        weights_kl: nats per token from the original with quantized weights alone; `all_kl` with all activations at 8
            bits too, `kl` with the plan's.
        costs: KL of each linear alone, by module, the costliest first; empty where the budget was met without a look.
    """

    plan: ActivationPlan
    weights_kl: float
    all_kl: float
    kl: float
    costs: dict[str, float] = field(default_factory=dict)

    def to_document(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "weights_kl": self.weights_kl,
            "all_int8_kl": self.all_kl,
            "kl": self.kl,
            "kept": sorted(self.plan.kept),
            "costs": self.costs,
        }


def guard(
    source: SourceModel,
    quantized: QuantizedModel,
    plan: ActivationPlan,
    sequences: Tensor,
    budget: float | None,
    cache: CachePlan | None = None,
) -> Guarded:
    """Choose the linears whose activations stay in floating point.

    Args:
        sequences: tokens int64 [n, length], best of text that nobody calibrated with: on the calibration text the
            weights' KL is too small, and so is what it allows.
        budget: by how much the KL may rise over that of the weights alone, relative; None: there is no limit.
        cache: how keys and values are kept, with floating-point activations too.
    """
    rows = sequences[:_SEQUENCES, :_TOKENS]
    with torch.inference_mode():
        original = _log_probabilities(FakeQuantized(source.model, source.spec, {}), rows)
        model = FakeQuantized(source.model, source.spec, quantized.weights, cache=cache)

        def kl(chosen: ActivationPlan | None) -> float:
            return _kl(original, _log_probabilities(model.with_activations(chosen), rows))

        weights_kl, all_kl = kl(None), kl(plan)
        say(f"int8 activations: KL {all_kl:.4f}, with quantized weights alone {weights_kl:.4f}")
        if budget is None or all_kl <= (1 + budget) * weights_kl:
            return Guarded(plan, weights_kl, all_kl, all_kl)
        costs = _costs(model, plan, rows[:1, :_TOKENS_EACH])
        names = list(costs)
        # The smallest number of exceptions that meets the budget; all exceptions meet it by definition.
        low, high, found = 0, len(names), weights_kl
        while high - low > 1:
            middle = min((low + high) // 2, 2 * low + 4)  # few are expected
            reached = kl(plan.keeping(names[:middle]))
            if reached <= (1 + budget) * weights_kl:
                high, found = middle, reached
            else:
                low = middle
    say(f"int8 activations: {high} of {len(names)} linears keep floating-point activations, KL {found:.4f}")
    return Guarded(plan.keeping(names[:high]), weights_kl, all_kl, found, costs)


def _costs(model: FakeQuantized, plan: ActivationPlan, rows: Tensor) -> dict[str, float]:
    plain = _log_probabilities(model, rows)
    costs = {
        name: _kl(plain, _log_probabilities(model.with_activations(plan.of([name])), rows))
        for name in track(list(plan.group_sizes), "measuring each linear's int8 activations")
    }
    return dict(sorted(costs.items(), key=lambda item: -item[1]))


def _log_probabilities(model: FakeQuantized, rows: Tensor) -> Tensor:
    return torch.cat([torch.log_softmax(model.logits(row[None]), -1) for row in rows])


def _kl(expected: Tensor, found: Tensor) -> float:
    """Mean nats per token."""
    return float((expected.exp() * (expected - found)).sum(-1).mean(dtype=torch.float64))
