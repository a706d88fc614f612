"""Hadamard matrices of every size that models need, and the rotations made of them."""

from __future__ import annotations

import math

import pytest
import torch

from boa_edge.errors import UsageError
from toolchain.transforms.hadamard import factors, hadamard, random_rotation
from toolchain.transforms.product import times

SMALL = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 60, 64, 76, 80, 84, 96, 100, 104, 108, 128, 140, 148]
MODELS = {
    576: (36, 16),
    640: (20, 32),
    896: (28, 32),
    960: (60, 16),
    1152: (36, 32),
    1536: (12, 128),
    2048: (64, 32),
    2560: (20, 128),
    4864: (76, 64),
    5632: (44, 128),
    8192: (128, 64),
    8960: (140, 64),
    11008: (344, 32),
    14336: (28, 32, 16),
    18944: (148, 128),
}


@pytest.mark.parametrize("n", [*SMALL, 256, 344, 576, 640, 896, 1536])
def test_entries_are_signs_and_rows_are_orthogonal(n: int) -> None:
    matrix = hadamard(n)
    assert matrix.shape == (n, n)
    assert matrix.dtype == torch.float64
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.mT, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize(("n", "expected"), MODELS.items())
def test_large_sizes_have_small_factors(n: int, expected: tuple[int, ...]) -> None:
    """And their product keeps lengths, without ever being written out."""
    assert factors(n) == expected
    assert math.prod(expected) == n
    vectors = torch.randn(3, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixed = times(vectors, [hadamard(size) for size in expected])
    assert torch.allclose(mixed @ mixed.mT, n * vectors @ vectors.mT)


@pytest.mark.parametrize("n", [1, 2, 12, 96, 576, 1536])
def test_the_matrix_is_the_kronecker_product_of_its_factors(n: int) -> None:
    vectors = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(times(vectors, [hadamard(size) for size in factors(n)]), vectors @ hadamard(n))


def test_fewer_factors_mix_within_blocks() -> None:
    vectors = torch.randn(2, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = vectors @ torch.block_diag(*[hadamard(16)] * 3)
    assert torch.allclose(times(vectors, (hadamard(16),)), expected)
    assert times(vectors[:0], (hadamard(4), hadamard(4))).shape == (0, 48)


@pytest.mark.parametrize("n", [-4, 0, 3, 6, 22, 92, 100 + 2])
def test_a_size_that_cannot_be_built_is_refused(n: int) -> None:
    with pytest.raises(UsageError, match=f"no Hadamard matrix of size {n} can be built"):
        hadamard(n)


@pytest.mark.parametrize("n", [64, 576])
def test_a_rotation_is_orthogonal_and_its_seeds_choose_it(n: int) -> None:
    rotation = random_rotation(n, 3)
    assert torch.allclose(rotation @ rotation.mT, torch.eye(n, dtype=torch.float64), atol=1e-13)
    assert torch.equal(rotation, random_rotation(n, 3))
    assert not torch.equal(rotation, random_rotation(n, 4))
    assert not torch.equal(random_rotation(n, 3, 0), random_rotation(n, 3, 1))
    # The signs come first: not even the matrix's own rows stay in one channel.
    for row in (hadamard(n)[0], hadamard(n)[5]):
        assert float((rotation @ row).abs().amax()) < 0.35 * float(row.norm())


def test_the_signs_of_a_seed_never_change() -> None:
    """A record holds the seed alone."""
    signs = "".join("+" if value > 0 else "-" for value in random_rotation(16, 0)[0].tolist())
    assert signs == "+++-++-++-++++++"
