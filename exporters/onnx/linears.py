"""y = x W^T + b, with W as integer codes behind a DequantizeLinear, or in float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.onnx.graph import GraphBuilder, scope
from exporters.onnx.kernels import Carrier
from toolchain.quantized import QuantizedWeight

_MIDDLE = 8  # what stands for 0 in an unsigned nibble
_PER_CHANNEL_BLOCK = 32
_PRECISE_LEVEL = 1


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


def precise_linear(g: GraphBuilder, x: ir.Value, module: str, weight: QuantizedWeight) -> ir.Value:
    """x float32 [batch, sequence, in] -> float32 [batch, sequence, out], computed in float32 whatever the session says.

    The precision of a fused DequantizeLinear is a setting of the whole session, so this linear is written as the fused
    kernel itself, with codes of up to 4 bits in unsigned nibbles.
    """
    rows, columns = weight.shape
    block = weight.group_size or _PER_CHANNEL_BLOCK
    blocks = -(-columns // block)
    repeats = blocks // weight.scales.shape[1]
    codes = np.zeros((rows, blocks * block), np.uint8)
    codes[:, :columns] = weight.codes.numpy() + _MIDDLE
    inputs = [
        x,
        g.codes(f"{module}.weight_nibbles", _nibbles(codes).reshape(rows, blocks, -1).view(np.int8), ir.DataType.UINT8),
        g.floats(f"{module}.weight_scale", np.repeat(weight.scales.numpy(), repeats, 1)),
    ]
    if weight.zero_points is not None:
        zeros = np.full((rows, blocks + blocks % 2), _MIDDLE, np.uint8)
        zeros[:, :blocks] += np.repeat(weight.zero_points.numpy(), repeats, 1).view(np.uint8)
        packed = _nibbles(zeros).reshape(-1).view(np.int8)
        inputs.append(g.codes(f"{module}.weight_zero_nibbles", packed, ir.DataType.UINT8))
    path = f"{scope(module)}/MatMulNBits"
    return g.contrib(
        "MatMulNBits", inputs, path, K=columns, N=rows, bits=4, block_size=block, accuracy_level=_PRECISE_LEVEL
    )


def _nibbles(values: np.ndarray) -> np.ndarray:
    """uint8 [rows, columns] below 16 -> two per byte, the even column in the lower half."""
    return values[:, ::2] | (values[:, 1::2] << 4)


def float_linear(g: GraphBuilder, x: ir.Value, module: str, weight: np.ndarray) -> ir.Value:
    """x float32 [batch, sequence, in] -> float32 [batch, sequence, out], for `weight` float32 [out, in]."""
    matrix = g.floats(f"{module}.weight", weight.T)
    return g.op("MatMul", [x, matrix], f"{scope(module)}/MatMul")


def add_bias(g: GraphBuilder, y: ir.Value, module: str, bias: np.ndarray) -> ir.Value:
    """y float32 [..., out] + bias float32 [out]."""
    return g.op("Add", [y, g.floats(f"{module}.bias", bias)], f"{scope(module)}/Add")
