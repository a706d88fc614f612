"""GPTQ (arXiv 2210.17323): columns in order, each rounding error spread over the columns that are still open.

With H^-1 = U^T U, U upper triangular, column j is rounded, its error e = (w_j - q_j) / U_jj taken, and every later
column k moved by -e U_jk. Columns are handled in blocks: inside a block the update is a thin outer product, for the
columns behind it one matrix product per block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolchain.grids import Grid, round_to_grid
from toolchain.quantized import code_range
from toolchain.solvers import kernels

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
    solve_block = compiled_block if weight.device.type == "cpu" else tensor_block
    open_weight = weight.clone()
    codes = torch.empty_like(weight)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        block_codes, errors = solve_block(
            open_weight[:, :, start:stop].contiguous(),
            scales[:, :, start:stop].contiguous(),
            zeros[:, :, start:stop].contiguous(),
            upper[:, start:stop, start:stop].contiguous(),
            grid.format.bits,
        )
        codes[:, :, start:stop] = block_codes
        if stop < columns:
            open_weight[:, :, stop:].baddbmm_(errors, upper[:, start:stop, stop:], alpha=-1)
    return codes


def compiled_block(weight: Tensor, scales: Tensor, zeros: Tensor, factor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`tensor_block` as one compiled loop, on the CPU."""
    codes, errors = torch.empty_like(weight), torch.empty_like(weight)
    arrays = [tensor.numpy() for tensor in (weight, factor, scales, zeros)]
    kernels.one_sided_block(*arrays, *code_range(bits), codes.numpy(), errors.numpy())
    return codes, errors


def tensor_block(weight: Tensor, scales: Tensor, zeros: Tensor, factor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and errors of one block of columns, as tensor operations.

    Args:
        weight, scales, zeros: [n, rows, block]; factor: [n, block, block].
    """
    # Column-major inside the block: a column is then one contiguous run.
    block, scales, zeros = (tensor.transpose(1, 2).contiguous() for tensor in (weight, scales, zeros))
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    for j in range(block.shape[1]):
        column, scale, zero = block[:, j], scales[:, j], zeros[:, j]
        code = round_to_grid(column, scale, zero, bits)
        error = (column - (code - zero) * scale) / pivots[:, j, None]
        codes[:, j] = code
        errors[:, j] = error
        block[:, j + 1 :].baddbmm_(factor[:, j, j + 1 :, None], error[:, None, :], alpha=-1)
    return codes.transpose(1, 2), errors.transpose(1, 2)
