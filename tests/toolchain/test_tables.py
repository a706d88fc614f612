"""The embedding table and the head: what their rounding is to keep, and that the text enters through the codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_model, tiny_config
from toolchain.checkpoint import Checkpoint
from toolchain.entry import entry
from toolchain.loading import SourceModel, load_source
from toolchain.quantize import quantize
from toolchain.recipe import CalibrationSize, Recipe, parse_recipe
from toolchain.run import quantize_model
from toolchain.tables import SHARE, embedded_by, head_inputs, quantize_tables

SMALL = CalibrationSize(sequences=6, sequence_length=64, held_out_sequences=2)


def recipe(method: str, **embedding: Any) -> Recipe:
    weights = {"bits": 4, "group_size": 32, "symmetric": True}
    return parse_recipe({"method": method, "weights": weights, "embedding": embedding}, "test")


@pytest.fixture(scope="module")
def sequences() -> torch.Tensor:
    return torch.randint(0, 200, (8, 48), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], SourceModel]:
    def load(tied: bool) -> SourceModel:
        directory = tmp_path_factory.mktemp("tables")
        return load_source(str(make_model(directory / "model", tiny_config(tie_word_embeddings=tied))))

    return load


def test_the_heads_inputs_are_those_of_the_forward_pass(
    models: Callable[[bool], SourceModel], sequences: torch.Tensor
) -> None:
    source = models(True)
    with torch.inference_mode():
        inner: Any = source.model
        x = inner.model(sequences, use_cache=False).last_hidden_state.flatten(0, 1).double()
        found = head_inputs(source, sequences).double()
    expected = 2 * x.mT @ x / x.shape[0]
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.diagonal().mean()))


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, None), (8, None)])
@pytest.mark.parametrize("tied", [True, False])
def test_solved_tables_lose_less_than_rounded_ones_where_it_counts(
    models: Callable[[bool], SourceModel], sequences: torch.Tensor, tied: bool, bits: int, group_size: int | None
) -> None:
    source = models(tied)
    with torch.inference_mode():
        hessian = head_inputs(source, sequences)
        tables = {
            method: quantize_tables(source, recipe(method, bits=bits, group_size=group_size), text)
            for method, text in (("edge", sequences), ("gptq", sequences), ("rtn", None))
        }
    spec = source.spec
    name = spec.embedding if tied else spec.head
    assert set(tables["edge"]) == ({spec.embedding} if tied else {spec.embedding, spec.head})
    metric = hessian / hessian.diagonal().mean() + (SHARE if tied else 0) * torch.eye(hessian.shape[0])
    weight = source.model.get_parameter(f"{name}.weight").detach()

    def loss(method: str) -> float:
        change = tables[method][name].dequantize() - weight
        return float(((change @ metric) * change).sum())

    assert tables["edge"][name].bits == bits
    assert tables["edge"][name].group_size == group_size
    assert tables["edge"][name].zero_points is None
    assert max(loss("edge"), loss("gptq")) < loss("rtn")
    if bits < 8:  # from there on neither scales nor codes are searched for
        assert loss("edge") < loss("gptq")


def test_the_text_enters_through_the_codes_and_the_model_is_left_as_it_was(
    models: Callable[[bool], SourceModel], sequences: torch.Tensor
) -> None:
    source = models(True)
    before = {name: value.clone() for name, value in source.model.state_dict().items()}
    with torch.inference_mode():
        tables = quantize_tables(source, recipe("gptq", bits=4, group_size=32), sequences)
        _, embed = entry(source.model, sequences.shape[1])
        with embedded_by(source, tables):
            inside = embed(sequences)
        after = embed(sequences)
    assert torch.equal(inside, tables[source.spec.embedding].dequantize()[sequences])
    assert torch.equal(after, before[f"{source.spec.embedding}.weight"][sequences])
    assert all(torch.equal(value, before[name]) for name, value in source.model.state_dict().items())


def test_blocks_are_solved_on_the_text_that_the_coarse_table_lets_in(
    models: Callable[[bool], SourceModel], sequences: torch.Tensor
) -> None:
    source = models(True)
    coarse = quantize_model(source, recipe("gptq", bits=4, group_size=None), sequences)
    fine = quantize_model(source, recipe("gptq", bits=8, group_size=None), sequences)
    first = source.spec.layer_names[0].parts()["q"].module
    assert not torch.equal(coarse.weights[first].codes, fine.weights[first].codes)


def test_a_table_of_4_bits_is_stored_and_read_as_such(tmp_path: Path, text_file: Path) -> None:
    model = make_model(tmp_path / "model", tiny_config(tie_word_embeddings=True))
    chosen = recipe("gptq", bits=4, group_size=32).model_copy(update={"calibration": SMALL})
    quantize(str(model), tmp_path / "out", recipe=chosen, calibration=str(text_file))
    checkpoint = Checkpoint(tmp_path / "out")
    table = checkpoint.quantized(checkpoint.spec.embedding)
    assert (table.bits, table.group_size) == (4, 32)
    assert int(table.codes.min()) >= -8
    assert int(table.codes.max()) <= 7
    stored = checkpoint.tensor(f"{checkpoint.spec.embedding}.weight")
    assert torch.allclose(stored.float(), table.dequantize(), atol=1e-2)
