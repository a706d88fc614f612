"""The form fused-int8: the checkpoint's codes in products of int8 matrices, inputs with one scale per row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from boa_edge.errors import BoaEdgeError, UsageError
from boa_edge.files import write_json
from devices import GenerateRequest, open_device
from exporters import EXPORTERS, Bundle, Request, export
from exporters.onnx.graph import GraphBuilder
from exporters.onnx.integer import integer_linear, quantize_rows, store_integer
from exporters.onnx.session import OnnxDecoder, load, session_options
from exporters.onnx.weights import WeightFile
from tests.exporters.conftest import Tiny
from tests.exporters.test_fused import unpacked
from tests.exporters.test_genai import assert_same
from tests.exporters.test_graph import optimized
from tests.exporters.test_onnx_families import checkpoint_of
from toolchain.activations import per_block
from toolchain.quantize import quantize
from toolchain.quantized import QuantizedWeight
from toolchain.recipe import parse_recipe

MakeTiny = Callable[..., Tiny]
SMALL = {"sequences": 4, "sequence_length": 32, "held_out_sequences": 1}


def logits_with_int8_rows(model: nn.Module, modules: list[str], tokens: np.ndarray) -> np.ndarray:
    """The model's logits where `modules` take in int8 codes with one scale per row."""

    def rounded(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (x,) = inputs
        return (per_block.quantize(x, x.shape[-1], "x86").dequantize(),)

    handles = [model.get_submodule(name).register_forward_pre_hook(rounded) for name in modules]
    with torch.no_grad():
        found = model(torch.from_numpy(tokens)).logits.numpy()
    for handle in handles:
        handle.remove()
    return found


def stored_codes(bundle: Bundle) -> dict[str, np.ndarray]:
    """Every initializer of codes, as integers."""
    model = ir.load(bundle.model)
    return {
        name: value.const_value.numpy().astype(np.int64)
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and name.endswith(("weight_codes", "weight_zero_point"))
    }


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_kernels_and_logits(bits: int, symmetric: bool, make_tiny: MakeTiny, tmp_path: Path) -> None:
    tiny = make_tiny(bits=bits, group_size=None, symmetric=symmetric, attention_bias=True, mlp_bias=True)
    bundle = tiny.export(tmp_path / "bundle", "int8", "fused-int8")
    checkpoint, stored = tiny.checkpoint, stored_codes(bundle)
    middle = 128 if bits == 8 else 0
    for names in checkpoint.spec.layer_names:
        qkv = [names.q, names.k, names.v]
        for name, modules in (
            (names.q.replace("q_proj", "qkv_proj"), qkv),
            *((each, [each]) for each in (names.o, names.gate, names.up, names.down) if each is not None),
        ):
            weights = [checkpoint.quantized(module) for module in modules]
            codes = np.concatenate([weight.codes.numpy() for weight in weights])
            np.testing.assert_array_equal(stored[f"{name}.weight_codes"].T - middle, codes)
            if not symmetric:
                zeros = np.concatenate([weight.zero_points.numpy()[:, 0] for weight in weights])
                np.testing.assert_array_equal(stored[f"{name}.weight_zero_point"] - middle, zeros)
    head = checkpoint.quantized("lm_head").codes.numpy()
    np.testing.assert_array_equal(unpacked(stored["lm_head.weight_codes"].astype(np.uint8), 8, head.shape[1]), head)

    kinds = Counter(node.op_type for node in optimized(bundle, tmp_path / "optimized.onnx"))
    assert kinds["MatMulIntegerToFloat"] == 2 * 5
    assert kinds["MatMulNBits"] == 1
    assert kinds["QuantizeLinear"] == 2 * 4
    assert not kinds.keys() & {"MatMul", "Gemm", "DequantizeLinear", "FusedMatMul", "MatMulInteger"}
    # Codes are made 8 bits wide when the file is loaded, not at each call.
    assert (
        kinds["Cast"]
        == Counter(
            node.op_type
            for node in optimized(tiny.export(tmp_path / "fused", "int8", "fused"), tmp_path / "other.onnx")
        )["Cast"]
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_logits(bits: int, symmetric: bool, make_tiny: MakeTiny, tmp_path: Path) -> None:
    """One scale per row of inputs, at once and through the cache."""
    options: dict[str, Any] = {"attention_bias": True, "mlp_bias": True, "embedding_bits": None}
    tiny = make_tiny(bits=bits, group_size=None, symmetric=symmetric, **options)
    decoder = tiny.decoder(tmp_path / "bundle", "int8", "fused-int8")
    tokens = np.random.default_rng(0).integers(0, 96, (2, 30))
    model = tiny.model()
    expected = logits_with_int8_rows(model, list(tiny.checkpoint.spec.linear_inputs()), tokens)
    exact = logits_with_int8_rows(model, [], tokens)
    away = np.abs(expected - exact).mean()
    # Up to inputs here and there that lie on a tie.
    found = decoder.logits(tokens)
    assert np.abs(found - expected).mean() < 0.05 * away
    first, cache = decoder.step(tokens[:1, :20], decoder.empty_cache(1))
    second, _ = decoder.step(tokens[:1, 20:], cache)
    assert np.abs(np.concatenate([first, second], 1) - expected[:1]).mean() < 0.05 * away


@pytest.mark.parametrize("bits", [4, 8])
def test_no_sum_overflows(bits: int, tmp_path: Path) -> None:
    """All inputs and all codes at their largest, which pairs of products in 16 bits would not hold at 8 bits."""
    largest = (1 << (bits - 1)) - 1
    codes = torch.full((16, 64), largest, dtype=torch.int8)
    weight = QuantizedWeight(codes, torch.ones(16, 1), None, bits, None)
    with WeightFile(tmp_path / "model.onnx.data") as file:
        g = GraphBuilder(file, 23)
        x = g.input("x", ir.DataType.FLOAT, ["batch", "sequence", 64])
        y = integer_linear(g, quantize_rows(g, x, "/x"), "/y", store_integer(g, "y", [weight]), None)
        g.output(y, "y", ir.DataType.FLOAT, ["batch", "sequence", 16])
    g.save(tmp_path / "model.onnx", "test")
    session = load(tmp_path / "model.onnx", session_options({}, threads=1))
    inputs = np.stack([np.ones((3, 64)), -np.ones((3, 64)), np.zeros((3, 64))]).astype(np.float32)
    (found,) = session.run(None, {"x": inputs})
    for row, sign in zip(found, (1, -1, 0), strict=True):
        np.testing.assert_allclose(row, sign * 64 * largest, rtol=1e-6)


def test_memory_is_told_and_the_rest_stays(make_tiny: MakeTiny, tmp_path: Path) -> None:
    tiny = make_tiny(group_size=None)
    modules = tiny.checkpoint.spec.linear_inputs()
    result = export(tiny.path, "onnx", tmp_path / "bundle", form="fused-int8")
    assert result.quantized_linears == len(modules) + 1
    held = sum(tiny.checkpoint.quantized(name).codes.numel() for name in modules)
    told = f"{len(modules)} linears take {held / 1e6:.1f} MB in memory ({held / 2e6:.1f} MB in the file)"
    assert any(told in note for note in result.notes)
    spared = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    plan = {"schema_version": 1, "scheme": "per_block", "bits": 8, "group_sizes": dict.fromkeys(modules), "ranges": {}}
    write_json(tiny.path / "activations.json", {**plan, "kept": spared})
    export(tiny.path, "onnx", tmp_path / "some", form="fused-int8")
    model = onnx.load(str(tmp_path / "some" / "model.onnx"), load_external_data=False)
    floating = {node.name for node in model.graph.node if node.op_type == "MatMulNBits"}
    assert floating == {
        "/model/layers.0/mlp/down_proj/MatMulNBits",
        "/model/layers.1/self_attn/q_proj/MatMulNBits",
        "/lm_head/MatMulNBits",
    }


def test_runs_natively_and_in_the_official_client(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    document: dict[str, Any] = {"method": "rtn", "weights": {"bits": 8, "group_size": None}, "calibration": SMALL}
    quantize(str(tiny_model), tmp_path / "ckpt", recipe=parse_recipe(document, "test"), calibration=str(text_file))
    export(tmp_path / "ckpt", "onnx", tmp_path / "bundle", form="fused-int8")
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.runtime.form == "fused-int8"
    assert_same(bundle, "the official client", 40)
    prompt = (5, 17, 42, 3, 88)
    result = open_device("host").run(bundle.path, GenerateRequest(prompt, 12, warmup=0, repeats=1))
    wanted = OnnxDecoder.open(bundle, threads=1).greedy(prompt, 12)
    assert [event["id"] for event in result.events if event["event"] == "token"] == wanted


@pytest.mark.parametrize("family", ["gemma2", "opt", "phi3", "qwen3"])
def test_families(family: str, text_file: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"weights": {"bits": 8, "group_size": None}, "kv_cache": {"scheme": "per_head"}}
    checkpoint = checkpoint_of(family, tmp_path, text_file, **fields)
    export(checkpoint, "onnx", tmp_path / "bundle", form="fused-int8")
    decoder = OnnxDecoder.open(Bundle.open(tmp_path / "bundle"), threads=1)
    reference = load_file(checkpoint / "reference.safetensors")
    found, expected = decoder.logits(reference["tokens"][None])[0], reference["quantized_logits"]
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999


def test_refused_where_it_does_not_pay(make_tiny: MakeTiny, tmp_path: Path) -> None:
    grouped = make_tiny(group_size=32)
    with pytest.raises(BoaEdgeError, match=r"one scale per output channel.*--form fused"):
        export(grouped.path, "onnx", tmp_path / "bundle", form="fused-int8")
    plain = make_tiny(group_size=None, name="plain")
    with pytest.raises(BoaEdgeError, match=r"multiplies int8 inputs.*--activations int8"):
        export(plain.path, "onnx", tmp_path / "bundle", form="fused-int8", activations="float32")
    assert not (tmp_path / "bundle").exists()
    recipe = parse_recipe({"method": "rtn", "weights": {"bits": 4, "group_size": 32}}, "test")
    with pytest.raises(UsageError, match="one scale per output channel"):
        EXPORTERS["onnx"].foresee(recipe, None, Request("int8", "fused-int8"))
