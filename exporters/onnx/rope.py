"""Rotary position embedding, half-split pairs (a, a + head_dim / 2)."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from exporters.onnx.graph import GraphBuilder
from toolchain.families import DecoderSpec


@dataclass(frozen=True)
class Rotation:
    """cos and sin, float32 [batch, sequence, head_dim / 2], computed once for all layers."""

    cos: ir.Value
    sin: ir.Value


def rotation(g: GraphBuilder, position_ids: ir.Value, spec: DecoderSpec) -> Rotation:
    """From position_ids int64 [batch, sequence]. A few sines a token; no table that would bound the context."""
    positions = g.op("Cast", [position_ids], "/rope/Cast", to=int(ir.DataType.FLOAT))
    columns = g.op("Unsqueeze", [positions, g.constant([2], ir.DataType.INT64)], "/rope/Unsqueeze")
    angles = g.op("Mul", [columns, g.constant(spec.rope_inv_freq, ir.DataType.FLOAT)], "/rope/Mul")
    cos, sin = g.op("Cos", [angles], "/rope/Cos"), g.op("Sin", [angles], "/rope/Sin")
    if spec.rope_scaling != 1.0:
        factor = g.constant(spec.rope_scaling, ir.DataType.FLOAT)
        cos, sin = g.op("Mul", [cos, factor], "/rope/cos/Mul"), g.op("Mul", [sin, factor], "/rope/sin/Mul")
    return Rotation(cos, sin)


def rotate(g: GraphBuilder, x: ir.Value, at: Rotation, heads: int, path: str) -> ir.Value:
    """x float32 [batch, sequence, heads * head_dim], each head turned by its position."""
    return g.op("RotaryEmbedding", [x, at.cos, at.sin], f"{path}/RotaryEmbedding", num_heads=heads)
