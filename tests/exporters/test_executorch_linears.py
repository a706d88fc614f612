"""What ExecuTorch computes with one linear is what its codes say, and the codes in the file are the checkpoint's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from executorch.kernels import quantized  # noqa: F401 (registers kernels)
from executorch.runtime import Runtime
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from exporters.executorch.constants import Constants, bfloat16_bits, pack_int4
from exporters.executorch.delegate import Delegate
from exporters.executorch.placeholder import placeholder
from exporters.executorch.program import write_program
from tests.exporters.conftest import round_to_nearest
from toolchain.activations import matmul_per_token
from toolchain.quantized import QuantizedWeight, code_range

ROWS, COLUMNS = 24, 64


class Linears(nn.Module):
    """x float32 [1, S, in] -> the outputs of one delegate."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = widths

    def forward(self, x: Tensor) -> list[Tensor]:
        return placeholder([x], 0, [0] * len(self.widths), self.widths)


def run(path: Path, weights: Sequence[QuantizedWeight], x: Tensor) -> list[Tensor]:
    """The runtime's outputs for x [S, in], of one delegate with all these linears."""
    constants = Constants()
    d = Delegate(constants)
    q = d.quantize(d.input((1, *x.shape)))
    for weight in weights:
        d.output(d.quantized_linear(q, weight))
    module = Linears([weight.shape[0] for weight in weights])
    write_program(module, (x[None],), None, [d.serialize()], constants, path)
    program = Runtime.get().load_program(path)
    return [y[0].clone() for y in program.load_method("forward").execute((x[None],))]


def weight(bits: int, group_size: int | None, seed: int = 0) -> QuantizedWeight:
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    return round_to_nearest(values, bits, group_size, symmetric=True)


FORMATS = [(4, 32), (4, 64), (4, None), (3, 32), (2, None), (8, None)]


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_output(bits: int, group_size: int | None, tmp_path: Path) -> None:
    """The delegate computes what the simulation says, to the last bits; rows of zeros and of outliers included."""
    held = weight(bits, group_size)
    x = torch.randn(9, COLUMNS, generator=torch.Generator().manual_seed(1))
    x[3], x[4, 5], x[5] = 0, 300, x[5].abs()
    (found,) = run(tmp_path / "model.pte", [held], x)
    expected = matmul_per_token(x, held)
    exact = group_size is None
    torch.testing.assert_close(
        found, expected, rtol=0 if exact else 1e-6, atol=0 if exact else 2e-6 * expected.abs().max()
    )


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_codes(bits: int, group_size: int | None, tmp_path: Path) -> None:
    """With one column at a time the outputs are the weights: divided by their scales, the checkpoint's codes; and the
    codes stand in the file as they are."""
    held = weight(bits, group_size)
    low, high = code_range(bits)
    held.codes[0, :4] = torch.tensor([low, high, 0, -1])
    path = tmp_path / "model.pte"
    (columns,) = run(path, [held], torch.eye(COLUMNS))
    scales = held.scales.repeat_interleave(COLUMNS // held.scales.shape[1], 1)
    torch.testing.assert_close(columns.T / scales, held.codes.float(), rtol=0, atol=1e-3)
    stored = held.codes.numpy() if bits == 8 else pack_int4(held.codes)
    assert stored.tobytes() in path.read_bytes()
    stored_scales = held.scales.numpy() if group_size is None else bfloat16_bits(held.scales)
    assert stored_scales.tobytes() in path.read_bytes()


@pytest.mark.parametrize("group_size", [32, None])
def test_equal_codes_with_other_scales(group_size: int | None, tmp_path: Path) -> None:
    """ExecuTorch's own lowering lets the second of two such linears compute with the scales of the first."""
    first = weight(4, group_size)
    second = QuantizedWeight(first.codes, first.scales * 4, None, 4, group_size)
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1))
    one, other = run(tmp_path / "model.pte", [first, second], x)
    assert torch.equal(4 * one, other)
    (alone,) = run(tmp_path / "alone.pte", [second], x)
    assert torch.equal(alone, other)


def test_equal_linears_stand_once(tmp_path: Path) -> None:
    held = weight(4, 32)
    x = torch.randn(2, COLUMNS)
    run(tmp_path / "one.pte", [held], x)
    run(tmp_path / "two.pte", [held, held], x)
    assert (tmp_path / "two.pte").stat().st_size - (tmp_path / "one.pte").stat().st_size < held.codes.numel() // 2


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32))
def test_packing(rows: int, pairs: int, seed: int) -> None:
    codes = torch.randint(-8, 8, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_int4(codes)
    found = np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, 2 * pairs).astype(np.int8) - 8
    assert np.array_equal(found, codes.numpy())


def test_what_the_delegate_cannot_hold(tmp_path: Path) -> None:
    def write(held: QuantizedWeight) -> None:
        d = Delegate(Constants())
        d.quantized_linear(d.quantize(d.input((1, 2, COLUMNS))), held)

    values = torch.randn(ROWS, COLUMNS)
    with pytest.raises(ValueError, match="zero points"):
        write(round_to_nearest(values, 4, 32, symmetric=False))
    with pytest.raises(ValueError, match="8-bit weights in groups"):
        write(round_to_nearest(values, 8, 32, symmetric=True))
    held = weight(4, 32)
    with pytest.raises(ValueError, match="not representable in bfloat16"):
        write(QuantizedWeight(held.codes, held.scales * 1.001, None, 4, 32))
