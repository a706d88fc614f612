"""The strength of smoothing is searched for: on the errors of the product itself, and never to its harm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from toolchain.grids import GridFormat
from toolchain.loading import SourceModel
from toolchain.transforms import Smooth, scale_shape, value_sharing
from toolchain.transforms.smooth_search import _LARGEST_SCALE as LARGEST_SCALE
from toolchain.transforms.smooth_search import Smoothing, search_smoothing, smoothing_scales


def rounded_per_token(x: Tensor) -> Tensor:
    """To the nearest of 255 levels, symmetric, one scale per token."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / scale) * scale


def _pair(columns: int = 64) -> tuple[Tensor, Tensor]:
    """A weight [48, columns] and inputs [200, columns] of which three channels are far larger."""
    generator = torch.Generator().manual_seed(3)
    samples = torch.randn(200, columns, generator=generator, dtype=torch.float64)
    samples[:, [3, 17, 40]] *= 60.0
    return torch.randn(48, columns, generator=generator, dtype=torch.float64), samples


def _search(weight: Tensor, samples: Tensor, **options: Any) -> Smoothing:
    hessian = 2 * samples.mT @ samples / len(samples)
    fmt = GridFormat(4, group_size=16, round_scales=False)
    return search_smoothing(weight, hessian, samples.abs().amax(0), samples, fmt, rounded_per_token, **options)


@pytest.mark.parametrize("powers_of_two", [True, False])
def test_the_search_takes_the_least_error_of_weights_and_activations(powers_of_two: bool) -> None:
    weight, samples = _pair()
    options = {"powers_of_two": powers_of_two}
    chosen, none = _search(weight, samples, **options), _search(weight, samples, strengths=())
    assert none.strength is None
    assert torch.equal(none.scales, torch.ones(64, dtype=torch.float64))
    single = [_search(weight, samples, strengths=(step / 10,), **options).error for step in range(11)]
    assert chosen.error == min(none.error, *single)
    assert chosen.error < 0.8 * none.error
    assert torch.equal(chosen.scales.log2().round(), chosen.scales.log2()) == powers_of_two


def test_the_searchs_error_is_that_of_the_product() -> None:
    """Of weights alone exactly; of activations alone exactly."""
    weight, samples = _pair()
    found = _search(weight, samples, strengths=(0.5,), powers_of_two=False)
    assert found.strength == 0.5
    scaled, inputs = weight * found.scales, samples / found.scales
    grouped = scaled.view(48, 4, 16)
    step = grouped.abs().amax(-1, keepdim=True).float().double() / 7
    rounded = (torch.clamp(torch.round(grouped / step), -8, 7) * step).view(48, 64)
    per_token = (inputs @ (rounded - scaled).mT).square().sum() / 200
    assert found.weight_error == pytest.approx(float(per_token), rel=1e-4)
    moved = ((rounded_per_token(inputs) - inputs) @ scaled.mT).square().sum() / 200
    assert found.activation_error == pytest.approx(float(moved), rel=1e-12)


def test_without_anything_to_gain_nothing_is_smoothed() -> None:
    """The grid is hit by every weight, and activations are not rounded."""
    weight = torch.randint(-7, 8, (48, 64), generator=torch.Generator().manual_seed(0)).double()
    weight[:, ::16] = 7
    samples = _pair()[1]
    hessian, fmt = samples.mT @ samples, GridFormat(4, 16, round_scales=False)
    found = search_smoothing(weight, hessian, samples.abs().amax(0), samples, fmt, lambda x: x)
    assert found.strength is None
    assert found.error == pytest.approx(0.0, abs=1e-6)


def test_scales_follow_the_equation_and_are_shared(source: Callable[[str], SourceModel]) -> None:
    inputs, weights = torch.tensor([8.0, 2.0, 1.0, 4.0]), torch.tensor([1.0, 2.0, 0.5, 1.0])
    own = smoothing_scales(inputs, weights, torch.arange(4), 0.75, powers_of_two=False)
    expected = inputs.double() ** 0.75 / weights.double() ** 0.25
    assert torch.allclose(own, expected / expected.log().mean().exp())
    assert float(own.log2().mean()) == pytest.approx(0.0, abs=1e-12)
    shared = smoothing_scales(inputs, weights, torch.tensor([0, 0, 1, 1]), 0.75, powers_of_two=False)
    expected = torch.tensor([8.0, 4.0]).double() ** 0.75 / torch.tensor([2.0, 1.0]).double() ** 0.25
    assert torch.allclose(shared, expected / expected.log().mean().exp())
    wild = smoothing_scales(torch.tensor([1e30, 1.0]), torch.tensor([0.0, 1.0]), torch.arange(2), 0.5)
    assert wild.tolist() == [LARGEST_SCALE, 1 / LARGEST_SCALE]
    # One scale per channel of a key-value head is what `v_o` takes.
    spec = source("llama").spec
    sharing = value_sharing(spec)
    flat = torch.arange(spec.kv_heads * spec.head_dim).view(spec.kv_heads, spec.head_dim)
    assert torch.equal(sharing, flat.repeat_interleave(spec.heads // spec.kv_heads, 0).flatten())
    weight, samples = _pair(spec.heads * spec.head_dim)
    found = _search(weight, samples, shared=sharing)
    assert found.scales.shape == (spec.kv_heads * spec.head_dim,)
    scales = found.scales.view(scale_shape(spec, 0, "v_o"))
    Smooth({(0, "v_o"): scales}).check(spec)
    assert math.isfinite(found.error)
