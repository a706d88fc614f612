"""y = x W^T as one product of int8 matrices: inputs with one scale per row, codes with one per output channel.

Codes of up to 4 bits stand in the file as INT4 behind a Cast, which the runtime carries out once, when it loads the
file; in memory they take 8 bits. x86 without VNNI adds pairs of products of unsigned inputs and signed weights in 16
bits, which 8-bit weights overflow: those are stored unsigned, for which the kernel widens first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.onnx.graph import GraphBuilder
from toolchain.quantized import QuantizedWeight

_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64
_MIDDLE = 128
_LARGEST = 127
_TINY = 1e-30  # a row of zeros has codes of zero


@dataclass(frozen=True)
class Rows:
    """Quantized inputs.

    Attributes:
        codes: uint8 [batch, sequence, in], round(x * 127 / max|x|) + 128.
        scales: float32 [batch, sequence, 1].
    """

    codes: ir.Value
    scales: ir.Value


def quantize_rows(g: GraphBuilder, x: ir.Value, path: str) -> Rows:
    """x float32 [batch, sequence, in]; one symmetric scale per row."""
    axis = g.constant([-1], _INT64)
    largest = g.op("ReduceMax", [g.op("Abs", [x], f"{path}/Abs"), axis], f"{path}/ReduceMax", keepdims=1)
    largest = g.op("Max", [largest, g.constant(_TINY, _FLOAT)], f"{path}/Max")
    inverse = g.op("Div", [g.constant(float(_LARGEST), _FLOAT), largest], f"{path}/Div")
    spread = g.op("Mul", [x, inverse], f"{path}/Mul")
    unit, middle = g.constant(1.0, _FLOAT), g.constant(_MIDDLE, ir.DataType.UINT8)
    codes = g.op("QuantizeLinear", [spread, unit, middle], f"{path}/QuantizeLinear")
    return Rows(codes, g.op("Div", [largest, g.constant(float(_LARGEST), _FLOAT)], f"{path}/scale/Div"))


@dataclass(frozen=True)
class IntegerWeight:
    """A weight [rows, columns] with one scale per row.

    Attributes:
        codes: INT4 or UINT8 [columns, rows].
        scales: float32 [rows].
        zero_points: INT8 or UINT8 [rows], or a scalar; None where it is 0.
    """

    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None


def store_integer(g: GraphBuilder, name: str, parts: Sequence[QuantizedWeight]) -> IntegerWeight:
    """Write one weight, or several of the same input and kind of grid, their rows below each other."""
    wide = any(part.bits == 8 for part in parts)
    codes = np.concatenate([part.codes.numpy() for part in parts])
    scales = g.floats(f"{name}.weight_scale", np.concatenate([part.scales.numpy()[:, 0] for part in parts]))
    zeros = None
    if parts[0].zero_points is not None:
        zeros = np.concatenate([part.zero_points.numpy()[:, 0] for part in parts if part.zero_points is not None])
    label, zero_label = f"{name}.weight_codes", f"{name}.weight_zero_point"
    if wide:
        stored = g.raw(label, _unsigned(codes.T))
        middle = g.constant(_MIDDLE, ir.DataType.UINT8)
        return IntegerWeight(stored, scales, middle if zeros is None else g.raw(zero_label, _unsigned(zeros)))
    stored = g.codes(label, codes.T, ir.DataType.INT4)
    return IntegerWeight(stored, scales, None if zeros is None else g.codes(zero_label, zeros, ir.DataType.INT8))


def _unsigned(codes: np.ndarray) -> np.ndarray:
    return (codes.astype(np.int16) + _MIDDLE).astype(np.uint8)


def integer_linear(g: GraphBuilder, x: Rows, path: str, weight: IntegerWeight, bias: ir.Value | None) -> ir.Value:
    """float32 [batch, sequence, out]."""
    codes = weight.codes
    if codes.dtype == ir.DataType.INT4:
        codes = g.op("Cast", [codes], f"{path}/Cast", to=int(ir.DataType.INT8))
    zeros = [] if weight.zero_points is None else [weight.zero_points]
    inputs = [x.codes, codes, g.constant(1.0, _FLOAT), weight.scales, g.constant(_MIDDLE, ir.DataType.UINT8), *zeros]
    y = g.contrib("MatMulIntegerToFloat", inputs, f"{path}/MatMulIntegerToFloat")
    y = g.op("Mul", [y, x.scales], f"{path}/Mul")
    return y if bias is None else g.op("Add", [y, bias], f"{path}/Add")
