"""The native runner and the fused form: the cache in shared buffers, the logits of the last position or of all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from boa_edge.errors import BoaEdgeError
from boa_edge.files import sha256_file
from devices import GenerateRequest, ScoreRequest, open_device
from exporters import Bundle, export
from exporters.onnx.session import OnnxDecoder
from tests.exporters.conftest import Tiny
from tests.toolchain.test_w4a8 import RECIPES, quantized

DEVICES = ["host", pytest.param("arm64", marks=pytest.mark.emulated)]
PROMPT = (5, 17, 42, 3, 88)


@pytest.mark.parametrize("name", DEVICES)
def test_generates_and_scores(name: str, make_tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    bundle = make_tiny().export(tmp_path / "bundle", "float32", "fused")
    decoder = OnnxDecoder.open(bundle, threads=1)
    wanted = decoder.greedy(PROMPT, 20)
    assert len(set(wanted)) > 3
    result = open_device(name).run(bundle.path, GenerateRequest(PROMPT, 20, warmup=1, repeats=2))
    for run in range(3):  # the buffers still hold the run before
        assert [e["id"] for e in result.events if e["event"] == "token" and e["run"] == run] == wanted
    assert result.command[result.command.index("--form") + 1] == "fused"
    scored = open_device(name).run(bundle.path, ScoreRequest(PROMPT))
    assert scored.logits is not None
    np.testing.assert_allclose(scored.logits, decoder.logits(np.asarray([PROMPT]))[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("form", "wrong"), [("qdq", "fused"), ("fused", "qdq")])
def test_a_form_that_the_graph_has_not(form: str, wrong: str, make_tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    export(make_tiny(num_hidden_layers=1).path, "onnx", tmp_path / "bundle", form=form)
    path = tmp_path / "bundle" / "runtime.json"
    document = json.loads(path.read_text())
    assert document["form"] == form
    for value, said in ((wrong, "position_ids|logits"), ("other", "'form' is \"other\"; it must be qdq or fused")):
        path.write_text(json.dumps(document | {"form": value}))
        with pytest.raises(BoaEdgeError, match=said):
            open_device("host").run(tmp_path / "bundle", ScoreRequest(PROMPT))
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    manifest["files"]["runtime.json"] = {
        "size": path.stat().st_size,
        "sha256": sha256_file(path),
        "role": "runtime",
    }
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BoaEdgeError, match=r"runtime.json: form: "):
        Bundle.open(tmp_path / "bundle")


@pytest.mark.parametrize("name", ["all", "untied"])
def test_online_rotations(name: str, tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    """R3 stands between the rotary embedding and attention, R4 before `down`: the same logits in both forms."""
    fields = {**RECIPES[name], "activations": None}
    quantized(tiny_model, tmp_path / "checkpoint", text_file, **fields)
    tokens = np.random.default_rng(0).integers(0, 264, (1, 30))
    found = {}
    for form in ("qdq", "fused"):
        export(tmp_path / "checkpoint", "onnx", tmp_path / form, activations="float32", form=form)
        decoder = OnnxDecoder.open(Bundle.open(tmp_path / form), threads=1)
        found[form] = decoder.logits(tokens)
        first, cache = decoder.step(tokens[:, :20], decoder.empty_cache(1))
        second, _ = decoder.step(tokens[:, 20:], cache)
        limit = 2e-5 * np.abs(found[form]).max()
        np.testing.assert_allclose(np.concatenate([first, second], 1), found[form], rtol=0, atol=limit)
        np.testing.assert_allclose(found[form], found["qdq"], rtol=0, atol=limit)
