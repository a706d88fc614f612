"""The exported graph computes what the PyTorch model computes from the same codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.exporters.conftest import Tiny

TOLERANCE = 2e-5
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

MIXED = {
    "model.layers.0.self_attn.q_proj": 8,
    "model.layers.0.self_attn.v_proj": 3,
    "model.layers.0.mlp.up_proj": 2,
    "model.layers.1.mlp.down_proj": 2,
}

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "asymmetric": {"symmetric": False, "embedding_symmetric": False},
    "per-channel": {"group_size": None},
    "per-channel-asymmetric": {"group_size": None, "symmetric": False, "embedding_symmetric": False},
    "2-bit": {"bits": 2},
    "3-bit": {"bits": 3, "group_size": 64},
    "8-bit": {"bits": 8, "symmetric": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "untied": {"tie_word_embeddings": False},
    "untied-asymmetric": {"tie_word_embeddings": False, "embedding_symmetric": False},
    "untied-4-bit-table": {"tie_word_embeddings": False, "embedding_bits": 4},
    "tied-4-bit-table": {"embedding_bits": 4},
    "float-tied": {"embedding_bits": None},
    "float-untied": {"embedding_bits": None, "tie_word_embeddings": False},
    "wide-heads": {"head_dim": 32},
    "one-kv-head": {"num_key_value_heads": 1},
    "all-kv-heads": {"num_key_value_heads": 4},
    "llama3-rope": {"rope_parameters": LLAMA3},
    "yarn-rope": {"rope_parameters": YARN},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}},
    "mixed-bits": {"module_bits": MIXED},
    "mixed-bits-asymmetric": {"module_bits": MIXED, "symmetric": False},
    "one-float-linear": {"float_modules": ("model.layers.1.mlp.down_proj",)},
}


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_each_linear_keeps_its_own_bits_under_int8_activations(make_tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    tiny = make_tiny(module_bits=MIXED)
    checkpoint = tiny.checkpoint
    assert {name: checkpoint.quantized(name).bits for name in MIXED} == MIXED
    assert checkpoint.quantized("model.layers.1.self_attn.q_proj").bits == 4
    tokens = np.random.default_rng(0).integers(0, 96, (1, 40))
    with torch.no_grad():
        expected = tiny.model()(torch.from_numpy(tokens)).logits.numpy()
    found = tiny.decoder(tmp_path / "bundle", "int8").logits(tokens)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("case", CASES)
def test_equals_pytorch(case: str, make_tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    tiny = make_tiny(**CASES[case])
    decoder = tiny.decoder(tmp_path / "bundle")
    model = tiny.model()
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 96, (2, 40))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    close(decoder.logits(tokens), expected)

    # The same through the cache: a prefill, a chunk of several tokens, then one by one.
    cache = decoder.empty_cache(2)
    parts = []
    for start, end in ((0, 7), (7, 20), *((i, i + 1) for i in range(20, 40))):
        logits, cache = decoder.step(tokens[:, start:end], cache)
        parts.append(logits)
    close(np.concatenate(parts, axis=1), expected)
    assert cache["past_key_values.1.key"].shape == (2, decoder.kv_heads, 40, decoder.head_dim)


def test_left_padding(make_tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    tiny = make_tiny()
    decoder = tiny.decoder(tmp_path / "bundle")
    model = tiny.model()
    rng = np.random.default_rng(1)
    long, short = rng.integers(0, 96, (1, 12)), rng.integers(0, 96, (1, 7))
    tokens = np.concatenate([long, np.concatenate([np.zeros((1, 5), np.int64), short], axis=1)])
    mask = np.ones((2, 12), np.int64)
    mask[1, :5] = 0
    with torch.no_grad():
        whole, part = (model(torch.from_numpy(each)).logits.numpy()[0] for each in (long, short))
    logits, cache = decoder.step(tokens[:, :9], decoder.empty_cache(2), mask[:, :9])
    assert np.isfinite(logits).all()
    rest, cache = decoder.step(tokens[:, 9:], cache, mask)
    logits = np.concatenate([logits, rest], axis=1)
    close(logits[0], whole)
    close(logits[1, 5:], part)

    following = np.asarray([[3], [4]])
    logits, _ = decoder.step(following, cache, np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1))
    with torch.no_grad():
        for row, tokens_of_row in enumerate((long, short)):
            sequence = torch.from_numpy(np.concatenate([tokens_of_row[0], following[row]])[None])
            close(logits[row, 0], model(sequence).logits.numpy()[0, -1])


def test_greedy_equals_generate(make_tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    tiny = make_tiny()
    prompt = [5, 17, 42]
    model = tiny.model()
    model.generation_config.eos_token_id = None
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert tiny.decoder(tmp_path / "bundle").greedy(prompt, 24) == expected[0, 3:].tolist()


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (2, False), (3, True), (4, True), (4, False), (8, True)])
def test_int8_activations_stay_close(
    bits: int, symmetric: bool, make_tiny: Callable[..., Tiny], tmp_path: Path
) -> None:
    tiny = make_tiny(bits=bits, symmetric=symmetric)
    tokens = np.random.default_rng(2).integers(0, 96, (1, 24))
    with torch.no_grad():
        expected = tiny.model()(torch.from_numpy(tokens)).logits.numpy()
    actual = tiny.decoder(tmp_path / "bundle", "int8").logits(tokens)
    assert 0 < np.abs(actual - expected).max() < 0.2 * np.abs(expected).max()
