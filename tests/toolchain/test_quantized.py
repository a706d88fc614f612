"""The value type, its packing and the grids."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.grids import GridFormat, find_grid
from toolchain.packing import pack, unpack
from toolchain.quantized import QuantizedWeight, code_range
from toolchain.solvers import rtn
from toolchain.solvers.linear_algebra import inverse_factor


def random_weight(bits: int, rows: int, groups: int, size: int, symmetric: bool, seed: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    low, high = code_range(bits)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)

    scales = (0.01 + torch.rand(rows, groups, generator=generator)).bfloat16().float()
    zeros = None if symmetric else codes(rows, groups)
    return QuantizedWeight(codes(rows, groups * size), scales, zeros, bits, size if groups > 1 else None)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.integers(9, 20),  # the library cannot unpack zero points of fewer rows than fill one int32
    groups=st.integers(1, 4),
    size=st.sampled_from([4, 16, 20, 32]),
    symmetric=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_pack_then_unpack_is_the_identity(
    bits: int, rows: int, groups: int, size: int, symmetric: bool, seed: int
) -> None:
    weight = random_weight(bits, rows, groups, size, symmetric, seed)
    back = unpack(pack(weight, torch.bfloat16), bits, weight.group_size)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales)
    assert (back.zero_points is None) == symmetric
    if not symmetric:
        assert torch.equal(back.zero_points, weight.zero_points)


@pytest.mark.parametrize(("groups", "symmetric"), [(1, True), (1, False), (3, True), (3, False)])
def test_dequantize_means_what_compressed_tensors_means(groups: int, symmetric: bool) -> None:
    weight = random_weight(4, 5, groups, 16, symmetric, 0)
    strategy = "channel" if groups == 1 else "group"
    size = None if groups == 1 else 16
    arguments = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy=strategy, group_size=size)
    zeros = torch.zeros_like(weight.codes[:, :groups]) if symmetric else weight.zero_points
    theirs = dequantize(weight.codes, weight.scales, zeros, args=arguments)
    assert torch.equal(weight.dequantize(), theirs.float())


def test_packing_refuses_scales_that_the_dtype_cannot_hold() -> None:
    weight = random_weight(4, 2, 1, 16, True, 0)
    broken = QuantizedWeight(weight.codes, weight.scales + 1e-5, None, 4, None)
    with pytest.raises(ValueError, match="not exact"):
        pack(broken, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits must be one of"),
        ({"group_size": 7}, "does not divide"),
        ({"codes": torch.full((2, 16), 9, dtype=torch.int8)}, "codes leave"),
        ({"scales": torch.zeros(2, 1)}, "positive and finite"),
        ({"scales": torch.full((2, 1), float("nan"))}, "positive and finite"),
        ({"codes": torch.zeros(2, 16)}, "codes must be int8"),
        ({"zero_points": torch.zeros(2, 3, dtype=torch.int8)}, "zero_points must be"),
    ],
)
def test_an_impossible_weight_is_refused(change: dict[str, object], message: str) -> None:
    weight = random_weight(4, 2, 1, 16, True, 0)
    fields = {name: getattr(weight, name) for name in ("codes", "scales", "zero_points", "bits", "group_size")}
    with pytest.raises(ValueError, match=message):
        QuantizedWeight(**(fields | change))  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_each_search_lowers_its_own_score(bits: int, group_size: int | None, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(1, 6, 64, generator=generator) ** 3
    a = torch.randn(64, 200, generator=generator) * torch.logspace(-1, 1, 64)[:, None]
    hessian = (a @ a.mT / 200)[None]
    fmt = GridFormat(bits, group_size, symmetric, round_scales=True)
    costs = inverse_factor(hessian, 0.01, ordered=True).costs()

    def errors(search: str) -> tuple[float, float, float]:
        grid = find_grid(weight, fmt, search, hessian, costs)  # type: ignore[arg-type]
        assert torch.equal(grid.scales, grid.scales.bfloat16().float())
        size = 64 if group_size is None else group_size
        error = (grid.quantized(rtn.solve(weight, grid)).dequantize() - weight[0]).view(6, 64 // size, size)
        blocks = torch.stack(
            [hessian[0, g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(64 // size)]
        )
        compensated = float((error.square() * costs.view(64 // size, size)).sum())
        return float(error.square().sum()), float(torch.einsum("rgi,gij,rgj->", error, blocks, error)), compensated

    minmax, squared, hessian_search = errors("minmax"), errors("squared_error"), errors("hessian")
    compensated_search = errors("compensated")
    assert compensated_search[2] <= minmax[2] * (1 + 1e-5)
    assert squared[0] <= minmax[0] * (1 + 1e-5)
    assert hessian_search[1] <= minmax[1] * (1 + 1e-5)
    if bits <= 4:
        assert squared[0] < minmax[0]
        assert hessian_search[1] < minmax[1]
        assert compensated_search[2] < minmax[2]


def test_a_search_without_its_metric_is_refused() -> None:
    for search in ("hessian", "compensated"):
        with pytest.raises(ValueError, match=f"the {search} search needs"):
            find_grid(torch.ones(1, 2, 16), GridFormat(4), search)  # type: ignore[arg-type]


def test_an_all_zero_row_gets_a_usable_grid() -> None:
    for symmetric in (True, False):
        grid = find_grid(torch.zeros(1, 2, 16), GridFormat(4, None, symmetric), "squared_error")
        weight = grid.quantized(rtn.solve(torch.zeros(1, 2, 16), grid))
        assert torch.equal(weight.dequantize(), torch.zeros(2, 16))
