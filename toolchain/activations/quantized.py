"""The value type for quantized activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class QuantizedActivations:
    """Activations as integers: x[..., j] = scales[..., g] * (codes[..., j] - zero_points[..., g]), g = j // group_size.

    Attributes:
        codes: int8 or uint8 [..., in].
        scales: float32 [..., groups], not negative (0 where a runtime's scale underflows). groups = in / group_size,
            rounded up: the last group may be short.
        zero_points: int32 [..., groups], or None where they are all 0.
        group_size: columns that share a scale.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    group_size: int

    def grouped(self) -> Tensor:
        """code - zero point, float32 [..., groups, group_size]; a short last group is filled with 0."""
        values = blocks(self.codes.to(torch.float32), self.group_size)
        if self.zero_points is None:
            return values
        values = values - self.zero_points.to(torch.float32)[..., None]
        values.flatten(-2)[..., self.codes.shape[-1] :] = 0
        return values

    def dequantize(self) -> Tensor:
        """float32 [..., in], computed as float32(code - zero point) * scale."""
        return (self.grouped() * self.scales[..., None]).flatten(-2)[..., : self.codes.shape[-1]]


def blocks(x: Tensor, size: int) -> Tensor:
    """x [..., in] -> [..., ceil(in / size), size], the last block filled with 0 (a view where none is needed).

    Raises:
        ValueError: size is less than 1.
    """
    if size < 1:
        raise ValueError(f"a block has at least 1 column, not {size}")
    missing = -x.shape[-1] % size
    padded = pad(x, (0, missing)) if missing else x
    return padded.unflatten(-1, (-1, size))
