"""Which of the written sequences are used: what is a loop, what an outlier, and which match the pool best."""

from __future__ import annotations

import pytest
import torch

from toolchain.calibration.filters import compression, distinct_share, in_band, is_loop
from toolchain.calibration.selection import HEAVIEST, LIGHTEST, mismatch, select
from toolchain.calibration.sketches import similarity

_PROSE = (
    "The river ran low that summer, and the ferryman, who had nothing to carry, mended his nets on the bank. "
    "Children came down from the village to ask whether the water would return; he told them that it always had."
)


def test_loops_are_told_from_prose() -> None:
    prose = list(_PROSE.encode())
    assert compression(_PROSE) < 3
    assert distinct_share(prose) > 0.8
    assert not is_loop(_PROSE, prose)
    assert is_loop("and so on " * 50, list(range(200)))  # deflates to nothing
    assert is_loop(_PROSE, [1, 2, 3] * 40)  # the same three tokens again and again
    assert not is_loop("ab", [5, 6])


def test_outliers_are_the_ends_of_the_fit_sequences() -> None:
    nll = torch.arange(40.0)
    fit = torch.ones(40, dtype=torch.bool)
    fit[20:] = False
    kept = in_band(nll, fit)
    assert kept.nonzero()[:, 0].tolist() == list(range(1, 19))
    assert not in_band(nll, torch.zeros(40, dtype=torch.bool)).any()
    assert bool(in_band(torch.ones(4), torch.ones(4, dtype=torch.bool)).all())


def _pool(size: int = 48, features: int = 60) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    topics = torch.randn(3, features, generator=generator)
    mixture = torch.rand(size, 3, generator=generator).square()
    values = 2 + mixture @ topics + 0.3 * torch.randn(size, features, generator=generator)
    return {"a/mean": values, "a/square": values.square(), "b/square": values.flip(1).square() * 100}


def test_similarity_is_the_distance_that_it_stands_for() -> None:
    pool = _pool()
    gram = similarity(pool)
    chosen, weights = torch.tensor([3, 7, 11]), torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    distance = size = 0.0
    for name, values in pool.items():
        rows = values.double()
        target = rows.mean(0)
        scale = pool["a/square"].double().mean(0).sum() if name == "a/mean" else target.square().sum()
        distance += float(((weights[:, None] * rows[chosen]).mean(0) - target).square().sum() / scale)
        size += float(target.square().sum() / scale)
    assert mismatch(gram, chosen, weights) == pytest.approx((distance / size) ** 0.5, rel=1e-6)


def test_selection_matches_the_pool_better_than_random_subsets() -> None:
    gram = similarity(_pool())
    selection = select(gram, 12)
    generator = torch.Generator().manual_seed(0)
    even = torch.ones(12, dtype=torch.float64)
    random = [mismatch(gram, torch.randperm(48, generator=generator)[:12], even) for _ in range(200)]
    unweighted = mismatch(gram, selection.chosen, even)
    assert selection.mismatch <= unweighted < min(random)
    assert selection.mismatch < 0.5 * sum(random) / len(random)
    assert len(set(selection.chosen.tolist())) == 12
    again = select(gram, 12)
    assert torch.equal(again.chosen, selection.chosen)
    assert torch.equal(again.weights, selection.weights)


def test_weights_stay_in_their_box_with_mean_one() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(30, 8, generator=generator).double()
    rows[0] *= 50  # the target leans on a sequence that no weight within bounds can replace
    for count in (1, 5, 29, 30):
        weights = select(rows @ rows.mT, count).weights
        assert float(weights.mean()) == pytest.approx(1, abs=1e-9)
        assert float(weights.min()) >= LIGHTEST - 1e-9
        assert float(weights.max()) <= HEAVIEST + 1e-9


def test_weights_are_the_best_within_their_box() -> None:
    gram = similarity(_pool())
    selection = select(gram, 12)
    generator = torch.Generator().manual_seed(2)
    for _ in range(100):
        noise = torch.randn(12, generator=generator).double() * 0.05
        other = (selection.weights + noise - noise.mean()).clamp(LIGHTEST, HEAVIEST)
        if abs(float(other.mean()) - 1) < 1e-9:
            assert mismatch(gram, selection.chosen, other) >= selection.mismatch - 1e-9


def test_equal_sequences_weigh_the_same() -> None:
    rows = torch.ones(6, 4, dtype=torch.float64)
    selection = select(rows @ rows.mT, 3)
    assert selection.weights.tolist() == [1, 1, 1]
    assert selection.mismatch == pytest.approx(0, abs=1e-6)
