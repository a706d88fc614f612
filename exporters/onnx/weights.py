"""The external weight file, written once from front to back: no more than one tensor is ever held in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import onnx_ir as ir

_PAGE = 4096
_LINE = 64


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Signed codes as ONNX stores INT2, INT4 and INT8: in row-major order, the lowest bits first.

    Args:
        codes: int8, any shape, within [-2^(bits-1), 2^(bits-1) - 1].
        bits: 2, 4 or 8.

    Returns:
        uint8 [ceil(size * bits / 8)], the last byte filled up with zeros.
    """
    flat = np.ascontiguousarray(codes, dtype=np.int8).reshape(-1).view(np.uint8)
    if bits == 8:
        return flat
    per_byte = 8 // bits
    if flat.size % per_byte:
        flat = np.concatenate([flat, np.zeros(-flat.size % per_byte, np.uint8)])
    packed = np.zeros(flat.size // per_byte, np.uint8)
    mask = np.uint8((1 << bits) - 1)
    for place in range(per_byte):
        packed |= (flat[place::per_byte] & mask) << np.uint8(place * bits)
    return packed


class WeightFile:
    """Appends tensors to `path` and hands out references to them.

    Attributes:
        size: bytes written so far, padding included.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._stream: IO[bytes] = path.open("wb")

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def floats(self, name: str, values: np.ndarray) -> ir.ExternalTensor:
        """Append float32 `values` of any shape."""
        array = np.ascontiguousarray(values, dtype=np.float32)
        return self._append(name, array.view(np.uint8).reshape(-1), ir.DataType.FLOAT, values.shape)

    def codes(self, name: str, values: np.ndarray, dtype: ir.DataType) -> ir.ExternalTensor:
        """Append int8 `values` of any shape as INT2, INT4 or INT8."""
        return self._append(name, pack_codes(values, dtype.bitwidth), dtype, values.shape)

    def raw(self, name: str, values: np.ndarray) -> ir.ExternalTensor:
        """Append uint8 `values` of any shape as they are."""
        return self._append(name, np.ascontiguousarray(values).reshape(-1), ir.DataType.UINT8, values.shape)

    def alias(self, name: str, tensor: ir.ExternalTensor, shape: Sequence[int]) -> ir.ExternalTensor:
        """Another name, and maybe another shape, for bytes that are in the file already."""
        if math.prod(shape) != tensor.size:
            raise ValueError(f"{name}: shape {tuple(shape)} does not hold the {tensor.size} elements of {tensor.name}")
        return ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=self.path.parent,
        )

    def _append(self, name: str, raw: np.ndarray, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.ExternalTensor:
        alignment = _PAGE if raw.size >= _PAGE else _LINE
        padding = -self.size % alignment
        self._stream.write(bytes(padding))
        offset = self.size + padding
        self._stream.write(raw.data)
        self.size = offset + raw.size
        return ir.ExternalTensor(
            self.path.name, offset, raw.size, dtype, shape=ir.Shape(shape), name=name, base_dir=self.path.parent
        )
