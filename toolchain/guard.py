"""Which linears keep floating-point activations: as few as the recipe's budget asks for, the costliest first.

What int8 activations cost a linear is measured, not guessed: the KL from the model with quantized weights alone to the
same with this one linear's inputs quantized. The sum of these is close to what all cost together, so the costliest are
spared first, and as many as it takes are found by bisection on the real figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from boa_edge.progress import say, track
from toolchain.activations.cache import CachePlan
from toolchain.activations.plan import ActivationPlan
from toolchain.fake_quantized import FakeQuantized
from toolchain.loading import SourceModel
from toolchain.metrics import divergence, parts
from toolchain.run import QuantizedModel

_SEQUENCES, _TOKENS = 8, 512  # on which the budget is judged
_TOKENS_EACH = 128  # on which each linear is
_LOGITS = 1 << 27  # that are in memory at a time, of every model that runs: half a gigabyte


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
        at_once = rows.split(_fitting(source.spec.vocab_size, rows.shape[1]))
        truth = FakeQuantized(source.model, source.spec, {})
        original = [_log_probabilities(truth.logits(part)) for part in at_once]
        model = FakeQuantized(source.model, source.spec, quantized.weights, cache=cache)

        def kl(chosen: ActivationPlan | None) -> float:
            chosen_model = model.with_activations(chosen)
            found = zip(original, at_once, strict=True)
            return sum(_total(known, chosen_model.logits(part)) for known, part in found) / rows.numel()

        weights_kl, all_kl = kl(None), kl(plan)
        say(f"int8 activations: KL {all_kl:.4f}, with quantized weights alone {weights_kl:.4f}")
        if budget is None or all_kl <= (1 + budget) * weights_kl:
            return Guarded(plan, weights_kl, all_kl, all_kl)
        costs = _costs(source, model, plan, rows[0, :_TOKENS_EACH])
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


def _costs(source: SourceModel, model: FakeQuantized, plan: ActivationPlan, row: Tensor) -> dict[str, float]:
    """KL of each linear's int8 activations alone, on tokens [length].

    The linears share a pass: the same text several times over, each time with another one's inputs quantized, and once
    with none. A model whose blocks are on disk reads them once for all of these.
    """
    names = list(plan.group_sizes)
    share = max(1, _fitting(source.spec.vocab_size, row.numel()) - 1)
    costs: dict[str, float] = {}
    for start in track(range(0, len(names), share), f"measuring {len(names)} linears' int8 activations"):
        own = names[start : start + share]
        with _one_each(source.model, plan, own):
            logits = model.logits(row.expand(len(own) + 1, -1))
        plain = _log_probabilities(logits[-1:])
        for name, each in zip(own, logits, strict=False):
            costs[name] = _total(plain, each[None]) / row.numel()
    return dict(sorted(costs.items(), key=lambda item: -item[1]))


@contextmanager
def _one_each(model: nn.Module, plan: ActivationPlan, modules: list[str]) -> Iterator[None]:
    """Inside, text number i of a batch has the inputs of module number i quantized, and no others."""

    def hook(index: int, name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def quantize(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            x = arguments[0].clone()
            x[index] = plan.apply(name, arguments[0][index : index + 1])[0]
            return (x, *arguments[1:])

        return quantize

    with ExitStack() as stack:
        for index, name in enumerate(modules):
            handle = model.get_submodule(name).register_forward_pre_hook(hook(index, name))
            stack.callback(handle.remove)
        yield


def _fitting(vocabulary: int, length: int) -> int:
    """How many texts of `length` tokens may run together."""
    return max(1, _LOGITS // (vocabulary * length))


def _log_probabilities(logits: Tensor) -> Tensor:
    """float32 [batch, length, vocabulary], in the place of the logits."""
    flat = logits.flatten(0, 1)
    for part in parts(*flat.shape):
        flat[part] = torch.log_softmax(flat[part].float(), -1)
    return flat.view_as(logits)


def _total(expected: Tensor, logits: Tensor) -> float:
    """KL in nats, summed over the tokens, from log-probabilities to logits."""
    return divergence(expected.flatten(0, 1), logits.flatten(0, 1))
