"""What an exported graph must fulfil before it becomes a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from boa_edge.errors import BoaEdgeError
from boa_edge.progress import say
from exporters.bundle import RuntimeConfig
from exporters.onnx.kernels import FLOAT_INPUTS
from exporters.onnx.ran import Ran, recorded
from exporters.onnx.session import OnnxDecoder, load, session_options

_TOKENS = 4
_LARGEST_LOAD = 2 << 30
_TOLERANCE = 1e-3
# Where something is rounded whatever the session says (an int8 cache, inputs of int8 products), a value near a tie goes
# the other way by its last bit.
_ROUNDED_TOLERANCE = 3e-2


def verify(model: Path, runtime: RuntimeConfig, weight_bytes: int, *, rounds: bool = False) -> Ran | None:
    """The graph is valid ONNX and runs.

    It passes the checker with full shape inference. ONNX Runtime loads it with the bundle's settings and gives finite
    logits. With float32 activations, as far as the form has them, it gives the same logits for a few tokens at once as
    in two steps through the cache (with int8 activations the rounding of the two differs by design). Weights of more
    than 2 GiB are not loaded here.

    Args:
        rounds: whether the graph itself rounds activations, whatever the session's options.

    Returns:
        what ran with the bundle's settings; None where nothing was run.

    Raises:
        BoaEdgeError: one of these does not hold.
    """
    try:
        onnx.checker.check_model(str(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BoaEdgeError(f"is not valid ONNX ({' '.join(str(error).split())})", where=model) from error
    if weight_bytes > _LARGEST_LOAD:
        say(f"export: {weight_bytes / 2**30:.1f} GiB of weights: the graph was checked, but not run")
        return None
    tokens = (np.arange(_TOKENS, dtype=np.int64)[None] * 7 + 1) % runtime.vocab_size

    def run(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        session = load(path, options)
        _finite_logits(_decoder(session, runtime), tokens, model, runtime)
        return session

    ran = recorded(model, session_options(runtime.session_config), run)
    exact = {**runtime.session_config, **FLOAT_INPUTS}
    decoder = _decoder(load(model, session_options(exact)), runtime)
    whole = _finite_logits(decoder, tokens, model, runtime)
    first, cache = decoder.step(tokens[:, :2], decoder.empty_cache(1))
    second, _ = decoder.step(tokens[:, 2:], cache)
    difference = float(np.abs(np.concatenate([first, second], axis=1) - whole).max() / max(np.abs(whole).max(), 1e-6))
    rounded = rounds or cache["past_key_values.0.key"].dtype == np.int8 or runtime.form == "fused-int8"
    if difference > (_ROUNDED_TOLERANCE if rounded else _TOLERANCE):
        raise BoaEdgeError(f"gives other logits through its cache than at once ({difference:.1e})", where=model)
    return ran


def _decoder(session: onnxruntime.InferenceSession, runtime: RuntimeConfig) -> OnnxDecoder:
    return OnnxDecoder(session, runtime.layers, runtime.kv_heads, runtime.head_dim, runtime.form)


def _finite_logits(
    decoder: OnnxDecoder, tokens: NDArray[np.int64], model: Path, runtime: RuntimeConfig
) -> NDArray[np.float32]:
    logits = decoder.logits(tokens)
    expected = (1, _TOKENS, runtime.vocab_size)
    if logits.shape != expected:
        raise BoaEdgeError(f"gives logits of shape {logits.shape} instead of {expected}", where=model)
    if not np.isfinite(logits).all():
        fix = "A weight or a scale of the checkpoint is probably broken: quantize again"
        raise BoaEdgeError("gives logits that are not finite", where=model, fix=fix)
    return logits
