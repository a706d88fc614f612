"""A model one token at a time: the fast way where it gives the model's own logits, the ordinary way otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from boa_edge.errors import BoaEdgeError
from boa_edge.progress import say
from toolchain.calibration.grouped_attention import filled_cache, grouped

Step = Callable[[Tensor], Tensor]

_PROBE_TOKENS = 8
_TOLERANCE = 1e-3  # of probability mass; float32 sums in another order move a hundredth of it
# What a class of `transformers` that the fast way does not fit may raise.
_MISFITS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError)


@contextmanager
def stepping(model: nn.Module, room: int, *, fast: bool) -> Iterator[Step]:
    """A function that takes the next tokens int64 [batch, 1] and gives the logits after them, [batch, vocabulary].

    Args:
        room: how many tokens there will be at most.
        fast: as `steps_fast` says of this model.
    """
    config = model.config
    cache = filled_cache(config, room) if fast else DynamicCache(config=config)

    def step(tokens: Tensor) -> Tensor:
        return model(tokens, past_key_values=cache, use_cache=True).logits[:, -1]

    if fast:
        with grouped(config):
            yield step
    else:
        yield step


@torch.inference_mode()
def steps_fast(model: nn.Module) -> bool:
    """Whether the fast way gives this model's own logits, found out on a few tokens.

    Raises:
        BoaEdgeError: the model's own logits are not finite.
    """
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    tokens = torch.linspace(0, vocabulary - 1, 2 * _PROBE_TOKENS).to(torch.int64).view(2, _PROBE_TOKENS)
    own = torch.softmax(model(tokens, use_cache=False).logits.float(), -1)
    if not bool(own.isfinite().all()):
        raise BoaEdgeError("the model's predictions are not finite numbers", fix="Check the weights")
    try:
        with stepping(model, _PROBE_TOKENS, fast=True) as step:
            logits = [step(tokens[:, place : place + 1]) for place in range(_PROBE_TOKENS)]
        error = float((torch.softmax(torch.stack(logits, 1).float(), -1) - own).abs().sum(-1).amax()) / 2
    except _MISFITS as misfit:
        say(f"writing text the ordinary, slower way ({type(misfit).__name__} on the fast one)")
        return False
    if not error < _TOLERANCE:
        say(f"writing text the ordinary, slower way (the fast one's predictions differ by {error:.1%})")
        return False
    return True
