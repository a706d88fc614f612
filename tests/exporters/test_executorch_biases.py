"""Biases of linears whose codes meet float32 inputs, in whole programs; and that an export notices wrong logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from boa_edge.errors import BoaEdgeError
from boa_edge.files import write_json
from exporters import Bundle, export
from exporters.executorch.delegate import Delegate, Value
from exporters.executorch.session import ExecutorchDecoder
from tests.exporters.test_executorch import CALIBRATION, check_logits, modules_of, plan_of
from tests.toolchain.families import make
from toolchain.activations.plan import ActivationPlan
from toolchain.checkpoint import ACTIVATIONS, Checkpoint
from toolchain.quantize import quantize
from toolchain.quantized import QuantizedWeight
from toolchain.recipe import parse_recipe

# Each has biases in attention; OPT and Llama (with attention_bias and mlp_bias) in the MLP too.
FAMILIES = ["qwen2", "opt", "llama"]
ROLES = ("q", "k", "v", "o", "up", "down")


def quantized(family: str, bits: int, text: Path, directory: Path) -> Checkpoint:
    """Codes with one scale per output channel, and activations per token."""
    recipe = {
        "method": "rtn",
        "weights": {"bits": bits},
        "embedding": {"bits": 8, "group_size": None},
        "activations": {"scheme": "per_token", "budget": None},
        "calibration": CALIBRATION,
    }
    model = make(directory / "model", family)
    quantize(str(model), directory / "checkpoint", recipe=parse_recipe(recipe, "test"), calibration=str(text))
    return Checkpoint(directory / "checkpoint")


def spare(checkpoint: Checkpoint, *roles: str) -> ActivationPlan:
    """Have the linears of these roles keep floating-point inputs in the first layer."""
    kept = frozenset(getattr(checkpoint.spec.layer_names[0], role) for role in roles)
    plan = plan_of(checkpoint, kept)
    write_json(checkpoint.path / ACTIVATIONS, plan.to_document())
    return plan


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_float_activations(family: str, bits: int, text_file: Path, tmp_path: Path) -> None:
    checkpoint = quantized(family, bits, text_file, tmp_path)
    assert {"q", "k", "v"} <= set(checkpoint.spec.biases)
    output = tmp_path / "bundle"
    export(checkpoint.path, "executorch", output, activations="float32", context_length=30, prefill_length=8)
    plan = plan_of(checkpoint, frozenset(modules_of(checkpoint)))
    check_logits(checkpoint.path, ExecutorchDecoder.open(Bundle.open(output)), 30, plan, exact=True)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_linears(family: str, bits: int, text_file: Path, tmp_path: Path) -> None:
    checkpoint = quantized(family, bits, text_file, tmp_path)
    plan = spare(checkpoint, *ROLES)
    export(checkpoint.path, "executorch", tmp_path / "bundle", context_length=30, prefill_length=8)
    check_logits(checkpoint.path, ExecutorchDecoder.open(Bundle.open(tmp_path / "bundle")), 30, plan)


@pytest.mark.parametrize(
    ("family", "role"), [("qwen2", "k"), ("opt", "up"), ("llama", "down"), ("llama", None)], ids=str
)
def test_an_export_notices_what_only_the_codes_can_tell(
    family: str, role: str | None, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XNNPACK's own way with biases, (x codes + bias) scales, as programs had it once: they agreed with themselves."""

    def scaled(d: Delegate, x: Value, weight: QuantizedWeight, bias: np.ndarray | None = None) -> Value:
        return d._fully_connected(x, d._codes(weight), bias)

    checkpoint = quantized(family, 4, text_file, tmp_path)
    if role is not None:
        spare(checkpoint, role)
    monkeypatch.setattr(Delegate, "quantized_linear", scaled)
    with pytest.raises(BoaEdgeError, match=r"model.pte.*: gives other logits than the checkpoint's codes .*report it"):
        export(
            checkpoint.path,
            "executorch",
            tmp_path / "bundle",
            activations="int8" if role else "float32",
            context_length=30,
            prefill_length=8,
        )
    assert not (tmp_path / "bundle").exists()
