"""Gemma 2 and text-only Gemma 3: norms around each sublayer with 1 + w, scaled embeddings, windows on most layers.

Gemma 2 caps attention scores and logits; Gemma 3 norms each head of q and k and turns windowed layers by a base of
their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from boa_edge.errors import BoaEdgeError
from toolchain.families.base import DecoderSpec, Family, LayerNames
from toolchain.families.common import activation, decoder, layer_names, parse, rope, window


def _gemma2_names(prefix: str, **changes: Any) -> LayerNames:
    return layer_names(
        prefix,
        mlp_norm=f"{prefix}.pre_feedforward_layernorm",
        attention_output_norm=f"{prefix}.post_attention_layernorm",
        mlp_output_norm=f"{prefix}.post_feedforward_layernorm",
        **changes,
    )


def _gemma3_names(prefix: str) -> LayerNames:
    return _gemma2_names(prefix, q_norm=f"{prefix}.self_attn.q_norm", k_norm=f"{prefix}.self_attn.k_norm")


def _describe(config: Mapping[str, Any]) -> DecoderSpec:
    hf = parse(config)
    if hf.use_bidirectional_attention:
        where = "config.json: use_bidirectional_attention"
        raise BoaEdgeError("the model looks ahead", where=where, fix="Only causal language models are served")
    third = hf.model_type == "gemma3_text"
    turns = {kind: rope(hf, layer_type=kind if third else None) for kind in set(hf.layer_types)}
    return decoder(
        hf,
        tuple(replace(turns[hf.layer_types[i]], window=window(hf, i)) for i in range(hf.num_hidden_layers)),
        _gemma3_names if third else _gemma2_names,
        family="gemma3" if third else "gemma2",
        norm="rms_offset",
        activation=activation(hf, ("gelu_pytorch_tanh",), "hidden_activation"),
        attention_scale=hf.query_pre_attn_scalar**-0.5,
        # The classes of Gemma 3 read the field and do not cap.
        attention_softcap=None if third else hf.attn_logit_softcapping,
        logit_softcap=hf.final_logit_softcapping,
        embedding_scale=hf.hidden_size**0.5,
    )


FAMILY = Family(
    name="gemma",
    model_types=("gemma2", "gemma3_text"),
    architectures=("Gemma2ForCausalLM", "Gemma3ForCausalLM"),
    gguf_architectures=("gemma2", "gemma3"),
    describe=_describe,
)
