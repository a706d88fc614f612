"""Llama-type decoders: Llama 2/3, SmolLM2, TinyLlama, Mistral (pre-norm, RoPE, grouped queries, gated SiLU MLP)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from toolchain.families.base import DecoderSpec, Family
from toolchain.families.common import activation, decoder, layer_names, parse, rope


def _describe(config: Mapping[str, Any]) -> DecoderSpec:
    hf = parse(config)
    attention = replace(rope(hf), window=getattr(hf, "sliding_window", None))
    return decoder(hf, (attention,) * hf.num_hidden_layers, layer_names, activation=activation(hf, ("silu", "swish")))


FAMILY = Family(
    name="llama",
    model_types=("llama", "mistral"),
    architectures=("LlamaForCausalLM", "MistralForCausalLM"),
    gguf_architectures=("llama",),
    describe=_describe,
)
