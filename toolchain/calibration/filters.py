"""Which written sequences are not fit to calibrate on: loops, and texts far from what the model usually writes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

MOST_COMPRESSIBLE = 4.0
LEAST_DISTINCT = 0.5
BAND = (0.05, 0.95)
_GRAM = 4


def is_loop(text: str, tokens: Sequence[int]) -> bool:
    """Whether a text repeats itself: it deflates to under a quarter, or half of its 4-grams of tokens recur."""
    return compression(text) > MOST_COMPRESSIBLE or distinct_share(tokens) < LEAST_DISTINCT


def compression(text: str) -> float:
    """UTF-8 bytes over their deflated size; English prose has 2 to 2.5."""
    raw = text.encode("utf-8", errors="replace")
    return len(raw) / len(zlib.compress(raw, 6))


def distinct_share(tokens: Sequence[int]) -> float:
    """Distinct 4-grams over all 4-grams; 1 for a text that is too short to have any."""
    grams = list(zip(*(tokens[start:] for start in range(_GRAM)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def in_band(nll: Tensor, fit: Tensor) -> Tensor:
    """Where the mean negative log-likelihood lies between the 5th and 95th percentile of the sequences that are fit.

    Args:
        nll: float [n].
        fit: bool [n].

    Returns:
        bool [n]; False for what is not fit.
    """
    if not bool(fit.any()):
        return fit
    low, high = torch.quantile(nll[fit].double(), torch.tensor(BAND, dtype=torch.float64)).tolist()
    return fit & (nll.double() >= low) & (nll.double() <= high)
