"""How far one model's predictions are from the text and from another model's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from boa_edge.progress import track

Logits = Callable[[Tensor], Tensor]


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


@torch.inference_mode()
def evaluate_logits(model: Logits, sequences: Tensor, reference: Logits | None, what: str) -> Fidelity:
    """Teacher-forced fidelity.

    Args:
        model, reference: token ids int64 [1, length] -> logits float [1, length, vocabulary].
        sequences: int64 [n, length]; every token but the first of a sequence is predicted.
    """
    nll = reference_nll = divergence = 0.0
    agreed = predicted = 0
    for row in track(sequences, what):
        targets = row[1:]
        scores = torch.log_softmax(model(row[None])[0, :-1].float(), -1)
        nll -= float(scores.gather(1, targets[:, None]).sum(dtype=torch.float64))
        predicted += targets.numel()
        if reference is not None:
            truth = torch.log_softmax(reference(row[None])[0, :-1].float(), -1)
            reference_nll -= float(truth.gather(1, targets[:, None]).sum(dtype=torch.float64))
            divergence += float((truth.exp() * (truth - scores)).sum(dtype=torch.float64))
            agreed += int((truth.argmax(-1) == scores.argmax(-1)).sum())
    return Fidelity(
        perplexity=math.exp(min(nll / predicted, 700.0)),
        kl=None if reference is None else divergence / predicted,
        top1=None if reference is None else agreed / predicted,
        reference_perplexity=None if reference is None else math.exp(min(reference_nll / predicted, 700.0)),
        predicted=predicted,
    )
