"""How a text enters a model's blocks: its embedded tokens, and what the model hands each block besides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from boa_edge.errors import BoaEdgeError
from toolchain.statistics.attention import ATTENTION, Stop


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The blocks of a causal language model of `transformers`: its outermost list of as many modules as it has layers.

    Raises:
        BoaEdgeError: there is no such list.
    """
    config: Any = model.config
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return module
    raise BoaEdgeError(f"no list of {config.num_hidden_layers} blocks is found", where=type(model).__name__)


@contextmanager
def own_attention(model: nn.Module) -> Iterator[None]:
    """Inside, the model's attention goes through `toolchain.statistics.attention`."""
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def entry(model: nn.Module, length: int) -> tuple[list[dict[str, Any]], Callable[[Tensor], Tensor]]:
    """Run the model around its blocks.

    Returns:
        per block, the arguments it is given besides the hidden states for texts of `length` tokens (masks, positions,
        rotary embeddings), and a function from tokens int64 [B, length] to the first block's input [B, length, d].
    """
    layers = decoder_layers(model)
    seen: list[dict[str, Any]] = []

    def around(tokens: Tensor, forwards: list[Callable[..., Tensor]]) -> None:
        with ExitStack() as stack:
            stack.enter_context(own_attention(model))
            for layer, forward in zip(layers, forwards, strict=True):
                layer.forward = forward
                stack.callback(delattr, layer, "forward")
            with suppress(Stop):
                model(tokens, use_cache=False)

    def note(hidden: Tensor, **arguments: Any) -> Tensor:
        seen.append({**arguments, "past_key_values": None, "use_cache": False})
        if len(seen) == len(layers):
            raise Stop
        return hidden

    around(torch.zeros(1, length, dtype=torch.int64), [note] * len(layers))

    def embed(tokens: Tensor) -> Tensor:
        taken: list[Tensor] = []

        def take(hidden: Tensor, **_: Any) -> Tensor:
            taken.append(hidden)
            raise Stop

        around(tokens, [take] * len(layers))
        return taken[0]

    return seen, embed
