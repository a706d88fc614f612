"""What stands in the file: the checkpoint's codes bit for bit, in a graph that ONNX Runtime runs with fast kernels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from boa_edge.errors import BoaEdgeError
from boa_edge.files import write_json
from exporters import Bundle, export
from exporters.onnx.kernels import FUSED_GROUPS
from exporters.onnx.session import OnnxDecoder, load, session_options
from exporters.onnx.weights import pack_codes
from tests.exporters.conftest import Tiny
from toolchain.activations import ActivationFormat, static
from toolchain.activations.plan import ActivationPlan
from toolchain.fake_quantized import FakeQuantized
from toolchain.quantized import QuantizedWeight

STANDARD = {"", "ai.onnx"}


def initializers(bundle: Bundle) -> dict[str, np.ndarray]:
    model = onnx.load(str(bundle.model))
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def grid(values: np.ndarray) -> np.ndarray:
    """Stored scales or zero points -> [out, groups]."""
    return values.reshape(-1, values.shape[-1]).astype(np.float32).T


def assert_same_weight(stored: dict[str, np.ndarray], module: str, weight: QuantizedWeight) -> None:
    codes = stored[f"{module}.weight_codes"]
    columns = weight.shape[1]
    np.testing.assert_array_equal(codes.reshape(columns, -1).astype(np.int8).T, weight.codes.numpy())
    np.testing.assert_array_equal(grid(stored[f"{module}.weight_scale"]), weight.scales.numpy())
    assert (f"{module}.weight_zero_point" in stored) == (weight.zero_points is not None)
    if weight.zero_points is not None:
        np.testing.assert_array_equal(grid(stored[f"{module}.weight_zero_point"]), weight.zero_points.numpy())


def optimized(bundle: Bundle, path: Path) -> list[onnx.NodeProto]:
    """The nodes that ONNX Runtime really runs."""
    options = session_options(bundle.runtime.session_config, threads=1)
    options.optimized_model_filepath = str(path)
    load(bundle.model, options)
    return list(onnx.load(str(path), load_external_data=False).graph.node)


@pytest.mark.parametrize("activations", ["int8", "float32"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 16, 32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_and_kernels(
    bits: int, group_size: int | None, symmetric: bool, activations: str, make_tiny: Callable[..., Tiny], tmp_path: Path
) -> None:
    tiny = make_tiny(bits=bits, group_size=group_size, symmetric=symmetric, num_hidden_layers=1)
    bundle = tiny.export(tmp_path / "bundle", activations)  # type: ignore[arg-type]
    checkpoint = tiny.checkpoint
    stored = initializers(bundle)
    modules = checkpoint.spec.layer_names[0].linears()
    for module in (*modules, "lm_head"):
        assert_same_weight(stored, module, checkpoint.quantized(module))

    nodes = optimized(bundle, tmp_path / "optimized.onnx")
    kinds = Counter(node.op_type for node in nodes)
    attributes = [
        {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        for node in nodes
        if node.op_type == "MatMulNBits"
    ]
    unfused = (activations == "float32") * (1 + 7 * (bits == 8))
    assert kinds["MatMulNBits"] == 8 - unfused
    assert kinds["MatMul"] == unfused
    told = json.loads((bundle.path / "kernels.json").read_text())
    assert told["float_products"] == sorted(node.name for node in nodes if node.op_type == "MatMul")
    assert kinds["DequantizeLinear"] == 1 + unfused  # one for the rows of the embedding table
    assert kinds["FusedMatMul"] == kinds["Gemm"] == 0
    assert {each["accuracy_level"] for each in attributes} <= {4 if activations == "int8" else 1}
    for each in attributes:
        # What has no packed kernel in the runtime, and would run some 40 times slower.
        assert each["bits"] == 4 or activations == "int8"
        assert each["bits"] != 2 or each["block_size"] in (32, 64, 128)


def test_tied_table_is_stored_once(make_tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    bundle = make_tiny().export(tmp_path / "bundle", "int8")
    model = onnx.load(str(bundle.model), load_external_data=False)
    places = {
        tensor.name: tuple((entry.key, entry.value) for entry in tensor.external_data)
        for tensor in model.graph.initializer
        if tensor.external_data
    }
    for part in ("weight_codes", "weight_scale"):
        assert places[f"lm_head.{part}"] == places[f"model.embed_tokens.{part}"]
    assert len(set(places.values())) == len(places) - 2


@pytest.mark.parametrize(("tied", "embedding_bits"), [(True, 8), (False, 8), (False, 4), (True, None), (False, None)])
def test_no_float_copy_of_the_table(
    tied: bool, embedding_bits: int | None, make_tiny: Callable[..., Tiny], tmp_path: Path
) -> None:
    tiny = make_tiny(tie_word_embeddings=tied, embedding_bits=embedding_bits, num_hidden_layers=1)
    bundle = tiny.export(tmp_path / "bundle", "int8")
    kinds = Counter(node.op_type for node in optimized(bundle, tmp_path / "optimized.onnx"))
    assert kinds["MatMulNBits"] == 7 + (embedding_bits is not None)
    assert kinds["MatMul"] + kinds["FusedMatMul"] == (embedding_bits is None)
    if not tied and embedding_bits is not None:
        stored = initializers(bundle)
        np.testing.assert_array_equal(
            stored["model.embed_tokens.weight_codes"], tiny.checkpoint.quantized("model.embed_tokens").codes.numpy()
        )


@pytest.mark.parametrize("bits", [2, 4])
def test_valid_standard_onnx(bits: int, make_tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    bundle = make_tiny(bits=bits, attention_bias=True).export(tmp_path / "bundle", "int8")
    onnx.checker.check_model(str(bundle.model), full_check=True)
    model = onnx.load(str(bundle.model), load_external_data=False)
    assert {entry.domain for entry in model.opset_import} <= STANDARD
    assert {node.domain for node in model.graph.node} <= STANDARD
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert "/model/layers.0/self_attn/q_proj/MatMul" in names

    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    known = {value.name for value in (*inferred.value_info, *inferred.output)}
    assert {output for node in model.graph.node for output in node.output} <= known

    def dims(value: onnx.ValueInfoProto) -> list[int | str]:
        return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

    inputs = {value.name: dims(value) for value in model.graph.input}
    outputs = {value.name: dims(value) for value in model.graph.output}
    assert inputs["input_ids"] == inputs["position_ids"] == ["batch", "sequence"]
    assert inputs["past_key_values.1.key"] == ["batch", 2, "past", 16]
    assert outputs["logits"] == ["batch", "sequence", 96]
    assert outputs["present.1.value"][:2] == ["batch", 2]
    assert set(inputs) == {"input_ids", "attention_mask", "position_ids"} | {
        f"past_key_values.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")
    }


def test_three_bits_say_that_the_file_is_not_smaller(make_tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    tiny = make_tiny(bits=3)
    result = export(tiny.path, "onnx", tmp_path / "bundle")
    assert any("3-bit" in note and "not smaller" in note for note in result.notes)
    assert result.quantized_linears == 15
    four = export(make_tiny(bits=4, name="four").path, "onnx", tmp_path / "bundle4")
    assert [note for note in four.notes if "floating-point activations" not in note] == []
    kept = export(tiny.path, "onnx", tmp_path / "float", activations="float32")
    for made, unplanned in ((four, True), (kept, False)):
        assert any("quantized for floating-point activations" in note for note in made.notes) == unplanned
    assert four.weight_bytes == result.weight_bytes
    two = export(make_tiny(bits=2, name="two").path, "onnx", tmp_path / "bundle2")
    assert two.weight_bytes < four.weight_bytes


@pytest.mark.parametrize("group_size", [8, 48, 192, 512])
def test_refused_group_sizes(group_size: int, make_tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    width = {8: 64, 48: 96, 192: 192, 512: 512}[group_size]
    tiny = make_tiny(
        group_size=group_size, hidden_size=width, intermediate_size=width, head_dim=width // 4, num_hidden_layers=1
    )
    with pytest.raises(BoaEdgeError, match=rf"groups of {group_size}.*16, 32, 64, 128, 256.*output channel"):
        export(tiny.path, "onnx", tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert group_size not in FUSED_GROUPS


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [1, 3, 8, 15])
def test_packing(bits: int, size: int) -> None:
    low = -(1 << (bits - 1))
    codes = np.random.default_rng(size).integers(low, -low, size).astype(np.int8)
    packed = pack_codes(codes, bits)
    assert packed.size == -(-size * bits // 8)
    unsigned = [int(packed[i * bits // 8]) >> (i * bits % 8) & ((1 << bits) - 1) for i in range(size)]
    assert [value - (1 << bits) * (value >> (bits - 1)) for value in unsigned] == codes.tolist()


@pytest.mark.parametrize("scheme", ["static_int8", "static_uint8"])
def test_static_activations_stand_as_pairs_of_standard_operators(
    scheme: str, make_tiny: Callable[..., Tiny], tmp_path: Path
) -> None:
    tiny = make_tiny(bits=4, group_size=32)
    spec = tiny.checkpoint.spec
    modules, spared = spec.linear_inputs(), spec.layer_names[0].down
    ranges = {module: (-1.0 - index // 7, 2.0) for index, module in enumerate(modules)}
    plan = ActivationPlan(ActivationFormat(scheme), dict.fromkeys(modules, 32), frozenset({spared}), ranges)
    write_json(tiny.path / "activations.json", plan.to_document())
    result = export(tiny.path, "onnx", tmp_path / "bundle")
    assert any(scheme in note and "NPUs" in note for note in result.notes)
    bundle = Bundle.open(tmp_path / "bundle")
    model = onnx.load(str(bundle.model))
    assert {node.domain for node in model.graph.node} <= STANDARD
    stored = initializers(bundle)
    pairs = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    # Of each layer the inputs of q, k and v, of o, of gate and up, and of down, but for the one that is spared.
    assert len(pairs) == 4 * spec.layers - 1
    for node in pairs:
        layer = int(node.name.split("layers.")[1].partition("/")[0])
        expected = static.grid(*ranges[spec.layer_names[layer].q], signed=scheme == "static_int8")
        assert float(stored[node.input[1]]) == expected.scale
        assert int(stored[node.input[2]]) == expected.zero_point
    logits = OnnxDecoder.open(bundle, threads=1).logits(np.arange(24)[None] % spec.vocab_size)
    with torch.no_grad():
        fake = FakeQuantized(tiny.model(), spec, {}, plan).logits(torch.arange(24)[None] % spec.vocab_size).numpy()
    assert np.abs(logits - fake).mean() < 2e-4 * fake.std()
