"""Causal attention with grouped queries over a cache that the caller keeps."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.onnx.graph import GraphBuilder
from toolchain.families import DecoderSpec

_INT64 = ir.DataType.INT64


def attention_bias(g: GraphBuilder, input_ids: ir.Value, attention_mask: ir.Value) -> ir.Value:
    """float32 [batch, 1, sequence, past + sequence]: 0 where a query may look, the lowest float32 elsewhere.

    A query sees the positions up to its own that `attention_mask` counts. The row of a padding token is all lowest,
    which softmax turns into a mean: finite, and looked at by nobody.
    """
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
    causal = g.op("LessOrEqual", [keys, column], "/mask/LessOrEqual")
    counted = g.op("Cast", [attention_mask], "/mask/Cast", to=int(ir.DataType.BOOL))
    broadcast = g.op("Unsqueeze", [counted, g.constant([1, 2], _INT64)], "/mask/Unsqueeze")
    allowed = g.op("And", [broadcast, causal], "/mask/And")
    zero = g.constant(0.0, ir.DataType.FLOAT)
    lowest = g.constant(float(np.finfo(np.float32).min), ir.DataType.FLOAT)
    return g.op("Where", [allowed, zero, lowest], "/mask/Where")


def attend(
    g: GraphBuilder,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    bias: ir.Value,
    past: tuple[ir.Value, ir.Value],
    spec: DecoderSpec,
    path: str,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """softmax(scale q k^T + bias) v over past and present.

    Args:
        query: float32 [batch, sequence, heads * head_dim], rotated; key, value: [batch, sequence, kv_heads * head_dim].
        past: keys and values, float32 [batch, kv_heads, past, head_dim].

    Returns:
        The context float32 [batch, sequence, heads * head_dim], and the keys and values with the new ones behind.
    """
    context, keys, values = g.ops(
        "Attention",
        [query, key, value, bias, *past],
        f"{path}/Attention",
        3,
        scale=spec.attention_scale,
        q_num_heads=spec.heads,
        kv_num_heads=spec.kv_heads,
    )
    return context, keys, values
