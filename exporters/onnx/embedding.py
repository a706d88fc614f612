"""Token ids -> rows of the embedding table, dequantizing only the rows that are looked up."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.onnx.graph import GraphBuilder, scope
from exporters.onnx.linears import StoredWeight
from toolchain.quantized import QuantizedWeight


def quantized_embedding(g: GraphBuilder, ids: ir.Value, module: str, table: QuantizedWeight) -> ir.Value:
    """A table of its own, stored [vocabulary, width] as INT8. ids int64 [batch, sequence] -> float32 [..., width]."""
    path = scope(module)
    sources = [
        g.codes(f"{module}.weight_codes", table.codes.numpy(), ir.DataType.INT8),
        g.floats(f"{module}.weight_scale", table.scales.numpy()),
    ]
    if table.zero_points is not None:
        sources.append(g.codes(f"{module}.weight_zero_point", table.zero_points.numpy(), ir.DataType.INT8))
    rows = [g.op("Gather", [source, ids], f"{path}/Gather_{i}", axis=0) for i, source in enumerate(sources)]
    block = table.shape[1] // table.scales.shape[1]
    return g.op("DequantizeLinear", rows, f"{path}/DequantizeLinear", axis=2, block_size=block)


def tied_embedding(g: GraphBuilder, ids: ir.Value, module: str, head: StoredWeight) -> ir.Value:
    """The table of the head [width, vocabulary], read column by column.

    A tensor that two nodes read is not fused, so this one has a name of its own for the head's bytes.
    """
    path = scope(module)
    grid = (head.groups, head.rows)
    sources = [
        g.alias(f"{module}.weight_codes", head.codes, (head.columns, head.rows)),
        g.alias(f"{module}.weight_scale", head.scales, grid),
    ]
    if head.zero_points is not None:
        sources.append(g.alias(f"{module}.weight_zero_point", head.zero_points, grid))
    columns = [g.op("Gather", [source, ids], f"{path}/Gather_{i}", axis=1) for i, source in enumerate(sources)]
    block = head.columns // head.groups
    values = g.op("DequantizeLinear", columns, f"{path}/DequantizeLinear", axis=0, block_size=block)
    return g.op("Transpose", [values], f"{path}/Transpose", perm=[1, 2, 0])


def float_embedding(g: GraphBuilder, ids: ir.Value, module: str, table: np.ndarray) -> tuple[ir.Value, ir.Value]:
    """A float32 table [vocabulary, width]: the rows looked up, and the table itself (for a tied head)."""
    source = g.floats(f"{module}.weight", table)
    return g.op("Gather", [source, ids], f"{scope(module)}/Gather", axis=0), source


def tied_float_head(g: GraphBuilder, x: ir.Value, module: str, table: ir.Value) -> ir.Value:
    """x float32 [batch, sequence, width] times the table [vocabulary, width], which stays stored once."""
    path = scope(module)
    matrix = g.op("Transpose", [table], f"{path}/Transpose", perm=[1, 0])
    return g.op("MatMul", [x, matrix], f"{path}/MatMul")
