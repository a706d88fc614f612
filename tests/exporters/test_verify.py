"""A graph that computes anything but the checkpoint's codes never becomes a bundle; other errors are one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from boa_edge.errors import BoaEdgeError, UsageError
from boa_edge.files import write_json
from exporters import EXPORTERS, Bundle, Request, export
from exporters.bundle import Form
from exporters.onnx import qdq
from exporters.onnx.kernels import Carrier, carrier
from exporters.onnx.linears import StoredWeight, store
from exporters.onnx.session import OnnxDecoder, load, session_options
from exporters.reference import difference, reference_logits
from tests.exporters.conftest import Tiny
from tests.exporters.test_onnx_families import checkpoint_of
from toolchain.checkpoint import Checkpoint
from toolchain.quantized import QuantizedWeight
from toolchain.recipe import parse_recipe

MakeTiny = Callable[..., Tiny]
TWO_BITS: dict[str, Any] = {"bits": 2, "group_size": None, "num_hidden_layers": 1}


def opset_and_types(bundle: Bundle) -> tuple[int, set[int]]:
    model = onnx.load(str(bundle.model), load_external_data=False)
    codes = {each.data_type for each in model.graph.initializer if each.name.endswith("weight_codes")}
    return next(each.version for each in model.opset_import if each.domain == ""), codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [97, 98, 100])
def test_two_bits_where_rows_do_not_fill_bytes(size: int, symmetric: bool, make_tiny: MakeTiny, tmp_path: Path) -> None:
    """ONNX Runtime fuses INT2 wrongly there: carried in INT4, and said."""
    tiny = make_tiny(**TWO_BITS, symmetric=symmetric, intermediate_size=size)
    tokens = np.random.default_rng(0).integers(0, 96, (1, 20))
    with torch.no_grad():
        expected = tiny.model()(torch.from_numpy(tokens)).logits.numpy()
    result = export(tiny.path, "onnx", tmp_path / "qdq")
    bundle = Bundle.open(tmp_path / "qdq")
    stored = {each.name: each for each in onnx.load(str(bundle.model), load_external_data=False).graph.initializer}
    wide = onnx.TensorProto.INT4 if size % 4 else onnx.TensorProto.INT2
    for part, kind in (("gate_proj", wide), ("up_proj", wide), ("down_proj", onnx.TensorProto.INT2)):
        assert stored[f"model.layers.0.mlp.{part}.weight_codes"].data_type == kind
    assert any("some of the linears (2 of 7) are carried in 4 bits" in each for each in result.notes) == bool(size % 4)
    assert difference(OnnxDecoder.open(bundle, threads=1).logits(tokens), expected) < 0.1
    fused = tiny.decoder(tmp_path / "fused", "int8", "fused").logits(tokens)
    assert difference(fused, OnnxDecoder.open(bundle, threads=1).logits(tokens)) < 1e-4


def test_the_opset_is_that_of_the_codes(make_tiny: MakeTiny, tmp_path: Path) -> None:
    tiny, int2 = make_tiny(**TWO_BITS), onnx.TensorProto.INT2
    opset, types = opset_and_types(tiny.export(tmp_path / "two", "int8"))
    assert (opset, int2 in types) == (25, True)
    opset, types = opset_and_types(tiny.export(tmp_path / "float"))
    assert (opset, int2 in types) == (23, False)
    opset, types = opset_and_types(tiny.export(tmp_path / "fused", "int8", "fused"))
    assert (opset, int2 in types) == (23, False)


def test_a_kernel_that_is_wrong_is_found(make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime's own error for these shapes."""
    tiny = make_tiny(**TWO_BITS, intermediate_size=98)
    monkeypatch.setattr(qdq, "dequantized_carrier", lambda bits, size, rows, kind: carrier(bits, size, kind))
    with pytest.raises(BoaEdgeError, match=r"model\.onnx made of it: gives other logits.*int8 activations") as error:
        export(tiny.path, "onnx", tmp_path / "bundle")
    assert str(error.value).startswith(f"{tiny.path}: ")
    assert "partial" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_codes_in_the_wrong_place_are_found(
    activations: Any, make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turned(g: Any, module: str, weight: QuantizedWeight, chosen: Carrier) -> StoredWeight:
        codes = weight.codes.flip(0) if module.endswith("layers.0.mlp.gate_proj") else weight.codes
        return store(g, module, replace(weight, codes=codes), chosen)

    monkeypatch.setattr(qdq, "store", turned)
    with pytest.raises(BoaEdgeError, match=rf"gives other logits.*{activations} activations"):
        export(make_tiny().path, "onnx", tmp_path / "bundle", activations=activations)


@pytest.mark.parametrize("family", ["gemma2", "opt", "phi4", "qwen3"])
def test_the_reference_is_the_checkpoints(family: str, text_file: Path, tmp_path: Path) -> None:
    """What `quantize` has measured, with products, rounded inputs and an int8 cache."""
    fields = {"transforms": ["rotate", "rotatekeys", "rotatedown"], "kv_cache": {"scheme": "per_head"}}
    activations = {"scheme": "per_block", "budget": None}
    path = checkpoint_of(family, tmp_path, text_file, activations=activations, **fields)
    checkpoint = Checkpoint(path)
    reference = load_file(path / "reference.safetensors")
    found = reference_logits(checkpoint, reference["tokens"][None].numpy(), checkpoint.activations)
    assert difference(found[0], reference["quantized_logits"].numpy()) < 5e-3  # (ties)


def test_tensors_that_are_not_the_configurations(make_tiny: MakeTiny, tmp_path: Path) -> None:
    tiny = make_tiny(num_hidden_layers=1)
    tensors = load_file(tiny.path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:1].clone()
    save_file(tensors, tiny.path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BoaEdgeError, match=r"model\.safetensors: .*model\.norm\.weight.*\[1\].*\[64\]"):
        reference_logits(Checkpoint(tiny.path), np.asarray([[1, 2]]), None)
    with pytest.raises(BoaEdgeError):
        export(tiny.path, "onnx", tmp_path / "bundle")


@pytest.mark.parametrize("scheme", ["static_int8", "static_uint8"])
@pytest.mark.parametrize(
    "weights", [{"bits": 2}, {"bits": 2, "group_size": 32}, {"bits": 8}, {"bits": 8, "group_size": 32}], ids=str
)
def test_static_activations_at_every_width(
    weights: dict[str, Any], scheme: str, text_file: Path, tmp_path: Path
) -> None:
    weights = {"group_size": None} | weights
    fields = {"activations": {"scheme": scheme, "budget": None}, "weights": weights}
    recipe = parse_recipe({"method": "rtn", **fields}, "test")
    EXPORTERS["onnx"].foresee(recipe, None, Request("int8", "qdq"))
    checkpoint = checkpoint_of("llama", tmp_path, text_file, **fields)
    result = export(checkpoint, "onnx", tmp_path / "bundle", form="qdq")
    bundle = Bundle.open(tmp_path / "bundle")
    kernels = json.loads((bundle.path / "kernels.json").read_text())["kernels"]
    (note,) = [each for each in result.notes if each.startswith("activations are static")]
    integer = kernels.get("MatMulIntegerToFloat", 0)
    assert (f"{integer} of 14 linears as integers (MatMulIntegerToFloat)" in note) == (integer > 0)
    assert ("MatMulIntegerToFloat" in kernels) == (weights == {"bits": 8, "group_size": None})
    assert onnx.TensorProto.INT2 not in opset_and_types(bundle)[1]
    # What did not become a product of integers is said to be dequantized.
    which = "the linears" if integer == 0 else f"some of the linears ({14 - integer} of 14)"
    slow = [each for each in result.notes if each.startswith(f"{which}: codes behind static activations have no fast")]
    assert len(slow) == (integer < 14)
    held = Checkpoint(checkpoint)
    tokens = np.arange(12)[None]
    found = OnnxDecoder.open(bundle, threads=1).logits(tokens)
    assert difference(found, reference_logits(held, tokens, held.activations)) < 0.05


@pytest.mark.parametrize("form", ["qdq", "fused"])
def test_no_text_is_longer_than_the_context(form: Form, make_tiny: MakeTiny, tmp_path: Path) -> None:
    decoder = make_tiny(num_hidden_layers=1, max_position_embeddings=16).decoder(tmp_path / "bundle", "float32", form)
    assert decoder.logits(np.ones((1, 16), np.int64)).shape == (1, 16, 96)
    with pytest.raises(UsageError, match=r"model\.onnx: 17 tokens; the context holds 16.*--seq-len"):
        decoder.logits(np.ones((1, 17), np.int64))
    with pytest.raises(UsageError, match="17 tokens; the context holds 16"):
        decoder.greedy([1] * 15, 4)


@pytest.mark.parametrize("context", [1, 3])
@pytest.mark.parametrize("form", ["qdq", "fused"])
def test_a_context_shorter_than_the_check(context: int, form: Form, make_tiny: MakeTiny, tmp_path: Path) -> None:
    tiny = make_tiny(num_hidden_layers=1, max_position_embeddings=context)
    assert tiny.decoder(tmp_path / "bundle", "int8", form).logits(np.ones((1, context), np.int64)).shape[1] == context


def test_what_the_runtime_cannot_run_is_one_line(make_tiny: MakeTiny, tmp_path: Path) -> None:
    decoder = make_tiny(num_hidden_layers=1).decoder(tmp_path / "bundle")
    with pytest.raises(BoaEdgeError, match=r"model\.onnx: ONNX Runtime cannot run it \("):
        decoder.logits(np.asarray([[1, 96]]))
    with pytest.raises(BoaEdgeError, match=r"session_config: ONNX Runtime refuses the option"):
        session_options({"x" * 5000: "1"})


def test_an_untied_head_in_groups_goes_into_fused_int8(make_tiny: MakeTiny, tmp_path: Path) -> None:
    for tied in (True, False):
        tiny = make_tiny(
            group_size=None,
            embedding_group_size=32,
            tie_word_embeddings=tied,
            num_hidden_layers=1,
            name=f"checkpoint-{tied}",
        )
        bundle = tiny.export(tmp_path / f"bundle-{tied}", "int8", "fused-int8")
        kinds = {node.op_type for node in onnx.load(str(bundle.model), load_external_data=False).graph.node}
        assert {"MatMulIntegerToFloat", "MatMulNBits"} <= kinds
    odd = make_tiny(group_size=None, embedding_group_size=8, tie_word_embeddings=False, name="odd")
    with pytest.raises(BoaEdgeError, match=r"config\.json: the head: groups of 8"):
        export(odd.path, "onnx", tmp_path / "bundle", form="fused-int8")


def test_notes_say_which_figures_no_longer_hold(make_tiny: MakeTiny, tmp_path: Path) -> None:
    tiny = make_tiny(group_size=None, tie_word_embeddings=False, num_hidden_layers=1)
    sizes = dict.fromkeys(tiny.checkpoint.spec.linear_inputs())
    plan = {"schema_version": 1, "scheme": "per_block", "bits": 8, "group_sizes": sizes, "kept": [], "ranges": {}}
    write_json(tiny.path / "activations.json", plan)

    def notes(**options: Any) -> list[str]:
        return list(export(tiny.path, "onnx", tmp_path / "bundle", overwrite=True, **options).notes)

    assert not [each for each in notes(form="fused") if "recorded" in each]
    kept = notes(form="fused", activations="float32")
    assert any("int8 activations (per_block)" in each and "--activations int8 keeps them" in each for each in kept)
    # The head's product alone: rows of the table are dequantized as they are looked up.
    (slow,) = [each for each in kept if "at each call" in each]
    assert slow.startswith("the head: 8-bit codes")
    assert any("scale per row, so its figures differ" in each for each in notes(form="fused-int8"))


def test_the_settings_are_the_graphs(make_tiny: MakeTiny, tmp_path: Path) -> None:
    bundle = make_tiny(num_hidden_layers=1).export(tmp_path / "bundle")
    session = load(bundle.model, session_options(bundle.runtime.session_config, threads=1))
    for field, value in (("layers", 2), ("form", "fused"), ("kv_heads", 3), ("head_dim", 8), ("vocab_size", 95)):
        wrong = bundle.runtime.model_copy(update={field: value})
        with pytest.raises(BoaEdgeError, match=rf"runtime\.json: {field} is '?{value}'?, but model\.onnx has"):
            OnnxDecoder(session, wrong, bundle.model)
