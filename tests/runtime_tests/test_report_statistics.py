"""Nearest-rank percentiles against their definition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime_tests.statistics import percentile, rate, samples_needed


@given(
    st.lists(st.integers(0, 10**12), min_size=1, max_size=250),
    st.sampled_from([1, 25, 50, 75, 90, 95, 99, 99.9]),
)
def test_percentile_is_the_smallest_sample_that_covers_its_share(samples: list[int], percent: float) -> None:
    value = percentile(samples, percent)
    if len(samples) < samples_needed(percent):
        assert value is None
        return
    covering = [s for s in samples if sum(other <= s for other in samples) * 100 >= percent * len(samples) - 1e-9]
    assert value == min(covering)


@pytest.mark.parametrize(("percent", "needed"), [(50, 1), (90, 10), (95, 20), (99, 100), (99.9, 1000)])
def test_no_percentile_from_fewer_samples_than_it_needs(percent: float, needed: int) -> None:
    assert samples_needed(percent) == needed
    assert percentile(list(range(needed - 1)), percent) is None
    assert percentile(list(range(needed)), percent) is not None


def test_textbook_example() -> None:
    samples = [15, 20, 35, 40, 50]
    assert percentile(samples, 30) == 20
    assert percentile(samples, 40) == 20
    assert percentile(samples, 50) == 35
    assert percentile(list(range(1, 101)), 99) == 99


@pytest.mark.parametrize("percent", [0, 100, -1])
def test_percent_out_of_range(percent: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 100"):
        percentile([1], percent)


def test_rate() -> None:
    assert rate(31, 2_000_000_000) == 15.5
    assert rate(31, 0) is None
