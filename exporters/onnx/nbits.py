"""MatMulNBits: y = x W^T + b over packed unsigned codes, the precision of x stated on the node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.base import Activations
from exporters.onnx.graph import GraphBuilder
from toolchain.quantized import QuantizedWeight

# The inputs' precision where it is not the session's; the runtime's default, 0, has no kernel at 2 and 8 bits.
ACCURACY_LEVEL: dict[Activations, int] = {"int8": 4, "float32": 1}

_PER_CHANNEL_BLOCK = 32  # the runtime's own choice when it fuses a DequantizeLinear without blocks


@dataclass(frozen=True)
class NBitsWeight:
    """A weight [rows, columns] as the kernel wants it, with blocks = ceil(columns / block).

    Attributes:
        codes: uint8 [rows, blocks, block * bits / 8], or of a table [rows, blocks * block * bits / 8]:
            code + 2^(bits-1), the lowest bits first; columns that fill up the last block are zeros.
        scales: float32 [rows, blocks].
        zero_points: uint8 [rows, ceil(blocks * bits / 8)], shifted and packed like the codes; None on a symmetric grid.
    """

    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    bits: int
    block: int
    rows: int
    columns: int

    @property
    def blocks(self) -> int:
        """How many in a row."""
        return -(-self.columns // self.block)


def pack_rows(values: np.ndarray, bits: int) -> np.ndarray:
    """Signed codes, row by row, as unsigned ones shifted by 2^(bits-1).

    Args:
        values: int8 [rows, n], within [-2^(bits-1), 2^(bits-1) - 1].
        bits: 2, 4 or 8.

    Returns:
        uint8 [rows, ceil(n * bits / 8)], the lowest bits first, what is left of the last byte as code 0.
    """
    per_byte = 8 // bits
    rows, count = values.shape
    middle = np.uint8(1 << (bits - 1))
    shifted = values.view(np.uint8) + middle  # modulo 256, so that a byte's sign bit flips
    if bits == 8:
        return shifted
    if count % per_byte:
        shifted = np.pad(shifted, ((0, 0), (0, -count % per_byte)), constant_values=middle)
    packed = np.zeros((rows, shifted.shape[1] // per_byte), np.uint8)
    for place in range(per_byte):
        packed |= shifted[:, place::per_byte] << np.uint8(place * bits)
    return packed


def store_nbits(
    g: GraphBuilder, name: str, parts: Sequence[QuantizedWeight], bits: int, *, table: bool = False
) -> NBitsWeight:
    """Write one weight, or several of the same grid and input, their rows below each other.

    Args:
        bits: what the codes are carried in, no fewer than they have.
        table: for rows to be looked up, not multiplied with.
    """
    first = parts[0]
    columns = first.shape[1]
    block = first.group_size or _PER_CHANNEL_BLOCK
    blocks = -(-columns // block)
    repeats = blocks // first.scales.shape[1]
    # A large table is not copied where it need not be.
    codes = first.codes.numpy() if len(parts) == 1 else np.concatenate([part.codes.numpy() for part in parts])
    rows = codes.shape[0]
    if columns % block:
        codes = np.pad(codes, ((0, 0), (0, blocks * block - columns)))
    packed = pack_rows(codes, bits)
    scales = np.concatenate([part.scales.numpy() for part in parts])
    zero_points = None
    if first.zero_points is not None:
        zeros = np.concatenate([part.zero_points.numpy() for part in parts if part.zero_points is not None])
        zero_points = g.raw(f"{name}.weight_zero_point", pack_rows(np.repeat(zeros, repeats, 1), bits))
    return NBitsWeight(
        codes=g.raw(f"{name}.weight_codes", packed if table else packed.reshape(rows, blocks, -1)),
        scales=g.floats(f"{name}.weight_scale", np.repeat(scales, repeats, 1)),
        zero_points=zero_points,
        bits=bits,
        block=block,
        rows=rows,
        columns=columns,
    )


def nbits_linear(
    g: GraphBuilder, x: ir.Value, path: str, weight: NBitsWeight, activations: Activations, bias: ir.Value | None = None
) -> ir.Value:
    """x float32 [batch, sequence, in] -> float32 [batch, sequence, out], whatever precision the session asks for."""
    inputs: list[ir.Value | None] = [x, weight.codes, weight.scales, weight.zero_points, None, bias]
    while inputs[-1] is None:
        inputs.pop()
    return g.contrib(
        "MatMulNBits",
        inputs,
        f"{path}/MatMulNBits",
        K=weight.columns,
        N=weight.rows,
        bits=weight.bits,
        block_size=weight.block,
        accuracy_level=ACCURACY_LEVEL[activations],
    )


def nbits_embedding(g: GraphBuilder, ids: ir.Value, path: str, table: NBitsWeight) -> ir.Value:
    """ids int64 [batch, sequence] -> float32 [batch, sequence, width]; dequantizes only the rows that are looked up."""
    inputs = [table.codes, ids, table.scales, *([] if table.zero_points is None else [table.zero_points])]
    name = f"{path}/GatherBlockQuantized"
    fixed = {"bits": table.bits, "block_size": table.block, "gather_axis": 0, "quantize_axis": 1}
    rows = g.contrib("GatherBlockQuantized", inputs, name, **fixed)
    if table.columns % table.block:
        ends = [g.constant([value], ir.DataType.INT64) for value in (0, table.columns, 2)]
        rows = g.op("Slice", [rows, *ends], f"{path}/Slice")
    return rows


def as_table(g: GraphBuilder, module: str, weight: NBitsWeight) -> NBitsWeight:
    """The bytes of a tied head as a table [rows, bytes] of its own name: once on disk, and mapped, not loaded.

    One initializer for both would have to have one shape, and be kept beside the packed copy that the kernel makes.
    """
    packed = weight.blocks * weight.block * weight.bits // 8
    zeros = weight.zero_points
    return NBitsWeight(
        codes=g.alias(f"{module}.weight_codes", weight.codes, (weight.rows, packed)),
        scales=g.alias(f"{module}.weight_scale", weight.scales, (weight.rows, weight.blocks)),
        zero_points=None
        if zeros is None
        else g.alias(f"{module}.weight_zero_point", zeros, (weight.rows, -(-weight.blocks * weight.bits // 8))),
        bits=weight.bits,
        block=weight.block,
        rows=weight.rows,
        columns=weight.columns,
    )
