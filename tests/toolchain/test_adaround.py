"""Laws of learned rounding, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.toolchain.test_solvers import problem
from toolchain.calibration import load_calibration
from toolchain.grids import Grid, GridFormat, find_grid, round_to_grid
from toolchain.loading import load_source
from toolchain.quantized import code_range
from toolchain.recipe import CalibrationSize, parse_recipe
from toolchain.run import quantize_model
from toolchain.solvers import adaround, boa, gptq
from toolchain.solvers.adaround import compensated, learn_rounding
from toolchain.solvers.linear_algebra import inverse_factor
from toolchain.solvers.refine import losses

FORMATS = [
    GridFormat(2, None, True, False),
    GridFormat(3, 4, False, True),
    GridFormat(4, 4, True, True),
    GridFormat(2, None, False, False),
]


def loss(target: Tensor, codes: Tensor, grid: Grid, columns: Tensor, rows: Tensor | None) -> Tensor:
    scales, zeros = grid.expand(target.shape[-1])
    return losses((codes - zeros) * scales - target, columns, rows)


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("pressure", [0.0, 0.7])
def test_the_written_out_gradient_is_the_loss_s(two_sided: bool, pressure: float) -> None:
    weight, columns, rows = problem(0, 1, 5, 8)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 8, generator=generator, dtype=torch.float64) * 2
    scales = 0.2 + torch.rand(5, 8, generator=generator, dtype=torch.float64)
    factor = torch.rand(1 if two_sided else 5, 1, generator=generator, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    h = (torch.sigmoid(leaf) * 1.2 - 0.1).clamp(0, 1)
    change = scales * h - weight[0]
    weighted = change @ columns[0]
    weighted = rows[0] @ weighted if two_sided else weighted
    objective = (factor * weighted * change).sum() / 2 + pressure * (1 - (2 * h - 1).abs().pow(3.5)).sum()
    objective.backward()
    row_hessian = rows[0] if two_sided else None
    written = adaround.gradient(logits, -weight[0], scales, columns[0], row_hessian, factor, pressure, 3.5)
    assert torch.allclose(written, leaf.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_compensated_weights_round_to_the_solvers_codes(fmt: GridFormat, two_sided: bool, ordered: bool) -> None:
    weight, h_col, h_row = problem(2, 2, 6, 12)
    grid = find_grid(weight, fmt, "minmax")
    column, row = inverse_factor(h_col, 0.01, ordered=ordered), inverse_factor(h_row, 0.01, ordered=ordered)
    scales, zeros = grid.expand(12)

    def in_order(tensor: Tensor) -> Tensor:
        return row.take(column.take(tensor, 2), 1) if two_sided else column.take(tensor, 2)

    taken = Grid(in_order(scales), in_order(zeros), fmt)
    if two_sided:
        codes = row.put_back(boa.solve(in_order(weight), column.upper, row.upper, taken), 1)
    else:
        codes = gptq.solve(in_order(weight), column.upper, taken)
    codes = column.put_back(codes, 2)
    start = compensated(weight, codes, grid, column, row if two_sided else None)
    assert torch.equal(round_to_grid(start, scales, zeros, fmt.bits), codes)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_start_rounds_to_the_codes_it_is_given(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lowest, highest = code_range(bits)
    codes = torch.randint(lowest, highest + 1, (3, 40), generator=generator).to(torch.float64)
    place = codes + 3 * torch.randn(3, 40, generator=generator, dtype=torch.float64)
    low, start = adaround.neighbours(codes, place, bits)
    assert torch.equal(low + (start >= 0.5), codes)
    assert lowest <= float(low.min())
    assert float(low.max()) < highest
    assert bool(((start >= 0) & (start <= 1)).all())


@pytest.mark.parametrize("iterations", [0, 1, 40])
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_rounding_never_raises_the_loss_of_a_row_or_head(fmt: GridFormat, two_sided: bool, iterations: int) -> None:
    weight, h_col, h_row = problem(3, 3, 6, 12)
    rows = h_row if two_sided else None
    grid = find_grid(weight, fmt, "squared_error")
    column = inverse_factor(h_col, 0.01)
    codes = gptq.solve(weight, column.upper, grid)
    start = compensated(weight, codes, grid, column, None)
    learned = learn_rounding(weight, codes, start, grid, h_col, rows, iterations)
    again = learn_rounding(weight, codes, start, grid, h_col, rows, iterations)
    assert torch.equal(learned, again)
    assert bool((loss(weight, learned, grid, h_col, rows) <= loss(weight, codes, grid, h_col, rows)).all())
    lowest, highest = code_range(fmt.bits)
    assert torch.equal(learned, learned.round().clamp(lowest, highest))
    assert iterations or torch.equal(learned, codes)


@pytest.mark.parametrize("two_sided", [False, True])
def test_at_two_bits_learned_rounding_beats_the_solver_it_starts_from(two_sided: bool) -> None:
    weight, h_col, h_row = problem(4, 4, 16, 32)
    rows = h_row if two_sided else None
    grid = find_grid(weight, GridFormat(2, None, False, False), "hessian", h_col)
    column, row = inverse_factor(h_col, 0.01), inverse_factor(h_row, 0.01) if two_sided else None
    upper = column.upper
    codes = gptq.solve(weight, upper, grid) if row is None else boa.solve(weight, upper, row.upper, grid)
    start = compensated(weight, codes, grid, column, row)
    learned = learn_rounding(weight, codes, start, grid, h_col, rows, 400)
    before, after = (float(loss(weight, c, grid, h_col, rows).mean()) for c in (codes, learned))
    assert after < 0.95 * before


def test_the_aespa_method_starts_from_gptq_and_ends_below_it(tiny_model: Path, text_file: Path) -> None:
    source = load_source(str(tiny_model))
    size = CalibrationSize(sequences=6, sequence_length=48, held_out_sequences=1)
    text = load_calibration(str(text_file), source, size, 0)
    reports = {}
    for method, solver in (("gptq", None), ("aespa", {"attention_rows": "aespa", "rounding_iterations": 60})):
        document = {"method": method, "weights": {"bits": 2, "group_size": 32}, "solver": solver}
        reports[method] = quantize_model(source, parse_recipe(document, "test"), text.sequences).layers
    for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):  # the same loss in both
        layer = f"model.layers.0.{name}"
        assert reports["aespa"][layer]["loss"] < reports["gptq"][layer]["loss"]
