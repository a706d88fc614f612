"""The laws of the metrics, and the metrics against plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime_tests import metrics


def logits(seed: int, rows: int = 7, columns: int = 11, scale: float = 4.0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(rows, columns)) * scale


def probabilities(row: Any) -> list[float]:
    weights = [math.exp(float(value)) for value in row]
    return [weight / sum(weights) for weight in weights]


@given(st.integers(0, 10**6), st.floats(0.01, 300))
def test_kl_of_a_distribution_from_itself_is_zero(seed: int, scale: float) -> None:
    p = logits(seed, scale=scale)
    assert metrics.mean_kl(p, p) == 0
    assert metrics.mean_kl(p, p + 17.0) == pytest.approx(0, abs=1e-12)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0.01, 300))
def test_kl_is_never_negative(first: int, second: int, scale: float) -> None:
    assert metrics.mean_kl(logits(first, scale=scale), logits(second, scale=scale)) >= 0


@given(st.integers(0, 10**6))
@settings(max_examples=30)
def test_metrics_equal_plain_loops(seed: int) -> None:
    p, q = logits(seed), logits(seed + 1)
    tokens = np.random.default_rng(seed).integers(0, p.shape[1], len(p))
    rows = list(zip(p.tolist(), q.tolist(), strict=True))
    pairs = [pair for x, y in rows for pair in zip(probabilities(x), probabilities(y), strict=True)]
    assert metrics.mean_kl(p, q) == pytest.approx(sum(a * math.log(a / b) for a, b in pairs) / len(p), rel=1e-9)
    nll = -sum(math.log(probabilities(p[i])[tokens[i + 1]]) for i in range(len(p) - 1)) / (len(p) - 1)
    assert metrics.perplexity(p, tokens) == pytest.approx(math.exp(nll), rel=1e-9)
    assert metrics.top1_agreement(p, q) == sum(x.index(max(x)) == y.index(max(y)) for x, y in rows) / len(p)
    assert metrics.max_logit_error(p, q) == max(abs(a - b) for x, y in rows for a, b in zip(x, y, strict=True))


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    tokens = np.arange(5)
    assert metrics.perplexity(np.zeros((5, 49)), tokens) == pytest.approx(49)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = logits(1, rows=50), logits(2, rows=50)
    tokens = np.random.default_rng(0).integers(0, 11, 50)
    whole = metrics.mean_kl(p, q), metrics.perplexity(p, tokens), metrics.max_logit_error(p, q)
    monkeypatch.setattr(metrics, "_CHUNK_BYTES", 8 * 11 * 3)
    assert (metrics.mean_kl(p, q), metrics.perplexity(p, tokens), metrics.max_logit_error(p, q)) == pytest.approx(
        whole, rel=1e-12
    )


def test_half_precision_is_computed_in_double() -> None:
    p = logits(4).astype(np.float16)
    assert metrics.mean_kl(p, p.astype(np.float64)) == 0


def test_perplexity_that_overflows_is_infinite() -> None:
    p = np.zeros((3, 2))
    p[:, 0] = 5000
    assert metrics.perplexity(p, np.array([1, 1, 1])) == math.inf


@pytest.mark.parametrize(
    ("first", "second"), [((3, 4), (3, 5)), ((3, 4), (2, 4)), ((0, 4), (0, 4)), ((3,), (3,)), ((2, 3, 4), (2, 3, 4))]
)
def test_shapes_that_do_not_fit(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    for function in (metrics.mean_kl, metrics.top1_agreement, metrics.max_logit_error):
        with pytest.raises(ValueError, match="logits"):
            function(np.zeros(first), np.zeros(second))


@pytest.mark.parametrize("tokens", [[1], [0, 1], [0, 1, 4], [0, 1, -1], [[0, 1, 2]]])
def test_tokens_that_do_not_fit(tokens: list[Any]) -> None:
    rows = 1 if tokens == [1] else 3
    with pytest.raises(ValueError, match="token"):
        metrics.perplexity(np.zeros((rows, 4)), np.array(tokens))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite(value: float) -> None:
    broken = np.zeros((3, 4))
    broken[1, 2] = value
    with pytest.raises(ValueError, match="finite"):
        metrics.mean_kl(broken, np.zeros((3, 4)))
