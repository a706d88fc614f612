"""The one value type for a quantized weight: the only currency between the stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SUPPORTED_BITS = (2, 3, 4, 8)


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest signed code: [-2^(bits-1), 2^(bits-1) - 1]."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight matrix as integers: w[i, j] = scales[i, g] * (codes[i, j] - zero_points[i, g]), g = j // group_size.

    Attributes:
        codes: int8 [out, in], within `code_range(bits)`.
        scales: float32 [out, groups], positive and finite. groups = 1 per output channel, in / group_size otherwise.
        zero_points: int8 [out, groups] within `code_range(bits)`, or None where the grid is symmetric (zero point 0).
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; None for one scale per output channel.

    Raises:
        ValueError: a shape, dtype or value breaks the above.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bits: int
    group_size: int | None

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise ValueError(f"bits must be one of {SUPPORTED_BITS}, got {self.bits}")
        if self.codes.dtype != torch.int8 or self.codes.ndim != 2:
            raise ValueError(f"codes must be int8 [out, in], got {self.codes.dtype} {tuple(self.codes.shape)}")
        rows, columns = self.codes.shape
        if self.group_size is not None and (self.group_size < 1 or columns % self.group_size):
            raise ValueError(f"group size {self.group_size} does not divide {columns} input columns")
        groups = 1 if self.group_size is None else columns // self.group_size
        if self.scales.dtype != torch.float32 or tuple(self.scales.shape) != (rows, groups):
            raise ValueError(
                f"scales must be float32 {(rows, groups)}, got {self.scales.dtype} {tuple(self.scales.shape)}"
            )
        if not bool(torch.isfinite(self.scales).all()) or not bool((self.scales > 0).all()):
            raise ValueError("scales must be positive and finite")
        low, high = code_range(self.bits)
        for name, values in (("codes", self.codes), ("zero_points", self.zero_points)):
            if values is not None and (int(values.min()) < low or int(values.max()) > high):
                raise ValueError(f"{name} leave [{low}, {high}] for {self.bits} bits")
        if self.zero_points is not None and (
            self.zero_points.dtype != torch.int8 or tuple(self.zero_points.shape) != (rows, groups)
        ):
            raise ValueError(f"zero_points must be int8 {(rows, groups)}")

    @property
    def symmetric(self) -> bool:
        return self.zero_points is None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """The weight it stands for: float32 [out, in], computed as float32(code - zero point) * scale."""
        rows, columns = self.shape
        groups = self.scales.shape[1]
        values = self.codes.to(torch.float32).view(rows, groups, columns // groups)
        if self.zero_points is not None:
            values = values - self.zero_points.to(torch.float32)[:, :, None]
        return (values * self.scales[:, :, None]).view(rows, columns)

    def cpu(self) -> QuantizedWeight:
        """The same in the processor's memory."""
        zeros = None if self.zero_points is None else self.zero_points.cpu()
        return replace(self, codes=self.codes.cpu(), scales=self.scales.cpu(), zero_points=zeros)

    def payload_bytes(self, scale_bits: int) -> int:
        """Bytes of packed codes, scales of so many bits and packed zero points."""
        return payload_size(*self.shape, self.scales.shape[1], self.bits, self.symmetric, scale_bits)


def payload_size(rows: int, columns: int, groups: int, bits: int, symmetric: bool, scale_bits: int) -> int:
    """`QuantizedWeight.payload_bytes` of a weight [rows, columns] with so many groups per row."""
    per_group = scale_bits if symmetric else scale_bits + bits
    return (rows * columns * bits + rows * groups * per_group + 7) // 8


def stack_rows(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights of one format, one below the other."""
    first = weights[0]
    if len(weights) == 1:
        return first
    zeros = [weight.zero_points for weight in weights if weight.zero_points is not None]
    return QuantizedWeight(
        codes=torch.cat([weight.codes for weight in weights]),
        scales=torch.cat([weight.scales for weight in weights]),
        zero_points=torch.cat(zeros) if zeros else None,
        bits=first.bits,
        group_size=first.group_size,
    )
