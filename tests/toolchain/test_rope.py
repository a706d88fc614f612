"""The closed form of the RoPE mean against the rotations themselves, in float64."""

from __future__ import annotations

import pytest
import torch

from toolchain.statistics.rope import position_mean


@pytest.mark.parametrize(("hd", "positions", "theta"), [(6, 9, 100.0), (16, 33, 1e4), (64, 5, 1e5)])
def test_position_mean_equals_the_mean_of_rotated_covariances(hd: int, positions: int, theta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, hd, hd, generator=generator, dtype=torch.float64)
    covariance = a @ a.mT
    inv_freq = theta ** (-torch.arange(0, hd, 2, dtype=torch.float64) / hd)
    expected = torch.zeros_like(covariance)
    for position in range(positions):
        cos, sin = (torch.diag(f(position * inv_freq)) for f in (torch.cos, torch.sin))
        rotation = torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)], 0)
        expected += rotation.mT @ covariance @ rotation / positions
    assert torch.allclose(position_mean(covariance, inv_freq, positions), expected, atol=1e-12)
