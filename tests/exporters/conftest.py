"""Tiny random Llama checkpoints, quantized round-to-nearest, as `quantize` would write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from boa_edge.files import write_json, write_text
from exporters import Bundle, export
from exporters.base import Activations
from exporters.bundle import Form
from exporters.onnx.session import OnnxDecoder
from toolchain.checkpoint import Checkpoint, write_weights
from toolchain.families import describe
from toolchain.quantized import QuantizedWeight, code_range


def round_to_nearest(weight: Tensor, bits: int, group_size: int | None, symmetric: bool) -> QuantizedWeight:
    """float32 [out, in] -> codes on a minimum-maximum grid with bfloat16 scales."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, group_size or columns)
    low, high = code_range(bits)
    if symmetric:
        scales = groups.abs().amax(-1) / -low
        zeros = torch.zeros_like(scales)
    else:
        smallest, largest = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = (largest - smallest) / (high - low)
        zeros = (low - smallest / scales).round().clamp(low, high)
    scales = scales.clamp(min=1e-6).bfloat16().float()
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(low, high)
    return QuantizedWeight(
        codes=codes.reshape(rows, columns).to(torch.int8),
        scales=scales,
        zero_points=None if symmetric else zeros.to(torch.int8),
        bits=bits,
        group_size=group_size,
    )


@dataclass(frozen=True)
class Tiny:
    """A checkpoint on disk."""

    path: Path

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.path)

    def model(self) -> LlamaForCausalLM:
        """PyTorch's model with the values that the codes stand for."""
        config = {key: value for key, value in self.checkpoint.config.items() if key != "quantization_config"}
        model = LlamaForCausalLM(LlamaConfig(**config)).eval()
        missing, unexpected = model.load_state_dict(self.checkpoint.dequantized_state(), strict=False)
        model.tie_weights()
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}
        assert not missing or config["tie_word_embeddings"]
        return model

    def export(self, output: Path, activations: Activations = "float32", form: Form = "qdq") -> Bundle:
        export(self.path, "onnx", output, activations=activations, form=form)
        return Bundle.open(output)

    def decoder(self, output: Path, activations: Activations = "float32", form: Form = "qdq") -> OnnxDecoder:
        return OnnxDecoder.open(self.export(output, activations, form), threads=1)


SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def make_tiny(tmp_path: Path) -> Callable[..., Tiny]:
    """Factory: `make_tiny(bits=4, group_size=32, symmetric=True, embedding_bits=8, head_bits=8, **config)`."""

    def make(
        *,
        bits: int = 4,
        group_size: int | None = 32,
        symmetric: bool = True,
        embedding_bits: int | None = 8,
        embedding_symmetric: bool = True,
        embedding_group_size: int | Literal["same"] | None = "same",
        name: str = "checkpoint",
        float_modules: tuple[str, ...] = (),
        module_bits: Mapping[str, int] | None = None,
        **overrides: Any,
    ) -> Tiny:
        torch.manual_seed(0)
        config = LlamaConfig(**{**SHAPE, **overrides})
        model = LlamaForCausalLM(config)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("norm.weight", "bias")):
                torch.nn.init.normal_(parameter, mean=0.0 if "bias" in parameter_name else 1.0, std=0.2)
        document = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
        spec = describe(document, "config.json")
        own_bits = module_bits or {}
        modules = {
            name: (own_bits.get(name, bits), symmetric) for name in spec.linear_inputs() if name not in float_modules
        }
        if embedding_bits is not None:
            modules[spec.embedding] = (embedding_bits, embedding_symmetric)
            if not spec.tied_embeddings:
                modules[spec.head] = (embedding_bits, embedding_symmetric)
        floats = {key: tensor.detach() for key, tensor in model.state_dict().items()}
        quantized = {}
        for module, (width, even) in modules.items():
            weight = floats.pop(f"{module}.weight")
            outside = module in (spec.embedding, spec.head) and embedding_group_size != "same"
            size = embedding_group_size if outside else group_size
            quantized[module] = round_to_nearest(weight, width, size, even)  # type: ignore[arg-type]
        if spec.tied_embeddings:
            floats.pop("lm_head.weight", None)
        path = tmp_path / name
        path.mkdir()
        write_weights(path, document, spec, quantized, floats, torch.bfloat16)
        write_text(path / "recipe.yaml", f"bits: {bits}\n")
        write_json(path / "provenance.json", {"source": "random"})
        write_json(path / "generation_config.json", {"eos_token_id": [2, 3], "bos_token_id": 1})
        write_text(path / "tokenizer.json", "{}")
        write_text(path / "chat_template.jinja", "{{ messages }}")
        return Tiny(path)

    return make
