"""Where grids lie for the solver that follows: laws of the compensated search, of scale steps and of the damping."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import Tensor

from toolchain.grids import GridFormat, find_grid
from toolchain.options import Options
from toolchain.solve import Settings, _damped, _scale_factors, solve_matrix
from toolchain.solvers import gptq
from toolchain.solvers.linear_algebra import inverse_factor, remaining_costs
from toolchain.solvers.refine import losses


def correlated(seed: int, width: int = 96) -> tuple[Tensor, Tensor]:
    """Weights, and the Hessian of inputs that go together, as those of language models do."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    mixing = torch.eye(width) + 0.8 * draw(width, width) / width**0.5
    x = (draw(400, width) @ mixing) * draw(width).exp() + 3 * draw(400, 1) * draw(1, width)
    return draw(64, width), 2 * x.mT @ x / 400


@pytest.mark.parametrize("ordered", [False, True])
def test_costs_are_those_of_the_factor(ordered: bool) -> None:
    """The last of the variables that are solved has none after it to make up for it: its cost is its own curvature."""
    _, hessian = correlated(0)
    factor = inverse_factor(hessian[None].double(), 0.01, ordered=ordered)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(96)
    order = torch.arange(96) if factor.order is None else factor.order[0]
    for place in (0, 40, 95):
        rest = order[place:]
        cost = 1 / torch.linalg.inv(damped[rest][:, rest])[0, 0]
        assert torch.allclose(factor.costs()[0, order[place]], cost)
    if ordered:
        assert torch.allclose(remaining_costs(hessian[None].double(), 0.01), factor.costs())


@pytest.mark.parametrize("fmt", [GridFormat(2, None, False), GridFormat(3, None, False), GridFormat(4, 32, True)])
def test_the_compensated_search_suits_gptq_better_than_the_hessian(fmt: GridFormat) -> None:
    ratios = []
    for seed in range(6):
        weight, hessian = correlated(seed)
        factor = inverse_factor(hessian[None], 0.01)
        found = []
        for search in ("hessian", "compensated"):
            grid = find_grid(weight[None], fmt, search, hessian[None], factor.costs())  # type: ignore[arg-type]
            codes = gptq.solve(weight[None], factor.upper, grid)
            found.append(float(losses(grid.values(codes) - weight, hessian[None], None).sum()))
        ratios.append(found[1] / found[0])
    print(fmt, [f"{ratio:.3f}" for ratio in ratios])
    assert sum(ratios) / len(ratios) < 0.98


def test_scale_steps_never_raise_the_damped_loss_of_a_row() -> None:
    weight, hessian = correlated(1)
    settings = Settings(GridFormat(3, None, False), "compensated", 0.01)
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(96))[None]

    def rows(steps: int) -> Tensor:
        found = solve_matrix(weight, hessian, settings, Options(scale_steps=steps), 64)
        return losses((found.dequantize() - weight)[None], damped, None)[0]

    none, one, two = rows(0), rows(1), rows(2)
    assert bool((one <= none * (1 + 1e-5)).all())
    assert bool((two <= one * (1 + 1e-5)).all())
    assert float(one.sum()) < float(none.sum())
    assert _scale_factors(2) == pytest.approx([0.93, 1.07, 0.86, 1.14])


def test_the_hessian_is_as_it_was_after_the_damping() -> None:
    _, hessian = correlated(2)
    before = hessian.clone()
    with suppress(KeyError), _damped(hessian[None], 0.01):
        inside = hessian.clone()
        raise KeyError
    assert torch.equal(hessian, before)
    assert torch.allclose(inside.diagonal(), before.diagonal() + 0.01 * before.diagonal().mean())
    assert torch.equal(inside.triu(1), before.triu(1))
