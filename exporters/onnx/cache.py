"""An int8 cache: keys and values as codes with one scale per key-value head, fixed by the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.onnx.graph import GraphBuilder
from toolchain.activations.cache import CachePlan
from toolchain.families import DecoderSpec


@dataclass(frozen=True)
class CacheScales:
    """Of one layer, float32 [1, kv_heads, 1, head_dim], the same for all channels of a head; or [kv_heads]."""

    key: ir.Value
    value: ir.Value


def cache_scales(
    g: GraphBuilder, plan: CachePlan, spec: DecoderSpec, layer: int, module: str, *, by_channel: bool
) -> CacheScales:
    """The scales of a layer whose attention is `module`, as `by_channel` attention takes them or as QuantizeLinear."""

    def written(part: str, scales: tuple[float, ...]) -> ir.Value:
        values = np.asarray(scales, np.float32)
        if by_channel:
            values = np.repeat(values[None, :, None, None], spec.head_dim, axis=3)
        return g.floats(f"{module}.{part}_cache_scale", values)

    return CacheScales(written("key", plan.key_scales[layer]), written("value", plan.value_scales[layer]))


def through_cache(
    g: GraphBuilder, x: ir.Value, past: ir.Value, scales: ir.Value, spec: DecoderSpec, path: str
) -> tuple[ir.Value, ir.Value]:
    """Keys or values of new tokens put behind the cached ones, in standard operators.

    Args:
        x: float32 [batch, sequence, kv_heads * head_dim].
        past: int8 [batch, kv_heads, past, head_dim].
        scales: float32 [kv_heads].

    Returns:
        Codes, int8 [batch, kv_heads, past + sequence, head_dim], and what they stand for, float32.
    """
    zero = g.constant([0] * spec.kv_heads, ir.DataType.INT8)
    heads = split_heads(g, x, spec.kv_heads, spec.head_dim, path)
    codes = g.op("QuantizeLinear", [heads, scales, zero], f"{path}/QuantizeLinear", axis=1)
    present = g.op("Concat", [past, codes], f"{path}/Concat", axis=2)
    return present, g.op("DequantizeLinear", [present, scales, zero], f"{path}/DequantizeLinear", axis=1)


def split_heads(g: GraphBuilder, x: ir.Value, heads: int, head_dim: int, path: str) -> ir.Value:
    """[batch, sequence, heads * head_dim] -> [batch, heads, sequence, head_dim]."""
    split = g.op("Reshape", [x, g.constant([0, 0, heads, head_dim], ir.DataType.INT64)], f"{path}/Reshape")
    return g.op("Transpose", [split], f"{path}/Transpose", perm=[0, 2, 1, 3])
