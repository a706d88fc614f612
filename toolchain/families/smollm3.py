"""SmolLM3: a Llama of which some layers have no RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from toolchain.families.base import AttentionSpec, DecoderSpec, Family
from toolchain.families.common import activation, decoder, layer_names, parse, rope, window


def _describe(config: Mapping[str, Any]) -> DecoderSpec:
    hf = parse(config)
    turn = rope(hf)
    attention = tuple(
        replace(turn if hf.no_rope_layers[layer] else AttentionSpec(), window=window(hf, layer))
        for layer in range(hf.num_hidden_layers)
    )
    return decoder(hf, attention, layer_names, activation=activation(hf, ("silu", "swish")))


FAMILY = Family(
    name="smollm3",
    model_types=("smollm3",),
    architectures=("SmolLM3ForCausalLM",),
    gguf_architectures=(),
    describe=_describe,
)
