"""What the checkpoint's codes give in PyTorch, one linear in memory at a time: what a program is held against."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from numpy.typing import NDArray
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from boa_edge.errors import BoaEdgeError
from toolchain.activations.plan import ActivationPlan
from toolchain.checkpoint import Checkpoint
from toolchain.fake_quantized import FakeQuantized
from toolchain.transforms import install_runtime


def reference_logits(
    checkpoint: Checkpoint, tokens: NDArray[np.int64], activations: ActivationPlan | None
) -> NDArray[np.float32]:
    """Logits float32 [batch, length, vocabulary] of the family's own class with the values of the codes.

    Args:
        tokens: int64 [batch, length].
        activations: how inputs of linears are rounded; the cache is as the checkpoint has it.

    Raises:
        BoaEdgeError: the checkpoint's tensors are not those of its configuration.
    """
    model = _model(checkpoint)
    fake = FakeQuantized(model, checkpoint.spec, {}, activations, checkpoint.kv_cache)
    with torch.inference_mode():
        logits: NDArray[np.float32] = fake.logits(torch.from_numpy(tokens)).numpy()
    return logits


def difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Relative to what tells one token from another: 0 for the same, about 1.4 for what has nothing in common."""
    spread, size = (float(np.linalg.norm(x)) for x in (expected - expected.mean(-1, keepdims=True), expected))
    return float(np.linalg.norm(found - expected)) / max(spread, 1e-3 * size, 1e-6)


def _model(checkpoint: Checkpoint) -> nn.Module:
    spec = checkpoint.spec
    settings = {name: value for name, value in checkpoint.config.items() if name != "quantization_config"}
    with init_empty_weights(include_buffers=False):
        config = AutoConfig.for_model(**settings)
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    tied = f"{spec.head}.weight" if spec.tied_embeddings else None
    for name, parameter in dict(model.named_parameters(remove_duplicate=False)).items():
        module, _, part = name.rpartition(".")
        if name == tied:
            continue
        owner = model.get_submodule(module)
        if part == "weight" and isinstance(owner, nn.Linear) and checkpoint.is_quantized(module):
            _read_when_called(checkpoint, module, owner)
            continue
        quantized = part == "weight" and checkpoint.is_quantized(module)
        value = checkpoint.quantized(module).dequantize() if quantized else checkpoint.tensor(name).to(torch.float32)
        if value.shape != parameter.shape:
            problem = f"{name} has shape {list(value.shape)}; the configuration wants {list(parameter.shape)}"
            raise BoaEdgeError(problem, where=checkpoint.path / "model.safetensors", fix="Quantize the model again")
        setattr(owner, part, nn.Parameter(value, requires_grad=False))
    if tied is not None:
        table = model.get_submodule(spec.embedding).weight
        model.get_submodule(spec.head).weight = table
    install_runtime(model, spec, checkpoint.transforms)
    return model


def _read_when_called(checkpoint: Checkpoint, module: str, linear: nn.Linear) -> None:
    """Have `linear` hold its weight only while it computes."""
    empty = linear.weight

    def read(_: nn.Module, __: Any) -> None:
        value = checkpoint.quantized(module).dequantize()
        if value.shape != empty.shape:
            problem = f"{module} has codes of shape {list(value.shape)}; the configuration wants {list(empty.shape)}"
            raise BoaEdgeError(problem, where=checkpoint.path / "model.safetensors", fix="Quantize the model again")
        linear.weight = nn.Parameter(value, requires_grad=False)

    def let_go(*_: Any) -> None:
        linear.weight = empty

    linear.register_forward_pre_hook(read)
    linear.register_forward_hook(let_go)
