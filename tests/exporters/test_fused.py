"""The fused form: the checkpoint's codes bit for bit, the logits of the other form, no kernel that is slow."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from boa_edge.errors import BoaEdgeError, UsageError
from boa_edge.files import write_json
from exporters import Bundle, export
from exporters.bundle import Form
from exporters.onnx.session import OnnxDecoder
from tests.exporters.conftest import Tiny
from tests.exporters.test_graph import initializers, optimized
from tests.exporters.test_logits import CASES, close
from toolchain.quantized import QuantizedWeight

MakeTiny = Callable[..., Tiny]


def unpacked(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Packed bytes, row by row -> the first `count` signed codes of each row; written apart from the exporter."""
    rows = packed.reshape(packed.shape[0], -1)
    spread = np.unpackbits(rows, axis=1, bitorder="little").reshape(rows.shape[0], -1, bits)
    unsigned = (spread.astype(np.int64) << np.arange(bits)).sum(-1)
    return (unsigned - (1 << (bits - 1)))[:, :count]


def assert_same_weight(stored: dict[str, np.ndarray], name: str, weights: list[QuantizedWeight], bits: int) -> None:
    codes = np.concatenate([weight.codes.numpy() for weight in weights])
    np.testing.assert_array_equal(unpacked(stored[f"{name}.weight_codes"], bits, codes.shape[1]), codes)
    scales = np.concatenate([weight.scales.numpy() for weight in weights])
    found = stored[f"{name}.weight_scale"]
    repeats = found.shape[1] // scales.shape[1]
    np.testing.assert_array_equal(found, np.repeat(scales, repeats, 1))
    assert (f"{name}.weight_zero_point" in stored) == (weights[0].zero_points is not None)
    if weights[0].zero_points is not None:
        zeros = np.concatenate([weight.zero_points.numpy() for weight in weights if weight.zero_points is not None])
        found = unpacked(stored[f"{name}.weight_zero_point"], bits, zeros.shape[1] * repeats)
        np.testing.assert_array_equal(found, np.repeat(zeros, repeats, 1))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 16, 32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_and_kernels(
    bits: int, group_size: int | None, symmetric: bool, make_tiny: MakeTiny, tmp_path: Path
) -> None:
    tiny = make_tiny(
        bits=bits, group_size=group_size, symmetric=symmetric, embedding_symmetric=symmetric, attention_bias=True
    )
    bundle = tiny.export(tmp_path / "bundle", "int8", "fused")
    checkpoint, stored = tiny.checkpoint, initializers(bundle)
    carried = 4 if bits == 3 or (bits == 2 and group_size == 16) else bits
    for names in checkpoint.spec.layer_names:
        qkv = [checkpoint.quantized(name) for name in (names.q, names.k, names.v)]
        assert_same_weight(stored, names.q.replace("q_proj", "qkv_proj"), qkv, carried)
        for name in (names.o, names.gate, names.up, names.down):
            assert name is not None
            assert_same_weight(stored, name, [checkpoint.quantized(name)], carried)
    for name in ("lm_head", "model.embed_tokens"):
        assert_same_weight(stored, name, [checkpoint.quantized(name)], 8)

    nodes = optimized(bundle, tmp_path / "optimized.onnx")
    kinds = Counter(node.op_type for node in nodes)
    assert kinds["MatMulNBits"] == 2 * 5 + 1
    assert kinds["GroupQueryAttention"] == 2
    assert kinds["SkipSimplifiedLayerNormalization"] == 4
    assert kinds["GatherBlockQuantized"] == 1
    assert not kinds.keys() & {"MatMul", "FusedMatMul", "Gemm", "DequantizeLinear", "Cos", "Range", "RotaryEmbedding"}
    told = json.loads((bundle.path / "kernels.json").read_text())
    assert told == {"schema_version": 1, "kernels": dict(sorted(kinds.items())), "float_products": []}
    for node in nodes:
        each = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "MatMulNBits":
            assert each["accuracy_level"] == 4
            assert each["bits"] != 2 or each["block_size"] in (32, 64, 128)


