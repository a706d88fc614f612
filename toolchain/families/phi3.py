"""Phi-3 and Phi-4: q, k, v in one module, gate and up in another; Phi-4-mini turns a part of each head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from toolchain.families.base import DecoderSpec, Family, LayerNames
from toolchain.families.common import activation, decoder, head_dim, layer_names, parse, rope


def _describe(config: Mapping[str, Any]) -> DecoderSpec:
    hf = parse(config)
    queries = hf.num_attention_heads * head_dim(hf)
    keys = queries + hf.num_key_value_heads * head_dim(hf)
    values = keys + hf.num_key_value_heads * head_dim(hf)
    rows = {
        "q": (0, queries),
        "k": (queries, keys),
        "v": (keys, values),
        "gate": (0, hf.intermediate_size),
        "up": (hf.intermediate_size, 2 * hf.intermediate_size),
    }

    def names(prefix: str) -> LayerNames:
        attention = dict.fromkeys(("q", "k", "v"), f"{prefix}.self_attn.qkv_proj")
        mlp = dict.fromkeys(("gate", "up"), f"{prefix}.mlp.gate_up_proj")
        return layer_names(prefix, **attention, **mlp, shared_rows=rows)

    attention = replace(rope(hf, partial=True), window=hf.sliding_window)
    return decoder(hf, (attention,) * hf.num_hidden_layers, names, activation=activation(hf, ("silu", "swish")))


FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    architectures=("Phi3ForCausalLM",),
    gguf_architectures=(),
    describe=_describe,
)
