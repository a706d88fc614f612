"""An export holds one linear at a time (q, k and v together), however many layers there are."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exporters import export
from tests.exporters.conftest import Tiny
from toolchain import packing
from toolchain.checkpoint import Checkpoint
from toolchain.packing import pack, unpack
from toolchain.quantized import QuantizedWeight, code_range


@pytest.mark.parametrize("form", ["qdq", "fused", "fused-int8"])
def test_codes_are_let_go(
    form: str, make_tiny: Callable[..., Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_tiny(num_hidden_layers=6, tie_word_embeddings=False, group_size=None)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most, reads = 0, 0
    read = Checkpoint.quantized

    def counted(self: Checkpoint, module: str) -> QuantizedWeight:
        nonlocal most, reads
        weight = read(self, module)
        if module != self.spec.embedding:  # which is kept
            alive.add(weight.codes)
            most, reads = max(most, len(alive)), reads + 1
        return weight

    monkeypatch.setattr(Checkpoint, "quantized", counted)
    export(tiny.path, "onnx", tmp_path / "bundle", form=form)
    assert reads >= 6 * 7 + 1
    assert most <= 4  # q, k, v, and the one before them


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_unpacked_some_rows_at_a_time(bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_CODES_AT_ONCE", 200)
    low, high = code_range(bits)
    random = torch.Generator().manual_seed(bits)
    codes = torch.randint(low, high + 1, (11, 64), generator=random).to(torch.int8)
    zeros = None if symmetric else torch.randint(low, high + 1, (11, 2), generator=random).to(torch.int8)
    weight = QuantizedWeight(codes, torch.ones(11, 2), zeros, bits, 32)
    packed = pack(weight, torch.bfloat16)
    again = unpack(packed, bits, 32)
    assert torch.equal(again.codes, codes)
    assert zeros is None or torch.equal(again.zero_points, zeros)  # type: ignore[arg-type]
    for broken in (packed["weight_packed"][:-1], packed["weight_packed"][:, :-1]):
        with pytest.raises(ValueError, match="packed codes of shape"):
            unpack(packed | {"weight_packed": broken}, bits, 32)
