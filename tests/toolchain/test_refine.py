"""Laws of the refinements on a stored loss, and of the compiled loops, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.toolchain.test_solvers import problem, spd
from toolchain.grids import Grid, GridFormat, find_grid
from toolchain.quantized import code_range
from toolchain.solvers import boa, gptq, refine, rtn
from toolchain.solvers.linear_algebra import inverse_factor
from toolchain.solvers.refine import descend, losses, refit_scales, weigh

FORMATS = [GridFormat(3, None, True, False), GridFormat(2, None, False, False), GridFormat(3, 4, False, False)]


def loss_of(target: Tensor, codes: Tensor, grid: Grid, columns: Tensor, rows: Tensor | None) -> Tensor:
    scales, zeros = grid.expand(target.shape[-1])
    return losses((codes - zeros) * scales - target, columns, rows)


def descended(target: Tensor, start: Tensor, grid: Grid, columns: Tensor, rows: Tensor | None, sweeps: int) -> Tensor:
    """Codes from descent, whose gradient is that of the codes it ends with."""
    codes, gradient = descend(weigh(grid.values(start) - target, columns, rows)[1], start, grid, columns, rows, sweeps)
    assert torch.allclose(gradient, weigh(grid.values(codes) - target, columns, rows)[1])
    return codes


@pytest.mark.parametrize("fmt", FORMATS)
def test_losses_are_the_quadratic_form_of_the_kronecker_product(fmt: GridFormat) -> None:
    change, h_col, h_row = problem(0, 3, 5, 8)
    for head in range(3):
        flat = change[head].reshape(-1)
        whole = flat @ torch.kron(h_row[head], h_col[head]) @ flat
        assert torch.allclose(losses(change, h_col, h_row)[head, 0], whole)
        rows_apart = (change[head] @ h_col[head] * change[head]).sum()
        assert torch.allclose(losses(change, h_col, None)[head].sum(), rows_apart)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("two_sided", [False, True])
def test_refitted_scales_are_a_stationary_point(fmt: GridFormat, two_sided: bool) -> None:
    """A relative change of any scale by a thousandth does not lower the loss by more than the ridge explains."""
    target, h_col, h_row = problem(1, 2, 4, 8)
    rows = h_row if two_sided else None
    grid = find_grid(target, fmt, "minmax")
    codes = rtn.solve(target, grid)
    refitted = refit_scales(target, codes, grid, h_col, rows)
    before = loss_of(target, codes, grid, h_col, rows).sum()
    best = loss_of(target, codes, refitted, h_col, rows).sum()
    assert best < before
    if two_sided and fmt.group_size:
        return  # one sweep over the rows: lower, but not yet the minimum
    for row in range(4):
        for group in range(refitted.scales.shape[-1]):
            for factor in (0.99, 1.01):
                scales = refitted.scales.clone()
                scales[:, row, group] *= factor
                other = loss_of(target, codes, Grid(scales, refitted.zeros, fmt), h_col, rows).sum()
                assert other > best * (1 - 1e-4)


@pytest.mark.parametrize("fmt", FORMATS)
def test_refitted_scales_are_the_same_a_few_rows_at_a_time(fmt: GridFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    target, h_col, _ = problem(1, 2, 7, 8)
    grid = find_grid(target, fmt, "minmax")
    codes = rtn.solve(target, grid)
    whole = refit_scales(target, codes, grid, h_col, None).scales
    monkeypatch.setattr(refine, "_NORMALS", 2 * 3 * whole.shape[-1] ** 2)
    assert torch.allclose(refit_scales(target, codes, grid, h_col, None).scales, whole)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("two_sided", [False, True])
def test_descent_lowers_the_loss_to_where_no_single_code_can(fmt: GridFormat, two_sided: bool) -> None:
    target, h_col, h_row = problem(2, 2, 4, 8)
    rows = h_row if two_sided else None
    grid = find_grid(target, fmt, "minmax")
    start = rtn.solve(target, grid)
    codes = descended(target, start, grid, h_col, rows, 50)
    low, high = code_range(fmt.bits)
    assert codes.min() >= low
    assert codes.max() <= high
    best = loss_of(target, codes, grid, h_col, rows).sum()
    assert best < loss_of(target, start, grid, h_col, rows).sum()
    for head, row, column in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(8)).tolist():
        for step in (-1, 1):
            other = codes.clone()
            other[head, row, column] = (other[head, row, column] + step).clamp(low, high)
            assert loss_of(target, other, grid, h_col, rows).sum() >= best * (1 - 1e-12)


@pytest.mark.parametrize("two_sided", [False, True])
def test_descent_takes_one_column_hessian_for_all_heads(two_sided: bool) -> None:
    target, h_col, h_row = problem(3, 3, 4, 8)
    rows, shared = h_row if two_sided else None, h_col[:1]
    grid = find_grid(target, FORMATS[0], "minmax")
    start = rtn.solve(target, grid)
    every = shared.expand(3, 8, 8).contiguous()
    assert torch.equal(descended(target, start, grid, shared, rows, 5), descended(target, start, grid, every, rows, 5))


def test_a_row_that_the_loss_does_not_see_keeps_nobody_from_being_refitted() -> None:
    target, h_col, h_row = problem(3, 2, 5, 16)
    h_row[:, 1], h_row[:, :, 1] = 0, 0
    grid = find_grid(target, GridFormat(2, 4), "minmax")
    codes = rtn.solve(target, grid)
    refitted = refit_scales(target, codes, grid, h_col, h_row)
    changed = (refitted.scales != grid.scales).any(-1)
    assert changed.tolist() == [[True, False, True, True, True]] * 2
    assert bool(
        (
            losses(refitted.values(codes) - target, h_col, h_row) < losses(grid.values(codes) - target, h_col, h_row)
        ).all()
    )


def test_descent_leaves_the_minimum_alone_and_its_input_too() -> None:
    target, h_col, h_row = problem(3, 2, 4, 8)
    grid = find_grid(target, FORMATS[0], "minmax")
    once = descended(target, rtn.solve(target, grid), grid, h_col, h_row, 50)
    kept = once.clone()
    assert torch.equal(descended(target, once, grid, h_col, h_row, 5), kept)
    assert torch.equal(once, kept)


@pytest.mark.parametrize("two_sided", [False, True])
def test_descent_leaves_the_codes_of_inputs_that_were_never_used(two_sided: bool) -> None:
    """The loss does not see them (a ReLU that never fired); text that uses them later does."""
    target, h_col, h_row = problem(3, 2, 4, 8)
    h_col[:, 5], h_col[:, :, 5] = 0, 0
    rows = h_row if two_sided else None
    grid = find_grid(target, FORMATS[0], "minmax")
    start = rtn.solve(target, grid)
    codes = descended(target, start, grid, h_col, rows, 10)
    assert torch.equal(codes[:, :, 5], start[:, :, 5])
    assert not torch.equal(codes, start)


@pytest.mark.parametrize("fmt", FORMATS)
def test_compiled_one_sided_block_equals_its_tensor_form(fmt: GridFormat) -> None:
    weight, h_col, _ = problem(4, 2, 7, 40)
    grid = find_grid(weight, fmt, "minmax")
    upper = inverse_factor(h_col, 0.01).upper
    scales, zeros = grid.expand(40)
    codes, errors = gptq.tensor_block(weight, scales.contiguous(), zeros.contiguous(), upper, fmt.bits)
    compiled_codes, compiled_errors = gptq.compiled_block(
        weight, scales.contiguous(), zeros.contiguous(), upper, fmt.bits
    )
    assert torch.equal(codes, compiled_codes)
    assert torch.allclose(errors, compiled_errors, atol=1e-12)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(5, 8), (70, 72), (130, 4)])
def test_compiled_two_sided_solver_equals_its_tiles(fmt: GridFormat, rows: int, columns: int) -> None:
    """Whole tiles, ragged ones, more than one row of tiles."""
    weight, h_col, h_row = problem(5, 2, rows, columns)
    grid = find_grid(weight, fmt, "minmax")
    column, row = inverse_factor(h_col, 0.01).upper, inverse_factor(h_row, 0.01).upper
    assert torch.equal(boa.solve(weight, column, row, grid), boa.solve_in_tiles(weight, column, row, grid))


@pytest.mark.parametrize("joint_rows", [1, 2, 3, 7])
def test_jointly_solved_rows_are_boa_when_the_grid_does_not_adapt(joint_rows: int) -> None:
    weight, h_col, h_row = problem(6, 2, 7, 12)
    fmt = GridFormat(3, 4, False, False)
    grid = find_grid(weight, fmt, "minmax")
    column, row = inverse_factor(h_col, 0.01).upper, inverse_factor(h_row, 0.01).upper
    taken = 0

    def fixed(part: Tensor) -> Grid:
        nonlocal taken
        own = slice(taken, taken + part.shape[1])
        taken += part.shape[1]
        return Grid(grid.scales[:, own], grid.zeros[:, own], fmt)

    codes, seen = boa.solve_adaptive(weight, column, row, fixed, joint_rows)
    assert torch.equal(codes, boa.solve(weight, column, row, grid))
    assert torch.equal(seen.scales, grid.scales)


def test_activation_order_is_a_permutation_of_the_problem() -> None:
    weight, h_col, _ = problem(7, 3, 4, 9)
    h_col = h_col * torch.linspace(0.5, 4, 9, dtype=torch.float64).outer(torch.linspace(0.5, 4, 9, dtype=torch.float64))
    factor = inverse_factor(h_col, 0.01, ordered=True)
    assert factor.order is not None
    for head in range(3):
        order = factor.order[head]
        diagonal = h_col[head].diagonal()[order]
        assert torch.equal(diagonal, diagonal.sort(descending=True).values)
        own = inverse_factor(h_col[head][order][:, order][None], 0.01).upper[0]
        assert torch.allclose(factor.upper[head], own, atol=1e-12)
    assert torch.equal(factor.put_back(factor.take(weight, 2), 2), weight)
    damped = h_col + torch.diag_embed(0.01 * h_col.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).expand(3, 9))
    assert torch.allclose(factor.solve(weight) @ damped, weight, atol=1e-9)


def test_gauss_newton_rows_are_the_mean_of_what_each_position_adds() -> None:
    """Against the definition, C_l and u_lm written out, with every position sampled."""
    from toolchain.statistics.gauss_newton import GaussNewtonRows

    generator = torch.Generator().manual_seed(8)
    heads, groups, length, hd, width = 4, 2, 6, 8, 12
    q = torch.randn(heads, length, hd, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(groups, length, hd, generator=generator, dtype=torch.float64) for _ in range(2))
    a = torch.rand(heads, length, length, generator=generator, dtype=torch.float64).tril()
    a = a / a.sum(-1, keepdim=True)
    output = torch.randn(width, heads * hd, generator=generator, dtype=torch.float64)
    inv_freq = torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64)
    rows = GaussNewtonRows(output, heads, groups, hd, inv_freq, per_sequence=length)
    rows.add(torch.zeros(length, width, dtype=torch.float64), q, k, v, a, None, None)

    def turn(position: int) -> Tensor:
        cos, sin = (torch.diag(f(position * inv_freq)) for f in (torch.cos, torch.sin))
        return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)], 0)

    for h in range(heads):
        w = output[:, h * hd : (h + 1) * hd]
        expected = torch.zeros(hd, hd, dtype=torch.float64)
        for position in range(length):
            weights, values, keys = a[h, position], v[h // 2], k[h // 2]
            moment = (weights[:, None] * values).T @ keys - (weights @ values).outer(weights @ keys)
            response = w @ moment @ turn(position)
            expected += response.T @ response
        assert torch.allclose(rows.queries[h], expected, rtol=1e-5)
    for g in range(groups):
        expected = torch.zeros(hd, hd, dtype=torch.float64)
        for h in (2 * g, 2 * g + 1):
            w = output[:, h * hd : (h + 1) * hd]
            for m in range(length):
                for position in range(length):
                    u = a[h, position, m] * w @ (v[g, m] - a[h, position] @ v[g])
                    back = turn(m).T @ q[h, position]
                    expected += u.square().sum() * back.outer(back)
        assert torch.allclose(rows.keys[g], expected, rtol=1e-5)


def test_the_helpers_of_this_file_make_positive_definite_hessians() -> None:
    assert bool((torch.linalg.eigvalsh(spd(torch.Generator().manual_seed(0), 2, 6)) > 0).all())
