"""Per head, GPTQ's codes stand in for a two-sided solution that does worse on text it has not seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import toolchain.solve
from tests.toolchain.test_solvers import problem
from toolchain.calibration import load_calibration
from toolchain.grids import GridFormat, find_grid
from toolchain.loading import load_source
from toolchain.recipe import CalibrationSize, Recipe, parse_recipe
from toolchain.run import quantize_model
from toolchain.solve import _safer, _Solution
from toolchain.solvers import boa, gptq, rtn
from toolchain.solvers.linear_algebra import inverse_factor
from toolchain.solvers.refine import losses

SMALL = {"sequences": 12, "sequence_length": 64, "held_out_sequences": 3}


def recipe(**solver: object) -> Recipe:
    weights = {"bits": 3, "group_size": None, "symmetric": False}
    document = {"method": "boa", "weights": weights, "calibration": SMALL, "solver": solver}
    return parse_recipe(document, "test")


def solutions(weight: Tensor, columns: Tensor, rows: Tensor) -> tuple[_Solution, _Solution]:
    grid = find_grid(weight, GridFormat(3, None, False, False), "minmax")
    column, row = inverse_factor(columns, 0.01).upper, inverse_factor(rows, 0.01).upper
    made = (boa.solve(weight, column, row, grid), gptq.solve(weight, column, grid))
    two_sided, plain = (_Solution(codes, grid, 0.0, 0.0) for codes in made)
    return two_sided, plain


def test_each_head_gets_the_codes_that_do_better_on_unseen_statistics() -> None:
    weight, columns, rows = problem(3, 6, 8, 16)
    two_sided, plain = solutions(weight, columns, rows)
    # For every other head the rows' Hessian of unseen text has nothing to do with the one that was solved for.
    unseen = torch.where(torch.arange(6)[:, None, None] % 2 == 0, rows, torch.linalg.inv(rows))
    chosen, heads = _safer(weight, two_sided, plain, columns, unseen)
    loss = {
        name: losses(one.grid.values(one.codes) - weight, columns, unseen)[:, 0]
        for name, one in (("chosen", chosen), ("two-sided", two_sided), ("plain", plain))
    }
    assert torch.equal(loss["chosen"], torch.minimum(loss["two-sided"], loss["plain"]))
    assert heads == (loss["plain"] < loss["two-sided"]).nonzero()[:, 0].tolist()
    assert 0 < len(heads) < 6


def test_a_head_whose_weights_are_moved_too_far_falls_back() -> None:
    weight, columns, rows = problem(4, 3, 8, 16)
    two_sided, plain = solutions(weight, columns, rows)
    near = _Solution(rtn.solve(weight, plain.grid), plain.grid, 0.0, 0.0)
    far = _Solution(two_sided.codes.clone(), two_sided.grid, 0.0, 0.0)
    far.codes[1] += 3
    # A Hessian that sees nothing of head 1 but its sum, which the move is free in.
    blind = rows.clone()
    blind[1] = 1e-12 * torch.eye(8)
    chosen, heads = _safer(weight, far, near, columns, blind)
    assert 1 in heads
    assert torch.equal(chosen.codes[1], near.codes[1])


def test_text_is_held_out_and_the_report_names_the_heads(
    tiny_model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = load_source(str(tiny_model))
    text = load_calibration(str(text_file), source, CalibrationSize(**SMALL), 0)
    seen: list[tuple[int, ...]] = []
    solve = boa.solve

    def spoilt(target: Tensor, *arguments: Tensor) -> Tensor:
        codes = solve(target, *arguments)
        if target.shape[0] > 1:
            codes[0] = -1 - codes[0]  # head 0 is wrong, whatever it is measured by
        seen.append(tuple(codes.shape))
        return codes

    monkeypatch.setattr(toolchain.solve.boa, "solve", spoilt)
    layers = quantize_model(source, recipe(attention_rows="boa", safety_net=True), text.sequences).layers
    assert seen
    for name, report in layers.items():
        if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj"):
            assert 0 in report["fallback_heads"]
        else:
            assert report["fallback_heads"] is None
    assert "GPTQ's codes for head 0" in capsys.readouterr().err
    without = quantize_model(source, recipe(attention_rows="boa"), text.sequences).layers
    assert all(report["fallback_heads"] is None for report in without.values())


def test_a_net_for_one_sided_rows_is_refused() -> None:
    with pytest.raises(Exception, match="safety_net is for attention_rows"):
        recipe(attention_rows="none", safety_net=True)
