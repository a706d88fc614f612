"""A tiny model as an ExecuTorch program, on an emulated ARM64 device, with the report that comes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporters import export
from runtime_tests import measure
from toolchain.quantize import quantize
from toolchain.recipe import parse_recipe

RECIPE = {
    "method": "rtn",
    "weights": {"bits": 4, "group_size": 32},
    "embedding": {"bits": 8, "group_size": None},
    "activations": {"scheme": "per_token"},
    "calibration": {"sequences": 4, "sequence_length": 64, "held_out_sequences": 2},
}


@pytest.mark.emulated
def test_what_pytorch_simulates_is_what_the_device_computes(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    """Scored in single tokens, and generated from a prompt that takes several calls, by our own attention."""
    quantize(str(tiny_model), tmp_path / "ckpt", recipe=parse_recipe(RECIPE, "test"), calibration=str(text_file))
    export(tmp_path / "ckpt", "executorch", tmp_path / "bundle", prefill_length=8, context_length=128)
    report = measure(tmp_path / "bundle", "arm64", tmp_path / "report", new_tokens=8, score_tokens=32, profile=True)
    summary = report.summary()
    assert summary["execution"] == "emulated"
    assert summary["kl_from_quantized"]["value"] < 1e-4
    assert summary["top1_with_quantized"]["value"] == 1.0
    assert summary["greedy_matching"] == {"matching": 8, "compared": 8}
    assert report.device.runtime is not None
    assert report.device.runtime.startswith("ExecuTorch 1.")
    assert report.device.attention == "boa-edge neon"
    assert {"libexecutorch.so", "boa-edge-runner-executorch"} <= report.device.programs.keys()
    assert report.profile is not None
    assert report.profile.execution == "emulated"
    calls = {entry.name: entry.calls for entry in report.profile.operators}
    steps = -(-report.settings.prompt_tokens // 8) + 7
    assert calls["llama::custom_sdpa"] == 2 * steps
    assert (tmp_path / "report" / report.profile.file).stat().st_size > 1000
    page = (tmp_path / "report" / "report.html").read_text()
    assert f'href="{report.profile.file}"' in page
    assert "boa-edge neon" in page
    assert "latency" not in page.lower().replace("never called latency", "")
