"""Weights that are not what they should be: refused at loading where no result could be right, taken where one can."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from boa_edge.errors import BoaEdgeError
from toolchain.checkpoint import Checkpoint, stored_dtype
from toolchain.loading import hub, load_source
from toolchain.quantize import quantize
from toolchain.recipe import parse_recipe

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
Edit = Callable[[dict[str, Tensor]], None]


@pytest.fixture
def edited(tiny_model: Path, tmp_path: Path) -> Callable[[Edit], Path]:
    """A copy of the tiny model with other weights."""

    def make(edit: Edit) -> Path:
        copy = Path(shutil.copytree(tiny_model, tmp_path / "edited"))
        tensors = load_file(copy / "model.safetensors")
        edit(tensors)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return make


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", TABLE])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(
    edited: Callable[[Edit], Path], name: str, value: float, stream: bool
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name][3, 5] = value

    def read() -> None:
        load_source(str(edited(spoil)), stream).parameter(name)  # a streamed block is read when it is needed

    with pytest.raises(BoaEdgeError, match=f"{name} holds 1 values that are NaN or infinite"):
        read()


@pytest.mark.parametrize("stream", [False, True])
def test_a_second_head_is_refused_unless_it_is_the_table(edited: Callable[[Edit], Path], stream: bool) -> None:
    def add(factor: float) -> Edit:
        return lambda tensors: tensors.update({HEAD: tensors[TABLE] * factor})

    same = edited(add(1.0))
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        load_source(str(same), stream).model(tokens)
    shutil.rmtree(same)
    with pytest.raises(BoaEdgeError, match=r"config\.json: says tie_word_embeddings.*lm_head\.weight that differs"):
        load_source(str(edited(add(1.5))), stream)


def test_a_dead_head_and_one_of_low_rank_are_quantized(
    edited: Callable[[Edit], Path], text_file: Path, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)

    def switch_off(tensors: dict[str, Tensor]) -> None:
        output = tensors["model.layers.0.self_attn.o_proj.weight"]
        output[:, :32] = 0
        output[:, 64:96] = torch.randn(64, 6, generator=generator) @ torch.randn(6, 32, generator=generator)

    size = {"sequences": 8, "sequence_length": 64, "held_out_sequences": 2}
    document = {"method": "edge", "weights": {"bits": 4, "group_size": 32}, "calibration": size}
    recipe = parse_recipe(document, "test")
    result = quantize(str(edited(switch_off)), tmp_path / "out", recipe=recipe, calibration=str(text_file))
    assert 0 < result.rows[-1].kl < 0.1


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_floats_are_stored_in_the_models_own_type(tiny_model: Path, text_file: Path, tmp_path: Path, key: str) -> None:
    """`transformers` before version 5 called it `torch_dtype`."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "half"))
    tensors = {name: value.to(torch.bfloat16) for name, value in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    path = model / "config.json"
    config = json.loads(path.read_text())
    config.pop("dtype", None)
    path.write_text(json.dumps(config | {key: "bfloat16"}))
    recipe = parse_recipe({"method": "rtn", "weights": {"bits": 4}}, "test")
    quantize(str(model), tmp_path / "out", recipe=recipe, calibration=str(text_file))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.norm.weight"].dtype == stored[TABLE].dtype == torch.bfloat16
    assert Checkpoint(tmp_path / "out").config[key] == "bfloat16"
    assert stored_dtype({}) == torch.float32


@pytest.mark.parametrize(
    ("files", "whole"),
    [
        (("config.json",), False),
        (("config.json", "model.safetensors"), False),
        (("model.safetensors", "tokenizer.json"), True),
        (("model.safetensors.index.json", "one.safetensors", "tokenizer.json"), False),
        (("model.safetensors.index.json", "one.safetensors", "two.safetensors", "tokenizer.json"), True),
    ],
)
def test_a_model_of_which_the_cache_has_a_part_is_downloaded(
    files: tuple[str, ...], whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    for name in files:
        (tmp_path / name).write_text(json.dumps(index))
    asked: list[bool] = []

    def snapshot(repository: str, *, local_files_only: bool = False, **_: object) -> str:
        asked.append(local_files_only)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    assert hub.download("someone/model") == tmp_path
    assert asked == ([True] if whole else [True, False])
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    if not whole:
        with pytest.raises(BoaEdgeError, match="not in the cache, or not all of it"):
            hub.download("someone/model")


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BoaEdgeError, match=r"holds an adapter, not a model\. Merge it into its base model"):
        load_source(str(tmp_path))
