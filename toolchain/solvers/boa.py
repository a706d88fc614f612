"""BoA's two-sided solver (arXiv 2406.13474): GPTQ on the Kronecker Hessian H_row (x) H_col, without ever forming it.

The loss of a change D of one head's weight is tr(H_row D H_col D^T). Dense GPTQ on the Kronecker product, in row-major
order, is this: rows in order; inside a row, GPTQ over the columns with H_col^-1 = U_c^T U_c; and, once row i is done,
every later row i' moved by -(U_r[i, i'] / U_r[i, i]) (w_i - q_i), w_i being row i before its own column pass (the
error that the column pass spreads telescopes to that difference).

The rows need not wait for each other. Entry (i, j) depends on the earlier columns of its own row and on the earlier
rows in its own column only, so all entries of an anti-diagonal i + j = t are independent. The same holds for square
tiles of entries: tiles of an anti-diagonal are solved as one batch, what they take from the tiles to the left and above
comes from matrix products, and inside a tile the anti-diagonals are walked. Same result as one entry at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from toolchain.grids import Grid, round_to_grid
from toolchain.quantized import code_range
from toolchain.solvers import kernels

_TILE = 64
_WIDE_TILE = 1024

Regrid = Callable[[Tensor], Grid]


def solve(weight: Tensor, upper_column: Tensor, upper_row: Tensor, grid: Grid) -> Tensor:
    """Codes [n, rows, columns] (float holding integers) of n heads.

    Args:
        weight: [n, rows, columns].
        upper_column: [1 or n, columns, columns], U_c.
        upper_row: [n, rows, rows], U_r.
    """
    if weight.device.type == "cpu":
        columns = weight.shape[2]
        low, high = code_range(grid.format.bits)
        codes = torch.empty_like(weight)
        coupling = _coupling(upper_row)
        arrays = [tensor.contiguous().numpy() for tensor in (upper_column, coupling, *grid.expand(columns))]
        kernels.two_sided(weight.clone().numpy(), *arrays, low, high, codes.numpy())
        return codes
    return solve_in_tiles(weight, upper_column, upper_row, grid)


def solve_in_tiles(weight: Tensor, upper_column: Tensor, upper_row: Tensor, grid: Grid) -> Tensor:
    """The same as tensor operations, for accelerators."""
    state = _State(weight, upper_column, upper_row, grid)
    for front in range(state.row_tiles + state.column_tiles - 1):
        first = max(0, front - state.column_tiles + 1)
        state.solve_tiles([(i, front - i) for i in range(first, min(front + 1, state.row_tiles))])
    return state.result()


def solve_adaptive(
    weight: Tensor, upper_column: Tensor, upper_row: Tensor, regrid: Regrid, joint_rows: int
) -> tuple[Tensor, Grid]:
    """The same, with the grid of every `joint_rows` rows found once the rows before them are solved, from the weights
    as these have left them (TurboBoA's adaptive grids, arXiv 2602.04929; its rows of a block ignore each other, ours do
    not).

    Args:
        regrid: rows of the weight as they stand, [n, N, columns] -> their grid.
    Returns: codes [n, rows, columns] and their grid.
    """
    _, rows, columns = weight.shape
    pull = _coupling(upper_row).triu(1).mT  # [n, i, i'], i' < i
    changes = torch.zeros_like(weight)
    codes, grids = [], []
    for start in range(0, rows, joint_rows):
        own = slice(start, min(start + joint_rows, rows))
        current = weight[:, own] - pull[:, own, :start] @ changes[:, :start]
        grid = regrid(current)
        found = solve(current, upper_column, upper_row[:, own, own], grid)
        scales, zeros = grid.expand(columns)
        # A row's change is what it is before its column pass, less its rounded value: (I + pull) change = difference.
        unit = torch.eye(current.shape[1], dtype=weight.dtype, device=weight.device) + pull[:, own, own]
        changes[:, own] = torch.linalg.solve_triangular(unit, current - (found - zeros) * scales, upper=False)
        codes.append(found)
        grids.append(grid)
    scales, zeros = (torch.cat([getattr(grid, part) for grid in grids], 1) for part in ("scales", "zeros"))
    return torch.cat(codes, 1), Grid(scales, zeros, grids[0].format)


def _coupling(upper_row: Tensor) -> Tensor:
    """[n, i', i]: what row i takes of the change of an earlier row i', U_r[i', i] / U_r[i', i']."""
    return upper_row / upper_row.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)


class _State:
    """The weight, padded to whole tiles, and what has been solved of it."""

    def __init__(self, weight: Tensor, upper_column: Tensor, upper_row: Tensor, grid: Grid) -> None:
        _, self.rows, self.columns = weight.shape
        self.tile_rows = min(_TILE, self.rows)
        self.row_tiles = -(-self.rows // self.tile_rows)
        # One row of tiles has nothing to batch: then a tile may as well be wide, which saves steps.
        self.tile_columns = min(_TILE if self.row_tiles > 1 else _WIDE_TILE, self.columns)
        self.column_tiles = -(-self.columns // self.tile_columns)
        rows, columns = self.row_tiles * self.tile_rows, self.column_tiles * self.tile_columns
        self._weight = _pad(weight, rows, columns)
        self._upper_column = _pad_factor(upper_column, columns)
        self._pull_rows = _coupling(_pad_factor(upper_row, rows)).triu(1).mT.contiguous()
        self._pull_columns = self._upper_column.triu(1)
        self._pivots = self._upper_column.diagonal(dim1=-2, dim2=-1)
        self._scales = torch.ones_like(self._weight)
        self._zeros = torch.zeros_like(self._weight)
        own = (slice(None), slice(self.rows), slice(self.columns))
        self._scales[own], self._zeros[own] = grid.expand(self.columns)
        self._codes = torch.zeros_like(self._weight)
        self._changes = torch.zeros_like(self._weight)
        self._errors = torch.zeros_like(self._weight)
        self._bits = grid.format.bits

    def _row_slice(self, i: int) -> slice:
        return slice(i * self.tile_rows, (i + 1) * self.tile_rows)

    def _column_slice(self, j: int) -> slice:
        return slice(j * self.tile_columns, (j + 1) * self.tile_columns)

    def solve_tiles(self, tiles: list[tuple[int, int]]) -> None:
        """Solve tiles that do not depend on each other; those to the left and above are solved."""
        starts, taken, pulls_rows, pulls_columns, pivots, scales, zeros = [], [], [], [], [], [], []
        heads = self._weight.shape[0]
        for i, j in tiles:
            rows, columns = self._row_slice(i), self._column_slice(j)
            above = self._pull_rows[:, rows, : rows.start] @ self._changes[:, : rows.start, columns]
            starts.append(self._weight[:, rows, columns] - above)
            taken.append(self._errors[:, rows, : columns.start] @ self._pull_columns[:, : columns.start, columns])
            pulls_rows.append(self._pull_rows[:, rows, rows])
            pulls_columns.append(self._pull_columns[:, columns, columns].expand(heads, -1, -1))
            pivots.append(self._pivots[:, columns].expand(heads, -1))
            scales.append(self._scales[:, rows, columns])
            zeros.append(self._zeros[:, rows, columns])
        codes, changes, errors = _walk(
            torch.cat(starts),
            torch.cat(taken),
            torch.cat(pulls_rows),
            torch.cat(pulls_columns),
            torch.cat(pivots),
            torch.cat(scales),
            torch.cat(zeros),
            self._bits,
        )
        for index, (i, j) in enumerate(tiles):
            own, rows, columns = slice(index * heads, (index + 1) * heads), self._row_slice(i), self._column_slice(j)
            self._codes[:, rows, columns] = codes[own]
            self._changes[:, rows, columns] = changes[own]
            self._errors[:, rows, columns] = errors[own]

    def result(self) -> Tensor:
        return self._codes[:, : self.rows, : self.columns].contiguous()


def _walk(
    start: Tensor,
    taken: Tensor,
    pull_rows: Tensor,
    pull_columns: Tensor,
    pivots: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve a batch of tiles by their anti-diagonals.

    Args:
        start: [m, rows, columns], the weight less what the rows above the tile have pushed onto it.
        taken: [m, rows, columns], what the columns to the left have pushed onto it.
        pull_rows: [m, rows, rows], strictly lower; pull_columns: [m, columns, columns], strictly upper.
    Returns:
        codes, changes (the row before its column pass, less its rounded value) and errors, all [m, rows, columns].
    """
    # Rows are stored in reverse order, p = rows - 1 - i: an anti-diagonal of (i, j) is then an ordinary diagonal
    # j - p = const, which torch hands out as a view, and its columns are one contiguous run.
    m, rows, columns = start.shape
    start, taken, scales, zeros = (tensor.flip(1) for tensor in (start, taken, scales, zeros))
    pull_rows = pull_rows.flip(1, 2).contiguous()  # [p, p'], p' > p the earlier rows
    pull_columns = pull_columns.mT.contiguous()  # row j: what column j takes of each earlier column's error
    errors = torch.zeros_like(start)
    changes = start.new_zeros(m, columns, rows)  # transposed
    codes = torch.empty_like(start)
    diagonals = [tensor.diagonal for tensor in (start, taken, scales, zeros, errors, codes)]
    for offset in range(1 - rows, columns):
        first, last = max(0, -offset), min(rows, columns - offset)  # rows p in [first, last), columns j = p + offset
        left, right = first + offset, last + offset
        w, pushed, scale, zero, error_out, code_out = (view(offset, 1, 2) for view in diagonals)
        from_rows = (changes[:, left:right] * pull_rows[:, first:last]).sum(-1)
        from_columns = (errors[:, first:last, :right] * pull_columns[:, left:right, :right]).sum(-1)
        row_start = w - from_rows
        value = row_start - pushed - from_columns
        code = round_to_grid(value, scale, zero, bits)
        rounded = (code - zero) * scale
        error_out.copy_((value - rounded) / pivots[:, left:right])
        changes.diagonal(-offset, 1, 2).copy_(row_start - rounded)
        code_out.copy_(code)
    return codes.flip(1), changes.mT.flip(1), errors.flip(1)


def _pad(tensor: Tensor, rows: int, columns: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, columns - tensor.shape[2], 0, rows - tensor.shape[1]))


def _pad_factor(upper: Tensor, size: int) -> Tensor:
    """A factor of a Hessian to which inputs are added that nothing depends on."""
    missing = size - upper.shape[-1]
    if not missing:
        return upper
    padded = _pad(upper, size, size)
    padded.diagonal(dim1=-2, dim2=-1)[:, upper.shape[-1] :] = 1
    return padded
