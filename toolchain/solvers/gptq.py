"""GPTQ (arXiv 2210.17323): columns in order, each rounding error spread over the columns that are still open.

With H^-1 = U^T U, U upper triangular, column j is rounded, its error e = (w_j - q_j) / U_jj taken, and every later
column k moved by -e U_jk. Columns are handled in blocks: inside a block the update is a thin outer product, for the
columns behind it one matrix product per block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolchain.grids import Grid, round_to_grid

_BLOCK = 64


def solve(weight: Tensor, upper: Tensor, grid: Grid) -> Tensor:
    """Codes [n, rows, columns] (float holding integers).

    Args:
        weight: [n, rows, columns].
        upper: [1 or n, columns, columns], U above, from `inverse_factor`.
    """
    n, _, columns = weight.shape
    upper = upper.expand(n, columns, columns)
    scales, zeros = grid.expand(columns)
    open_weight = weight.clone()
    codes = torch.empty_like(weight)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        # Column-major inside the block: a column is then one contiguous run.
        block = open_weight[:, :, start:stop].transpose(1, 2).contiguous()
        block_scales = scales[:, :, start:stop].transpose(1, 2).contiguous()
        block_zeros = zeros[:, :, start:stop].transpose(1, 2).contiguous()
        block_codes = torch.empty_like(block)
        errors = torch.empty_like(block)
        factor = upper[:, start:stop, start:stop]
        pivots = factor.diagonal(dim1=-2, dim2=-1)
        for j in range(stop - start):
            column, scale, zero = block[:, j], block_scales[:, j], block_zeros[:, j]
            code = round_to_grid(column, scale, zero, grid.format.bits)
            error = (column - (code - zero) * scale) / pivots[:, j, None]
            block_codes[:, j] = code
            errors[:, j] = error
            block[:, j + 1 :].baddbmm_(factor[:, j, j + 1 :, None], error[:, None, :], alpha=-1)
        codes[:, :, start:stop] = block_codes.transpose(1, 2)
        if stop < columns:
            open_weight[:, :, stop:].baddbmm_(errors.transpose(1, 2), upper[:, start:stop, stop:], alpha=-1)
    return codes
