"""One int8 or uint8 scale per tensor, fixed by calibration, as ONNX QuantizeLinear and DequantizeLinear compute it.

    code    saturate(round_half_even(x / scale) + zero point)
    value   (code - zero point) * scale

uint8 grids are asymmetric, int8 grids symmetric (zero point 0), codes from -128 to 127: what integer kernels on phones
ask for. Every grid holds 0 exactly. Measured on ONNX Runtime 1.31.1 (x86): equal bit for bit. ARM: read from MLAS's
source (`quantize.cpp`: division, clamp, round to nearest even, add), not run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from toolchain.activations.quantized import QuantizedActivations

Method = Literal["minmax", "percentile", "mse"]

_BINS = 8192
_CANDIDATES = 96
_SMALLEST_FRACTION = 0.01
_SMALLEST_SCALE = 2.0**-100


@dataclass(frozen=True)
class StaticGrid:
    """Scale and zero point of a tensor.

    Attributes:
        scale: positive, finite, a float32 number.
        zero_point: within the code range.
        signed: int8 codes [-128, 127]; otherwise uint8 codes [0, 255].

    Raises:
        ValueError: a value breaks the above.
    """

    scale: float
    zero_point: int
    signed: bool

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf") or float(np.float32(self.scale)) != self.scale:
            raise ValueError(f"the scale must be a positive float32 number, not {self.scale!r}")
        if not self.low <= self.zero_point <= self.high:
            raise ValueError(f"zero point {self.zero_point} leaves [{self.low}, {self.high}]")

    @property
    def low(self) -> int:
        return -128 if self.signed else 0

    @property
    def high(self) -> int:
        return 127 if self.signed else 255


def grid(low: float, high: float, *, signed: bool) -> StaticGrid:
    """The grid for a range, widened to hold 0. A range of nothing but 0 has scale 1.

    Raises:
        ValueError: low > high, or one of them is not finite.
    """
    if not (np.isfinite(low) and np.isfinite(high)) or low > high:
        raise ValueError(f"[{low}, {high}] is not a range")
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(-low, high) / 127 if signed else (high - low) / 255
    if scale < _SMALLEST_SCALE:
        return StaticGrid(1.0, 0, signed)
    rounded = float(np.float32(scale))
    zero_point = 0 if signed else int(np.clip(np.rint(-low / rounded), 0, 255))
    return StaticGrid(rounded, zero_point, signed)


def quantize(x: Tensor, grid: StaticGrid) -> QuantizedActivations:
    """x float32 [..., in] -> int8 or uint8 codes, the same scale and zero point for every row."""
    codes = (torch.round(_scaled(x, grid)) + grid.zero_point).clamp(grid.low, grid.high)
    shape = (*x.shape[:-1], 1)
    return QuantizedActivations(
        codes=codes.to(torch.int8 if grid.signed else torch.uint8),
        scales=x.new_full(shape, grid.scale),
        zero_points=torch.full(shape, grid.zero_point, dtype=torch.int32, device=x.device),
        group_size=x.shape[-1],
    )


def fake_quantize(x: Tensor, grid: StaticGrid) -> Tensor:
    """`quantize(x, grid).dequantize()`, without the integers."""
    low, high = grid.low - grid.zero_point, grid.high - grid.zero_point
    return torch.round(_scaled(x, grid)).clamp(low, high) * grid.scale


def _scaled(x: Tensor, grid: StaticGrid) -> Tensor:
    # By a tensor: torch may turn a division by a number into a product with its inverse.
    return torch.div(x, x.new_tensor(grid.scale))


class RangeObserver:
    """Collects the values of a tensor over calibration, and chooses a range.

    Values are counted in bins of equal width over [-limit, limit). limit is a power of two and doubles when a value
    does not fit: pairs of bins are then merged, which is exact. So the order of the batches hardly matters.
    """

    def __init__(self) -> None:
        self.smallest, self.largest = 0.0, 0.0
        self._limit = 0.0
        self._counts = np.zeros(_BINS, np.int64)

    def update(self, x: Tensor) -> None:
        """Count the values of x (float, any shape).

        Raises:
            ValueError: a value is not finite.
        """
        values = x.detach().to(torch.float64).flatten().cpu().numpy()
        if values.size == 0:
            return
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("calibration activations must be finite")
        self.smallest, self.largest = min(self.smallest, low), max(self.largest, high)
        self._widen(max(-low, high))
        if self._limit == 0:
            self._counts[_BINS // 2] += values.size
            return
        index = np.floor((values + self._limit) * (_BINS / (2 * self._limit))).astype(np.int64)
        self._counts += np.bincount(index, minlength=_BINS)

    def _widen(self, amax: float) -> None:
        if amax < self._limit or amax == 0:
            return
        limit = 2.0 ** (np.frexp(amax)[1])  # above amax
        while 0 < self._limit < limit:
            merged = self._counts.reshape(-1, 2).sum(1)
            self._counts = np.concatenate([np.zeros(_BINS // 4, np.int64), merged, np.zeros(_BINS // 4, np.int64)])
            self._limit *= 2
        self._limit = limit

    def range(
        self, method: Method = "minmax", *, percentile: float = 99.99, signed: bool = False
    ) -> tuple[float, float]:
        """The chosen range; it always holds 0.

        Args:
            method: minmax, all values; percentile, this share of the values, as many cut off below as above; mse, the
                fraction of minmax with the smallest squared rounding and clipping error, judged by the bins.
            signed: the grid that `mse` is for.

        Raises:
            ValueError: nothing was counted, the percentile is not in (0, 100], or there is no such method.
        """
        if not self._counts.any():
            raise ValueError("no activations were counted")
        if method == "minmax" or self._limit == 0:
            return self.smallest, self.largest
        width = 2 * self._limit / _BINS
        edges = -self._limit + width * np.arange(_BINS + 1)
        if method == "percentile":
            if not 0 < percentile <= 100:
                raise ValueError(f"the percentile must be in (0, 100], not {percentile}")
            share = np.concatenate([[0.0], np.cumsum(self._counts) / self._counts.sum()])
            tail = (100 - percentile) / 200
            low = edges[np.searchsorted(share, tail, side="right") - 1]
            high = edges[np.searchsorted(share, 1 - tail, side="left")]
            return max(min(float(low), 0.0), self.smallest), min(max(float(high), 0.0), self.largest)
        if method != "mse":
            raise ValueError(f"there is no method {method!r}")
        used = np.flatnonzero(self._counts)
        centres = torch.from_numpy(edges[used] + width / 2).to(torch.float32)
        counts = torch.from_numpy(self._counts[used]).to(torch.float64)
        best, chosen = float("inf"), (self.smallest, self.largest)
        for fraction in np.geomspace(1.0, _SMALLEST_FRACTION, _CANDIDATES):
            low, high = self.smallest * float(fraction), self.largest * float(fraction)
            error = (fake_quantize(centres, grid(low, high, signed=signed)) - centres).to(torch.float64)
            score = float((error.square() * counts).sum())
            if score < best:
                best, chosen = score, (low, high)
        return chosen
