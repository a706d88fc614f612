"""A model that computes with the values its integer codes stand for: the truth that every runtime is held against."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from toolchain.families import DecoderSpec
from toolchain.quantized import QuantizedWeight


class FakeQuantized:
    """`model` with some weights replaced by dequantized codes; the model itself is not touched.

    Args:
        weights: codes by module name, as `quantize_model` returns them.
    """

    def __init__(self, model: nn.Module, spec: DecoderSpec, weights: Mapping[str, QuantizedWeight]) -> None:
        self._model = model
        self._parameters = {f"{name}.weight": weight.dequantize() for name, weight in weights.items()}
        if spec.tied_embeddings and spec.embedding in weights:
            self._parameters[f"{spec.head}.weight"] = self._parameters[f"{spec.embedding}.weight"]

    def logits(self, tokens: Tensor) -> Tensor:
        """int64 [batch, length] -> float32 [batch, length, vocabulary]."""
        output = functional_call(self._model, self._parameters, (tokens,), {"use_cache": False}, tie_weights=False)
        return output.logits

    def greedy(self, prompt: Tensor, count: int) -> Tensor:
        """`count` most likely next tokens after `prompt` int64 [length]; an end token does not stop it."""
        cache, tokens, chosen = None, prompt[None], []
        with torch.inference_mode():
            for _ in range(count):
                arguments = {"past_key_values": cache, "use_cache": True}
                output = functional_call(self._model, self._parameters, (tokens,), arguments, tie_weights=False)
                cache = output.past_key_values
                tokens = output.logits[:, -1].argmax(-1, keepdim=True)
                chosen.append(int(tokens))
        return torch.tensor(chosen, dtype=torch.int64)