@pytest.mark.parametrize("case", CASES)
def test_equals_pytorch_and_the_other_form(case: str, make_tiny: MakeTiny, tmp_path: Path) -> None:
    tiny = make_tiny(**CASES[case])
    decoder = tiny.decoder(tmp_path / "fused", "float32", "fused")
    other = tiny.decoder(tmp_path / "qdq", "float32", "qdq")
    tokens = np.random.default_rng(0).integers(0, 96, (2, 40))
    with torch.no_grad():
        expected = tiny.model()(torch.from_numpy(tokens)).logits.numpy()
    close(decoder.logits(tokens), expected)
    close(decoder.logits(tokens), other.logits(tokens))

    # Through the cache, as it grows: at batch 1 in chunks, at batch 2 token by token.
    for rows, parts in ((1, ((0, 7), (7, 20))), (2, ((0, 20),))):
        cache = decoder.empty_cache(rows)
        found = []
        for start, end in (*parts, *((i, i + 1) for i in range(20, 40))):
            logits, cache = decoder.step(tokens[:rows, start:end], cache)
            found.append(logits)
        close(np.concatenate(found, axis=1), expected[:rows])
        assert cache["past_key_values.1.key"].shape == (rows, decoder.kv_heads, 40, decoder.head_dim)
    assert decoder.greedy([5, 17, 42], 24) == other.greedy([5, 17, 42], 24)


def test_logits_of_the_last_position_unless_more_are_asked_for(make_tiny: MakeTiny, tmp_path: Path) -> None:
    decoder = make_tiny().decoder(tmp_path / "bundle", "int8", "fused")
    tokens = np.arange(9)[None]
    every, _ = decoder.step(tokens, decoder.empty_cache(1))
    last, _ = decoder.step(tokens, decoder.empty_cache(1), last_only=True)
    assert every.shape == (1, 9, 96)
    assert last.shape == (1, 1, 96)
    np.testing.assert_allclose(last[0, 0], every[0, -1], atol=1e-5)
    outputs = {output.name: output.shape for output in decoder.session.get_outputs()}
    assert outputs["logits"] == ["batch", 1, 96]
    assert outputs["all_logits"] == ["batch", "positions", 96]
    feed = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), **decoder.empty_cache(1)}
    (rest,) = decoder.session.run(["all_logits"], {**feed, "logits_start": np.asarray([-2])})
    np.testing.assert_allclose(rest[0], every[0, -2:], atol=1e-5)
    (nothing,) = decoder.session.run(["all_logits"], feed)
    assert nothing.shape == (1, 0, 96)


