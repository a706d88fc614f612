"""OPT with norms before its sublayers: layer norm, biases, learned positions, no RoPE, a plain MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from boa_edge.errors import BoaEdgeError
from toolchain.families.base import AttentionSpec, DecoderSpec, Family, LayerNames
from toolchain.families.common import activation, parse

_NORM_EPS = 1e-5  # torch.nn.LayerNorm's


def _describe(config: Mapping[str, Any]) -> DecoderSpec:
    hf = parse(config)
    fix = "Accepted: OPT with `do_layer_norm_before`, that is all sizes but 350M"
    if not hf.do_layer_norm_before or hf._remove_final_layer_norm:
        where = f"config.json: {'do_layer_norm_before' if not hf.do_layer_norm_before else '_remove_final_layer_norm'}"
        raise BoaEdgeError("norms stand after the sublayers, or the last one is missing", where=where, fix=fix)
    if not hf.layer_norm_elementwise_affine:
        problem = "is false: the norms have no weights, for which there is no export"
        fix = "Accepted: true, with weights of 1 and biases of 0 saved in the norms, which is the same model"
        raise BoaEdgeError(problem, where="config.json: layer_norm_elementwise_affine", fix=fix)
    if hf.word_embed_proj_dim != hf.hidden_size:
        problem = f"embeddings of {hf.word_embed_proj_dim} are projected to {hf.hidden_size}"
        raise BoaEdgeError(problem, where="config.json: word_embed_proj_dim", fix=fix)
    prefix = "model.decoder"
    size = hf.hidden_size // hf.num_attention_heads
    return DecoderSpec(
        family="opt",
        layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.ffn_dim,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_attention_heads,
        head_dim=size,
        vocab_size=hf.vocab_size,
        norm_eps=_NORM_EPS,
        attention=(AttentionSpec(),) * hf.num_hidden_layers,
        attention_scale=size**-0.5,
        max_positions=hf.max_position_embeddings,
        tied_embeddings=bool(hf.tie_word_embeddings),
        embedding=f"{prefix}.embed_tokens",
        final_norm=f"{prefix}.final_layer_norm",
        head="lm_head",
        layer_names=tuple(_names(f"{prefix}.layers.{layer}") for layer in range(hf.num_hidden_layers)),
        norm="layer",
        activation=activation(hf, ("relu", "gelu", "silu"), "activation_function"),
        biases=("q", "k", "v", "o", "up", "down") if hf.enable_bias else (),
        position_table=f"{prefix}.embed_positions",
    )


def _names(prefix: str) -> LayerNames:
    return LayerNames(
        q=f"{prefix}.self_attn.q_proj",
        k=f"{prefix}.self_attn.k_proj",
        v=f"{prefix}.self_attn.v_proj",
        o=f"{prefix}.self_attn.out_proj",
        gate=None,
        up=f"{prefix}.fc1",
        down=f"{prefix}.fc2",
        attention_norm=f"{prefix}.self_attn_layer_norm",
        mlp_norm=f"{prefix}.final_layer_norm",
    )


FAMILY = Family(
    name="opt",
    model_types=("opt",),
    architectures=("OPTForCausalLM",),
    gguf_architectures=(),
    describe=_describe,
)
