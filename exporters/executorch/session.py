"""ExecuTorch on the host, with its own kernels for attention and cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 (its kernels, for the runtime too)
from executorch.kernels import quantized  # noqa: F401 (of the embedding tables)
from executorch.runtime import Runtime
from numpy.typing import NDArray

from boa_edge.errors import BoaEdgeError, UsageError
from exporters.bundle import Bundle, RuntimeConfig


class ExecutorchDecoder:
    """Runs a program of the form `llm` (docs/contracts.md).

    Attributes:
        runtime: the bundle's settings.
    """

    def __init__(self, model: Path, runtime: RuntimeConfig) -> None:
        self.runtime = runtime
        self._position = 0
        try:
            # By path, so that the weights are pages of the file; the method does not keep its program alive.
            self._program = Runtime.get().load_program(model)
            method = self._program.load_method("forward")
        except Exception as error:  # (the runtime raises what it likes)
            raise BoaEdgeError(f"ExecuTorch cannot load it ({_line(error)})", where=model) from error
        if method is None:
            raise BoaEdgeError("has no method forward", where=model)
        self._method, self._model = method, model

    @classmethod
    def open(cls, bundle: Bundle) -> ExecutorchDecoder:
        """From a checked bundle.

        Raises:
            BoaEdgeError: the bundle is for another runtime, or ExecuTorch refuses its program.
        """
        if bundle.runtime.runtime != "executorch":
            raise BoaEdgeError(f"is a bundle for {bundle.runtime.runtime!r}, not for ExecuTorch", where=bundle.path)
        return cls(bundle.model, bundle.runtime)

    def step(self, tokens: Sequence[int], position: int) -> NDArray[np.float32]:
        """Feed the tokens that stand at `position` and after; 0 starts a new text.

        Args:
            tokens: at least one, and no more than `runtime.prefill_length`.

        Returns:
            Logits float32 [vocabulary] of the last one.

        Raises:
            ValueError: too many or too few tokens, an id outside of the vocabulary, or a position that does not follow
                on the last one (caches of windows have no room for what came before).
            BoaEdgeError: the runtime fails.
        """
        runtime = self.runtime
        if not 0 < len(tokens) <= (runtime.prefill_length or 1):
            raise ValueError(f"{len(tokens)} tokens at once; 1 to {runtime.prefill_length} are possible")
        if position + len(tokens) > runtime.context_length:
            raise ValueError(f"{position + len(tokens)} tokens; the context holds {runtime.context_length}")
        if position not in (0, self._position):
            raise ValueError(f"position {position} after {self._position} tokens")
        ids = torch.tensor([list(tokens)], dtype=torch.int64)
        if int(ids.min()) < 0 or int(ids.max()) >= runtime.vocab_size:
            raise ValueError(f"a token id outside of 0 to {runtime.vocab_size - 1}")
        try:
            outputs: Any = self._method.execute((ids, torch.tensor([position], dtype=torch.int64)))
        except Exception as error:  # (as above)
            raise BoaEdgeError(f"ExecuTorch cannot run it ({_line(error)})", where=self._model) from error
        self._position = position + len(tokens)
        logits: NDArray[np.float32] = outputs[0].reshape(-1).numpy()
        return logits

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Feed a new text, in as many steps as it takes. Returns float32 [vocabulary], after its last token."""
        most = self.runtime.prefill_length or 1
        logits = np.zeros(0, np.float32)
        for start in range(0, len(tokens), most):
            logits = self.step(tokens[start : start + most], start)
        return logits

    def logits(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """tokens int64 [batch, length] -> logits float32 [batch, length, vocabulary], token by token.

        Raises:
            UsageError: the text is longer than the context.
        """
        limit = self.runtime.context_length
        if tokens.shape[1] > limit:
            fix = "Use shorter sequences (--seq-len), or export with a longer --context"
            raise UsageError(f"{tokens.shape[1]} tokens; the context holds {limit}", where=self._model, fix=fix)
        rows = [np.stack([self.step([int(token)], i) for i, token in enumerate(row)]) for row in tokens]
        return np.stack(rows)

    def greedy(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """The `new_tokens` most likely ids after `prompt`, one after the other, none of them treated as an end."""
        generated = [int(self.prefill(prompt).argmax())]
        while len(generated) < new_tokens:
            generated.append(int(self.step(generated[-1:], len(prompt) + len(generated) - 1).argmax()))
        return generated


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
