"""Rotary position embedding, half-split pairs (a, a + rotary_dim / 2) of the first rotary_dim channels of a head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from exporters.onnx.graph import GraphBuilder
from toolchain.families import AttentionSpec, DecoderSpec

Turn = tuple[tuple[float, ...], float]
"""Inverse frequencies and the factor on cos and sin: what layers that turn alike have in common."""


def turn_of(attention: AttentionSpec) -> Turn:
    """How a layer turns its queries and keys; no frequencies where it does not."""
    return attention.rope_inv_freq, attention.rope_scaling


def paths(spec: DecoderSpec) -> dict[Turn, str]:
    """Where the nodes of each kind of turn go; kinds that do not turn are left out."""
    kinds = [turn for turn in dict.fromkeys(map(turn_of, spec.attention)) if turn[0]]
    return {turn: f"/rope/{index}" for index, turn in enumerate(kinds)}


@dataclass(frozen=True)
class Rotation:
    """cos and sin, float32 [batch, sequence, rotary_dim / 2], computed once for all layers that turn alike."""

    cos: ir.Value
    sin: ir.Value
    rotary_dim: int


def rotations(g: GraphBuilder, position_ids: ir.Value, spec: DecoderSpec) -> Mapping[Turn, Rotation]:
    """By kind of turn, from position_ids int64 [batch, sequence]. A few sines a token; no table that would bound the
    context.
    """
    places = paths(spec)
    if not places:
        return {}
    positions = g.op("Cast", [position_ids], "/rope/Cast", to=int(ir.DataType.FLOAT))
    columns = g.op("Unsqueeze", [positions, g.constant([2], ir.DataType.INT64)], "/rope/Unsqueeze")
    made = {}
    for (frequencies, scaling), path in places.items():
        angles = g.op("Mul", [columns, g.constant(frequencies, ir.DataType.FLOAT)], f"{path}/Mul")
        cos, sin = g.op("Cos", [angles], f"{path}/Cos"), g.op("Sin", [angles], f"{path}/Sin")
        if scaling != 1.0:
            factor = g.constant(scaling, ir.DataType.FLOAT)
            cos, sin = g.op("Mul", [cos, factor], f"{path}/cos/Mul"), g.op("Mul", [sin, factor], f"{path}/sin/Mul")
        made[frequencies, scaling] = Rotation(cos, sin, 2 * len(frequencies))
    return made


def rotate(g: GraphBuilder, x: ir.Value, at: Rotation, heads: int, head_dim: int, path: str) -> ir.Value:
    """x float32 [batch, sequence, heads * head_dim], each head turned by its position."""
    part = {} if at.rotary_dim == head_dim else {"rotary_embedding_dim": at.rotary_dim}
    return g.op("RotaryEmbedding", [x, at.cos, at.sin], f"{path}/RotaryEmbedding", num_heads=heads, **part)
