"""y = x W^T + b, with W as integer codes behind a DequantizeLinear, or in float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.onnx.graph import GraphBuilder, scope
from exporters.onnx.kernels import Carrier
from toolchain.quantized import QuantizedWeight


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight in the file, its grid as ONNX wants it.

    With groups = in / group size (1 per output channel), in the order of the bytes:

    Attributes:
        codes: [in, out]; [groups, in / groups, out] where it must not be fused.
        scales: float32 [groups, out]; [out] per output channel; [groups, 1, out] where it must not be fused.
        zero_points: of the type of the codes and the shape of the scales, or None on a symmetric grid.
        rows, columns: out and in.
    """

    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    rows: int
    columns: int
    groups: int
    per_channel: bool
    fused: bool


def store(g: GraphBuilder, module: str, weight: QuantizedWeight, carrier: Carrier) -> StoredWeight:
    """Write the codes, scales and zero points of a linear. The runtime fuses no other layout than [in, out]."""
    rows, columns = weight.shape
    groups = weight.scales.shape[1]
    per_channel = weight.group_size is None

    def grid(values: np.ndarray) -> np.ndarray:
        if not carrier.fused:
            return values.T[:, None, :]
        return values[:, 0] if per_channel else values.T

    codes = weight.codes.numpy().T
    if not carrier.fused:
        codes = np.ascontiguousarray(codes).reshape(groups, columns // groups, rows)
    zero_points = None
    if weight.zero_points is not None:
        name = f"{module}.weight_zero_point"
        zero_points = g.codes(name, grid(weight.zero_points.numpy()), carrier.dtype)
    return StoredWeight(
        codes=g.codes(f"{module}.weight_codes", codes, carrier.dtype),
        scales=g.floats(f"{module}.weight_scale", grid(weight.scales.numpy())),
        zero_points=zero_points,
        rows=rows,
        columns=columns,
        groups=groups,
        per_channel=per_channel,
        fused=carrier.fused,
    )


def quantized_linear(g: GraphBuilder, x: ir.Value, module: str, weight: StoredWeight) -> ir.Value:
    """x float32 [batch, sequence, in] -> float32 [batch, sequence, out]."""
    path = scope(module)
    name = f"{path}/DequantizeLinear"
    inputs = [weight.codes, weight.scales]
    if weight.zero_points is not None:
        inputs.append(weight.zero_points)
    block = weight.columns // weight.groups
    if not weight.fused:
        # Of three dimensions nothing is fused: the matrix is made anew at each call.
        blocks = g.op("DequantizeLinear", inputs, name, axis=1, block_size=block)
        shape = g.constant([weight.columns, weight.rows], ir.DataType.INT64)
        matrix = g.op("Reshape", [blocks, shape], f"{path}/Reshape")
    elif weight.per_channel:
        matrix = g.op("DequantizeLinear", inputs, name, axis=1)
    else:
        matrix = g.op("DequantizeLinear", inputs, name, axis=0, block_size=block)
    return g.op("MatMul", [x, matrix], f"{path}/MatMul")


def float_linear(g: GraphBuilder, x: ir.Value, module: str, weight: np.ndarray) -> ir.Value:
    """x float32 [batch, sequence, in] -> float32 [batch, sequence, out], for `weight` float32 [out, in]."""
    matrix = g.floats(f"{module}.weight", weight.T)
    return g.op("MatMul", [x, matrix], f"{scope(module)}/MatMul")


def add_bias(g: GraphBuilder, y: ir.Value, module: str, bias: ir.Value) -> ir.Value:
    """y float32 [..., out] + bias float32 [out]."""
    return g.op("Add", [y, bias], f"{scope(module)}/Add")
