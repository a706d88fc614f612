"""A program for ExecuTorch computes what the family's own class computes with the same codes and int8 activations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from exporters import Bundle, export
from exporters.executorch.session import ExecutorchDecoder
from tests.conftest import make_model, tiny_config
from tests.exporters.conftest import Tiny
from tests.toolchain.families import CONFIGS, WINDOW, make
from toolchain.activations import ActivationFormat
from toolchain.activations.plan import ActivationPlan
from toolchain.checkpoint import Checkpoint
from toolchain.fake_quantized import FakeQuantized
from toolchain.quantize import quantize
from toolchain.recipe import parse_recipe
from toolchain.transforms import install_runtime

MakeTiny = Callable[..., Tiny]

CALIBRATION = {"sequences": 4, "sequence_length": 32, "held_out_sequences": 1}
RECIPE: dict[str, Any] = {
    "method": "rtn",
    "weights": {"bits": 4, "group_size": 32},
    "embedding": {"bits": 8, "group_size": None},
    "activations": {"scheme": "per_token", "budget": None},
    "calibration": CALIBRATION,
}
# Sums in another order change int8 inputs by one step where they stand near the middle between two.
ROUNDING, TIES = 5e-6, 0.03


def export_to(checkpoint: Path, bundle: Path, context: int | None = None, prefill: int | None = 8) -> ExecutorchDecoder:
    export(checkpoint, "executorch", bundle, context_length=context, prefill_length=prefill)
    return ExecutorchDecoder.open(Bundle.open(bundle))


def modules_of(checkpoint: Checkpoint) -> list[str]:
    names = (*checkpoint.spec.linear_inputs(), checkpoint.spec.head)
    return [name for name in names if checkpoint.is_quantized(name)]


def plan_of(checkpoint: Checkpoint, kept: frozenset[str] = frozenset()) -> ActivationPlan:
    sizes = {name: checkpoint.quantized(name).group_size for name in modules_of(checkpoint)}
    return ActivationPlan(ActivationFormat("per_token"), sizes, kept)


def simulated(path: Path, tokens: Tensor, plan: ActivationPlan | None = None) -> np.ndarray:
    """Logits [length, vocabulary] of the family's own class, with the codes' values and quantized inputs."""
    checkpoint = Checkpoint(path)
    config = {name: value for name, value in checkpoint.config.items() if name != "quantization_config"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).eval()
    state = checkpoint.dequantized_state()
    if checkpoint.spec.tied_embeddings:
        state[f"{checkpoint.spec.head}.weight"] = state[f"{checkpoint.spec.embedding}.weight"]
    model.load_state_dict(state)
    install_runtime(model, checkpoint.spec, checkpoint.transforms)
    fake = FakeQuantized(model, checkpoint.spec, {}, plan or plan_of(checkpoint))
    with torch.inference_mode():
        return fake.logits(tokens)[0].numpy()


def check_logits(
    checkpoint: Path,
    decoder: ExecutorchDecoder,
    length: int,
    plan: ActivationPlan | None = None,
    *,
    exact: bool = False,
) -> None:
    """Token by token and in steps of several, the logits are those of the simulation: to float rounding until the first
    tie, which stays in the cache, and after it up to what a few ties make of them."""
    tokens = torch.randint(2, decoder.runtime.vocab_size, (1, length), generator=torch.Generator().manual_seed(3))
    expected, row = simulated(checkpoint, tokens, plan), tokens[0].tolist()
    found = decoder.logits(tokens.numpy())[0]
    ends = [*range(3, length + 1, 5)]
    several = np.stack([decoder.prefill(row[:end]) for end in ends])
    scale = np.abs(expected).max()
    for errors in (np.abs(found - expected), np.abs(several - expected[[end - 1 for end in ends]])):
        per_token = errors.max(1) / scale
        assert np.quantile(per_token, 0.1) < ROUNDING, per_token
        assert per_token.max() < (ROUNDING if exact else TIES), per_token


# With their contexts: where all layers have a window it is the longest text, elsewhere caches of windows go around.
FAMILIES = {"llama": 40, "mistral": WINDOW, "qwen2": 40, "qwen3": 40, "smollm3": 40, "gemma2": 40, "gemma3": 40}
FAMILIES |= {"phi3": WINDOW, "phi4": 40, "opt": 40}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, text_file: Path, tmp_path: Path) -> None:
    checkpoint, context = tmp_path / "checkpoint", FAMILIES[family]
    recipe = parse_recipe(RECIPE, "test")
    quantize(str(make(tmp_path / "model", family)), checkpoint, recipe=recipe, calibration=str(text_file))
    check_logits(checkpoint, export_to(checkpoint, tmp_path / "bundle", context, 5), context)


def test_a_window_and_a_context_hardly_longer(text_file: Path, tmp_path: Path) -> None:
    """The cache holds the whole context, and still a query does not see all of it."""
    recipe = parse_recipe(RECIPE, "test")
    model = make(tmp_path / "model", "gemma3")
    quantize(str(model), tmp_path / "checkpoint", recipe=recipe, calibration=str(text_file))
    context = WINDOW + 3
    check_logits(tmp_path / "checkpoint", export_to(tmp_path / "checkpoint", tmp_path / "bundle", context, 5), context)


def test_another_activation(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OPT's classes know GELU too, as Galactica has it."""
    config = CONFIGS["opt"]()
    config.activation_function, config.num_hidden_layers = "gelu", 1
    monkeypatch.setitem(CONFIGS, "opt-gelu", lambda: config)
    recipe = parse_recipe(RECIPE, "test")
    model = make(tmp_path / "model", "opt-gelu")
    quantize(str(model), tmp_path / "checkpoint", recipe=recipe, calibration=str(text_file))
    check_logits(tmp_path / "checkpoint", export_to(tmp_path / "checkpoint", tmp_path / "bundle", 30), 30)


def test_rotated(text_file: Path, tmp_path: Path) -> None:
    """Every product that a rotated model owes, with sizes that are no power of two."""
    names = ["rotate", "rotateheads", "rotatekeys", "rotatedown", "rotatetable"]
    recipe = parse_recipe({**RECIPE, "transforms": names}, "test")
    model = make_model(tmp_path / "model", tiny_config(num_hidden_layers=1))
    quantize(str(model), tmp_path / "checkpoint", recipe=recipe, calibration=str(text_file))
    checkpoint = Checkpoint(tmp_path / "checkpoint")
    assert {each.kind for each in checkpoint.transforms} >= {"r1", "r2", "r3", "r4", "rotate_table"}
    check_logits(checkpoint.path, export_to(checkpoint.path, tmp_path / "bundle", 40), 40)


@pytest.mark.parametrize(
    "formats",
    [
        {"bits": 4, "group_size": None, "embedding_bits": 4},
        {"bits": 3, "embedding_bits": 2, "num_hidden_layers": 1, "attention_bias": True, "tie_word_embeddings": False},
        {"bits": 8, "group_size": None, "embedding_bits": None},
        {"embedding_bits": 4, "embedding_group_size": 32, "float_modules": ("model.layers.0.mlp.down_proj",)},
    ],
    ids=str,
)
def test_formats(formats: dict[str, Any], make_tiny: MakeTiny, tmp_path: Path) -> None:
    tiny = make_tiny(**({"embedding_group_size": None} | formats))
    check_logits(tiny.path, export_to(tiny.path, tmp_path / "bundle"), 30)
