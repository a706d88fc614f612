"""GroupQueryAttention: causality, rotary embedding and cache in one node of ONNX Runtime's own operator set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from exporters.onnx.cache import CacheScales
from exporters.onnx.graph import GraphBuilder
from toolchain.families import DecoderSpec

_FLOAT, _INT32, _INT64 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64


@dataclass(frozen=True)
class Lengths:
    """How far the text goes, from the attention mask.

    Attributes:
        last: int32 [batch], the index of each row's last token.
        total: int32 scalar, past + sequence. Not the cache's length: that one may be a longer buffer, written in place.
    """

    last: ir.Value
    total: ir.Value


def lengths(g: GraphBuilder, attention_mask: ir.Value) -> Lengths:
    """From attention_mask int64 [batch, past + sequence]."""
    one = g.constant([1], _INT64)
    counted = g.op("ReduceSum", [attention_mask, one], "/lengths/ReduceSum", keepdims=0)
    last = g.op("Cast", [g.op("Sub", [counted, one], "/lengths/Sub")], "/lengths/last/Cast", to=int(_INT32))
    size = g.op("Shape", [attention_mask], "/lengths/Shape", start=1, end=2)
    scalar = g.op("Squeeze", [size, g.constant([0], _INT64)], "/lengths/Squeeze")
    return Lengths(last, g.op("Cast", [scalar], "/lengths/total/Cast", to=int(_INT32)))


@dataclass(frozen=True)
class Tables:
    """cos and sin of every position, float32 [context, rotary_dim / 2]."""

    cos: ir.Value
    sin: ir.Value


def tables(g: GraphBuilder, frequencies: tuple[float, ...], scaling: float, context: int, path: str) -> Tables:
    """Written as a formula that the runtime evaluates once, when it loads the file: at 128k tokens they are 64 MB."""
    first, step = g.constant(0.0, _FLOAT), g.constant(1.0, _FLOAT)
    positions = g.op("Range", [first, g.constant(float(context), _FLOAT), step], f"{path}/Range")
    column = g.op("Unsqueeze", [positions, g.constant([1], _INT64)], f"{path}/Unsqueeze")
    angles = g.op("Mul", [column, g.constant(frequencies, _FLOAT)], f"{path}/Mul")
    cos, sin = g.op("Cos", [angles], f"{path}/Cos"), g.op("Sin", [angles], f"{path}/Sin")
    if scaling != 1.0:
        factor = g.constant(scaling, _FLOAT)
        cos, sin = g.op("Mul", [cos, factor], f"{path}/cos/Mul"), g.op("Mul", [sin, factor], f"{path}/sin/Mul")
    return Tables(cos, sin)


def group_query_attention(
    g: GraphBuilder,
    projected: Sequence[ir.Value],
    past: tuple[ir.Value, ir.Value],
    at: Lengths,
    turn: Tables | None,
    spec: DecoderSpec,
    layer: int,
    path: str,
    scales: CacheScales | None = None,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """softmax(scale q k^T) v over past and present, queries seeing what stands before them.

    Args:
        projected: q, k and v float32 [batch, sequence, heads * head_dim], or side by side in one tensor.
        past: keys and values, float32 [batch, kv_heads, past or capacity, head_dim], or int8 codes.
        turn: the rotary embedding; None where q and k are turned already or never.
        scales: of the codes, [1, kv_heads, 1, head_dim]; None for a float32 cache. New keys are quantized once they are
            turned, and seen as the codes say, in their own call too.

    Returns:
        The context float32 [batch, sequence, heads * head_dim], and the keys and values with the new ones behind.
    """
    q, k, v = projected if len(projected) == 3 else (*projected, None, None)
    window = spec.attention[layer].window
    rotary = [None, None] if turn is None else [turn.cos, turn.sin]
    inputs: list[ir.Value | None] = [q, k, v, *past, at.last, at.total, *rotary]
    int8: dict[str, object] = {}
    if scales is not None:
        inputs += [None, None, None, scales.key, scales.value]  # behind positions, bias and sinks, which nobody gives
        int8 = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    while inputs[-1] is None:
        inputs.pop()
    context, keys, values = g.contribs(
        "GroupQueryAttention",
        inputs,
        f"{path}/GroupQueryAttention",
        (0, 1, 2),
        num_heads=spec.heads,
        kv_num_heads=spec.kv_heads,
        scale=spec.attention_scale,
        do_rotary=int(turn is not None),
        local_window_size=window if window is not None and window < spec.max_positions else -1,
        softcap=spec.attention_softcap or 0.0,
        **int8,
    )
    return context, keys, values
