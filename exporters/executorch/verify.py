"""What a program must fulfil before it becomes a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from boa_edge.errors import BoaEdgeError
from boa_edge.progress import say
from exporters.bundle import RuntimeConfig
from exporters.executorch.session import ExecutorchDecoder

_TOKENS = 4
_LARGEST_LOAD = 2 << 30
# A rounding of int8 activations that falls the other way changes logits by some percent; a cache that does not work
# changes them beyond recognition.
_TOLERANCE = 0.2


def verify(model: Path, runtime: RuntimeConfig, size: int) -> None:
    """ExecuTorch loads the program and gives finite logits; much the same ones for a few tokens at once as one by one
    through the cache, and again for a second text. Files of more than 2 GiB are not loaded here.

    Raises:
        BoaEdgeError: one of these does not hold.
    """
    if size > _LARGEST_LOAD:
        say(f"export: {size / 2**30:.1f} GiB of weights: the program was not run")
        return
    decoder = ExecutorchDecoder(model, runtime)
    count = min(_TOKENS, runtime.context_length)
    tokens = [(i * 7 + 1) % runtime.vocab_size for i in range(count)]
    single = np.stack([_finite(decoder.step([token], i), model) for i, token in enumerate(tokens)])
    if single.shape != (count, runtime.vocab_size):
        raise BoaEdgeError(f"gives logits of shape {single.shape[1:]} instead of {(runtime.vocab_size,)}", where=model)
    again = _finite(decoder.prefill(tokens), model)
    difference = float(np.linalg.norm(again - single[-1]) / max(float(np.linalg.norm(single[-1])), 1e-6))
    if difference > _TOLERANCE:
        raise BoaEdgeError(f"gives other logits through its cache than at once ({difference:.1e})", where=model)


def _finite(logits: NDArray[np.float32], model: Path) -> NDArray[np.float32]:
    if not np.isfinite(logits).all():
        fix = "A weight or a scale of the checkpoint is probably broken: quantize again"
        raise BoaEdgeError("gives logits that are not finite", where=model, fix=fix)
    return logits
