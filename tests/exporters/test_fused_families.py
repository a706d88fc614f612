"""The fused form of every family computes what the family's own class computes with the same codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import Phi3Config

from boa_edge.errors import BoaEdgeError
from exporters import Bundle, export
from exporters.onnx.session import OnnxDecoder
from tests.toolchain.families import CONFIGS, make
from toolchain.quantize import quantize
from toolchain.recipe import parse_recipe

SMALL = {"sequences": 4, "sequence_length": 32, "held_out_sequences": 1}
RECIPE = {"method": "rtn", "weights": {"bits": 4, "group_size": 32}, "calibration": SMALL}


def partly_turned() -> Phi3Config:
    """Phi-4 with heads of 32 channels, of which 16 are turned, as its real size has 96 of 128."""
    small = CONFIGS["phi4"]()
    rope = dict(small.rope_parameters)
    rope |= {"short_factor": [1 + i / 10 for i in range(8)], "long_factor": [2.0**i for i in range(8)]}
    shape = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    ends = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True}
    return Phi3Config(
        **shape,
        **ends,
        intermediate_size=96,
        vocab_size=264,
        max_position_embeddings=128,
        original_max_position_embeddings=64,
        rope_parameters=rope,
    )


@pytest.mark.parametrize("family", [*sorted(set(CONFIGS) - {"opt", "phi4"}), "phi4-wide"])
def test_logits(family: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "phi4-wide", partly_turned)
    checkpoint = tmp_path / "checkpoint"
    recipe = parse_recipe(RECIPE, "test")
    quantize(str(make(tmp_path / "model", family)), checkpoint, recipe=recipe, calibration=str(text_file))
    export(checkpoint, "onnx", tmp_path / "bundle", activations="float32", form="fused")
    decoder = OnnxDecoder.open(Bundle.open(tmp_path / "bundle"), threads=1)
    reference = load_file(checkpoint / "reference.safetensors")
    tokens, expected = reference["tokens"][None], reference["quantized_logits"]
    limit = 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(decoder.logits(tokens)[0], expected, rtol=0, atol=limit)
    first, cache = decoder.step(tokens[:, :9], decoder.empty_cache(1))
    found = [first]
    for i in range(9, tokens.shape[1]):
        logits, cache = decoder.step(tokens[:, i : i + 1], cache)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, 1)[0], expected, rtol=0, atol=limit)


REFUSED = {
    "opt": r"layer norms.*learned positions.*an MLP without a gate",
    "phi4": r"RoPE on a number of channels that 16 does not divide",
}


@pytest.mark.parametrize(("family", "refused"), REFUSED.items())
def test_refused_before_any_work(family: str, refused: str, text_file: Path, tmp_path: Path) -> None:
    model, recipe = make(tmp_path / "model", family), parse_recipe(RECIPE, "test")
    quantize(str(model), tmp_path / "checkpoint", recipe=recipe, calibration=str(text_file))
    with pytest.raises(BoaEdgeError, match=refused + r".*Accepted: decoders with RMS norms"):
        export(tmp_path / "checkpoint", "onnx", tmp_path / "bundle", form="fused")
    assert not (tmp_path / "bundle").exists()
