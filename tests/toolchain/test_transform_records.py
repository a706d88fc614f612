"""Records of transforms that rebuild a model; and what is refused: damaged records, and what does not go together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OPTConfig

from boa_edge.errors import BoaEdgeError, UsageError
from tests.conftest import byte_tokenizer
from tests.toolchain.transformed import (
    EVERYTHING,
    FAMILIES,
    assert_same_function,
    logits,
    smooth,
)
from toolchain.entry import decoder_layers
from toolchain.loading import SourceModel, load_source
from toolchain.transforms import (
    PAIRS,
    RotateDown,
    RotateResidual,
    RotateTable,
    RotateValues,
    Smooth,
    Transform,
    apply,
    from_record,
    install_runtime,
    refusal,
    to_record,
    transforms_of,
)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_a_record_rebuilds_what_the_model_computes_besides(
    source: Callable[[str], SourceModel], directory: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    before = source(family)
    transforms = EVERYTHING["smooth_first"](before.spec)
    after, _ = apply(before, transforms)
    document, tensors = to_record(transforms)
    document, tensors = json.loads(json.dumps(document)), load(save(tensors))
    rebuilt = from_record(document, tensors, after.spec)
    again = to_record(rebuilt)
    assert again[0] == document
    assert again[1].keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in again[1].items())
    # A fresh model of the class, with the transformed weights and nothing else.
    fresh = load_source(str(directory(family))).model.double()
    fresh.load_state_dict(after.model.state_dict())
    bare = logits(fresh)
    assert float((bare - logits(before.model)).abs().amax()) > 1e-3
    runtime = install_runtime(fresh, after.spec, rebuilt)
    assert_same_function(before.model, fresh)
    runtime.remove()
    runtime.remove()
    assert torch.equal(logits(fresh), bare)
    assert transforms_of(fresh) == ()


def test_an_opt_without_biases(directory: Callable[[str], Path], tmp_path: Path) -> None:
    base = json.loads((directory("opt") / "config.json").read_text())
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(OPTConfig(**{**base, "enable_bias": False}))
    for key, parameter in model.named_parameters():
        parameter.normal_(1.0 if "norm" in key and key.endswith("weight") else 0.0, 0.2)
    model.save_pretrained(tmp_path / "plain")
    byte_tokenizer().save_pretrained(tmp_path / "plain")
    before = load_source(str(tmp_path / "plain"))
    before.model.double()
    for mode in ("tied", "untied"):
        transforms: list[Transform] = [RotateResidual(1, mode), RotateValues(2), RotateDown()]  # type: ignore[arg-type]
        after, _ = apply(before, transforms)
        assert_same_function(before.model, after.model)
    plain = load_source(str(tmp_path / "plain"))
    plain.model.model.decoder.layers[1].final_layer_norm.weight[3] = 0.0
    with pytest.raises(BoaEdgeError, match=r"layers\.1\.final_layer_norm: a weight of zero stands beside a bias"):
        apply(plain, [RotateResidual(1)])


def test_a_scale_does_not_go_through_a_bent_activation(source: Callable[[str], SourceModel]) -> None:
    opt = source("opt")
    model = apply(opt, [])[0].model
    for block in decoder_layers(model):
        block.activation_fn = nn.GELU()
    before = replace(opt, model=model, spec=replace(opt.spec, activation="gelu"))
    assert [pair for pair in PAIRS if refusal(before.spec, pair)] == ["up_down"]
    after, notes = apply(before, [smooth(before.spec)])
    assert notes == [
        "smooth up_down: left out, no scale goes through the activation 'gelu', which stands between up and down"
    ]
    assert_same_function(before.model, after.model)


def test_what_does_not_go_together_is_refused(source: Callable[[str], SourceModel]) -> None:
    before = source("qwen2")
    spec = before.spec
    ones = torch.ones(spec.kv_heads, spec.head_dim, dtype=torch.float64)
    unpaired = ones.clone()
    unpaired[0, 1] = 2
    refused: dict[str, list[Transform]] = {
        "smooth up_down comes after r4": [RotateDown(), smooth(spec, "up_down")],
        "r1 comes twice": [RotateResidual(1), RotateResidual(2)],
        "r4 comes twice": [RotateDown(), RotateDown()],
        "rotate_table comes twice": [RotateTable(), RotateTable(1)],
        "r1 comes after rotate_table": [RotateTable(), RotateResidual(1)],
        "smooth: 0.q_k: RoPE turns channels a and a": [Smooth({(0, "q_k"): unpaired})],
        "smooth: 1.v_o: scales must be positive": [Smooth({(1, "v_o"): ones * 0})],
        "smooth: 1.v_o: scales of shape": [Smooth({(1, "v_o"): ones[0]})],
        "smooth: 2.v_o: there is no such pair": [Smooth({(2, "v_o"): ones})],
        "r4: block_size: blocks of 36 do not divide the 96": [RotateDown(36)],
        "r1: head: is 'loose'": [RotateResidual(1, "loose")],  # type: ignore[arg-type]
    }
    for message, transforms in refused.items():
        with pytest.raises(BoaEdgeError, match=message):
            apply(before, transforms)
    with pytest.raises(UsageError, match="no Hadamard matrix of size 92"):
        RotateResidual(1).check(replace(spec, hidden_size=92))
    after, _ = apply(before, [RotateDown()])
    with pytest.raises(BoaEdgeError, match="r4 comes twice"):
        apply(after, [RotateDown()])


def test_a_damaged_record_is_refused_by_name(source: Callable[[str], SourceModel]) -> None:
    spec = source("llama").spec
    document, tensors = to_record([smooth(spec, "v_o"), RotateResidual(1), RotateDown()])

    def changed(index: int, **fields: object) -> list[dict[str, object]]:
        return [entry | fields if i == index else entry for i, entry in enumerate(document)]

    def without(index: int, name: str) -> list[dict[str, object]]:
        return [{k: v for k, v in e.items() if i != index or k != name} for i, e in enumerate(document)]

    short = tensors | {"0.1.v_o": tensors["0.1.v_o"][:, :3]}
    cases: list[tuple[str, Any, dict[str, Tensor]]] = [
        (r"t\.json: is no list of transforms", {}, {}),
        (r"t\.json: \[0\]: is 3", [3], {}),
        (r"t\.json: \[1\]\.kind: is 'r9'\. Expected: smooth, r1, r2, r3, r4", changed(1, kind="r9"), tensors),
        (r"t\.json: \[1\]\.seed: is 'a'", changed(1, seed="a"), tensors),
        (r"t\.json: \[1\]\.seed: the field is missing", without(1, "seed"), tensors),
        (r"t\.json: \[1\]\.head: is 'loose'", changed(1, head="loose"), tensors),
        (r"t\.json: \[2\]\.extra: is a field that is not known", changed(2, extra=1), tensors),
        (r"t\.json: \[2\]\.block_size: is True", changed(2, block_size=True), tensors),
        (r"t\.json: \[2\]: r4: block_size: blocks of 36", changed(2, block_size=36), tensors),
        (r"t\.json: \[0\]\.scales: '1\.gate' is no pair", changed(0, scales=["1.gate"]), tensors),
        (r"t\.json: \[0\]\.scales: the tensor of '1\.v_o' is missing", document, {"0.0.v_o": tensors["0.0.v_o"]}),
        (r"t\.json: \[0\]: smooth: 1\.v_o: scales of shape \[2, 3\]\. Expected: \[2, 32\]", document, short),
        (r"t\.json: holds a tensor that no entry names: 7\.x", document, tensors | {"7.x": torch.ones(1)}),
        (r"t\.json: transforms: r4 comes twice", [*document, document[2]], tensors),
    ]
    for message, entries, held in cases:
        with pytest.raises(BoaEdgeError, match=message):
            from_record(entries, held, spec, "t.json")
    assert len(from_record(document, tensors, spec, "t.json")) == 3
