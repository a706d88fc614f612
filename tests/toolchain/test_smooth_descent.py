"""Descent on smoothing scales: what it says of one step is what the objective says, and it ends where none helps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from toolchain.activations import ActivationFormat, simulate
from toolchain.grids import GridFormat
from toolchain.transforms.smooth_descent import STEPS, Objective, Steps, descend
from toolchain.transforms.smooth_search import Smoothing, search_smoothing

SIZE, COLUMNS, BITS, LIMIT = 16, 64, 4, 12
KNOWN: dict[str, Steps | None] = {scheme: steps for scheme, steps in STEPS.items() if not isinstance(steps, str)}
SCHEMES = sorted(KNOWN)


def objective(weight: Tensor, costs: Tensor, samples: Tensor, scales: Tensor, steps: Steps | None) -> float:
    """Both errors, written down as the formulas stand."""
    scaled, inputs = weight * scales, samples / scales
    groups = scaled.unflatten(-1, (-1, SIZE))
    width = groups.abs().amax(-1) / (2 ** (BITS - 1) - 0.5)  # [rows, groups]
    error = float((width.square().sum(0) / 12 * (costs / scales.square()).unflatten(-1, (-1, SIZE)).sum(-1)).sum())
    if steps is None:
        return error
    energy = scaled.square().sum(0)
    if steps.blocks:
        blocks = inputs.unflatten(-1, (-1, SIZE)).abs().amax(-1) / steps.levels
        return error + float((blocks.square().mean(0) / 12 * energy.unflatten(-1, (-1, SIZE)).sum(-1)).sum())
    ranges = (inputs.amax(-1).clamp_min(0) - inputs.amin(-1).clamp_max(0)) / steps.levels
    return error + float(ranges.square().mean() / 12 * energy.sum())


@pytest.fixture
def pair() -> tuple[Tensor, Tensor, Tensor]:
    """A weight [48, 64], the columns' costs, and inputs [200, 64] of which three channels are far larger."""
    generator = torch.Generator().manual_seed(3)
    samples = torch.randn(200, COLUMNS, generator=generator, dtype=torch.float64)
    samples[:, [3, 17, 40]] *= 60.0
    weight = torch.randn(48, COLUMNS, generator=generator, dtype=torch.float64)
    return weight, samples.square().mean(0), samples


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_doubled_or_halved_scale_is_better_in_the_end(pair: tuple[Tensor, Tensor, Tensor], scheme: str) -> None:
    start = torch.ones(COLUMNS, dtype=torch.float64)
    scales = descend(Objective(*pair, SIZE, BITS, KNOWN[scheme]), start, LIMIT)
    assert torch.equal(scales, torch.exp2(scales.log2().round()))
    reached = objective(*pair, scales, KNOWN[scheme])
    assert reached < 0.8 * objective(*pair, start, KNOWN[scheme])
    for channel in range(COLUMNS):
        for factor in (0.5, 2.0):
            other = scales.clone()
            other[channel] *= factor
            assert objective(*pair, other, KNOWN[scheme]) > (1 - 1e-5) * reached


def test_scales_stay_within_their_bounds(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    scales = descend(Objective(*pair, SIZE, BITS, KNOWN["per_token"]), torch.ones(COLUMNS), 1)
    assert set(scales.tolist()) <= {0.5, 1.0, 2.0}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_search_goes_on_where_descent_has_less_of_the_real_error(
    pair: tuple[Tensor, Tensor, Tensor], scheme: str
) -> None:
    weight, _, samples = pair
    weight = weight * torch.logspace(-1, 1, COLUMNS, 2)[torch.randperm(COLUMNS, generator=torch.manual_seed(0))]
    hessian = 2 * samples.mT @ samples / len(samples)
    form = ActivationFormat(scheme)

    def activation(x: Tensor) -> Tensor:
        return simulate(x.float(), form, group_size=SIZE).to(x)

    search: Callable[..., Smoothing] = lambda **options: search_smoothing(  # noqa: E731
        weight, hessian, samples.abs().amax(0), samples, GridFormat(BITS, SIZE), activation, **options
    )
    plain, found = search(), search(steps=KNOWN[scheme])
    assert not plain.descended
    assert found.descended
    assert found.error < plain.error
