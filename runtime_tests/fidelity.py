"""How close the deployed model is to the original and to the PyTorch model with the same weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from boa_edge.errors import BoaEdgeError
from devices.contract import Execution
from runtime_tests import metrics
from runtime_tests.figure import Figure, figure
from runtime_tests.metrics import Logits
from runtime_tests.model import Fidelity, GreedyMatch, Scores
from runtime_tests.reference import Reference


def score(reference: Reference, logits: NDArray[np.float32] | None, execution: Execution) -> Fidelity:
    """Compare the device's logits [n, V] with the stored ones on the same n tokens.

    `execution` is that of the device; the PyTorch models were measured.

    Raises:
        BoaEdgeError: the device gave no logits, or of another shape, or not finite.
    """
    deployed = check_logits(logits, reference.quantized_logits.shape)
    original, quantized = reference.original_logits, reference.quantized_logits
    positions = len(reference.tokens)

    def perplexity(of: Logits, how: Execution) -> Figure:
        return figure(metrics.perplexity(of, reference.tokens), "per token", how, n=positions - 1)

    def kl(first: Logits, second: Logits, how: Execution) -> Figure:
        return figure(metrics.mean_kl(first, second), "nats/token", how, n=positions)

    def top1(first: Logits, second: Logits, how: Execution) -> Figure:
        return figure(metrics.top1_agreement(first, second), "fraction", how, n=positions)

    each = metrics.kl_by_position(original, deployed)
    return Fidelity(
        positions=positions,
        kl_by_position=tuple(float(f"{value:.6g}") for value in each),
        original=Scores(perplexity=perplexity(original, "measured")),
        quantized=Scores(
            perplexity=perplexity(quantized, "measured"),
            kl_from_original=kl(original, quantized, "measured"),
            top1_with_original=top1(original, quantized, "measured"),
        ),
        deployed=Scores(
            perplexity=perplexity(deployed, execution),
            kl_from_original=kl(original, deployed, execution),
            kl_from_quantized=kl(quantized, deployed, execution),
            top1_with_original=top1(original, deployed, execution),
            top1_with_quantized=top1(quantized, deployed, execution),
            max_logit_error_from_quantized=figure(
                metrics.max_logit_error(quantized, deployed), "logits", execution, n=positions
            ),
        ),
    )


def check_logits(logits: NDArray[np.float32] | None, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The device's logits, if they are what was asked for."""
    if logits is None:
        raise BoaEdgeError("the device returned no logits")
    if logits.shape != shape:
        raise BoaEdgeError(f"the device returned logits of shape {logits.shape}, not {shape}")
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        raise BoaEdgeError(f"the device's logits are not finite, first at position {int(np.argmin(finite))}")
    return logits


def greedy_match(reference: Sequence[int] | NDArray[np.int64], tokens: Sequence[int]) -> GreedyMatch:
    """Compare two continuations as far as both go."""
    equal = [int(a) == b for a, b in zip(reference, tokens, strict=False)]
    return GreedyMatch(
        compared=len(equal),
        matching=sum(equal),
        first_divergence=equal.index(False) if not all(equal) else None,
    )
