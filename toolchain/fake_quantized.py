"""A model that computes with the values its integer codes stand for: the truth that every runtime is held against."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from toolchain.activations.cache import CachePlan
from toolchain.activations.plan import ActivationPlan
from toolchain.families import DecoderSpec
from toolchain.loading.streamed import streamed_blocks
from toolchain.quantized import QuantizedWeight


class FakeQuantized:
    """`model` with some weights replaced by dequantized codes; the model itself is not touched.

    Args:
        weights: codes by module name, as `quantize_model` returns them.
        activations: how the inputs of the linears are quantized; None leaves them in floating point.
        cache: how keys and values are kept; None leaves them in floating point.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: DecoderSpec,
        weights: Mapping[str, QuantizedWeight],
        activations: ActivationPlan | None = None,
        cache: CachePlan | None = None,
    ) -> None:
        self._model, self._spec, self._activations, self._cache = model, spec, activations, cache
        self._weights, self._blocks = weights, streamed_blocks(model)
        inside = set() if self._blocks is None else self._blocks.modules  # replaced while they are read
        self._parameters = {f"{name}.weight": weights[name].dequantize() for name in weights if name not in inside}
        if spec.tied_embeddings and spec.embedding in weights:
            self._parameters[f"{spec.head}.weight"] = self._parameters[f"{spec.embedding}.weight"]

    def with_activations(self, activations: ActivationPlan | None) -> FakeQuantized:
        """The same weights, not dequantized again, with other activations."""
        other = copy.copy(self)
        other._activations = activations
        return other

    def logits(self, tokens: Tensor) -> Tensor:
        """int64 [batch, length] -> float32 [batch, length, vocabulary]."""
        return self._call(tokens, use_cache=False).logits

    def _call(self, tokens: Tensor, **arguments: Any) -> Any:
        with ExitStack() as stack:
            if self._blocks is not None:
                stack.enter_context(self._blocks.replaced(self._weights))
            if self._activations is not None:
                stack.enter_context(self._activations.installed(self._model))
            if self._cache is not None:
                stack.enter_context(self._cache.installed(self._model, self._spec))
            return functional_call(self._model, self._parameters, (tokens,), arguments, tie_weights=False)

    def greedy(self, prompt: Tensor, count: int) -> Tensor:
        """`count` most likely next tokens after `prompt` int64 [length]; an end token does not stop it."""
        cache, tokens, chosen = None, prompt[None], []
        with torch.inference_mode():
            for _ in range(count):
                output = self._call(tokens, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                tokens = output.logits[:, -1].argmax(-1, keepdim=True)
                chosen.append(int(tokens))
        return torch.tensor(chosen, dtype=torch.int64)
