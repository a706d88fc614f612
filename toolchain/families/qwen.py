"""Qwen2, Qwen2.5 (biases on q, k and v) and Qwen3 (a norm on each head of q and k); some layers may have a window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from toolchain.families.base import DecoderSpec, Family, LayerNames
from toolchain.families.common import activation, biases, decoder, layer_names, parse, rope, window


def _qwen3_names(prefix: str) -> LayerNames:
    return layer_names(prefix, q_norm=f"{prefix}.self_attn.q_norm", k_norm=f"{prefix}.self_attn.k_norm")


def _describe(config: Mapping[str, Any]) -> DecoderSpec:
    hf = parse(config)
    turn = rope(hf)
    normed = hf.model_type == "qwen3"
    return decoder(
        hf,
        tuple(replace(turn, window=window(hf, layer)) for layer in range(hf.num_hidden_layers)),
        _qwen3_names if normed else layer_names,
        activation=activation(hf, ("silu", "swish")),
        biases=biases(hf) if normed else ("q", "k", "v"),
    )


FAMILY = Family(
    name="qwen",
    model_types=("qwen2", "qwen3"),
    architectures=("Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    gguf_architectures=("qwen2", "qwen3"),
    describe=_describe,
)
