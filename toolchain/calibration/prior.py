"""The model's own unigram prior: how often it would write each token, with nothing to go by.

The next-token distributions after single tokens are one step of a Markov chain. From the whole vocabulary, a few steps
of it come close to the chain's stationary distribution, and no data are needed.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_CONTEXTS = 128
_STEPS = 3


@torch.inference_mode()
def unigram_prior(model: nn.Module, vocabulary: int, forbidden: list[int], seed: int) -> NDArray[np.float64]:
    """Cumulative probabilities, float64 [vocabulary], ending at 1.

    Args:
        vocabulary: tokens that the tokenizer knows; the model's table may be longer.
        forbidden: ids that are never drawn (special tokens).
    """
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.ones(vocabulary, dtype=torch.float64)
    allowed[[token for token in forbidden if 0 <= token < vocabulary]] = 0
    probabilities = allowed / allowed.sum()
    for _ in range(_STEPS):
        contexts = torch.multinomial(probabilities, _CONTEXTS, replacement=True, generator=generator)
        probabilities = _following(model, contexts)[:vocabulary] * allowed
        probabilities /= probabilities.sum()
    cumulative = probabilities.cumsum(0)
    return (cumulative / cumulative[-1]).numpy()


def _following(model: nn.Module, contexts: Tensor) -> Tensor:
    """Mean distribution of the token after each of `contexts` int64 [n], float64 [model's vocabulary]."""
    total: Tensor | None = None
    for part in contexts.split(32):
        probabilities = torch.softmax(model(part[:, None], use_cache=False).logits[:, -1].double(), -1).sum(0)
        total = probabilities if total is None else total + probabilities
    assert total is not None
    return total / contexts.numel()
