"""What an exported graph must fulfil before it becomes a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from boa_edge.errors import BoaEdgeError
from boa_edge.progress import say
from exporters.bundle import RuntimeConfig
from exporters.onnx.decoder import DecoderBuilder
from exporters.onnx.kernels import FLOAT_INPUTS
from exporters.onnx.ran import Ran, recorded
from exporters.onnx.session import OnnxDecoder, load, session_options
from exporters.reference import difference, reference_logits
from toolchain.activations.plan import ActivationPlan

_TOKENS = 4
_LARGEST_LOAD = 2 << 30
_TOLERANCE = 1e-3
# Where something is rounded (an int8 cache, inputs of linears), a value near a tie goes the other way by its last bit.
_ROUNDED_TOLERANCE = 3e-2
# The same against PyTorch, whose sums have another order from the first layer on.
_ROUNDED_OTHERWISE = 0.1
# Of what rounding changes at all, on processors whose kernels round in their own way; what has nothing in common with
# the right logits is 1.4 away.
_SHARE_OF_ROUNDING, _LARGEST_SHARE = 2.0, 0.9


@dataclass(frozen=True)
class _Graph:
    """A graph in a file, and what is known of it."""

    path: Path
    runtime: RuntimeConfig
    written: DecoderBuilder
    tokens: NDArray[np.int64]

    def run(self, session: onnxruntime.InferenceSession) -> tuple[OnnxDecoder, NDArray[np.float32]]:
        """The decoder and its logits for the tokens, which are finite and as many as they should be."""
        decoder = OnnxDecoder(session, self.runtime, self.path)
        logits = decoder.logits(self.tokens)
        expected = (1, self.tokens.shape[1], self.runtime.vocab_size)
        if logits.shape != expected:
            raise BoaEdgeError(f"gives logits of shape {logits.shape} instead of {expected}", where=self.path)
        if not np.isfinite(logits).all():
            fix = "A weight or a scale of the checkpoint is probably broken: quantize again"
            raise BoaEdgeError("gives logits that are not finite", where=self.path, fix=fix)
        return decoder, logits

    def compare(self, logits: NDArray[np.float32], plan: ActivationPlan | None) -> None:
        """With those of the checkpoint's codes, their linears' inputs rounded by `plan`."""
        checkpoint = self.written.checkpoint
        expected = reference_logits(checkpoint, self.tokens, plan)
        error = difference(logits, expected)
        limit = _TOLERANCE if plan is None and checkpoint.kv_cache is None else _ROUNDED_OTHERWISE
        if plan is not None and not error <= limit:
            away = difference(expected, reference_logits(checkpoint, self.tokens, None))
            limit += min(_SHARE_OF_ROUNDING * away, _LARGEST_SHARE)
        if not error <= limit:
            raise BoaEdgeError(
                f"gives other logits than the checkpoint's codes with {'float32' if plan is None else 'int8'} "
                f"activations (relative error {error:.1e}, of which {limit:.1g} may be rounding)",
                where=self.path,
                fix="A kernel of ONNX Runtime or this export is wrong for these shapes: report it with the "
                "checkpoint's config.json, and choose another --form",
            )


def verify(model: Path, runtime: RuntimeConfig, written: DecoderBuilder, weight_bytes: int) -> Ran | None:
    """The graph is valid ONNX and computes what the checkpoint's codes say.

    It passes the checker with full shape inference. ONNX Runtime loads it with the bundle's settings and gives, for a
    few tokens, the logits of the codes in PyTorch, up to the rounding of activations. With float32 activations, as far
    as the form has them, it gives the same at once as in two steps through the cache (with int8 activations the
    rounding of the two differs by design). Weights of more than 2 GiB are not loaded here.

    Args:
        written: what has built the graph.

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
    count = min(_TOKENS, runtime.context_length)
    tokens = (np.arange(count, dtype=np.int64)[None] * 7 + 1) % runtime.vocab_size
    graph = _Graph(model, runtime, written, tokens)
    shipped: list[NDArray[np.float32]] = []

    def run(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        session = load(path, options)
        shipped.append(graph.run(session)[1])
        return session

    ran = recorded(model, session_options(runtime.session_config), run)
    exact = {**runtime.session_config, **FLOAT_INPUTS}
    decoder, whole = graph.run(load(model, session_options(exact)))
    half = -(-count // 2)
    first, cache = decoder.step(tokens[:, :half], decoder.empty_cache(1))
    second = decoder.step(tokens[:, half:], cache)[0] if half < count else first[:, :0]
    apart = float(np.abs(np.concatenate([first, second], axis=1) - whole).max() / max(np.abs(whole).max(), 1e-6))
    # Of nodes that state their precision themselves, the session's option makes only those of 4 bits float32.
    plan = written.own_plan if runtime.form == "qdq" else written.plan
    rounded = plan is not None or cache["past_key_values.0.key"].dtype == np.int8
    if apart > (_ROUNDED_TOLERANCE if rounded else _TOLERANCE):
        raise BoaEdgeError(f"gives other logits through its cache than at once ({apart:.1e})", where=model)
    graph.compare(shipped[0], written.plan)
    if plan != written.plan:
        graph.compare(whole, plan)
    return ran
