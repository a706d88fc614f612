"""Blocks on an accelerator: everything that is worked on is there, nothing else is, and the codes are the processor's.

There is no GPU in CI. The device of `pretended` computes on the processor but refuses to mix; solvers take the tensor
forms that a GPU takes. With the processor made to take them too, both do the same arithmetic, so codes are equal.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from boa_edge.errors import UsageError
from tests.toolchain.families import make
from tests.toolchain.pretended import DEVICE, NAME, Pretending, There
from toolchain.accelerator import CPU, find_accelerator, moved
from toolchain.loading import SourceModel, load_source
from toolchain.prepare import prepare
from toolchain.quantize import quantize
from toolchain.recipe import Recipe, parse_recipe
from toolchain.run import QuantizedModel, quantize_model
from toolchain.solvers import boa, gptq
from toolchain.spill import Spill

# Grouped queries; norms on heads; capped scores, norms behind the sublayers; fused projections, half of a head turned;
# no RoPE, biases.
_FAMILIES = ("llama", "qwen3", "gemma2", "phi3", "opt")


@pytest.fixture
def _tensor_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor solves as an accelerator does."""
    monkeypatch.setattr(boa, "solve", boa.solve_in_tiles)
    monkeypatch.setattr(gptq, "compiled_block", gptq.tensor_block)


def _recipe(method: str, **fields: Any) -> Recipe:
    document = {
        "method": method,
        "weights": {"bits": 3, "group_size": 32, "symmetric": True},
        "embedding": None,
        "calibration": {"sequences": 8, "sequence_length": 24, "held_out_sequences": 1},
        **fields,
    }
    return parse_recipe(document, "test")


def _tokens(source: SourceModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(2, source.spec.vocab_size, (8, 24), generator=generator)


def _on(keep: Spill, source: SourceModel, recipe: Recipe, **arguments: Any) -> QuantizedModel:
    with nullcontext() if keep.place == CPU else Pretending():
        return quantize_model(source, recipe, _tokens(source), keep=keep, **arguments)


def _same(source: SourceModel, recipe: Recipe, spill: Path | None = None, **arguments: Any) -> None:
    expected, found = (_on(Spill(spill, place), source, recipe, **arguments) for place in (CPU, DEVICE))
    assert expected.weights.keys() == found.weights.keys()
    for name, weight in expected.weights.items():
        other = found.weights[name]
        assert not isinstance(other.codes, There)
        assert torch.equal(weight.codes, other.codes), name
        assert torch.equal(weight.scales, other.scales), name
    for name, report in expected.layers.items():
        loss = found.layers[name]["loss"]
        assert report["loss"] == (None if loss is None else pytest.approx(loss, rel=1e-6)), name
    assert not any(isinstance(parameter, There) for parameter in source.model.parameters())


@pytest.mark.usefixtures("_tensor_forms")
@pytest.mark.parametrize("family", _FAMILIES)
def test_every_kind_of_block_gets_the_same_codes(family: str, tmp_path: Path) -> None:
    _same(load_source(str(make(tmp_path / "model", family))), _recipe("edge"))


_METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq"},
    "turboboa": {"method": "turboboa", "weights": {"bits": 2, "group_size": None, "symmetric": False}},
    "aespa": {"method": "aespa", "solver": {"attention_rows": "aespa", "rounding_iterations": 5}},
    "rtn": {"method": "rtn"},
    "mixed bits": {"method": "edge", "weights": {"bits": "auto", "budget_mb": 0.11, "group_size": 32}},
}


@pytest.mark.usefixtures("_tensor_forms")
@pytest.mark.parametrize("method", list(_METHODS))
def test_every_method_gets_the_same_codes(method: str, tiny_model: Path) -> None:
    _same(load_source(str(tiny_model)), _recipe(**_METHODS[method]))


@pytest.mark.usefixtures("_tensor_forms")
@pytest.mark.parametrize("stream", [False, True])
def test_int8_activations_and_cache_spilled_and_streamed(stream: bool, tiny_model: Path, tmp_path: Path) -> None:
    recipe = _recipe(
        "edge", activations={"bits": 8}, transforms=["smooth", "rotate"], kv_cache={"bits": 8, "scheme": "per_head"}
    )
    prepared = prepare(load_source(str(tiny_model), stream), recipe, _tokens(load_source(str(tiny_model))))
    _same(
        prepared.source,
        recipe,
        activations=prepared.activations,
        cache=prepared.cache,
        spill=tmp_path / "spilled" if stream else None,
    )


@pytest.mark.usefixtures("_tensor_forms")
def test_weighted_sequences(tiny_model: Path) -> None:
    weights = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
    _same(load_source(str(tiny_model)), _recipe("edge"), sequence_weights=weights)


def test_a_module_computes_there_and_keeps_its_own_parameters() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    before = dict(module.named_parameters()) | dict(module.named_buffers())
    x = torch.randn(3, 4)
    with Pretending(), torch.inference_mode():
        with moved(module, DEVICE):
            assert {each.device.type for each in module.state_dict().values()} == {NAME}
            with pytest.raises(RuntimeError, match="together"):
                module(x)
            there = module(x.to(DEVICE)).cpu()
        torch.testing.assert_close(there, module(x))
    after = dict(module.named_parameters()) | dict(module.named_buffers())
    assert all(before[name] is value for name, value in after.items())


def test_the_pretended_device_refuses_what_a_gpu_refuses() -> None:
    with Pretending():
        there = torch.zeros(3).to(DEVICE)
        with pytest.raises(RuntimeError, match="together"):
            there + torch.ones(3)
        with pytest.raises(TypeError, match="copy it"):
            there.numpy()
        there += 1.0
        assert there.cpu().tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "xpu"])
def test_an_accelerator_that_is_not_there(name: str) -> None:
    if torch.get_device_module(name.partition(":")[0]).is_available():
        pytest.skip(f"this machine has {name}")
    with pytest.raises(UsageError, match=f"sees 0 devices of the kind {name.partition(':')[0]}"):
        find_accelerator(name)


@pytest.mark.parametrize("name", ["mps", "gpu", "cuda:x", "meta"])
def test_a_name_that_is_no_accelerator(name: str) -> None:
    with pytest.raises(UsageError, match=r"--accelerator.*Accepted: cpu, cuda"):
        find_accelerator(name)


def test_it_is_refused_before_any_work(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has cuda")
    with pytest.raises(UsageError, match="sees 0 devices"):
        quantize(str(tiny_model), tmp_path / "out", calibration=str(text_file), accelerator="cuda")
    assert not (tmp_path / "out").exists()
