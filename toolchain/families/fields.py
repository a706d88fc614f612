"""Whether the fields of a config.json that this tool computes with are what they should be, field by field."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from boa_edge.errors import BoaEdgeError

_LAYERS, _LARGEST = 1 << 12, 1 << 24
_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "ffn_dim",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
_NULLABLE_COUNTS = ("num_key_value_heads", "head_dim", "sliding_window")
_NUMBERS = ("rms_norm_eps", "rope_theta", "query_pre_attn_scalar")
_ROPE = ("rope_parameters", "rope_scaling")
_ROPE_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_POSITIVE = "a number above 0"
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_fields(config: Mapping[str, Any]) -> None:
    """Raise BoaEdgeError, of `config.json: FIELD`, where one has an impossible value. What is absent is not missed."""
    if not isinstance(config, Mapping):
        raise BoaEdgeError("is not a model configuration: no JSON object", where="config.json")
    for field, fits, wanted in _rules(config):
        if not fits:
            raise _refusal(field, config[field], wanted)
    for field in _ROPE:
        _check_rope(config.get(field), field)
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and shared and heads % shared:
        problem = f"{shared} does not divide num_attention_heads, which is {heads}"
        raise BoaEdgeError(problem, where="config.json: num_key_value_heads", fix="Correct either field")


def _rules(config: Mapping[str, Any]) -> Iterator[tuple[str, bool, str]]:
    """Field, whether its value fits, and what is accepted."""
    names = config.get("architectures")
    listed = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    yield "architectures", names is None or listed, "a list of names"
    for field, largest in (("num_hidden_layers", _LAYERS), *((field, _LARGEST) for field in _COUNTS)):
        if field in config:
            yield field, _is_count(config[field], largest), f"a whole number from 1 to {largest}"
    for field in _NULLABLE_COUNTS:
        value = config.get(field)
        fits = value is None or _is_count(value, _LARGEST)
        yield field, fits, f"a whole number from 1 to {_LARGEST}, or null"
    for field in _NUMBERS:
        if field in config:
            yield field, _is_positive(config[field]), _POSITIVE
    for field in ("dtype", "torch_dtype"):
        value = config.get(field)
        fits = value is None or str(value).removeprefix("torch.") in _DTYPES
        yield field, fits, f"one of {', '.join(_DTYPES)}"


def _check_rope(value: Any, field: str) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise _refusal(field, value, "a mapping of RoPE's parameters, or null")
    for name, part in value.items():
        if isinstance(part, Mapping):  # by kind of layer
            _check_rope(part, f"{field}.{name}")
        elif name in _ROPE_NUMBERS and not _is_positive(part):
            raise _refusal(f"{field}.{name}", part, _POSITIVE)


def _refusal(field: str, value: Any, wanted: str) -> BoaEdgeError:
    found = json.dumps(value, default=str)[:80]
    return BoaEdgeError(f"{found} is not {wanted}", where=f"config.json: {field}", fix="Correct the field")


def _is_count(value: Any, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
