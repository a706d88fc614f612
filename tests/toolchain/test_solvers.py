"""Laws of the solvers, in float64 (algorithms.md 1.10)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from toolchain.grids import Grid, GridFormat, find_grid
from toolchain.solvers import boa, gptq, rtn
from toolchain.solvers.linear_algebra import inverse_factor

FORMATS = [
    GridFormat(3, None, True, False),
    GridFormat(2, None, False, False),
    GridFormat(4, 4, True, True),
    GridFormat(3, 4, False, True),
]


def spd(generator: torch.Generator, n: int, size: int) -> Tensor:
    a = torch.randn(n, size, 2 * size, generator=generator, dtype=torch.float64)
    return a @ a.mT / (2 * size)


def problem(seed: int, n: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, rows, columns, generator=generator, dtype=torch.float64)
    return weight, spd(generator, n, columns), spd(generator, n, rows)


def dense_gptq(weight: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """Textbook GPTQ on one flat vector with a dense Hessian: one weight at a time."""
    rows, columns = weight.shape
    scales, zeros = (values[0].reshape(-1) for values in grid.expand(columns))
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian)).mT
    open_weight, codes = weight.reshape(-1).clone(), torch.zeros(rows * columns, dtype=weight.dtype)
    low, high = -(1 << (grid.format.bits - 1)), (1 << (grid.format.bits - 1)) - 1
    for i in range(rows * columns):
        codes[i] = torch.clamp(torch.round(open_weight[i] / scales[i]) + zeros[i], low, high)
        error = (open_weight[i] - (codes[i] - zeros[i]) * scales[i]) / upper[i, i]
        open_weight[i:] -= error * upper[i, i:]
    return codes.view(rows, columns)


def loss(weight: Tensor, codes: Tensor, grid: Grid, h_col: Tensor, h_row: Tensor) -> float:
    scales, zeros = grid.expand(weight.shape[-1])
    change = (codes - zeros) * scales - weight
    return float((h_row @ change @ h_col * change).sum())


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(5, 8), (8, 4), (1, 8), (6, 12)])
def test_two_sided_solver_equals_dense_gptq_on_the_kronecker_matrix(fmt: GridFormat, rows: int, columns: int) -> None:
    weight, h_col, h_row = problem(0, 3, rows, columns)
    grid = find_grid(weight, fmt, "minmax")
    codes = boa.solve(weight, inverse_factor(h_col, 0.0).upper, inverse_factor(h_row, 0.0).upper, grid)
    for head in range(3):
        one = Grid(grid.scales[head : head + 1], grid.zeros[head : head + 1], fmt)
        assert torch.equal(codes[head], dense_gptq(weight[head], torch.kron(h_row[head], h_col[head]), one))


@pytest.mark.parametrize("fmt", FORMATS)
def test_identity_row_hessian_gives_gptq(fmt: GridFormat) -> None:
    weight, h_col, _ = problem(1, 2, 7, 140)
    grid = find_grid(weight, fmt, "minmax")
    upper = inverse_factor(h_col, 0.01).upper
    identity = torch.eye(7, dtype=torch.float64).expand(2, 7, 7)
    assert torch.equal(boa.solve(weight, upper, identity, grid), gptq.solve(weight, upper, grid))


def test_blocked_gptq_equals_dense_gptq() -> None:
    weight, h_col, _ = problem(2, 1, 3, 150)
    grid = find_grid(weight, GridFormat(3), "squared_error")
    codes = gptq.solve(weight, inverse_factor(h_col, 0.0).upper, grid)
    for row in range(3):
        one = Grid(grid.scales[:, row : row + 1], grid.zeros[:, row : row + 1], grid.format)
        assert torch.equal(codes[0, row : row + 1], dense_gptq(weight[0, row : row + 1], h_col[0], one))


def test_identity_hessians_give_round_to_nearest() -> None:
    weight, _, _ = problem(3, 2, 6, 32)
    grid = find_grid(weight, GridFormat(4, 16), "minmax")
    column = torch.eye(32, dtype=torch.float64)[None]
    row = torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    assert torch.equal(boa.solve(weight, column, row, grid), rtn.solve(weight, grid))


def test_a_shared_column_hessian_means_the_same_one_for_every_head() -> None:
    weight, h_col, h_row = problem(4, 3, 5, 16)
    grid = find_grid(weight, GridFormat(3), "minmax")
    row = inverse_factor(h_row, 0.01).upper
    shared = inverse_factor(h_col[:1], 0.01).upper
    assert torch.equal(
        boa.solve(weight, shared, row, grid), boa.solve(weight, shared.expand(3, 16, 16).contiguous(), row, grid)
    )


def test_loss_falls_from_round_to_nearest_to_gptq_to_boa_on_the_mean() -> None:
    totals = {"rtn": 0.0, "gptq": 0.0, "boa": 0.0}
    for seed in range(12):
        weight, h_col, h_row = problem(100 + seed, 2, 12, 24)
        grid = find_grid(weight, GridFormat(3, None, True, False), "minmax")
        column, row = inverse_factor(h_col, 0.0).upper, inverse_factor(h_row, 0.0).upper
        totals["rtn"] += loss(weight, rtn.solve(weight, grid), grid, h_col, h_row)
        totals["gptq"] += loss(weight, gptq.solve(weight, column, grid), grid, h_col, h_row)
        totals["boa"] += loss(weight, boa.solve(weight, column, row, grid), grid, h_col, h_row)
    assert totals["boa"] < totals["gptq"] < totals["rtn"]


def test_block_row_update_is_the_constrained_least_squares_solution() -> None:
    """-H_RR^-1 H_RB D_B = U_BR^T U_BB^-T D_B: what the row coupling of the solver is made of."""
    _, _, h_row = problem(5, 1, 9, 4)
    H, U = h_row[0], inverse_factor(h_row, 0.0).upper[0]
    B, R = slice(0, 3), slice(3, 9)
    change = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = -torch.linalg.solve(H[R, R], H[R, B] @ change)
    assert torch.allclose(U.mT[R, B] @ torch.linalg.inv(U.mT[B, B]) @ change, expected, atol=1e-12)


def test_inverse_factor_factors_the_damped_inverse() -> None:
    H = spd(torch.Generator().manual_seed(0), 2, 10)
    factor = inverse_factor(H, 0.01)
    damped = H + torch.diag_embed(0.01 * H.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).expand(2, 10))
    assert torch.allclose(factor.upper.mT @ factor.upper @ damped, torch.eye(10, dtype=torch.float64), atol=1e-9)
    assert torch.equal(factor.upper, factor.upper.triu())
    assert factor.damping == 0.01


def test_unused_inputs_round_to_nearest() -> None:
    weight, h_col, _ = problem(6, 1, 4, 12)
    h_col[:, 5, :] = 0
    h_col[:, :, 5] = 0
    grid = find_grid(weight, GridFormat(4), "minmax")
    codes = gptq.solve(weight, inverse_factor(h_col, 0.01).upper, grid)
    assert torch.equal(codes[:, :, 5], rtn.solve(weight, grid)[:, :, 5])


def test_damping_rises_for_an_indefinite_hessian_and_says_so() -> None:
    H = torch.diag(torch.tensor([1.0, 1.0, -0.02], dtype=torch.float64))[None]
    H[:, 2, 2] = 1e-3
    H[:, 0, 1] = H[:, 1, 0] = 1.005
    assert inverse_factor(H, 1e-3).damping > 1e-3
    H[:, 0, 1] = H[:, 1, 0] = 5.0
    with pytest.raises(ArithmeticError, match="not positive definite"):
        inverse_factor(H, 1e-3)


def test_compiled_loops_take_as_many_threads_as_pytorch_and_leave_it_its_own() -> None:
    script = """
import numba, torch
from toolchain.grids import GridFormat, find_grid
from toolchain.solvers import gptq
torch.set_num_threads(1)
weight = torch.randn(1, 8, 32)
gptq.solve(weight, torch.eye(32)[None], find_grid(weight, GridFormat(4, None, True, False), "minmax"))
print(torch.get_num_threads(), numba.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["1", "1"], done.stderr
