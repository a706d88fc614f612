"""A `.pte` with `forward(tokens, input_pos) -> last logits`, run by ExecuTorch's own Python runtime."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 (its kernels, for the runtime too)
from executorch.extension.pybindings import portable_lib
from executorch.kernels import quantized  # noqa: F401 (of the embedding tables)
from executorch.runtime import Runtime
from numpy.typing import NDArray

from benchmarks.runtimes.process import main


class ExecutorchEngine:
    """A loop over its method in Python."""

    def __init__(self, model: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        portable_lib._unsafe_reset_threadpool(threads)
        self._program = Runtime.get().load_program(model / "model.pte")
        method = self._program.load_method("forward")
        if method is None:
            raise RuntimeError("it has no method forward")
        self._method = method
        # What get_max_seq_len says is one more than a program of ExecuTorch's Llama exporter takes.
        self._most = int(method.metadata.input_tensor_meta(0).sizes()[1])
        self.notes = ["memory includes Python and PyTorch, which its Python runtime loads"]

    def _step(self, tokens: list[int], position: int) -> NDArray[np.float32]:
        at = torch.tensor([position], dtype=torch.int64)
        output = self._method.execute((torch.tensor([tokens], dtype=torch.int64), at))[0]
        found: NDArray[np.float32] = output.reshape(-1).numpy()
        return found

    def _prefill(self, tokens: list[int]) -> NDArray[np.float32]:
        logits = np.zeros(0, np.float32)
        for start in range(0, len(tokens), self._most):
            logits = self._step(tokens[start : start + self._most], start)
        return logits

    def generate(self, prompt: list[int], new_tokens: int) -> tuple[int, int, int]:
        start = time.monotonic_ns()
        ids = [int(self._prefill(prompt).argmax())]
        first = time.monotonic_ns()
        while len(ids) < new_tokens:
            ids.append(int(self._step(ids[-1:], len(prompt) + len(ids) - 1).argmax()))
        return first - start, time.monotonic_ns() - first, len(ids)

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        return np.stack([self._step([token], place).copy() for place, token in enumerate(tokens)])


if __name__ == "__main__":
    main(ExecutorchEngine)
