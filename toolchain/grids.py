"""Where a weight's grid lies: scales and zero points per output channel or per group, by four searches.

A grid is fixed before the codes are solved. Asymmetric grids follow BoA's search (arXiv 2406.13474, released
configuration): the range (min, max), which always includes 0, is shrunk in steps; around the best, finer steps and both
roundings of the zero point are tried, and the candidate with the lowest score wins. The score of a row's rounding
error e is

    minmax          none: the unshrunk range
    squared_error   sum(e^2)
    hessian         e H_col e^T (for groups: with the diagonal block of H_col that belongs to the group)
    compensated     sum(c e^2), with c what a squared error of a column costs once the columns that are solved after it
                    have made up for it as far as they can: 1 / U_jj^2 of the solver's factor

The last is the loss that GPTQ ends with, if rounding errors are taken as its compensated weights were the original
ones: e H_col e^T is what nobody compensates, and in it columns that go together weigh far too much.

Scales are rounded to bfloat16 before they are scored, where the recipe says so, so that the codes are solved for
exactly the scales that both runtimes hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from toolchain.quantized import QuantizedWeight, code_range

Rounding = Callable[[Tensor], Tensor]
ScaleSearch = Literal["minmax", "squared_error", "hessian", "compensated"]

# The fewer the levels, the more of the range it can pay to clip: how far the search shrinks it.
_SMALLEST_SHRINK = {2: 0.3, 3: 0.5, 4: 0.6, 8: 0.95}
_COARSE_STEP = 0.05
_FINE = (-0.025, 0.0, 0.025)
_SMALLEST_SCALE = 2.0**-100


@dataclass(frozen=True)
class GridFormat:
    """Bits, columns per scale (None: one scale per output channel), symmetry, and the dtype scales are rounded to."""

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    round_scales: bool = True


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of a stack of weights.

    Attributes:
        scales: [n, rows, groups], float, positive.
        zeros: [n, rows, groups], float holding integers in the signed code range; zero where symmetric.
    """

    scales: Tensor
    zeros: Tensor
    format: GridFormat

    def expand(self, columns: int) -> tuple[Tensor, Tensor]:
        """Scales and zero points per weight: two tensors [n, rows, columns]."""
        repeats = columns // self.scales.shape[-1]
        return self.scales.repeat_interleave(repeats, -1), self.zeros.repeat_interleave(repeats, -1)

    def values(self, codes: Tensor) -> Tensor:
        """What `codes` [n, rows, columns] stand for."""
        scales, zeros = self.expand(codes.shape[-1])
        return (codes - zeros) * scales

    def quantized(self, codes: Tensor) -> QuantizedWeight:
        """The value type for `codes` [n, rows, columns] (float holding integers), heads stacked along the rows."""
        columns = codes.shape[-1]
        groups = self.scales.shape[-1]
        zeros = None if self.format.symmetric else self.zeros.reshape(-1, groups).to(torch.int8)
        return QuantizedWeight(
            codes=codes.reshape(-1, columns).to(torch.int8),
            scales=self.scales.reshape(-1, groups).to(torch.float32),
            zero_points=zeros,
            bits=self.format.bits,
            group_size=self.format.group_size,
        )


