"""What a program must fulfil before it becomes a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from boa_edge.errors import BoaEdgeError
from boa_edge.progress import say
from exporters.bundle import RuntimeConfig
from exporters.executorch.session import ExecutorchDecoder
from exporters.reference import reference_logits
from toolchain.activations import ActivationFormat
from toolchain.activations.plan import ActivationPlan
from toolchain.checkpoint import Checkpoint

_TOKENS = 16
_LARGEST_LOAD = 2 << 30
# A rounding of int8 activations that falls the other way changes logits by some percent; a cache that does not work
# changes them beyond recognition.
_TOLERANCE = 0.2
_FLOAT_TOLERANCE = 3e-3
# Of what int8 activations change at all. Roundings that all fall otherwise make it 1.4: they differ from each other as
# much as each does from none (measured on 30 layers: 0.4 to 1.2).
_SHARE_OF_ROUNDING, _LEAST = 2.0, 1e-3
_FIX = "This is an error of boa-edge or ExecuTorch, not of the checkpoint: please report it, with the checkpoint"


def verify(model: Path, runtime: RuntimeConfig, size: int, checkpoint: Checkpoint) -> None:
    """ExecuTorch loads the program and gives finite logits: for a few tokens those that PyTorch computes with the
    values of the checkpoint's codes, and much the same at once as one by one through the cache, again for a second
    text. Files of more than 2 GiB are not loaded here.

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
    difference = float(_distances(again, single[-1]))
    if difference > _TOLERANCE:
        raise BoaEdgeError(f"gives other logits through its cache than at once ({difference:.1e})", where=model)
    _compare(single, checkpoint, runtime, tokens, model)


def _compare(
    found: NDArray[np.float32], checkpoint: Checkpoint, runtime: RuntimeConfig, tokens: list[int], model: Path
) -> None:
    ids = np.asarray([tokens], np.int64)
    exact = reference_logits(checkpoint, ids, None)[0]
    if runtime.activations == "float32":
        difference, tolerance = float(_distances(found, exact).max()), _FLOAT_TOLERANCE
    else:
        expected = reference_logits(checkpoint, ids, _plan(checkpoint))[0]
        # Medians: single tokens, above all the first, change many times as much as the others.
        difference = float(np.median(_distances(found, expected)))
        tolerance = _LEAST + _SHARE_OF_ROUNDING * float(np.median(_distances(expected, exact)))
    if not difference <= tolerance:
        problem = (
            f"gives other logits than the checkpoint's codes ({difference:.1e}; rounding makes up to {tolerance:.1e})"
        )
        raise BoaEdgeError(problem, where=model, fix=_FIX)


def _plan(checkpoint: Checkpoint) -> ActivationPlan:
    """Every linear that stands as codes takes int8, but for those that the checkpoint spares."""
    spec, own = checkpoint.spec, checkpoint.activations
    modules = [name for name in (*spec.linear_inputs(), spec.head) if checkpoint.is_quantized(name)]
    kept: frozenset[str] = frozenset() if own is None else own.kept & set(modules)
    return ActivationPlan(ActivationFormat("per_token"), dict.fromkeys(modules), kept)


def _distances(found: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float32]:
    """By token, relative to the expected logits."""
    sizes = np.maximum(np.linalg.norm(expected, axis=-1), 1e-6)
    distances: NDArray[np.float32] = np.linalg.norm(found - expected, axis=-1) / sizes
    return distances


def _finite(logits: NDArray[np.float32], model: Path) -> NDArray[np.float32]:
    if not np.isfinite(logits).all():
        fix = "A weight or a scale of the checkpoint is probably broken: quantize again"
        raise BoaEdgeError("gives logits that are not finite", where=model, fix=fix)
    return logits
