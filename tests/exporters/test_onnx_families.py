"""Both forms of every family compute what the family's own class computes with the same codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from transformers import LlamaConfig, Phi3Config

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


def checkpoint_of(family: str, directory: Path, text_file: Path, **fields: Any) -> Path:
    recipe = parse_recipe(RECIPE | fields, "test")
    quantize(
        str(make(directory / "model", family)), directory / "checkpoint", recipe=recipe, calibration=str(text_file)
    )
    return directory / "checkpoint"


def padded(decoder: OnnxDecoder, tokens: NDArray[np.int64], by: int) -> NDArray[np.float32]:
    """Logits of the second of two rows, which begins with `by` tokens that do not count; in two steps."""
    row = np.concatenate([np.full((1, by), 7), tokens[:, : tokens.shape[1] - by]], 1)
    mask = np.ones((2, tokens.shape[1]), np.int64)
    mask[1, :by] = 0
    both, cut = np.concatenate([tokens, row]), (by + tokens.shape[1]) // 2
    first, cache = decoder.step(both[:, :cut], decoder.empty_cache(2), mask[:, :cut])
    second, _ = decoder.step(both[:, cut:], cache, mask)
    return np.concatenate([first, second], 1)[1, by:]


def assert_same_logits(checkpoint: Path, form: str, bundle: Path) -> OnnxDecoder:
    """What the bundle gives for the checkpoint's reference text, at once and through the cache."""
    reference = load_file(checkpoint / "reference.safetensors")
    tokens, expected = reference["tokens"][None], reference["quantized_logits"]
    limit = 2e-5 * np.abs(expected).max()
    export(checkpoint, "onnx", bundle, activations="float32", form=form)
    decoder = OnnxDecoder.open(Bundle.open(bundle), threads=1)
    np.testing.assert_allclose(decoder.logits(tokens)[0], expected, rtol=0, atol=limit, err_msg=form)
    first, cache = decoder.step(tokens[:, :9], decoder.empty_cache(1))
    found = [first]
    for i in range(9, tokens.shape[1]):
        logits, cache = decoder.step(tokens[:, i : i + 1], cache)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, 1)[0], expected, rtol=0, atol=limit, err_msg=form)
    if form == "qdq":
        rest = padded(decoder, tokens, 3)
        np.testing.assert_allclose(rest, expected[: len(rest)], rtol=0, atol=limit)
    return decoder


@pytest.mark.parametrize("family", [*sorted(CONFIGS), "phi4-wide"])
def test_logits(family: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "phi4-wide", partly_turned)
    checkpoint = checkpoint_of(family, tmp_path, text_file)
    for form in ("qdq", "fused"):
        assert_same_logits(checkpoint, form, tmp_path / form)


@pytest.mark.parametrize("family", ["gemma3", "opt", "phi4", "qwen3", "smollm3"])
def test_rotated(family: str, text_file: Path, tmp_path: Path) -> None:
    """R1 around the learned positions too, R3 behind head norms, on heads turned in part or not at all, tables."""
    transforms = ["rotate", "rotatekeys", "rotatedown", "rotatetable"]
    checkpoint = checkpoint_of(family, tmp_path, text_file, transforms=transforms)
    for form in ("qdq", "fused"):
        assert_same_logits(checkpoint, form, tmp_path / form)


def test_only_standard_operators(text_file: Path, tmp_path: Path) -> None:
    """Gemma 2 has every feature at once that comes with an operator of its own."""
    checkpoint = checkpoint_of("gemma2", tmp_path, text_file)
    export(checkpoint, "onnx", tmp_path / "bundle", form="qdq")
    model = onnx.load(str(tmp_path / "bundle" / "model.onnx"), load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    # One mask for each window, not one for each layer.
    assert len([node for node in model.graph.node if node.op_type == "Where"]) == 2


def test_heads_that_fused_attention_has_not(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "vocab_size": 264, "max_position_embeddings": 128}
    narrow = LlamaConfig(**shape, **ends, head_dim=12, num_hidden_layers=1, tie_word_embeddings=True)
    monkeypatch.setitem(CONFIGS, "narrow", lambda: narrow)
    # (what reads the heads has 48 columns)
    monkeypatch.setitem(RECIPE, "weights", {"bits": 4, "group_size": 16})
    checkpoint = checkpoint_of("narrow", tmp_path, text_file)
    with pytest.raises(BoaEdgeError, match=r"no heads of 12 channels.*--form qdq"):
        export(checkpoint, "onnx", tmp_path / "bundle", form="fused")
    assert not (tmp_path / "bundle").exists()
    assert_same_logits(checkpoint, "qdq", tmp_path / "bundle")