def test_a_buffer_longer_than_the_text_gives_the_same(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Past and present in one buffer, as the runner and onnxruntime-genai hand them over."""
    decoder = make_tiny().decoder(tmp_path / "bundle", "float32", "fused")
    tokens = np.random.default_rng(3).integers(0, 96, (1, 30))
    expected = decoder.logits(tokens)
    noise = np.random.default_rng(4).normal(size=(1, 2, 50, 16)).astype(np.float32)
    buffers = {name: onnxruntime.OrtValue.ortvalue_from_numpy(noise.copy()) for name in decoder.empty_cache(1)}
    for start, end in ((0, 20), (20, 25), *((i, i + 1) for i in range(25, 30))):
        binding = decoder.session.io_binding()
        binding.bind_cpu_input("input_ids", tokens[:, start:end].copy())
        binding.bind_cpu_input("attention_mask", np.ones((1, end), np.int64))
        for name, value in buffers.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        binding.bind_output("logits")
        decoder.session.run_with_iobinding(binding)
        close(binding.get_outputs()[-1].numpy()[0, 0], expected[0, end - 1])


@pytest.mark.parametrize(("tied", "bits"), [(True, 4), (True, 2), (False, 4), (False, 8)])
def test_a_table_in_few_bits_is_a_smaller_file(tied: bool, bits: int, make_tiny: MakeTiny, tmp_path: Path) -> None:
    tiny = make_tiny(tie_word_embeddings=tied, embedding_bits=bits, embedding_symmetric=False, vocab_size=512)
    bundle = tiny.export(tmp_path / "bundle", "int8", "fused")
    stored = initializers(bundle)
    for name in ("lm_head", "model.embed_tokens"):
        assert_same_weight(stored, name, [tiny.checkpoint.quantized(name)], bits)
    model = onnx.load(str(bundle.model), load_external_data=False)
    places = {
        tensor.name: [entry.value for entry in tensor.external_data if entry.key == "offset"]
        for tensor in model.graph.initializer
    }
    for part in ("weight_codes", "weight_scale", "weight_zero_point"):
        assert (places[f"lm_head.{part}"] == places[f"model.embed_tokens.{part}"]) == tied
    eight = make_tiny(tie_word_embeddings=tied, embedding_bits=8, vocab_size=512, name="eight-bits")
    export(eight.path, "onnx", tmp_path / "eight", form="fused")
    if bits < 8:
        saved = (2 - tied) * 512 * 64 * (8 - bits) // 8 * 0.7  # (zero points and padding take some)
        size = (tmp_path / "eight" / "model.onnx.data").stat().st_size
        assert size - (bundle.path / "model.onnx.data").stat().st_size > saved
    decoder = OnnxDecoder.open(bundle, threads=1)
    tokens = np.arange(20)[None]
    with torch.no_grad():
        expected = tiny.model()(torch.from_numpy(tokens)).logits.numpy()
    assert np.corrcoef(decoder.logits(tokens).ravel(), expected.ravel())[0, 1] > 0.98


def test_a_width_that_blocks_do_not_divide(make_tiny: MakeTiny, tmp_path: Path) -> None:
    shape = {"hidden_size": 40, "intermediate_size": 72, "num_attention_heads": 4, "head_dim": 16}
    for tied in (True, False):
        tiny = make_tiny(group_size=None, embedding_bits=4, tie_word_embeddings=tied, name=f"{tied}", **shape)
        fused = tiny.decoder(tmp_path / f"fused-{tied}", "float32", "fused")
        tokens = np.arange(20)[None]
        with torch.no_grad():
            close(fused.logits(tokens), tiny.model()(torch.from_numpy(tokens)).logits.numpy())


MIXED_QKV = {"model.layers.0.self_attn.k_proj": 8}


@pytest.mark.parametrize(
    "changes", [{"module_bits": MIXED_QKV}, {"float_modules": ("model.layers.0.self_attn.v_proj",)}], ids=str
)
def test_projections_of_different_kinds_stay_apart(
    changes: dict[str, Any], make_tiny: MakeTiny, tmp_path: Path
) -> None:
    tiny = make_tiny(attention_bias=True, **changes)
    bundle = tiny.export(tmp_path / "bundle", "int8", "fused")
    names = {node.name for node in onnx.load(str(bundle.model), load_external_data=False).graph.node}
    assert "/model/layers.0/self_attn/q_proj/MatMulNBits" in names
    assert "/model/layers.1/self_attn/qkv_proj/MatMulNBits" in names
    tokens = np.arange(20)[None]
    with torch.no_grad():
        expected = tiny.model()(torch.from_numpy(tokens)).logits.numpy()
    close(tiny.decoder(tmp_path / "float", "float32", "fused").logits(tokens), expected)


def test_spared_linears_compute_in_float32(make_tiny: MakeTiny, tmp_path: Path) -> None:
    spared = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj", "lm_head"]
    tiny = make_tiny(embedding_bits=4)
    sizes = dict.fromkeys([*tiny.checkpoint.spec.linear_inputs(), "lm_head"], 32)
    plan = {"schema_version": 1, "scheme": "per_block", "bits": 8, "group_sizes": sizes, "ranges": {}}
    write_json(tiny.path / "activations.json", {**plan, "kept": spared})
    bundle = tiny.export(tmp_path / "some", "int8", "fused")
    levels = {
        node.name: next(each.i for each in node.attribute if each.name == "accuracy_level")
        for node in onnx.load(str(bundle.model), load_external_data=False).graph.node
        if node.op_type == "MatMulNBits"
    }
    precise = {name for name, level in levels.items() if level == 1}
    assert precise == {
        "/model/layers.0/mlp/down_proj/MatMulNBits",
        "/model/layers.1/self_attn/q_proj/MatMulNBits",
        "/lm_head/MatMulNBits",
    }
    assert set(levels.values()) == {1, 4}
    tokens = np.arange(20)[None]
    some = OnnxDecoder.open(bundle, threads=1).logits(tokens)
    close(tiny.decoder(tmp_path / "qdq", "int8", "qdq").logits(tokens), some)
    write_json(tiny.path / "activations.json", {**plan, "kept": list(sizes)})
    every = tiny.decoder(tmp_path / "every", "int8", "fused").logits(tokens)
    with torch.no_grad():
        close(every, tiny.model()(torch.from_numpy(tokens)).logits.numpy())
    assert np.abs(every - some).max() > 1e-4 * np.abs(every).max()


@pytest.mark.parametrize("form", ["qdq", "fused"])
def test_what_becomes_of_schemes_that_are_not_the_runtimes(form: Form, make_tiny: MakeTiny, tmp_path: Path) -> None:
    tiny = make_tiny()
    modules = tiny.checkpoint.spec.linear_inputs()
    plan = {
        "schema_version": 1,
        "scheme": "static_int8",
        "bits": 8,
        "group_sizes": dict.fromkeys(modules, 32),
        "kept": [],
        "ranges": {module: [-1.0, 1.0] for module in modules},
    }
    write_json(tiny.path / "activations.json", plan)
    if form == "fused":
        with pytest.raises(BoaEdgeError, match=r"static_int8.*no kernel.*--form qdq"):
            export(tiny.path, "onnx", tmp_path / "bundle", form=form)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    export(tiny.path, "onnx", tmp_path / "bundle", form=form, activations="float32")
    write_json(tiny.path / "activations.json", {**plan, "scheme": "per_token", "ranges": {}})
    result = export(tiny.path, "onnx", tmp_path / "other", form=form)
    assert any("per_token" in note and "per block" in note for note in result.notes)
    assert "mlas.disable_kleidiai" in Bundle.open(tmp_path / "other").runtime.session_config
    write_json(tiny.path / "activations.json", {**plan, "scheme": "per_row", "ranges": {}})
    result = export(tiny.path, "onnx", tmp_path / "rows", form=form)
    assert any("KleidiAI" in note for note in result.notes)
    assert "mlas.disable_kleidiai" not in Bundle.open(tmp_path / "rows").runtime.session_config


def test_forms_by_name(make_tiny: MakeTiny, tmp_path: Path) -> None:
    tiny = make_tiny(num_hidden_layers=1)
    with pytest.raises(UsageError, match=r"onnx has no form 'fussed'.*Known: qdq, fused"):
        export(tiny.path, "onnx", tmp_path / "bundle", form="fussed")
    default = export(tiny.path, "onnx", tmp_path / "default")
    assert default.form == default.as_dict()["form"] == Bundle.open(tmp_path / "default").runtime.form == "qdq"
    assert not (tmp_path / "default" / "genai_config.json").exists()
    export(tiny.path, "onnx", tmp_path / "fused", form="fused")
    bundle = Bundle.open(tmp_path / "fused")
    assert bundle.runtime.form == "fused"
    assert bundle.runtime.session_config == {"mlas.disable_kleidiai": "1"}
    assert bundle.manifest.files["genai_config.json"].role == "runtime"
    document = json.loads((bundle.path / "genai_config.json").read_text())
    assert document["model"]["eos_token_id"] == [2, 3]
    assert document["model"]["decoder"]["session_options"]["mlas.disable_kleidiai"] == "1"


def test_padding_is_refused(make_tiny: MakeTiny, tmp_path: Path) -> None:
    decoder = make_tiny().decoder(tmp_path / "bundle", "int8", "fused")
    with pytest.raises(ValueError, match="no padding"):
        decoder.step(np.ones((1, 3), np.int64), decoder.empty_cache(1), np.asarray([[0, 1, 1]]))


def test_valid_onnx(make_tiny: MakeTiny, tmp_path: Path) -> None:
    bundle = make_tiny(attention_bias=True).export(tmp_path / "bundle", "int8", "fused")
    onnx.checker.check_model(str(bundle.model), full_check=True)
    model = onnx.load(str(bundle.model), load_external_data=False)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert {node.domain for node in model.graph.node} == {"", "com.microsoft"}
    required = {value.name for value in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
    assert required == {"input_ids", "attention_mask"} | {
        f"past_key_values.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")
    }
