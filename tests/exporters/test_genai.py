"""onnxruntime-genai, the official client, generates from the fused bundle as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime_genai as genai
import pytest

from exporters import Bundle, export
from exporters.onnx.session import OnnxDecoder
from toolchain.quantize import quantize
from toolchain.recipe import load_recipe, parse_recipe

SMALL = {"sequences": 8, "sequence_length": 64, "held_out_sequences": 2}


def generated(model: Any, prompt: Sequence[int], new_tokens: int, chunks: int = 1) -> list[int]:
    """What the client generates; by its own rules, so it stops at an end-of-sequence token."""
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + new_tokens)
    generator = genai.Generator(model, parameters)
    size = -(-len(prompt) // chunks)
    for start in range(0, len(prompt), size):
        generator.append_tokens(list(prompt[start : start + size]))
    found = []
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    return found


def assert_same(bundle: Bundle, text: str, new_tokens: int) -> None:
    model = genai.Model(str(bundle.path))
    tokenizer = genai.Tokenizer(model)
    prompt = [int(token) for token in tokenizer.encode(text)]
    expected = OnnxDecoder.open(bundle, threads=1).greedy(prompt, new_tokens)
    ends = [i for i, token in enumerate(expected) if token in bundle.runtime.eos_token_ids]
    expected = expected[: ends[0] + 1] if ends else expected
    assert len(set(expected)) > 1
    for chunks in (1, 2):
        assert generated(model, prompt, new_tokens, chunks) == expected
    assert isinstance(tokenizer.decode(expected), str)


@pytest.mark.parametrize(
    ("activations", "cache"), [("int8", None), ("float32", None), ("int8", {"scheme": "per_head"})]
)
def test_the_same_greedy_tokens(
    activations: Any, cache: Any, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    document = {"method": "rtn", "weights": {"bits": 4, "group_size": 32}, "calibration": SMALL, "kv_cache": cache}
    recipe = parse_recipe(document, "test")
    quantize(str(tiny_model), tmp_path / "checkpoint", recipe=recipe, calibration=str(text_file))
    export(tmp_path / "checkpoint", "onnx", tmp_path / "bundle", activations=activations, form="fused")
    assert_same(Bundle.open(tmp_path / "bundle"), "the official client", 40)


@pytest.mark.slow
def test_the_default_model(tmp_path: Path, text_file: Path) -> None:
    quantize("default", tmp_path / "checkpoint", recipe=load_recipe("w4g32-rtn"), calibration=str(text_file))
    export(tmp_path / "checkpoint", "onnx", tmp_path / "bundle", form="fused")
    bundle = Bundle.open(tmp_path / "bundle")
    assert_same(bundle, "The capital of France is", 32)
    chat = genai.Tokenizer(genai.Model(str(bundle.path))).apply_chat_template(
        '[{"role": "user", "content": "Name a city."}]', add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>assistant\n")
    assert "Name a city." in chat
