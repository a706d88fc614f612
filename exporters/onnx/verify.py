"""What an exported graph must fulfil before it becomes a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from boa_edge.errors import BoaEdgeError
from boa_edge.progress import say
from exporters.bundle import RuntimeConfig
from exporters.onnx.session import OnnxDecoder, load, session_options

_TOKENS = 4
_LARGEST_LOAD = 2 << 30
_TOLERANCE = 1e-3
_INT8_TOLERANCE = 0.1


def verify(model: Path, runtime: RuntimeConfig, weight_bytes: int) -> None:
    """The graph is valid ONNX and runs.

    It passes the checker with full shape inference, and ONNX Runtime gives the same finite logits for a few tokens at
    once as for the same tokens in two steps through the cache. Weights of more than 2 GiB are not loaded here.

    Raises:
        BoaEdgeError: one of these does not hold: a defect of the exporter, not of the input.
    """
    try:
        onnx.checker.check_model(str(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BoaEdgeError(f"is not valid ONNX ({' '.join(str(error).split())})", where=model) from error
    if weight_bytes > _LARGEST_LOAD:
        say(f"export: {weight_bytes / 2**30:.1f} GiB of weights: the graph was checked, but not run")
        return
    session = load(model, session_options(runtime.session_config))
    decoder = OnnxDecoder(session, runtime.layers, runtime.kv_heads, runtime.head_dim)
    tokens = (np.arange(_TOKENS, dtype=np.int64)[None] * 7 + 1) % runtime.vocab_size
    whole = decoder.logits(tokens)
    if whole.shape != (1, _TOKENS, runtime.vocab_size) or not np.isfinite(whole).all():
        raise BoaEdgeError(f"gives logits {whole.shape} that are not finite or not of the right shape", where=model)
    first, cache = decoder.step(tokens[:, :2], decoder.empty_cache(1))
    second, _ = decoder.step(tokens[:, 2:], cache)
    difference = float(np.abs(np.concatenate([first, second], axis=1) - whole).max() / max(np.abs(whole).max(), 1e-6))
    allowed = _TOLERANCE if runtime.activations == "float32" else _INT8_TOLERANCE
    if difference > allowed:
        raise BoaEdgeError(f"gives other logits through its cache than at once ({difference:.1e})", where=model)
