"""How close one set of logits is to another: float64, a chunk of rows at a time.

Rows are positions of one teacher-forced token sequence, columns the vocabulary: logits are [n, V], tokens [n], and
row i predicts token i + 1. Every mean is over rows. Divergences are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[Any]
Tokens = NDArray[np.integer[Any]]

_CHUNK_BYTES = 64 << 20


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Row-wise log-probabilities [n, V]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def perplexity(logits: Logits, tokens: Tokens) -> float:
    """exp of the mean negative log-likelihood of tokens[1:], per token; infinite where it overflows."""
    _check_logits(logits)
    if tokens.ndim != 1 or len(tokens) != len(logits):
        raise ValueError(f"{len(logits)} rows of logits for tokens of shape {tokens.shape}")
    if len(tokens) < 2:
        raise ValueError("a perplexity needs two tokens")
    if tokens.min() < 0 or tokens.max() >= logits.shape[1]:
        raise ValueError(f"a token id lies outside the {logits.shape[1]} columns")
    total = 0.0
    for rows in _chunks(logits.shape, stop=len(tokens) - 1):
        targets = tokens[rows.start + 1 : rows.stop + 1]
        total -= float(log_softmax(logits[rows])[np.arange(len(targets)), targets].sum())
    try:
        return math.exp(total / (len(tokens) - 1))
    except OverflowError:
        return math.inf


def mean_kl(reference: Logits, other: Logits) -> float:
    """Mean over positions of KL(reference || other), in nats per token; at least 0."""
    return float(kl_by_position(reference, other).mean())


def kl_by_position(reference: Logits, other: Logits) -> NDArray[np.float64]:
    """KL(reference || other) at each position [n], in nats; at least 0."""
    _check_pair(reference, other)
    found = np.empty(len(reference))
    for rows in _chunks(reference.shape):
        p, q = log_softmax(reference[rows]), log_softmax(other[rows])
        found[rows] = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)
    return found


def top1_agreement(reference: Logits, other: Logits) -> float:
    """The fraction of positions where both rows have their largest logit at the same token (the first of equals)."""
    _check_pair(reference, other)
    return float(np.mean(reference.argmax(axis=-1) == other.argmax(axis=-1)))


def max_logit_error(reference: Logits, other: Logits) -> float:
    """The largest absolute difference of two logits."""
    _check_pair(reference, other)
    return max(
        float(np.abs(reference[rows].astype(np.float64) - other[rows].astype(np.float64)).max())
        for rows in _chunks(reference.shape)
    )


def _chunks(shape: tuple[int, ...], stop: int | None = None) -> Iterator[slice]:
    end = shape[0] if stop is None else stop
    step = max(1, _CHUNK_BYTES // (8 * shape[1]))
    for start in range(0, end, step):
        yield slice(start, min(start + step, end))


def _check_pair(reference: Logits, other: Logits) -> None:
    _check_logits(reference)
    _check_logits(other)
    if reference.shape != other.shape:
        raise ValueError(f"logits of shapes {reference.shape} and {other.shape} cannot be compared")


def _check_logits(logits: Logits) -> None:
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits must be [positions, vocabulary], not {logits.shape}")
    for rows in _chunks(logits.shape):
        if not np.isfinite(logits[rows]).all():
            raise ValueError("logits must be finite")
