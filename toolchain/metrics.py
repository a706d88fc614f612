"""How far one model's predictions are from the text and from another model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from boa_edge.progress import track

Logits = Callable[[Tensor], Tensor]
_ELEMENTS = 1 << 22  # that are worked on at once


@dataclass(frozen=True)
class Fidelity:
    """Mean over all predicted tokens of a text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the next token.
        kl: mean KL(reference || model), nats per token; None without a reference.
        top1: share of positions where both models' most likely token is the same; None without a reference.
        reference_perplexity: of the reference; None without one.
        predicted: tokens that were predicted.
    """

    perplexity: float
    kl: float | None
    top1: float | None
    reference_perplexity: float | None
    predicted: int


def evaluate_logits(model: Logits, sequences: Tensor, reference: Logits | None, what: str) -> Fidelity:
    """Teacher-forced fidelity of one model; arguments as for `evaluate_all`."""
    return evaluate_all([model], sequences, reference, what)[0]


@torch.inference_mode()
def evaluate_all(models: Sequence[Logits], sequences: Tensor, reference: Logits | None, what: str) -> list[Fidelity]:
    """Teacher-forced fidelity of several models against one reference, whose logits are computed once.

    Args:
        models, reference: token ids int64 [1, length] -> logits float [1, length, vocabulary].
        sequences: int64 [n, length]; every token but the first of a sequence is predicted.
    """
    nll, kl, agreed = [0.0] * len(models), [0.0] * len(models), [0] * len(models)
    reference_nll = 0.0
    for row in track(sequences, what):
        targets = row[1:, None]
        truth = None
        if reference is not None:
            truth = torch.log_softmax(reference(row[None])[0, :-1].float(), -1)
            reference_nll -= float(truth.gather(1, targets).sum(dtype=torch.float64))
        for index, model in enumerate(models):
            logits = model(row[None])[0, :-1]
            for part in parts(*logits.shape):
                scores = torch.log_softmax(logits[part].float(), -1)
                nll[index] -= float(scores.gather(1, targets[part]).sum(dtype=torch.float64))
                if truth is not None:
                    kl[index] += _kl(truth[part], scores)
                    agreed[index] += int((truth[part].argmax(-1) == scores.argmax(-1)).sum())
    predicted = sequences.shape[0] * (sequences.shape[1] - 1)
    return [
        Fidelity(
            perplexity=_perplexity(nll[index], predicted),
            kl=None if reference is None else kl[index] / predicted,
            top1=None if reference is None else agreed[index] / predicted,
            reference_perplexity=None if reference is None else _perplexity(reference_nll, predicted),
            predicted=predicted,
        )
        for index in range(len(models))
    ]


def divergence(truth: Tensor, logits: Tensor) -> float:
    """KL(truth || softmax of logits) in nats, summed over positions; log-probabilities and logits [n, vocabulary]."""
    slices = parts(*logits.shape)
    return sum(_kl(truth[part], torch.log_softmax(logits[part].float(), -1)) for part in slices)


def _kl(truth: Tensor, scores: Tensor) -> float:
    return float((truth.exp() * (truth - scores)).sum(dtype=torch.float64))


def parts(positions: int, vocabulary: int) -> list[slice]:
    """Slices of the positions, each of some 16 MB: what is larger is handed back to the system and fetched again."""
    size = max(1, _ELEMENTS // vocabulary)
    return [slice(start, start + size) for start in range(0, positions, size)]


def _perplexity(nll: float, predicted: int) -> float:
    return math.exp(min(nll / predicted, 700.0))
