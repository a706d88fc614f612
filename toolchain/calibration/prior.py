"""The model's own unigram prior: how often it would write each token, with nothing to go by.

The mean of the distributions that follow pairs of tokens drawn from the whole vocabulary. Pairs, because at the first
position a model sees only its attention sink (after any single token, SmolLM2 expects a hyphen).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_CONTEXTS = 256


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
    contexts = torch.multinomial(allowed, 2 * _CONTEXTS, replacement=True, generator=generator)
    probabilities = _following(model, contexts.view(_CONTEXTS, 2))[:vocabulary] * allowed
    cumulative = probabilities.cumsum(0)
    return (cumulative / cumulative[-1]).numpy()


def _following(model: nn.Module, contexts: Tensor) -> Tensor:
    """Mean distribution of the token after each of `contexts` int64 [n, length], float64 [model's vocabulary]."""
    total: Tensor | None = None
    for part in contexts.split(32):
        probabilities = torch.softmax(model(part, use_cache=False).logits[:, -1].double(), -1).sum(0)
        total = probabilities if total is None else total + probabilities
    assert total is not None
    return total / contexts.shape[0]
