"""Llama-type decoders: Llama 2/3, SmolLM2, TinyLlama, Mistral (pre-norm, RoPE, grouped queries, gated SiLU MLP)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from boa_edge.errors import BoaEdgeError
from toolchain.families.base import DecoderSpec, Family, LayerNames


def _rope(config: Any, head_dim: int) -> tuple[tuple[float, ...], float]:
    parameters = getattr(config, "rope_parameters", None) or {}
    rope_type = parameters.get("rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        raise BoaEdgeError(
            f"RoPE type {rope_type!r} changes with the sequence length and cannot be folded into a table",
            where="config.json: rope_scaling",
            fix="Accepted: default, linear, llama3, yarn",
        )
    if rope_type == "default":
        theta = float(parameters.get("rope_theta", 10000.0))
        inverse = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        return tuple(inverse.to(torch.float32).tolist()), 1.0
    inverse, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    return tuple(inverse.to(torch.float32).tolist()), float(scaling)


def _describe(config: Mapping[str, Any]) -> DecoderSpec:
    values = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    hf = AutoConfig.for_model(config["model_type"], **values)
    if hf.hidden_act not in ("silu", "swish"):
        raise BoaEdgeError(f"activation {hf.hidden_act!r}", where="config.json: hidden_act", fix="Accepted: silu")
    window = getattr(hf, "sliding_window", None)
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    inverse, scaling = _rope(hf, head_dim)
    layers = tuple(
        LayerNames(
            q=f"model.layers.{i}.self_attn.q_proj",
            k=f"model.layers.{i}.self_attn.k_proj",
            v=f"model.layers.{i}.self_attn.v_proj",
            o=f"model.layers.{i}.self_attn.o_proj",
            gate=f"model.layers.{i}.mlp.gate_proj",
            up=f"model.layers.{i}.mlp.up_proj",
            down=f"model.layers.{i}.mlp.down_proj",
            attention_norm=f"model.layers.{i}.input_layernorm",
            mlp_norm=f"model.layers.{i}.post_attention_layernorm",
        )
        for i in range(hf.num_hidden_layers)
    )
    return DecoderSpec(
        family="llama",
        layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=hf.vocab_size,
        norm_eps=hf.rms_norm_eps,
        rope_inv_freq=inverse,
        rope_scaling=scaling,
        attention_scale=head_dim**-0.5,
        # Within its window a sliding-window model attends to everything: stay inside it.
        max_positions=min(hf.max_position_embeddings, window) if window else hf.max_position_embeddings,
        tied_embeddings=bool(hf.tie_word_embeddings),
        embedding="model.embed_tokens",
        final_norm="model.norm",
        head="lm_head",
        layer_names=layers,
    )


FAMILY = Family(
    name="llama",
    model_types=("llama", "mistral"),
    architectures=("LlamaForCausalLM", "MistralForCausalLM"),
    gguf_architectures=("llama",),
    describe=_describe,
)
