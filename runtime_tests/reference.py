"""The reference text of a bundle: what the original and the fake-quantized model answered in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from boa_edge.errors import BoaEdgeError

_FIX = "Quantize and export the model again"
_RANKS = {
    "tokens": 1,
    "original_logits": 2,
    "quantized_logits": 2,
    "prompt": 1,
    "original_greedy": 1,
    "quantized_greedy": 1,
}


@dataclass(frozen=True)
class Reference:
    """A short held-out text and a prompt, with the answers of both PyTorch models.

    Attributes:
        tokens: int64 [n].
        original_logits: float16 [n, V], row i predicts tokens[i + 1].
        quantized_logits: float32 [n, V], of the model whose weights are the bundle's codes.
        prompt: int64 [p].
        original_greedy: int64 [g], what follows the prompt.
        quantized_greedy: int64 [g].
    """

    tokens: NDArray[np.int64]
    original_logits: NDArray[Any]
    quantized_logits: NDArray[Any]
    prompt: NDArray[np.int64]
    original_greedy: NDArray[np.int64]
    quantized_greedy: NDArray[np.int64]

    @property
    def vocabulary(self) -> int:
        """Columns of the logits."""
        return int(self.quantized_logits.shape[1])

    def head(self, positions: int) -> Reference:
        """The same with only the first `positions` of the text: attention is causal, so the logits stay true."""
        return Reference(
            self.tokens[:positions],
            self.original_logits[:positions],
            self.quantized_logits[:positions],
            self.prompt,
            self.original_greedy,
            self.quantized_greedy,
        )


def read_reference(path: Path, vocabulary: int | None = None) -> Reference:
    """Read `reference.safetensors` and check that its parts fit each other and a `vocabulary` if one is given.

    Raises:
        BoaEdgeError: it is missing, damaged, incomplete or inconsistent.
    """
    if not path.exists():
        raise BoaEdgeError("the reference text is missing", where=path, fix=_FIX)
    try:
        with safe_open(path, framework="numpy") as tensors:
            missing = [name for name in _RANKS if name not in tensors.keys()]  # noqa: SIM118 (not a mapping)
            if missing:
                raise BoaEdgeError(f"has no tensor {missing[0]!r}", where=path, fix=_FIX)
            parts = {name: tensors.get_tensor(name) for name in _RANKS}
    except (SafetensorError, OSError) as error:
        raise BoaEdgeError(f"is truncated or damaged ({error})", where=path, fix=_FIX) from None
    reference = Reference(**parts)
    problem = _problem(reference, vocabulary)
    if problem:
        raise BoaEdgeError(problem, where=path, fix=_FIX)
    return reference


def _problem(reference: Reference, vocabulary: int | None) -> str | None:
    for name, rank in _RANKS.items():
        array = getattr(reference, name)
        kind = "f" if rank == 2 else "iu"
        if array.ndim != rank or array.dtype.kind not in kind or 0 in array.shape:
            return f"{name} has shape {array.shape} and type {array.dtype}"
    if len(reference.tokens) < 2:
        return "the reference text is shorter than two tokens"
    shape = (len(reference.tokens), vocabulary or reference.vocabulary)
    for name in ("original_logits", "quantized_logits"):
        if getattr(reference, name).shape != shape:
            return f"{name} has shape {getattr(reference, name).shape}, not {shape}"
        if not np.isfinite(getattr(reference, name)).all():
            return f"{name} are not all finite"
    for name in ("tokens", "prompt", "original_greedy", "quantized_greedy"):
        ids = getattr(reference, name)
        if ids.min() < 0 or ids.max() >= shape[1]:
            return f"{name} has an id outside the vocabulary of {shape[1]}"
    return None
