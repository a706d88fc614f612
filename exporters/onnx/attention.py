"""Causal attention with grouped queries over a cache that the caller keeps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.onnx.cache import CacheScales, split_heads, through_cache
from exporters.onnx.graph import GraphBuilder
from toolchain.families import DecoderSpec

_INT64 = ir.DataType.INT64


@dataclass(frozen=True)
class Places:
    """Where the tokens of a call stand.

    Attributes:
        keys: int64 [past + sequence], of the keys.
        queries: int64 [sequence, 1], of the queries, counted like the keys.
        counted: bool [batch, 1, 1, past + sequence], which keys are no padding.
    """

    keys: ir.Value
    queries: ir.Value
    counted: ir.Value


def attention_places(g: GraphBuilder, input_ids: ir.Value, attention_mask: ir.Value) -> Places:
    """From input_ids int64 [batch, sequence] and attention_mask int64 [batch, past + sequence]."""
    sequence = g.op("Shape", [input_ids], "/mask/sequence/Shape", start=1, end=2)
    total = g.op("Shape", [attention_mask], "/mask/total/Shape", start=1, end=2)
    past = g.op("Sub", [total, sequence], "/mask/Sub")
    first, scalar = g.constant([0], _INT64), g.constant(0, _INT64)
    step = g.constant(1, _INT64)
    total_scalar = g.op("Squeeze", [total, first], "/mask/total/Squeeze")
    past_scalar = g.op("Squeeze", [past, first], "/mask/past/Squeeze")
    keys = g.op("Range", [scalar, total_scalar, step], "/mask/keys/Range")
    queries = g.op("Range", [past_scalar, total_scalar, step], "/mask/queries/Range")
    column = g.op("Unsqueeze", [queries, g.constant([1], _INT64)], "/mask/queries/Unsqueeze")
    counted = g.op("Cast", [attention_mask], "/mask/Cast", to=int(ir.DataType.BOOL))
    return Places(keys, column, g.op("Unsqueeze", [counted, g.constant([1, 2], _INT64)], "/mask/Unsqueeze"))


def attention_bias(g: GraphBuilder, at: Places, window: int | None) -> ir.Value:
    """float32 [batch, 1, sequence, past + sequence]: 0 where a query may look, the lowest float32 elsewhere.

    A query sees the positions up to its own that count, of them the last `window` ones, itself included. The row of a
    padding token is all lowest, which softmax turns into a mean: finite, and looked at by nobody.
    """
    path = "/mask" if window is None else f"/mask/window_{window}"
    seen = g.op("LessOrEqual", [at.keys, at.queries], f"{path}/LessOrEqual")
    if window is not None:
        # Positions and places differ by the same number for all of a row's tokens, so either measures a distance.
        before = g.op("Sub", [at.queries, g.constant(window, _INT64)], f"{path}/Sub")
        seen = g.op("And", [seen, g.op("Greater", [at.keys, before], f"{path}/Greater")], f"{path}/near/And")
    allowed = g.op("And", [at.counted, seen], f"{path}/And")
    zero = g.constant(0.0, ir.DataType.FLOAT)
    lowest = g.constant(float(np.finfo(np.float32).min), ir.DataType.FLOAT)
    return g.op("Where", [allowed, zero, lowest], f"{path}/Where")


def attend(
    g: GraphBuilder,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    bias: ir.Value,
    past: tuple[ir.Value, ir.Value],
    spec: DecoderSpec,
    path: str,
    scales: CacheScales | None = None,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """softmax(cap(scale q k^T) + bias) v over past and present.

    Args:
        query: float32 [batch, sequence, heads * head_dim], rotated; key, value: [batch, sequence, kv_heads * head_dim].
        past: keys and values, float32 [batch, kv_heads, past, head_dim], or int8 codes.
        scales: of the codes, [kv_heads]; None for a float32 cache.

    Returns:
        The context float32 [batch, sequence, heads * head_dim], and the keys and values with the new ones behind.
    """
    cap = {} if spec.attention_softcap is None else {"softcap": spec.attention_softcap}
    if scales is not None:
        keys, all_keys = through_cache(g, key, past[0], scales.key, spec, f"{path}/key_cache")
        values, all_values = through_cache(g, value, past[1], scales.value, spec, f"{path}/value_cache")
        q = split_heads(g, query, spec.heads, spec.head_dim, f"{path}/query")
        inputs = [q, all_keys, all_values, bias]
        context = g.op("Attention", inputs, f"{path}/Attention", scale=spec.attention_scale, **cap)
        rows = g.op("Transpose", [context], f"{path}/context/Transpose", perm=[0, 2, 1, 3])
        whole = g.constant([0, 0, spec.heads * spec.head_dim], _INT64)
        return g.op("Reshape", [rows, whole], f"{path}/context/Reshape"), keys, values
    context, keys, values = g.ops(
        "Attention",
        [query, key, value, bias, *past],
        f"{path}/Attention",
        3,
        scale=spec.attention_scale,
        q_num_heads=spec.heads,
        kv_num_heads=spec.kv_heads,
        **cap,
    )
    return context, keys, values
