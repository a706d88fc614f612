"""BoA's two-sided solver (arXiv 2406.13474): GPTQ on the Kronecker Hessian H_row (x) H_col, without ever forming it.

The loss of a change D of one head's weight is tr(H_row D H_col D^T). Dense GPTQ on the Kronecker product, in row-major
order, is this: rows in order; inside a row, GPTQ over the columns with H_col^-1 = U_c^T U_c; and, once row i is done,
every later row i' moved by -(U_r[i, i'] / U_r[i, i]) (w_i - q_i), w_i being row i before its own column pass (the
error that the column pass spreads telescopes to that difference).

The rows need not wait for each other. Entry (i, j) depends on the earlier columns of its own row and on the earlier
rows in its own column only, so all entries of an anti-diagonal i + j = t are independent. This solver walks the
anti-diagonals: rows + columns - 1 batched steps instead of rows * columns, with the same result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolchain.grids import Grid, round_to_grid


def solve(weight: Tensor, upper_column: Tensor, upper_row: Tensor, grid: Grid) -> Tensor:
    """Codes [n, rows, columns] (float holding integers) of n heads.

    Args:
        weight: [n, rows, columns].
        upper_column: [1 or n, columns, columns], U_c.
        upper_row: [n, rows, rows], U_r.
    """
    n, rows, columns = weight.shape
    scales, zeros = grid.expand(columns)
    # Rows are stored in reverse order, p = rows - 1 - i: an anti-diagonal of (i, j) is then an ordinary diagonal
    # j - p = const, which torch hands out as a view, and its columns are one contiguous run.
    weight, scales, zeros = (tensor.flip(1).contiguous() for tensor in (weight, scales, zeros))
    coupling = upper_row / upper_row.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    # pull_rows[p, p'] is what row p takes of the change of row p' > p (an earlier one): U_r[i', i] / U_r[i', i'].
    pull_rows = coupling.triu(1).mT.flip(1, 2).contiguous()
    pivots = upper_column.diagonal(dim1=-2, dim2=-1)
    pull_columns = upper_column.triu(1).mT.contiguous()  # row j: what column j takes of each earlier column's error
    errors = torch.zeros_like(weight)  # e[p, j]
    changes = torch.zeros(n, columns, rows, dtype=weight.dtype, device=weight.device)  # (w_start - q)[j, p]
    codes = torch.empty_like(weight)
    diagonals = [tensor.diagonal for tensor in (weight, scales, zeros, errors, codes)]
    for offset in range(1 - rows, columns):
        first, last = max(0, -offset), min(rows, columns - offset)  # rows p in [first, last), columns j = p + offset
        start, stop = first + offset, last + offset
        w, scale, zero, error_out, code_out = (view(offset, 1, 2) for view in diagonals)
        from_rows = (changes[:, start:stop] * pull_rows[:, first:last]).sum(-1)
        from_columns = (errors[:, first:last, :stop] * pull_columns[:, start:stop, :stop]).sum(-1)
        row_start = w - from_rows
        value = row_start - from_columns
        code = round_to_grid(value, scale, zero, grid.format.bits)
        rounded = (code - zero) * scale
        error_out.copy_((value - rounded) / pivots[:, start:stop])
        changes.diagonal(-offset, 1, 2).copy_(row_start - rounded)
        code_out.copy_(code)
    return codes.flip(1)