def round_to_grid(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Nearest code of each weight, as a float holding an integer in the signed range. All shapes broadcast."""
    low, high = code_range(bits)
    return torch.clamp(torch.round(weight / scales) + zeros, low, high)


def find_grid(
    weight: Tensor, fmt: GridFormat, search: ScaleSearch, hessian: Tensor | None = None, costs: Tensor | None = None
) -> Grid:
    """Choose the grid of a stack of weights.

    Args:
        weight: [n, rows, columns], float.
        hessian: [1 or n, columns, columns] column Hessian, for the `hessian` search.
        costs: [1 or n, columns] (`InverseFactor.costs`), for the `compensated` search.

    Raises:
        ValueError: the group size does not divide the columns, or a search lacks its Hessian or costs.
    """
    n, rows, columns = weight.shape
    size = columns if fmt.group_size is None else fmt.group_size
    if columns % size:
        raise ValueError(f"group size {size} does not divide {columns} input columns")
    grouped = weight.view(n, rows, columns // size, size)
    size_of = _metric(search, size, weight.dtype, hessian, costs)
    low = grouped.amin(-1).clamp(max=0)
    high = grouped.amax(-1).clamp(min=0)
    best_scale, best_zero = _candidate(
        low, high, torch.ones_like(low), fmt, torch.floor if fmt.symmetric else torch.round
    )
    if search == "minmax":
        return Grid(best_scale, best_zero, fmt)
    best = _score(grouped, best_scale, best_zero, fmt.bits, size_of)
    best_shrink = torch.ones_like(low)
    count = round((1 - _SMALLEST_SHRINK[fmt.bits]) / _COARSE_STEP) + 1
    coarse = tuple(1 - _COARSE_STEP * step for step in range(count))
    for steps in (coarse, _FINE):
        centre = best_shrink if steps is _FINE else torch.zeros_like(low)
        for step in steps:
            shrink = centre + step
            for scale, zero in _candidates(low, high, shrink, fmt, both=steps is _FINE):
                score = _score(grouped, scale, zero, fmt.bits, size_of)
                better = score < best
                best = torch.where(better, score, best)
                best_scale = torch.where(better, scale, best_scale)
                best_zero = torch.where(better, zero, best_zero)
                best_shrink = torch.where(better, shrink, best_shrink)
    return Grid(best_scale, best_zero, fmt)


def _diagonal_blocks(hessian: Tensor, size: int) -> Tensor:
    """[n, columns, columns] -> the diagonal blocks [n, columns / size, size, size]."""
    n, columns, _ = hessian.shape
    groups = columns // size
    blocks = hessian.view(n, groups, size, groups, size)
    index = torch.arange(groups, device=hessian.device)
    return blocks[:, index, :, index, :].transpose(0, 1).contiguous()


def _candidates(
    low: Tensor, high: Tensor, shrink: Tensor, fmt: GridFormat, *, both: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    roundings: tuple[Rounding, ...] = (torch.floor, torch.ceil) if both and not fmt.symmetric else (torch.round,)
    for rounding in roundings:
        yield _candidate(low, high, shrink, fmt, rounding)


def _candidate(low: Tensor, high: Tensor, shrink: Tensor, fmt: GridFormat, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the range (low, high) * shrink."""
    smallest, largest = code_range(fmt.bits)
    levels = largest - smallest
    if fmt.symmetric:
        # absmax lands on the largest code for the unshrunk range.
        scale = round_scale(torch.maximum(-low, high) * shrink / largest, fmt)
        return scale, torch.zeros_like(scale)
    scale = round_scale((high - low) * shrink / levels, fmt)
    zero = rounding(-low * shrink / scale) + smallest
    return scale, zero.clamp(smallest, largest)


def scaled(grid: Grid, factor: float) -> Grid:
    """The grid with all scales times `factor`; zero points stay."""
    return Grid(round_scale(grid.scales * factor, grid.format), grid.zeros, grid.format)


def round_scale(scale: Tensor, fmt: GridFormat) -> Tensor:
    """A scale as the format stores it, positive."""
    # An all-zero group still needs a positive scale; its codes are all zero, so any will do.
    scale = torch.where(scale < _SMALLEST_SCALE, torch.ones_like(scale), scale)
    return scale.to(torch.bfloat16).to(scale.dtype) if fmt.round_scales else scale.to(torch.float32).to(scale.dtype)


def _metric(
    search: ScaleSearch, size: int, dtype: torch.dtype, hessian: Tensor | None, costs: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """What a search makes of rounding errors [n, rows, groups, size], which it may overwrite: [n, rows, groups]."""
    if search == "hessian":
        if hessian is None:
            raise ValueError("the hessian search needs a column Hessian")
        blocks = _diagonal_blocks(hessian.to(dtype), size)

        def under_hessian(error: Tensor) -> Tensor:
            by_group = error.transpose(1, 2)  # [n, groups, rows, size]
            return torch.matmul(by_group, blocks).mul_(by_group).sum(-1).transpose(1, 2)

        return under_hessian
    if search == "compensated":
        if costs is None:
            raise ValueError("the compensated search needs the columns' costs")
        each = costs.to(dtype).view(costs.shape[0], 1, -1, size)
        return lambda error: error.square_().mul_(each).sum(-1)
    return lambda error: error.square_().sum(-1)


def _score(grouped: Tensor, scale: Tensor, zero: Tensor, bits: int, size_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Score of rounding to nearest, [n, rows, groups]."""
    scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    return size_of((round_to_grid(grouped, scale, zero, bits) - zero) * scale - grouped)
