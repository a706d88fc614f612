"""The whole pipeline: a tiny model down to emulated ARM64, and the real default model down to the host's runtime."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from exporters import export
from exporters.bundle import Bundle
from exporters.onnx.session import OnnxDecoder, session_options
from runtime_tests import measure
from toolchain.quantize import quantize
from toolchain.recipe import parse_recipe


@pytest.mark.emulated
def test_a_tiny_model_from_directory_to_an_emulated_arm64_report(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = parse_recipe(
        {
            "method": "boa",
            "weights": {"bits": 4, "group_size": 32},
            "calibration": {"sequences": 6, "sequence_length": 64, "held_out_sequences": 2},
        },
        "test",
    )
    quantize(str(tiny_model), tmp_path / "ckpt", recipe=recipe, calibration=str(text_file))
    export(tmp_path / "ckpt", "onnx", tmp_path / "bundle", activations="float32")
    report = measure(tmp_path / "bundle", "arm64", tmp_path / "report", new_tokens=8, score_tokens=32, profile=True)
    summary = report.summary()
    assert summary["execution"] == "emulated"
    # With float32 activations the emulated device computes what PyTorch computes from the same codes.
    assert summary["kl_from_quantized"]["value"] < 1e-6
    assert summary["top1_with_quantized"]["value"] == 1.0
    assert summary["greedy_matching"] == {"matching": 8, "compared": 8}
    page = (tmp_path / "report" / "report.html").read_text()
    assert report.profile is not None
    assert {"MatMulNBits", "Add"} <= {entry.name for entry in report.profile.operators}
    assert (tmp_path / "report" / report.profile.file).is_file()
    assert 'href="profile.json"' in page
    assert "--activations float32 --form qdq" in report.reproduce[1]
    assert report.reproduce[2].endswith("--profile -o REPORT")
    assert "latency" not in page.lower().replace("never called latency", "")
    assert json.loads((tmp_path / "report" / "report.json").read_text())["schema_version"] == 1


@pytest.mark.slow
def test_the_default_model_deploys_its_codes_and_its_greedy_tokens(tmp_path: Path, text_file: Path) -> None:
    recipe = parse_recipe(
        {
            "method": "rtn",
            "weights": {"bits": 4, "group_size": 32},
            "scale_search": "squared_error",
            "calibration": {"sequences": 1, "sequence_length": 128, "held_out_sequences": 1},
        },
        "test",
    )
    quantize("default", tmp_path / "ckpt", recipe=recipe, calibration=str(text_file))
    reference = load_file(tmp_path / "ckpt" / "reference.safetensors")
    prompt, greedy = reference["prompt"].tolist(), reference["quantized_greedy"].tolist()
    tokens = reference["tokens"][None].numpy()
    kernels = {}
    for activations in ("float32", "int8"):
        bundle_path = tmp_path / activations
        made = export(tmp_path / "ckpt", "onnx", bundle_path, activations=activations)  # type: ignore[arg-type]
        assert made.quantized_linears == 211  # seven in each of 30 blocks, and the head
        bundle = Bundle.open(bundle_path)
        decoder = OnnxDecoder.open(bundle, threads=2)
        logits = torch.from_numpy(decoder.logits(tokens)[0])
        scores, truth = logits.log_softmax(-1), reference["quantized_logits"].log_softmax(-1)
        kl = float((truth.exp() * (truth - scores)).sum(-1).mean())
        if activations == "float32":
            assert kl < 1e-5
            assert decoder.greedy(prompt, 32) == greedy
        else:
            assert kl < 0.05
        options = session_options(bundle.runtime.session_config)
        options.optimized_model_filepath = str(tmp_path / f"{activations}.onnx")
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{activations}.data"
        )
        onnxruntime.InferenceSession(str(bundle.model), options, providers=["CPUExecutionProvider"])
        kernels[activations] = operators(tmp_path / f"{activations}.onnx")
    # Every linear runs as a fused integer kernel; with float32 activations the runtime has none for the 8-bit head.
    assert kernels["int8"]["MatMulNBits"] == 211
    assert kernels["int8"].get("DequantizeLinear", 0) <= 1  # the embedding rows that were looked up
    assert kernels["float32"]["MatMulNBits"] == 210


def operators(path: Path) -> dict[str, int]:
    import onnx

    counts: dict[str, int] = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts
