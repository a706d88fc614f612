"""ONNX Runtime on the host, with the session settings that the bundle asks for."""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from boa_edge.errors import BoaEdgeError, UsageError
from exporters.bundle import RUNTIME, Bundle, RuntimeConfig
from exporters.onnx.settings import check_settings

onnxruntime.disable_telemetry_events()

LOGITS_START, ALL_LOGITS = "logits_start", "all_logits"
"""Of the fused form, whose `logits` are the last position's. Input int64 [1]: the first position whose logits are
wanted too; none where it is not given. Output float32 [batch, positions, vocabulary]: theirs."""

Cache = NDArray[np.float32] | NDArray[np.int8]

_PROVIDERS = ["CPUExecutionProvider"]
_WARNING = 3


def session_options(config: Mapping[str, str], threads: int | None = None) -> onnxruntime.SessionOptions:
    """All optimizations (a lower level runs quantized linears in float32), `config` set, telemetry off.

    Args:
        threads: threads of one operator; None leaves it to the runtime (one per core).
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _WARNING
    if threads is not None:
        options.intra_op_num_threads = threads
    for key, value in config.items():
        try:
            options.add_session_config_entry(key, value)
        except Exception as error:  # (the runtime's exceptions share no other base)
            problem = f"session_config: ONNX Runtime refuses the option {key[:80]!r} ({_line(error)})"
            raise BoaEdgeError(problem, where=RUNTIME, fix="Export the bundle again") from error
    return options


def load(model: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """Open a graph on the CPU. Raises BoaEdgeError where the runtime refuses it."""
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=_PROVIDERS)
    except Exception as error:  # (the runtime's exceptions share no other base)
        raise BoaEdgeError(f"ONNX Runtime cannot load it ({_line(error)})", where=model) from error


def open_session(bundle: Bundle, threads: int | None = None) -> onnxruntime.InferenceSession:
    """The bundle's graph, ready to run.

    Raises:
        BoaEdgeError: the bundle is for another runtime, or ONNX Runtime refuses it.
    """
    if bundle.runtime.runtime != "onnx":
        raise BoaEdgeError(f"is a bundle for {bundle.runtime.runtime!r}, not for ONNX Runtime", where=bundle.path)
    return load(bundle.model, session_options(bundle.runtime.session_config, threads))


class OnnxDecoder:
    """Runs a decoder with the inputs and outputs of docs/contracts.md.

    Args:
        model: the graph's file, which errors name.

    Attributes:
        runtime: the bundle's settings.
        layers, kv_heads, head_dim: the shape of its cache.
        form: which inputs the graph takes. The `fused` one knows no padding, and takes several tokens after others only
            at batch 1.

    Raises:
        BoaEdgeError: the settings are not the graph's.
    """

    def __init__(self, session: onnxruntime.InferenceSession, runtime: RuntimeConfig, model: Path) -> None:
        self.session, self.runtime, self.form = session, runtime, runtime.form
        self.layers, self.kv_heads, self.head_dim = runtime.layers, runtime.kv_heads, runtime.head_dim
        self._model = model
        self._outputs = [output.name for output in session.get_outputs()]
        check_settings(session, runtime, model)
        kinds = {each.name: each.type for each in session.get_inputs()}
        self._cache_type: type[Any] = np.int8 if kinds["past_key_values.0.key"] == "tensor(int8)" else np.float32

    @classmethod
    def open(cls, bundle: Bundle, threads: int | None = None) -> OnnxDecoder:
        """From a checked bundle. Raises what `open_session` raises."""
        return cls(open_session(bundle, threads), bundle.runtime, bundle.model)

    def empty_cache(self, batch: int) -> dict[str, Cache]:
        """`past_key_values.N.key|value`, float32 or int8 [batch, kv_heads, 0, head_dim]."""
        nothing: Cache = np.zeros((batch, self.kv_heads, 0, self.head_dim), self._cache_type)
        return {f"past_key_values.{i}.{part}": nothing for i in range(self.layers) for part in ("key", "value")}

    def step(
        self,
        tokens: NDArray[np.int64],
        cache: Mapping[str, Cache],
        attention_mask: NDArray[np.int64] | None = None,
        *,
        last_only: bool = False,
    ) -> tuple[NDArray[np.float32], dict[str, Cache]]:
        """Feed more tokens.

        Args:
            tokens: int64 [batch, sequence].
            cache: what the last step returned, or `empty_cache`.
            attention_mask: int64 [batch, past + sequence], 0 on padding at the left; None counts every token.
            last_only: ask for no logits but the last position's; the `qdq` form gives all of them anyway.

        Returns:
            Logits float32 [batch, sequence, vocabulary], and the cache with these tokens.

        Raises:
            ValueError: padding, in the `fused` form.
            UsageError: the text is longer than the context.
            BoaEdgeError: the runtime fails.
        """
        batch, sequence = tokens.shape
        past = cache["past_key_values.0.key"].shape[2]
        limit = self.runtime.context_length
        if past + sequence > limit:
            fix = f"Use shorter sequences (--seq-len), up to {limit}"
            raise UsageError(f"{past + sequence} tokens; the context holds {limit}", where=self._model, fix=fix)
        if attention_mask is None:
            attention_mask = np.ones((batch, past + sequence), np.int64)
        feed: dict[str, Any] = {
            "input_ids": np.ascontiguousarray(tokens, dtype=np.int64),
            "attention_mask": np.ascontiguousarray(attention_mask, dtype=np.int64),
            **cache,
        }
        if self.form == "qdq":
            positions = np.maximum(np.cumsum(attention_mask, axis=1) - 1, 0)[:, past:]
            feed["position_ids"] = np.ascontiguousarray(positions, dtype=np.int64)
        else:
            if not attention_mask.all():
                raise ValueError("the fused form takes no padding")
            if not last_only:
                feed[LOGITS_START] = np.asarray([0], np.int64)
        try:
            found = self.session.run(self._outputs, feed)
        except Exception as error:  # (as above)
            raise BoaEdgeError(f"ONNX Runtime cannot run it ({_line(error)})", where=self._model) from error
        results = dict(zip(self._outputs, found, strict=True))
        logits, every = results.pop("logits"), results.pop(ALL_LOGITS, None)
        if every is not None and not last_only:
            logits = every
        return logits, {name.replace("present.", "past_key_values."): value for name, value in results.items()}

    def logits(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """tokens int64 [batch, length] -> logits float32 [batch, length, vocabulary], in one pass without a past."""
        return self.step(tokens, self.empty_cache(tokens.shape[0]))[0]

    def greedy(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """The `new_tokens` most likely ids after `prompt`, one after the other, none of them treated as an end."""
        tokens = np.asarray([list(prompt)], dtype=np.int64)
        cache: Mapping[str, Cache] = self.empty_cache(1)
        generated: list[int] = []
        for _ in range(new_tokens):
            logits, cache = self.step(tokens, cache, last_only=True)
            generated.append(int(logits[0, -1].argmax()))
            tokens = np.asarray([[generated[-1]]], dtype=np.int64)
        return generated


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
