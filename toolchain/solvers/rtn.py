"""Round to nearest: every weight by itself, no data."""

from __future__ import annotations

from torch import Tensor

from toolchain.grids import Grid, round_to_grid


def solve(weight: Tensor, grid: Grid) -> Tensor:
    """Codes [n, rows, columns] (float holding integers) of a stack of weights of that shape."""
    scales, zeros = grid.expand(weight.shape[-1])
    return round_to_grid(weight, scales, zeros, grid.format.bits)
