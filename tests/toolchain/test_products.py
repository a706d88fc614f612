"""Float32 products by the faster way: still float32's error, and nothing is left switched on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from toolchain import products


@pytest.fixture(autouse=True)
def _ask_again() -> Iterator[None]:
    products._helps.cache_clear()
    yield
    products._helps.cache_clear()


def _switch() -> str:
    return str(products._ONEDNN.matmul.fp32_precision)


def _pretend(monkeypatch: pytest.MonkeyPatch, vendor: str, capability: str = "AVX512") -> None:
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)


def test_products_keep_the_error_of_float32() -> None:
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(300, 576, generator=generator), torch.randn(200, 576, generator=generator)
    exact = x.double() @ w.double().mT
    with products.fast_products():
        found = [torch.nn.functional.linear(x, w), x @ w.mT, torch.zeros(300, 200).addmm_(x, w.mT)]
        batched = x.view(3, 100, 576) @ w.mT
    for result in (*found, batched.view(300, 200)):
        assert float((result.double() - exact).norm() / exact.norm()) < 2e-6


def test_the_switch_is_put_back_after_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, "AuthenticAMD")
    monkeypatch.setattr(products, "_stays_float32", lambda: True)
    before = _switch()
    seen: list[str] = []

    @products.fast_products()
    def fails() -> None:
        seen.append(_switch())
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert seen == ["bf16"]
    assert _switch() == before


@pytest.mark.parametrize(
    ("vendor", "capability"), [("GenuineIntel", "AVX512"), ("AuthenticAMD", "AVX2"), ("", "AVX512")]
)
def test_it_stays_off_where_it_would_not_be_faster(
    monkeypatch: pytest.MonkeyPatch, vendor: str, capability: str
) -> None:
    _pretend(monkeypatch, vendor, capability)
    monkeypatch.setattr(products, "_stays_float32", lambda: True)
    before = _switch()
    with products.fast_products():
        assert _switch() == before


def test_it_stays_off_where_products_would_be_rounded_to_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, "AuthenticAMD")
    product = torch.Tensor.__matmul__

    def rounded(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if _switch() == "bf16" and left.dtype == torch.float32:
            return product(left.bfloat16(), right.bfloat16()).float()
        return product(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    before = _switch()
    with products.fast_products():
        assert _switch() == before
